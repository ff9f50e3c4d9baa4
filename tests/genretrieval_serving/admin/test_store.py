"""What a store promises, in SQLite and in PostgreSQL alike."""

from __future__ import annotations

import base64
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from structlog.testing import capture_logs

from genretrieval.errors import (
    AlreadyExistsError,
    ConflictError,
    EtagMismatchError,
    GenRetrievalError,
    IdempotencyKeyReusedError,
    InvalidInputError,
    MissingExtraError,
    NotFoundError,
    RequestError,
    SlotsExhaustedError,
    UnauthenticatedError,
    UnavailableError,
)
from genretrieval.keywords import AttributeType
from genretrieval_serving.admin import sql
from genretrieval_serving.admin.resources import (
    AliasFields,
    Binding,
    BlockEffect,
    Canary,
    Fields,
    Keyword,
    KeywordFields,
    Kind,
    Resource,
    RuleFields,
    Scope,
    Selector,
    SlotRef,
    SynonymsFields,
)
from genretrieval_serving.admin.sql import ApiKey, SlotCounts, SqlStore
from genretrieval_serving.admin.store import Call, Create, Delete, Operation, Undelete, Update

ME = Call("ann", request_id="request-1")
RULE = RuleFields(effect=BlockEffect(kind="block", items=Selector(item_ids=["x"])))
SYNONYMS = SynonymsFields(kind="two_way", terms=["sofa", "couch"])
HOUR = timedelta(hours=1)

MakeStore = Callable[..., SqlStore]


@pytest.fixture
def make_store(make_sql_store: MakeStore) -> MakeStore:
    return make_sql_store


@pytest.fixture
def store(sql_store: SqlStore) -> SqlStore:
    return sql_store


def slot(level: int, code: int) -> SlotRef:
    return SlotRef(level=level, code=code)


def word(text: str, *items: str, type_: AttributeType = AttributeType.ENTITY, note: str = "") -> KeywordFields:
    """A keyword, bound where items are given."""
    binding = Binding(items=Selector(item_ids=list(items))) if items else None
    return KeywordFields(text=text, type=type_, binding=binding, note=note)


def to(fields: Fields) -> Callable[[Resource], Fields]:
    return lambda _: fields


def one(store: SqlStore, operation: Operation, call: Call = ME) -> Any:
    [resource] = store.apply(call, [operation])
    return resource


def bind(store: SqlStore, id_: str, *items: str, type_: AttributeType = AttributeType.ENTITY) -> SlotRef:
    return one(store, Create(Kind.KEYWORDS, id_, word(id_, *(items or ("i",)), type_=type_))).slot


def everything(store: SqlStore) -> tuple[Any, ...]:
    """All that a call could have changed."""
    return store.changes(0), store.audit(size=100), store.free_slots(), store.slot_counts(), store.list_keys()


class TestResources:
    @pytest.mark.parametrize(
        ("kind", "fields"),
        [(Kind.KEYWORDS, word("Labubu", note="né\0w")), (Kind.RULES, RULE), (Kind.SYNONYMS, SYNONYMS)],
    )
    def test_a_life(self, store: SqlStore, clock: Any, kind: Kind, fields: Fields) -> None:
        created = one(store, Create(kind, "a", fields))
        born = clock()
        assert created.model_dump(include=set(type(fields).model_fields)) == fields.model_dump()
        assert (created.id, created.revision, created.created_at, created.updated_at) == ("a", 1, born, born)
        assert created == store.get(kind, "a")

        clock.advance(minutes=1)
        noted = one(store, Update(kind, "a", lambda r: r.model_copy(update={"note": "seen"}), etag=created.etag))
        assert (noted.note, noted.revision, noted.created_at, noted.updated_at) == ("seen", 2, born, clock())
        assert noted.etag != created.etag

        clock.advance(minutes=1)
        deleted = one(store, Delete(kind, "a", etag=noted.etag))
        assert (deleted.deleted_at, deleted.revision) == (clock(), 3)
        assert store.get(kind, "a") == deleted
        assert deleted.etag != noted.etag

        restored = one(store, Undelete(kind, "a"))
        assert (restored.deleted_at, restored.note, restored.revision) == (None, "seen", 4)

        events, token = store.audit(size=10)
        assert [(e.revision, e.action, e.principal, e.request_id) for e in events] == [
            (4, "undelete", "ann", "request-1"),
            (3, "delete", "ann", "request-1"),
            (2, "update", "ann", "request-1"),
            (1, "create", "ann", "request-1"),
        ]
        assert {e.name for e in events} == {f"{kind.value}/a"}
        assert token == ""
        states = [None, created, noted, deleted, restored]
        dumps = [state and state.model_dump(mode="json") for state in states]
        assert [(e.before, e.after) for e in events] == list(pairwise(dumps))[::-1]

    def test_a_call_has_one_revision(self, store: SqlStore) -> None:
        store.apply(ME, [Create(Kind.RULES, "a", RULE)])
        resources = store.apply(ME, [Create(Kind.RULES, "b", RULE), Create(Kind.SYNONYMS, "b", SYNONYMS)])
        assert [r.revision for r in resources] == [2, 2]
        assert store.revision() == 2

    def test_operations_of_a_call_see_each_other(self, store: SqlStore) -> None:
        resources = store.apply(
            ME,
            [
                Create(Kind.KEYWORDS, "a", word("one")),
                Update(Kind.KEYWORDS, "a", to(word("two"))),
                Create(Kind.KEYWORDS, "b", word("one")),
                Delete(Kind.KEYWORDS, "a"),
            ],
        )
        assert [getattr(r, "text", None) for r in resources] == ["one", "two", "one", "two"]
        assert store.get(Kind.KEYWORDS, "a") == resources[3]

    def test_no_operations_change_nothing(self, store: SqlStore) -> None:
        assert store.apply(ME, []) == []
        assert store.revision() == 0

    @pytest.mark.parametrize(
        ("last", "error"),
        [
            (Create(Kind.RULES, "old", RULE), AlreadyExistsError),
            (Create(Kind.RULES, "gone", RULE), AlreadyExistsError),
            (Create(Kind.KEYWORDS, "other", word("  LABUBU ")), AlreadyExistsError),
            (Create(Kind.KEYWORDS, "other", word("★")), RequestError),
            (Create(Kind.KEYWORDS, "other", word("a\0b")), RequestError),
            (
                Create(Kind.KEYWORDS, "other", word("\N{ARABIC LIGATURE SALLALLAHOU ALAYHE WASALLAM}" * 200)),
                RequestError,
            ),
            (Create(Kind.KEYWORDS, "other", word("bound", "i")), SlotsExhaustedError),
            (Update(Kind.RULES, "none", to(RULE)), NotFoundError),
            (Update(Kind.RULES, "gone", to(RULE)), NotFoundError),
            (Update(Kind.RULES, "old", to(RULE), etag="stale"), EtagMismatchError),
            (Update(Kind.KEYWORDS, "free", to(word("Labubu"))), AlreadyExistsError),
            (Delete(Kind.RULES, "none"), NotFoundError),
            (Delete(Kind.RULES, "gone"), NotFoundError),
            (Delete(Kind.RULES, "old", etag="stale"), EtagMismatchError),
            (Undelete(Kind.RULES, "none"), NotFoundError),
            (Undelete(Kind.RULES, "old"), AlreadyExistsError),
        ],
    )
    def test_all_or_nothing(self, store: SqlStore, last: Operation, error: type[GenRetrievalError]) -> None:
        store.apply(ME, [Create(Kind.RULES, "old", RULE), Create(Kind.RULES, "gone", RULE)])
        store.apply(ME, [Delete(Kind.RULES, "gone")])
        store.apply(ME, [Create(Kind.KEYWORDS, "labubu", word("labubu")), Create(Kind.KEYWORDS, "free", word("free"))])
        before = everything(store)
        with pytest.raises(error, match=f"{last.kind.value}/{last.id}") as raised:
            store.apply(ME, [Create(Kind.SYNONYMS, "first", SYNONYMS), last])
        assert type(raised.value) is error
        assert everything(store) == before

    def test_a_change_that_raises_changes_nothing(self, store: SqlStore) -> None:
        store.apply(ME, [Create(Kind.RULES, "a", RULE)])

        def change(_: Resource) -> Fields:
            raise RequestError("no such field")

        with pytest.raises(RequestError, match="no such field"):
            store.apply(ME, [Create(Kind.RULES, "b", RULE), Update(Kind.RULES, "a", change)])
        assert store.revision() == 1

    def test_the_text_of_a_deleted_keyword_is_free(self, store: SqlStore) -> None:
        store.apply(ME, [Create(Kind.KEYWORDS, "a", word("Labubu")), Delete(Kind.KEYWORDS, "a")])
        store.apply(ME, [Create(Kind.KEYWORDS, "b", word("labubu"))])
        with pytest.raises(AlreadyExistsError, match="keywords/b"):
            store.apply(ME, [Undelete(Kind.KEYWORDS, "a")])
        store.apply(ME, [Delete(Kind.KEYWORDS, "b"), Undelete(Kind.KEYWORDS, "a")])

    def test_a_keyword_may_keep_its_own_text(self, store: SqlStore) -> None:
        store.apply(ME, [Create(Kind.KEYWORDS, "a", word("Labubu"))])
        assert one(store, Update(Kind.KEYWORDS, "a", to(word("LABUBU")))).text == "LABUBU"

    def test_get_of_nothing(self, store: SqlStore) -> None:
        with pytest.raises(NotFoundError, match="rules/a"):
            store.get(Kind.RULES, "a")

    def test_equal_states_of_different_revisions_have_different_etags(self, store: SqlStore) -> None:
        first = one(store, Create(Kind.RULES, "a", RULE))
        assert one(store, Update(Kind.RULES, "a", to(RULE))).etag != first.etag


class TestValidateOnly:
    def test_it_answers_as_if_done_and_stores_nothing(self, store: SqlStore) -> None:
        store.sync_slots([slot(1, 5)])
        operations = [Create(Kind.KEYWORDS, "a", word("a", "i")), Create(Kind.RULES, "b", RULE)]
        before = everything(store)
        promised = store.apply(Call("ann", idempotency_key="k", validate_only=True), operations)
        assert everything(store) == before
        assert isinstance(promised[0], Keyword)
        assert promised[0].slot == slot(1, 5)
        assert store.apply(Call("ann", idempotency_key="k"), operations) == promised

    def test_it_finds_what_is_wrong(self, store: SqlStore) -> None:
        with pytest.raises(SlotsExhaustedError):
            one(store, Create(Kind.KEYWORDS, "a", word("a", "i")), Call("ann", validate_only=True))


class TestIdempotency:
    def test_the_first_answer_again(self, store: SqlStore) -> None:
        call = Call("ann", idempotency_key="k", fingerprint="f")
        operations = [Create(Kind.RULES, "a", RULE), Create(Kind.KEYWORDS, "a", word("a"))]
        first = store.apply(call, operations)
        store.apply(ME, [Delete(Kind.RULES, "a")])
        before = everything(store)
        assert store.apply(call, operations) == first
        assert everything(store) == before

    def test_the_key_of_another_request(self, store: SqlStore) -> None:
        one(store, Create(Kind.RULES, "a", RULE), Call("ann", idempotency_key="k", fingerprint="f"))
        with pytest.raises(IdempotencyKeyReusedError, match="'k'"):
            one(store, Create(Kind.RULES, "b", RULE), Call("ann", idempotency_key="k", fingerprint="g"))
        assert store.revision() == 1

    def test_the_key_of_somebody_else(self, store: SqlStore) -> None:
        one(store, Create(Kind.RULES, "a", RULE), Call("ann", idempotency_key="k", fingerprint="f"))
        one(store, Create(Kind.RULES, "b", RULE), Call("bob", idempotency_key="k", fingerprint="g"))
        assert store.revision() == 2

    def test_a_key_is_remembered_for_a_day(self, store: SqlStore, clock: Any) -> None:
        call = Call("ann", idempotency_key="k", fingerprint="f")
        first = one(store, Create(Kind.RULES, "a", RULE), call)
        clock.advance(hours=23)
        assert one(store, Create(Kind.RULES, "a", RULE), call) == first
        clock.advance(hours=1)
        one(store, Create(Kind.RULES, "b", RULE), Call("bob", idempotency_key="other"))
        with pytest.raises(AlreadyExistsError):
            one(store, Create(Kind.RULES, "a", RULE), call)

    def test_a_failed_call_leaves_its_key_free(self, store: SqlStore) -> None:
        call = Call("ann", idempotency_key="k", fingerprint="f")
        with pytest.raises(NotFoundError):
            one(store, Delete(Kind.RULES, "a"), call)
        one(store, Create(Kind.RULES, "a", RULE))
        assert one(store, Delete(Kind.RULES, "a"), call).deleted_at is not None

    def test_the_same_call_at_the_same_time_has_one_effect(self, make_store: MakeStore) -> None:
        stores = [make_store(), make_store()]
        call = Call("ann", idempotency_key="k", fingerprint="f")
        barrier = threading.Barrier(8)

        def send(number: int) -> Resource:
            barrier.wait()
            return one(stores[number % 2], Create(Kind.RULES, "a", RULE), call)

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(send, range(8)))
        assert all(answer == answers[0] for answer in answers)
        assert stores[0].revision() == 1

    def test_keys_that_cannot_be_stored(self, store: SqlStore) -> None:
        for key in ("k" * 3000, "k\0"):
            with pytest.raises(RequestError, match="idempotency key"):
                one(store, Create(Kind.RULES, "a", RULE), Call("ann", idempotency_key=key))


class TestSlots:
    PREFERRED = {AttributeType.BRAND: 0, AttributeType.ENTITY: 9}  # noqa: RUF012

    def test_the_preferred_level_then_the_emptiest_and_there_the_lowest_code(self, store: SqlStore) -> None:
        slots = [slot(0, 8), slot(0, 7), slot(1, 9), slot(2, 6), slot(2, 5), slot(2, 4)]
        assert store.sync_slots(slots, self.PREFERRED) == []
        assert store.free_slots() == sorted(slots, key=lambda s: (s.level, s.code))
        brand = AttributeType.BRAND
        assert [bind(store, f"brand{i}", type_=brand) for i in range(3)] == [slot(0, 7), slot(0, 8), slot(2, 4)]
        # No preference, and one for a level without slots: the most room, then the lower level.
        assert bind(store, "color", type_=AttributeType.COLOR) == slot(2, 5)
        assert bind(store, "entity") == slot(1, 9)
        assert bind(store, "last") == slot(2, 6)
        assert store.slot_counts() == SlotCounts(free=0, bound=6, quarantined=0)

    def test_a_keyword_holds_a_slot_while_it_is_bound(self, make_store: MakeStore, clock: Any) -> None:
        store = make_store(quarantine=HOUR)
        store.sync_slots([slot(1, 1), slot(1, 2)])
        assert one(store, Create(Kind.KEYWORDS, "a", word("a"))).slot is None
        assert one(store, Update(Kind.KEYWORDS, "a", to(word("a", "i")))).slot == slot(1, 1)
        assert one(store, Update(Kind.KEYWORDS, "a", to(word("b", "j", "k")))).slot == slot(1, 1)
        assert store.get(Kind.KEYWORDS, "a").slot == slot(1, 1)  # type: ignore[union-attr]
        assert one(store, Update(Kind.KEYWORDS, "a", to(word("b")))).slot is None
        assert store.slot_counts() == SlotCounts(free=1, bound=0, quarantined=1)
        assert store.free_slots() == [slot(1, 2)]
        clock.advance(hours=1)
        assert store.free_slots() == [slot(1, 1), slot(1, 2)]
        assert bind(store, "c") == slot(1, 1)

    def test_rules_of_the_same_id_hold_none(self, store: SqlStore) -> None:
        store.sync_slots([slot(1, 1)])
        store.apply(ME, [Create(Kind.KEYWORDS, "a", word("a", "i")), Create(Kind.RULES, "a", RULE)])
        assert store.page(Kind.RULES, size=5).resources == [store.get(Kind.RULES, "a")]

    def test_deletion_gives_it_up_and_undeletion_takes_it_back(self, make_store: MakeStore, clock: Any) -> None:
        store = make_store(quarantine=HOUR)
        store.sync_slots([slot(1, 1), slot(1, 2), slot(1, 3)])
        bind(store, "other")
        assert bind(store, "a") == slot(1, 2)
        assert one(store, Delete(Kind.KEYWORDS, "a")).slot is None
        assert store.slot_counts() == SlotCounts(free=1, bound=1, quarantined=1)
        one(store, Delete(Kind.KEYWORDS, "other"))
        # Its own, although it is in quarantine and a lower one is too.
        assert one(store, Undelete(Kind.KEYWORDS, "a")).slot == slot(1, 2)
        one(store, Delete(Kind.KEYWORDS, "a"))
        clock.advance(hours=2)
        assert one(store, Undelete(Kind.KEYWORDS, "a")).slot == slot(1, 2)

    def test_undeletion_takes_another_if_the_old_one_is_taken(self, make_store: MakeStore) -> None:
        store = make_store(quarantine=timedelta(0))
        store.sync_slots([slot(1, 1), slot(1, 2)])
        bind(store, "a")
        one(store, Delete(Kind.KEYWORDS, "a"))
        assert bind(store, "b") == slot(1, 1)
        assert one(store, Undelete(Kind.KEYWORDS, "a")).slot == slot(1, 2)

    def test_exhaustion_says_what_there_is_and_when_one_comes_free(self, make_store: MakeStore, clock: Any) -> None:
        store = make_store(quarantine=HOUR)
        with pytest.raises(SlotsExhaustedError, match="0 are bound, 0 in quarantine"):
            bind(store, "a")
        store.sync_slots([slot(1, 1), slot(1, 2)])
        bind(store, "a")
        bind(store, "b")
        one(store, Delete(Kind.KEYWORDS, "a"))
        clock.advance(minutes=30)
        message = r"keywords/c: .*1 is bound, 1 in quarantine, the next free at 2026-07-01T13:00:00\+00:00.*unbind"
        with pytest.raises(SlotsExhaustedError, match=message):
            bind(store, "c")
        one(store, Create(Kind.KEYWORDS, "c", word("c")))
        with pytest.raises(SlotsExhaustedError):
            one(store, Update(Kind.KEYWORDS, "c", to(word("c", "i"))))

    def test_slots_given_up_earlier_in_a_call_can_be_taken_in_it(self, make_store: MakeStore) -> None:
        store = make_store(quarantine=timedelta(0))
        store.sync_slots([slot(1, 1)])
        bind(store, "a")
        _, b = store.apply(ME, [Delete(Kind.KEYWORDS, "a"), Create(Kind.KEYWORDS, "b", word("b", "i"))])
        assert isinstance(b, Keyword)
        assert b.slot == slot(1, 1)

    def test_another_bundle_with_other_slots(self, make_store: MakeStore, clock: Any) -> None:
        store = make_store(quarantine=HOUR)
        store.sync_slots([slot(1, code) for code in range(4)])
        bind(store, "kept")
        bind(store, "stray")
        bind(store, "gone")
        one(store, Delete(Kind.KEYWORDS, "gone"))
        revision = store.revision()
        strays = store.sync_slots([slot(1, 0), slot(2, 0), slot(2, 1)])
        assert strays == [store.get(Kind.KEYWORDS, "stray")]
        assert store.revision() == revision
        # In quarantine is slot 1/2, which this bundle has not: nobody waits for it.
        assert store.slot_counts() == SlotCounts(free=2, bound=2, quarantined=0)
        assert store.free_slots() == [slot(2, 0), slot(2, 1)]
        assert store.sync_slots([slot(1, 0), slot(2, 0), slot(2, 1)]) == strays
        # The next change that leaves it bound brings it to a slot that there is.
        assert one(store, Update(Kind.KEYWORDS, "stray", lambda r: r)).slot == slot(2, 0)
        assert store.sync_slots([slot(1, 0), slot(2, 0), slot(2, 1)]) == []
        # Back to the old bundle within the quarantine, and after it.
        assert store.sync_slots([slot(1, code) for code in range(4)]) == [store.get(Kind.KEYWORDS, "stray")]
        assert store.free_slots() == [slot(1, 3)]
        clock.advance(hours=1)
        assert store.free_slots() == [slot(1, 1), slot(1, 2), slot(1, 3)]

    def test_a_stray_that_is_unbound_leaves_nothing(self, make_store: MakeStore) -> None:
        store = make_store(quarantine=timedelta(0))
        store.sync_slots([slot(1, 1)])
        bind(store, "a")
        assert len(store.sync_slots([])) == 1
        one(store, Delete(Kind.KEYWORDS, "a"))
        assert store.slot_counts() == SlotCounts(free=0, bound=0, quarantined=0)
        assert store.sync_slots([]) == []
        with pytest.raises(SlotsExhaustedError):
            one(store, Undelete(Kind.KEYWORDS, "a"))

    def test_other_stores_see_them(self, store: SqlStore, make_store: MakeStore) -> None:
        store.sync_slots([slot(1, 1)])
        other = make_store()
        assert other.free_slots() == [slot(1, 1)]
        bind(other, "a")
        assert store.free_slots() == []


class TestChanges:
    def test_what_changed_after_a_revision(self, store: SqlStore) -> None:
        assert store.changes(0) == sql.Changes(0, [])
        a = one(store, Create(Kind.RULES, "a", RULE))
        b = one(store, Create(Kind.KEYWORDS, "b", word("b")))
        assert store.changes(0) == sql.Changes(2, [(Kind.RULES, a), (Kind.KEYWORDS, b)])
        assert store.changes(1) == sql.Changes(2, [(Kind.KEYWORDS, b)])
        gone = one(store, Delete(Kind.RULES, "a"))
        assert store.changes(2) == sql.Changes(3, [(Kind.RULES, gone)])
        assert store.changes(3) == sql.Changes(3, [])
        assert store.changes(9) == sql.Changes(3, [])

    def test_revision_and_resources_are_of_one_moment(
        self, store: SqlStore, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one(store, Create(Kind.RULES, "a", RULE))
        writer = make_store()
        read_revision = sql._read_revision

        def and_then_somebody_writes(connection: sa.Connection) -> int:
            revision = read_revision(connection)
            one(writer, Create(Kind.RULES, "b", RULE))
            return revision

        with monkeypatch.context() as patch:
            patch.setattr(sql, "_read_revision", and_then_somebody_writes)
            changes = store.changes(0)
        assert (changes.revision, [r.id for _, r in changes.resources]) == (1, ["a"])
        assert [r.id for _, r in store.changes(1).resources] == ["b"]

    def test_what_a_later_version_keeps_is_passed_over(self, store: SqlStore) -> None:
        rule = one(store, Create(Kind.RULES, "r", RULE))
        with store._engine.begin() as connection:
            row = dict(connection.execute(sa.text("SELECT * FROM documents")).mappings().one())
            times = {"created_at": rule.created_at, "updated_at": rule.updated_at, "body": {}}
            connection.execute(sql._documents.insert().values({**row, **times, "kind": "novelties"}))
        assert store.changes(0).resources == [(Kind.RULES, rule)]


class TestAliases:
    def test_the_bundle_before_is_kept_by_the_store(self, store: SqlStore) -> None:
        def previous(fields: Fields) -> str | None:
            return one(store, Update(Kind.ALIASES, "prod", to(fields))).previous

        created = one(store, Create(Kind.ALIASES, "prod", AliasFields(bundle="a")))
        assert created.previous is None
        canary = Canary(bundle="b", share=0.5)
        assert previous(AliasFields(bundle="a", canary=canary)) is None
        assert previous(AliasFields(bundle="b")) == "a"
        assert previous(AliasFields(bundle="b", note="x")) == "a"
        # As it is given with a resource: a rollback takes it away, an undeletion leaves it.
        moved = store.get(Kind.ALIASES, "prod")
        one(store, Delete(Kind.ALIASES, "prod"))
        assert one(store, Undelete(Kind.ALIASES, "prod")).previous == "a"
        assert previous(moved.model_copy(update={"bundle": "a", "previous": None})) is None
        assert store.get(Kind.ALIASES, "prod") == store.changes(0).resources[0][1]


class TestPages:
    @pytest.fixture(autouse=True)
    def rules(self, store: SqlStore) -> None:
        # Ids whose order depends on the locale.
        store.apply(ME, [Create(Kind.RULES, id_, RULE) for id_ in ("b", "a-c", "ab", "a.b", "a_a", "a")])
        store.apply(ME, [Delete(Kind.RULES, "ab"), Create(Kind.SYNONYMS, "a", SYNONYMS)])

    def walk(self, store: SqlStore, **options: Any) -> list[list[str]]:
        pages, token = [], ""
        while not pages or token:
            page = store.page(Kind.RULES, token=token, **options)
            pages.append([r.id for r in page.resources])
            token = page.next_page_token
        return pages

    def test_in_the_order_of_the_ids(self, store: SqlStore) -> None:
        assert self.walk(store, size=2) == [["a", "a-c"], ["a.b", "a_a"], ["b"]]
        assert self.walk(store, size=5) == [["a", "a-c", "a.b", "a_a", "b"]]
        assert self.walk(store, size=4, show_deleted=True) == [["a", "a-c", "a.b", "a_a"], ["ab", "b"]]
        assert store.page(Kind.KEYWORDS, size=1) == sql.Page([], "")

    def test_what_is_deleted_between_pages_moves_nothing(self, store: SqlStore) -> None:
        page = store.page(Kind.RULES, size=2)
        store.apply(ME, [Delete(Kind.RULES, "a"), Delete(Kind.RULES, "a-c")])
        assert [r.id for r in store.page(Kind.RULES, size=1, token=page.next_page_token).resources] == ["a.b"]

    def test_tokens_of_other_listings(self, store: SqlStore) -> None:
        token = store.page(Kind.RULES, size=1).next_page_token
        _, of_audit = store.audit(size=1)
        _, of_name = store.audit(size=1, name="rules/ab")
        for call in (
            lambda: store.page(Kind.KEYWORDS, size=1, token=token),
            lambda: store.page(Kind.RULES, size=1, token=token, show_deleted=True),
            lambda: store.page(Kind.RULES, size=1, token=of_audit),
            lambda: store.audit(size=1, token=token),
            lambda: store.audit(size=1, token=of_name),
            lambda: store.audit(size=1, token=of_audit, name="rules/ab"),
        ):
            with pytest.raises(RequestError, match="page token"):
                call()

    @pytest.mark.parametrize(
        "token",
        ["x", "é", "AAAA", "bnVsbA", "W10", "e30", "WyJhIl0", "!", " ", "a\0", sql._token("audit", "-1"),
         base64.urlsafe_b64encode(b"[" * 99_999).decode(),
         sql._token("audit", "9" * 30), sql._token("audit", "²"), sql._token("rules, without deleted", "a\0")],
    )  # fmt: skip
    def test_malformed_tokens(self, store: SqlStore, token: str) -> None:
        with pytest.raises(RequestError, match="page token"):
            store.page(Kind.RULES, size=1, token=token)
        with pytest.raises(RequestError, match="page token"):
            store.audit(size=1, token=token)

    def test_the_audit_newest_first(self, store: SqlStore) -> None:
        names, token = [], ""
        while not names or token:
            events, token = store.audit(size=3, token=token)
            names += [event.name.partition("/")[2] for event in events]
        assert names == ["a", "ab", "a", "a_a", "a.b", "ab", "a-c", "b"]
        first, token = store.audit(size=1, name="rules/ab")
        second, end = store.audit(size=1, name="rules/ab", token=token)
        assert [event.action for event in first + second] == ["delete", "create"]
        assert end == ""
        assert store.audit(size=1, name="rules/none") == ([], "")
        with pytest.raises(RequestError, match="the name"):
            store.audit(size=1, name="rules/a\0")


class TestKeys:
    def test_a_life(self, store: SqlStore, clock: Any) -> None:
        expires_at = clock() + HOUR
        id_, secret = store.create_key("ann", [Scope.RETRIEVE, Scope.ADMIN_READ], expires_at, by="root")
        prefix, middle, random = secret.split("_", 2)
        assert (prefix, middle, len(random)) == ("grk", id_, 43)
        scopes = frozenset({Scope.RETRIEVE, Scope.ADMIN_READ})
        assert store.verify_key(secret) == ("ann", scopes)
        assert store.list_keys() == [ApiKey(id_, "ann", scopes, clock(), expires_at, None)]
        clock.advance(hours=1)
        with pytest.raises(UnauthenticatedError, match="expired"):
            store.verify_key(secret)
        store.revoke_key(id_, by="root")
        with pytest.raises(UnauthenticatedError, match="revoked"):
            store.verify_key(secret)
        assert store.list_keys()[0].revoked_at == clock()
        with pytest.raises(NotFoundError, match=id_):
            store.revoke_key(id_)
        events, _ = store.audit(size=5)
        assert [(e.action, e.name, e.principal, e.revision) for e in events] == [
            ("delete", f"apiKeys/{id_}", "root", 2),
            ("create", f"apiKeys/{id_}", "root", 1),
        ]

    def test_the_secret_is_nowhere(self, store: SqlStore) -> None:
        _, secret = store.create_key("ann", [Scope.RETRIEVE])
        with store._engine.connect() as connection:
            for table in sql.metadata.sorted_tables:
                for row in connection.execute(sa.select(table)):
                    assert secret.split("_", 2)[2] not in repr(row)

    def test_two_active_a_principal(self, store: SqlStore, clock: Any) -> None:
        store.create_key("ann", [Scope.RETRIEVE], clock() + HOUR)
        second, _ = store.create_key("ann", [Scope.RETRIEVE])
        with pytest.raises(ConflictError, match=second):
            store.create_key("ann", [Scope.RETRIEVE])
        store.create_key("bob", [Scope.RETRIEVE])
        clock.advance(hours=1)
        store.create_key("ann", [Scope.RETRIEVE])
        store.revoke_key(second)
        store.create_key("ann", [Scope.RETRIEVE])

    def test_wrong_secrets(self, store: SqlStore) -> None:
        id_, secret = store.create_key("ann", [Scope.RETRIEVE])
        other, _ = store.create_key("bob", [Scope.RETRIEVE])
        wrong = [secret[:-1], secret + "x", secret.replace(id_, other), secret.replace("grk", "grK"), f"grk_{id_}_"]
        for text in [*wrong, "", "grk", "grk_", "grk__", "grk_\0_x", f"grk_{id_}_\ud800é", "Bearer"]:
            with pytest.raises(UnauthenticatedError, match="not known"):
                store.verify_key(text)

    def test_keys_that_make_no_sense(self, store: SqlStore, clock: Any) -> None:
        for principal, scopes, expires_at in [
            ("ann", [], None),
            ("", [Scope.RETRIEVE], None),
            ("a\0", [Scope.RETRIEVE], None),
            ("ann", [Scope.RETRIEVE], clock()),
        ]:
            with pytest.raises(RequestError):
                store.create_key(principal, scopes, expires_at)
        assert store.revision() == 0


class TestDatabase:
    def test_it_is_kept(self, store: SqlStore, make_store: MakeStore) -> None:
        store.sync_slots([slot(1, 1)])
        bind(store, "a")
        before = everything(store)
        store.close()
        assert everything(make_store()) == before

    def test_migrations_make_the_tables(self, store: SqlStore) -> None:
        with store._engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), sql.metadata) == []

    def test_servers_that_open_it_at_the_same_time(self, make_store: MakeStore) -> None:
        with ThreadPoolExecutor(8) as pool:
            stores = list(pool.map(lambda _: make_store(), range(8)))
        assert [store.revision() for store in stores] == [0] * 8

    def test_a_newer_database_is_refused(self, store: SqlStore, make_store: MakeStore) -> None:
        with store._engine.begin() as connection:
            connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
        with pytest.raises(InvalidInputError, match=r"version 9999.*newer genretrieval"):
            make_store()

    def test_a_table_that_is_gone(self, store: SqlStore) -> None:
        with store._engine.begin() as connection:
            connection.exec_driver_sql("DROP TABLE audit_events")
        with pytest.raises(GenRetrievalError, match="the admin store"):
            one(store, Create(Kind.RULES, "a", RULE))
        assert store.revision() == 0

    def test_a_locked_database(self, store: SqlStore, make_store: MakeStore, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sql, "_LOCK_SECONDS", 1)
        monkeypatch.setattr(sql, "_TRIES", 2)
        impatient = make_store()

        def change(_: Resource) -> Fields:
            with pytest.raises(UnavailableError, match="try again"):
                one(impatient, Create(Kind.RULES, "b", RULE))
            # Readers are not held up.
            assert impatient.revision() == 1
            return RULE

        one(store, Create(Kind.RULES, "a", RULE))
        one(store, Update(Kind.RULES, "a", change))
        one(impatient, Create(Kind.RULES, "b", RULE))

    def test_writers_that_wait_take_nothing_from_readers(
        self, store: SqlStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one(store, Create(Kind.RULES, "a", RULE))
        begun, go_on = threading.Event(), threading.Event()

        def change(_: Resource) -> Fields:
            begun.set()
            assert go_on.wait(60)
            return RULE

        with ThreadPoolExecutor(30) as pool:
            slow = pool.submit(one, store, Update(Kind.RULES, "a", change))
            assert begun.wait(60)
            with monkeypatch.context() as patch:
                patch.setattr(sql, "_TURN_SECONDS", 0.01)
                with pytest.raises(UnavailableError, match="too many changes wait"):
                    one(store, Create(Kind.RULES, "c", RULE))
            others = [pool.submit(one, store, Create(Kind.RULES, f"b{i}", RULE)) for i in range(25)]
            assert store.revision() == 1
            go_on.set()
            assert {other.result().revision for other in others} == set(range(3, 28))
            assert slow.result().revision == 2

    def test_a_database_that_asks_for_repetition(self, store: SqlStore) -> None:
        class Busy(sqlite3.OperationalError):
            sqlite_errorcode = sqlite3.SQLITE_BUSY | 1 << 8

        reason = psycopg.errors.SerializationFailure("again") if store._is_postgresql else Busy("again")
        runs: list[int] = []

        def change(_: Resource) -> Fields:
            runs.append(len(runs))
            if len(runs) < fails:
                raise sa.exc.OperationalError("", {}, reason)
            return RULE

        one(store, Create(Kind.RULES, "a", RULE))
        fails = 3
        one(store, Update(Kind.RULES, "a", change))
        assert len(runs) == 3
        runs.clear()
        fails = 100
        with pytest.raises(UnavailableError, match="again"):
            one(store, Update(Kind.RULES, "a", change))
        assert len(runs) == sql._TRIES
        assert store.revision() == 2

    def test_what_a_database_refuses(self, store: SqlStore) -> None:
        def fail(error: type[sa.exc.DBAPIError]) -> Callable[[Resource], Fields]:
            def change(_: Resource) -> Fields:
                raise error("", {}, Exception("the reason"))

            return change

        one(store, Create(Kind.RULES, "a", RULE))
        for error, ours in [
            (sa.exc.IntegrityError, AlreadyExistsError),
            (sa.exc.DataError, RequestError),
            (sa.exc.InterfaceError, UnavailableError),
        ]:
            with capture_logs() as logs, pytest.raises(ours) as raised:
                one(store, Update(Kind.RULES, "a", fail(error)))
            assert "the reason" not in str(raised.value)
            assert [log["error"] for log in logs] == ["the reason"]

    def test_connections_that_broke_are_replaced(self, store: SqlStore) -> None:
        one(store, Create(Kind.RULES, "a", RULE))
        if store._is_postgresql:
            with store._engine.connect() as connection:
                others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database()"
                connection.exec_driver_sql(f"{others} AND pid <> pg_backend_pid()")
        assert store.revision() == 1
        one(store, Create(Kind.RULES, "b", RULE))


class TestOpening:
    @pytest.mark.parametrize(
        "url", ["", "nonsense", "mysql://host/x", "sqlite://", "sqlite:///:memory:", "postgresql+asyncpg://host/x"]
    )
    def test_other_urls(self, url: str) -> None:
        with pytest.raises(InvalidInputError, match="sqlite:///path"):
            SqlStore.open(url)

    def test_a_server_that_is_away(self) -> None:
        url = "postgresql://ann:hunter2@127.0.0.1:1/x?application_name=hunter3"
        with capture_logs() as logs, pytest.raises(UnavailableError) as raised:
            SqlStore.open(url)
        message = str(raised.value)
        assert "cannot be reached; check that it runs" in message
        assert not any(secret in message for secret in ("127.0.0.1", "ann:", "hunter", "refused"))
        (logged,) = logs
        assert logged["database"] == "postgresql+psycopg://ann:***@127.0.0.1:1/x"
        assert "hunter" not in str(logged)

    @pytest.mark.parametrize("url", ["mysql://ann:hunter2@h/x?password=hunter3", "postgresql://ann:hunter2@h:port/x"])
    def test_no_message_shows_a_secret(self, url: str) -> None:
        with pytest.raises(InvalidInputError, match="sqlite:///path") as raised:
            SqlStore.open(url)
        assert "hunter" not in str(raised.value)

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            SqlStore.open(f"sqlite:///{tmp_path}/none/admin.db")

    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        path = tmp_path / "admin.db"
        path.write_text("a letter\n" * 1000)
        with pytest.raises(GenRetrievalError, match="cannot be reached"):
            SqlStore.open(f"sqlite:///{path}")

    def test_a_driver_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "psycopg", None)
        with pytest.raises(MissingExtraError, match=r"genretrieval\[postgres\]"):
            SqlStore.open("postgres://host/x")

    def test_what_sqlite_acknowledges_is_on_disk(self, tmp_path: Path) -> None:
        store = SqlStore.open(f"sqlite:///{tmp_path}/admin.db")
        with store._engine.connect() as connection:
            pragma = {n: connection.exec_driver_sql(f"PRAGMA {n}").scalar() for n in ("journal_mode", "synchronous")}
        store.close()
        assert pragma == {"journal_mode": "wal", "synchronous": 2}


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
class TestNotify:
    def heard(self, store: SqlStore, database_url: str) -> list[str]:
        with psycopg.connect(database_url, autocommit=True) as listener:
            listener.execute(f"LISTEN {sql.CHANNEL}")
            one(store, Create(Kind.RULES, "a", RULE))
            one(store, Create(Kind.RULES, "b", RULE), Call("ann", validate_only=True))
            one(store, Delete(Kind.RULES, "a"))
            return [notify.payload for notify in listener.notifies(timeout=1, stop_after=3)]

    def test_every_change(self, make_store: MakeStore, database_url: str) -> None:
        assert self.heard(make_store(), database_url) == ["1", "2"]

    def test_switched_off(self, make_store: MakeStore, database_url: str) -> None:
        assert self.heard(make_store(notify=False), database_url) == []
