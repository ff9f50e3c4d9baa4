"""An embedding that was fitted to a catalogue, and what it makes of items that come later and of queries.

Saved, it is three files::

    embedding.safetensors   what the models learned; the items' vectors, where later ones are imputed from them
    keywords.parquet        the dictionary, where a part uses one
    embedding.json          the parts; written last, so that its presence means complete
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from genretrieval.errors import DataError, RecipeError
from genretrieval.histories import Histories
from genretrieval.item_texts import item_texts
from genretrieval.keywords import KeywordDictionary
from genretrieval_pipelines.embed.keywords import enhance
from genretrieval_pipelines.embed.linear import Matrix, unit_rows
from genretrieval_pipelines.embed.parts import (
    EmbeddingPart,
    catalogue_keywords,
    collaborative_block,
    column_block,
    fitted_model,
    text_block,
)
from genretrieval_pipelines.embed.text import TextEmbedder, text_embedder

EMBEDDING = "embedding.json"
NEIGHBOURS = 5
"""Fitted items whose mean stands in for a part that a later item or a query cannot have."""

_TENSORS = "embedding.safetensors"
_KEYWORDS = "keywords.parquet"
_FORMAT = "genretrieval.embedding.1"
_BLOCK = 64  # rows compared with all items at a time
_COSINE_ERROR = 1e-4  # of float32 unit vectors, far beyond what 1,000 dimensions can sum up to

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class FittedEmbedding:
    """Named parts set side by side, with all that embedding later items and queries in the same space needs.

    A later item or a query has no collaborative vector: nobody had met it, and computing that part anew would turn the
    space that codebooks lie in. Zeros would lie in that space and yet be like nothing in it: of centroids whose
    collaborative parts differ in length, the shortest would be nearest whatever the text says. So such a part is
    imputed: the mean of the vectors of the `NEIGHBOURS` fitted items that are nearest by the other parts, to length 1.

    Attributes:
        spec: the parts, in order.
        blocks: float32 ``[n_items, dim]`` a part, unit rows of the fitted items. After `load` there are none of them
            where nothing is ever imputed, because all parts read text.
        models: for each part that reads text, what gives its fitted model; None for the others.
        keywords: the dictionary, where a part uses one.
    """

    spec: tuple[EmbeddingPart, ...]
    blocks: tuple[Matrix, ...] = field(repr=False)
    models: tuple[Callable[[], TextEmbedder] | None, ...] = field(repr=False)
    keywords: KeywordDictionary | None = field(default=None, repr=False)

    @classmethod
    def fit(
        cls,
        items: pl.DataFrame,
        spec: Sequence[EmbeddingPart],
        histories: Histories | None,
        cache: Path,
        keywords: KeywordDictionary | None = None,
    ) -> FittedEmbedding:
        """Embed a catalogue.

        Args:
            items: the item table; row i is item row i everywhere.
            spec: parts, set side by side in this order.
            histories: users' histories over the same item rows, for the part ``collaborative``, which reads their
                training part (leave-one-out) and nothing later; None when the shop has no interactions.
            cache: folder where each part is kept under a hash of everything it depends on. A weight is not among
                that, so trying weights recomputes nothing. The folder may be deleted at any time.
            keywords: for the parts with `keywords`; None mines them from the items.

        Raises:
            RecipeError: no parts, or ``collaborative`` without histories.
            DataError: no items, a bad embedding column, or a model or cache file that cannot be read.
            MissingExtraError: a part needs a package that is not installed.
        """
        if not spec:
            raise RecipeError("the recipe lists no embedding; give at least one part, e.g. `- name: hashing`")
        if not len(items):
            raise DataError("the item table is empty; there is nothing to embed")
        used = None
        if any(part.keywords for part in spec):
            used = catalogue_keywords(items, cache) if keywords is None else keywords
        texts = item_texts(items) if any(part.reads_text for part in spec) else []
        models = tuple(_lazily(fitted_model, part, texts, cache) if part.reads_text else None for part in spec)
        blocks = tuple(
            text_block(part, texts, model, used, cache)
            if model
            else collaborative_block(part, len(items), histories, cache)
            if part.name == "collaborative"
            else column_block(items, part)
            for part, model in zip(spec, models, strict=True)
        )
        return cls(tuple(spec), blocks, models, used)

    @cached_property
    def vectors(self) -> Matrix:
        """float32 ``[n_items, dim]`` of the items it was fitted to, dim being the sum of the parts'."""
        return self._joined(dict(enumerate(self.blocks)), len(self.blocks[0]))

    @property
    def dim(self) -> int:
        """Dimensions of all parts together."""
        return sum(block.shape[1] for block in self.blocks)

    def new_items(self, items: pl.DataFrame) -> Matrix:
        """Embed items that came later, in the space of `vectors`.

        Texts go through the model and the keywords that were fitted, vector columns are read, and the part
        ``collaborative`` is imputed; zeros where nothing is known of an item.

        Args:
            items: their table, with the columns of the fitted one.

        Returns:
            float32 ``[len(items), dim]``.

        Raises:
            DataError: a bad embedding column, or one of other dimensions than the fitted items had.
            MissingExtraError: a part needs a package that is not installed.
        """
        texts = item_texts(items) if any(self.models) else []
        blocks: dict[int, Matrix] = {}
        for row, part in enumerate(self.spec):
            if part.reads_text:
                blocks[row] = self._read(row, texts)
            elif part.name != "collaborative":
                blocks[row] = column_block(items, part)
                if (found := blocks[row].shape[1]) != (wanted := self.blocks[row].shape[1]):
                    raise DataError(
                        f"{part.name} has vectors of {found} numbers, but {wanted} in the items that the embedding was "
                        "fitted to: they come from another model, and codes would mean nothing; embed the new items as "
                        "the old ones were"
                    )
        return self._completed(blocks, len(items))

    def queries(self, queries: Sequence[str]) -> Matrix:
        """Embed queries in the space of `vectors`, so that a tokenizer of items gives a query an ID too.

        A query that says what an item says has its text parts. Parts that read no words (``collaborative``,
        ``column:``) are imputed; zeros where the query has no word that the models know.

        Returns:
            float32 ``[len(queries), dim]``.

        Raises:
            RecipeError: no part reads text.
            MissingExtraError: a part needs a package that is not installed.
        """
        if not any(self.models):
            raise RecipeError(
                f"a query is words, and no embedding of the recipe reads any ({', '.join(p.name for p in self.spec)}): "
                "all queries would be one vector; add hashing, minilm or an hf: model"
            )
        rows = [row for row, part in enumerate(self.spec) if part.reads_text]
        return self._completed({row: self._read(row, queries) for row in rows}, len(queries))

    def save(self, folder: Path) -> None:
        """Write what `load` reads; ``embedding.json`` comes last."""
        kept = slice(0 if all(self.models) else None)
        tensors = {f"vectors.{row}": block[kept] for row, block in enumerate(self.blocks)}
        for row, part in enumerate(self.spec):
            if part.name == "hashing":
                tensors.update({f"model.{row}.{name}": tensor for name, tensor in self._model(row).state().items()})
        folder.mkdir(parents=True, exist_ok=True)
        (folder / EMBEDDING).unlink(missing_ok=True)
        partial = folder / (_TENSORS + ".partial")
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, partial)
        os.replace(partial, folder / _TENSORS)
        if self.keywords is not None:
            self.keywords.save(folder / _KEYWORDS)
        partial = folder / (EMBEDDING + ".partial")
        content = {"format": _FORMAT, "parts": [part.model_dump(mode="json") for part in self.spec]}
        partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")
        os.replace(partial, folder / EMBEDDING)

    @classmethod
    def load(cls, folder: Path) -> FittedEmbedding:
        """Read what `save` wrote. No model is opened before it is needed.

        Raises:
            DataError: a file is missing, damaged or of another version.
        """
        path = folder / EMBEDDING
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format"] != _FORMAT:
                raise DataError(f"{path} is of the format {content['format']!r}, not {_FORMAT!r}; publish anew")
            spec = tuple(EmbeddingPart.model_validate(part) for part in content["parts"])
            tensors = load_file(folder / _TENSORS)
            blocks = tuple(tensors[f"vectors.{row}"] for row in range(len(spec)))
        except (OSError, ValueError, KeyError, TypeError, ValidationError, SafetensorError) as error:
            raise DataError(
                f"the embedding in {folder} cannot be read ({error!r}); restore the folder from a copy: embedded by "
                "another fit, later items and queries would get codes that mean nothing"
            ) from error
        models = tuple(
            _lazily(_restored, part, _below(f"model.{row}.", tensors)) if part.reads_text else None
            for row, part in enumerate(spec)
        )
        keywords = KeywordDictionary.load(folder / _KEYWORDS) if any(part.keywords for part in spec) else None
        return cls(spec, blocks, models, keywords)

    def _model(self, row: int) -> TextEmbedder:
        model = self.models[row]
        assert model is not None
        return model()

    def _read(self, row: int, texts: Sequence[str]) -> Matrix:
        """Unit rows of a text part for later texts."""
        model = self._model(row)
        plain = model.embed(texts)
        if not self.spec[row].keywords:
            return plain
        assert self.keywords is not None
        return enhance(plain, texts, self.keywords, model.embed)

    def _completed(self, known: dict[int, Matrix], n_rows: int) -> Matrix:
        """The parts in `known` set side by side with the others, which are imputed from them."""
        missing = [row for row in range(len(self.spec)) if row not in known]
        if missing:
            asked = unit_rows(self._joined(known, n_rows))
            fitted = unit_rows(self._joined({row: self.blocks[row] for row in known}, len(self.blocks[0])))
            known = known | {row: impute(asked, fitted, self.blocks[row]) for row in missing}
        return self._joined(known, n_rows)

    def _joined(self, blocks: Mapping[int, Matrix], n_rows: int) -> Matrix:
        weighted = [self.spec[row].weight * blocks[row] for row in sorted(blocks)]
        return np.concatenate([np.zeros((n_rows, 0), np.float32), *weighted], axis=1)


def impute(asked_QD: Matrix, fitted_ND: Matrix, values_NK: Matrix) -> Matrix:
    """What the fitted items nearest to each row have on average.

    Args:
        asked_QD: float32 ``[Q, D]``, unit rows, or zeros.
        fitted_ND: float32 ``[N, D]``, unit rows, or zeros, of the fitted items.
        values_NK: float32 ``[N, K]``, unit rows; items of zeros have no vector and do not vote.

    Returns:
        float32 ``[Q, K]``: mean of the `NEIGHBOURS` voting items of highest cosine, to length 1. Zeros where a row of
        `asked_QD` is zeros, or where no item votes.
    """
    voters = np.flatnonzero(values_NK.any(axis=1))
    imputed_QK = np.zeros((len(asked_QD), values_NK.shape[1]), np.float32)
    rows = np.flatnonzero(asked_QD.any(axis=1))
    if not len(voters):
        return imputed_QK
    candidates_VD = fitted_ND[voters]
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        for row, cosine_V in zip(block, asked_QD[block] @ candidates_VD.T, strict=True):
            nearest = voters[_nearest(cosine_V, asked_QD[row], candidates_VD)]
            imputed_QK[row] = values_NK[nearest].mean(axis=0)
    return unit_rows(imputed_QK)


def _nearest(cosine_V: Matrix, asked_D: Matrix, candidates_VD: Matrix) -> NDArray[np.int64]:
    """Rows of the `NEIGHBOURS` highest cosines, sorted; near-ties in float64, of equal ones the lower row.

    The last bits of a product of matrices depend on what stands beside a row, and items of equal texts are common.
    """
    k = min(NEIGHBOURS, len(cosine_V))
    least = np.partition(cosine_V, -k)[-k]
    near = np.flatnonzero(cosine_V >= least - _COSINE_ERROR)
    exact = (candidates_VD[near].astype(np.float64) * asked_D).sum(axis=1)
    return np.sort(near[np.argsort(-exact, kind="stable")[:k]])


def embed_items(
    items: pl.DataFrame,
    spec: Sequence[EmbeddingPart],
    histories: Histories | None,
    cache: Path,
    keywords: KeywordDictionary | None = None,
) -> Matrix:
    """Vectors of a catalogue, float32 ``[n_items, dim]``; arguments and errors are those of `FittedEmbedding.fit`."""
    return FittedEmbedding.fit(items, spec, histories, cache, keywords).vectors


def _lazily(function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> Callable[[], _R]:
    """`function` of these arguments, computed when it is first asked for, and once."""
    return functools.cache(lambda: function(*args, **kwargs))


def _restored(part: EmbeddingPart, state: Mapping[str, NDArray[Any]]) -> TextEmbedder:
    return text_embedder(part.name, part.dim, part.revision).restore(state)


def _below(prefix: str, tensors: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
