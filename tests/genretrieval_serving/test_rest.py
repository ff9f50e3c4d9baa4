"""A call that the framework is passed over for is answered as the framework would."""

from __future__ import annotations

import httpx
import pytest

JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("body", "headers", "detail"),
    [
        (b'{"query": "x"', JSON, "JSON"),
        (b"", JSON, "body"),
        (b"[]", JSON, "object"),
        (b'{"query": "\xff"}', JSON, ""),
        (b'{"query": "\\ud800"}', JSON, ""),
        (b'{"top_k": 1, "colour": "red"}', JSON, "colour: Extra inputs are not permitted"),
        (b'{"history": [{"item_id": "a"}, {"item_id": ""}]}', JSON, "history.1.item_id"),
        (b'{"filters": {"min_price": NaN}}', JSON, "filters.min_price"),
        (b'{"top_k": 1.5}', JSON, "top_k"),
        (b'{"top_k": "1"}', JSON, "top_k"),
        (b"[" * 100_000, JSON, ""),
        (b"{}", {}, ""),
        (b"{}", {"Content-Type": "text/plain"}, ""),
    ],
)
def test_a_body_that_is_no_request_is_the_callers_fault(running, body, headers, detail) -> None:
    direct = httpx.post(f"{running.http}/v1/retrieve", content=body, headers=headers)
    assert direct.status_code == 400
    assert direct.json()["reason"] in ("REQUEST", "BAD_REQUEST")
    assert detail in direct.json()["detail"]
    framework = httpx.post(
        f"{running.http}/v1/retrieve:batch", content=b'{"requests": [' + body + b"]}", headers=headers
    )
    assert framework.status_code == 400


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.shop+json"])
def test_json_by_any_of_its_names_is_read(running, kind) -> None:
    answer = httpx.post(f"{running.http}/v1/retrieve", content=b'{"top_k": 2}', headers={"Content-Type": kind})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert len(answer.json()["items"]) == 2
