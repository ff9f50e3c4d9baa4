"""Resources as files: what is exported and imported again is the same, and no spreadsheet runs it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval.errors import RequestError
from genretrieval.keywords import AttributeType
from genretrieval.request import Filters
from genretrieval_serving.admin import api
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.messages import STORED, fields_of
from genretrieval_serving.admin.resources import (
    AliasFields,
    Binding,
    BlockEffect,
    BoostEffect,
    Canary,
    Condition,
    Fields,
    KeywordFields,
    Kind,
    PinEffect,
    PinnedItem,
    QueryMatch,
    Resource,
    RuleFields,
    Selector,
    SynonymsFields,
)
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.transfer import FileFormat, read, write
from genretrieval_serving.observability import Metrics

NOW = datetime(2026, 7, 1, tzinfo=UTC)
FORMULA = ("=", "+", "-", "@", "\t", "\r")
FORMATS = list(FileFormat)

# Anything that JSON can say, with what spreadsheets and CSV stumble over put in front often.
letters = st.characters(codec="utf-8")
prefixes = st.sampled_from(["", *FORMULA, "'", "'=", "''@", '"', ",", "\n", "\r\n", " ", "\ufeff"])
texts = st.builds(lambda prefix, rest: (prefix + rest) or "x", prefixes, st.text(letters, max_size=12))
notes = st.just("") | texts
zones = st.sampled_from([UTC, timezone(timedelta(hours=9)), timezone(-timedelta(hours=3, minutes=30))])
times = st.none() | st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1), timezones=zones)
numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)


def windowed(model: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A model with a window whose end comes after its beginning."""

    def build(begins: datetime | None, ends: datetime | None, **given_: Any) -> Any:
        if begins and ends and begins >= ends:
            ends = begins + timedelta(microseconds=1)
        return model(valid_from=begins, valid_until=ends, **given_)

    return st.builds(build, times, times, **fields)


filters = st.builds(
    Filters,
    attributes=st.dictionaries(texts, st.lists(texts, max_size=2), max_size=2),
    min_price=numbers,
    max_price=numbers,
    in_stock=st.sampled_from([None, True, False]),
)
selectors = st.builds(Selector, item_ids=st.lists(texts, min_size=1, max_size=3)) | st.builds(
    Selector, text=texts, filters=st.none() | filters
)
pins = st.lists(
    st.tuples(texts, st.integers(1, 500)), min_size=1, max_size=3, unique_by=(lambda p: p[0], lambda p: p[1])
)
effects = st.one_of(
    pins.map(lambda chosen: PinEffect(kind="pin", items=[PinnedItem(item_id=i, position=p) for i, p in chosen])),
    st.builds(
        BoostEffect,
        kind=st.sampled_from(["boost", "bury"]),
        items=selectors,
        amount=st.floats(0, 1000, exclude_min=True),
    ),
    st.builds(BlockEffect, kind=st.just("block"), items=selectors),
)
queries = st.builds(QueryMatch, match=st.sampled_from(["exact", "contains", "regex"]), text=texts)
FIELDS: dict[Kind, st.SearchStrategy[Any]] = {
    Kind.KEYWORDS: st.builds(
        KeywordFields,
        text=texts,
        type=st.sampled_from(AttributeType),
        binding=st.none() | windowed(Binding, items=selectors),
        note=notes,
    ),
    Kind.RULES: windowed(
        RuleFields,
        condition=st.builds(Condition, query=st.none() | queries, scenarios=st.lists(texts, max_size=2)),
        effect=effects,
        priority=st.integers(-1000, 1000),
        enabled=st.booleans(),
        note=notes,
    ),
    Kind.SYNONYMS: st.builds(
        SynonymsFields,
        kind=st.sampled_from(["one_way", "two_way"]),
        terms=st.lists(texts, min_size=2, max_size=4),
        enabled=st.booleans(),
        note=notes,
    ),
    Kind.ALIASES: st.builds(
        AliasFields,
        bundle=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,9}", fullmatch=True),
        canary=st.none() | st.builds(Canary, bundle=st.just("canary.bundle"), share=st.floats(0, 1)),
        note=notes,
    ),
}


def stored(kind: Kind, n: int, fields: Fields) -> Resource:
    added = {"id": f"id-{n}", "etag": "e", "revision": 1, "created_at": NOW, "updated_at": NOW}
    return STORED[kind].model_validate(dict(fields) | added)


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", Kind)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_export_then_import_is_the_same(data, kind, file_format) -> None:
    resources = [stored(kind, n, fields) for n, fields in enumerate(data.draw(st.lists(FIELDS[kind], max_size=3)))]
    content = write(kind, resources, file_format)
    again = read(kind, content.encode(), file_format)
    assert [new.id for new in again] == [resource.id for resource in resources]
    assert [fields_of(kind, new) for new in again] == [fields_of(kind, resource) for resource in resources]
    if file_format is FileFormat.CSV:
        cells = [cell for row in csv.reader(io.StringIO(content, newline="")) for cell in row]
        assert not [cell for cell in cells if cell.startswith(FORMULA)]


@pytest.mark.parametrize(
    "cell", ["=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "'=1", "''@x", "'s-Hertogenbosch", "plain"]
)
def test_cells_that_a_spreadsheet_would_run_are_escaped(cell) -> None:
    content = write(Kind.KEYWORDS, [stored(Kind.KEYWORDS, 0, KeywordFields(text=cell, note=cell))], FileFormat.CSV)
    _, (_, text, _, _, note) = csv.reader(io.StringIO(content, newline=""))
    dangerous = cell.lstrip("'").startswith(FORMULA)
    assert text == note == ("'" + cell if dangerous else cell)
    (new,) = read(Kind.KEYWORDS, content.encode(), FileFormat.CSV)
    assert (new.text, new.note) == (cell, cell)


def test_a_negative_number_is_escaped_too() -> None:
    rule = RuleFields(effect=BlockEffect(kind="block", items=Selector(text="x")), priority=-5)
    content = write(Kind.RULES, [stored(Kind.RULES, 0, rule)], FileFormat.CSV)
    assert ",'-5," in content
    assert fields_of(Kind.RULES, read(Kind.RULES, content.encode(), FileFormat.CSV)[0]) == rule


@pytest.mark.parametrize(
    ("file_format", "content", "message"),
    [
        ("jsonl", b'{"text": "a"}\n{"text": ""}', "line 2: text"),
        ("jsonl", b'{"text": "a"}\n\n[1]', "line 3: expected a JSON object"),
        ("jsonl", b"{", "line 1: no JSON"),
        ("jsonl", b"[" * 100_000, "line 1: no JSON"),
        ("jsonl", b'{"text": "a", "colour": "red"}', "line 1: colour"),
        ("jsonl", b'{"text": "a", "etag": "e"}', "line 1: etag"),
        ("jsonl", b'{"text": "\xff"}', "byte 10 is no UTF-8"),
        ("csv", b"text,colour\na,red", "line 1: no column 'colour'; keywords have id, text"),
        ("csv", b"text\na,b", "line 2: more cells"),
        ("csv", b"text,binding\na,{", "line 2, column binding: no JSON"),
        ("csv", b'text,binding\na,"{""items"": {}}"', "line 2: binding.items"),
        ("csv", b'text\n"a', "unexpected end of data"),
        ("csv", b'"text', "unexpected end of data"),
        ("csv", b"text,type\na,Colour", "line 2: type"),
    ],
)
def test_a_bad_line_is_named(file_format, content, message) -> None:
    with pytest.raises(RequestError) as caught:
        read(Kind.KEYWORDS, content, FileFormat(file_format))
    assert message in str(caught.value)


def test_what_people_write_by_hand_is_read() -> None:
    by_hand = "\ufefftext,note\r\nLabubu,\r\nPop Mart,=1\r\n".encode()
    assert [(new.id, new.text, new.note) for new in read(Kind.KEYWORDS, by_hand, FileFormat.CSV)] == [
        (None, "Labubu", ""),
        (None, "Pop Mart", "=1"),
    ]
    assert read(Kind.KEYWORDS, b"", FileFormat.CSV) == read(Kind.KEYWORDS, b"\n", FileFormat.JSONL) == []
    # JSON may hold line ends of Unicode as they are.
    (new,) = read(Kind.KEYWORDS, '{"text": "a\u2028b"}'.encode(), FileFormat.JSONL)
    assert new.text == "a\u2028b"


class Anything:
    """A server that takes all."""

    def validate(self, fields: Fields) -> None: ...
    def changed(self) -> None: ...
    async def test(self, *_: Any) -> Any: ...


@pytest.fixture
def shops(tmp_path: Path) -> Iterator[tuple[TestClient, TestClient]]:
    """Two admin APIs, each over a store of its own."""
    with (
        closing(SqlStore.open(f"sqlite:///{tmp_path}/a.db")) as a,
        closing(SqlStore.open(f"sqlite:///{tmp_path}/b.db")) as b,
    ):
        apps = [api.create_app(store, Anything(), Authenticator(), Metrics(), quiet=True) for store in (a, b)]
        with TestClient(apps[0]) as first, TestClient(apps[1]) as second:
            yield first, second


RESOURCES = {
    "keywords": [{"text": "Labubu", "note": "=cmd"}, {"text": "-50%"}, {"text": "'quoted'", "type": "Brand"}],
    "rules": [
        {"effect": {"kind": "block", "items": {"item_ids": ["=1", "b"]}}, "priority": -3},
        {
            "id": "pinned",
            "condition": {"query": {"match": "regex", "text": "^a+"}, "scenarios": ["home"]},
            "effect": {"kind": "pin", "items": [{"item_id": "x", "position": 2}]},
            "valid_until": "2030-01-01T00:00:00Z",
            "enabled": False,
        },
    ],
    "synonyms": [{"kind": "one_way", "terms": ["@home", "house", "\tden"]}],
}


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("kind", RESOURCES)
def test_a_shop_moves_to_another_store(shops, kind, file_format) -> None:
    here, there = shops
    media = {"Content-Type": {"jsonl": "application/jsonl", "csv": "text/csv"}[file_format]}
    for new in RESOURCES[kind]:
        assert here.post(f"/v1/{kind}", json=new).status_code == 201
    here.post(
        f"/v1/{kind}", json=RESOURCES[kind][0] | {"id": "gone"} | ({"text": "gone"} if kind == "keywords" else {})
    )
    here.delete(f"/v1/{kind}/gone")
    exported = here.get(f"/v1/{kind}:export", params={"format": file_format})
    assert exported.headers["content-type"].partition(";")[0] == media["Content-Type"]
    n = len(RESOURCES[kind])
    imported = there.post(f"/v1/{kind}:import", content=exported.content, headers=media)
    assert imported.json() == {"revision": 1, "created": n, "updated": 0, "unchanged": 0}
    assert there.get(f"/v1/{kind}:export", params={"format": file_format}).content == exported.content
    again = there.post(f"/v1/{kind}:import", content=exported.content, headers=media)
    assert again.json() == {"revision": 1, "created": 0, "updated": 0, "unchanged": n}


def test_an_import_overwrites_brings_back_and_leaves_the_rest_alone(shops) -> None:
    http, _ = shops
    for word in ("kept", "changed", "gone", "gone-and-changed"):
        http.post("/v1/keywords", json={"id": word, "text": word})
    for word in ("gone", "gone-and-changed"):
        http.delete(f"/v1/keywords/{word}")
    rows = [
        {"id": "changed", "text": "changed", "note": "x"},
        {"id": "gone", "text": "gone"},
        {"id": "gone-and-changed", "text": "gone-and-changed", "note": "x"},
        {"id": "new", "text": "new"},
    ]
    content = "\n".join(map(json.dumps, rows))
    headers = {"Content-Type": "application/jsonl"}
    dry = http.post("/v1/keywords:import", content=content, headers=headers, params={"validate_only": True})
    assert dry.json() == {"revision": 7, "created": 1, "updated": 3, "unchanged": 0}
    assert http.get("/v1/revision").json() == {"revision": 6}
    done = http.post("/v1/keywords:import", content=content, headers=headers)
    assert done.json() == dry.json()
    assert done.headers["x-revision"] == "7"
    notes = {r["id"]: r["note"] for r in http.get("/v1/keywords").json()["resources"]}
    assert notes == {"kept": "", "changed": "x", "gone": "", "gone-and-changed": "x", "new": ""}


def test_an_import_is_all_or_nothing(shops) -> None:
    http, _ = shops
    http.post("/v1/keywords", json={"id": "taken", "text": "Labubu"})
    headers = {"Content-Type": "application/jsonl"}
    for rows, status in (
        ([{"text": "a"}, {"id": "other", "text": "labubu"}], 409),
        ([{"id": "a", "text": "a"}, {"id": "a", "text": "b"}], 400),
        ([{"text": "a"}, {"text": "A"}], 400),
    ):
        answer = http.post("/v1/keywords:import", content="\n".join(map(json.dumps, rows)), headers=headers)
        assert answer.status_code == status, answer.text
    assert http.get("/v1/revision").json() == {"revision": 1}


def test_an_import_may_have_only_so_many_rows(shops, monkeypatch) -> None:
    http, _ = shops
    monkeypatch.setattr("genretrieval_serving.admin.api.MAX_IMPORTED", 2)
    headers = {"Content-Type": "application/jsonl"}
    rows = [json.dumps({"text": f"word {i}"}) for i in range(3)]
    refused = http.post("/v1/keywords:import", content="\n".join(rows), headers=headers)
    assert refused.status_code == 400
    assert "split larger files" in refused.json()["detail"]
    assert http.post("/v1/keywords:import", content="\n".join(rows[:2]), headers=headers).json()["created"] == 2
