"""A replica over a store in memory: polling, waiting, and what it does without the store."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from structlog.testing import capture_logs

from genretrieval.edits import Edits
from genretrieval.errors import BundleError, InvalidInputError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest
from genretrieval_serving.admin import replica as replica_module
from genretrieval_serving.admin.replica import POLL_SECONDS, STALE_SECONDS, WAIT_SECONDS, Replica
from genretrieval_serving.admin.resources import Kind, RuleFields
from genretrieval_serving.admin.snapshot import AdminSnapshot, Items
from genretrieval_serving.admin.store import Call, Changes, Create
from genretrieval_serving.observability import Metrics

REQUEST = RetrieveRequest(query="new")
BLOCK = {"kind": "block", "items": {"item_ids": ["item-1"]}}
HOUR = timedelta(hours=1)


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
def make(store, catalogue, reserved, metrics, noon) -> Callable[..., Replica]:
    def make(**options: Any) -> Replica:
        replica = Replica(store, metrics, **{"clock": lambda: noon} | options)
        replica.view(Items(catalogue, reserved))
        return replica

    return make


@pytest.fixture
def elapsed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds added to the monotonic clock."""
    added = [0.0]
    real = time.monotonic
    monkeypatch.setattr(replica_module.time, "monotonic", lambda: real() + added[0])
    return added


def edits(replica: Replica) -> Edits:
    """What is in force on the first catalogue."""
    return replica._views[0].edits(REQUEST)


def while_following(replica: Replica, do: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(20):
            await replica.start()
            try:
                await do()
            finally:
                await replica.stop()

    asyncio.run(main())


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.005)


def value(metrics: Metrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(f"genretrieval_{name}", labels)


def test_it_is_ready_when_caught_up_and_follows_by_polling(make, store, stored, metrics) -> None:
    store.put(stored("rules/first", effect=BLOCK))
    replica = make()
    assert not replica.ready

    async def do() -> None:
        assert replica.ready
        assert edits(replica).applied == ("rules/first",)
        begun = edits(replica)
        # Nobody tells it of this one: the notification is lost, or there never are any.
        revision = store.put(stored("rules/second", effect=BLOCK))
        written = time.perf_counter()
        await asyncio.to_thread(until, lambda: replica.revision == revision)
        assert time.perf_counter() - written < 2
        assert edits(replica).applied == ("rules/first", "rules/second")
        # What a request took with it at its beginning is what it keeps.
        assert begun.applied == ("rules/first",)

    while_following(replica, do)
    assert value(metrics, "admin_revision") == 2
    assert value(metrics, "admin_revision_lag_seconds") < STALE_SECONDS
    assert value(metrics, "keyword_slots", state="free") == 1
    assert value(metrics, "keyword_slots", state="bound") == 0
    assert value(metrics, "keyword_slots", state="quarantined") == 1


def test_it_asks_for_changes_only_where_the_revision_moved(make, store, stored) -> None:
    replica = make()
    store.put(stored("rules/r", effect=BLOCK))
    assert replica.refresh() == 1
    assert store.asked == ["revision", "changes"]
    store.asked.clear()
    assert replica.refresh() == 1
    assert store.asked == ["revision"]


def test_a_revision_without_resources_has_nothing_compiled_again(make, store, stored, monkeypatch) -> None:
    replica = make()
    store.put(stored("rules/r", effect=BLOCK))
    replica.refresh()
    monkeypatch.setattr(AdminSnapshot, "_resolved", None)
    assert store.put() == replica.refresh() == 2
    assert (edits(replica).applied, edits(replica).revision) == (("rules/r",), 2)


def test_slots_are_counted_after_a_change_and_as_time_goes_by(make, store, stored, metrics, elapsed) -> None:
    replica = make()
    binding = {"items": {"item_ids": ["item-1"]}}
    # A bound keyword whose time is over holds its slot.
    expired = binding | {"valid_until": "2020-01-01T00:00:00Z"}
    store.put(stored("keywords/old", text="old", slot={"level": 0, "code": 7}, binding=expired))
    for seconds, counts in [(0, 1), (1, 1), (STALE_SECONDS + 1, 2)]:
        elapsed[0] = seconds
        replica.refresh()
        replica._count_slots()
        assert store.asked.count("slot_counts") == counts
    states = {state: value(metrics, "keyword_slots", state=state) for state in ("free", "bound", "quarantined")}
    assert states == {"free": 1, "bound": 1, "quarantined": 0}
    store.put(stored("keywords/old", text="old"))
    replica.refresh()
    store.failure = ConnectionError("reset")
    replica._count_slots()
    assert value(metrics, "keyword_slots", state="bound") == 1
    store.failure = None
    replica._count_slots()
    assert value(metrics, "keyword_slots", state="bound") == 0


def test_pauses_are_jittered(make, monkeypatch) -> None:
    replica = make()
    pauses: list[float] = []

    def wait(timeout: float) -> None:
        pauses.append(timeout)
        if len(pauses) == 50:
            replica._stopping.set()

    monkeypatch.setattr(replica._hint, "wait", wait)
    replica._poll()
    assert len(set(pauses)) > 25
    assert all(0.8 * POLL_SECONDS <= pause <= 1.2 * POLL_SECONDS for pause in pauses)


def test_a_write_through_the_same_server_is_visible_at_once(make, store, stored) -> None:
    replica = make()
    revision = store.put(stored("rules/r", effect=BLOCK))
    assert replica.refresh() == revision
    assert edits(replica).applied == ("rules/r",)
    store.put(stored("rules/r", effect=BLOCK, deleted_at="2026-07-01T00:00:00Z"))
    replica.refresh()
    assert edits(replica).applied == ()


def test_what_begins_and_ends_needs_no_write(make, store, stored, noon) -> None:
    now = [noon]
    replica = make(clock=lambda: now[0])
    binding = {"items": {"item_ids": ["item-1"]}, "valid_from": noon, "valid_until": noon + HOUR}
    store.put(
        stored("keywords/new", text="new", slot={"level": 0, "code": 7}, binding=binding),
        stored("rules/r", effect=BLOCK, valid_until=noon + 2 * HOUR),
    )
    replica.refresh()
    store.asked.clear()
    for hours, applied in [
        (-1, ("rules/r",)),
        (0, ("rules/r", "keywords/new")),
        (0.99, ("rules/r", "keywords/new")),
        (1, ("rules/r",)),
        (2, ()),
    ]:
        now[0] = noon + hours * HOUR
        assert edits(replica).applied == applied
    assert store.asked == []


def test_a_reader_waits_for_the_revision_that_it_asks_for(make, store, stored) -> None:
    replica = make()

    async def do() -> None:
        await replica.wait_for(0)
        for name in ("a", "b"):
            revision = store.revision_ + 1
            waiting = [asyncio.create_task(replica.wait_for(n, 5)) for n in (revision, revision, 99)]
            await asyncio.sleep(0.02)
            assert not any(task.done() for task in waiting)
            store.put(stored(f"rules/{name}", effect=BLOCK))
            await asyncio.gather(*waiting[:2])
            assert replica.revision == revision
            assert not waiting[2].done()
            waiting[2].cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        assert replica._waiting == {}

    while_following(replica, do)


def test_a_reader_that_waits_has_the_store_read_at_once(make, store, stored, monkeypatch) -> None:
    monkeypatch.setattr(replica_module, "POLL_SECONDS", 60.0)
    replica = make()

    async def do() -> None:
        await replica.wait_for(store.put(stored("rules/a", effect=BLOCK)))

    while_following(replica, do)


def test_readers_that_wait_have_the_store_read_only_so_often(make, store, monkeypatch) -> None:
    monkeypatch.setattr(replica_module, "POLL_SECONDS", 60.0)
    replica = make()

    async def do() -> None:
        store.asked.clear()
        begun = time.monotonic()
        for _ in range(30):
            with pytest.raises(StaleReplicaError):
                await replica.wait_for(99, 0.005)
        # One that waits for less than that has nothing read; one that goes on has.
        assert store.asked.count("revision") <= (time.monotonic() - begun) / replica_module.HINT_SECONDS + 1
        store.asked.clear()
        with pytest.raises(StaleReplicaError):
            await replica.wait_for(99, 0.2)
        assert "revision" in store.asked

    while_following(replica, do)


def test_a_reader_that_would_wait_too_long_is_told_what_there_is(make, store, stored) -> None:
    replica = make()
    store.put(stored("rules/a", effect=BLOCK))

    async def do() -> None:
        for within, at_most in [(0.02, 0.02), (None, WAIT_SECONDS), (60, WAIT_SECONDS)]:
            begun = time.perf_counter()
            with pytest.raises(StaleReplicaError, match="min_revision: 9 was asked for and this replica has 1"):
                await replica.wait_for(9, within)
            assert at_most * 0.9 <= time.perf_counter() - begun < at_most + 1
        assert replica._waiting == {}

    while_following(replica, do)


def test_without_the_store_it_is_not_ready_until_that_is_there(make, store, stored) -> None:
    store.put(stored("rules/r", effect=BLOCK))
    store.failure = UnavailableError("no route")
    replica = make()

    async def main() -> None:
        starting = asyncio.create_task(replica.start())
        await asyncio.to_thread(until, lambda: store.asked.count("revision") >= 2)
        assert not replica.ready
        assert not starting.done()
        store.failure = None
        await asyncio.wait_for(starting, 5)
        assert replica.ready
        assert edits(replica).applied == ("rules/r",)
        await replica.stop()

    asyncio.run(main())


def test_without_the_store_what_was_read_last_is_served(make, store, stored, metrics, elapsed) -> None:
    replica = make()
    store.put(stored("rules/r", effect=BLOCK))
    replica.refresh()
    store.failure = ConnectionError("reset")
    store.put(stored("rules/unseen", effect=BLOCK))
    with capture_logs() as logs:
        assert [replica.refresh() for _ in range(3)] == [1, 1, 1]
        assert not replica.stale
        elapsed[0] = STALE_SECONDS + 1
        assert replica.stale
        assert value(metrics, "admin_revision_lag_seconds") > STALE_SECONDS
        assert edits(replica).applied == ("rules/r",)
        store.failure = None
        assert replica.refresh() == 2
        assert not replica.stale
        assert value(metrics, "admin_revision_lag_seconds") < 1
    assert [entry["event"] for entry in logs] == ["admin_state_not_read", "admin_state_read_again"]
    assert "reset" in logs[0]["error"]


def test_a_store_that_goes_back_is_not_followed(make, store, stored, elapsed) -> None:
    replica = make()
    for name in ("a", "b"):
        store.put(stored(f"rules/{name}", effect=BLOCK))
    replica.refresh()
    store.revision_ = 1
    elapsed[0] = STALE_SECONDS + 1
    with capture_logs() as logs:
        assert replica.refresh() == 2
    assert edits(replica).applied == ("rules/a", "rules/b")
    assert replica.stale
    assert "an older copy" in logs[0]["error"]


def test_reads_that_cross_leave_the_newest(make, store, stored, monkeypatch) -> None:
    replica = make()
    original = AdminSnapshot.updated
    begun = threading.Event()

    def updated(self: AdminSnapshot, changes: Changes) -> AdminSnapshot:
        if changes.revision == 1:
            begun.set()
            time.sleep(0.2)
        return original(self, changes)

    monkeypatch.setattr(AdminSnapshot, "updated", updated)
    store.put(stored("rules/a", effect=BLOCK))
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(replica.refresh)
        assert begun.wait(10)
        store.put(stored("rules/b", effect=BLOCK))
        assert replica.refresh() == 2
        assert slow.result(10) == 1
    assert edits(replica).applied == ("rules/a", "rules/b")


def test_many_writers_each_see_their_own_write(make, store, stored) -> None:
    replica = make()
    lock = threading.Lock()

    def write_and_read(i: int) -> None:
        with lock:
            revision = store.put(stored(f"rules/{i % 5}", effect=BLOCK, note=str(i)))
        assert replica.refresh() >= revision

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write_and_read, range(100)))
    assert replica.revision == 100
    assert set(replica._resources) == {f"rules/{i}" for i in range(5)}
    assert all(int(resource.note) >= 80 for _, resource in replica._resources.values())


def test_what_cannot_be_applied_is_counted_and_logged_once(make, store, stored, metrics) -> None:
    bad = stored("rules/bad", effect=BLOCK, condition={"query": {"match": "regex", "text": "("}})
    store.put(bad, stored("rules/good", effect=BLOCK))
    replica = make()
    with capture_logs() as logs:
        replica.refresh()
        store.put(stored("rules/other", effect=BLOCK))
        replica.refresh()
    skipped = [entry for entry in logs if entry["event"] == "admin_resource_skipped"]
    assert [entry["name"] for entry in skipped] == ["rules/bad"]
    assert value(metrics, "admin_skipped_resources") == 1
    assert edits(replica).applied == ("rules/good", "rules/other")


def test_what_does_not_fit_a_bundle_is_refused_or_left_out(make, store, catalogue, metrics, stored) -> None:
    binding = {"items": {"item_ids": ["item-1"]}}
    store.put(
        stored("keywords/new", text="new", slot={"level": 0, "code": 7}, binding=binding),
        stored("rules/r", effect=BLOCK),
    )
    replica = make()
    replica.refresh()
    with pytest.raises(BundleError) as error:
        replica.view(Items(catalogue), allow_unbound=False)
    assert "1 places:\n- keywords/new: slot: the bundle reserves no slot 7 on level 0" in str(error.value)
    assert "--allow-unbound" in str(error.value)
    assert (replica._missed, len(replica._views)) == ([], 1)
    assert value(metrics, "admin_skipped_resources") == 0
    allowed = replica.view(Items(catalogue))
    assert allowed.edits(REQUEST).applied == ("rules/r",)
    assert edits(replica).applied == ("rules/r", "keywords/new")
    assert value(metrics, "admin_skipped_resources") == 1
    allowed.drop()
    assert value(metrics, "admin_skipped_resources") == 0


def test_views_advance_together_and_a_dropped_one_stays(make, store, stored, catalogue) -> None:
    replica = make()
    store.put(stored("rules/a", effect={"kind": "block", "items": {"item_ids": ["item-1", "later"]}}))
    replica.refresh()
    first = replica._views[0]
    grown = catalogue.item_ids.with_more(["later"])
    moved = first.on(dataclasses.replace(catalogue, item_ids=grown))
    later = grown.row_of("later")
    assert (first.edits(REQUEST).blocked.tolist(), moved.edits(REQUEST).blocked.tolist()) == ([1], [1, later])
    first.drop()
    store.put(stored("rules/b", effect=BLOCK))
    replica.refresh()
    assert first.edits(REQUEST).applied == ("rules/a",)
    assert moved.edits(REQUEST).applied == ("rules/a", "rules/b")


def test_a_view_misses_no_change_that_comes_while_it_is_built(
    make, store, stored, catalogue, noon, monkeypatch
) -> None:
    replica = make()
    store.put(stored("rules/a", effect=BLOCK), stored("rules/gone", effect=BLOCK))
    replica.refresh()
    original = AdminSnapshot.problems
    building, go_on = threading.Event(), threading.Event()

    def problems(self: AdminSnapshot) -> list[str]:
        building.set()
        assert go_on.wait(10)
        return original(self)

    monkeypatch.setattr(AdminSnapshot, "problems", problems)
    with ThreadPoolExecutor(1) as pool:
        built = pool.submit(replica.view, Items(catalogue), allow_unbound=False)
        assert building.wait(10)
        # Nobody waits for it meanwhile.
        store.put(stored("rules/b", effect=BLOCK), stored("rules/gone", effect=BLOCK, deleted_at=noon))
        assert replica.refresh() == 2
        assert edits(replica).applied == ("rules/a", "rules/b")
        go_on.set()
        assert built.result(10).edits(REQUEST).applied == ("rules/a", "rules/b")
    assert replica._missed == []


def test_only_postgresql_can_be_listened_to(make) -> None:
    with pytest.raises(InvalidInputError, match="sends no notifications"):
        make(listen="sqlite:///state.db")


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_notification_is_a_hint_to_poll_at_once(
    make_sql_store, database_url, catalogue, metrics, monkeypatch
) -> None:
    monkeypatch.setattr(replica_module, "POLL_SECONDS", 60.0)
    store = make_sql_store()
    replica = Replica(store, metrics, listen=database_url)

    async def do() -> None:
        rules = (Create(Kind.RULES, f"r{i}", RuleFields(effect=BLOCK)) for i in count())
        async with asyncio.timeout(10):
            # Those before it listens are lost.
            while not replica.revision:
                store.apply(Call("test"), [next(rules)])
                await asyncio.sleep(0.05)
        begun = time.perf_counter()
        store.apply(Call("test"), [next(rules)])
        await asyncio.to_thread(until, lambda: replica.revision == store.revision())
        assert time.perf_counter() - begun < 5

    while_following(replica, do)
