"""Two rankings made one, by their ranks alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genretrieval.errors import InvalidInputError
from genretrieval.metrics import NOTHING, recall
from genretrieval_pipelines.baselines.ranking import Ranked
from genretrieval_pipelines.cases import Cases

WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def blend(lists: Sequence[Ranked], weights: Sequence[float], k: int, *, constant: float = 60.0) -> Ranked:
    """Weighted reciprocal rank fusion (Cormack, Clarke and Büttcher, SIGIR 2009).

    An item scores ``sum of weight / (constant + place)`` over the lists that hold it, places from 1.

    Args:
        lists: int32 ``[n_cases, k_i]`` each, of the same cases; no list repeats an item.
        weights: one a list, not negative; a list of weight 0 adds nothing, not even its items.
        k: length of the result.
        constant: how slowly a place loses its worth; 60 is the paper's.

    Returns:
        int32 ``[n_cases, k]``, best first, `NOTHING` at the end of short lists; ties: lower item row first.

    Raises:
        InvalidInputError: if lists and weights differ in number, or a weight is negative.
    """
    if len(lists) != len(weights) or min(weights, default=-1.0) < 0:
        raise InvalidInputError(f"{len(lists)} lists and weights {list(weights)}: expected one weight >= 0 a list")
    n_cases = len(lists[0])
    keys, worth = [], []
    for ranked, weight in zip(lists, weights, strict=True):
        case, place = np.nonzero((ranked != NOTHING) & (weight > 0))
        keys.append(case.astype(np.int64) << 32 | ranked[case, place])
        worth.append(weight / (constant + place + 1))
    found, where = np.unique(np.concatenate(keys), return_inverse=True)
    scores = np.bincount(where, weights=np.concatenate(worth), minlength=len(found))
    case, item = found >> 32, found & 0xFFFFFFFF
    order = np.lexsort((item, -scores, case))
    case, item = case[order], item[order]
    place = np.arange(len(case)) - np.searchsorted(case, case)
    kept = place < k
    blended = np.full((n_cases, k), NOTHING, np.int32)
    blended[case[kept], place[kept]] = item[kept]
    return blended


def choose_weight(ours: Ranked, other: Ranked, cases: Cases, *, k: int = 10) -> float:
    """The share of `other` in ``blend([ours, other], [1 - share, share], k)`` that gives the best Recall@k.

    Choose on validation, report on test. Equal recalls: the smaller share.

    Args:
        ours: int32 ``[n_cases, k_ours]``.
        other: int32 ``[n_cases, k_other]``.
        cases: the validation cases that both lists answer.
        k: cut-off of the recall.

    Returns:
        One of `WEIGHTS`.
    """
    recalls = [
        recall(blend([ours, other], [1 - w, w], k), cases.relevant, cases.relevant_offsets, k).mean() for w in WEIGHTS
    ]
    return WEIGHTS[int(np.argmax(recalls))]
