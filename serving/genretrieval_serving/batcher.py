"""One bounded queue in front of all models: what waits when a batch ends is the next batch.

Work is counted in rows. A row is a search with the bundle's own beam width; one with wider beams, and the second search
of a request with a bound keyword, count for more (`rows_of`). How long a row takes is measured all the time, so what
waits is known in seconds, and a request that would wait too long is refused when it comes, not when it has waited.
"""

from __future__ import annotations

import asyncio
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import structlog

from genretrieval.edits import NO_EDITS, Edits
from genretrieval.errors import DeadlineError, GenRetrievalError, OverloadedError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse, Timings
from genretrieval.retrieval import Retriever
from genretrieval_serving import tracing
from genretrieval_serving.daemon_thread import DaemonThread
from genretrieval_serving.fair_queue import Entry, FairQueue
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

# Full batches, what is left of the one that runs among them, that a request may always wait for. With fewer the graph
# would run half-empty batches: docs/decisions/0009-admission.md.
STANDING_BATCHES = 1.5
# No batch takes so many seconds: one that does will not end, as when a device hangs.
STUCK_SECONDS = 60.0
# How much of the measured time of a row the last batch is.
_LAST_BATCH = 0.1


@dataclass(eq=False, slots=True)
class _Waiting(Entry):
    retriever: Retriever
    request: RetrieveRequest
    edits: Edits
    until: float
    answer: asyncio.Future[RetrieveResponse]
    since: float
    traced: tracing.Traced | None


class Batcher:
    """Answers requests one batch at a time: whatever waits when a batch ends is the next, without delay.

    Callers take turns by rows. A request that would wait too long is refused at once. One whose caller gave up leaves
    the queue at once, and one that could not be answered before its deadline is never run. Requests of several
    retrievers share the queue, as they share the cores; a batch is of one of them.

    How long is too long: a burst may wait for `max_wait`. A queue that stands is no burst, it only makes everybody
    late, so for as long as more waits than one batch the wait that is allowed shrinks second for second, down to what
    `STANDING_BATCHES` take; while less waits it grows again in the same way.

    Attributes:
        row_seconds: what a row takes, as measured.
    """

    def __init__(
        self,
        metrics: Metrics,
        *,
        max_wait: float = 0.25,
        max_batch: int = 8,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """A batcher that takes nothing yet.

        Args:
            metrics: where rows are counted.
            max_wait: most seconds that a request of a burst waits.
            max_batch: most rows of a batch; a request of more is a batch of its own.
            clock: seconds.
        """
        self.metrics = metrics
        self.max_wait = max_wait
        self.max_batch = max_batch
        self._clock = clock
        self._queue: FairQueue[_Waiting] = FairQueue()
        self._arrived, self._idle = asyncio.Event(), asyncio.Event()
        self.row_seconds = 0.0
        self._running_rows, self._running_until = 0, 0.0
        self._running_since, self._running = math.inf, list[_Waiting]()
        self._allowed, self._looked = max_wait, 0.0
        # One thread: a second batch at the same time would only share the same cores.
        self._thread = DaemonThread("retrieve", _step_back)
        self._worker: asyncio.Task[None] | None = None
        metrics.watch_queue(self._queue.__len__, lambda: self._queue.rows + self._running_rows)

    async def start(self) -> None:
        """Take requests."""
        self._worker = asyncio.create_task(self._work(), name="batcher")

    async def warm_up(self, retriever: Retriever) -> None:
        """Run the smallest and the largest batch, so that the first request waits for nothing.

        Raises:
            GenRetrievalError: the graph cannot answer.
        """
        for size in (1, self.max_batch):
            begun = self._clock()
            outcome = await self._run(retriever, [RetrieveRequest()] * size, [NO_EDITS] * size)
            if isinstance(outcome, BaseException):
                raise _fault(outcome)
        if not self.row_seconds:
            self.row_seconds = (self._clock() - begun) / self.max_batch

    @property
    def alive(self) -> bool:
        """Whether the queue is being worked on; not by a batch that has run for `STUCK_SECONDS`."""
        if self._worker is None or self._worker.done():
            return False
        return self._clock() - self._running_since < STUCK_SECONDS

    def check_room(self, caller: str, rows: int = 1, within: float | None = None) -> None:
        """Whether a request of `caller` would be taken now.

        Raises:
            OverloadedError: it would wait too long, or until there is no time left to answer it.
        """
        now = self._clock()
        running, full = max(0.0, self._running_until - now), self.max_batch * self.row_seconds
        stands = running + self._queue.rows * self.row_seconds > full
        since = now - self._looked
        self._looked = now
        self._allowed = min(self.max_wait, max(0.0, self._allowed + (-since if stands else since)))
        ahead = self._queue.ahead(caller)
        if not ahead:
            # Nobody is served sooner by refusing it; and were the estimate wrong, only running it would tell.
            return
        wait = running + ahead * self.row_seconds
        allowed = max(self._allowed, STANDING_BATCHES * full)
        if wait > allowed:
            raise OverloadedError(
                f"{self._queue.rows} rows wait already, {wait:.2g} s of work before this request; try again later, or "
                "add replicas",
                wait,
            )
        if within is not None and wait + rows * self.row_seconds > within:
            raise OverloadedError(
                f"this request would wait {wait:.2g} s and was to be answered within {within:g} s; try again later, "
                "allow more time, or add replicas",
                wait,
            )

    async def submit(
        self,
        retriever: Retriever,
        request: RetrieveRequest,
        within: float | None = None,
        edits: Edits = NO_EDITS,
        caller: str = "",
    ) -> RetrieveResponse:
        """Answer one request.

        Args:
            retriever: what answers it.
            request: what is asked.
            within: seconds until nobody wants the answer any more.
            edits: what operators had changed for it when it came; later changes leave it alone.
            caller: the principal that asks.

        Raises:
            RequestError: the request cannot be answered as asked.
            OverloadedError: it would wait too long.
            DeadlineError: `within` passed first, or would have.
            UnavailableError: the batcher is not running, or stuck.
        """
        if not self.alive:
            raise UnavailableError(
                "the server is starting or stopping, or its graph is stuck, and takes no requests; try another replica"
            )
        retriever.check(request)
        rows = rows_of(retriever, request, edits)
        self.check_room(caller, rows, within)
        now = self._clock()
        answer: asyncio.Future[RetrieveResponse] = asyncio.get_running_loop().create_future()
        until = math.inf if within is None else now + within
        waiting = _Waiting(caller, rows, retriever, request, edits, until, answer, now, tracing.current())
        self._queue.add(waiting)
        self._idle.clear()
        self._arrived.set()
        try:
            async with asyncio.timeout(within):
                return await answer
        except TimeoutError:
            raise DeadlineError(f"no answer within the {within:g} s that the caller gave") from None
        finally:
            self._queue.remove(waiting)

    def give_up(self) -> None:
        """Tell all who wait that there will be no answer, as where the graph is stuck."""
        _give_up([*self._running, *self._queue])

    async def stop(self, grace: float) -> None:
        """Answer what is queued, for at most `grace` seconds; what is left gets `UnavailableError`."""
        if self._worker is not None and not self._worker.done():
            try:
                async with asyncio.timeout(grace):
                    await self._idle.wait()
            except TimeoutError:
                log.warning("drain_cut_short", waiting=len(self._queue), grace_seconds=grace)
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        _give_up(list(self._queue))
        self._thread.shutdown()

    async def _work(self) -> None:
        while True:
            batch = self._next_batch()
            if not batch:
                self._idle.set()
                self._arrived.clear()
                await self._arrived.wait()
                continue
            self._running = batch
            try:
                for retriever in {id(waiting.retriever): waiting.retriever for waiting in batch}.values():
                    await self._answer(retriever, [waiting for waiting in batch if waiting.retriever is retriever])
            finally:
                _give_up(batch)
                self._running = []

    def _next_batch(self) -> list[_Waiting]:
        """What waits, as far as it makes one batch; what could not be answered in time is told so."""
        batch: list[_Waiting] = []
        room: float = math.inf
        now = self._clock()
        # What is ready when the whole batch is.
        ready = now + min(self.max_batch, self._queue.rows) * self.row_seconds
        while room > 0 and (waiting := self._queue.take(room)) is not None:
            if waiting.answer.done():
                continue
            late = waiting.until < max(ready, now + waiting.rows * self.row_seconds)
            # The last one runs all the same: that costs nobody anything, and shows how long a row takes now.
            if late and (batch or self._queue):
                waiting.answer.set_exception(
                    DeadlineError("the queue left too little of the caller's time to answer, so this was not run")
                )
                continue
            batch.append(waiting)
            room = (self.max_batch if len(batch) == 1 else room) - waiting.rows
        return batch

    async def _answer(self, retriever: Retriever, batch: list[_Waiting]) -> None:
        """Run a batch and hand out the answers; if it fails, each of its requests on its own."""
        begun = self._clock()
        rows = sum(waiting.rows for waiting in batch)
        self.metrics.batch_rows.observe(rows)
        self._running_rows, self._running_until = rows, begun + rows * self.row_seconds
        self._running_since = begun
        try:
            with tracing.batch([(w.traced, w.since) for w in batch], requests=len(batch), rows=rows):
                outcomes = await self._run(retriever, [w.request for w in batch], [w.edits for w in batch])
        finally:
            self._running_rows, self._running_until = 0, 0.0
            self._running_since = math.inf
        if isinstance(outcomes, BaseException) and len(batch) > 1:
            log.warning("batch_failed", requests=len(batch), error=repr(outcomes))
            for waiting in batch:
                if not waiting.answer.done():
                    await self._answer(retriever, [waiting])
            return
        for i, waiting in enumerate(batch):
            if waiting.answer.done():
                continue
            if isinstance(outcomes, BaseException):
                waiting.answer.set_exception(_fault(outcomes))
            else:
                waiting.answer.set_result(_timed(outcomes[i], begun - waiting.since))
        took = (self._clock() - begun) / rows
        self.row_seconds += (took - self.row_seconds) * _LAST_BATCH

    async def _run(
        self, retriever: Retriever, requests: Sequence[RetrieveRequest], edits: Sequence[Edits]
    ) -> list[RetrieveResponse] | BaseException:
        """Responses, or what was raised: an error must reach its own request and end nothing else."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, tracing.carried(retriever.retrieve), requests, edits)
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - what panics in Rust is no Exception
            return error


def _step_back() -> None:
    """Leave the core to the event loop whenever it wants it: it needs little, and whoever is refused waits for it."""
    if sys.platform == "linux":  # elsewhere this is of a whole process
        os.nice(10)


def rows_of(retriever: Retriever, request: RetrieveRequest, edits: Edits) -> int:
    """The work of a request, in searches with the bundle's own beam width; at least 1."""
    bound = request.bindings != "off" and any(len(keyword.rows) for keyword in edits.bound)
    widths = math.ceil(retriever.beam_width(request) / retriever.bundle.manifest.beam_width)
    return widths * (2 if bound else 1)


def _give_up(left: Sequence[_Waiting]) -> None:
    """Tell those that have no answer yet that there will be none."""
    for waiting in left:
        if not waiting.answer.done():
            waiting.answer.set_exception(UnavailableError("the server stopped before it could answer"))


def _fault(error: BaseException) -> GenRetrievalError:
    """The error a caller sees; one that we did not foresee is logged whole and shown without its insides."""
    if isinstance(error, GenRetrievalError):
        return error
    log.error("inference_failed", exc_info=error)
    return GenRetrievalError(
        "the server failed on this request; its log says why under `inference_failed`. Please report it"
    )


def _timed(response: RetrieveResponse, queued: float) -> RetrieveResponse:
    queue_ms, inference_ms = queued * 1e3, response.timings.inference_ms
    waited = Timings(queue_ms=queue_ms, inference_ms=inference_ms, total_ms=response.timings.total_ms + queue_ms)
    return response.model_copy(update={"timings": waited})
