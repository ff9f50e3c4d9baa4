"""Requests counted on a clock that is turned by hand."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from genretrieval.errors import InvalidInputError, OverloadedError, RateLimitedError
from genretrieval_serving.client import Client
from genretrieval_serving.rate_limit import RateLimiter


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1_000_000.0)
    time = SimpleNamespace(time=lambda: clock.now)
    for module in ("limits.storage.memory", "limits.strategies"):
        monkeypatch.setattr(f"{module}.time", time)
    return clock


def test_each_caller_has_a_rate_of_its_own(clock) -> None:
    limiter = RateLimiter("4/10 seconds")
    for _ in range(4):
        limiter.count("a")
    with pytest.raises(RateLimitedError, match="a may make 4 requests in 10 s") as refused:
        limiter.count("a")
    assert refused.value.retry_after == 10
    limiter.count("b")
    # Of the next window 4.5 s are left, so the four count as 1.8; beside three, as one when 2.5 s are left.
    clock.now += 15.5
    for _ in range(3):
        limiter.count("a")
    with pytest.raises(RateLimitedError) as refused:
        limiter.count("a")
    assert refused.value.retry_after == pytest.approx(2.0)
    clock.now += refused.value.retry_after + 1e-6
    limiter.count("a")


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_locks_nobody_out(clock, jump) -> None:
    limiter = RateLimiter("2/10 seconds")
    limiter.count("a")
    limiter.count("a")
    clock.now += jump
    limiter.count("a")


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
