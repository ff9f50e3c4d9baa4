"""One bounded queue in front of all models: what waits when a batch ends is the next batch."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from genretrieval.edits import NO_EDITS, Edits
from genretrieval.errors import DeadlineError, GenRetrievalError, OverloadedError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    retriever: Retriever
    request: RetrieveRequest
    edits: Edits
    caller: str
    answer: asyncio.Future[RetrieveResponse]
    since: float


class Batcher:
    """Answers requests one batch at a time: whatever waits when a batch ends is the next, without delay.

    A full queue rejects at once. A request whose caller gave up, or whose deadline passed, is never run. Requests of
    several retrievers share the queue, as they share the cores; a batch is of one of them.
    """

    def __init__(self, metrics: Metrics, *, max_queue: int = 256, max_batch: int = 32) -> None:
        self.metrics = metrics
        self.max_batch = max_batch
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_queue)
        # One thread: a second batch at the same time would only share the same cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        self._worker: asyncio.Task[None] | None = None
        metrics.watch_queue(self._queue.qsize)

    async def start(self) -> None:
        """Take requests."""
        self._worker = asyncio.create_task(self._work(), name="batcher")

    async def warm_up(self, retriever: Retriever) -> None:
        """Run the smallest and the largest batch, so that the first request waits for nothing.

        Raises:
            GenRetrievalError: the graph cannot answer.
        """
        for size in (1, self.max_batch):
            outcome = await self._run(retriever, [RetrieveRequest()] * size, [NO_EDITS] * size)
            if isinstance(outcome, BaseException):
                raise _fault(outcome)

    @property
    def alive(self) -> bool:
        """Whether the queue is being worked on."""
        return self._worker is not None and not self._worker.done()

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
            OverloadedError: the queue is full.
            DeadlineError: `within` passed first.
            UnavailableError: the batcher is not running.
        """
        if not self.alive:
            raise UnavailableError("the server is starting or stopping and takes no requests; try another replica")
        retriever.check(request)
        answer: asyncio.Future[RetrieveResponse] = asyncio.get_running_loop().create_future()
        waiting = _Waiting(retriever, request, edits, caller, answer, time.perf_counter())
        try:
            # Leaving this block early cancels the future, which takes the request off the queue.
            async with asyncio.timeout(within):
                self._queue.put_nowait(waiting)
                return await waiting.answer
        except asyncio.QueueFull:
            raise OverloadedError(
                f"{self._queue.maxsize} requests are waiting already; try again later, or add replicas"
            ) from None
        except TimeoutError:
            raise DeadlineError(f"no answer within the {within:g} s that the caller gave") from None

    async def stop(self, grace: float) -> None:
        """Answer what is queued, for at most `grace` seconds; what is left gets `UnavailableError`."""
        try:
            async with asyncio.timeout(grace):
                await self._queue.join()
        except TimeoutError:
            log.warning("drain_cut_short", waiting=self._queue.qsize(), grace_seconds=grace)
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)
        _give_up([self._queue.get_nowait() for _ in range(self._queue.qsize())])
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        while True:
            taken = [await self._queue.get()]
            while len(taken) < self.max_batch and not self._queue.empty():
                taken.append(self._queue.get_nowait())
            try:
                batch = [waiting for waiting in taken if not waiting.answer.done()]
                for retriever in {id(waiting.retriever): waiting.retriever for waiting in batch}.values():
                    await self._answer(retriever, [waiting for waiting in batch if waiting.retriever is retriever])
            finally:
                _give_up(taken)
                for _ in taken:
                    self._queue.task_done()

    async def _answer(self, retriever: Retriever, batch: list[_Waiting]) -> None:
        """Run a batch and hand out the answers; if it fails, each of its requests on its own."""
        begun = time.perf_counter()
        self.metrics.batch_size.observe(len(batch))
        outcomes = await self._run(retriever, [waiting.request for waiting in batch], [w.edits for w in batch])
        if isinstance(outcomes, BaseException) and len(batch) > 1:
            log.warning("batch_failed", requests=len(batch), error=repr(outcomes))
            for waiting in batch:
                await self._answer(retriever, [waiting])
            return
        for i, waiting in enumerate(batch):
            if waiting.answer.done():
                continue
            if isinstance(outcomes, BaseException):
                waiting.answer.set_exception(_fault(outcomes))
            else:
                waiting.answer.set_result(_timed(outcomes[i], begun - waiting.since))

    async def _run(
        self, retriever: Retriever, requests: Sequence[RetrieveRequest], edits: Sequence[Edits]
    ) -> list[RetrieveResponse] | BaseException:
        """Responses, or what was raised: an error must reach its own request and end nothing else."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._thread, retriever.retrieve, requests, edits)
        (outcome,) = await asyncio.gather(call, return_exceptions=True)
        return outcome


def _give_up(left: list[_Waiting]) -> None:
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
    timings = response.timings
    queue_ms = queued * 1e3
    waited = timings.model_copy(update={"queue_ms": queue_ms, "total_ms": timings.total_ms + queue_ms})
    return response.model_copy(update={"timings": waited})
