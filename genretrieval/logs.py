"""From a folder of logs to the tables that everything else reads.

`prepare_logs` checks every row, sets the bad ones aside with a reason, numbers items and users, and puts each
history in order. Ids of items and users, and the numbers of wrong rows, are held in memory; interactions are
sorted some users at a time; the rest is streamed.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from pydantic import BaseModel, ConfigDict, ValidationError

from genretrieval.errors import DataError, disk_is_full
from genretrieval.histories import NO_QUERY, NO_SCENARIO, NO_TIME, Exposures, Histories
from genretrieval.schemas import (
    EXPOSURE,
    INTERACTIONS,
    INTERNAL,
    ITEMS,
    QRELS,
    QUERIES,
    ROW,
    SPLITS,
    TABLES,
    UNREADABLE,
    USERS,
    Conformed,
    Problem,
    Rule,
    Severity,
    Table,
    conform,
)

FORMAT_VERSION = 2
MAX_NAMES = 1000
"""Behaviours or scenarios of a shop; more are no kinds of anything, but URLs or ids."""
_REPORT = "report.json"
_QUARANTINE = "quarantine"
_QUERY_ITEMS = "query_items.parquet"
_SORTING = "sorting.partial"
_LOCK = ".lock"
_REASON = f"{INTERNAL}reason"
_FIRST_ROWS = 5
_SORT_ROWS = 10_000_000  # about 1.3 GB
_HISTORY_ORDER = ("user_row", "history_index", "timestamp", ROW)
_LOGGED = (
    *("user_row", "item_row", "event", "timestamp", "query"),
    *("request_id", "rank_shown", "scenario", "value"),
)


class TableRows(BaseModel):
    """Rows of one table: `read` = `kept` + `quarantined`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    read: int
    kept: int
    quarantined: int


class PreparationReport(BaseModel):
    """What `prepare_logs` found; ``report.json`` of the prepared folder.

    Attributes:
        format_version: of the prepared folder.
        inputs_sha256: over the names and bytes of every file read, and the version of what reads them.
        order_rule: one line that says how histories were ordered; printed with every metric.
        tables: rows of each table that was there.
        problems: everything wrong, or worth knowing, in the files.
        ignored_files: names in the folder that are no table, but for hidden ones.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    inputs_sha256: str
    order_rule: str
    tables: dict[str, TableRows]
    problems: list[Problem]
    ignored_files: list[str]

    def lines(self) -> list[str]:
        """The report for people, one line a fact."""
        counts = [
            f"{name}: {rows.kept:,} rows" + (f", {rows.quarantined:,} in quarantine" if rows.quarantined else "")
            for name, rows in self.tables.items()
        ]
        ignored = [f"not read: {', '.join(self.ignored_files)}"] if self.ignored_files else []
        return [*counts, *ignored, f"order: {self.order_rule}", *map(str, self.problems)]


@dataclass(frozen=True, slots=True)
class PreparedLogs:
    """A folder that `prepare_logs` finished.

    Attributes:
        folder: where it lies.
        report: its ``report.json``.
    """

    folder: Path
    report: PreparationReport

    @property
    def items_path(self) -> Path:
        """Items; the place of an item in this file is its item row everywhere else."""
        return self.folder / ITEMS.file

    @property
    def interactions_path(self) -> Path:
        """Interactions with exposures, sorted by user row and history order."""
        return self.folder / INTERACTIONS.file

    @property
    def users_path(self) -> Path:
        """Users; the place of a user in this file is its user row."""
        return self.folder / USERS.file

    @property
    def query_items_path(self) -> Path:
        """Judged (query, item) pairs; absent where the logs had no qrels."""
        return self.folder / _QUERY_ITEMS

    def items(self) -> pl.DataFrame:
        """All items in row order: the columns of `schemas.ITEMS`, then attributes."""
        return pl.read_parquet(self.items_path)

    def users(self) -> pl.DataFrame:
        """All users in row order: ``user_id``, then profile columns (null for users without a profile)."""
        return pl.read_parquet(self.users_path)

    def interactions(self) -> pl.LazyFrame:
        """Interactions with exposures, in order.

        Columns: user_row i32, item_row i32, event, timestamp i64 (unix seconds, nullable), query, request_id,
        rank_shown i32, scenario, value f64.
        """
        return pl.scan_parquet(self.interactions_path)

    def query_items(self) -> pl.LazyFrame | None:
        """Judged pairs of every label, None where the logs had none.

        Columns: query, item_row i32, user_row i32 (nullable), label f32, split (nullable).
        """
        return pl.scan_parquet(self.query_items_path) if self.query_items_path.exists() else None

    def histories(self) -> Histories:
        """Every user's interactions but exposures, as flat arrays.

        User u of the result is user row u: users with a history have the first rows of `users`.
        """
        rows = (
            self.interactions()
            .filter(pl.col("event") != EXPOSURE)
            .select("user_row", "item_row", "event", "timestamp", "query", "scenario")
            .collect(engine="streaming")
        )
        event_names = rows["event"].unique().sort().to_list()
        queries = rows["query"].drop_nulls().unique().sort().to_list()
        scenarios = rows["scenario"].drop_nulls().unique().sort().to_list()
        user_rows = rows["user_row"].to_numpy()
        n_users = int(user_rows[-1]) + 1 if len(user_rows) else 0
        return Histories(
            user_ids=self.users()["user_id"].head(n_users).to_list(),
            offsets=np.searchsorted(user_rows, np.arange(n_users + 1)).astype(np.int64),
            items=rows["item_row"].to_numpy(),
            events=_positions(rows["event"], event_names).to_numpy().astype(np.int16),
            times=rows["timestamp"].fill_null(NO_TIME).to_numpy(),
            query_rows=_positions(rows["query"], queries).fill_null(NO_QUERY).to_numpy(),
            event_names=tuple(event_names),
            queries=queries,
            order_rule=self.report.order_rule,
            scenario_rows=_positions(rows["scenario"], scenarios).fill_null(NO_SCENARIO).to_numpy().astype(np.int16),
            scenario_names=tuple(scenarios),
        )

    def exposures(self) -> Exposures:
        """What every user was shown and when, by user row as `histories`."""
        rows = (
            self.interactions()
            .filter(pl.col("event") == EXPOSURE, pl.col("timestamp").is_not_null())
            .select("user_row", "item_row", "timestamp")
            .sort("user_row", "timestamp", maintain_order=True)
            .collect(engine="streaming")
        )
        n_users = pl.scan_parquet(self.users_path).select(pl.len()).collect().item()
        return Exposures(
            offsets=np.searchsorted(rows["user_row"].to_numpy(), np.arange(n_users + 1)).astype(np.int64),
            items=rows["item_row"].to_numpy(),
            times=rows["timestamp"].to_numpy(),
        )


def _positions(values: pl.Series, names: list[str]) -> pl.Series:
    """int32: where each value stands in `names`, null where it is null."""
    return values.cast(pl.Enum(names)).to_physical().cast(pl.Int32)


def load_prepared(output: Path) -> PreparedLogs:
    """Open a folder that `prepare_logs` wrote.

    Raises:
        DataError: if the folder holds no readable report, or one of another format version.
    """
    path = output / _REPORT
    if not path.is_file():
        raise DataError(f"{output} holds no {_REPORT}: preparing it never finished; run the preparation again")
    report = _read_report(path)
    if report.format_version != FORMAT_VERSION:
        raise DataError(
            f"{path} has format version {report.format_version}, this version reads {FORMAT_VERSION}; "
            "prepare the folder again"
        )
    return PreparedLogs(output, report)


def _read_report(path: Path) -> PreparationReport:
    try:
        return PreparationReport.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} is not a report of this version; nothing was touched. Choose another folder, or delete this one "
            "if it was prepared by another version, and prepare it again"
        ) from error


@contextmanager
def writing_logs(
    output: Path, kind: Literal["prepared", "imported", "synthetic"], *, known: bool = False
) -> Iterator[None]:
    """While a folder of tables is written: into nobody else's, and with errors of the disk in words.

    A folder that is absent or empty is marked before anything else, so that a run that was killed can be run again.

    Args:
        output: the folder.
        kind: of what is written there; one kind does not replace another.
        known: something else shows that we wrote the folder, before folders were marked.

    Raises:
        DataError: the folder holds what no earlier run of this kind wrote, cannot be made, or the disk is full.
    """
    mark = output / f".genretrieval-{kind}"
    try:
        held = sorted(path.name for path in output.iterdir()) if output.exists() else []
        if ours := not held or known or mark.name in held:
            output.mkdir(parents=True, exist_ok=True)
            mark.touch()
    except OSError as error:
        reason = f"{output} cannot be made a folder to write to ({error.strerror}); choose another one"
        raise DataError(reason) from error
    if not ours:
        raise DataError(
            f"{output} holds {_listed(held)}, and no earlier run made it a folder of {kind} logs; nothing was touched. "
            "Choose a folder that is empty or not there, or delete this one if nothing in it is needed"
        )
    try:
        yield
    except (OSError, pl.exceptions.PolarsError) as error:
        if disk_is_full(error):
            raise DataError(
                f"the disk is full: {output} had no room for the {kind} logs, which are not complete. Make room and "
                "run the same again, or choose another folder"
            ) from error
        raise


def open_tables(data: Path) -> dict[str, Conformed]:
    """The tables of a log folder in the contract's columns, unread but for their schemas.

    A table is ``NAME.parquet`` or a folder ``NAME/`` of shards, read in the order of their names.

    Raises:
        DataError: naming every table that is missing, unreadable or without an item, and every column that is
            missing or mistyped.
    """
    if not data.is_dir():
        raise DataError(f"{data} is no folder; give the folder that holds {ITEMS.file}")
    tables: dict[str, Conformed] = {}
    fatal: list[Problem] = []
    for table in TABLES:
        frame, problems = _scan(data, table)
        fatal += problems
        if frame is not None:
            tables[table.name] = conform(frame, table)
            fatal += [problem for problem in tables[table.name].problems if problem.severity == "fatal"]
            if table is ITEMS and not frame.select(pl.len()).collect().item():
                reason = "has no rows: without items there is nothing to retrieve"
                fatal.append(Problem(file=table.file, column=None, reason=reason, severity="fatal"))
    if QRELS.name in tables and QUERIES.name not in tables:
        reason = f"is missing, but {QRELS.file} refers to its query_id"
        fatal.append(Problem(file=QUERIES.file, column=None, reason=reason, severity="fatal"))
    if fatal:
        raise DataError(f"{data} cannot be used; nothing was written:\n" + "\n".join(f"  {p}" for p in fatal))
    return tables


def _shards(data: Path, table: Table) -> list[Path]:
    """The table's files: one, those of its folder, or none."""
    file, folder = data / table.file, data / table.name
    shards = [file] if file.is_file() else []
    for place in (file, folder):
        if place.is_dir():
            shards += sorted(path for path in place.glob("*.parquet") if not _is_hidden(path))
    return shards


def _is_hidden(path: Path) -> bool:
    """What Spark and its kin write beside shards: ``_SUCCESS``, ``_metadata``, checksums."""
    if path.name.startswith(".") or path.suffix == ".crc":
        return True
    return path.name.startswith("_") and path.suffix != ".parquet" and path.is_file()


def _misplaced(data: Path, table: Table) -> list[Problem]:
    """What lies in a table's folder and would not be read, such as the folders of a partitioned table."""
    problems = []
    for place in (data / table.file, data / table.name):
        if not place.is_dir():
            continue
        entries = sorted(path for path in place.iterdir() if not _is_hidden(path))
        others = [path.name for path in entries if path.suffix != ".parquet" or not path.is_file()]
        if others or not entries:
            reason = (
                f"may hold .parquet files alone, and must hold one; it holds {_listed(others) or 'none'}: flatten it, "
                f"so that every row is in a file directly in {place.name}/ and what names of folders say is a column"
            )
            problems.append(Problem(file=place.name, column=None, reason=reason, severity="fatal"))
    return problems


def _listed(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


def _scan(data: Path, table: Table) -> tuple[pl.LazyFrame | None, list[Problem]]:
    """The table as it is on disk with its row numbers, None where it is absent or unreadable."""

    def fatal(file: str, reason: str) -> Problem:
        return Problem(file=file, column=None, reason=reason, severity="fatal")

    if misplaced := _misplaced(data, table):
        return None, misplaced
    shards = _shards(data, table)
    if not shards:
        missing = f"is missing: neither this file nor a folder {table.name}/ of .parquet files is in {data}"
        return None, [fatal(table.file, missing)] if table.required else []
    if len({shard.parent if shard.parent != data else shard for shard in shards}) > 1:
        return None, [fatal(table.file, f"is there twice, as a file and as a folder {table.name}/: remove one")]
    problems: list[Problem] = []
    schemas: dict[str, pl.Schema] = {}
    for shard in shards:
        name = str(shard.relative_to(data))
        try:
            schemas[name] = pl.scan_parquet(shard, glob=False).collect_schema()
        except pl.exceptions.ComputeError as error:
            problems.append(fatal(name, f"cannot be read as Parquet ({str(error).splitlines()[0]}): write it again"))
    first = next(iter(schemas.values()), pl.Schema())
    clash = "is a name that this program uses itself: rename the column"
    problems += [
        Problem(file=table.file, column=name, reason=clash, severity="fatal")
        for name in first
        if name.startswith(INTERNAL)
    ]
    problems += [
        fatal(
            name,
            f"has other columns or types than the first shard {next(iter(schemas))}: write all shards alike",
        )
        for name, schema in schemas.items()
        if schema != first
    ]
    return (None if problems else pl.scan_parquet(shards, row_index_name=ROW, glob=False)), problems


def prepare_logs(data: Path, output: Path) -> PreparedLogs:
    """Check, number and order a folder of logs.

    Writes into `output`: items, interactions, users and (with qrels) query_items as Parquet, ``quarantine/``
    with the rows that were set aside and why, and last of all ``report.json``. If `output` was prepared from
    the very same bytes before, nothing is done; if another run is preparing it, that one is waited for.

    Args:
        data: folder with ``items.parquet`` and optionally interactions, users, queries and qrels.
        output: folder to write; what an earlier preparation left there is replaced.

    Raises:
        DataError: if a table cannot be read, if there are no items, if more than half of a table's rows are
            wrong, which a wrong join or a wrong file does and dirt does not, if there are more than `MAX_NAMES`
            behaviours or scenarios, or if `output` is no folder to write to (`writing_logs`).
    """
    if output.resolve() == data.resolve():
        raise DataError(f"{output} is the folder of the logs themselves; give another folder to write to")
    tables = open_tables(data)
    inputs_sha256 = _inputs_sha256(data)
    if prepared := _prepared_before(output, inputs_sha256):
        return prepared
    # Offline code alone gets here; it is installed with `tokenizers`, by way of the Hugging Face hub.
    from filelock import FileLock

    known = (output / _REPORT).is_file() or (output / _SORTING).is_dir()
    try:
        with writing_logs(output, "prepared", known=known), FileLock(output / _LOCK):
            # Another run may have prepared the same logs while this one waited.
            if prepared := _prepared_before(output, inputs_sha256):
                return prepared
            _clear(output)
            return _Preparation(data, output, tables, inputs_sha256).run()
    except pl.exceptions.ComputeError as error:
        raise DataError(
            f"{data}: a Parquet file is damaged inside ({str(error).splitlines()[0]}); write it again"
        ) from error


def _prepared_before(output: Path, inputs_sha256: str) -> PreparedLogs | None:
    """What is in `output`, if it was prepared from the same bytes by the same version."""
    if not (output / _REPORT).is_file():
        return None
    report = _read_report(output / _REPORT)
    return PreparedLogs(output, report) if report.inputs_sha256 == inputs_sha256 else None


def _inputs_sha256(data: Path) -> str:
    digest = hashlib.sha256(f"{FORMAT_VERSION}\n".encode())
    for shard in (shard for table in TABLES for shard in _shards(data, table)):
        with shard.open("rb") as file:
            digest.update(f"{shard.relative_to(data)}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _clear(output: Path) -> None:
    """Remove what an earlier preparation wrote, its report first: without it the folder is unfinished."""
    for name in (_REPORT, *(table.file for table in TABLES), _QUERY_ITEMS):
        (output / name).unlink(missing_ok=True)
    for name in (_QUARANTINE, _SORTING):
        if (output / name).is_dir():
            shutil.rmtree(output / name)


@dataclass(slots=True)
class _Audit:
    """What is wrong with the rows of one table."""

    table: Table
    read: int
    problems: list[Problem]
    bad: list[pl.DataFrame] = field(default_factory=list)  # ROW, reason

    def quarantine(self, column: str, reason: str, rows: pl.Series) -> None:
        """Set `rows` (row numbers) aside for one reason."""
        if len(rows):
            self._note(column, reason, len(rows), rows.sort().head(_FIRST_ROWS).to_list(), "quarantined")
            self.bad.append(pl.DataFrame({ROW: rows, "reason": [f"{column} {reason}"] * len(rows)}))

    def quarantine_rules(self, frame: pl.LazyFrame, rules: Sequence[Rule]) -> None:
        """Set the rows aside that break a rule, once for every rule they break."""
        for rule, rows in _broken(frame, rules):
            self.quarantine(rule.column, rule.reason, rows)

    def warn(self, frame: pl.LazyFrame, rules: Sequence[Rule]) -> None:
        """Report rows that are kept; they are counted and not held, for a tracker may blank every one."""
        if not rules:
            return
        flags = [rule.broken.fill_null(False) for rule in rules]
        counts = [flag.sum().alias(f"{INTERNAL}count{i}") for i, flag in enumerate(flags)]
        firsts = [
            pl.col(ROW).filter(flag).bottom_k(_FIRST_ROWS).implode().alias(f"{INTERNAL}first{i}")
            for i, flag in enumerate(flags)
        ]
        found = frame.select(*counts, *firsts).collect(engine="streaming").row(0)
        for rule, n, first in zip(rules, found[: len(rules)], found[len(rules) :], strict=True):
            if n:
                self._note(rule.column, rule.reason, n, sorted(first), "warning")

    def good(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """The rows of `frame` that were not set aside, in its order."""
        if not self.bad:
            return frame
        return frame.join(self.reasons().lazy(), on=ROW, how="anti", maintain_order="left")

    def reasons(self) -> pl.DataFrame:
        """One row for each row set aside: ROW and all its reasons in one text."""
        empty = pl.DataFrame(schema={ROW: pl.get_index_type(), "reason": pl.String})
        return pl.concat([empty, *self.bad]).group_by(ROW).agg(pl.col("reason").str.join("; ")).sort(ROW)

    def rows(self) -> TableRows:
        """The table's row counts."""
        quarantined = len(self.reasons())
        return TableRows(read=self.read, kept=self.read - quarantined, quarantined=quarantined)

    def _note(self, column: str, reason: str, rows: int, first_rows: list[int], severity: Severity) -> None:
        self.problems.append(
            Problem(
                file=self.table.file,
                column=column,
                reason=reason,
                severity=severity,
                rows=rows,
                first_rows=tuple(first_rows),
            )
        )


def _broken(frame: pl.LazyFrame, rules: Sequence[Rule]) -> Iterator[tuple[Rule, pl.Series]]:
    """The row numbers that break each rule, found in one pass."""
    flags = [rule.broken.fill_null(False).alias(f"{INTERNAL}rule{i}") for i, rule in enumerate(rules)]
    flagged = frame.select(ROW, *flags).filter(pl.any_horizontal(pl.exclude(ROW)))
    broken = flagged.collect(engine="streaming")
    for i, rule in enumerate(rules):
        yield rule, broken.filter(pl.col(f"{INTERNAL}rule{i}"))[ROW]


def _repeated(frame: pl.LazyFrame, key: str) -> pl.Series:
    """Row numbers whose `key` stood in an earlier row."""
    keys = frame.select(ROW, key).collect(engine="streaming").sort(ROW)
    return keys.filter(~pl.col(key).is_first_distinct())[ROW]


class _Preparation:
    """One run of `prepare_logs`; its steps depend on each other in the order of `run`."""

    def __init__(self, data: Path, output: Path, tables: dict[str, Conformed], inputs_sha256: str) -> None:
        self.data, self.output, self.tables, self.inputs_sha256 = data, output, tables, inputs_sha256
        self.audits: dict[str, _Audit] = {}
        self.order_rule = "no interactions"

    def run(self) -> PreparedLogs:
        items = self.items()
        interactions = self.check_interactions(items)
        profiles = self.check_unique(USERS, "user_id")
        qrels = self.check_qrels(items)
        self.refuse_wrong_joins()
        self.refuse_what_are_no_kinds(interactions)
        users = self.users(interactions, profiles, qrels)
        self.write_interactions(interactions, users)
        if qrels is not None:
            self.write_query_items(qrels, users)
        for audit in self.audits.values():
            self.write_quarantine(audit)
        return PreparedLogs(self.output, self.write_report())

    def audit(self, table: Table) -> _Audit:
        """Start the audit of a table that is there."""
        conformed = self.tables[table.name]
        read = conformed.frame.select(pl.len()).collect(engine="streaming").item()
        self.audits[table.name] = _Audit(table, read, list(conformed.problems))
        return self.audits[table.name]

    def check_unique(self, table: Table, key: str) -> pl.LazyFrame | None:
        """The good rows of a table with a unique key, of equal ones the first; None where it is absent."""
        if table.name not in self.tables:
            return None
        conformed, audit = self.tables[table.name], self.audit(table)
        audit.quarantine_rules(conformed.frame, conformed.rules)
        repeated = _repeated(audit.good(conformed.frame), key)
        audit.quarantine(key, "stood in an earlier row, which is kept", repeated)
        audit.warn(audit.good(conformed.frame), conformed.warnings)
        return audit.good(conformed.frame)

    def items(self) -> pl.DataFrame:
        """Write the items; returns item_id and item_row."""
        good = self.check_unique(ITEMS, "item_id")
        assert good is not None
        audit, conformed = self.audits[ITEMS.name], self.tables[ITEMS.name]
        schema = good.collect_schema()
        texts = [pl.col(c).str.strip_chars().str.len_bytes() > 0 for c in _text_columns(conformed, schema)]
        texts.append(pl.col("categories").list.len() > 0)
        textless = Rule("title", "is empty, and so is every other text: found by its ID alone", ~_any(texts))
        audit.warn(good, [textless])
        good.select(conformed.columns).sink_parquet(self.output / ITEMS.file)
        ids = pl.scan_parquet(self.output / ITEMS.file).select("item_id").collect(engine="streaming")
        return ids.with_columns(item_row=pl.int_range(len(ids), dtype=pl.Int32))

    def check_interactions(self, items: pl.DataFrame) -> pl.LazyFrame | None:
        """The good interactions with their item rows, in no particular order; None where there are none."""
        if INTERACTIONS.name not in self.tables:
            return None
        conformed, audit = self.tables[INTERACTIONS.name], self.audit(INTERACTIONS)
        known = conformed.frame.join(items.lazy(), on="item_id", how="left")
        audit.quarantine_rules(known, [*conformed.rules, _unknown("item_id", "item_row", ITEMS), _unordered(conformed)])
        good = audit.good(known)
        places = good.filter(pl.col("event") != EXPOSURE, pl.col("history_index").is_not_null())
        place = pl.struct("user_id", "history_index").alias("place")
        audit.quarantine(
            "history_index",
            "stood in an earlier row of the same user, which is kept",
            _repeated(places.select(ROW, place), "place"),
        )
        timeless = Rule(
            "timestamp",
            "is null in an exposure: the past that a model reads holds exposures by their time alone",
            (pl.col("event") == EXPOSURE) & pl.col("timestamp").is_null(),
        )
        audit.warn(audit.good(known), [*conformed.warnings, timeless])
        return audit.good(known)

    def check_qrels(self, items: pl.DataFrame) -> pl.LazyFrame | None:
        """The good judgements with query and item row; None where there are none."""
        queries = self.check_unique(QUERIES, "query_id")
        if queries is None:
            return None
        if QRELS.name not in self.tables:
            unused = f"is not used: there is no {QRELS.file} that says which items answer these queries"
            self.audits[QUERIES.name].problems.append(
                Problem(file=QUERIES.file, column=None, reason=unused, severity="warning")
            )
            return None
        conformed, audit = self.tables[QRELS.name], self.audit(QRELS)
        known = conformed.frame.join(items.lazy(), on="item_id", how="left").join(
            queries.select("query_id", "query"), on="query_id", how="left"
        )
        other_split = Rule("split", f"is none of {', '.join(SPLITS)}", ~pl.col("split").is_in(SPLITS))
        unknown = [_unknown("item_id", "item_row", ITEMS), _unknown("query_id", "query", QUERIES)]
        audit.quarantine_rules(known, [*conformed.rules, *unknown, other_split])
        return audit.good(known)

    def refuse_wrong_joins(self) -> None:
        """Raise if more than half of a table would go to quarantine."""
        lines = []
        for audit in self.audits.values():
            rows = audit.rows()
            if rows.quarantined * 2 > rows.read:
                lines.append(f"  {audit.table.file}: {rows.quarantined:,} of {rows.read:,} rows are wrong:")
                lines += [f"    {problem}" for problem in audit.problems if problem.severity == "quarantined"]
                self.write_quarantine(audit)
        if lines:
            raise DataError(
                f"{self.data} does not fit together; nothing was prepared, and the wrong rows are in "
                f"{self.output / _QUARANTINE}. Most likely a file is of another shop, or ids were mangled:\n"
                + "\n".join(lines)
            )

    def refuse_what_are_no_kinds(self, interactions: pl.LazyFrame | None) -> None:
        """Raise if there are more behaviours or scenarios than `MAX_NAMES`."""
        if interactions is None:
            return
        kinds = {"event": "of behaviour, such as click", "scenario": "of page, such as home or search, no address"}
        lines = []
        for column, kind in kinds.items():
            names = interactions.select(pl.col(column).drop_nulls().unique()).collect(engine="streaming")[column]
            if len(names) > MAX_NAMES:
                examples = ", ".join(map(repr, names.sort().head(3)))
                lines.append(
                    f"  {INTERACTIONS.file}: {column} has {len(names):,} values, such as {examples}; at most "
                    f"{MAX_NAMES:,} are read. It is a kind {kind}: write the kind, or leave the rest out"
                )
        if lines:
            raise DataError(f"{self.data} cannot be used; nothing was prepared:\n" + "\n".join(lines))

    def users(
        self, interactions: pl.LazyFrame | None, profiles: pl.LazyFrame | None, qrels: pl.LazyFrame | None
    ) -> pl.DataFrame:
        """Write the users; returns user_id and user_row.

        Users with a history come first, in the order of their first row; then those with exposures alone,
        then those of users.parquet, then those of qrels.parquet.
        """
        parts = [pl.LazyFrame(schema={"user_id": pl.String, "source": pl.Int32, "row": pl.get_index_type()})]
        if interactions is not None:
            source = pl.when(pl.col("event") == EXPOSURE).then(1).otherwise(0)
            parts.append(interactions.select("user_id", source=source, row=ROW))
        for number, frame in ((2, profiles), (3, qrels)):
            if frame is not None:
                parts.append(frame.select("user_id", source=pl.lit(number), row=ROW))
        first_rows = (
            pl.concat(parts)
            .filter(pl.col("user_id").is_not_null())
            .group_by("user_id", "source")
            .agg(pl.col("row").min())
            .collect(engine="streaming")
        )
        ids = first_rows.sort("source", "row").unique("user_id", keep="first", maintain_order=True).select("user_id")
        users = ids.lazy()
        if profiles is not None:
            columns = self.tables[USERS.name].columns
            users = users.join(profiles.select(columns), on="user_id", how="left", maintain_order="left")
        users.sink_parquet(self.output / USERS.file)
        return ids.with_columns(user_row=pl.int_range(len(ids), dtype=pl.Int32))

    def write_interactions(self, interactions: pl.LazyFrame | None, users: pl.DataFrame) -> None:
        """Write the interactions in order, and report where that order is doubtful."""
        if interactions is None:
            contract = {column.name: column.dtype for column in INTERACTIONS.columns}
            interactions = pl.LazyFrame(schema=contract | {"item_row": pl.Int32, ROW: pl.get_index_type()})
        sorting = self.output / _SORTING
        sorting.mkdir()
        numbered = interactions.join(users.lazy(), on="user_id", how="left")
        numbered.select(ROW, "history_index", *_LOGGED).sink_parquet(sorting / "numbered.parquet")
        ordered = pl.scan_parquet(_sort_by_users(sorting / "numbered.parquet", len(users)))
        if INTERACTIONS.name in self.tables:
            self.check_order(ordered)
        seconds = pl.col("timestamp").dt.epoch("s")
        ordered.select(_LOGGED).with_columns(seconds).sink_parquet(self.output / INTERACTIONS.file)
        shutil.rmtree(sorting)

    def check_order(self, ordered: pl.LazyFrame) -> None:
        """Say by what the histories are ordered, and count where times tie or contradict it."""
        same_user = pl.col("user_row") == pl.col("user_row").shift(1)
        second = pl.col("timestamp").dt.epoch("s")
        before = second.shift(1)
        history = (
            ordered.filter(pl.col("event") != EXPOSURE)
            .select(
                ROW,
                indexed=pl.col("history_index").is_not_null(),
                tied=same_user & (second == before),
                back=same_user & (second < before),
                timed=pl.col("timestamp").is_not_null(),
            )
            .collect(engine="streaming")
        )
        contradicted = "puts the row after one with a later timestamp; the index decides"
        self.audits[INTERACTIONS.name].warn(history.lazy(), [Rule("history_index", contradicted, pl.col("back"))])
        if history["indexed"].all():
            rule = "history_index"
        elif history["indexed"].any():
            rule = "history_index where given, then (timestamp, file order)"
        else:
            rule = "(timestamp, file order)"
        tied, timed = int(history["tied"].sum()), int(history["timed"].sum())
        self.order_rule = f"{rule}; {tied:,} of {timed:,} timed interactions share the second of the one before"

    def write_query_items(self, qrels: pl.LazyFrame, users: pl.DataFrame) -> None:
        """Write the judgements in file order."""
        rows = qrels.join(users.lazy(), on="user_id", how="left").sort(ROW)
        label = pl.col("label").fill_null(1.0)
        rows.select("query", "item_row", "user_row", label, "split").sink_parquet(self.output / _QUERY_ITEMS)

    def write_quarantine(self, audit: _Audit) -> None:
        """Write the rows set aside as they were read, with their row number and reasons."""
        if not audit.bad:
            return
        folder = self.output / _QUARANTINE
        folder.mkdir(exist_ok=True)
        raw, _ = _scan(self.data, audit.table)
        assert raw is not None
        clashes = {name: f"{name}_original" for name in ("row", "reason") if name in raw.collect_schema()}
        bad = raw.join(audit.reasons().lazy().rename({"reason": _REASON}), on=ROW, maintain_order="left")
        bad.rename(clashes | {ROW: "row", _REASON: "reason"}).sink_parquet(folder / audit.table.file)

    def write_report(self) -> PreparationReport:
        """Write the report, which makes the folder complete."""
        tables = {name: audit.rows() for name, audit in self.audits.items()}
        names = {name for table in TABLES for name in (table.name, table.file)}
        report = PreparationReport(
            format_version=FORMAT_VERSION,
            inputs_sha256=self.inputs_sha256,
            order_rule=self.order_rule,
            tables=tables,
            problems=[problem for audit in self.audits.values() for problem in audit.problems],
            ignored_files=sorted(
                path.name for path in self.data.iterdir() if path.name not in names and not path.name.startswith(".")
            ),
        )
        partial = self.output / f"{_REPORT}.partial"
        partial.write_text(report.model_dump_json(indent=2) + "\n")
        partial.rename(self.output / _REPORT)
        return report


def _sort_by_users(numbered: Path, n_users: int) -> list[Path]:
    """Sort a table of interactions into history order, about `_SORT_ROWS` rows at a time.

    Returns files that hold the table when read in a row, each all rows of some users.
    """
    table = pl.scan_parquet(numbered)
    n_parts = table.select(pl.len()).collect().item() // _SORT_ROWS + 1
    edges = np.linspace(0, n_users, n_parts + 1).astype(int)
    parts = [numbered.with_name(f"{part:05}.parquet") for part in range(n_parts)]
    for path, first, end in zip(parts, edges[:-1], edges[1:], strict=True):
        of_users = table.filter(pl.col("user_row").is_between(first, end, closed="left"))
        of_users.sort(_HISTORY_ORDER, nulls_last=True).sink_parquet(path)
    return parts


def _unknown(column: str, found: str, table: Table) -> Rule:
    """`column` names nothing that `table` holds; `found` is what the join brought."""
    return Rule(column, f"is not in {table.file}", pl.col(column).is_not_null() & pl.col(found).is_null())


def _unordered(conformed: Conformed) -> Rule:
    """Neither time nor place, though neither was merely unreadable, which is reported as such."""
    schema = conformed.frame.collect_schema()
    missing = pl.col("timestamp").is_null() & pl.col("history_index").is_null()
    for column in ("timestamp", "history_index"):
        if (flag := f"{UNREADABLE}{column}") in schema:
            missing &= ~pl.col(flag)
    return Rule("timestamp", "is null, and so is history_index: the row has no place in a history", missing)


def _text_columns(conformed: Conformed, schema: pl.Schema) -> list[str]:
    return [c for c in conformed.columns if schema[c] == pl.String and c not in ("item_id", "parent_id")]


def _any(conditions: Sequence[pl.Expr]) -> pl.Expr:
    return pl.any_horizontal(condition.fill_null(False) for condition in conditions)
