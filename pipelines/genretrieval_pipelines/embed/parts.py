"""The named parts of an embedding, each computed once and kept under a hash of what it depends on."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from genretrieval.errors import DataError, RecipeError
from genretrieval.histories import Histories, LeaveOneOut
from genretrieval.keywords import KeywordDictionary
from genretrieval_pipelines.embed.collaborative import DEFAULT_DIM, collaborative_embeddings
from genretrieval_pipelines.embed.keywords import enhance, mine_keywords, mined_columns
from genretrieval_pipelines.embed.linear import Matrix, unit_rows
from genretrieval_pipelines.embed.text import HASHING_DIM, MINILM_SHA256, TextEmbedder, text_embedder

_METHOD_VERSION = 1  # raise it when a change here would give other vectors for equal input

_T = TypeVar("_T")


class EmbeddingPart(BaseModel):
    """One source of item vectors.

    A part's rows are scaled to length 1 and multiplied by `weight`; so with weights a and b the squared
    distance of two items is a^2 and b^2 times the squared distances within the parts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        description="hashing, minilm, hf:<name or path>, collaborative, or column:<name>, a list<float32> "
        "column of the items."
    )
    weight: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    dim: int | None = Field(
        None,
        ge=1,
        description="Dimensions of hashing (256) or collaborative (64); the others have their own.",
    )
    revision: str | None = Field(
        None, description="Commit or tag of an hf: model; without it vectors are cached under the name alone."
    )
    keywords: bool = Field(
        False,
        description="Move every text's vector half-way to the mean of its keywords' (OneSearch); for hashing, minilm "
        "and hf: only.",
    )

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        kind, _, rest = name.partition(":")
        if name not in ("hashing", "minilm", "collaborative") and not (kind in ("hf", "column") and rest):
            raise ValueError(
                f"no embedding is called {name!r}; use hashing, minilm, collaborative, hf:<name or path> or "
                "column:<name>"
            )
        return name

    @model_validator(mode="after")
    def _options_apply(self) -> Self:
        if self.dim is not None and self.name not in ("hashing", "collaborative"):
            raise ValueError(f"`dim` can be set for hashing and collaborative; {self.name!r} has its own dimensions")
        if self.revision is not None and not self.name.startswith("hf:"):
            raise ValueError(f"`revision` names a version of an hf: model; {self.name!r} has none")
        if self.keywords and not self.reads_text:
            raise ValueError(
                f"`keywords` sharpens the embedding of a text; {self.name!r} reads none. Set it on hashing, minilm or "
                "an hf: model"
            )
        return self

    @property
    def reads_text(self) -> bool:
        """Whether the vectors come from words, so that a query has one too."""
        return self.name in ("hashing", "minilm") or self.name.startswith("hf:")


def text_block(
    part: EmbeddingPart,
    texts: Sequence[str],
    model: Callable[[], TextEmbedder],
    keywords: KeywordDictionary | None,
    cache: Path,
) -> Matrix:
    """Unit rows of a text part for the catalogue's texts; `model` is asked for only where the cache lacks them."""
    label = part.name.partition(":")[0]
    plain = _cached_matrix(cache, label, _text_key(part, texts), lambda: model().embed(texts))
    if not part.keywords:
        return plain
    assert keywords is not None
    key = _text_key(part, texts, [keyword.text for keyword in keywords.keywords])
    return _cached_matrix(cache, f"{label}-keywords", key, lambda: enhance(plain, texts, keywords, model().embed))


def fitted_model(part: EmbeddingPart, texts: Sequence[str], cache: Path) -> TextEmbedder:
    """The model of a text part, fitted to the catalogue's texts; what it learned is kept in `cache`."""
    model = text_embedder(part.name, part.dim, part.revision)
    if part.name != "hashing":
        return model
    path = cache / f"hashing-model-{_text_key(part, texts)[:32]}.safetensors"
    state = _cached(path, lambda: model.fit(texts).state(), _write_tensors, load_file)
    return model.restore(state)


def collaborative_block(part: EmbeddingPart, n_items: int, histories: Histories | None, cache: Path) -> Matrix:
    """Unit rows of the part ``collaborative``, which reads the training part of the histories alone."""
    if histories is None:
        raise RecipeError(
            "the embedding 'collaborative' learns from interactions, and there are none; add "
            "interactions.parquet, or take the part out of the recipe: items are then embedded by "
            "their other parts alone"
        )
    sequences = list(LeaveOneOut(histories).train_sequences())
    dim = part.dim or DEFAULT_DIM
    key = _hash(["collaborative", dim, n_items, version("scipy")], sequences)
    return _cached_matrix(cache, "collaborative", key, lambda: collaborative_embeddings(sequences, n_items, dim))


def catalogue_keywords(items: pl.DataFrame, cache: Path) -> KeywordDictionary:
    """`mine_keywords` of a catalogue, once."""
    read = items.select(mined_columns(items))
    key = _hash(["keywords", 2, read.columns], [read.write_ndjson().encode()])
    return _cached(
        cache / f"keywords-{key[:32]}.parquet",
        lambda: mine_keywords(items),
        lambda mined, path: mined.save(path),
        KeywordDictionary.load,
    )


def _text_key(part: EmbeddingPart, texts: Sequence[str], keywords: Sequence[str] | None = None) -> str:
    """Hash of what the vectors of a text part depend on."""
    identity = _text_identity(part)
    if keywords is not None:
        identity.append(["keywords", len(keywords)])
    return _hash(identity, (text.encode() for text in chain(texts, keywords or ())))


def _text_identity(part: EmbeddingPart) -> list[object]:
    """What the vectors of a text part depend on besides the texts."""
    if part.name == "hashing":
        return [part.name, part.dim or HASHING_DIM, version("scipy")]
    model: list[object] = [part.name, part.revision, version("transformers"), version("torch")]
    if part.name == "minilm":
        return [*model, MINILM_SHA256]
    folder = Path(part.name.removeprefix("hf:"))
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.json")]) if folder.is_dir() else ():
        with file.open("rb") as content:
            model.append([file.name, hashlib.file_digest(content, "sha256").hexdigest()])
    return model


def column_block(items: pl.DataFrame, part: EmbeddingPart) -> Matrix:
    """Unit rows of a vector column."""
    name = part.name.removeprefix("column:")
    where = f"column {name!r} of the item table"
    if name not in items.columns:
        raise DataError(f"there is no {where}; the recipe asks for column:{name}")
    dtype = items.schema[name]
    if not isinstance(dtype, (pl.List, pl.Array)) or not dtype.inner.is_numeric():
        raise DataError(f"{where} is {dtype}; an embedding column is list<float32>, one vector an item")
    column = items[name].cast(pl.List(pl.Float32))
    lengths = column.list.len()
    if (lengths.drop_nulls() == 0).any() or lengths.drop_nulls().n_unique() > 1:
        found = sorted(lengths.drop_nulls().unique().to_list())
        raise DataError(f"{where} has vectors of {found[:5]} numbers; all items need the same, and at least one")
    if column.null_count():
        raise DataError(_rows_at_fault(where, "is null", column.is_null()))
    values = column.explode()
    bad = (values.is_null() | ~values.fill_null(0).is_finite()).to_numpy().reshape(len(items), -1).any(axis=1)
    if bad.any():
        raise DataError(_rows_at_fault(where, "holds nulls, NaN or infinities", pl.Series(bad)))
    return unit_rows(values.to_numpy().reshape(len(items), -1))


def _rows_at_fault(where: str, what: str, at_fault: pl.Series) -> str:
    rows = at_fault.arg_true()
    first = ", ".join(map(str, rows[:5].to_list()))
    return f"{where} {what} in {len(rows)} rows, first {first}; every item needs a vector"


def _hash(identity: list[object], blocks: Iterable[bytes | NDArray[np.int32]]) -> str:
    """sha256 over the method and its input; blocks are told apart by their lengths."""
    digest = hashlib.sha256(json.dumps([_METHOD_VERSION, identity]).encode())
    for block in blocks:
        data = block if isinstance(block, bytes) else block.tobytes()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def _cached_matrix(folder: Path, label: str, key: str, compute: Callable[[], Matrix]) -> Matrix:
    return _cached(folder / f"{label}-{key[:32]}.npy", compute, _write_matrix, partial(np.load, allow_pickle=False))


def _write_matrix(x_ND: Matrix, path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, x_ND)


def _write_tensors(tensors: dict[str, NDArray[Any]], path: Path) -> None:
    save_file(tensors, path)


def _cached(path: Path, compute: Callable[[], _T], write: Callable[[_T, Path], None], read: Callable[[Path], _T]) -> _T:
    """Read a file, or compute what it is to hold and put it there by rename, so that it is whole or absent."""
    if path.exists():
        try:
            return read(path)
        except (OSError, ValueError, EOFError, SafetensorError) as error:
            raise DataError(
                f"cached embedding {path} cannot be read ({error}); delete it to compute it again"
            ) from error
    computed = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, unfinished = tempfile.mkstemp(suffix=".partial", dir=path.parent)
    os.close(handle)
    try:
        write(computed, Path(unfinished))
        os.replace(unfinished, path)
    finally:
        Path(unfinished).unlink(missing_ok=True)
    return computed
