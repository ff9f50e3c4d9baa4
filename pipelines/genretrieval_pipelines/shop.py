"""A shop's data as training and evaluation see it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import polars as pl
from rich.console import Console

from genretrieval.errors import DataError
from genretrieval.histories import Histories, LeaveOneOut, Split
from genretrieval.logs import PreparedLogs, prepare_logs
from genretrieval_pipelines.cases import NO_USER, Cases, leave_one_out_cases, query_cases
from genretrieval_pipelines.queries import has_queries, made_queries, split_queries

# Above this share of repeated (user, item) pairs, recommending something again is part of the task.
REPEATS_MATTER = 0.01
# What the catalogue of a bundle calls an item's codes and its number of training interactions.
CATALOGUE_COLUMNS = ("semantic_id", "popularity")


@dataclass(frozen=True)
class Shop:
    """What an evaluation needs to know of the data.

    Attributes:
        name: printed with the table.
        items: the catalogue, in row order.
        users: ``user_id`` and profile columns; user row u is row u.
        histories: all interactions.
        pairs: ``query``, ``item_row`` and ``split`` of judged or made queries; empty where there are none.
        data: the folder of the logs; a demo shop has its truth there.
        fingerprint: sha256 of the logs, over the names and bytes of their files.
        logs: the prepared logs that all of it was read from.
    """

    name: str
    items: pl.DataFrame
    users: pl.DataFrame
    histories: Histories
    pairs: pl.DataFrame
    data: Path
    fingerprint: str
    logs: PreparedLogs

    def cases(self, split: Split) -> Cases:
        """Leave-one-out over users; for a shop without histories, its held-out queries."""
        if (self.histories.lengths() >= LeaveOneOut(self.histories).min_length).any():
            return leave_one_out_cases(self.histories, split)
        return query_cases(self.pairs.filter(pl.col("split") == split))

    @property
    def exclude_seen(self) -> bool:
        """Whether a recommendation of something already bought is useless here: hardly anybody buys twice."""
        return self.histories.repeat_rate() < REPEATS_MATTER

    def profile(self, user: int) -> dict[str, str]:
        """Profile of a user row as a request carries it."""
        if user == NO_USER or len(self.users.columns) < 2:
            return {}
        row = self.users.row(user, named=True)
        return {name: str(value) for name, value in row.items() if name != "user_id" and value is not None}


def open_shop(data: Path, work: Path, console: Console | None = None) -> Shop:
    """Check and order the logs in `data` (once; the result stays in `work`) and read them.

    A shop without queries and without a history that is long enough to be evaluated gets queries made from its
    catalogue, so that it can be trained, measured and served before it has logs.

    Args:
        data: folder of house Parquet.
        work: of intermediate results.
        console: is told what was read, and what of it was set aside and why; None for nobody.

    Raises:
        DataError: the logs cannot be used, or an attribute of items has a name that a bundle's catalogue needs.
    """
    logs = prepare_logs(data, work / "logs")
    if console is not None:
        _tell(logs, console)
    items, histories = logs.items(), logs.histories()
    if taken := [name for name in CATALOGUE_COLUMNS if name in items.columns]:
        raise DataError(
            f"{data}: items have the attribute {' and '.join(taken)}, which in the catalogue of a bundle is what "
            "training makes: filters and profiles would read that instead of yours. Give it another name"
        )
    judged = logs.query_items()
    if judged is not None:
        positive = judged.filter(pl.col("label") > 0).select("query", "item_row", "split").unique(maintain_order=True)
        pairs = split_queries(positive.collect())
    elif not has_queries(histories) and (histories.lengths() < LeaveOneOut(histories).min_length).all():
        pairs = split_queries(made_queries(items))
    else:
        pairs = pl.DataFrame(schema={"query": pl.String, "item_row": pl.Int32, "split": pl.String})
    fingerprint = logs.report.inputs_sha256
    return Shop(data.resolve().name, items, logs.users(), histories, pairs, data, fingerprint, logs)


def _tell(logs: PreparedLogs, console: Console) -> None:
    """The report of prepared logs; in colour where something is wrong with them."""
    lines = logs.report.lines()
    if any(rows.quarantined for rows in logs.report.tables.values()):
        lines.append(f"rows in quarantine are in {logs.folder / 'quarantine'}, each with its reason")
    style = "yellow" if logs.report.problems else "dim"
    for line in lines:
        console.print(line, style=style, highlight=False, markup=False, soft_wrap=True)
