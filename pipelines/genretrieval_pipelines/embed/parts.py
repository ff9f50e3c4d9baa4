"""From an item table to one matrix: named parts, each computed once, weighted and set side by side."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from functools import cache as remembered
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from genretrieval.errors import DataError, RecipeError
from genretrieval.histories import Histories, LeaveOneOut
from genretrieval.keywords import KeywordDictionary
from genretrieval_pipelines.embed.collaborative import DEFAULT_DIM, collaborative_embeddings
from genretrieval_pipelines.embed.keywords import enhance, mine_keywords
from genretrieval_pipelines.embed.linear import Matrix, unit_rows
from genretrieval_pipelines.embed.text import HASHING_DIM, MINILM_SHA256, item_texts, text_embedder

_METHOD_VERSION = 1  # raise it when a change here would give other vectors for equal input


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


def embed_items(
    items: pl.DataFrame,
    spec: Sequence[EmbeddingPart],
    histories: Histories | None,
    cache: Path,
    keywords: KeywordDictionary | None = None,
) -> Matrix:
    """Embed the catalogue.

    Args:
        items: the item table; row i is item row i everywhere.
        spec: parts, set side by side in this order.
        histories: users' histories over the same item rows, for the part ``collaborative``, which reads their
            training part (leave-one-out) and nothing later; None when the shop has no interactions.
        cache: folder where each part is kept under a hash of everything it depends on. A weight is not among
            that, so trying weights recomputes nothing. The folder may be deleted at any time.
        keywords: for the parts with `keywords`; None mines them from the items.

    Returns:
        float32 ``[n_items, dim]``, dim being the sum of the parts'.

    Raises:
        RecipeError: no parts, or ``collaborative`` without histories.
        DataError: no items, a bad embedding column, or a model or cache file that cannot be read.
        MissingExtraError: a part needs a package that is not installed.
    """
    _check(items, spec)
    keywords = _dictionary(items, spec, keywords)
    return np.concatenate([part.weight * _part(items, part, histories, cache, keywords) for part in spec], axis=1)


def embed_queries(
    queries: Sequence[str],
    items: pl.DataFrame,
    spec: Sequence[EmbeddingPart],
    histories: Histories | None,
    cache: Path,
    keywords: KeywordDictionary | None = None,
) -> Matrix:
    """Embed queries in the space of `embed_items`, so that a tokenizer of items gives a query an ID too.

    Text parts are embedded by the model that embeds the items, with its fit to the items' texts and the same keywords:
    a query that says what an item says has its vector. Parts that read no words (``collaborative``, ``column:``) are
    zeros. There every item is as far from a query as its own length, `weight` for all but items without a vector, so
    which item is nearest is decided by the text.

    Args:
        queries: what visitors type.
        items: as in `embed_items`.
        spec: as in `embed_items`; at least one part reads text.
        histories: as in `embed_items`; they decide how many dimensions the part ``collaborative`` has.
        cache: as in `embed_items`.
        keywords: as in `embed_items`; pass the same.

    Returns:
        float32 ``[len(queries), dim]``, with the dim of `embed_items`.

    Raises:
        RecipeError: as `embed_items`, or no part reads text.
        DataError: as `embed_items`.
        MissingExtraError: as `embed_items`.
    """
    _check(items, spec)
    if not any(part.reads_text for part in spec):
        raise RecipeError(
            f"a query is words, and no embedding of the recipe reads any ({', '.join(part.name for part in spec)}): "
            "all queries would be one vector; add hashing, minilm or an hf: model"
        )
    keywords = _dictionary(items, spec, keywords)
    return np.concatenate(
        [
            part.weight * _text_part(items, part, cache, keywords, queries)
            if part.reads_text
            else np.zeros((len(queries), _part(items, part, histories, cache, keywords).shape[1]), np.float32)
            for part in spec
        ],
        axis=1,
    )


def embed_new_items(
    new: pl.DataFrame,
    items: pl.DataFrame,
    spec: Sequence[EmbeddingPart],
    dim: int,
    cache: Path,
    keywords: KeywordDictionary | None = None,
) -> Matrix:
    """Embed items that came after a tokenizer was fitted, in the space that it was fitted in.

    Text parts are embedded with their fit to the old items' texts, vector columns are read, and the part
    ``collaborative`` is zero: nobody had met the new items, and computing it anew would turn the space.

    Args:
        new: table of the new items.
        items: table of the items that the tokenizer was fitted on.
        spec: the parts that it was fitted with.
        dim: dimensions that it was fitted with; those that no other part has are collaborative.
        cache: as in `embed_items`.
        keywords: as in `embed_items`; pass the same.

    Returns:
        float32 ``[len(new), dim]``.

    Raises:
        DataError: as `embed_items`; or the parts do not make `dim` dimensions.
    """
    _check(items, spec)
    keywords = _dictionary(items, spec, keywords)
    blocks: list[Matrix | None] = []
    for part in spec:
        if part.reads_text:
            blocks.append(part.weight * _text_part(items, part, cache, keywords, item_texts(new)))
        elif part.name == "collaborative":
            blocks.append(None)
        else:
            blocks.append(part.weight * _column(new, part.name.removeprefix("column:")))
    missing = dim - sum(block.shape[1] for block in blocks if block is not None)
    n_collaborative = sum(block is None for block in blocks)
    if missing < 0 or (missing > 0 and n_collaborative != 1):
        raise DataError(
            f"the parts {', '.join(part.name for part in spec)} do not make the {dim} dimensions of the tokenizer; "
            "give the recipe and the old item table that it was fitted with"
        )
    zeros = np.zeros((len(new), missing), np.float32)
    return np.concatenate([zeros if block is None else block for block in blocks], axis=1)


def _check(items: pl.DataFrame, spec: Sequence[EmbeddingPart]) -> None:
    if not spec:
        raise RecipeError("the recipe lists no embedding; give at least one part, e.g. `- name: hashing`")
    if not len(items):
        raise DataError("the item table is empty; there is nothing to embed")


def _dictionary(
    items: pl.DataFrame, spec: Sequence[EmbeddingPart], given: KeywordDictionary | None
) -> KeywordDictionary | None:
    """The keywords that parts use; None where no part uses any."""
    if not any(part.keywords for part in spec):
        return None
    return mine_keywords(items) if given is None else given


def _part(
    items: pl.DataFrame,
    part: EmbeddingPart,
    histories: Histories | None,
    cache: Path,
    keywords: KeywordDictionary | None,
) -> Matrix:
    """Unit rows of one part, from the cache where they are."""
    if part.name.startswith("column:"):
        return _column(items, part.name.removeprefix("column:"))
    if part.name == "collaborative":
        if histories is None:
            raise RecipeError(
                "the embedding 'collaborative' learns from interactions, and there are none; add "
                "interactions.parquet, or take the part out of the recipe: items are then embedded by "
                "their other parts alone"
            )
        sequences = list(LeaveOneOut(histories).train_sequences())
        dim = part.dim or DEFAULT_DIM
        key = _hash(["collaborative", dim, len(items), version("scipy")], sequences)
        return _cached(cache, "collaborative", key, lambda: collaborative_embeddings(sequences, len(items), dim))
    return _text_part(items, part, cache, keywords)


def _text_part(
    items: pl.DataFrame,
    part: EmbeddingPart,
    cache: Path,
    keywords: KeywordDictionary | None,
    queries: Sequence[str] | None = None,
) -> Matrix:
    """Unit rows of a text part for the items or, where given, for queries; from the cache where they are."""
    catalogue = item_texts(items)
    texts, read = (catalogue, {}) if queries is None else (queries, {"queries": queries})
    label = part.name.partition(":")[0]
    fitted = remembered(lambda: text_embedder(part.name, part.dim, part.revision).fit(catalogue))
    plain = _cached(cache, label, _text_key(part, catalogue, **read), lambda: fitted().embed(texts))
    if not part.keywords:
        return plain
    assert keywords is not None
    key = _text_key(part, catalogue, **read, keywords=[keyword.text for keyword in keywords.keywords])
    return _cached(cache, f"{label}-keywords", key, lambda: enhance(plain, texts, keywords, fitted().embed))


def _text_key(part: EmbeddingPart, catalogue: Sequence[str], **read: Sequence[str]) -> str:
    """Hash of what the vectors of a text part depend on; `read` names texts that come in beside the catalogue's."""
    texts = chain(catalogue, *read.values())
    identity = [*_text_identity(part), *([name, len(more)] for name, more in read.items())]
    return _hash(identity, (text.encode() for text in texts))


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


def _column(items: pl.DataFrame, name: str) -> Matrix:
    """Unit rows of a vector column."""
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


def _cached(folder: Path, label: str, key: str, compute: Callable[[], Matrix]) -> Matrix:
    """Read ``<label>-<key>.npy``, or compute it and put it there by rename, so that it is whole or absent."""
    path = folder / f"{label}-{key[:32]}.npy"
    if path.exists():
        try:
            stored: Matrix = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"cached embedding {path} cannot be read ({error}); delete it to compute it again"
            ) from error
        return stored
    computed = compute()
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(suffix=".partial", dir=folder)
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, computed)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    return computed
