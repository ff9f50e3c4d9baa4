"""The truth of the demo shop: what every user wants at every moment, and the ranker that knows it.

The simulator draws pages and choices from `log_propensity` plus `query_match`; `Oracle` ranks by the same sum.
What a user chooses from a page grows with an item's propensity in both steps (being shown, being chosen from
what is shown), so ranking by propensity is the best any ranker can do from the same history, time and query.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError

TRUTH_FILE = "truth.npz"
NOTHING = -1

# Weights of log-propensity. They set how much of a choice taste explains; the shop is calibrated with them.
LEAF_WEIGHT = 0.75
BRAND_WEIGHT = 0.75
ATTRIBUTE_WEIGHT = 0.5
PRICE_WEIGHT = 0.3
POPULARITY_WEIGHT = 0.65
SAME_LEAF = 1.0
COMPLEMENT = 2.5
QUERY_LEAF = 12.0
QUERY_BRAND = 4.0
QUERY_ATTRIBUTE = 3.0

# Log-propensity by interactions since the user's last one with the item: [0] lasting goods, [1] consumables.
_MAX_AGE = 128


def _habit_table() -> NDArray[np.float32]:
    """float32 ``[2, _MAX_AGE + 1]``; age 0 means never.

    Lasting goods are looked at again while a choice is being made, then the matter is settled. Consumables are
    left alone while they last, bought again for a while, then forgotten.
    """
    table = np.zeros((2, _MAX_AGE + 1), np.float32)
    table[0, 1:3], table[0, 3:21], table[0, 21:] = -1.0, -0.5, -4.0
    table[1, 1:5], table[1, 5:81], table[1, 81:] = -2.5, 0.1, -1.5
    return table


_HABIT = _habit_table()


@dataclass(frozen=True, slots=True)
class Truth:
    """Everything latent. Row i of the item arrays is row i of ``items.parquet``.

    Attributes:
        start: unix seconds where the log begins.
        end: unix seconds where it ends; taste drifts in a straight line from one to the other.
        leaf: int64 ``[n_items]``.
        brand: int64 ``[n_items]``.
        attributes: int64 ``[n_items, n_kinds]``, attribute ids, 0 where the item has none of that kind.
        price_position: float32 ``[n_items]``.
        popularity: float32 ``[n_items]``.
        launch: int64 ``[n_items]``, unix seconds before which an item does not exist.
        retire: int64 ``[n_items]``, unix seconds from which it cannot be had.
        consumable: bool ``[n_leaves]``.
        transition: float32 ``[n_leaves, n_leaves]``, added to leaf j when the last item was of leaf i.
        user_ids: str ``[n_users]``.
        leaf_taste: float32 ``[2, n_users, n_leaves]``, at the start and at the end.
        brand_taste: float32 ``[n_users, n_brands]``.
        attribute_taste: float32 ``[n_users, n_attribute_values]``, 0 for id 0.
        price_taste: float32 ``[n_users]``, the price position a user likes best.
        queries: str ``[n_queries]``, everything that can be typed.
        query_head: int64 ``[n_queries]``, rows of `head_leaves`.
        head_leaves: bool ``[n_heads, n_leaves]``, the leaves that the head word of a query can mean.
        query_brand: int64 ``[n_queries]``, -1 where it names none.
        query_attribute: int64 ``[n_queries]``, -1 where it names none.
    """

    start: int
    end: int
    leaf: NDArray[np.int64]
    brand: NDArray[np.int64]
    attributes: NDArray[np.int64]
    price_position: NDArray[np.float32]
    popularity: NDArray[np.float32]
    launch: NDArray[np.int64]
    retire: NDArray[np.int64]
    consumable: NDArray[np.bool_]
    transition: NDArray[np.float32]
    user_ids: NDArray[np.str_]
    leaf_taste: NDArray[np.float32]
    brand_taste: NDArray[np.float32]
    attribute_taste: NDArray[np.float32]
    price_taste: NDArray[np.float32]
    queries: NDArray[np.str_]
    query_head: NDArray[np.int64]
    head_leaves: NDArray[np.bool_]
    query_brand: NDArray[np.int64]
    query_attribute: NDArray[np.int64]

    def save(self, folder: Path) -> None:
        """Write ``truth.npz`` into `folder`; nothing in it is pickled."""
        arrays = {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        np.savez(folder / TRUTH_FILE, allow_pickle=False, **arrays)

    @classmethod
    def load(cls, folder: Path) -> Truth:
        """Read ``truth.npz`` of a shop that `synthesize` wrote.

        Raises:
            DataError: the folder holds none, or one without the expected arrays.
        """
        path = folder / TRUTH_FILE
        if not path.is_file():
            raise DataError(f"{path} does not exist: only a shop made by `genretrieval data synth` has a truth.")
        with np.load(path, allow_pickle=False) as stored:
            missing = [field.name for field in fields(cls) if field.name not in stored]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; make the shop again with this version.")
            arrays = {field.name: stored[field.name] for field in fields(cls)}
        return cls(**{**arrays, "start": int(arrays["start"]), "end": int(arrays["end"])})

    def affinity(self, users: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 ``[n, n_items]``: the part of log-propensity that never changes, for user rows int64 ``[n]``."""
        attribute_taste = ATTRIBUTE_WEIGHT * self.attribute_taste[users]
        distance = self.price_position - self.price_taste[users, None]
        affinity = POPULARITY_WEIGHT * self.popularity - PRICE_WEIGHT * distance * distance
        affinity += BRAND_WEIGHT * self.brand_taste[users][:, self.brand]
        for kind in range(self.attributes.shape[1]):
            affinity += attribute_taste[:, self.attributes[:, kind]]
        return affinity.astype(np.float32, copy=False)


def log_propensity(
    truth: Truth,
    affinity: NDArray[np.float32],
    users: NDArray[np.int64],
    times: NDArray[np.int64],
    last_items: NDArray[np.int64],
    ages: NDArray[np.int32],
) -> NDArray[np.float32]:
    """Log of how strongly each of n users is drawn to each item at one moment, up to a constant a row.

    Args:
        truth: the shop.
        affinity: float32 ``[n, n_items]`` of `Truth.affinity` for `users`.
        users: int64 ``[n]``, user rows.
        times: int64 ``[n]``, unix seconds.
        last_items: int64 ``[n]``, item row of the last interaction, `NOTHING` before the first.
        ages: int32 ``[n, n_items]``, interactions since the last one with the item (1: it was the last), 0: never.

    Returns:
        float32 ``[n, n_items]``, minus infinity for items not launched yet or sold out. Where something was typed,
        `query_match` comes on top.
    """
    phase = np.clip((times - truth.start) / (truth.end - truth.start), 0.0, 1.0).astype(np.float32)[:, None]
    by_leaf = LEAF_WEIGHT * ((1 - phase) * truth.leaf_taste[0, users] + phase * truth.leaf_taste[1, users])
    by_leaf += np.where(last_items[:, None] >= 0, truth.transition[truth.leaf[last_items]], np.float32(0))
    scores: NDArray[np.float32] = np.take(by_leaf, truth.leaf, axis=1)
    scores += affinity

    rows, items = np.nonzero(ages > 0)
    used_up = truth.consumable[truth.leaf[items]].astype(np.int64)
    scores[rows, items] += _HABIT[used_up, np.minimum(ages[rows, items], _MAX_AGE)]

    # Most items are there all the time; only the others are looked at.
    passing = np.flatnonzero((truth.launch > truth.start) | (truth.retire < truth.end))
    gone = (truth.launch[passing] > times[:, None]) | (truth.retire[passing] <= times[:, None])
    scores[:, passing] = np.where(gone, -np.float32(np.inf), scores[:, passing])
    return scores


def query_match(truth: Truth, queries: NDArray[np.int64]) -> NDArray[np.float32]:
    """What typing each of n queries adds to log-propensity.

    Args:
        truth: the shop.
        queries: int64 ``[n]``, query rows.

    Returns:
        float32 ``[n, n_items]``: a large loss outside the leaves a query can mean, a gain for the brand or attribute
        that it names.
    """
    meant = truth.head_leaves[truth.query_head[queries]]
    match = np.take(np.where(meant, np.float32(0), np.float32(-QUERY_LEAF)), truth.leaf, axis=1)
    brand, attribute = truth.query_brand[queries], truth.query_attribute[queries]
    for row in np.flatnonzero(brand >= 0):
        match[row, truth.brand == brand[row]] += QUERY_BRAND
    for row in np.flatnonzero(attribute >= 0):
        match[row, (truth.attributes == attribute[row]).any(axis=1)] += QUERY_ATTRIBUTE
    return match


class Oracle:
    """The best ranker there is for a demo shop: it knows the truth and sees the same history as any other.

    Args:
        truth: the latent truth of the shop.
    """

    def __init__(self, truth: Truth) -> None:
        self._truth = truth
        self._user_rows = {user: row for row, user in enumerate(truth.user_ids.tolist())}
        self._query_rows = {query: row for row, query in enumerate(truth.queries.tolist())}

    @classmethod
    def load(cls, data: Path) -> Oracle:
        """The oracle of the shop in folder `data`; raises `DataError` where that holds no truth."""
        return cls(Truth.load(data))

    def scores(
        self, user_id: str, timestamp: int, query: str | None, history_item_rows: NDArray[np.integer]
    ) -> NDArray[np.float64]:
        """Expected propensity of every item as this user's next interaction.

        Args:
            user_id: a user of the shop.
            timestamp: unix seconds of the interaction to predict.
            query: what was typed, None for a recommendation.
            history_item_rows: int ``[n]``, item rows of all earlier interactions, oldest first.

        Returns:
            float64 ``[n_items]`` in row order of ``items.parquet``; the largest is 1, unavailable items have 0.

        Raises:
            DataError: the user or the query does not belong to this shop.
        """
        truth = self._truth
        if user_id not in self._user_rows:
            raise DataError(f"User {user_id!r} is not in this shop; the oracle knows its own users only.")
        if query is not None and query not in self._query_rows:
            raise DataError(
                f"Query {query!r} has no meaning in this shop; the oracle knows the shop's own queries only."
            )
        history = np.asarray(history_item_rows, np.int64)
        ages = np.zeros((1, len(truth.leaf)), np.int32)
        ages[0, history] = len(history) - np.arange(len(history))
        users = np.array([self._user_rows[user_id]])
        log_scores = log_propensity(
            truth,
            truth.affinity(users),
            users,
            np.array([timestamp]),
            history[-1:] if len(history) else np.array([NOTHING]),
            ages,
        )
        if query is not None:
            log_scores += query_match(truth, np.array([self._query_rows[query]]))
        weights: NDArray[np.float64] = np.exp((log_scores[0] - log_scores.max()).astype(np.float64))
        return weights
