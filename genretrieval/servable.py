"""What a `genretrieval.retrieval.Retriever` answers from: a bundle, and the items in it that can be retrieved."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.bundle import Manifest
from genretrieval.catalogue import CatalogueIndex, build_index, reserved_paths
from genretrieval.errors import RequestError
from genretrieval.features import RequestFeatures
from genretrieval.request import Filters
from genretrieval.semantic_ids import SemanticIds

# Columns of a catalogue that are no attributes.
_NOT_FILTERED = frozenset({"item_id", "semantic_id", "popularity"})


class Servable(Protocol):
    """What a `Retriever` answers from: a `genretrieval.bundle.Bundle`, or one that is still being trained."""

    @property
    def manifest(self) -> Manifest:
        """What it is."""
        ...

    def features(self) -> RequestFeatures:
        """How requests are turned into model inputs."""
        ...

    def catalogue(self) -> pl.DataFrame:
        """Items in row order, see `genretrieval.bundle.Bundle.catalogue`."""
        ...

    def item_vectors(self) -> NDArray[np.float32] | None:
        """Item vectors of a model that has them, see `genretrieval.bundle.Bundle.item_vectors`."""
        ...


@dataclass(frozen=True)
class Catalogue:
    """Items that can be retrieved: an immutable snapshot, kept by a request from its beginning to its end.

    Attributes:
        table: the bundle's ``catalogue.parquet``.
        ids: semantic IDs by item row.
        index: the trie over them; items of a leaf are listed by falling popularity.
        rows: item id to item row.
        item_ids: item row to item id; the table's column gives single ones out slowly.
        gone: int64, sorted item rows that were removed while the catalogue was served; no search writes them.
        revision: changes of the catalogue since the bundle was written.
    """

    table: pl.DataFrame
    ids: SemanticIds
    index: CatalogueIndex
    rows: dict[str, int]
    item_ids: list[str]
    gone: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    revision: int = 0

    @classmethod
    def open(cls, bundle: Servable) -> Catalogue:
        """Read a bundle's catalogue and index it."""
        table = bundle.catalogue()
        codes = table["semantic_id"].explode().to_numpy().astype(np.int32).reshape(len(table), -1)
        ids = SemanticIds(codes, bundle.manifest.codebook_sizes)
        reserved = reserved_paths(ids.codebook_sizes, bundle.manifest.reserved_slots)
        index = build_index(ids, -table["popularity"].to_numpy().astype(np.int64), reserved)
        item_ids = table["item_id"].to_list()
        return cls(table, ids, index, {item: row for row, item in enumerate(item_ids)}, item_ids)

    def matching(self, filters: Filters) -> NDArray[np.bool_]:
        """Which items satisfy `filters`, bool ``[n_items]``.

        Raises:
            RequestError: see `conditions`.
        """
        everything = pl.repeat(value=True, n=pl.len())
        matches = self.table.select(match=pl.all_horizontal(everything, *self.conditions(filters)))["match"]
        return matches.fill_null(value=False).to_numpy().astype(bool)

    def conditions(self, filters: Filters) -> list[pl.Expr]:
        """What `filters` ask of a row of the table.

        Raises:
            RequestError: a condition names an attribute that the catalogue does not have, or cannot compare.
        """
        conditions: list[pl.Expr] = []
        schema = {name: type_ for name, type_ in self.table.schema.items() if name not in _NOT_FILTERED}
        for name, values in filters.attributes.items():
            column = "categories" if name == "category" else name
            if column not in schema:
                raise RequestError(
                    f"filter on unknown attribute {name!r}; the catalogue has {', '.join(sorted(schema))}"
                )
            if isinstance(schema[column], pl.List):
                accepted = pl.element().cast(pl.String).is_in(values)
                conditions.append(pl.col(column).list.eval(accepted).list.any())
            else:
                conditions.append(pl.col(column).cast(pl.String).is_in(values))
        if filters.min_price is not None or filters.max_price is not None:
            if not schema.get("price", pl.String()).is_numeric():
                raise RequestError("filter on a price range, but this catalogue has no numeric attribute 'price'")
            low = -np.inf if filters.min_price is None else filters.min_price
            high = np.inf if filters.max_price is None else filters.max_price
            conditions.append(pl.col("price").is_between(low, high))
        if filters.in_stock is not None:
            if schema.get("in_stock") != pl.Boolean:
                raise RequestError("filter on in_stock, but this catalogue has no boolean attribute 'in_stock'")
            conditions.append(pl.col("in_stock") == filters.in_stock)
        return conditions
