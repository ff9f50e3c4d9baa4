"""What the server does, whichever way it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version

from genretrieval.errors import DeadlineError, GenRetrievalError, RequestError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.auth import ANONYMOUS, Principal
from genretrieval_serving.admin.replica import ADMIN_STATE_STALE
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.deployment import Arm, Deployment
from genretrieval_serving.messages import Limits, ServerInfo
from genretrieval_serving.observability import Metrics


class State(Enum):
    """Where a server is in its life; only a `READY` one should be sent traffic."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class RetrievalService:
    """Retrieval for both transports. Exists before anything is loaded, so that probes answer meanwhile."""

    def __init__(self, metrics: Metrics, max_batch: int = 32) -> None:
        """A service without a model; `max_batch` is the most requests of one batch request."""
        self.metrics = metrics
        self.max_batch = max_batch
        self.state = State.LOADING
        self._open: tuple[Batcher, Deployment] | None = None

    def open(self, batcher: Batcher, deployment: Deployment) -> None:
        """Become ready, with a started batcher and what is served."""
        manifest = deployment.primary.manifest
        self.metrics.bundle_info.labels(deployment.primary.name, manifest.version, manifest.uuid).set(1)
        self._open, self.state = (batcher, deployment), State.READY

    @property
    def alive(self) -> bool:
        """Whether restarting the process could not help."""
        return self._open is None or self._open[0].alive

    @property
    def deployment(self) -> Deployment:
        """What is served.

        Raises:
            UnavailableError: the bundle is still being loaded.
        """
        return self._opened()[1]

    async def retrieve(
        self, request: RetrieveRequest, within: float | None = None, caller: Principal = ANONYMOUS
    ) -> RetrieveResponse:
        """Answer one request within `within` seconds, with what is served and in force when it begins.

        Raises:
            StaleReplicaError: the admin state has not reached the request's `min_revision`.
            GenRetrievalError: what `Batcher.submit` raises.
        """
        batcher, deployment = self._opened()
        with self._counting():
            arm = deployment.arm_for(request)
            if request.min_revision:
                begun = time.perf_counter()
                await _caught_up(arm, request.min_revision, within)
                within = None if within is None else max(0.0, within - (time.perf_counter() - begun))
            answering = arm.answering(request)
            response = await batcher.submit(answering.retriever, request, within, answering.edits, caller.name)
        if answering.stale:
            response = response.model_copy(update={"degraded": [*response.degraded, ADMIN_STATE_STALE]})
        self.metrics.answered(response, arm.name)
        return response

    async def batch_retrieve(
        self, requests: Sequence[RetrieveRequest], within: float | None = None, caller: Principal = ANONYMOUS
    ) -> list[RetrieveResponse | GenRetrievalError]:
        """Answer every request or say what is wrong with it, in their order.

        Raises:
            RequestError: there are more than `max_batch` requests.
        """
        if len(requests) > self.max_batch:
            raise RequestError(
                f"requests: {len(requests)} in one batch, this server takes up to {self.max_batch}; split it"
            )
        calls = (self.retrieve(request, within, caller) for request in requests)
        outcomes: list[RetrieveResponse | GenRetrievalError] = []
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, GenRetrievalError):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    def info(self) -> ServerInfo:
        """What is being served.

        Raises:
            UnavailableError: the bundle is still being loaded.
        """
        manifest = self.deployment.primary.manifest
        return ServerInfo(
            server_version=version("genretrieval"),
            bundle_version=manifest.version,
            bundle_uuid=manifest.uuid,
            n_items=manifest.n_items,
            default_beam_width=manifest.beam_width,
            max_history=manifest.max_history,
            max_past=manifest.max_past,
            scenarios=list(manifest.scenarios),
            reads_queries=manifest.reads_queries,
            limits=Limits(max_batch_requests=self.max_batch),
        )

    def _opened(self) -> tuple[Batcher, Deployment]:
        if self._open is None:
            raise UnavailableError("the bundle is still being loaded; /readyz tells when it is")
        return self._open

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with self.metrics.in_flight.track_inprogress():
            try:
                yield
            except (UnavailableError, DeadlineError, StaleReplicaError) as error:
                self.metrics.rejected.labels(error.reason).inc()
                raise


async def _caught_up(arm: Arm, revision: int, within: float | None) -> None:
    if arm.replica is None:
        raise StaleReplicaError(
            f"min_revision: {revision} was asked for and this server has no admin state; leave it out, or serve "
            "with an admin store"
        )
    await arm.replica.wait_for(revision, within)
