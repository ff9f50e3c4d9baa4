"""The console's files, how they are served, and the operation that it asks of the API. No browser is needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from genretrieval.errors import PermissionDeniedError, RequestError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin import api
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.console import ASSETS, HEADERS, PAGE
from genretrieval_serving.admin.resources import Kind, Scope
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.client import Client
from genretrieval_serving.observability import Metrics

TEXTS = {name: asset.content.decode() for name, asset in ASSETS.items()}
SCRIPTS = {name: text for name, text in TEXTS.items() if name.endswith(".js")}
URLS = {"/console" if name == PAGE else f"/console/{name}": name for name in ASSETS}


class FakeServing:
    """Answers with the request's query."""

    async def retrieve(self, request: RetrieveRequest, caller: str) -> RetrieveResponse:
        return RetrieveResponse(items=[], applied=[request.query or ""])


class NoKeys:
    """Lets nobody in."""

    def list_keys(self) -> list[object]:
        return [self]


@pytest.fixture
def http() -> Iterator[TestClient]:
    """An application whose API needs keys that nobody has."""
    store: Any = object()
    app = api.create_app(store, FakeServing(), Authenticator(NoKeys()), Metrics(), quiet=True)
    with TestClient(app, follow_redirects=False) as client:
        yield client


@pytest.mark.parametrize("url", URLS)
def test_a_file_is_open_and_closed_to_everything_else(http, url) -> None:
    answer = http.get(url)
    assert (answer.status_code, answer.text) == (200, TEXTS[URLS[url]])
    kind = {"html": "text/html", "css": "text/css", "js": "text/javascript"}[URLS[url].partition(".")[2]]
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert {name: answer.headers[name] for name in HEADERS} == HEADERS
    assert answer.headers["content-security-policy"].split("; ") == [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    head = http.head(url)
    assert (head.status_code, head.headers["etag"]) == (200, answer.headers["etag"])
    refused = http.post(url)
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
    assert refused.headers["content-type"] == "application/problem+json"


def test_a_browser_that_has_a_file_is_sent_none(http) -> None:
    etag = http.get("/console").headers["etag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = http.get("/console", headers={"If-None-Match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
        assert answer.headers["cache-control"] == "no-cache"
    assert http.get("/console", headers={"If-None-Match": '"other"'}).status_code == 200
    assert len({asset.etag for asset in ASSETS.values()}) == len(ASSETS)


def test_whoever_opens_the_port_is_sent_to_the_page(http) -> None:
    answer = http.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/console")
    assert answer.headers["content-security-policy"] == HEADERS["Content-Security-Policy"]


@pytest.mark.parametrize(
    "name", ["other.js", PAGE, "..%2fconsole.py", "%2e%2e/console.py", "core.js/x", "CORE.JS", "core.js%00"]
)
def test_no_other_name_is_a_file(http, name) -> None:
    answer = http.get(f"/console/{name}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reason"] == "NOT_FOUND"


def test_the_package_has_these_files_and_no_others() -> None:
    # The wheel takes every file of the package, which test_packaging looks at.
    folder = files("genretrieval_serving.admin") / "_console"
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {n: a.content for n, a in ASSETS.items()}


def test_every_file_that_is_named_exists_and_every_file_is_named() -> None:
    asked = re.findall(r'(?:src|href)="(/[^"]*)"', TEXTS[PAGE])
    asked += [url for text in SCRIPTS.values() for url in re.findall(r'from "([^"]*)"', text)]
    assert set(asked) | {"/console"} == set(URLS)


@pytest.mark.parametrize("name", ASSETS)
def test_nothing_is_loaded_from_elsewhere_or_read_as_html(name) -> None:
    text = TEXTS[name]
    for never in ("http:", "https:", "//cdn", "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write",
                  "localStorage", "document.cookie", "eval(", "new Function", "@import", "url("):  # fmt: skip
        assert never not in text, never
    if name == PAGE:
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)", text)
    assert max(map(len, text.splitlines())) <= 120


def test_every_call_is_an_operation_of_the_api() -> None:
    paths = {re.sub(r"\{\w+\}", "{}", path) for path in api.openapi()["paths"]}
    called = {path for text in SCRIPTS.values() for path in re.findall(r'["`](/v1/[^"`]*)["`]', text)}
    kinds = ("keywords", "rules", "synonyms")
    called = {path.replace("${kind}", kind) for path in called for kind in kinds}
    # What stands in other braces is an id.
    called = {re.sub(r"\$\{[^}]*\}", "{}", path) for path in called}
    assert len(called) > 20
    assert called - paths == set()


def test_every_type_of_keyword_can_be_chosen() -> None:
    schema = api.openapi()["components"]["schemas"]["AttributeType"]
    (listed,) = re.findall(r"const TYPES = \[(.*?)\]\.map", TEXTS["resources.js"], re.DOTALL)
    assert re.findall(r'"(\w+)"', listed) == schema["enum"]


def test_a_request_is_answered_by_what_serves(live_http) -> None:
    answer = live_http.post("/v1/retrieve", json={"query": "red"})
    assert (answer.status_code, answer.json()["applied"]) == (200, ["red"])
    refused = live_http.post("/v1/retrieve", json={"query": 5})
    assert (refused.status_code, refused.json()["reason"]) == (400, "REQUEST")
    assert live_http.post("/v1/retrieve?top_k=3", json={}).status_code == 400


@pytest.fixture
def live_http() -> Iterator[TestClient]:
    store: Any = object()
    app = api.create_app(store, FakeServing(), Authenticator(), Metrics(), quiet=True)
    with TestClient(app) as client:
        yield client


@pytest.fixture(scope="module")
def shop(keyword_bundle: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("shop")
    with closing(SqlStore.open(f"sqlite:///{folder}/admin.db")) as store, serving(keyword_bundle, store=store) as it:
        yield it


def asked(shop: Any, **request: Any) -> RetrieveResponse:
    answer = httpx.post(f"{shop.admin}/v1/retrieve", json=request)
    if answer.is_error:
        error = {400: RequestError, 403: PermissionDeniedError, 409: StaleReplicaError, 503: UnavailableError}
        raise error[answer.status_code](answer.json()["detail"])
    return RetrieveResponse.model_validate_json(answer.content)


def test_the_operation_answers_as_the_server_does_with_what_is_in_force(shop) -> None:
    with AdminClient(shop.admin) as admin, Client(shop.http) as client:
        admin.create(Kind.KEYWORDS, {"text": "Labubu", "binding": {"items": {"item_ids": ["item-17"]}}})
        pin = {"kind": "pin", "items": [{"item_id": "item-20", "position": 2}]}
        admin.create(Kind.RULES, {"id": "gift", "effect": pin, "condition": {"scenarios": ["home"]}})
        request = {"query": "labubu", "scenario": "home", "top_k": 4, "history": [{"item_id": "item-1"}]}
        here, there = asked(shop, **request), client.retrieve(**request)
        assert [item.item_id for item in here.items[:2]] == ["item-17", "item-20"]
        assert here.items[0].touched_by == ["keywords/labubu"]
        assert set(here.applied) == {"keywords/labubu", "rules/gift"}
        assert (here.items, here.revision, here.degraded) == (there.items, there.revision, there.degraded)
        assert asked(shop, min_revision=here.revision).revision == here.revision
        with pytest.raises(StaleReplicaError):
            asked(shop, min_revision=here.revision + 1)
        with pytest.raises(RequestError, match="'colour'"):
            asked(shop, filters={"attributes": {"colour": ["red"]}})


def test_an_answer_says_that_the_admin_state_may_be_old(shop, monkeypatch) -> None:
    assert "admin_state_stale" not in asked(shop).degraded
    monkeypatch.setattr("genretrieval_serving.admin.replica.STALE_SECONDS", -1.0)
    assert "admin_state_stale" in asked(shop).degraded


def test_a_loading_server_answers_nothing_yet(keyword_bundle, serving, tmp_path) -> None:
    with (
        closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store,
        serving(keyword_bundle, store=store, load=False) as running,
    ):
        with pytest.raises(UnavailableError, match="still being loaded"):
            asked(running)
        assert httpx.get(f"{running.admin}/console").status_code == 200


def test_reading_is_enough_and_retrieving_is_not(keyword_bundle, serving, tmp_path) -> None:
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store:
        statuses = {Scope.ADMIN_READ: 200, Scope.RETRIEVE: 403}
        secrets = {scope: store.create_key(scope.replace(".", "-"), [scope])[1] for scope in statuses}
        with serving(keyword_bundle, store=store, auth=True) as running:
            for scope, status in statuses.items():
                headers = {"Authorization": f"Bearer {secrets[scope]}"}
                answer = httpx.post(f"{running.admin}/v1/retrieve", json={}, headers=headers)
                assert answer.status_code == status, json.dumps(answer.json())
