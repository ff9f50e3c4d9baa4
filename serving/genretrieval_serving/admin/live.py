"""What the admin API needs of the server that it runs in: its catalogue, its copy of the state, its model."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

from genretrieval.edits import Edits
from genretrieval.errors import ConflictError, SlotsExhaustedError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval.servable import Catalogue
from genretrieval_serving.admin.messages import BundleList, DeploymentStatus, TrialResult
from genretrieval_serving.admin.replica import ADMIN_STATE_STALE, Replica
from genretrieval_serving.admin.resources import AliasFields, Fields, Keyword, Kind, Resource, SlotRef
from genretrieval_serving.admin.store import Changes
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.deployment import Deployment, preferred_levels
from genretrieval_serving.rollout import Rollout, status_of

# Somebody looks at a page meanwhile.
WITHIN_SECONDS = 10.0


class Live:
    """Exists before its server is ready, and refuses until then."""

    def __init__(self) -> None:
        self._open: tuple[Batcher, Deployment, Replica] | None = None
        self._rollout: Rollout | None = None

    def open(self, batcher: Batcher, deployment: Deployment, replica: Replica, rollout: Rollout | None = None) -> None:
        """Begin, with what is served, and what follows an alias if anything does."""
        self._open, self._rollout = (batcher, deployment, replica), rollout

    def validate(self, fields: Fields) -> None:
        """Refuse what could not be applied to the catalogue.

        Raises:
            RequestError: with every problem.
            UnavailableError: the server is not ready.
        """
        for arm in self._opened()[1].arms:
            assert arm.shown.view is not None
            arm.shown.view.snapshot.validate(fields)

    def changed(self) -> None:
        """Bring a change of the store into force here, without waiting for the next poll."""
        if self._open is not None:
            self._open[2].refresh()

    def check_bundles(self, aliases: Sequence[AliasFields], *, allow_unbound: bool) -> None:
        """Refuse aliases of bundles that cannot be served, or on which the admin state cannot hold.

        Raises:
            ConflictError: a bundle is refused, or there is no folder of bundles here to look into.
            UnavailableError: the server is not ready.
        """
        self._opened()
        self._following().check(aliases, allow_unbound=allow_unbound)

    def catalogue(self) -> Catalogue:
        """The items that the primary arm answers with.

        Raises:
            UnavailableError: the server is not ready.
        """
        return self._opened()[1].primary.retriever.catalogue

    def deployment(self) -> DeploymentStatus:
        """What answers, and what should.

        Raises:
            UnavailableError: the server is not ready.
        """
        _, deployment, _ = self._opened()
        if self._rollout is not None:
            return self._rollout.status()
        return DeploymentStatus(arms=[status_of(deployment.primary, 1.0)])

    def bundles(self) -> BundleList:
        """What could be served.

        Raises:
            ConflictError: there is no folder of bundles here.
            UnavailableError: the server is not ready.
        """
        self._opened()
        return self._following().bundles()

    async def retrieve(self, request: RetrieveRequest, caller: str) -> RetrieveResponse:
        """What the primary arm answers now: the one that trials are made on, whoever a canary may answer.

        Raises:
            RequestError: the request cannot be answered.
            StaleReplicaError: the admin state has not reached the request's `min_revision`.
            DeadlineError: it takes longer than anybody looks at a page.
            UnavailableError: the server is not ready, or overloaded.
        """
        batcher, deployment, replica = self._opened()
        if request.min_revision:
            await replica.wait_for(request.min_revision)
        answering = deployment.primary.answering(request)
        response = await batcher.submit(answering.retriever, request, WITHIN_SECONDS, answering.edits, caller)
        degraded = [ADMIN_STATE_STALE] if answering.stale else []
        return response.model_copy(update={"degraded": [*response.degraded, *degraded]})

    async def test(self, kind: Kind, resource: Resource, request: RetrieveRequest, caller: str) -> TrialResult:
        """What a request returns without `resource`, and with it in place of the one that has its id.

        Raises:
            RequestError: the request cannot be answered, or the resource cannot be applied.
            SlotsExhaustedError: no slot is free for a keyword that holds none yet.
            UnavailableError: the server is not ready, or overloaded.
        """
        batcher, deployment, replica = self._opened()
        retriever, view = deployment.primary.shown
        assert view is not None
        snapshot = view.snapshot
        snapshot.validate(resource)
        if isinstance(resource, Keyword) and resource.binding is not None:
            resource = resource.model_copy(update={"slot": await self._slot_for(resource, retriever, replica)})
        now = datetime.now(UTC)
        absent = resource.model_copy(update={"deleted_at": now})

        def edits_with(tried: Resource) -> Edits:
            return snapshot.updated(Changes(snapshot.revision, [(kind, tried)])).edits(request, now)

        without, with_ = await asyncio.to_thread(lambda: (edits_with(absent), edits_with(resource)))
        before = await batcher.submit(retriever, request, WITHIN_SECONDS, without, caller)
        after = await batcher.submit(retriever, request, WITHIN_SECONDS, with_, caller)
        return TrialResult(before=before, after=after, missing_ids=snapshot.missing(resource))

    async def _slot_for(self, keyword: Keyword, retriever: Retriever, replica: Replica) -> SlotRef:
        """The slot that a keyword holds, or the one that it would get."""
        held = replica.get(Kind.KEYWORDS, keyword.id)
        if isinstance(held, Keyword) and held.slot is not None:
            return held.slot
        free = await asyncio.to_thread(replica.store.free_slots)
        if not free:
            raise SlotsExhaustedError("no reserved slot is free to try the keyword on; unbind another one")
        level = preferred_levels(retriever).get(keyword.type)
        return next((slot for slot in free if slot.level == level), free[0])

    def _following(self) -> Rollout:
        if self._rollout is None:
            raise ConflictError(
                "this server serves one bundle and follows no alias; ask one that has --bundles and --alias"
            )
        return self._rollout

    def _opened(self) -> tuple[Batcher, Deployment, Replica]:
        if self._open is None:
            raise UnavailableError("the bundle is still being loaded, and changes are checked against it; try again")
        return self._open
