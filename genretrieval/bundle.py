"""The bundle: one versioned, self-contained folder that can be served.

    manifest.json            written last: its presence means complete
    retriever.onnx           encoder and the whole beam search, one graph
    generator.safetensors    the weights it was exported from
    codebooks.safetensors    the tokenizer
    catalogue.parquet        items, their attributes and their semantic IDs
    item_vectors.npy         for models with a dense head: float32 [n_items, 2, E], memory-mapped
    query_tokenizer.json     for models that read queries
    keywords.parquet         for semantic IDs that begin with keyword slots: the words and their slots
    config.yaml              the recipe as it was run
    metrics.json             its quality figures
    README.md                model card

A bundle is written beside its final place and renamed into it, so a killed export leaves nothing that loads.
No file of it is a pickle.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from genretrieval.errors import BundleError, BundleIncompleteError, disk_is_full
from genretrieval.features import RequestFeatures
from genretrieval.keyword_codebook import KeywordCodebook

# 2: the graph takes a compact index and what a request excludes.
SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
GRAPH = "retriever.onnx"
WEIGHTS = "generator.safetensors"
CODEBOOKS = "codebooks.safetensors"
CATALOGUE = "catalogue.parquet"
ITEM_VECTORS = "item_vectors.npy"
QUERY_TOKENIZER = "query_tokenizer.json"
KEYWORDS = "keywords.parquet"
CONFIG = "config.yaml"
METRICS = "metrics.json"
MODEL_CARD = "README.md"
REQUIRED_FILES = (GRAPH, CATALOGUE)


class Manifest(BaseModel):
    """What a bundle is, and the sha256 of every other file in it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA_VERSION
    uuid: str = Field(default_factory=lambda: str(uuid.uuid4()))
    parent_uuid: str | None = None
    created: datetime = Field(default_factory=lambda: datetime.now(UTC).replace(microsecond=0))
    genretrieval_version: str
    n_items: int
    codebook_sizes: tuple[int, ...]
    reserved_slots: tuple[int, ...] = Field((), description="Of each level; none where codes are no keyword slots.")
    dedup_level: bool = Field(False, description="Whether the last code numbers items whose other codes are equal.")
    leaf_cap: int | None = Field(None, description="Items of one semantic ID that a response lists at most.")
    opset: int
    minimum_onnxruntime: str
    precision: Literal["fp32", "int8"] = Field("fp32", description="Of the graph's layers; int8 is for CPUs.")
    graph_inputs: tuple[str, ...] = Field(description="Inputs of the graph, in order.")
    events: tuple[str, ...] = ()
    profile_features: tuple[str, ...] = ()
    n_profile_buckets: int = 0
    scenarios: tuple[str, ...] = ()
    max_history: int
    max_past: int = Field(0, description="Events before the history, exposures among them, that the model reads.")
    max_query_tokens: int
    reads_queries: bool
    beam_width: int = Field(description="Default beam width of a request.")
    dense_weight: float = Field(0.0, description="Of the dense head's score beside the log-probability of the codes.")
    exclude_seen: bool = Field(description="Whether the quality figures leave out items that the user had seen.")
    metrics: dict[str, float] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict, description="File name to sha256.")

    @property
    def version(self) -> str:
        """Short name of this bundle for logs and responses."""
        # Every response has it, and strftime takes ten times as long.
        day = self.created
        return f"{day.year:04}{day.month:02}{day.day:02}-{self.uuid[:8]}"


class _SchemaVersion(BaseModel):
    schema_version: int


@dataclass(frozen=True, slots=True)
class Bundle:
    """A complete bundle on disk."""

    path: Path
    manifest: Manifest

    def catalogue(self) -> pl.DataFrame:
        """Items in row order: ``item_id``, ``semantic_id`` list<int32>, ``popularity``, every attribute."""
        return pl.read_parquet(self.path / CATALOGUE)

    def item_vectors(self) -> NDArray[np.float32] | None:
        """Item vectors float32 ``[n_items, 2, E]``, memory-mapped, of a model with a dense head.

        The first of an item is what it is read by in a history, the second what it is ranked by.

        Raises:
            BundleError: they do not fit the catalogue.
        """
        if ITEM_VECTORS not in self.manifest.files:
            return None
        vectors: NDArray[np.float32] = np.load(self.path / ITEM_VECTORS, mmap_mode="r", allow_pickle=False)
        if vectors.dtype != np.float32 or vectors.ndim != 3 or vectors.shape[:2] != (self.manifest.n_items, 2):
            raise BundleError(
                f"{self.path / ITEM_VECTORS} is {vectors.dtype} {vectors.shape}, not float32 "
                f"[{self.manifest.n_items}, 2, D]: it would rank other items than the catalogue's. Export the bundle "
                "again"
            )
        return vectors

    def features(self) -> RequestFeatures:
        """How requests are turned into model inputs."""
        m = self.manifest
        tokenizer = (self.path / QUERY_TOKENIZER).read_text("utf-8") if m.reads_queries else ""
        keywords = self._keywords() if m.reserved_slots else None
        return RequestFeatures(
            events=m.events,
            profile_features=m.profile_features,
            n_profile_buckets=m.n_profile_buckets,
            query_tokenizer=tokenizer,
            max_query_tokens=m.max_query_tokens,
            scenarios=m.scenarios,
            keywords=keywords,
        )

    def _keywords(self) -> KeywordCodebook:
        if KEYWORDS not in self.manifest.files:
            raise BundleError(
                f"{self.path / MANIFEST} has reserved slots but does not list {KEYWORDS}, which says what slots stand "
                "for; export the bundle again"
            )
        keywords = KeywordCodebook.load(self.path / KEYWORDS)
        sizes, reserved = self.manifest.codebook_sizes, self.manifest.reserved_slots
        n = keywords.n_groups
        if (keywords.sizes, keywords.reserved) != (sizes[:n], reserved[:n]) or any(reserved[n:]):
            raise BundleError(
                f"{self.path / KEYWORDS} has levels of {keywords.sizes} codes, {keywords.reserved} of them reserved; "
                f"the manifest says {sizes} and {reserved}: queries would be read as other slots than the model was "
                "trained on. Export the bundle again"
            )
        return keywords


def load_bundle(path: Path) -> Bundle:
    """Open a bundle and check every file against its manifest.

    Raises:
        BundleIncompleteError: the folder or its manifest is missing.
        BundleError: a file cannot be read, is missing or changed, or the manifest's schema is another.
    """
    with _reading(path):
        return _checked(path)


def _checked(path: Path) -> Bundle:
    manifest = read_manifest(path)
    for name in REQUIRED_FILES:
        if name not in manifest.files:
            raise BundleError(f"{path / MANIFEST} does not list {name}, without which nothing can be served")
    for name, expected in manifest.files.items():
        file = path / name
        if file.parent != path or not file.is_file():
            raise BundleError(f"{path} lacks {name}, which its manifest lists; copy the whole folder again")
        if sha256(file) != expected:
            raise BundleError(
                f"{file} has changed since the bundle was written (sha256 differs from the manifest): "
                "it would answer with other items than were evaluated. Copy the folder again or export anew"
            )
    return Bundle(path, manifest)


def read_manifest(folder: Path) -> Manifest:
    """What the manifest of a bundle says; `load_bundle` checks that it is so.

    Raises:
        BundleIncompleteError: the folder or its manifest is missing.
        BundleError: the manifest cannot be read, or its schema is another.
    """
    path = folder / MANIFEST
    with _reading(folder):
        if not folder.is_dir():
            raise BundleIncompleteError(
                f"{folder} is no folder; give the folder that `genretrieval run --output` wrote"
            )
        if not path.is_file():
            raise BundleIncompleteError(
                f"{folder} has no {MANIFEST}. It is written last, so this export never finished: run it again"
            )
        text = path.read_bytes()
    try:
        # On its own first: a newer manifest may have fields that this version would take for mistakes.
        version = _SchemaVersion.model_validate_json(text).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"{path.parent} has schema version {version}, this package reads {SCHEMA_VERSION}; "
                "upgrade genretrieval on the server before the bundle"
            )
        if version < SCHEMA_VERSION:
            raise BundleError(
                f"{path.parent} has schema version {version}, this package reads {SCHEMA_VERSION}: its graph takes "
                "other inputs. Export it again: `genretrieval run` reuses what its work folder holds"
            )
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise BundleError(f"{path} is damaged or no manifest of a bundle; export the bundle again. {error}") from error


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Say what it means that a file of a bundle cannot be read."""
    try:
        yield
    except OSError as error:
        raise BundleError(
            f"{error.filename or folder} cannot be read ({error.strerror}), so the bundle cannot be served; "
            "give the user that serves it the right to read all of the folder"
        ) from error


def check_output(path: Path) -> None:
    """Refuse to write a bundle over what is none; `write_bundle` asks again.

    Raises:
        BundleError: `path` is there and is neither a bundle nor an empty folder.
    """
    if path.exists() and not (path / MANIFEST).is_file() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleError(f"{path} exists and is not a bundle; it was left as it is. Choose another output folder")


@contextmanager
def write_bundle(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Write a bundle: fill the folder that is yielded; on a clean exit it becomes `path`.

    A bundle that was there is replaced.

    Args:
        path: where the bundle is to be.
        manifest: everything but `files`, which is filled in here.

    Raises:
        BundleError: `path` is there and is neither a bundle nor an empty folder, or the disk is full.
    """
    check_output(path)  # before the work, and before anything is touched
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{manifest.uuid}")
    partial.mkdir()
    try:
        yield partial
        files = {file.name: sha256(file) for file in sorted(partial.iterdir())}
        # safetensors gives its file to its writer alone; a server is another user, and reads every file.
        mode = partial.stat().st_mode & 0o666
        complete = manifest.model_copy(update={"files": files})
        for name in files:
            (partial / name).chmod(mode)
            _sync(partial / name)
        temporary = partial / f"{MANIFEST}.tmp"
        temporary.write_text(complete.model_dump_json(indent=2) + "\n", "utf-8")
        _sync(temporary)
        os.replace(temporary, partial / MANIFEST)
        _sync(partial)
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial)
        if disk_is_full(error):
            raise BundleError(
                f"the disk is full: {path.parent} had no room for the bundle {path.name} after {written:,} bytes. "
                f"Nothing of it was left, and what was at {path} stays; make room, or choose another output folder"
            ) from error
        raise
    _put_in_place(partial, path)


def _put_in_place(partial: Path, path: Path) -> None:
    """Rename `partial` to `path`; an older bundle there is moved aside first and removed last."""
    if path.exists():
        os.replace(path, path.with_name(f".{path.name}.old-{uuid.uuid4()}"))
    os.replace(partial, path)
    _sync(path.parent)
    # Ours, and what a killed export left behind.
    for kind in ("partial", "old"):
        for stale in path.parent.glob(f".{glob.escape(path.name)}.{kind}-*"):
            shutil.rmtree(stale)


def _sync(path: Path) -> None:
    """Flush a file or folder to disk, so that a manifest never outlives what it lists."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
