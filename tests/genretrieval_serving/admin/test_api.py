"""The admin API as a caller meets it: changes, conflicts, pages, batches, trials; and on a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from genretrieval.errors import (
    AlreadyExistsError,
    BundleError,
    ConflictError,
    EtagMismatchError,
    IdempotencyKeyReusedError,
    NotFoundError,
    RequestError,
    SlotsExhaustedError,
    StaleReplicaError,
    UnavailableError,
)
from genretrieval.keywords import AttributeType
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin import api
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.client import AdminClient, as_new
from genretrieval_serving.admin.messages import MAX_OPERATIONS, MAX_PAGE, NEW, NewKeyword, TrialResult, id_of
from genretrieval_serving.admin.resources import Kind, Selector, SlotRef
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Page
from genretrieval_serving.client import Client
from genretrieval_serving.messages import MAX_BODY_BYTES
from genretrieval_serving.observability import Metrics

PIN = {"kind": "pin", "items": [{"item_id": "item-1", "position": 1}]}
EXAMPLES: dict[str, dict[str, Any]] = {
    "keywords": {"text": "Labubu", "type": "Brand", "note": "new"},
    "rules": {"effect": PIN, "note": "new"},
    "synonyms": {"kind": "two_way", "terms": ["sofa", "couch"], "note": "new"},
    "aliases": {"id": "prod", "bundle": "a", "note": "new"},
}
TRIED = ("keywords", "rules", "synonyms")
ITEMS = {"items": {"item_ids": ["item-3", "item-5"]}}


@dataclass
class FakeServing:
    """Takes everything but what says so, and counts what became known to it."""

    refused: str = "broken"
    n_changes: int = 0
    tested: list[Any] = field(default_factory=list)
    checked: list[Any] = field(default_factory=list)
    while_checking: Any = None

    def validate(self, fields: Any) -> None:
        if fields.note == self.refused:
            raise RequestError("note: it is broken")

    def changed(self) -> None:
        self.n_changes += 1

    def check_bundles(self, aliases: Any, *, allow_unbound: bool) -> None:
        self.checked.append(([alias.bundles for alias in aliases], allow_unbound))
        if self.while_checking is not None:
            self.while_checking()
        for alias in aliases:
            self.validate(alias)

    async def test(self, kind: Kind, resource: Any, request: RetrieveRequest, caller: str) -> TrialResult:
        self.tested.append((kind, resource, request))
        return TrialResult(before=RetrieveResponse(items=[]), after=RetrieveResponse(items=[]), missing_ids=["x"])


@pytest.fixture
def admin_store(tmp_path: Path, clock: Any) -> Iterator[SqlStore]:
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db", clock=clock)) as store:
        store.sync_slots([SlotRef(level=0, code=6), SlotRef(level=0, code=7), SlotRef(level=2, code=7)])
        yield store


@pytest.fixture
def live() -> FakeServing:
    return FakeServing()


@pytest.fixture
def app(admin_store: SqlStore, live: FakeServing) -> Any:
    return api.create_app(admin_store, live, Authenticator(), Metrics(), quiet=True)


@pytest.fixture
def http(app: Any) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


@pytest.fixture(params=list(EXAMPLES))
def kind(request: Any) -> str:
    return str(request.param)


def made(http: TestClient, kind: str, **fields: Any) -> dict[str, Any]:
    answer = http.post(f"/v1/{kind}", json=EXAMPLES[kind] | fields)
    assert answer.status_code == 201, answer.text
    resource: dict[str, Any] = answer.json()
    return resource


def problem(answer: Any, kind: type[Exception], *parts: str) -> None:
    """That an answer is an error of a kind, which says something."""
    assert answer.headers["content-type"] == "application/problem+json"
    error: Any = kind("")
    body = answer.json()
    assert (answer.status_code, body["reason"]) == (error.http_status, error.reason), answer.text
    for part in parts:
        assert part in body["detail"]


def test_the_life_of_a_resource(http, live, kind) -> None:
    created = http.post(f"/v1/{kind}", json=EXAMPLES[kind])
    assert created.status_code == 201
    resource = created.json()
    name = f"/v1/{kind}/{resource['id']}"
    assert {key: resource[key] for key in EXAMPLES[kind]} == EXAMPLES[kind]
    assert created.headers["etag"] == f'"{resource["etag"]}"'
    assert created.headers["x-revision"] == str(resource["revision"]) == "1"
    assert http.get(name).json() == resource
    assert http.get(name).headers["etag"] == created.headers["etag"]

    changed = http.patch(name, json={"note": "changed"})
    assert changed.json()["note"] == "changed"
    assert changed.headers["x-revision"] == "2"
    assert changed.headers["etag"] != created.headers["etag"]

    deleted = http.delete(name)
    assert deleted.json()["deleted_at"]
    assert http.get(f"/v1/{kind}").json() == {"resources": [], "next_page_token": ""}
    listed = http.get(f"/v1/{kind}", params={"show_deleted": True}).json()["resources"]
    assert listed == [http.get(name).json()] == [deleted.json()]
    problem(http.patch(name, json={"note": "x"}), NotFoundError, "undelete it first")

    back = http.post(f"{name}:undelete").json()
    assert {key: back[key] for key in EXAMPLES[kind]} == EXAMPLES[kind] | {"note": "changed"}
    problem(http.post(f"{name}:undelete"), AlreadyExistsError, "not deleted")
    problem(http.post(f"/v1/{kind}", json=EXAMPLES[kind] | {"id": resource["id"]}), AlreadyExistsError)
    problem(http.get(f"/v1/{kind}/nobody"), NotFoundError, f"{kind}/nobody")
    assert http.get("/v1/revision").json() == {"revision": 4}
    assert live.n_changes == 4
    events = http.get("/v1/auditEvents").json()["events"]
    assert [event["action"] for event in events] == ["undelete", "delete", "update", "create"]
    assert {event["name"] for event in events} == {f"{kind}/{resource['id']}"}
    assert events[-1]["request_id"] == created.headers["x-request-id"]


def test_a_keyword_is_bound_and_unbound(http) -> None:
    made(http, "keywords")
    bound = http.post("/v1/keywords/labubu:bind", json=ITEMS | {"valid_until": "2030-01-01T00:00:00Z"}).json()
    assert bound["binding"]["items"]["item_ids"] == ["item-3", "item-5"]
    assert bound["slot"] == {"level": 0, "code": 6}
    slots = http.get("/v1/slots").json()
    assert slots == {
        "free": 2,
        "bound": 1,
        "quarantined": 0,
        "levels": [{"level": 0, "free": 1}, {"level": 2, "free": 1}],
    }
    again = http.post("/v1/keywords/labubu:bind", json={"items": {"text": "toy"}}).json()
    assert again["slot"] == bound["slot"]
    assert again["binding"] == {"items": {"item_ids": None, "text": "toy", "filters": None}} | dict.fromkeys(
        ("valid_from", "valid_until")
    )
    unbound = http.post("/v1/keywords/labubu:unbind").json()
    assert (unbound["binding"], unbound["slot"], unbound["note"]) == (None, None, "new")
    assert http.get("/v1/slots").json()["quarantined"] == 1
    for n, word in enumerate(("a", "b", "c", "d")):
        answer = http.post("/v1/keywords", json={"text": word, "binding": ITEMS})
        assert answer.status_code == (201 if n < 2 else 409)
    problem(answer, SlotsExhaustedError, "no reserved slot is free")
    problem(http.post("/v1/keywords/nobody:bind", json=ITEMS), NotFoundError)
    problem(http.post("/v1/rules/labubu:bind", json=ITEMS), _Missing)


class _Missing(Exception):
    http_status, reason = 404, "NOT_FOUND"


def test_what_cannot_be_applied_is_refused_before_it_is_stored(http, kind) -> None:
    broken = EXAMPLES[kind] | {"note": "broken"}
    problem(http.post(f"/v1/{kind}", json=broken), RequestError, "it is broken")
    resource = made(http, kind)
    problem(http.patch(f"/v1/{kind}/{resource['id']}", json={"note": "broken"}), RequestError, "it is broken")
    batch = {"operations": [{"action": "create", "resource": broken | {"id": "other"}}]}
    problem(http.post(f"/v1/{kind}:batch", json=batch), RequestError, "it is broken")
    line = json.dumps(broken).encode()
    answer = http.post(f"/v1/{kind}:import", content=line, headers={"Content-Type": "application/jsonl"})
    problem(answer, RequestError, "it is broken")
    assert http.get("/v1/revision").json() == {"revision": 1}


@pytest.mark.parametrize("if_match", ['"{etag}"', "{etag}", "*", None])
def test_a_change_with_the_present_etag_is_made(http, kind, if_match) -> None:
    resource = made(http, kind)
    headers = {} if if_match is None else {"If-Match": if_match.format(etag=resource["etag"])}
    assert http.patch(f"/v1/{kind}/{resource['id']}", json={"note": "x"}, headers=headers).status_code == 200


def test_a_change_with_an_older_etag_is_refused(http, kind) -> None:
    name = f"/v1/{kind}/{made(http, kind)['id']}"
    headers = {"If-Match": http.get(name).headers["etag"]}
    changed = http.patch(name, json={"note": "x"}).json()
    problem(http.patch(name, json={"note": "y"}, headers=headers), EtagMismatchError, "read it again")
    problem(http.delete(name, headers=headers), EtagMismatchError)
    if kind == "keywords":
        problem(http.post(f"{name}:bind", json=ITEMS, headers=headers), EtagMismatchError)
        problem(http.post(f"{name}:unbind", headers=headers), EtagMismatchError)
    assert http.get(name).json() == changed
    for malformed in ('"a", "b"', '""', '"'):
        problem(http.delete(name, headers={"If-Match": malformed}), RequestError, "If-Match")


def test_a_merge_patch_takes_away_with_null_and_merges_objects(http) -> None:
    name = f"/v1/keywords/{made(http, 'keywords', binding=ITEMS | {'valid_from': '2026-01-01T00:00:00Z'})['id']}"
    merge = {"Content-Type": "application/merge-patch+json"}
    patched = http.patch(name, json={"binding": {"valid_until": "2027-01-01T00:00:00Z"}}, headers=merge).json()
    assert patched["binding"]["items"]["item_ids"] == ["item-3", "item-5"]
    assert patched["binding"]["valid_from"] == "2026-01-01T00:00:00Z"
    by_rule = {"binding": {"items": {"item_ids": None, "text": "toy"}, "valid_from": None}}
    items = http.patch(name, json=by_rule).json()["binding"]
    assert (items["items"]["text"], items["items"]["item_ids"], items["valid_from"]) == ("toy", None, None)
    assert http.patch(name, json={"binding": None, "note": None}).json()["note"] == ""
    problem(http.patch(name, json={"text": None}), RequestError, "text: Field required")
    problem(http.patch(name, json={"colour": "red"}), RequestError, "colour")
    problem(http.patch(name, json={"etag": "mine"}), RequestError, "etag")
    problem(http.patch(name, json=[]), RequestError, "JSON object")
    problem(http.patch(name, content=b"{", headers=merge), RequestError, "no JSON")
    problem(http.patch(name, content=b"[" * 100_000, headers=merge), RequestError, "no JSON")
    problem(http.patch(name, content=b"{}", headers={"Content-Type": "text/plain"}), _Unsupported)


class _Unsupported(Exception):
    http_status, reason = 415, "UNSUPPORTED_MEDIA_TYPE"


def test_a_repeated_call_gets_the_first_answer_and_changes_nothing(http, kind) -> None:
    headers = {"Idempotency-Key": "k-1"}
    first = http.post(f"/v1/{kind}", json=EXAMPLES[kind], headers=headers)
    made_id = first.json()["id"]
    http.patch(f"/v1/{kind}/{made_id}", json={"note": "meanwhile"})
    again = http.post(f"/v1/{kind}", json=EXAMPLES[kind], headers=headers)
    assert (again.status_code, again.json()) == (201, first.json())
    assert {h: again.headers[h] for h in ("etag", "x-revision")} == {
        h: first.headers[h] for h in ("etag", "x-revision")
    }
    assert http.get("/v1/revision").json() == {"revision": 2}
    other = http.post(f"/v1/{kind}", json=EXAMPLES[kind] | {"note": "other"}, headers=headers)
    problem(other, IdempotencyKeyReusedError, "'k-1'")
    problem(http.delete(f"/v1/{kind}/{made_id}", headers=headers), IdempotencyKeyReusedError)
    for malformed in ("", "k 1", "k" * 129):
        answer = http.post(f"/v1/{kind}", json=EXAMPLES[kind], headers={"Idempotency-Key": malformed})
        problem(answer, RequestError, "idempotency-key")


def test_every_kind_of_change_takes_an_idempotency_key(http) -> None:
    made(http, "keywords")
    http.delete("/v1/keywords/labubu")
    jsonl = {"Content-Type": "application/jsonl"}
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/keywords/labubu:undelete", {}),
        ("POST", "/v1/keywords/labubu:bind", {"json": ITEMS}),
        ("POST", "/v1/keywords/labubu:unbind", {}),
        ("PATCH", "/v1/keywords/labubu", {"json": {"note": "x"}}),
        ("POST", "/v1/keywords:import", {"content": b'{"text": "a"}\n{"id": "labubu", "text": "b"}', "headers": jsonl}),
        ("POST", "/v1/keywords:batch", {"json": {"operations": [{"action": "create", "resource": {"text": "z"}}]}}),
        ("DELETE", "/v1/keywords/labubu", {}),
    ]
    for n, (method, path, call) in enumerate(calls):
        headers = call.pop("headers", {}) | {"Idempotency-Key": f"k-{n}"}
        first = http.request(method, path, headers=headers, **call)
        assert first.status_code == 200, (path, first.text)
        after = http.get("/v1/revision").json()
        again = http.request(method, path, headers=headers, **call)
        assert (again.status_code, again.json()) == (200, first.json()), path
        assert http.get("/v1/revision").json() == after


def test_validate_only_answers_as_if_done(http, live, kind) -> None:
    dry = {"validate_only": "true"}
    tried = http.post(f"/v1/{kind}", json=EXAMPLES[kind], params=dry, headers={"Idempotency-Key": "k"})
    assert tried.status_code == 201
    assert "x-revision" not in tried.headers
    problem(http.get(f"/v1/{kind}/{tried.json()['id']}"), NotFoundError)
    assert http.get("/v1/auditEvents").json()["events"] == []
    assert http.get("/v1/revision").json() == {"revision": 0}
    assert live.n_changes == 0
    # The key is still free, and the answer was the one that the change itself has.
    assert http.post(f"/v1/{kind}", json=EXAMPLES[kind], headers={"Idempotency-Key": "k"}).json() == tried.json()
    name = f"/v1/{kind}/{tried.json()['id']}"
    assert http.delete(name, params=dry).json()["deleted_at"]
    assert http.patch(name, json={"note": "y"}, params=dry).json()["note"] == "y"
    problem(http.post(f"/v1/{kind}", json=EXAMPLES[kind], params=dry), AlreadyExistsError)
    assert http.get(name).json() == tried.json()


def test_what_cannot_be_applied_or_has_changed_is_not_undeleted(http, live, kind) -> None:
    resource = made(http, kind)
    name = f"/v1/{kind}/{resource['id']}"
    deleted = http.delete(name).json()
    batch = {"operations": [{"action": "undelete", "id": resource["id"], "etag": resource["etag"]}]}
    problem(http.post(f"{name}:undelete", headers={"If-Match": f'"{resource["etag"]}"'}), EtagMismatchError)
    problem(http.post(f"/v1/{kind}:batch", json=batch), EtagMismatchError)
    # The bundle has changed meanwhile.
    live.refused = "new"
    del batch["operations"][0]["etag"]
    problem(http.post(f"{name}:undelete"), RequestError, "it is broken")
    problem(http.post(f"/v1/{kind}:batch", json=batch), RequestError, "it is broken")
    headers = {"Content-Type": "application/jsonl"}
    same, other = (json.dumps(EXAMPLES[kind] | {"id": resource["id"], "note": note}) for note in ("new", "other"))
    problem(http.post(f"/v1/{kind}:import", content=same, headers=headers), RequestError, "it is broken")
    assert http.get(name).json() == deleted
    assert http.post(f"/v1/{kind}:import", content=other, headers=headers).status_code == 200
    live.refused = "other one"
    etag = http.delete(name).json()["etag"]
    assert http.post(f"{name}:undelete", headers={"If-Match": f'"{etag}"'}).status_code == 200


def test_pages(http) -> None:
    for n in range(5):
        made(http, "keywords", text=f"word {n}")
    http.delete("/v1/keywords/word-2")
    for deleted, ids in ((False, "0134"), (True, "01234")):
        found, token, n_pages = "", "", 0
        while n_pages == 0 or token:
            params = {"page_size": 2, "page_token": token, "show_deleted": deleted}
            page = http.get("/v1/keywords", params=params).json()
            found += "".join(resource["id"][-1] for resource in page["resources"])
            token, n_pages = page["next_page_token"], n_pages + 1
        assert (found, n_pages) == (ids, -(-len(ids) // 2))
    token = http.get("/v1/keywords", params={"page_size": 2}).json()["next_page_token"]
    problem(http.get("/v1/rules", params={"page_token": token}), RequestError)
    problem(http.get("/v1/keywords", params={"page_token": token, "show_deleted": True}), RequestError)
    problem(http.get("/v1/keywords", params={"page_token": "garbage"}), RequestError)
    problem(http.get("/v1/keywords", params={"page_size": -1}), RequestError, "page_size")
    assert len(http.get("/v1/keywords", params={"page_size": 10**9}).json()["resources"]) == 4


def test_a_page_is_never_longer_than_the_maximum(admin_store, live, monkeypatch) -> None:
    sizes = []
    monkeypatch.setattr(admin_store, "page", lambda kind, *, size, **_: sizes.append(size) or Page([]))
    with TestClient(api.create_app(admin_store, live, Authenticator(), Metrics(), quiet=True)) as http:
        for size in (0, 1, MAX_PAGE, MAX_PAGE + 1):
            assert http.get("/v1/rules", params={"page_size": size}).status_code == 200
    assert sizes == [100, 1, MAX_PAGE, MAX_PAGE]


def test_the_audit_is_read_in_pages_and_of_one_resource(http) -> None:
    for n in range(3):
        made(http, "keywords", text=f"word {n}")
    http.delete("/v1/keywords/word-1")
    first = http.get("/v1/auditEvents", params={"page_size": 3}).json()
    second = http.get("/v1/auditEvents", params={"page_size": 3, "page_token": first["next_page_token"]}).json()
    assert [event["revision"] for event in first["events"] + second["events"]] == [4, 3, 2, 1]
    assert second["next_page_token"] == ""
    one = http.get("/v1/auditEvents", params={"name": "keywords/word-1"}).json()["events"]
    assert [(event["action"], event["before"] is None) for event in one] == [("delete", False), ("create", True)]


def test_a_batch_is_one_revision_or_nothing(http, kind) -> None:
    resource = made(http, kind, id="first")
    others = {"keywords": {"text": "other"}, "synonyms": {"terms": ["x", "y"]}, "aliases": {"bundle": "b"}}
    other = others.get(kind, {"note": "other"})
    operations = [
        {"action": "create", "resource": EXAMPLES[kind] | other | {"id": "second"}},
        {"action": "update", "id": "first", "patch": {"note": "x"}, "etag": resource["etag"]},
        {"action": "delete", "id": "first"},
        {"action": "undelete", "id": "first"},
    ]
    answer = http.post(f"/v1/{kind}:batch", json={"operations": operations})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert answer.headers["x-revision"] == "2"
    assert body["revision"] == 2
    assert [r["id"] for r in body["resources"]] == ["second", "first", "first", "first"]
    assert {r["revision"] for r in body["resources"]} == {2}
    before = http.get(f"/v1/{kind}").json()
    for last in (
        {"action": "delete", "id": "nobody"},
        {"action": "update", "id": "second", "patch": {"colour": 1}},
        {"action": "update", "id": "second", "patch": {}, "etag": "old"},
    ):
        failed = http.post(f"/v1/{kind}:batch", json={"operations": [{"action": "delete", "id": "second"}, last]})
        assert failed.status_code in (400, 404, 412), failed.text
    assert http.get(f"/v1/{kind}").json() == before
    assert http.get("/v1/revision").json() == {"revision": 2}
    for malformed in ([], operations[:1] * (MAX_OPERATIONS + 1), [{"action": "explode", "id": "x"}], [{"id": "x"}]):
        problem(http.post(f"/v1/{kind}:batch", json={"operations": malformed}), RequestError, "operations")


def test_a_snapshot_has_everything_at_one_revision(http) -> None:
    made_ = {kind: made(http, kind) for kind in EXAMPLES}
    gone = http.delete(f"/v1/rules/{made_['rules']['id']}").json()
    snapshot = http.post("/v1/snapshots").json()
    assert snapshot["revision"] == 5
    assert snapshot["aliases"] == [made_["aliases"]]
    assert (snapshot["keywords"], snapshot["synonyms"]) == ([made_["keywords"]], [made_["synonyms"]])
    assert snapshot["rules"] == [gone]


@pytest.mark.parametrize("kind", TRIED)
def test_a_trial_stores_nothing(http, live, kind) -> None:
    body = {"resource": EXAMPLES[kind] | {"id": "tried"}, "request": {"query": "labubu", "top_k": 3}}
    answer = http.post(f"/v1/{kind}:test", json=body)
    assert answer.json()["missing_ids"] == ["x"]
    ((tested, resource, request),) = live.tested
    assert (tested, resource.id, resource.note) == (kind, "tried", "new")
    assert request == RetrieveRequest(query="labubu", top_k=3)
    assert http.get("/v1/revision").json() == {"revision": 0}
    problem(http.post(f"/v1/{kind}:test", json=body | {"request": {"top_k": 0}}), RequestError, "request.top_k")


def test_an_alias_is_moved_promoted_and_rolled_back(http, live) -> None:
    def named(answer: Any) -> tuple[Any, ...]:
        alias = answer.json()
        return alias["bundle"], alias["canary"] and alias["canary"]["bundle"], alias["previous"]

    made(http, "aliases")
    path = "/v1/aliases/prod"
    assert named(http.patch(path, json={"bundle": "b"})) == ("b", None, "a")
    canary = {"bundle": "c", "share": 0.1}
    assert named(http.patch(path, json={"canary": canary}, params={"allow_unbound": True})) == ("b", "c", "a")
    assert named(http.patch(path, json={"canary": {"share": 0.5}})) == ("b", "c", "a")
    assert named(http.post(f"{path}:promote")) == ("c", None, "b")
    problem(http.post(f"{path}:promote"), ConflictError, "no canary")
    http.patch(path, json={"canary": {"bundle": "d", "share": 1}})
    assert named(http.post(f"{path}:rollback")) == ("b", None, None)
    # Once more would bring back what was just taken back.
    problem(http.post(f"{path}:rollback"), ConflictError, "no bundle before b", "say which")
    assert named(http.delete(path)) == ("b", None, None)
    http.patch(path, json={"note": "x"})
    assert named(http.post(f"{path}:undelete")) == ("b", None, None)
    assert live.checked[:4] == [([["a"]], False), ([["b"]], False), ([["b", "c"]], True), ([["b", "c"]], False)]
    problem(http.patch(path, json={"canary": {"bundle": "b", "share": 0.5}}), RequestError, ":promote")
    for fields in ({"bundle": "../b"}, {"bundle": ".b"}, {"canary": {"bundle": "c", "share": 1.1}}, {"previous": "a"}):
        problem(http.patch(path, json=fields), RequestError)
    problem(http.patch(path, json={"bundle": "b"}, headers={"If-Match": '"old"'}), EtagMismatchError)
    problem(http.post("/v1/aliases", json={"bundle": "a"}), RequestError, "id: Field required")
    problem(http.post("/v1/rules", json=EXAMPLES["rules"], params={"allow_unbound": True}), RequestError)


def test_an_alias_that_moves_while_its_bundles_are_checked_is_not_moved_again(http, live) -> None:
    made(http, "aliases")
    path, busy = "/v1/aliases/prod", []

    def somebody_else() -> None:
        if not busy:
            busy.append(True)
            http.patch(path, json={"bundle": "other"})

    live.while_checking = somebody_else
    problem(http.patch(path, json={"note": "mine"}), ConflictError, "has changed while its bundles were checked")
    assert http.get(path).json()["bundle"] == "other"
    assert http.patch(path, json={"note": "mine"}).status_code == 200


def test_an_id_is_made_from_the_text_and_tells_texts_apart() -> None:
    texts = [
        "Labubu",
        "Pop Mart",
        "pop-mart",
        "pop.mart",
        "拉布布",
        "拉布",
        "x" * 190,
        "x" * 189,
        "\u0301",
        "1.7 l",
        "17 l",
    ]
    ids_ = [id_of(Kind.KEYWORDS, NewKeyword(text=text)) for text in texts]
    assert ids_[:2] == ["labubu", "pop-mart"]
    assert len(set(ids_)) == len(texts)
    for id_, text in zip(ids_, texts, strict=True):
        assert NewKeyword(text=text, id=id_).id == id_
        assert id_of(Kind.KEYWORDS, NewKeyword(text=f"  {text.upper()} ")) == id_


def test_equal_rules_have_one_id(http) -> None:
    resource = made(http, "rules")
    assert resource["id"].startswith("pin-")
    problem(http.post("/v1/rules", json=EXAMPLES["rules"]), AlreadyExistsError)
    assert made(http, "rules", priority=1)["id"] != resource["id"]


def test_a_slip_in_a_parameter_makes_nothing_real(http, kind) -> None:
    answer = http.post(f"/v1/{kind}", json=EXAMPLES[kind], params={"validateonly": "true"})
    problem(answer, RequestError, "'validateonly'", "validate_only")
    answer = http.post(f"/v1/{kind}?validate_only=true&validate_only=false", json=EXAMPLES[kind])
    problem(answer, RequestError, "more than once")
    assert http.get("/v1/revision").json() == {"revision": 0}


def test_what_is_malformed_is_the_callers_fault(http, kind) -> None:
    for path in ("/v1/{}/UPPER", "/v1/{}/a%20b", "/v1/{}/" + "x" * 64):
        problem(http.get(path.format(kind)), RequestError, "id")
    problem(http.post(f"/v1/{kind}", json={"id": "x", "colour": 1}), RequestError, "colour")
    problem(http.post(f"/v1/{kind}", content=b"{"), RequestError)
    problem(http.get(f"/v1/{kind}/a:nothing"), _Missing)
    assert http.put(f"/v1/{kind}/a").headers["allow"] == "DELETE, GET, PATCH"
    assert http.delete(f"/v1/{kind}").headers["allow"] == "GET, POST"
    too_large = http.post(
        f"/v1/{kind}", content=b" " * (MAX_BODY_BYTES + 1), headers={"Content-Type": "application/json"}
    )
    assert too_large.status_code == 413
    form = http.post(f"/v1/{kind}", data=EXAMPLES[kind])
    assert form.status_code == 400
    plain = http.post(f"/v1/{kind}:import", content=b"{}", headers={"Content-Type": "text/plain"})
    problem(plain, _Unsupported, "application/jsonl")


def test_a_store_that_is_away_is_no_fault_of_the_caller(http, admin_store, monkeypatch) -> None:
    def away(*_: object, **__: object) -> None:
        raise UnavailableError("the admin database cannot be used")

    for name in ("page", "apply"):
        monkeypatch.setattr(admin_store, name, away)
    for answer in (http.get("/v1/rules"), http.post("/v1/rules", json=EXAMPLES["rules"])):
        problem(answer, UnavailableError)
        assert answer.headers["retry-after"] == "1"


# A running server.


@pytest.fixture(scope="module")
def shop(keyword_bundle: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    url = f"sqlite:///{tmp_path_factory.mktemp('shop')}/admin.db"
    with closing(SqlStore.open(url, quarantine=timedelta(0))) as store, serving(keyword_bundle, store=store) as running:
        yield running


@pytest.fixture
def admin(shop: Any) -> Iterator[AdminClient]:
    with AdminClient(shop.admin) as client:
        yield client
        for kind in Kind:
            for resource in client.pages(kind):
                client.delete(kind, resource.id)


def ids(response: RetrieveResponse) -> list[str]:
    return [item.item_id for item in response.items]


def test_a_bound_word_is_retrieved_at_once(shop, admin) -> None:
    with Client(shop.http) as rest, Client(shop.grpc) as by_grpc:
        before = ids(rest.retrieve(query="red labubu", top_k=3))
        keyword = admin.create(Kind.KEYWORDS, {"text": "Labubu", "type": "Brand"})
        bound = admin.bind(keyword.id, {"items": {"item_ids": ["item-17", "gone"]}})
        for client in (rest, by_grpc):
            response = client.retrieve(query="red Labubu", top_k=3, min_revision=bound.revision)
            assert ids(response)[0] == "item-17"
            assert response.items[0].touched_by == ["keywords/labubu"]
            assert (response.revision, response.applied) == (bound.revision, ["keywords/labubu"])
        with pytest.raises(StaleReplicaError):
            rest.retrieve(min_revision=bound.revision + 1)
        unbound = admin.unbind(keyword.id, etag=bound.etag)
        assert ids(rest.retrieve(query="red labubu", top_k=3)) == before
        assert admin.revision() == unbound.revision
        assert (admin.slots().free, admin.slots().bound) == (3, 0)


def test_what_the_catalogue_cannot_answer_is_refused(admin) -> None:
    with pytest.raises(RequestError, match=r"binding\.items\.filters.*'colour'"):
        admin.create(
            Kind.KEYWORDS, {"text": "x", "binding": {"items": {"filters": {"attributes": {"colour": ["red"]}}}}}
        )
    with pytest.raises(RequestError, match="regex"):
        admin.create(Kind.RULES, {"effect": PIN, "condition": {"query": {"match": "regex", "text": "("}}})


@pytest.mark.parametrize("kind", [Kind(name) for name in TRIED])
def test_a_trial_shows_a_request_without_and_with_a_resource(shop, admin, kind) -> None:
    request = RetrieveRequest(query="labubu", top_k=3)
    admin.create(Kind.RULES, {"id": f"other-{kind}", "effect": {"kind": "block", "items": {"item_ids": ["item-0"]}}})
    tried = {
        Kind.KEYWORDS: {"id": "tried", "text": "labubu", "binding": {"items": {"item_ids": ["item-17", "gone"]}}},
        Kind.RULES: {
            "id": "tried",
            "effect": {
                "kind": "pin",
                "items": [{"item_id": i, "position": p} for p, i in ((1, "item-17"), (2, "gone"))],
            },
        },
        Kind.SYNONYMS: {"id": "tried", "kind": "two_way", "terms": ["labubu", "toy"]},
    }[kind]
    with Client(shop.http) as client:
        now = ids(client.retrieve(request))
        revision = admin.revision()
        tested = admin.test(kind, tried, request)
        assert ids(tested.before) == now
        assert "tried" not in str(tested.before.applied)
        assert f"{kind}/tried" in tested.after.applied
        assert f"rules/other-{kind}" in tested.before.applied
        if kind is not Kind.SYNONYMS:
            assert ids(tested.after)[0] == "item-17"
            assert tested.missing_ids == ["gone"]
        assert admin.revision() == revision
        # Stored, it is what the request meets; the trial of the stored one still shows both.
        stored = admin.create(kind, tried)
        assert ids(client.retrieve(request)) == ids(tested.after)
        again = admin.test(kind, as_new(kind, admin.get(kind, stored.id)), request)
        assert (ids(again.before), ids(again.after)) == (ids(tested.before), ids(tested.after))


def test_a_trial_needs_a_slot_and_a_good_resource(admin) -> None:
    words = [admin.create(Kind.KEYWORDS, {"text": f"word {n}", "binding": ITEMS}) for n in range(3)]
    request = RetrieveRequest(query="labubu")
    with pytest.raises(SlotsExhaustedError, match="unbind another"):
        admin.test(Kind.KEYWORDS, {"text": "labubu", "binding": ITEMS}, request)
    admin.test(Kind.KEYWORDS, {"id": words[0].id, "text": "labubu", "binding": ITEMS}, request)
    admin.test(Kind.KEYWORDS, {"text": "labubu"}, request)
    effect = {"kind": "block", "items": {"filters": {"attributes": {"colour": ["red"]}}}}
    with pytest.raises(RequestError, match="'colour'"):
        admin.test(Kind.RULES, {"effect": effect}, request)
    with pytest.raises(RequestError, match="'colour'"):
        admin.test(Kind.RULES, {"effect": PIN}, RetrieveRequest(filters={"attributes": {"colour": ["red"]}}))


def test_reserved_slots_are_taken_where_the_type_belongs(admin) -> None:
    bound = admin.create(
        Kind.KEYWORDS, NewKeyword(text="x", type=AttributeType.BRAND, binding={"items": Selector(text="a")})
    )
    assert bound.slot.level == 0


def test_a_loading_server_reads_and_takes_no_changes(keyword_bundle, serving, tmp_path) -> None:
    with (
        closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store,
        serving(keyword_bundle, store=store, load=False) as running,
        httpx.Client(base_url=running.admin) as http,
    ):
        assert http.get("/v1/keywords").json()["resources"] == []
        problem(http.post("/v1/keywords", json={"text": "x"}), UnavailableError, "still being loaded")
        body = {"resource": {"text": "x"}, "request": {}}
        problem(http.post("/v1/keywords:test", json=body), UnavailableError, "still being loaded")


def test_a_bundle_that_cannot_hold_the_state_is_refused(bundle, keyword_bundle, serving, tmp_path) -> None:
    with closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store:
        with serving(keyword_bundle, store=store) as running, AdminClient(running.admin) as admin:
            admin.create(Kind.KEYWORDS, {"text": "Labubu", "binding": ITEMS})
        free = store.free_slots()
        with pytest.raises(BundleError, match="keywords/labubu"), serving(bundle, store=store):
            pass
        # Those that serve the old bundle go on binding.
        assert store.free_slots() == free != []
        with serving(bundle, store=store, allow_unbound=True) as running, Client(running.http) as client:
            assert client.retrieve(query="labubu").applied == []


def test_calls_are_counted(shop, admin) -> None:
    admin.revision()
    text = httpx.get(f"{shop.http}/metrics").text
    assert 'code="200",method="revision.get",transport="admin"' in text
    assert "genretrieval_admin_revision" in text


def test_the_client_reads_all_pages(admin) -> None:
    for n in range(3):
        admin.create(Kind.SYNONYMS, {"kind": "two_way", "terms": [f"a{n}", f"b{n}"]})
    assert [r.id for r in admin.pages(Kind.SYNONYMS, size=1)] == ["a0-b0", "a1-b1", "a2-b2"]
    assert admin.snapshot().revision == admin.revision()
    assert len(admin.batch(Kind.SYNONYMS, [{"action": "delete", "id": f"a{n}-b{n}"} for n in range(3)])) == 3
    assert set(NEW) == set(Kind)


def test_the_client_repeats_a_change_that_got_no_answer(monkeypatch) -> None:
    keys = []

    def answer(request: httpx.Request) -> httpx.Response:
        keys.append(request.headers["Idempotency-Key"])
        if len(keys) < 3:
            raise httpx.ReadError("gone")
        return httpx.Response(200, content=b'{"revision": 1, "created": 1, "updated": 0, "unchanged": 0}')

    monkeypatch.setattr("time.sleep", lambda _: None)
    with AdminClient("http://test") as client:
        client._http = httpx.Client(base_url="http://test", transport=httpx.MockTransport(answer))
        assert client.import_(Kind.RULES, b"", "jsonl").created == 1
    assert len(keys) == 3
    assert len(set(keys)) == 1


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[bad"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "http://localhost:3000", "Sec-Fetch-Site": "same-site"}, 201),
        ({"Origin": "http://[::1]:8082"}, 201),
        ({}, 201),
    ],
)
def test_pages_of_other_sites_change_nothing_where_no_key_is_needed(http, headers, status) -> None:
    answer = http.post("/v1/keywords", json=EXAMPLES["keywords"], headers=headers)
    assert answer.status_code == status
    assert http.get("/v1/revision", headers=headers).json() == {"revision": int(status == 201)}
