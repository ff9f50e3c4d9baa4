"""Values of attributes by which results are collapsed, as one number an item."""

from __future__ import annotations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.errors import RequestError
from genretrieval.servable import NO_ATTRIBUTES, Catalogue


class CollapseValues:
    """Attributes of a catalogue, as numbers that are equal where values are.

    Of a list, such as `categories`, its first entry is the value. A column is made when it is first asked for and kept,
    in four bytes an item.
    """

    def __init__(self, catalogue: Catalogue) -> None:
        """Make nothing yet."""
        self.catalogue = catalogue
        self._columns: dict[str, NDArray[np.int32]] = {}

    def column(self, attribute: str) -> str:
        """Where the catalogue has an attribute; ``category`` is the first of `categories`.

        Raises:
            RequestError: nowhere.
        """
        column = "categories" if attribute == "category" else attribute
        known = sorted(set(self.catalogue.table.columns) - NO_ATTRIBUTES)
        if column not in known:
            raise RequestError(f"collapse_by unknown attribute {attribute!r}; the catalogue has {', '.join(known)}")
        return column

    def of(self, attribute: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The value of each of `rows`, int64 ``[len(rows)]``; -1 for an item that has none.

        Raises:
            RequestError: see `column`.
        """
        name = self.column(attribute)
        numbers = self._columns.get(name)
        if numbers is None:
            # Two threads may both make it, which is harmless.
            numbers = self._columns[name] = _numbered(self.catalogue.table[name])
        return numbers[rows].astype(np.int64)


def _numbered(values: pl.Series) -> NDArray[np.int32]:
    if isinstance(values.dtype, pl.List):
        values = values.list.first()
    texts = values.cast(pl.String)
    kinds = pl.Enum(texts.drop_nulls().unique())
    return texts.cast(kinds).to_physical().cast(pl.Int32).fill_null(-1).to_numpy()
