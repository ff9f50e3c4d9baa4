"""Visitors of the demo shop in front of pages that somebody else made: what they want, type and take."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genretrieval.errors import DataError
from genretrieval_pipelines.synth.propensity import NOTHING, Truth, log_propensity, query_match
from genretrieval_pipelines.synth.queries import LUCK, QueryBook
from genretrieval_pipelines.synth.shop import PAGE, ShopConfig, choose, reached, shop_products

Rows = NDArray[np.int64]
Scores = NDArray[np.float32]


class Visitors:
    """All users of a made shop, each with what was taken so far. They behave as in the shop's own logs."""

    def __init__(self, truth: Truth, config: ShopConfig, histories: Sequence[Rows], seed: int) -> None:
        """Users as they are at one moment.

        Args:
            truth: the shop.
            config: that it was made with.
            histories: of every user row, item rows that were taken, oldest first.
            seed: of what they type and take.

        Raises:
            DataError: `truth` is of another shop.
        """
        self._book = QueryBook(shop_products(config))
        if not np.array_equal(np.asarray(self._book.texts, np.str_), truth.queries):
            raise DataError("the shop was made with another size, seed or version: its queries differ; make it again")
        self._truth = truth
        self._rng = np.random.default_rng(seed)
        self.histories = [history.tolist() for history in histories]

    def available(self, time: int) -> NDArray[np.bool_]:
        """Which items the shop has at a time, bool ``[n_items]``."""
        return (self._truth.launch <= time) & (time < self._truth.retire)

    def want(self, users: Rows, times: Rows) -> Scores:
        """Log-propensity of every item, float32 ``[n, n_items]``, for user rows at unix seconds, both ``[n]``."""
        ages = np.zeros((len(users), len(self._truth.leaf)), np.int32)
        for row, user in enumerate(users.tolist()):
            history = self.histories[user]
            ages[row, history] = len(history) - np.arange(len(history))
        last = [self.histories[user][-1] if self.histories[user] else NOTHING for user in users.tolist()]
        return log_propensity(self._truth, self._truth.affinity(users), users, times, np.asarray(last, np.int64), ages)

    def type(self, wanted: Scores) -> tuple[list[str], Scores]:
        """What each types who has something in mind, and what is wanted since.

        Args:
            wanted: float32 ``[n, n_items]``, of `want`.
        """
        intents = np.argmax(wanted + self._rng.gumbel(size=wanted.shape), axis=1)
        luck = self._rng.random((len(intents), LUCK))
        typed = [self._book.verbalize(int(item), chance) for item, chance in zip(intents, luck, strict=True)]
        queries = np.asarray(typed, np.int64)
        return [self._book.texts[query] for query in typed], wanted + query_match(self._truth, queries)

    def take(self, users: Rows, wanted: Scores, pages: Rows) -> tuple[Rows, Rows]:
        """What each takes from its page, which joins the history, and how far it goes.

        Args:
            users: int64 ``[n]``, user rows.
            wanted: float32 ``[n, n_items]``.
            pages: int64 ``[n, PAGE]``, item rows, `NOTHING` for an empty place.

        Returns:
            Places int64 ``[n]``, `NOTHING` where a page has nothing that the shop has, and the deepest event of each,
            positions in `shop.EVENTS`.
        """
        assert pages.shape[1] == PAGE
        shown = np.where(pages == NOTHING, -np.float32(np.inf), np.take_along_axis(wanted, np.maximum(pages, 0), 1))
        places = np.where(np.isfinite(shown).any(axis=1), choose(shown, self._rng), NOTHING)
        items = pages[np.arange(len(pages)), places]
        for user, place, item in zip(users.tolist(), places.tolist(), items.tolist(), strict=True):
            if place != NOTHING:
                self.histories[user].append(item)
        return places, reached(self._truth, items, self._rng)
