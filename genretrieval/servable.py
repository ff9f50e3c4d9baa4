"""What a `genretrieval.retrieval.Retriever` answers from: a bundle, and the items in it that can be retrieved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.bundle import Manifest
from genretrieval.catalogue import CatalogueIndex, build_index, reserved_paths
from genretrieval.errors import RequestError
from genretrieval.features import RequestFeatures
from genretrieval.item_ids import ItemIds
from genretrieval.request import Filters
from genretrieval.semantic_ids import SemanticIds

if TYPE_CHECKING:
    from genretrieval.catalogue_changes import CatalogueChanges

# Columns of a catalogue that are no attributes.
NO_ATTRIBUTES = frozenset({"item_id", "semantic_id", "popularity"})
# A table in more pieces is put together: each batch of new items is one.
_CHUNKS = 64


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
        table: the bundle's ``catalogue.parquet``, then the items that came while it was served, with what has changed.
        ids: semantic IDs by item row.
        index: the trie over them; items of a leaf are listed by falling popularity.
        item_ids: item row to item id, which the table's column gives out slowly, and item id to item row.
        gone: int64, sorted item rows that were removed while the catalogue was served; no search writes them.
        revision: changes of the catalogue since the bundle was written.
    """

    table: pl.DataFrame
    ids: SemanticIds
    index: CatalogueIndex
    item_ids: ItemIds
    gone: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    revision: int = 0

    @classmethod
    def open(cls, bundle: Servable) -> Catalogue:
        """Read a bundle's catalogue and index it."""
        table = bundle.catalogue()
        codes = table["semantic_id"].explode().to_numpy().astype(np.int32).reshape(len(table), -1)
        ids = SemanticIds(codes, bundle.manifest.codebook_sizes)
        reserved = reserved_paths(ids.codebook_sizes, bundle.manifest.reserved_slots)
        return cls(table, ids, _indexed(ids, table, reserved), ItemIds(table["item_id"]))

    def updated(self, changes: CatalogueChanges) -> Catalogue:
        """The catalogue after `changes`, which were checked to fit it; this one stays as it is.

        Rows do not move: new items get the next ones, and those of removed items are kept as `gone`. Changes of items
        that it does not have, and bring no semantic ID, are passed over.
        """
        new = changes.ids.filter(pl.Series(self.item_ids.rows_of(changes.ids["item_id"]) < 0))
        grown = self._with(new, changes) if len(new) else self
        columns = []
        for name, frame in changes.attributes.items():
            rows = self.item_ids.rows_of(frame["item_id"])
            known = np.flatnonzero(rows >= 0)
            if len(known):
                columns.append(_with_values(grown.table[name], rows[known], frame["value"].gather(known)))
        rows, removed = grown.item_ids.rows_of(changes.removed["item_id"]), changes.removed["value"].to_numpy()
        gone = np.union1d(grown.gone, rows[removed & (rows >= 0)])
        return replace(
            grown,
            table=grown.table.with_columns(columns),
            gone=np.setdiff1d(gone, rows[~removed], assume_unique=False),
            revision=self.revision + changes.n_sets,
        )

    def keeps_rows_of(self, before: Catalogue) -> bool:
        """Whether this one is `before` after some changes, or as good as that: its items have the rows they had.

        Two states of a catalogue that were made on their own from the same bundle may number later items differently.
        """
        return self.item_ids.continues(before.item_ids)

    def way_to(self, codes: Sequence[int]) -> list[int]:
        """Nodes of the index on the way to a semantic ID, one a level, as far as there are any."""
        nodes: list[int] = []
        parent = 0
        for tokens, starts, code in zip(self.index.tokens, self.index.child_starts, codes, strict=False):
            start, end = int(starts[parent]), int(starts[parent + 1])
            parent = start + int(np.searchsorted(tokens[start:end], code))
            if parent == end or tokens[parent] != code:
                break
            nodes.append(parent)
        return nodes

    def _with(self, new: pl.DataFrame, changes: CatalogueChanges) -> Catalogue:
        """With items more, of popularity 0."""
        rows = new.rename({"value": "semantic_id"})
        for name, dtype in self.table.schema.items():
            if name == "popularity":
                rows = rows.with_columns(pl.lit(0, dtype).alias(name))
            elif name in changes.attributes:
                values = changes.attributes[name].rename({"value": name})
                rows = rows.join(values, on="item_id", how="left", maintain_order="left")
            elif name not in rows.columns:
                rows = rows.with_columns(pl.lit(None, dtype).alias(name))
        table = pl.concat([self.table, rows.select(self.table.columns).cast(self.table.schema)])
        if table.n_chunks() > _CHUNKS:
            table = table.rechunk()
        codes = np.asarray(new["value"].explode().to_numpy(), np.int32).reshape(len(new), -1)
        ids = SemanticIds(np.concatenate([self.ids.codes, codes]), self.ids.codebook_sizes)
        index = _indexed(ids, table, self.index.leaf_codes(self.index.keyword_leaves))
        item_ids = self.item_ids.with_more(new["item_id"].to_list())
        return replace(self, table=table, ids=ids, index=index, item_ids=item_ids)

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
        schema = {name: type_ for name, type_ in self.table.schema.items() if name not in NO_ATTRIBUTES}
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


def _indexed(ids: SemanticIds, table: pl.DataFrame, reserved: NDArray[np.int32]) -> CatalogueIndex:
    return build_index(ids, -table["popularity"].to_numpy().astype(np.int64), reserved)


def _with_values(column: pl.Series, rows: NDArray[np.int64], values: pl.Series) -> pl.Series:
    """A column with other values in some rows. Of every type, also lists, of which Polars sets none in place."""
    source = np.arange(len(column))
    source[rows] = len(column) + np.arange(len(rows))
    return pl.concat([column, values.alias(column.name)]).gather(source)
