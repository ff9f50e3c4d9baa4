"""Items that may answer a request: put together from what searches found, then put in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from genretrieval.edits import Pin

Rows = NDArray[np.integer[Any]]


def contains(rows: Rows, asked: Rows) -> NDArray[np.bool_]:
    """Which of `asked` are among the sorted `rows`, bool ``[len(asked)]``; costs what `asked` are."""
    if not len(rows):
        return np.zeros(len(asked), bool)
    asked = asked.astype(rows.dtype, copy=False)
    found: NDArray[np.bool_] = rows[np.minimum(np.searchsorted(rows, asked), len(rows) - 1)] == asked
    return found


@dataclass(frozen=True, slots=True)
class Candidates:
    """Items that may answer a request, each once.

    Attributes:
        rows: int64 ``[n]``, item rows.
        logp: float32 ``[n]``, summed log-probability of an item's codes. An item that no beam wrote has that of the
            last beam, which is at least as high as its own.
        beams: int64 ``[n]``, rows of `level_scores`; -1 for an item that no beam wrote.
        level_scores: float32 ``[n_beams, n_levels]``, log-probability of each code.
    """

    rows: NDArray[np.int64]
    logp: NDArray[np.float32]
    beams: NDArray[np.int64]
    level_scores: NDArray[np.float32]

    def __len__(self) -> int:
        """Number of items."""
        return len(self.rows)

    def with_unwritten(self, rows: NDArray[np.int64], logp: float) -> Candidates:
        """These, then `rows`, which no beam wrote and which are not among these."""
        return Candidates(
            np.concatenate([self.rows, rows]),
            np.concatenate([self.logp, np.full(len(rows), logp, np.float32)]),
            np.concatenate([self.beams, np.full(len(rows), -1, np.int64)]),
            self.level_scores,
        )

    def joined(self, other: Candidates) -> Candidates:
        """These, then those of `other` that are not among them."""
        new = ~np.isin(other.rows, self.rows)
        beams = other.beams[new]
        return Candidates(
            np.concatenate([self.rows, other.rows[new]]),
            np.concatenate([self.logp, other.logp[new]]),
            np.concatenate([self.beams, np.where(beams < 0, beams, beams + len(self.level_scores))]),
            np.concatenate([self.level_scores, other.level_scores]),
        )


def in_order(scores: NDArray[np.floating[Any]], at_most: int | None = None) -> list[int]:
    """Positions by falling score, equal ones as they stand; the first `at_most`, which costs less than all."""
    falling = -scores
    best = np.arange(len(scores))
    if at_most is not None and at_most < len(scores):
        # Written so that a NaN comes last, as in sorting, and is not lost.
        best = np.flatnonzero(~(falling > np.partition(falling, at_most - 1)[at_most - 1]))
    order: list[int] = best[np.argsort(falling[best], kind="stable")][:at_most].tolist()
    return order


def with_blocks(order: list[int], blocks: Sequence[tuple[int, NDArray[np.bool_]]]) -> list[int]:
    """`order` with the members of each block moved up to a place, one after another as they stood.

    Args:
        order: positions, best first.
        blocks: a place, and bool ``[n]``, the positions that are its members. One that stands before the place already
            stays; one of several blocks goes to the first place.
    """
    moved: dict[int, int] = {}
    for place, members in sorted(blocks, key=lambda block: block[0]):
        late = [position for position in order[place:] if members[position]]
        moved = dict.fromkeys(late, place) | moved
    if not moved:
        return order
    result = [position for position in order if position not in moved]
    for place in sorted(set(moved.values()), reverse=True):
        result[place:place] = [position for position in order if moved.get(position) == place]
    return result


def collapsed(
    order: Sequence[int], rows: Rows, pins: Sequence[Pin], values: NDArray[np.int64], *, cap: int, top_k: int
) -> tuple[list[int], list[Pin]]:
    """`order` and `pins` without what comes after `cap` items of one value.

    Pins that stand within the result count first, by their places; then the others, best first; then later pins.

    Args:
        order: positions in `rows`, best first.
        rows: item rows; those of all pins are among them.
        pins: as `with_pins` takes them.
        values: ``[n]``, equal for items of one value; below 0 for an item that has none and counts alone.
        cap: items of a value.
        top_k: length of the result at most.
    """
    best_first = np.asarray(order, np.int64)
    position_of = {pin.row: int(np.flatnonzero(rows == pin.row)[0]) for pin in pins}
    by_place = sorted(pins, key=lambda pin: pin.position)
    pinned = np.asarray(list(dict.fromkeys(position_of[pin.row] for pin in by_place)), np.int64)
    n_shown = len({pin.row for pin in pins if pin.position < top_k})
    others = best_first[~np.isin(best_first, pinned)]
    counted = np.concatenate([pinned[:n_shown], others, pinned[n_shown:]])
    of_value = values[counted]
    by_value = np.argsort(of_value, kind="stable")
    nth = np.empty(len(counted), np.int64)
    nth[by_value] = np.arange(len(counted)) - np.searchsorted(of_value[by_value], of_value[by_value])
    kept = np.zeros(len(rows), bool)
    kept[counted] = (nth < cap) | (of_value < 0)
    return best_first[kept[best_first]].tolist(), [pin for pin in pins if kept[position_of[pin.row]]]


def with_pins(order: Sequence[int], rows: NDArray[np.int64], pins: Sequence[Pin], top_k: int) -> list[int]:
    """The first `top_k` positions of `order` with pinned items at their places.

    Where there are not enough items to fill the places before a pin, it moves up.

    Args:
        order: positions in `rows`, best first.
        rows: int64 ``[n]``, item rows; those of all pins are among them.
        pins: the first of two at one place stands there.
        top_k: length of the result at most.
    """
    at: dict[int, int] = {}
    taken: set[int] = set()
    for pin in pins:
        if pin.row not in taken:
            place = pin.position
            while place in at:
                place += 1
            at[place] = pin.row
            taken.add(pin.row)
    if not at:
        return list(order[:top_k])
    position_of = {int(rows[position]): position for position in order if int(rows[position]) in taken}
    others = iter([position for position in order if int(rows[position]) not in taken])
    placed = [position_of[row] for _, row in sorted(at.items())]
    result: list[int] = []
    while len(result) < top_k:
        if len(result) in at:
            following: int | None = position_of[at[len(result)]]
        else:
            following = next(others, None)
        if following is None:
            left = [position for position in placed if position not in result]
            return (result + left)[:top_k]
        result.append(following)
    return result


def batches(rows: Sequence[int], sizes: Sequence[int], limit: int) -> Iterator[list[int]]:
    """Consecutive `rows` whose `sizes` sum to at most `limit`, which no single one exceeds."""
    batch: list[int] = []
    total = 0
    for row, size in zip(rows, sizes, strict=True):
        if batch and total + size > limit:
            yield batch
            batch, total = [], 0
        batch.append(row)
        total += size
    if batch:
        yield batch
