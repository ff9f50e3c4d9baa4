"""Users' histories as flat arrays, and the splits that every model and baseline shares."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["validation", "test"]

NO_QUERY = -1
NO_TIME = -1
NO_SCENARIO = -1


@dataclass(frozen=True, slots=True)
class Histories:
    """All users' interactions in history order, one after another; user u owns ``[offsets[u], offsets[u + 1])``.

    Exposures are not part of a history. Arrays may be memory-mapped: nothing here copies them.

    Attributes:
        user_ids: the user of each row of `offsets`, length n_users.
        offsets: int64 ``[n_users + 1]``.
        items: int32 ``[n]``, item rows of the catalogue.
        events: int16 ``[n]``, positions in `event_names`.
        times: int64 ``[n]``, unix seconds, `NO_TIME` where the log has none.
        query_rows: int32 ``[n]``, positions in `queries`, `NO_QUERY` where the interaction had none.
        event_names: every behaviour seen, sorted.
        queries: every distinct query string seen.
        order_rule: one line that says how ties were ordered; printed with every metric.
        scenario_rows: int16 ``[n]``, positions in `scenario_names`, `NO_SCENARIO` where the interaction had none.
        scenario_names: every scenario seen, sorted.
    """

    user_ids: list[str]
    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    events: NDArray[np.int16]
    times: NDArray[np.int64]
    query_rows: NDArray[np.int32]
    event_names: tuple[str, ...]
    queries: list[str]
    order_rule: str
    scenario_rows: NDArray[np.int16] | None = None
    scenario_names: tuple[str, ...] = ()

    @property
    def n_users(self) -> int:
        """Users with at least one interaction."""
        return len(self.user_ids)

    def scenario(self, position: int) -> str | None:
        """Where the interaction at `position` of the flat arrays happened."""
        row = NO_SCENARIO if self.scenario_rows is None else int(self.scenario_rows[position])
        return None if row == NO_SCENARIO else self.scenario_names[row]

    def lengths(self) -> NDArray[np.int64]:
        """int64 ``[n_users]``: interactions of each user."""
        return np.diff(self.offsets)

    def repeat_rate(self) -> float:
        """Share of interactions whose item the same user had already interacted with."""
        if not len(self.items):
            return 0.0
        users = np.repeat(np.arange(self.n_users, dtype=np.int64), self.lengths())
        distinct = len(np.unique(users << 32 | self.items.astype(np.int64)))
        return 1.0 - distinct / len(self.items)


@dataclass(frozen=True, slots=True)
class Exposures:
    """What every user was shown, in time order; user u owns ``[offsets[u], offsets[u + 1])``.

    Attributes:
        offsets: int64 ``[n_users + 1]``.
        items: int32 ``[n]``, item rows of the catalogue.
        times: int64 ``[n]``, unix seconds. An exposure without a time cannot be placed before anything and is left
            out; preparing the logs counts those.
    """

    offsets: NDArray[np.int64]
    items: NDArray[np.int32]
    times: NDArray[np.int64]

    def before(self, user: int, time: int, at_most: int) -> slice:
        """The newest exposures of a user before `time`, at most so many."""
        start, end = int(self.offsets[user]), int(self.offsets[user + 1])
        end = start + int(np.searchsorted(self.times[start:end], time, side="left"))
        return slice(max(start, end - at_most), end)


@dataclass(frozen=True, slots=True)
class Past:
    """Events of one user in time order, exposures among them.

    Attributes:
        items: int64 ``[n]``, item rows.
        events: int64 ``[n]``, positions in ``event_names``; exposure is one position behind them.
        times: int64 ``[n]``.
    """

    items: NDArray[np.int64]
    events: NDArray[np.int64]
    times: NDArray[np.int64]


def past_before(
    histories: Histories, exposures: Exposures | None, user: int, position: int, first: int, at_most: int
) -> Past:
    """The newest events of a user before the interaction at `position` of the flat arrays.

    Args:
        histories: all interactions.
        exposures: what users were shown, if that is to be read.
        user: user row.
        position: where the history that is read in full begins.
        first: where the user's interactions begin.
        at_most: events.
    """
    taken = slice(max(first, position - at_most), position)
    items, times = histories.items[taken], histories.times[taken]
    events = histories.events[taken].astype(np.int64)
    known = position < len(histories.times) and histories.times[position] != NO_TIME
    if exposures is not None and known:
        shown = exposures.before(user, int(histories.times[position]), at_most)
        items, times = np.append(items, exposures.items[shown]), np.append(times, exposures.times[shown])
        events = np.append(events, np.full(shown.stop - shown.start, len(histories.event_names), np.int64))
        newest = np.argsort(times, kind="stable")[max(0, len(times) - at_most) :]
        items, events, times = items[newest], events[newest], times[newest]
    return Past(items.astype(np.int64), events, times)


@dataclass(frozen=True, slots=True)
class LeaveOneOut:
    """The field's standard split: a user's last interaction is test, the one before validation, the rest training.

    A user with fewer than `min_length` interactions is training only, so that every evaluated user has a history.
    """

    histories: Histories
    min_length: int = 3

    def train_ends(self) -> NDArray[np.int64]:
        """End of each user's training part, int64 ``[n_users]``: user u trains on ``[offsets[u], ends[u])``."""
        lengths = self.histories.lengths()
        return self.histories.offsets[1:] - np.where(lengths >= self.min_length, 2, 0)

    def trained(self) -> NDArray[np.bool_]:
        """Bool ``[n]``, over the flat arrays: which interactions are training."""
        lengths = self.histories.lengths()
        return np.arange(len(self.histories.items)) < np.repeat(self.train_ends(), lengths)

    def targets(self, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Users evaluated, int64 ``[n_eval]``, and the position of each one's target in the flat arrays.

        A target's history is everything of the user before it: for test that includes the validation item.
        """
        users = np.flatnonzero(self.histories.lengths() >= self.min_length)
        back = 1 if split == "test" else 2
        return users, self.histories.offsets[users + 1] - back

    def train_sequences(self) -> Iterator[NDArray[np.int32]]:
        """Item rows of each user's training part, in order."""
        for start, end in zip(self.histories.offsets[:-1], self.train_ends(), strict=True):
            yield self.histories.items[start:end]
