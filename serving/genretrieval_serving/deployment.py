"""What is served: the bundle that takes the requests, and another one that may take a share of them."""

from __future__ import annotations

from dataclasses import dataclass

from genretrieval.bundle import Manifest
from genretrieval.edits import NO_EDITS, Edits
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval.servable import Catalogue
from genretrieval_serving.admin.replica import Replica


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


class Arm:
    """A bundle that takes requests: its model, its catalogue as it is now, and the admin state on that.

    Attributes:
        name: ``primary`` or ``canary``.
        retriever: the model on the catalogue as it is now; replaced whole.
        replica: admin state; None for a server without.
    """

    def __init__(self, name: str, retriever: Retriever, replica: Replica | None = None) -> None:
        self.name = name
        self.retriever = retriever
        self.replica = replica

    @property
    def manifest(self) -> Manifest:
        """What the bundle is."""
        return self.retriever.bundle.manifest

    def show(self, catalogue: Catalogue) -> None:
        """Serve a new state of the catalogue; requests that have begun keep the one they began with. Not for the loop.

        Args:
            catalogue: of this arm's bundle, see `Catalogue.updated`.
        """
        raise NotImplementedError

    def answering(self, request: RetrieveRequest) -> Answering:
        """What answers a request that comes now."""
        if self.replica is None:
            return Answering(self.retriever, NO_EDITS, stale=False)
        return Answering(self.retriever, self.replica.edits(request), self.replica.stale)


class Deployment:
    """The arms of a server."""

    def __init__(self, primary: Arm) -> None:
        self.primary = primary

    @property
    def arms(self) -> list[Arm]:
        """All that take requests."""
        return [self.primary]

    def arm_for(self, request: RetrieveRequest) -> Arm:
        """The arm that answers a request; of one user always the same."""
        return self.primary
