"""Requests counted on a clock that is turned by hand."""

from __future__ import annotations

import pytest

from genretrieval.errors import InvalidInputError, OverloadedError, RateLimitedError
from genretrieval_serving.client import Client
from genretrieval_serving.rate_limit import RateLimiter


def test_each_caller_has_a_rate_of_its_own() -> None:
    now = 1000.0
    limiter = RateLimiter("4/10 seconds", lambda: now)
    for _ in range(4):
        limiter.count("a")
    with pytest.raises(RateLimitedError, match="a may make 4 requests in 10 s") as refused:
        limiter.count("a")
    # One more every 2.5 seconds; what was refused does not count.
    assert refused.value.retry_after == pytest.approx(2.5)
    limiter.count("b")
    now += 2.5
    limiter.count("a")
    with pytest.raises(RateLimitedError) as refused:
        limiter.count("a")
    assert refused.value.retry_after == pytest.approx(2.5)
    now += 100
    for _ in range(4):
        limiter.count("a")


def test_callers_of_long_ago_are_forgotten() -> None:
    now = 0.0
    limiter = RateLimiter("4/10 seconds", lambda: now)
    for number in range(1000):
        limiter.count(str(number))
    now += 11
    limiter.count("new")
    assert list(limiter._worked_off) == [("new", "requests")]


def test_calls_with_events_are_counted_besides(start) -> None:
    event = {"item_id": "item-1", "event": "click", "user_id": "u"}
    with (
        start(rate_limit="2/day", histories="memory") as running,
        Client(running.grpc) as by_grpc,
        Client(running.http) as by_rest,
    ):
        by_rest.record_events([event])
        by_grpc.record_events([event] * 5)
        for client in (by_grpc, by_rest):
            with pytest.raises(RateLimitedError, match="may make 2 calls with events"):
                client.record_events([event])
        by_grpc.retrieve()


@pytest.mark.parametrize("rate", ["", "fast", "0/second", "5/fortnight", "-1/second"])
def test_what_is_no_rate_is_refused(rate) -> None:
    with pytest.raises(InvalidInputError, match="100/second"):
        RateLimiter(rate)


def test_a_server_counts_every_request_of_a_batch(start, example) -> None:
    with start(rate_limit="3/day") as running, Client(running.grpc) as by_grpc, Client(running.http) as by_rest:
        by_grpc.retrieve(example)
        first, second, third = by_rest.batch_retrieve([example] * 3)
        assert first.items == second.items != []
        assert type(third) is RateLimitedError
        for client in (by_grpc, by_rest):
            # No day is within its timeout, so it does not try again.
            with pytest.raises(RateLimitedError, match="anonymous may make 3 requests") as refused:
                client.retrieve(example)
            assert isinstance(refused.value, OverloadedError)
            assert refused.value.retry_after > 60
            assert client.info().n_items == 24
        assert running.metric("genretrieval_rejected_total", reason="RATE_LIMITED") == 3
