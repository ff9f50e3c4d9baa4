"""What is stored of a user joins what a request carries, by rule, in time or not at all."""

from __future__ import annotations

import asyncio
import os
import uuid
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest
import redis

from genretrieval.errors import DataError, InvalidInputError, UnavailableError
from genretrieval.request import MAX_HISTORY_EVENTS, HistoryEvent, RetrievedItem, RetrieveRequest, RetrieveResponse
from genretrieval_serving import history
from genretrieval_serving.client import Client
from genretrieval_serving.history import (
    FAILING_SECONDS,
    HISTORY_UNAVAILABLE,
    MAX_FAILURES,
    PAUSE_SECONDS,
    Completed,
    Histories,
    HistoryProvider,
    MemoryHistories,
    RedisHistories,
    merged,
    open_histories,
)
from genretrieval_serving.observability import Metrics

T = TypeVar("T")
REDIS = os.environ.get("GENRETRIEVAL_TEST_REDIS", "redis://127.0.0.1:6379/9")


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(coroutine)


def events(written: str) -> list[HistoryEvent]:
    """``a5 b c7`` is item a at 5, item b undated, item c at 7, all clicked; a capital was purchased."""
    return [
        HistoryEvent(
            item_id=word[0].lower(),
            event="purchase" if word[0].isupper() else "click",
            timestamp=int(word[1:]) if word[1:] else None,
        )
        for word in written.split()
    ]


def written(read: Sequence[HistoryEvent]) -> str:
    return " ".join(
        (e.item_id.upper() if e.event == "purchase" else e.item_id) + ("" if e.timestamp is None else str(e.timestamp))
        for e in read
    )


@pytest.mark.parametrize(
    ("stored", "own", "together"),
    [
        ("", "a5 b", "a5 b"),
        ("a1 b2", "", "a1 b2"),
        ("a1 b3", "c2 d4", "a1 c2 b3 d4"),
        ("a1 b2", "b2 c3", "a1 b2 c3"),  # both have it
        ("a1 b2 b2", "c3", "a1 b2 c3"),  # sent twice
        ("b2", "B2 b3", "b2 B2 b3"),  # other behaviours, other times: other events
        ("b2 a1", "c3", "a1 b2 c3"),  # stored out of order
        ("a5", "b5", "a5 b5"),  # what is stored first
        ("a1 b9", "c", "a1 b9 c"),  # undated and last: newest
        ("a1 b4 d6", "c d5", "a1 b4 c d5 d6"),  # undated before a dated one: right before it
        ("a b2 c d3", "e1", "a e1 b2 c d3"),  # stored and undated: right behind the one before it
        ("a1", "b b", "a1 b b"),  # twice undated in a request is twice
        ("b a1", "b", "a1 b"),
    ],
)
def test_stored_and_own_events_are_merged_by_rule(stored, own, together) -> None:
    assert written(merged(events(stored), events(own))) == together


def test_all_of_the_request_stays_and_the_newest_of_the_rest() -> None:
    stored = [HistoryEvent(item_id="s", timestamp=n) for n in range(MAX_HISTORY_EVENTS)]
    own = [HistoryEvent(item_id="o", timestamp=n) for n in range(3)]
    together = merged(stored, own)
    assert len(together) == MAX_HISTORY_EVENTS
    assert [e for e in together if e.item_id == "o"] == own
    assert [e.timestamp for e in together if e.item_id == "s"] == list(range(3, MAX_HISTORY_EVENTS))
    full = [HistoryEvent(item_id="o", timestamp=n) for n in range(MAX_HISTORY_EVENTS)]
    assert merged(stored, full) == full


class Flaky:
    """A store that does what it is told, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.outcome: str | Exception = "a1"
        self.answers = asyncio.Event()

    async def get(self, user_id: str) -> list[HistoryEvent]:
        self.asked += 1
        if self.outcome == "slow":
            await self.answers.wait()
            return []
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return events(self.outcome)

    async def append(self, user_id: str, events: Sequence[HistoryEvent]) -> None:
        if isinstance(self.outcome, Exception):
            raise self.outcome

    async def forget(self, user_id: str) -> None: ...

    async def close(self) -> None: ...


REQUEST = RetrieveRequest(user_id="u", history=events("b2"), exclude_history="all")


def lookups(metrics: Metrics) -> dict[str, float]:
    (family,) = metrics.history_lookups.collect()
    return {s.labels["outcome"]: s.value for s in family.samples if s.name.endswith("_total")}


def test_a_store_that_is_slow_or_fails_costs_its_history_and_nothing_else() -> None:
    async def ask() -> None:
        store, metrics = Flaky(), Metrics()
        histories = Histories(store, metrics)
        for outcome in ("a1", "", "slow", UnavailableError("away"), DataError("not mine")):
            store.outcome = outcome
            completed = await histories.complete(REQUEST)
            found = outcome in ("a1", "")
            assert written(completed.request.history) == ("a1 b2" if outcome == "a1" else "b2")
            assert completed.available is found
            assert (completed.request is REQUEST) == (outcome != "a1")
        assert lookups(metrics) == {"found": 1, "empty": 1, "timeout": 1, "failed": 1, "malformed": 1}
        nobody = RetrieveRequest(history=events("b2"))
        assert await histories.complete(nobody) == Completed(nobody, nobody)
        await histories.close()

    run(ask())


def test_a_dead_store_is_left_alone_and_found_again() -> None:
    async def ask() -> None:
        store, metrics, now = Flaky(), Metrics(), 0.0
        histories = Histories(store, metrics, clock=lambda: now)
        store.outcome = UnavailableError("away")
        # A burst says nothing yet; failures that go on do.
        for _ in range(MAX_FAILURES + 10):
            assert not (await histories.complete(REQUEST)).available
        burst = MAX_FAILURES + 10
        assert store.asked == burst
        now += FAILING_SECONDS
        for _ in range(10):
            assert not (await histories.complete(REQUEST)).available
        assert store.asked == burst + 1
        assert lookups(metrics) == {"failed": burst + 1, "skipped": 9}
        assert not await histories.append({"u": events("c3")})
        now += PAUSE_SECONDS
        assert not (await histories.complete(REQUEST)).available
        assert not (await histories.complete(REQUEST)).available
        assert store.asked == burst + 2
        store.outcome = "a1"
        now += PAUSE_SECONDS
        assert [(await histories.complete(REQUEST)).available for _ in range(3)] == [True] * 3
        assert await histories.append({"u": events("c3")})

    run(ask())


def test_a_lookup_that_is_given_up_may_still_open_its_connection(monkeypatch) -> None:
    monkeypatch.setattr(history, "BUDGET_SECONDS", 0.0)

    async def ask() -> None:
        store = Flaky()
        store.outcome = "slow"
        histories = Histories(store, Metrics())
        assert not (await histories.complete(REQUEST)).available
        assert len(histories._asking) == 1
        store.answers.set()
        await asyncio.gather(*histories._asking)
        await asyncio.sleep(0)
        assert not histories._asking

    run(ask())


def test_the_caller_hears_of_the_events_that_it_sent() -> None:
    answer = RetrieveResponse(items=[], missing_ids=["b", "x", "e"], degraded=["query_ignored", "history_truncated"])
    came = RetrieveRequest(history=events("b"), exclude_item_ids=["e"])
    merged_ = came.model_copy(update={"history": events("x1 b")})
    told = Completed(merged_, came).told(answer, max_events=1)
    assert (told.missing_ids, told.degraded) == (["b", "e"], ["query_ignored"])
    assert Completed(merged_, came).told(answer, max_events=0).degraded == answer.degraded
    assert Completed(came, came).told(answer, max_events=0) is answer
    assert Completed(came, came, available=False).told(answer, 1).degraded == [*answer.degraded, HISTORY_UNAVAILABLE]


def test_memory_keeps_the_users_last_seen() -> None:
    async def use() -> None:
        store = MemoryHistories(max_users=2)
        for user in ("u", "v"):
            await store.append(user, events("a1"))
        await store.get("u")
        await store.append("w", events("a1"))
        assert [bool(await store.get(user)) for user in "uvw"] == [True, False, True]

    run(use())


@pytest.mark.parametrize("where", ["", "memcached://x", "redis", "redis://:pass@h:nan"])
def test_a_store_that_cannot_be_meant_is_refused_without_its_password(where) -> None:
    with pytest.raises(InvalidInputError, match="redis://") as caught:
        open_histories(where)
    assert "pass" not in str(caught.value)


@pytest.fixture(params=["memory", "redis"])
def where(request: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where histories are kept."""
    if request.param == "memory":
        yield "memory"
        return
    prefix = f"test-{uuid.uuid4().hex}:"
    monkeypatch.setattr(history, "KEY_PREFIX", prefix)
    with redis.Redis.from_url(REDIS) as client:
        try:
            client.ping()
        except redis.ConnectionError:
            if os.environ.get("REQUIRE_REDIS"):
                raise
            pytest.skip(f"no Redis at {REDIS}")
        yield REDIS
        for key in client.scan_iter(f"{prefix}*"):
            client.delete(key)


def test_a_store_keeps_the_newest_events_of_each_user(where) -> None:
    async def use() -> None:
        store: HistoryProvider = open_histories(where)
        assert await store.get("u") == []
        await store.append("u", events("a1 b"))
        await store.append("u", events("C3"))
        await store.append("v", events("d4"))
        assert [written(await store.get(user)) for user in "uv"] == ["a1 b C3", "d4"]
        await store.append("v", [HistoryEvent(item_id="n", timestamp=n) for n in range(MAX_HISTORY_EVENTS)])
        newest = await store.get("v")
        assert (len(newest), newest[0].item_id) == (MAX_HISTORY_EVENTS, "n")
        await store.forget("u")
        assert await store.get("u") == []
        await store.close()

    run(use())


@pytest.mark.parametrize("where", ["redis"], indirect=True)
def test_what_others_wrote_into_redis_is_read_or_refused(where) -> None:
    async def use() -> None:
        store = RedisHistories(where)
        with redis.Redis.from_url(where) as client:
            client.rpush(f"{history.KEY_PREFIX}u", '{"item_id": "a", "event": "click", "timestamp": 7}')
            assert written(await store.get("u")) == "a7"
            client.rpush(f"{history.KEY_PREFIX}u", '{"item": "secret"}')
            with pytest.raises(DataError, match="no events") as caught:
                await store.get("u")
            assert "secret" not in str(caught.value)
            await store.append("v", events("a1"))
            assert 0 < client.ttl(f"{history.KEY_PREFIX}v") <= history.KEPT_SECONDS
        await store.close()

    run(use())


def test_a_redis_that_is_not_there_is_unavailable() -> None:
    async def ask() -> None:
        store = RedisHistories("redis://:secret@127.0.0.1:1/0")
        for call in (store.get("u"), store.append("u", events("a1")), store.forget("u")):
            with pytest.raises(UnavailableError, match="Redis") as caught:
                await call
            assert "secret" not in str(caught.value)
        await store.close()

    run(ask())


def test_the_next_request_of_a_user_sees_what_was_recorded(start, where, monkeypatch) -> None:
    # A busy machine may take longer than a request is ready to wait.
    monkeypatch.setattr(history, "BUDGET_SECONDS", 10.0)
    event = {"user_id": "u", "item_id": "item-1", "event": "purchase"}
    with start(histories=where) as running, Client(running.grpc) as by_grpc, Client(running.http) as by_rest:
        assert by_rest.record_events([event]).accepted == 1
        clicked, seen = {"item_id": "item-9", "event": "click"}, {"item_id": "item-2", "event": "exposure"}
        # No model here reads what was seen and left.
        by_grpc.record_events([event | clicked, event | seen, event | {"item_id": "gone"}])

        def ids(client: Client, **fields: Any) -> list[str]:
            response = client.retrieve(top_k=24, **fields)
            assert (response.degraded, response.missing_ids) == (["fewer_than_top_k"], [])
            return [item.item_id for item in response.items]

        for client in (by_grpc, by_rest):
            purchased = ids(client, user_id="u", exclude_history="purchased")
            assert len(purchased) == 23
            assert "item-1" not in purchased
            own = [{"item_id": "item-4"}]
            assert not {"item-1", "item-4", "item-9"} & set(
                ids(client, user_id="u", exclude_history="all", history=own)
            )
            assert len(ids(client, user_id="v", exclude_history="all", history=own)) == 23
        # Without a log an event without a user would be lost.
        with pytest.raises(Exception, match=r"events\.1: there is no user_id"):
            by_rest.record_events([event, {"item_id": "item-1", "event": "click", "attribution_token": "t"}])


def test_without_its_store_a_server_answers_as_one_without_stores(start, example) -> None:
    def items(response: RetrieveResponse) -> list[RetrievedItem]:
        return response.items

    with start() as plain, Client(plain.http) as client:
        expected = client.retrieve(example)
        assert client.retrieve(example.model_copy(update={"user_id": None})).items == expected.items
    with start(histories="redis://127.0.0.1:1/0") as running, Client(running.http) as client:
        answer = client.retrieve(example)
        assert items(answer) == items(expected)
        assert answer.degraded == [*expected.degraded, HISTORY_UNAVAILABLE]
        recorded = client.record_events([{"user_id": "u", "item_id": "item-1", "event": "click"}])
        assert recorded.degraded == [HISTORY_UNAVAILABLE]
