"""What is served: the bundle that takes the requests, and another one that may take a share of them."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

import structlog

from genretrieval.bundle import Manifest
from genretrieval.catalogue import reserved_paths
from genretrieval.edits import NO_EDITS, Edits
from genretrieval.keywords import AttributeType
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval.servable import Catalogue
from genretrieval_serving.admin.replica import Replica, View
from genretrieval_serving.admin.resources import SlotRef
from genretrieval_serving.admin.snapshot import Items

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answering:
    """What answers one request, from its beginning to its end.

    Attributes:
        retriever: the model, and the catalogue as it was when the request came.
        edits: what operators had changed for the request on that catalogue.
        stale: whether the admin state may be older than a response should leave unsaid.
    """

    retriever: Retriever
    edits: Edits
    stale: bool


class Shown(NamedTuple):
    """A model on one state of its catalogue, and the admin state on the same; None for a server without."""

    retriever: Retriever
    view: View | None


class Arm:
    """A bundle that takes requests: its model, its catalogue as it is now, and the admin state on that.

    Attributes:
        name: ``primary`` or ``canary``; ``loaded`` before it is one of them.
        since: when it came to be that.
        replica: admin state; None for a server without.
        shown: what answers now; replaced whole.
    """

    def __init__(
        self,
        name: str,
        retriever: Retriever,
        replica: Replica | None = None,
        *,
        allow_unbound: bool = True,
        prepare_first: bool = False,
    ) -> None:
        """Find the items of all bindings and rules on the bundle's catalogue. Takes a while; not for the loop.

        Args:
            name: ``primary`` or ``canary``.
            retriever: the model.
            replica: admin state; None for a server without.
            allow_unbound: leave out bindings and rules that cannot hold on the bundle.
            prepare_first: make text selectors quick before the arm is there, not while it answers. Where others answer
                meanwhile, their admin state goes on being followed; it would wait at the first new text selector.

        Raises:
            BundleError: some cannot, and `allow_unbound` does not leave them out.
        """
        self.name, self.since = name, datetime.now(UTC)
        self.replica = replica
        view = None
        if replica is not None:
            items = Items(retriever.catalogue, retriever.bundle.manifest.reserved_slots)
            if prepare_first:
                _prepare(items)
            view = replica.view(items, allow_unbound=allow_unbound)
            if not prepare_first:
                threading.Thread(target=_prepare, args=(items,), name="admin-texts", daemon=True).start()
        self.shown = Shown(retriever, view)
        self._closed = False
        self._showing = threading.Lock()

    @property
    def retriever(self) -> Retriever:
        """The model on the catalogue as it is now."""
        return self.shown.retriever

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""
        return self.retriever.bundle.manifest

    def show(self, catalogue: Catalogue) -> None:
        """Serve a new state of the catalogue; requests that have begun keep the one they began with. Not for the loop.

        Args:
            catalogue: of this arm's bundle, see `Catalogue.updated`.
        """
        with self._showing:
            if self._closed:
                return
            before = self.shown
            # The view last: it is kept up to date from when it exists, so nothing may fail between that and its use.
            retriever = before.retriever.on(catalogue)
            self.shown = Shown(retriever, None if before.view is None else before.view.on(catalogue))
            if before.view is not None:
                before.view.drop()

    def close(self) -> None:
        """Take no new state of catalogue or admin; requests that have begun are answered all the same."""
        with self._showing:
            self._closed = True
            if self.shown.view is not None:
                self.shown.view.drop()

    def answering(self, request: RetrieveRequest) -> Answering:
        """What answers a request that comes now."""
        shown = self.shown
        if shown.view is None:
            return Answering(shown.retriever, NO_EDITS, stale=False)
        return Answering(shown.retriever, shown.view.edits(request), shown.view.stale)


class Split(NamedTuple):
    """Arms, and the share of the users that the canary answers."""

    primary: Arm
    canary: Arm | None = None
    share: float = 0.0

    @property
    def named(self) -> dict[str, Arm]:
        """Arms by what they are here; `Arm.name` may already say what one is to become."""
        return {"primary": self.primary} | ({} if self.canary is None else {"canary": self.canary})


class Deployment:
    """The arms of a server.

    Attributes:
        split: replaced whole.
    """

    def __init__(self, primary: Arm) -> None:
        """One arm that answers everybody."""
        self.become(Split(primary))

    @property
    def primary(self) -> Arm:
        """The arm that answers all that no canary does."""
        return self.split.primary

    @property
    def arms(self) -> list[Arm]:
        """All that take requests."""
        return list(self.split.named.values())

    def become(self, split: Split) -> None:
        """From now on requests go to these arms; those that have begun stay where they are."""
        for name, arm in (("primary", split.primary), ("canary", split.canary)):
            if arm is not None and arm.name != name:
                arm.name, arm.since = name, datetime.now(UTC)
        self.split = split

    def arm_for(self, request: RetrieveRequest) -> tuple[str, Arm]:
        """The arm that answers a request, and what it is now; of one user always the same, on all replicas.

        Whoever a share takes in, a larger one does, too. Another canary takes in others.
        """
        primary, canary, share = self.split
        if canary is None:
            return "primary", primary
        who = request.user_id or request.model_dump_json()
        salted = f"{canary.manifest.uuid} {who}".encode("utf-8", "surrogatepass")
        place = int.from_bytes(hashlib.blake2b(salted, digest_size=8).digest(), "big") / 2**64
        return ("canary", canary) if place < share else ("primary", primary)


def reserved_slots(manifest: Manifest) -> list[SlotRef]:
    """The slots that a bundle keeps for bindings."""
    paths = reserved_paths(manifest.codebook_sizes, manifest.reserved_slots)
    return [SlotRef(level=int(path.argmax()), code=int(path.max())) for path in paths]


def preferred_levels(retriever: Retriever) -> dict[AttributeType, int]:
    """The level whose keywords are of a type; a new one of that type is bound there first."""
    codebook = retriever.features.keywords
    groups = codebook.groups if codebook else ()
    return {type_: level for level, group in enumerate(groups) for type_ in group}


def _prepare(items: Items) -> None:
    """Make text selectors quick; the first would wait for this, and a large catalogue takes a minute."""
    begun = time.monotonic()
    items.prepare()
    log.info("admin_text_prepared", seconds=round(time.monotonic() - begun, 3))
