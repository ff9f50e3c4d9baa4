"""What the server does, whichever way it is asked."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib.metadata import version

from genretrieval.edits import NO_EDITS, Edits
from genretrieval.errors import DeadlineError, GenRetrievalError, RequestError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.replica import ADMIN_STATE_STALE, Replica
from genretrieval_serving.engine import Engine
from genretrieval_serving.messages import Limits, ServerInfo
from genretrieval_serving.observability import Metrics


class State(Enum):
    """Where a server is in its life; only a `READY` one should be sent traffic."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class RetrievalService:
    """Retrieval for both transports. Exists before its engine, so that probes answer while a bundle loads."""

    def __init__(self, metrics: Metrics, max_batch: int = 32) -> None:
        """A service without an engine; `max_batch` is the most requests of one batch request."""
        self.metrics = metrics
        self.max_batch = max_batch
        self.state = State.LOADING
        self._engine: Engine | None = None
        self._replica: Replica | None = None

    def open(self, engine: Engine, replica: Replica | None = None) -> None:
        """Become ready, with a started engine and, where there is admin state, a replica that has caught up."""
        manifest = engine.retriever.bundle.manifest
        self.metrics.model_info.labels(manifest.version, manifest.uuid).set(1)
        self._engine, self._replica, self.state = engine, replica, State.READY

    @property
    def alive(self) -> bool:
        """Whether restarting the process could not help."""
        return self._engine is None or self._engine.alive

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            UnavailableError: the bundle is still being loaded.
        """
        if self._engine is None:
            raise UnavailableError("the bundle is still being loaded; /readyz tells when it is")
        return self._engine

    async def retrieve(self, request: RetrieveRequest, within: float | None = None) -> RetrieveResponse:
        """Answer one request within `within` seconds, with the admin state that is in force when it begins.

        Raises:
            StaleReplicaError: the admin state has not reached the request's `min_revision`.
            GenRetrievalError: what `Engine.submit` raises.
        """
        engine = self.engine
        with self._counting():
            if request.min_revision:
                begun = time.perf_counter()
                await self._caught_up(request.min_revision, within)
                within = None if within is None else max(0.0, within - (time.perf_counter() - begun))
            edits, stale = self._edits(request)
            response = await engine.submit(request, within, edits)
        if stale:
            response = response.model_copy(update={"degraded": [*response.degraded, ADMIN_STATE_STALE]})
        self.metrics.answered(response)
        return response

    async def batch_retrieve(
        self, requests: Sequence[RetrieveRequest], within: float | None = None
    ) -> list[RetrieveResponse | GenRetrievalError]:
        """Answer every request or say what is wrong with it, in their order.

        Raises:
            RequestError: there are more than `max_batch` requests.
        """
        if len(requests) > self.max_batch:
            raise RequestError(
                f"requests: {len(requests)} in one batch, this server takes up to {self.max_batch}; split it"
            )
        calls = (self.retrieve(request, within) for request in requests)
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
        manifest = self.engine.retriever.bundle.manifest
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

    async def _caught_up(self, revision: int, within: float | None) -> None:
        if self._replica is None:
            raise StaleReplicaError(
                f"min_revision: {revision} was asked for and this server has no admin state; leave it out, or serve "
                "with an admin store"
            )
        await self._replica.wait_for(revision, within)

    def _edits(self, request: RetrieveRequest) -> tuple[Edits, bool]:
        """What is in force for a request, and whether that may be out of date."""
        if self._replica is None:
            return NO_EDITS, False
        return self._replica.edits(request), self._replica.stale

    @contextmanager
    def _counting(self) -> Iterator[None]:
        with self.metrics.in_flight.track_inprogress():
            try:
                yield
            except (UnavailableError, DeadlineError, StaleReplicaError) as error:
                self.metrics.rejected.labels(error.reason).inc()
                raise
