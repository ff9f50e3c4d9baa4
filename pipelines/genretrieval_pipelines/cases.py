"""What is evaluated: one case is one request with the items that would have been right.

Every model and every baseline ranks the same cases, so their figures stand beside each other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from genretrieval.histories import NO_QUERY, Histories, LeaveOneOut, Split

NO_USER = -1


@dataclass(frozen=True, slots=True)
class Cases:
    """Cases in a row; case i has the history ``histories.items[starts[i]:ends[i]]`` and the query ``queries[i]``.

    Attributes:
        user_rows: int64 ``[n_cases]``, `NO_USER` where nobody is known.
        starts: int64 ``[n_cases]``, where the history begins in the flat arrays of `Histories`.
        ends: int64 ``[n_cases]``, where it stops (the target is not part of it); equal to `starts` when it is empty.
        queries: the query of each case, or None for a recommendation.
        scenarios: the page or surface that each case asks from, or None.
        relevant: int32, item rows that count as hits, case after case.
        relevant_offsets: int64 ``[n_cases + 1]``, where each case's items lie in `relevant`.
    """

    user_rows: NDArray[np.int64]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    queries: list[str | None]
    scenarios: list[str | None]
    relevant: NDArray[np.int32]
    relevant_offsets: NDArray[np.int64]

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.user_rows)

    def take(self, rows: NDArray[np.int64]) -> Cases:
        """The cases at `rows`, in that order."""
        lengths = np.diff(self.relevant_offsets)[rows]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        parts = [self.relevant[self.relevant_offsets[r] : self.relevant_offsets[r + 1]] for r in rows]
        return Cases(
            user_rows=self.user_rows[rows],
            starts=self.starts[rows],
            ends=self.ends[rows],
            queries=[self.queries[r] for r in rows],
            scenarios=[self.scenarios[r] for r in rows],
            relevant=np.concatenate(parts) if parts else np.empty(0, np.int32),
            relevant_offsets=offsets,
        )


def leave_one_out_cases(histories: Histories, split: Split) -> Cases:
    """One case a user: the last interaction (test) or the one before it (validation), with the query it had."""
    users, positions = LeaveOneOut(histories).targets(split)
    query_rows = histories.query_rows[positions]
    return Cases(
        user_rows=users,
        starts=histories.offsets[users],
        ends=positions,
        queries=[None if row == NO_QUERY else histories.queries[row] for row in query_rows],
        scenarios=[histories.scenario(position) for position in positions.tolist()],
        relevant=histories.items[positions].astype(np.int32),
        relevant_offsets=np.arange(len(users) + 1, dtype=np.int64),
    )


def query_cases(query_items: pl.DataFrame) -> Cases:
    """One case a query without a user: `query_items` has the columns ``query`` and ``item_row`` of one split."""
    grouped = query_items.group_by("query", maintain_order=True).agg(pl.col("item_row").unique(maintain_order=True))
    items = grouped["item_row"]
    lengths = items.list.len().to_numpy().astype(np.int64)
    n = len(grouped)
    return Cases(
        user_rows=np.full(n, NO_USER, np.int64),
        starts=np.zeros(n, np.int64),
        ends=np.zeros(n, np.int64),
        queries=grouped["query"].to_list(),
        scenarios=[None] * n,
        relevant=items.explode().to_numpy().astype(np.int32) if n else np.empty(0, np.int32),
        relevant_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
