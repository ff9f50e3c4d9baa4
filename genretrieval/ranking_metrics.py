"""Metrics of a model that gives every shown item a probability: does it order, and can its numbers be believed.

Arrays are flat, one entry an impression: float scores or probabilities, and whether what they are about happened.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import InvalidInputError

Scores = NDArray[np.floating]
Labels = NDArray[np.bool_]
Groups = NDArray[np.integer]


def auc(scores: Scores, labels: Labels) -> float:
    """Area under the ROC curve: share of pairs of a positive and a negative that the scores order; a tie is half.

    By the rank sum of Mann and Whitney (1947); mean ranks of ties are halves of whole numbers, so the value is exact.

    Args:
        scores: float ``[n]``, any scale.
        labels: bool ``[n]``.

    Raises:
        InvalidInputError: lengths differ, a score is not a number, or one of the two labels does not occur.
    """
    return grouped_auc(scores, labels, np.zeros(len(labels), np.int64))


def grouped_auc(scores: Scores, labels: Labels, groups: Groups) -> float:
    """GAUC: `auc` of every group, averaged with the groups' impressions as weights.

    What ranks groups against each other (users who buy more, requests that are easier) counts nothing here. A group
    without both labels says nothing about order and is left out, weight and all (Zhu et al., KDD 2017).

    Args:
        scores: float ``[n]``, any scale; compared within a group only.
        labels: bool ``[n]``.
        groups: int ``[n]``, the user or the request of each impression, in any order.

    Raises:
        InvalidInputError: lengths differ, a score is not a number, or no group has both labels.
    """
    _check(scores, labels, groups)
    _, group = np.unique(groups, return_inverse=True)
    n_groups = int(group.max()) + 1 if len(group) else 0
    order = np.lexsort((scores, group))
    group, scores, labels = group[order], scores[order], labels[order]
    n, n_positive = (np.bincount(group, which, n_groups) for which in (None, labels))
    n_negative = n - n_positive
    # Every entry takes the mean of the ranks, from 1 within its group, that its ties hold together.
    changes = (scores[1:] != scores[:-1]) | (group[1:] != group[:-1])
    first = np.flatnonzero(np.append(True, changes)[: len(scores)])
    end = np.append(first[1:], len(scores))[: len(first)]
    mean_rank = np.repeat((first + 1 + end) / 2, end - first) - (np.cumsum(n) - n)[group]
    ranks = np.bincount(group[labels], mean_rank[labels], n_groups)
    decided = (n_positive > 0) & (n_negative > 0)
    if not decided.any():
        raise InvalidInputError("no group holds both labels, so there is no order to judge; take more impressions")
    pairs = (n_positive * n_negative)[decided]
    won = (ranks - n_positive * (n_positive + 1) / 2)[decided]
    return float(np.average(won / pairs, weights=n[decided]))


def expected_calibration_error(probabilities: Scores, labels: Labels, n_bins: int = 10) -> float:
    """ECE: how far predicted probabilities are from observed shares, in bins of equal numbers of impressions.

    ``sum_b n_b / n |mean label of b - mean probability of b|``, impressions put into bins in order of probability.
    Bins of equal width (Guo et al., ICML 2017) would hold nearly everything in one where rates are low. Of impressions
    with equal probability each counts as their mean label, so that which of them falls into which bin changes nothing.

    Args:
        probabilities: float ``[n]`` in ``[0, 1]``.
        labels: bool ``[n]``.
        n_bins: bins; no more than impressions are used.

    Raises:
        InvalidInputError: lengths differ, there is no impression or no bin, or a probability is outside ``[0, 1]``.
    """
    _check(probabilities, labels)
    if not len(labels) or n_bins < 1:
        raise InvalidInputError(f"{len(labels)} impressions, {n_bins} bins: give at least one of each")
    if probabilities.min() < 0 or probabilities.max() > 1:
        raise InvalidInputError("probabilities must lie in [0, 1]; scores of another scale cannot be calibrated")
    values, tie, n_tied = np.unique(probabilities, return_inverse=True, return_counts=True)
    observed = np.repeat(np.bincount(tie, labels) / n_tied, n_tied)
    difference = observed - np.repeat(values, n_tied).astype(np.float64)
    edges = np.linspace(0, len(labels), min(n_bins, len(labels)) + 1).astype(np.int64)
    return float(np.abs(np.add.reduceat(difference, edges[:-1])).sum() / len(labels))


def _check(scores: Scores, *others: NDArray[np.generic]) -> None:
    """Refuse what would be compared entry by entry and cannot be."""
    if any(other.shape != scores.shape for other in others) or scores.ndim != 1:
        shapes = ", ".join(str(array.shape) for array in (scores, *others))
        raise InvalidInputError(f"shapes {shapes}: scores and what stands beside them must be vectors of one length")
    if np.isnan(scores).any():
        raise InvalidInputError(f"score {int(np.isnan(scores).argmax())} is not a number; nothing can be ranked by it")
