"""What the admin API needs of the server that it runs in: its catalogue, its copy of the state, its model."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

from genretrieval.catalogue import reserved_paths
from genretrieval.edits import Edits
from genretrieval.errors import SlotsExhaustedError, UnavailableError
from genretrieval.keywords import AttributeType
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_serving.admin.messages import TrialResult
from genretrieval_serving.admin.replica import Replica
from genretrieval_serving.admin.resources import Fields, Keyword, Kind, Resource, SlotRef
from genretrieval_serving.admin.store import Changes
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.deployment import Deployment


class Live:
    """Exists before its server is ready, and refuses until then."""

    def __init__(self) -> None:
        self._open: tuple[Batcher, Deployment, Replica] | None = None

    def open(self, batcher: Batcher, deployment: Deployment, replica: Replica) -> None:
        """Begin, with what is served."""
        self._open = batcher, deployment, replica

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

    async def test(self, kind: Kind, resource: Resource, request: RetrieveRequest) -> TrialResult:
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
        before = await batcher.submit(retriever, request, edits=without)
        after = await batcher.submit(retriever, request, edits=with_)
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

    def _opened(self) -> tuple[Batcher, Deployment, Replica]:
        if self._open is None:
            raise UnavailableError("the bundle is still being loaded, and changes are checked against it; try again")
        return self._open


def reserved_slots(retriever: Retriever) -> list[SlotRef]:
    """The slots that a bundle keeps for bindings."""
    manifest = retriever.bundle.manifest
    paths = reserved_paths(manifest.codebook_sizes, manifest.reserved_slots)
    return [SlotRef(level=int(path.argmax()), code=int(path.max())) for path in paths]


def preferred_levels(retriever: Retriever) -> dict[AttributeType, int]:
    """The level whose keywords are of a type; a new one of that type is bound there first."""
    codebook = retriever.features.keywords
    groups = codebook.groups if codebook else ()
    return {type_: level for level, group in enumerate(groups) for type_ in group}
