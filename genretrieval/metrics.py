"""Ranking metrics over item rows, as every model and baseline is measured.

Ranked lists are int32 ``[n_cases, k]`` of item rows, best first, `NOTHING` where a list is shorter. The
relevant items of case i are ``relevant[offsets[i]:offsets[i + 1]]``; each case has at least one. Semantic IDs
are measured by the same functions: `SidGroups` turns both sides from item rows into SID rows first.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import InvalidInputError
from genretrieval.figures import Figure
from genretrieval.semantic_ids import Codes

Rows = NDArray[np.int32]
Offsets = NDArray[np.int64]
PerCase = NDArray[np.float64]

NOTHING = -1
BUCKETS = (0, 1, 5, 10, 20, 50, 100)  # first training count of each popularity bucket


def hits(ranked: Rows, relevant: Rows, offsets: Offsets) -> NDArray[np.bool_]:
    """Which places of each list hold a relevant item; a repeated item is a hit the first time only.

    Args:
        ranked: int32 ``[n_cases, k]``.
        relevant: int32, relevant rows of all cases, case after case.
        offsets: int64 ``[n_cases + 1]`` into `relevant`.

    Returns:
        bool ``[n_cases, k]``.

    Raises:
        InvalidInputError: if the cases differ in number, or a case has nothing relevant.
    """
    relevant_keys = np.unique(_relevant_keys(ranked, relevant, offsets))
    keys = np.arange(len(ranked), dtype=np.int64)[:, None] << 32 | np.where(ranked == NOTHING, 0, ranked)
    hit = np.isin(keys, relevant_keys) & (ranked != NOTHING)
    places = np.flatnonzero(hit)
    first = np.unique(keys.ravel()[places], return_index=True)[1]
    once = np.zeros(hit.size, np.bool_)
    once[places[first]] = True
    return once.reshape(hit.shape)


def recall(ranked: Rows, relevant: Rows, offsets: Offsets, k: int) -> PerCase:
    """Recall@k of each case: relevant items among the first k places / all its relevant items.

    With one relevant item a case this is the hit rate. See `hits` for the arguments.

    Returns:
        float64 ``[n_cases]`` in ``[0, 1]``.
    """
    _check_k(ranked, k)
    found = hits(ranked[:, :k], relevant, offsets).sum(axis=1)
    return np.asarray(found / _n_relevant(ranked, relevant, offsets), np.float64)


def ndcg(ranked: Rows, relevant: Rows, offsets: Offsets, k: int) -> PerCase:
    """NDCG@k of each case with binary gains (Järvelin and Kekäläinen, 2002).

    The sum of ``1 / log2(place + 1)`` over hits, places from 1, over its best value: all relevant items,
    at most k, on the first places.

    Returns:
        float64 ``[n_cases]`` in ``[0, 1]``.
    """
    _check_k(ranked, k)
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gained = hits(ranked[:, :k], relevant, offsets) @ discount
    best = np.cumsum(discount)[np.minimum(_n_relevant(ranked, relevant, offsets), k) - 1]
    return np.asarray(gained / best, np.float64)


def mean_with_interval(values: PerCase, *, seed: int, n_resamples: int = 1000, level: float = 0.95) -> Figure:
    """Mean over cases, with the percentile bootstrap interval over cases as its spread.

    Resampling n cases with replacement is a multinomial draw over the distinct values, of which a metric at k
    has a handful; so this is the exact bootstrap at a cost that hardly grows with the number of cases.

    Args:
        values: float64 ``[n_cases]``.
        seed: of the resampling.
        n_resamples: bootstrap samples.
        level: coverage of the interval.

    Raises:
        InvalidInputError: if there is no case.
    """
    if not len(values):
        raise InvalidInputError("no case to average over; the split or the cohort is empty")
    distinct, counts = np.unique(values, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(values), counts / len(values), size=n_resamples)
    means = draws @ distinct / len(values)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Figure(float(values.mean()), "share", (float(low), float(high)))


def recall_and_ndcg(
    ranked: Rows, relevant: Rows, offsets: Offsets, *, seed: int, cutoffs: tuple[int, ...] = (5, 10)
) -> dict[str, Figure]:
    """``recall5``, ``ndcg5``, ``recall10``, ``ndcg10`` with intervals: a row of the quality table."""
    figures = {}
    for k in cutoffs:
        figures[f"recall{k}"] = mean_with_interval(recall(ranked, relevant, offsets, k), seed=seed)
        figures[f"ndcg{k}"] = mean_with_interval(ndcg(ranked, relevant, offsets, k), seed=seed)
    return figures


@dataclass(frozen=True, slots=True)
class SidGroups:
    """Items that share a semantic ID, for SID-level metrics beside item-level ones.

    Give the codes *before* a dedup level: with it every item is a group of its own. An SID-level figure is
    what papers without a dedup level print; it can be twice the item-level one.

    Attributes:
        of_item: int32 ``[n_items]``, the SID row of each item.
        n_sids: distinct SIDs.
    """

    of_item: Rows
    n_sids: int

    @classmethod
    def from_codes(cls, codes: Codes) -> SidGroups:
        """Group the rows of int32 ``[n_items, n_levels]``."""
        distinct, of_item = np.unique(codes, axis=0, return_inverse=True)
        return cls(of_item.reshape(-1).astype(np.int32), len(distinct))

    def ranked(self, ranked: Rows) -> Rows:
        """Distinct SIDs of each list by first appearance, int32 of the same shape, then `NOTHING`."""
        sids = np.where(ranked == NOTHING, NOTHING, self.of_item[ranked])
        repeated = (sids[:, :, None] == sids[:, None, :]) & np.tri(sids.shape[1], k=-1, dtype=np.bool_)
        dropped = repeated.any(axis=2) | (sids == NOTHING)
        order = np.argsort(dropped, axis=1, kind="stable")
        return np.take_along_axis(np.where(dropped, NOTHING, sids), order, axis=1).astype(np.int32)

    def relevant(self, relevant: Rows) -> Rows:
        """SID rows of relevant items; offsets stay valid, and the metrics count a repeated SID once."""
        return self.of_item[relevant]

    def collision_rate(self) -> float:
        """Share of items that share their SID with another item."""
        group_sizes = np.bincount(self.of_item, minlength=self.n_sids)
        return float((group_sizes[self.of_item] > 1).mean())


def catalogue_coverage(ranked: Rows, n_items: int, k: int) -> float:
    """Share of the catalogue that occurs in the first k places of any list."""
    _check_k(ranked, k)
    top = ranked[:, :k]
    return len(np.unique(top[top != NOTHING])) / n_items


def exposure_gini(ranked: Rows, n_items: int, k: int) -> float:
    """Gini coefficient of how often each item of the catalogue is shown: 0 all equally, towards 1 a few only.

    Raises:
        InvalidInputError: if the lists show nothing.
    """
    _check_k(ranked, k)
    top = ranked[:, :k]
    shown = np.sort(np.bincount(top[top != NOTHING], minlength=n_items))
    if not shown.sum():
        raise InvalidInputError("no list holds an item; exposure has no distribution")
    places = 2 * np.arange(1, n_items + 1) - n_items - 1
    return float((places * shown).sum() / (n_items * shown.sum()))


def unfilled_rate(ranked: Rows, k: int) -> float:
    """Share of the first k places that came back empty."""
    _check_k(ranked, k)
    return float((ranked[:, :k] == NOTHING).mean())


def invalid_rate(generated: Codes, codes: Codes) -> float:
    """Share of generated SIDs that name no item: 0 by construction for a constrained beam.

    Args:
        generated: int32 ``[..., n_levels]``, whatever the model emitted.
        codes: int32 ``[n_items, n_levels]``, the catalogue.
    """
    flat = generated.reshape(-1, generated.shape[-1])
    both, row = np.unique(np.concatenate([codes, flat]), axis=0, return_inverse=True)
    valid = np.zeros(len(both), np.bool_)
    row = row.reshape(-1)
    valid[row[: len(codes)]] = True
    return float((~valid[row[len(codes) :]]).mean())


def long_tail(train_counts: NDArray[np.int64], share: float = 0.2) -> NDArray[np.bool_]:
    """The long tail: the least popular items that together make at most `share` of all training interactions.

    The last of the three parts (short head, middle, distant tail) into which recommender studies cut the
    popularity curve by interactions (Abdollahpouri et al., 2019). Items without a training interaction are
    *cold* and not part of it. Items with equal counts are never parted: they fit in together or stay out.

    Returns:
        bool ``[n_items]``.
    """
    levels, items_at = np.unique(train_counts, return_counts=True)
    reached = np.cumsum(levels * items_at) <= share * train_counts.sum()
    return (train_counts > 0) & np.isin(train_counts, levels[reached])


def cohorts(relevant: Rows, offsets: Offsets, train_counts: NDArray[np.int64]) -> dict[str, NDArray[np.bool_]]:
    """Disjoint masks over cases by their target's popularity; of several targets the most popular one counts.

    Returns:
        bool ``[n_cases]`` each: ``cold`` (no training interaction), ``long_tail``, ``head`` (the rest).
    """
    target = _most_popular(relevant, offsets, train_counts)
    cold, tail = train_counts[target] == 0, long_tail(train_counts)[target]
    return {"cold": cold, "long_tail": tail, "head": ~(cold | tail)}


def popularity_buckets(
    relevant: Rows, offsets: Offsets, train_counts: NDArray[np.int64]
) -> dict[str, NDArray[np.bool_]]:
    """Masks over cases by the training count of their (most popular) target: "0", "1-4", ..., "100+"."""
    counts = train_counts[_most_popular(relevant, offsets, train_counts)]
    bucket = np.searchsorted(BUCKETS, counts, side="right") - 1
    ends = (*(f"-{b - 1}" for b in BUCKETS[2:]), "+")
    names = ["0"] + [f"{first}{end}" for first, end in zip(BUCKETS[1:], ends, strict=True)]
    return {name: bucket == i for i, name in enumerate(names)}


def _most_popular(relevant: Rows, offsets: Offsets, train_counts: NDArray[np.int64]) -> Rows:
    """The relevant item of each case with the most training interactions; the first of equals."""
    case = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    order = np.lexsort((-train_counts[relevant], case))
    return relevant[order[offsets[:-1]]]


def _relevant_keys(ranked: Rows, relevant: Rows, offsets: Offsets) -> NDArray[np.int64]:
    """(case, row) of every relevant item in one integer; checks the shapes on the way."""
    if len(offsets) != len(ranked) + 1:
        raise InvalidInputError(f"{len(ranked)} ranked lists, but offsets for {len(offsets) - 1} cases")
    lengths = np.diff(offsets)
    if (lengths < 1).any():
        raise InvalidInputError(f"case {np.argmin(lengths)} has no relevant item; leave such cases out of the metric")
    return np.repeat(np.arange(len(ranked), dtype=np.int64), lengths) << 32 | relevant


def _n_relevant(ranked: Rows, relevant: Rows, offsets: Offsets) -> NDArray[np.int64]:
    """Distinct relevant items of each case, int64 ``[n_cases]``."""
    return np.bincount(np.unique(_relevant_keys(ranked, relevant, offsets)) >> 32, minlength=len(ranked))


def _check_k(ranked: Rows, k: int) -> None:
    """A metric at k of shorter lists would be another metric under the same name."""
    if not 1 <= k <= ranked.shape[1]:
        raise InvalidInputError(f"metric at {k} asked of lists of {ranked.shape[1]}; retrieve at least {k} items")
