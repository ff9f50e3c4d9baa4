"""What the server does, whichever way it is asked."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from http import HTTPStatus
from importlib.metadata import version

from genretrieval.errors import DeadlineError, GenRetrievalError, RequestError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.auth import ANONYMOUS, Principal
from genretrieval_serving.admin.replica import ADMIN_STATE_STALE
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.deployment import Answering, Arm, Deployment
from genretrieval_serving.history import HISTORY_UNAVAILABLE, Completed, Histories, by_user
from genretrieval_serving.messages import (
    MAX_BATCH_REQUESTS,
    FeedbackEvent,
    Limits,
    RecordEventsResponse,
    ServerInfo,
)
from genretrieval_serving.observability import Metrics
from genretrieval_serving.rate_limit import RateLimiter
from genretrieval_serving.served_log import Answered, ServedLog


class State(Enum):
    """Where a server is in its life; only a `READY` one should be sent traffic."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


class RetrievalService:
    """Retrieval for both transports. Exists before anything is loaded, so that probes answer meanwhile."""

    def __init__(
        self,
        metrics: Metrics,
        histories: Histories | None = None,
        served_log: ServedLog | None = None,
        rate_limiter: RateLimiter | None = None,
    ) -> None:
        """A service without a model.

        Args:
            metrics: of the server.
            histories: complete the requests of users, where the server has a store of them.
            served_log: takes answers and events, where the server keeps them.
            rate_limiter: bounds what each caller may ask, where the server does that.
        """
        self.metrics = metrics
        self.histories = histories
        self.served_log = served_log
        self.rate_limiter = rate_limiter
        self.state = State.LOADING
        self._open: tuple[Batcher, Deployment] | None = None

    def open(self, batcher: Batcher, deployment: Deployment) -> None:
        """Become ready, with a started batcher and what is served."""
        self.metrics.watch_arms(lambda: deployment.split.named)
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

    def check_room(self, caller: Principal) -> None:
        """Whether a request of `caller` would be taken now; so a transport need not read one that would not.

        Raises:
            OverloadedError: it would wait too long.
            UnavailableError: the bundle is still being loaded.
        """
        try:
            self._opened()[0].check_room(caller.name)
        except UnavailableError as error:
            self.metrics.rejected.labels(error.reason).inc()
            raise

    async def retrieve(
        self, request: RetrieveRequest, within: float | None = None, caller: Principal = ANONYMOUS
    ) -> RetrieveResponse:
        """Answer one request within `within` seconds, with what is served and in force when it begins.

        Raises:
            RateLimitedError: `caller` has made too many.
            StaleReplicaError: the admin state has not reached the request's `min_revision`.
            GenRetrievalError: what `Batcher.submit` raises.
        """
        batcher, deployment = self._opened()
        came, deadline = time.time(), _Deadline(within)
        with self._counting():
            if self.rate_limiter is not None:
                self.rate_limiter.count(caller.name)
            if request.min_revision:
                await _caught_up(deployment.primary, request.min_revision, deadline.left())
            completed = await self._completed(request, deadline.left())
            # After all that waits: an arm that was given up meanwhile has the admin state of then.
            name, arm = deployment.arm_for(request)
            answering = arm.answering(completed.request)
            try:
                response = await batcher.submit(
                    answering.retriever, completed.request, deadline.left(), answering.edits, caller.name
                )
            except GenRetrievalError as error:
                if error.http_status == HTTPStatus.INTERNAL_SERVER_ERROR:
                    self.metrics.failed.labels(name).inc()
                raise
        response = _told(response, completed, answering)
        self.metrics.answered(response, name)
        if self.served_log is not None:
            self.served_log.answered(Answered(came, completed.request, response, answering, name))
        return response

    async def _completed(self, request: RetrieveRequest, within: float | None) -> Completed:
        """With what is stored of its user, if the server has that."""
        if self.histories is None:
            return Completed(request, request)
        return await self.histories.complete(request, within)

    async def record_events(
        self, events: Sequence[FeedbackEvent], caller: Principal = ANONYMOUS
    ) -> RecordEventsResponse:
        """Log events, and let them join the histories of their users, whose next requests see them.

        Raises:
            RateLimitedError: `caller` has sent too many calls with events.
            RequestError: the server keeps no events, or none without a user.
            OverloadedError: they cannot be written fast enough; none of them was taken.
            UnavailableError: the bundle is still being loaded.
        """
        arms, now = self.deployment.arms, time.time()
        with self._counting():
            if self.rate_limiter is not None:
                self.rate_limiter.count(caller.name, "calls with events")
            if self.served_log is not None:
                self.served_log.record(events, now)
            else:
                _refuse_without_log(events, histories=self.histories is not None)
        self.metrics.events.labels("accepted").inc(len(events))
        degraded = []
        if self.histories is not None:
            exposures = any(arm.manifest.max_past for arm in arms)
            if not await self.histories.append(by_user(events, int(now), exposures=exposures)):
                degraded.append(HISTORY_UNAVAILABLE)
        return RecordEventsResponse(accepted=len(events), degraded=degraded)

    async def batch_retrieve(
        self, requests: Sequence[RetrieveRequest], within: float | None = None, caller: Principal = ANONYMOUS
    ) -> list[RetrieveResponse | GenRetrievalError]:
        """Answer every request or say what is wrong with it, in their order.

        Raises:
            RequestError: there are more than `MAX_BATCH_REQUESTS`.
        """
        if len(requests) > MAX_BATCH_REQUESTS:
            raise RequestError(
                f"requests: {len(requests)} in one batch, this server takes up to {MAX_BATCH_REQUESTS}; split it"
            )
        batcher, _ = self._opened()
        # As many at once as one run of the graph takes: more would only wait before one another.
        turn, deadline = asyncio.Semaphore(batcher.max_batch), _Deadline(within)

        async def answer(request: RetrieveRequest) -> RetrieveResponse:
            async with turn:
                return await self.retrieve(request, deadline.left(), caller)

        outcomes: list[RetrieveResponse | GenRetrievalError] = []
        for outcome in await asyncio.gather(*map(answer, requests), return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, GenRetrievalError):
                raise outcome
            outcomes.append(outcome)
        return outcomes

    async def close(self, grace: float) -> None:
        """Write what is to be logged, for `grace` seconds at most, and give connections back.

        Nothing is being answered any more.
        """
        if self.served_log is not None:
            await asyncio.to_thread(self.served_log.close, grace)
        if self.histories is not None:
            await self.histories.close()

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
            limits=Limits(),
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


class _Deadline:
    """How much is left of the seconds that a caller gave."""

    def __init__(self, within: float | None) -> None:
        self._until = None if within is None else time.perf_counter() + within

    def left(self) -> float | None:
        return None if self._until is None else max(0.0, self._until - time.perf_counter())


def _told(response: RetrieveResponse, completed: Completed, answering: Answering) -> RetrieveResponse:
    """The response with what the server knows of it, under a token of its own, which says nothing of the request."""
    manifest = answering.retriever.bundle.manifest
    response = completed.told(response, manifest.max_history + manifest.max_past)
    degraded = [*response.degraded, ADMIN_STATE_STALE] if answering.stale else response.degraded
    token = f"{manifest.version}.{response.revision}.{secrets.token_urlsafe(12)}"
    return response.model_copy(update={"degraded": degraded, "attribution_token": token})


def _refuse_without_log(events: Sequence[FeedbackEvent], *, histories: bool) -> None:
    if not histories:
        raise RequestError("this server keeps no events; it needs `serve --log-folder`, or `--histories`")
    for place, event in enumerate(events):
        if not event.user_id:
            raise RequestError(
                f"events.{place}: there is no user_id, and this server keeps histories of users and no log "
                "(`serve --log-folder`): the event would be lost"
            )


async def _caught_up(arm: Arm, revision: int, within: float | None) -> None:
    if arm.replica is None:
        raise StaleReplicaError(
            f"min_revision: {revision} was asked for and this server has no admin state; leave it out, or serve "
            "with an admin store"
        )
    await arm.replica.wait_for(revision, within)
