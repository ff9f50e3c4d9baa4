"""A folder of bundles by name, and how one is made ready to answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from genretrieval.bundle import Manifest, load_bundle, read_manifest
from genretrieval.errors import BundleError, GenRetrievalError, InvalidInputError
from genretrieval.request import RetrieveRequest
from genretrieval.retrieval import Retriever
from genretrieval_serving.backend import Device, OnnxBackend


@dataclass(frozen=True)
class BundleFolder:
    """Bundles by the names of their folders. A name stands for one bundle for ever: a new bundle is a new name.

    Attributes:
        path: folder whose folders are bundles.
        opener: makes a bundle answer, not yet warm.
        max_batch: requests of the largest batch that is run.
    """

    path: Path
    opener: Callable[[Path], Retriever]
    max_batch: int = 32

    def __post_init__(self) -> None:
        """Refuse what is no folder."""
        if not self.path.is_dir():
            raise InvalidInputError(f"{self.path} is no folder; give the one in which the folders of the bundles are")

    def names(self) -> list[str]:
        """All that may be bundles; one that is being written begins with a dot."""
        return sorted(entry.name for entry in self.path.iterdir() if entry.is_dir() and entry.name[0] != ".")

    def manifest(self, name: str) -> Manifest:
        """What a bundle says of itself.

        Raises:
            BundleError: it cannot be read; see `read_manifest`.
        """
        return read_manifest(self.path / name)

    def open(self, name: str) -> Retriever:
        """A bundle whose files are as they were written, and which has answered.

        It is warmed up in the caller's thread, so that a batch of requests waits for none of it.

        Raises:
            BundleError: it cannot be served.
        """
        try:
            retriever = self.opener(self.path / name)
            warm_up(retriever, self.max_batch)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # Whatever is met, a panic in Rust too: files are as they were written, and what they say cannot be served.
            why = str(error) if isinstance(error, GenRetrievalError) else repr(error)
            raise BundleError(f"{name} cannot be served: {why}") from error
        return retriever


def open_retriever(path: Path, threads: int | None = None, device: Device = "cpu") -> Retriever:
    """Open a bundle with ONNX Runtime.

    Raises:
        BundleError: a file is missing or changed, or the graph or the catalogue is not what the manifest says.
    """
    bundle = load_bundle(path)
    retriever = Retriever(bundle, OnnxBackend.of(bundle, threads, device))
    if (n := len(retriever.catalogue.item_ids)) != bundle.manifest.n_items:
        raise BundleError(
            f"{path} has {n} items and its manifest says {bundle.manifest.n_items}: another catalogue than the one it "
            "was exported with. Export the bundle again"
        )
    return retriever


def warm_up(retriever: Retriever, max_batch: int) -> None:
    """Run the smallest and the largest batch, so that the first request waits for nothing.

    Raises:
        BundleError: the answers are empty.
    """
    for size in (1, max_batch):
        if not all(response.items for response in retriever.retrieve([RetrieveRequest()] * size)):
            raise BundleError("its graph finds no item for a request that excludes none: its weights may be no numbers")
