"""Collisions: from codes, which items may share, to the semantic IDs that are published.

A tokenizer gives like items like codes, so some items get equal ones. What is made of that is a choice of its own,
with a price of its own:

========  ==============================================  ====================================================
method    what it does                                    its price
========  ==============================================  ====================================================
none      a leaf of the index holds several items         their order under the leaf is not the generator's
dedup     one more level numbers the items of equal codes one more step of decoding; its codes mean nothing
reassign  the last code is moved to a free one            codes that are not the nearest: `Resolved.added_cost`
========  ==============================================  ====================================================

The dedup level is TIGER's (arXiv 2305.05065), reassignment is ZCR (arXiv 2605.25330).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from genretrieval.errors import DataError
from genretrieval.semantic_ids import Codes, SemanticIds
from genretrieval_tokenizers.tokenizer import BLOCK

Rows = NDArray[np.int64]
Costs = Callable[[Rows], NDArray[np.float32]]
"""Item rows ``[n]`` to `Tokenizer.last_level_costs` of them, float32 ``[n, codes of the last level]``."""

_HEADROOM = 16
_MOST_HEADROOM = 65_536


@dataclass(frozen=True, slots=True)
class CollisionConfig:
    """What becomes of items with equal codes.

    Attributes:
        method: "none", "dedup" or "reassign"; see the module.
        headroom: dedup only: codes of the dedup level beyond the largest group, for items that are appended later; at
            most 65,536. The generator has an output for every code, so an item can be appended without training it
            anew only while there is room, and room has its price.
        cap: none only: at most so many items of one SID are listed, None for all. Items under a leaf are listed by
            falling popularity, so the least popular ones are listed only where a request excludes others;
            `Resolved.notes` counts them.

    Raises:
        DataError: a setting is out of range, or the method ignores it.
    """

    method: Literal["none", "dedup", "reassign"] = "dedup"
    headroom: int = _HEADROOM
    cap: int | None = None

    def __post_init__(self) -> None:
        if self.method not in ("none", "dedup", "reassign"):
            raise DataError(f"collisions.method is {self.method!r}; choose none, dedup or reassign")
        if not 0 <= self.headroom <= _MOST_HEADROOM:
            raise DataError(
                f"collisions.headroom is {self.headroom}; it is a number of spare codes, 0 or more and at most "
                f"{_MOST_HEADROOM}, as the generator has an output for each"
            )
        if self.cap is not None and self.cap < 1:
            raise DataError(f"collisions.cap is {self.cap}; list at least 1 item of an SID, or leave it out for all")
        if self.method != "dedup" and self.headroom != _HEADROOM:
            raise DataError(
                f"collisions.headroom is spare codes of a dedup level, which method {self.method!r} has not; leave it "
                "out, or set method: dedup"
            )
        if self.method != "none" and self.cap is not None:
            raise DataError(
                f"collisions.cap limits the items of a shared SID, and method {self.method!r} lets none be shared; "
                "leave it out, or set method: none"
            )


@dataclass(frozen=True, slots=True)
class Resolved:
    """Semantic IDs, and what making them of codes cost.

    Attributes:
        ids: the IDs; published ones first where items were appended.
        moved: items whose last code is not the one that `encode` gave them.
        added_cost: what moving them added to the squared distance in the space that the last level quantises, mean
            over all items of the call (moved or not).
        notes: remarks for the report.
    """

    ids: SemanticIds
    moved: int = 0
    added_cost: float = 0.0
    notes: tuple[str, ...] = ()


def resolve(
    codes_NL: Codes, codebook_sizes: tuple[int, ...], config: CollisionConfig, costs: Costs | None = None
) -> Resolved:
    """Make semantic IDs of a catalogue's codes.

    Args:
        codes_NL: int32 ``[N, n_levels]``, what the tokenizer's `encode` gave.
        codebook_sizes: codes of each level.
        config: what becomes of collisions. "dedup" numbers the items of equal codes from 0 in row order, and its
            level has the size of the largest group plus `headroom`. "reassign" keeps all codes but the last, and gives
            the items of every prefix that holds a collision the last codes that together are cheapest (min-cost
            assignment; methods 4c: 8-24 % cheaper than one item after the other).
        costs: read by "reassign" alone, for the items it may move.

    Raises:
        DataError: a prefix has more items than the last level has codes, so that reassigning cannot make them unique.
    """
    if config.method == "none":
        return Resolved(SemanticIds(codes_NL, codebook_sizes), notes=_unlisted(codes_NL, config.cap))
    if config.method == "dedup":
        numbers_N = number_duplicates(codes_NL)
        last = int(numbers_N.max(initial=0)) + 1 + config.headroom
        return Resolved(SemanticIds(np.column_stack([codes_NL, numbers_N]), (*codebook_sizes, last)))
    assert costs is not None, "reassigning needs the costs of the last level"
    moved_NL, added = _reassign(codes_NL, codebook_sizes[-1], costs)
    return _moved(SemanticIds(moved_NL, codebook_sizes), codes_NL, added)


def append_codes(
    existing: SemanticIds, codes_NL: Codes, config: CollisionConfig, costs: Costs | None = None
) -> Resolved:
    """Add items: the published IDs first and unchanged, then those of the new rows.

    "dedup" continues the numbering of a tuple. "reassign" gives the new items, in row order, their own last code if
    it is free and the cheapest free one if not. So appending one by one is appending at once.

    Args:
        existing: the published IDs, made with `config`.
        codes_NL: int32 ``[N, n_levels]`` of the new items, by the tokenizer that published (nothing here can tell;
            `publish.append` does).
        config: what becomes of collisions.
        costs: read by "reassign" alone; its rows count from the first new item.

    Raises:
        DataError: the codes do not fit the published IDs, or an item finds no free code, in which case nothing is
            appended.
    """
    described = existing.n_levels - (config.method == "dedup")
    if codes_NL.shape[1] != described:
        raise DataError(
            f"the published IDs have {described} levels{' and a dedup level' if config.method == 'dedup' else ''}, the "
            f"new codes {codes_NL.shape[1]}: they are not from one tokenizer. IDs of two tokenizers name unrelated "
            "things by the same codes; load the tokenizer that published these"
        )
    if config.method == "none":
        ids = _extended(existing, codes_NL)
        return Resolved(ids, notes=_unlisted(ids.codes, config.cap))
    if config.method == "dedup":
        numbers_N = number_duplicates(codes_NL, existing.codes)
        _check_room(codes_NL, np.flatnonzero(numbers_N >= existing.codebook_sizes[-1]), existing, "headroom")
        return Resolved(_extended(existing, np.column_stack([codes_NL, numbers_N])))
    assert costs is not None, "reassigning needs the costs of the last level"
    new_NL, added = _place(existing, codes_NL, costs)
    return _moved(_extended(existing, new_NL), codes_NL, added)


def row_keys(codes_NL: NDArray[np.integer]) -> NDArray[np.int64]:
    """One number a row, int64 ``[N]``: equal for equal rows only, and sorted as rows are; codes are 0 or more."""
    keys_N = np.zeros(len(codes_NL), np.int64)
    bound = 1
    for codes_N in codes_NL.T:
        size = int(codes_N.max(initial=0)) + 1
        if bound * size > np.iinfo(np.int64).max:
            keys_N = np.unique(keys_N, return_inverse=True)[1].astype(np.int64)
            bound = len(keys_N)
        keys_N = keys_N * size + codes_N
        bound *= size
    return keys_N


def number_duplicates(codes_NL: Codes, published_PM: Codes | None = None) -> Codes:
    """Number the rows of equal codes 0, 1, ... in row order, int32 ``[N]``.

    Args:
        codes_NL: int32 ``[N, L]``.
        published_PM: int32 ``[P, L + 1]``, IDs whose last level holds numbers given out before; new rows continue
            after the highest one of their tuple, so the number of a deleted item in between is not given again.
    """
    published_PM = np.zeros((0, codes_NL.shape[1] + 1), np.int32) if published_PM is None else published_PM
    n_published = len(published_PM)
    order, starts = _groups(row_keys(np.concatenate([published_PM[:, :-1], codes_NL])))
    if not len(order):
        return np.zeros(0, np.int32)
    sizes = np.diff(starts, append=len(order))
    is_new = order >= n_published
    taken = np.where(is_new, 0, np.append(published_PM[:, -1] + 1, 0)[np.minimum(order, n_published)])
    # The sort is stable, so the published rows of a tuple come first, and new ones are ranked behind them.
    first = np.maximum.reduceat(taken, starts) - np.add.reduceat(~is_new, starts, dtype=np.int64)
    numbers = np.repeat(first - starts, sizes) + np.arange(len(order))
    out = np.empty(len(codes_NL), np.int32)
    out[order[is_new] - n_published] = numbers[is_new]
    return out


def _groups(keys_N: NDArray[np.int64]) -> tuple[Rows, Rows]:
    """Rows ordered by key, equal keys in row order, and where in that order each distinct key starts."""
    order = np.argsort(keys_N, kind="stable")
    sorted_keys = keys_N[order]
    return order, np.flatnonzero(np.diff(sorted_keys, prepend=-1))


def _collided(codes_NL: Codes) -> NDArray[np.bool_]:
    """Which rows are not the only ones of their codes, bool ``[N]``."""
    order, starts = _groups(row_keys(codes_NL))
    sizes = np.diff(starts, append=len(order))
    out = np.empty(len(order), np.bool_)
    out[order] = np.repeat(sizes > 1, sizes)
    return out


def _prefixes(codes_NL: Codes, wanted_N: NDArray[np.bool_]) -> Iterator[list[Rows]]:
    """Rows, in row order, of each prefix that has a wanted row; a list holds prefixes of about `BLOCK` rows.

    Costs are asked for a list at a time: a tokenizer pads what it is asked to `BLOCK` rows.
    """
    if not wanted_N.any():
        return
    order, starts = _groups(row_keys(codes_NL[:, :-1]))
    ends = np.append(starts[1:], len(order))
    touched = np.flatnonzero(np.logical_or.reduceat(wanted_N[order], starts))
    filled = np.cumsum(ends[touched] - starts[touched]) // BLOCK
    for batch in np.split(touched, np.flatnonzero(np.diff(filled)) + 1):
        yield [order[starts[group] : ends[group]] for group in batch]


def _priced(prefixes: list[Rows], costs: Costs) -> Iterator[tuple[Rows, NDArray[np.float64]]]:
    """Each prefix's rows with their costs ``[n, K]``, asked for at once."""
    cost_NK = costs(np.concatenate(prefixes)).astype(np.float64)
    yield from zip(prefixes, np.split(cost_NK, np.cumsum([len(rows) for rows in prefixes])[:-1]), strict=True)


def _reassign(codes_NL: Codes, n_codes: int, costs: Costs) -> tuple[Codes, float]:
    """Codes ``[N, L]`` unique by their last level, and the squared distance that was added in all."""
    _check_prefixes(codes_NL, n_codes)
    out_NL, added = codes_NL.copy(), 0.0
    for prefixes in _prefixes(codes_NL, _collided(codes_NL)):
        for rows, cost_NK in _priced(prefixes, costs):
            try:
                _, chosen = linear_sum_assignment(cost_NK)
            except ValueError as error:  # infeasible: too few codes have a finite cost
                exist = int(np.isfinite(cost_NK).any(axis=0).sum())
                raise _crowded(codes_NL[rows[0], :-1], len(rows), exist, 1) from error
            items = np.arange(len(rows))
            added += float((cost_NK[items, chosen] - cost_NK[items, codes_NL[rows, -1]]).sum())
            out_NL[rows, -1] = chosen
    return out_NL, added


def _check_prefixes(codes_NL: Codes, n_codes: int) -> None:
    """Refuse prefixes with more items than codes before anything is computed."""
    order, starts = _groups(row_keys(codes_NL[:, :-1]))
    sizes = np.diff(starts, append=len(order))
    if len(crowded := np.flatnonzero(sizes > n_codes)):
        raise _crowded(codes_NL[order[starts[crowded[0]]], :-1], int(sizes[crowded[0]]), n_codes, len(crowded))


def _crowded(prefix: Codes, n_items: int, n_codes: int, n_prefixes: int) -> DataError:
    return DataError(
        f"{n_items} items share the codes {tuple(prefix.tolist())} before the last level, which has {n_codes} codes "
        f"for them, so reassigning cannot give each an ID of its own (prefixes found with this fault: {n_prefixes}); "
        "set collisions.method: dedup, or fit with a larger last level, which helps where their vectors differ: a "
        "level has no more codes than there are distinct vectors"
    )


def _place(existing: SemanticIds, codes_NL: Codes, costs: Costs) -> tuple[Codes, float]:
    """Last codes for new rows that are free beside the published ones, and the squared distance added in all."""
    n_published, out_NL, added, full = existing.n_items, codes_NL.copy(), 0.0, []
    both_NL = np.concatenate([existing.codes, codes_NL])
    wanted_N = _collided(both_NL)
    wanted_N[:n_published] = False
    for prefixes in _prefixes(both_NL, wanted_N):
        new = [rows[rows >= n_published] - n_published for rows in prefixes]
        for rows, (new_rows, cost_NK) in zip(prefixes, _priced(new, costs), strict=True):
            free_K = np.ones(existing.codebook_sizes[-1], np.bool_)
            free_K[existing.codes[rows[rows < n_published], -1]] = False
            for row, cost_K in zip(new_rows.tolist(), cost_NK, strict=True):
                own = int(codes_NL[row, -1])
                chosen = own if free_K[own] else int(np.where(free_K, cost_K, np.inf).argmin())
                if not (free_K[chosen] and np.isfinite(cost_K[chosen])):
                    full.append(row)
                    continue
                free_K[chosen] = False
                out_NL[row, -1] = chosen
                added += float(cost_K[chosen] - cost_K[own])
    _check_room(codes_NL, np.array(sorted(full), np.int64), existing, "last level")
    return out_NL, added


def _check_room(codes_NL: Codes, full: Rows, existing: SemanticIds, larger: str) -> None:
    """Refuse new rows that found no free code, saying what giving them one would cost."""
    if len(full):
        raise DataError(
            f"{len(full)} of {len(codes_NL)} new items find no free code among the {existing.codebook_sizes[-1]} of "
            f"the last level, first new row {full[0]} with codes {tuple(codes_NL[full[0]].tolist())}; nothing was "
            f"appended. Leave these items out, or tokenize the whole catalogue again with a larger {larger}, which "
            "re-keys every published ID and needs a newly trained generator"
        )


def _extended(existing: SemanticIds, new_NL: Codes) -> SemanticIds:
    return SemanticIds(np.concatenate([existing.codes, new_NL.astype(np.int32)]), existing.codebook_sizes)


def _moved(ids: SemanticIds, codes_NL: Codes, added: float) -> Resolved:
    """The outcome of moving last codes; the rows of `codes_NL` are the last ones of `ids`."""
    n = len(codes_NL)
    moved = int((ids.codes[ids.n_items - n :, -1] != codes_NL[:, -1]).sum())
    mean = added / n if n else 0.0
    note = f"reassigning moved the last code of {moved:,} of {n:,} items; squared distance per item +{mean:.3g}"
    return Resolved(ids, moved, mean, (note,) if moved else ())


def _unlisted(codes_NL: Codes, cap: int | None) -> tuple[str, ...]:
    """How many items a cap hides."""
    if cap is None:
        return ()
    _, sizes = np.unique(row_keys(codes_NL), return_counts=True)
    beyond = sizes[sizes > cap] - cap
    if not len(beyond):
        return ()
    return (
        f"{int(beyond.sum()):,} of {len(codes_NL):,} items are listed only where others of their SID are excluded: "
        f"{len(beyond):,} SIDs have more than {cap} items, and a response lists the {cap} most popular ones",
    )
