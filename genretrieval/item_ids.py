"""The ids of a catalogue's items, and which row each has, in as few bytes as that takes.

A million Python strings and a dictionary of them are well over a hundred bytes an item, and to look one up is several
reads from memory that no cache holds, each after the other. Here the ids are one block of text, and a hash table of
flat arrays tells their rows: what is looked up together waits for memory together, not in turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.catalogue import runs

# Ids that are Python strings at one time: no other thread runs while they are made.
_AT_ONCE = 20_000
# Ids up to which one after the other is faster than all at once.
_FEW = 12
# Ends every text in a block, so that none is the beginning of another. An id that has it is kept apart.
_END = "\0"
# Behind the last text; no text has it.
_BEYOND = b"\xff"
# A share of the places that hold an id. In a fuller table factors are longer looked for.
_FILLED = 0.7
_HASH = (1 << 64) - 1


class ItemIds:
    """Ids by item row, and item rows by id: a bundle's, and behind them the few that came later.

    It is immutable; what grows from it shares the bundle's, because to copy those holds up every other thread.
    """

    def __init__(self, item_ids: pl.Series | Sequence[str]) -> None:
        """Index `item_ids`, row by row; each is there once."""
        self._of_bundle = _Table(pl.Series(item_ids, dtype=pl.String))
        self._later: list[str] = []
        # Rows of what the table does not hold.
        self._apart = self._of_bundle.apart

    def with_more(self, more: Sequence[str]) -> ItemIds:
        """These, then `more`, which are not among these."""
        grown = object.__new__(ItemIds)
        grown._of_bundle = self._of_bundle
        grown._later = [*self._later, *more]
        grown._apart = self._apart | {item: row for row, item in enumerate(more, len(self))}
        return grown

    def continues(self, before: ItemIds) -> bool:
        """Whether these are `before` and what came later, so that rows mean what they meant."""
        return self._of_bundle is before._of_bundle and self._later[: len(before._later)] == before._later

    def rows_of(self, item_ids: pl.Series | Sequence[str]) -> NDArray[np.int64]:
        """Item rows, int64 ``[len(item_ids)]``, -1 for items that it does not have."""
        if isinstance(item_ids, pl.Series):
            return np.concatenate([np.empty(0, np.int64), *map(self.rows_of, _parts(item_ids))])
        rows = self._of_bundle.rows_of(item_ids)
        if self._apart:
            for place in (rows < 0).nonzero()[0].tolist():
                rows[place] = self._apart.get(item_ids[place], -1)
        return rows

    def row_of(self, item_id: str) -> int | None:
        """The row of one item; of many, ask for all at once."""
        row = self._of_bundle.row_of(item_id)
        return self._apart.get(item_id) if row < 0 else row

    def __contains__(self, item_id: str) -> bool:
        """Whether it has this item; of many, ask for the rows of all at once."""
        return self.row_of(item_id) is not None

    def __getitem__(self, row: int) -> str:
        """The id of a row; rows below 0 count from the end.

        Raises:
            IndexError: there is no such row.
        """
        at = row + len(self) if row < 0 else row
        if not 0 <= at < len(self):
            raise IndexError(f"no item has row {row}; there are {len(self)}")
        n_bundle = len(self._of_bundle)
        return self._of_bundle[at] if at < n_bundle else self._later[at - n_bundle]

    def __iter__(self) -> Iterator[str]:
        """All ids, row by row."""
        return chain(map(self._of_bundle.__getitem__, range(len(self._of_bundle))), self._later)

    def __len__(self) -> int:
        """Number of items."""
        return len(self._of_bundle) + len(self._later)


class _Table:
    """The ids of a bundle's items: their text by row, and their rows by hash.

    A hash table without collisions (hash and displace, Belazzougui, Botelho and Dietzfelbinger 2009). Ids whose hashes
    end with the same bits are a bucket, and every bucket has a factor by which those hashes fall on places that no
    other id has. So an id is in one place or nowhere, and the text there tells which. The hash is Python's own, keyed
    anew in every process.

    Attributes:
        apart: rows of the ids that are not in the table: those with `_END`, and any for which no factor was found.
    """

    def __init__(self, item_ids: pl.Series) -> None:
        self.apart: dict[str, int] = {}
        texts, sizes, hashes, n = [], [np.zeros(1, np.int64)], [np.empty(0, np.uint64)], 0
        for part in _parts(item_ids):
            text = _joined(part)
            ends = _ends(text)
            if len(ends) != len(part):
                ends = np.fromiter((len(_joined([item])) for item in part), np.int64, len(part)).cumsum()
                self.apart |= {item: row for row, item in enumerate(part, n) if _END in item}
            texts.append(text)
            sizes.append(_sizes(ends))
            hashes.append(_hashes(part))
            n += len(part)
        starts = np.concatenate(sizes).cumsum()
        self._starts = starts.astype(np.uint32) if starts[-1] < 1 << 32 else starts
        self._text = b"".join([*texts, _BEYOND])
        self._bytes = np.frombuffer(self._text, np.uint8)
        self._factors, self._rows, placeless = _placed(np.concatenate(hashes))
        # A single number is read from these in a third of the time.
        self._start, self._factor, self._row = self._starts.data, self._factors.data, self._rows.data
        self.apart |= {self[row]: row for row in placeless}

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> str:
        return self._text[self._start[row] : self._start[row + 1] - 1].decode()

    def row_of(self, item_id: str) -> int:
        """The row of one item, -1 for none."""
        hashed = hash(item_id) & _HASH
        factor = self._factor[hashed & (len(self._factor) - 1)]
        row: int = self._row[((hashed * factor & _HASH) >> 32) * len(self._row) >> 32]
        text, start = _joined([item_id]), self._start[row]
        # One that is kept apart has an end within it: of its text another id may be the beginning.
        there = self._text.startswith(text, start) and self._start[row + 1] - start == len(text)
        return row if there and _END not in item_id else -1

    def rows_of(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """As `ItemIds.rows_of`."""
        if len(item_ids) <= _FEW or not len(self):
            return self._one_by_one(item_ids)
        text = np.frombuffer(_joined(item_ids), np.uint8)
        ends = _ends(text)
        if len(ends) != len(item_ids):
            return self._one_by_one(item_ids)
        hashes = _hashes(item_ids)
        factors = self._factors[(hashes & (len(self._factors) - 1)).view(np.int64)]
        rows = self._rows[_places(hashes, factors, len(self._rows))].astype(np.int64)
        sizes = _sizes(ends)
        bytes_ = (self._starts[rows] - (ends - sizes)).repeat(sizes)
        bytes_ += np.arange(len(text))
        # A long id that it does not have may lie in part beyond all texts.
        differ = (self._bytes.take(bytes_, mode="clip") != text).nonzero()[0]
        other = self._starts[rows + 1] - self._starts[rows] != sizes
        if len(differ):
            other[np.searchsorted(ends, differ, side="right")] = True
        rows[other] = -1
        return rows

    def _one_by_one(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        return np.fromiter(map(self.row_of, item_ids), np.int64, len(item_ids))


def _placed(hashes: NDArray[np.uint64]) -> tuple[NDArray[np.uint8], NDArray[np.int32], list[int]]:
    """A place for each of `hashes`, uint64 ``[n]``.

    Large buckets come first, as long as there is room. All buckets of a size try a factor at once; of two that want the
    same place one gets it.

    Returns:
        uint8, the odd factor of each bucket; int32, which of `hashes` is at each place, 0 where none is; and those
        that have no place.
    """
    n, factors = len(hashes), np.ones(1 << max(0, len(hashes).bit_length() - 1), np.uint8)
    held = np.full(int(n / _FILLED) + 1, -1, np.int32)
    buckets = (hashes & (len(factors) - 1)).view(np.int64)
    by_bucket = buckets.argsort()
    first, sizes = runs(buckets[by_bucket])
    placeless: list[int] = []
    for size in range(int(sizes.max(initial=0)), 0, -1):
        rows = by_bucket[first[sizes == size][:, None] + np.arange(size)]
        for factor in range(1, 256, 2):
            if not len(rows):
                break
            places = _places(hashes[rows], np.uint64(factor), len(held))
            free = (held[places] < 0).all(1)
            held[places[free]] = rows[free]
            won = (held[places] == rows).all(1)
            lost, lost_rows = places[free & ~won], rows[free & ~won]
            held[lost[held[lost] == lost_rows]] = -1
            factors[buckets[rows[won, 0]]] = factor
            rows = rows[~won]
        placeless += rows.ravel().tolist()
    return factors, np.maximum(held, 0), placeless


def _places(hashes: NDArray[np.uint64], factors: NDArray[np.uint8] | np.uint64, n_places: int) -> NDArray[np.int64]:
    """The place of each of `hashes` by its factor."""
    half = np.uint64(32)
    places: NDArray[np.int64] = ((hashes * factors >> half) * np.uint64(n_places) >> half).view(np.int64)
    return places


def _parts(item_ids: pl.Series) -> Iterator[list[str]]:
    """All, some at a time."""
    return (item_ids.slice(at, _AT_ONCE).to_list() for at in range(0, len(item_ids), _AT_ONCE))


def _hashes(texts: Sequence[str]) -> NDArray[np.uint64]:
    """uint64 ``[len(texts)]``."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def _joined(texts: Sequence[str]) -> bytes:
    """UTF-8 of `texts`, each with its end. Half a character is in no item's id, and can be asked for."""
    return (_END.join(texts) + _END).encode("utf-8", "surrogatepass")


def _ends(text: bytes | NDArray[np.uint8]) -> NDArray[np.int64]:
    """Behind which bytes of a block its texts end: int64 ``[n]``."""
    found: NDArray[np.int64] = (np.frombuffer(text, np.uint8) == 0).nonzero()[0]
    return found + 1


def _sizes(ends: NDArray[np.int64]) -> NDArray[np.int64]:
    """Bytes of each text, with its end: int64 ``[n]``."""
    sizes = ends.copy()
    sizes[1:] -= ends[:-1]
    return sizes
