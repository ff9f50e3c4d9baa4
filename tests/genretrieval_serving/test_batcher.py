"""Who is taken, who is refused and who is run, on a clock that stands still."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genretrieval.edits import NO_EDITS, BoundKeyword, Edits
from genretrieval.errors import DeadlineError, GenRetrievalError, OverloadedError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval_serving.batcher import STUCK_SECONDS, Batcher, rows_of
from genretrieval_serving.observability import Metrics

REQUEST = RetrieveRequest(top_k=1)
RESPONSE = RetrieveResponse(items=[])


class Clock:
    """Time that passes by hand."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A batcher whose graph is entered one batch at a time, and its clock."""

    def __init__(self, bundle: Any, backend: Any, **limits: Any) -> None:
        self.clock, self.backend = Clock(), backend
        self.retriever = Retriever(bundle, backend)
        self.batcher = Batcher(Metrics(), clock=self.clock, **limits)
        self.batches: list[int] = []
        self.answered: list[str] = []
        retrieve = self.retriever.retrieve

        def noting(requests: Any, edits: Any) -> Any:
            self.batches.append(len(requests))
            return retrieve(requests, edits)

        self.retriever.retrieve = noting  # type: ignore[method-assign]

    def ask(
        self, caller: str = "a", within: float | None = None, request: RetrieveRequest = REQUEST
    ) -> asyncio.Task[Any]:
        task = asyncio.create_task(self.batcher.submit(self.retriever, request, within, NO_EDITS, caller))
        task.add_done_callback(lambda _: self.answered.append(caller))
        return task

    async def fill(self) -> None:
        """Let what was asked get to the queue, and what was cancelled leave it."""
        await asyncio.sleep(0.02)

    def rows(self) -> tuple[float | None, float | None]:
        """In flight; waiting."""
        value = self.batcher.metrics.registry.get_sample_value
        return value("genretrieval_in_flight_rows"), value("genretrieval_queue_depth")


@pytest.fixture
def busy(bundle: Any, backend: Any) -> Callable[..., Any]:
    """``async with busy(row_seconds, **limits) as bench``: one request runs until the gate opens."""

    @asynccontextmanager
    async def opened(row_seconds: float, **limits: Any) -> AsyncIterator[Bench]:
        bench = Bench(bundle, backend, **limits)
        await bench.batcher.warm_up(bench.retriever)
        await bench.batcher.start()
        bench.batches.clear()
        while backend.entered.acquire(blocking=False):
            pass
        bench.batcher.row_seconds = row_seconds
        backend.gate.clear()
        first = bench.ask("first")
        await asyncio.to_thread(backend.entered.acquire)
        yield bench
        backend.gate.set()
        await asyncio.gather(first, return_exceptions=True)
        await bench.batcher.stop(10)
        assert bench.rows() == (0, 0)

    return opened


def test_rows_are_searches_with_the_bundles_beams(bundle, backend) -> None:
    retriever = Retriever(bundle, backend)  # of 12 beams
    word = BoundKeyword("keywords/new", "new", 0, 7, np.asarray([3]))
    bound = Edits(bound=(word,))
    for fields, edits, rows in [
        ({}, NO_EDITS, 1),
        ({"beam_width": 3}, NO_EDITS, 1),
        ({"beam_width": 13}, NO_EDITS, 2),
        ({"top_k": 36}, NO_EDITS, 3),
        ({"query": "new"}, bound, 2),
        ({"query": "new", "bindings": "off"}, bound, 1),
        ({"query": "new", "beam_width": 24}, bound, 4),
    ]:
        assert rows_of(retriever, RetrieveRequest(**fields), edits) == rows


def test_one_callers_flood_does_not_delay_another(busy) -> None:
    async def main() -> None:
        async with busy(1e-6, max_batch=4) as bench:
            flood = [bench.ask("a") for _ in range(20)]
            await bench.fill()
            other = bench.ask("b")
            await bench.fill()
            bench.backend.gate.set()
            await asyncio.gather(other, *flood)
            assert "b" in bench.answered[:5]  # the batch after the one that ran
            assert bench.batches == [1, 4, 4, 4, 4, 4, 1]

    asyncio.run(main())


def test_a_batch_is_full_by_rows(busy) -> None:
    async def main() -> None:
        async with busy(1e-6, max_batch=4) as bench:
            wide = RetrieveRequest(beam_width=36)
            tasks = [bench.ask(request=request) for request in (REQUEST, wide, wide, REQUEST, REQUEST)]
            tasks += [bench.ask(request=RetrieveRequest(beam_width=120)), bench.ask()]
            await bench.fill()
            assert bench.rows() == (1 + 3 * 1 + 2 * 3 + 10 + 1, 7)
            bench.backend.gate.set()
            await asyncio.gather(*tasks)
            assert bench.batches == [1, 2, 2, 1, 1, 1]
            read = bench.batcher.metrics.registry.get_sample_value
            assert read("genretrieval_batch_rows_sum") == 1 + 20

    asyncio.run(main())


def test_a_standing_queue_is_one_and_a_half_batches_long(busy) -> None:
    async def main() -> None:
        async with busy(1.0, max_batch=2, max_wait=0.0) as bench:
            # A full batch takes 2 s, so 3 s may be waited for: the row that runs, and two before the last one taken.
            tasks = [bench.ask() for _ in range(3)]
            await bench.fill()
            assert bench.rows() == (4, 3)
            with pytest.raises(OverloadedError, match=r"3 rows wait already, 4 s of work") as refused:
                await bench.ask()
            assert refused.value.retry_after == 4.0
            # Another caller would be next but one.
            tasks.append(bench.ask("b"))
            await bench.fill()
            assert bench.rows() == (5, 4)
            # One row more is ahead now, and what runs is half done.
            bench.clock.now += 0.5
            with pytest.raises(OverloadedError) as refused:
                await bench.ask()
            assert refused.value.retry_after == 4.5
            bench.backend.gate.set()
            await asyncio.gather(*tasks)

    asyncio.run(main())


def test_a_burst_may_wait_longer_and_a_queue_that_stands_may_not(busy) -> None:
    async def main() -> None:
        async with busy(1.0, max_batch=1, max_wait=20.0) as bench:
            tasks = [bench.ask() for _ in range(20)]
            await bench.fill()
            assert not any(task.done() for task in tasks)
            with pytest.raises(OverloadedError):
                await bench.ask()
            # After ten seconds of it nobody waits more than ten.
            for task in tasks[8:]:
                task.cancel()
            await bench.fill()
            bench.clock.now += 10.0
            tasks = [*tasks[:8], bench.ask(), bench.ask(), bench.ask()]
            await bench.fill()
            assert not any(task.done() for task in tasks)
            with pytest.raises(OverloadedError, match="11 rows wait already"):
                await bench.ask()
            # While no more than a batch waits it may grow again.
            for task in tasks:
                task.cancel()
            await bench.fill()
            bench.clock.now += 5.0
            tasks = [bench.ask() for _ in range(16)]
            await bench.fill()
            assert not any(task.done() for task in tasks)
            with pytest.raises(OverloadedError):
                await bench.ask()
            for task in tasks:
                task.cancel()

    asyncio.run(main())


def test_a_deadline_that_the_queue_cannot_keep_is_refused_at_once(busy) -> None:
    async def main() -> None:
        async with busy(1.0, max_batch=8) as bench:
            # Behind what runs alone it is taken: were the estimate wrong, only running it would tell.
            hopeful = bench.ask(within=0.5)
            await bench.fill()
            with pytest.raises(OverloadedError, match=r"wait 2 s and was to be answered within 2.5 s") as refused:
                await bench.ask(within=2.5)
            assert refused.value.retry_after == 2.0
            served = bench.ask(within=60)
            await bench.fill()
            assert bench.rows() == (3, 2)
            hopeful.cancel()
            bench.backend.gate.set()
            await served
            assert bench.batches == [1, 1]

    asyncio.run(main())


def test_what_could_not_be_answered_in_time_is_not_run(busy) -> None:
    async def main() -> None:
        async with busy(1e-6) as bench:
            tasks = [bench.ask(within=30), bench.ask(), bench.ask(within=30)]
            await bench.fill()
            bench.batcher.row_seconds = 100.0
            bench.backend.gate.set()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
            assert [isinstance(outcome, DeadlineError) for outcome in outcomes] == [True, False, True]
            assert "not run" in str(outcomes[0])
            assert bench.batches == [1, 1]
            # With nothing else to do it is tried.
            assert (await bench.ask(within=30)).items

    asyncio.run(main())


def test_who_gives_up_leaves_the_queue_at_once(busy) -> None:
    async def main() -> None:
        async with busy(1e-6) as bench:
            gone, stays = bench.ask(), bench.ask()
            late = bench.ask(within=0.01)
            await bench.fill()
            gone.cancel()
            with pytest.raises(DeadlineError):
                await late
            await bench.fill()
            assert bench.rows() == (2, 1)
            bench.backend.gate.set()
            await stays
            assert bench.batches == [1, 1]

    asyncio.run(main())


def test_how_long_a_row_takes_is_measured(bundle, backend) -> None:
    async def main() -> None:
        bench = Bench(bundle, backend, max_batch=4)
        retrieve = bench.retriever.retrieve

        def slow(requests: Any, edits: Any) -> Any:
            bench.clock.now += 0.5 * len(requests)
            return retrieve(requests, edits)

        bench.retriever.retrieve = slow  # type: ignore[method-assign]
        await bench.batcher.warm_up(bench.retriever)
        assert bench.batcher.row_seconds == 0.5
        await bench.batcher.start()
        response = await bench.ask()
        assert bench.batcher.row_seconds == 0.5
        assert response.timings.queue_ms == 0.0
        await bench.batcher.stop(1)

    asyncio.run(main())


def test_what_is_left_at_the_end_is_told_so(busy) -> None:
    async def main() -> None:
        async with busy(1e-6) as bench:
            waiting = [bench.ask() for _ in range(3)]
            await bench.fill()
            await bench.batcher.stop(0.01)
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(type(outcome) is UnavailableError for outcome in outcomes)
            with pytest.raises(UnavailableError):
                await bench.ask()

    asyncio.run(main())


def test_a_batch_that_does_not_end_is_no_life(busy) -> None:
    async def main() -> None:
        async with busy(1e-6) as bench:
            waiting = bench.ask()
            await bench.fill()
            bench.clock.now += STUCK_SECONDS - 1
            assert bench.batcher.alive
            bench.clock.now += 1
            assert not bench.batcher.alive
            with pytest.raises(UnavailableError, match="stuck"):
                await bench.ask()
            bench.batcher.give_up()
            with pytest.raises(UnavailableError):
                await waiting
            # It ends after all.
            bench.backend.gate.set()
            await bench.batcher._idle.wait()
            assert bench.batcher.alive

    asyncio.run(main())


def test_a_process_ends_though_its_graph_does_not() -> None:
    program = (
        "import threading\n"
        "from genretrieval_serving.daemon_thread import DaemonThread\n"
        "DaemonThread('retrieve').submit(threading.Event().wait)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


class PanicError(BaseException):
    """As what panics in Rust reaches Python: no Exception."""


class Quick:
    """A retriever that answers nothing, soon; fails for one beam width, and panics for another."""

    class bundle:
        class manifest:
            beam_width = 10

    def check(self, request: RetrieveRequest) -> None: ...

    def beam_width(self, request: RetrieveRequest) -> int:
        return max(request.beam_width or 10, request.top_k)

    def retrieve(self, requests: Any, edits: Any) -> list[Any]:
        if any(request.beam_width == 13 for request in requests):
            raise ValueError("poisoned")
        if any(request.beam_width == 14 for request in requests):
            raise PanicError
        return [RESPONSE] * len(requests)


CALLS = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([None, 1, 13, 14, 40]),  # beams
        st.sampled_from([None, 0.0, 0.0005, 5.0]),  # deadline
        st.sampled_from(["wait", "cancel", "cancel later"]),
    ),
    max_size=40,
)


@settings(max_examples=40, deadline=None)
@given(CALLS, st.integers(1, 8), st.sampled_from([0.0, 1e-4, 10.0]), st.randoms())
def test_no_row_is_ever_lost(calls: Any, max_batch: int, row_seconds: float, rng: random.Random) -> None:
    async def main() -> None:
        batcher = Batcher(Metrics(), max_batch=max_batch)
        batcher.row_seconds = row_seconds
        await batcher.start()
        tasks = []
        for caller, beams, within, fate in calls:
            asked = batcher.submit(Quick(), RetrieveRequest(beam_width=beams), within, NO_EDITS, caller)  # type: ignore[arg-type]
            tasks.append(asyncio.create_task(asked))
            await asyncio.sleep(0)
            if fate == "cancel":
                tasks[-1].cancel()
            elif fate == "cancel later":
                asyncio.get_running_loop().call_soon(rng.choice(tasks).cancel)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        ends = RetrieveResponse, GenRetrievalError, asyncio.CancelledError
        assert all(isinstance(outcome, ends) for outcome in outcomes)
        read = batcher.metrics.registry.get_sample_value
        await batcher.stop(10)
        assert (read("genretrieval_in_flight_rows"), read("genretrieval_queue_depth")) == (0, 0)

    asyncio.run(main())
