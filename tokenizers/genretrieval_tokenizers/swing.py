"""Swing: which items are taken together by users who otherwise differ.

Yang et al., "Large Scale Product Graph Construction for Recommendation in E-commerce" (arXiv 2010.05525), section 3.
QuaSID and AdaSID train on its pairs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from genretrieval.errors import DataError

_USERS_AT_A_TIME = 2048
"""Rows of the user-by-user product held in memory at once."""


@dataclass(frozen=True, slots=True)
class SwingPairs:
    """The items most strongly tied to each item.

    Attributes:
        pairs: int32 ``[P, 2]``, rows of (trigger, target); sorted by trigger, then falling score, then target.
        scores: float32 ``[P]``, Swing score of each pair, above 0.
    """

    pairs: NDArray[np.int32]
    scores: NDArray[np.float32]


def swing_pairs(
    sequences: Iterable[NDArray[np.integer]],
    n_items: int,
    *,
    per_item: int = 20,
    alpha: float = 1.0,
    max_users_per_item: int = 500,
) -> SwingPairs:
    """Score item pairs by the user pairs that took both, and keep the best targets of each item.

    ``s(i, j) = sum over users u < v that both took i and j of w_u w_v / (alpha + |I_u ∩ I_v|)`` with
    ``w_u = 1 / sqrt(|I_u|)``: two users who share little but i and j say more than two who share everything.

    Args:
        sequences: item rows of each user, in any order; an item counts once a user.
        n_items: items of the catalogue; rows lie in ``[0, n_items)``.
        per_item: targets kept of each trigger.
        alpha: smoothing; the larger, the less it matters how much two users share.
        max_users_per_item: of an item with more users, those with the fewest items are kept (at a tie the earlier
            user), because their pairs weigh most. Cost grows with the square of it.

    Returns:
        The pairs. An item that no two users share with another item is in none.

    Raises:
        DataError: a setting is out of range, or a row lies outside the catalogue.
    """
    if per_item < 1 or max_users_per_item < 2 or alpha <= 0:
        raise DataError(
            f"Swing with per_item {per_item}, max_users_per_item {max_users_per_item}, alpha {alpha}: they must be at "
            "least 1, at least 2 and above 0; one user, or no smoothing of an empty overlap, scores no pair"
        )
    taken_UI, weight_U = _user_items(sequences, n_items)
    taken_UI = _cap_users(taken_UI, weight_U, max_users_per_item)
    scores_II = sparse.csr_array((n_items, n_items), dtype=np.float64)
    items_by_user = taken_UI.T.tocsr()
    for start in range(0, taken_UI.shape[0], _USERS_AT_A_TIME):
        shared = (taken_UI[start : start + _USERS_AT_A_TIME] @ items_by_user).tocoo()
        u, v = shared.row + start, shared.col
        told = (shared.data >= 2) & (u < v)  # one shared item is no pair of items
        u, v, overlap = u[told], v[told], shared.data[told]
        both_PI = taken_UI[u] * taken_UI[v]
        weight_P = weight_U[u] * weight_U[v] / (alpha + overlap)
        scores_II = scores_II + both_PI.T @ (sparse.diags_array(weight_P) @ both_PI)
    return _best_targets(scores_II.tocoo(), per_item)


def _user_items(sequences: Iterable[NDArray[np.integer]], n_items: int) -> tuple[sparse.csr_array, NDArray[np.float64]]:
    """Who took what, ones ``[n_users, n_items]``, and the weight of each user."""
    items_of = [np.unique(sequence) for sequence in sequences]
    sizes_U = np.array([len(items) for items in items_of], np.int64)
    items = np.concatenate([*items_of, np.zeros(0, np.int64)]).astype(np.int64)
    if len(items) and (items.min() < 0 or items.max() >= n_items):
        raise DataError(
            f"a training sequence holds item row {items.min() if items.min() < 0 else items.max()}, but there are "
            f"{n_items} items: the sequences belong to another catalogue"
        )
    offsets = np.concatenate([[0], np.cumsum(sizes_U)])
    taken_UI = sparse.csr_array((np.ones(len(items)), items, offsets), shape=(len(sizes_U), n_items))
    return taken_UI, 1 / np.sqrt(np.maximum(sizes_U, 1))


def _cap_users(taken_UI: sparse.csr_array, weight_U: NDArray[np.float64], at_most: int) -> sparse.csr_array:
    """Drop what exceeds `at_most` users of an item, the lightest users first."""
    entries = taken_UI.tocoo()
    order = np.lexsort((entries.row, -weight_U[entries.row], entries.col))
    keep = order[_rank_in_group(entries.col[order]) < at_most]
    kept = (entries.data[keep], (entries.row[keep], entries.col[keep]))
    return sparse.csr_array(sparse.coo_array(kept, shape=taken_UI.shape))


def _best_targets(scores_II: sparse.coo_array, per_item: int) -> SwingPairs:
    """The first `per_item` targets of each trigger."""
    off_diagonal = scores_II.row != scores_II.col
    trigger, target = scores_II.row[off_diagonal], scores_II.col[off_diagonal]
    scores = scores_II.data[off_diagonal].astype(np.float32)  # rounded first: equal sums in another order are ties
    order = np.lexsort((target, -scores, trigger))
    best = order[_rank_in_group(trigger[order]) < per_item]
    return SwingPairs(np.column_stack([trigger[best], target[best]]).astype(np.int32), scores[best])


def _rank_in_group(groups: NDArray[np.integer]) -> NDArray[np.int64]:
    """Position of each entry among the equal ones before it; `groups` is sorted."""
    return np.arange(len(groups)) - np.searchsorted(groups, groups)
