"""Runs the graph: ONNX Runtime behind one bounded queue that batches what is waiting."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
import structlog
from numpy.typing import NDArray
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidGraph,
    InvalidProtobuf,
    NotImplemented,
    RuntimeException,
)

from genretrieval.edits import NO_EDITS, Edits
from genretrieval.errors import (
    BundleError,
    DeadlineError,
    GenRetrievalError,
    InvalidInputError,
    OverloadedError,
    UnavailableError,
)
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Leaves, Retriever
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

OUTPUTS = [name for name in Leaves._fields if name not in Leaves._field_defaults]
Device = Literal["cpu", "cuda"]


def usable_cpus(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Whole CPUs this process may use by its affinity and its container's quota.

    ONNX Runtime by itself knows nothing of the quota and would start a thread for every core of the machine.

    Args:
        cgroup: where control groups are mounted; version 2 and version 1 are read.
    """
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if (limit := cgroup / "cpu.max").is_file():
        quota, period = limit.read_text("ascii").split()
    elif (limit := cgroup / "cpu" / "cpu.cfs_quota_us").is_file():
        quota, period = limit.read_text("ascii"), limit.with_name("cpu.cfs_period_us").read_text("ascii")
    else:
        return cpus
    # No quota is "max" in version 2 and -1 in version 1.
    if quota.strip() == "max" or int(quota) < 0:
        return cpus
    return max(1, min(cpus, int(quota) // int(period)))


class OnnxBackend:
    """The bundle's graph in one ONNX Runtime session; `run` may be called from several threads."""

    def __init__(self, path: Path, threads: int | None = None, device: Device = "cpu") -> None:
        """Load the graph.

        Args:
            path: ``retriever.onnx``.
            threads: threads of one run; by default the CPUs this process may use.
            device: ``cuda`` needs the extra ``serve-gpu``.

        Raises:
            BundleError: the graph cannot be loaded, or is no retrieval graph.
            InvalidInputError: ``cuda`` was asked for and is not there.
        """
        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device]
        if provider not in ort.get_available_providers():
            raise InvalidInputError(
                f"this onnxruntime has no {provider}; install the extra `serve-gpu` in place of `serve`, or use the CPU"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or usable_cpus()
        options.inter_op_num_threads = 1
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        # Idle threads that spin would take the CPU from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Masked softmax weights end as denormals, which slow some CPUs threefold: docs/decisions/0002-decoding.md.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=[provider])
        except (Fail, InvalidGraph, InvalidProtobuf, NotImplemented, RuntimeException) as error:
            raise BundleError(
                f"{path} cannot be loaded by onnxruntime {ort.__version__}: {error}. "
                "If the manifest's `minimum_onnxruntime` is newer, upgrade; else export the bundle again"
            ) from error
        # Where CUDA does not start, onnxruntime would go on with the CPU and say so in a warning only.
        if self.session.get_providers()[0] != provider:
            raise InvalidInputError(f"onnxruntime cannot start {provider}; check the driver, or use the CPU")
        given = {output.name for output in self.session.get_outputs()}
        self.outputs = [name for name in Leaves._fields if name in given]
        if missing := set(OUTPUTS) - given:
            raise BundleError(f"{path} is no retrieval graph: it lacks the outputs {', '.join(sorted(missing))}")

    def run(self, inputs: dict[str, NDArray[Any]]) -> Leaves:
        """Run one batch."""
        leaves, *scores = self.session.run(self.outputs, inputs)
        return Leaves(leaves, *(np.asarray(part, np.float32) for part in scores))


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: RetrieveRequest
    edits: Edits
    answer: asyncio.Future[RetrieveResponse]
    since: float


class Engine:
    """Answers requests one batch at a time: whatever waits when a batch ends is the next, without delay.

    A full queue rejects at once. A request whose caller gave up, or whose deadline passed, is never run.
    """

    def __init__(self, retriever: Retriever, metrics: Metrics, *, max_queue: int = 256, max_batch: int = 32) -> None:
        self.retriever = retriever
        self.metrics = metrics
        self.max_batch = max_batch
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_queue)
        # One thread: a second batch at the same time would only share the same cores.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieve")
        self._worker: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Warm up with the smallest and the largest batch, then take requests."""
        for size in (1, self.max_batch):
            await self._run([RetrieveRequest()] * size, [NO_EDITS] * size)
        self.metrics.watch_queue(self._queue.qsize)
        self._worker = asyncio.create_task(self._work(), name="engine")

    @property
    def alive(self) -> bool:
        """Whether the queue is being worked on."""
        return self._worker is not None and not self._worker.done()

    async def submit(
        self, request: RetrieveRequest, within: float | None = None, edits: Edits = NO_EDITS
    ) -> RetrieveResponse:
        """Answer one request.

        Args:
            request: what is asked.
            within: seconds until nobody wants the answer any more.
            edits: what operators had changed for it when it came; later changes leave it alone.

        Raises:
            RequestError: the request cannot be answered as asked.
            OverloadedError: the queue is full.
            DeadlineError: `within` passed first.
            UnavailableError: the engine is not running.
        """
        if not self.alive:
            raise UnavailableError("the server is starting or stopping and takes no requests; try another replica")
        self.retriever.check(request)
        waiting = _Waiting(request, edits, asyncio.get_running_loop().create_future(), time.perf_counter())
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
                if batch := [waiting for waiting in taken if not waiting.answer.done()]:
                    await self._answer(batch)
            finally:
                _give_up(taken)
                for _ in taken:
                    self._queue.task_done()

    async def _answer(self, batch: list[_Waiting]) -> None:
        """Run a batch and hand out the answers; if it fails, each of its requests on its own."""
        begun = time.perf_counter()
        self.metrics.batch_size.observe(len(batch))
        outcomes = await self._run([waiting.request for waiting in batch], [waiting.edits for waiting in batch])
        if isinstance(outcomes, BaseException) and len(batch) > 1:
            log.warning("batch_failed", requests=len(batch), error=repr(outcomes))
            for waiting in batch:
                await self._answer([waiting])
            return
        for i, waiting in enumerate(batch):
            if waiting.answer.done():
                continue
            if isinstance(outcomes, BaseException):
                waiting.answer.set_exception(_fault(outcomes))
            else:
                waiting.answer.set_result(_timed(outcomes[i], begun - waiting.since))

    async def _run(
        self, requests: Sequence[RetrieveRequest], edits: Sequence[Edits]
    ) -> list[RetrieveResponse] | BaseException:
        """Responses, or what was raised: an error must reach its own request and end nothing else."""
        loop = asyncio.get_running_loop()
        call = loop.run_in_executor(self._thread, self.retriever.retrieve, requests, edits)
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
