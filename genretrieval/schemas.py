"""The columns of a log folder: the one place that says what its tables hold.

`conform` turns any Parquet table that can be read without loss into these columns. It looks at the table's
schema only; what it cannot know before the rows are read, it leaves behind as `Rule`s, to be applied by
`genretrieval.logs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import polars as pl
from pydantic import BaseModel, ConfigDict

from genretrieval.request import MAX_ID_LENGTH, MAX_NAME_LENGTH, MAX_QUERY_LENGTH, MAX_TIMESTAMP

EXPOSURE = "exposure"
"""The behaviour of an item that was shown and nothing else; no part of a history."""

SPLITS = ("train", "validation", "test")

INTERNAL = "__genretrieval_"
"""What columns of our own begin with; a file that has one is refused."""

UNREADABLE = f"{INTERNAL}unreadable_"
"""Before the name of a column: whether the file has a value there that cannot be read."""

ROW = f"{INTERNAL}row"
"""Row number in the file, from 0 (over all shards in name order, for a folder of shards)."""

_STRING = pl.String()
_FLOAT = pl.Float64()
_WHOLE = pl.Int64()
_INSTANT = pl.Datetime("us")
_TEXTS = pl.List(pl.String())

Severity = Literal["fatal", "quarantined", "warning"]


class Problem(BaseModel):
    """Something wrong in a file.

    Attributes:
        file: the table's file, e.g. ``items.parquet``.
        column: the column at fault, None where the file as a whole is.
        reason: what is wrong, in words that hold for every row counted.
        rows: number of rows at fault; 0 where the fault is in the schema.
        first_rows: row numbers, from 0, of the first few of them.
        severity: ``fatal`` (nothing is prepared), ``quarantined`` (rows set aside), ``warning`` (rows kept).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    column: str | None
    reason: str
    severity: Severity
    rows: int = 0
    first_rows: tuple[int, ...] = ()

    def __str__(self) -> str:
        """One line, e.g. ``items.parquet: item_id is null (2 rows quarantined, first 0, 7)``."""
        what = self.reason if self.column is None else f"{self.column} {self.reason}"
        if not self.rows:
            return f"{self.file}: {what}"
        kept = {"fatal": "", "quarantined": " quarantined", "warning": " kept"}[self.severity]
        unit = "row" if self.rows == 1 else "rows"
        return f"{self.file}: {what} ({self.rows:,} {unit}{kept}, first {', '.join(map(str, self.first_rows))})"


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: the contract's name.
        dtype: what it is read as; `conform` says from which types.
        meaning: one line for people.
        required: whether the column must be in the file.
        nullable: whether a row without a value is kept; where not, it goes to quarantine.
        aliases: other names it is read from.
        max_length: characters a text may have, as in a request; a row with a longer one goes to quarantine.
        cut: longer texts are cut, and reported, instead.
        blank_is_null: a text of nothing but spaces is none, and reported.
    """

    name: str
    dtype: pl.DataType
    meaning: str
    required: bool = False
    nullable: bool = True
    aliases: tuple[str, ...] = ()
    max_length: int | None = None
    cut: bool = False
    blank_is_null: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a log folder.

    Attributes:
        name: file name without suffix.
        columns: the contract's columns, in the order they are written.
        required: whether a folder without it is refused.
        keeps_attributes: whether columns outside the contract are kept; else they are reported and left out.
        one_of: columns of which at least one must be in the file.
    """

    name: str
    columns: tuple[Column, ...]
    required: bool = False
    keeps_attributes: bool = False
    one_of: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """File name, e.g. ``items.parquet``."""
        return f"{self.name}.parquet"


def _id(name: str, meaning: str, max_length: int | None = MAX_ID_LENGTH) -> Column:
    return Column(name, _STRING, meaning, required=True, nullable=False, max_length=max_length)


ITEMS = Table(
    "items",
    (
        _id("item_id", "the shop's id of the item; unique"),
        Column("title", _STRING, "what the item is called; may be null when another text column is filled"),
        Column("description", _STRING, "running text"),
        Column("brand", _STRING, "brand name"),
        Column("categories", _TEXTS, "category names, the most general first"),
        Column("price", _FLOAT, "price in the shop's currency"),
        Column("parent_id", _STRING, "the product this item is a variant of"),
        Column("in_stock", pl.Boolean(), "whether it can be bought; null is read as yes"),
    ),
    required=True,
    keeps_attributes=True,
)

INTERACTIONS = Table(
    "interactions",
    (
        _id("user_id", "who"),
        _id("item_id", "which item"),
        Column(
            "event",
            _STRING,
            "behaviour: exposure, click, cart, purchase, ...",
            required=True,
            nullable=False,
            max_length=MAX_NAME_LENGTH,
        ),
        Column("timestamp", _INSTANT, "when: unix seconds, a date or a datetime (UTC where no zone is given)"),
        Column(
            "history_index",
            _WHOLE,
            "place in the user's history, any increasing numbers",
            aliases=("position",),
        ),
        Column(
            "query",
            _STRING,
            "what the user had searched for",
            max_length=MAX_QUERY_LENGTH,
            cut=True,
            blank_is_null=True,
        ),
        Column("request_id", _STRING, "what was shown together", blank_is_null=True),
        Column("rank_shown", pl.Int32(), "place in the list that was shown, from 0"),
        Column("scenario", _STRING, "page or surface", max_length=MAX_NAME_LENGTH, blank_is_null=True),
        Column("value", _FLOAT, "rating, quantity or amount"),
    ),
    one_of=("timestamp", "history_index"),
)

USERS = Table("users", (_id("user_id", "unique"),), keeps_attributes=True)

QUERIES = Table(
    "queries",
    (
        _id("query_id", "unique", max_length=None),
        Column("query", _STRING, "its text", required=True, nullable=False, max_length=MAX_QUERY_LENGTH, cut=True),
    ),
)

QRELS = Table(
    "qrels",
    (
        _id("query_id", "a query of queries.parquet", max_length=None),
        _id("item_id", "an item judged for it"),
        Column("user_id", _STRING, "for whom it was judged; null: for everybody", max_length=MAX_ID_LENGTH),
        Column("label", pl.Float32(), "grade of relevance, 0 for irrelevant; null is read as 1"),
        Column("split", _STRING, "train, validation or test"),
    ),
)

TABLES = (ITEMS, INTERACTIONS, USERS, QUERIES, QRELS)


@dataclass(frozen=True, slots=True)
class Rule:
    """A condition that makes a row wrong, or worth a word.

    Attributes:
        column: the column it is about.
        reason: what is wrong with the row, following the column's name in a sentence.
        broken: boolean expression over the conformed table; null counts as false.
    """

    column: str
    reason: str
    broken: pl.Expr


@dataclass(frozen=True, slots=True)
class Conformed:
    """A table in the contract's columns.

    Attributes:
        frame: lazy; `ROW` where the source has it, every column of the table (null where the file lacks it),
            the attributes that are kept, and helper columns of `rules` and `warnings`, named `INTERNAL` and more.
        columns: names of the contract's columns and the kept attributes, in this order.
        rules: conditions that send a row to quarantine.
        warnings: conditions that are counted; their rows are kept.
        problems: what the schema alone shows. If one is ``fatal``, `frame` must not be read.
    """

    frame: pl.LazyFrame
    columns: list[str]
    rules: list[Rule]
    warnings: list[Rule]
    problems: list[Problem]

    @property
    def fatal(self) -> bool:
        """Whether the table cannot be read at all."""
        return any(problem.severity == "fatal" for problem in self.problems)


def conform(frame: pl.LazyFrame, table: Table) -> Conformed:
    """Read `frame` as `table`, casting where nothing is lost.

    Ids and texts are read from strings, whole numbers and categoricals, and from no floats or decimals, in which 7
    and 7.0 would be two ids; numbers from any number; whole numbers from floats that are whole; `categories` from a
    list or from one string. Texts are cut or emptied as their `Column` says. A timestamp is read from
    unix seconds (any number), a date, a datetime (no zone means UTC), or one of these as an ISO 8601 string.
    Milliseconds are not guessed: they fall after the year 9999 and are refused. Lists of floats among the
    attributes are embeddings and become float32.

    Args:
        frame: a scan of the table's file; its schema is resolved, its rows are not read.
        table: one of `TABLES`.
    """
    source = frame.collect_schema()
    names, problems = _source_names(source, table)
    values: list[pl.Expr] = [pl.col(ROW)] if ROW in source else []
    rules: list[Rule] = []
    warnings: list[Rule] = []
    for column in table.columns:
        name = names.get(column.name)
        if name is None:
            values.append(pl.lit(None, column.dtype).alias(column.name))
            continue
        value = read_as(pl.col(name), source[name], column.dtype)
        if value is None:
            reason = f"is {source[name]}, which cannot be read as {column.dtype} ({column.meaning})"
            if column.dtype == _STRING and source[name].is_numeric():
                reason += ": cast it to whole numbers or text; floats lose digits of long ids"
            problems.append(Problem(file=table.file, column=name, reason=reason, severity="fatal"))
            continue
        flag = f"{UNREADABLE}{column.name}"
        values.append((pl.col(name).is_not_null() & value.is_null()).alias(flag))
        rules += [Rule(column.name, _unreadable(column.dtype), pl.col(flag)), *_value_rules(column, flag)]
        value, changes = _tidied(value, column)
        for kind, (reason, changed) in changes.items():
            flag = f"{INTERNAL}{kind}_{column.name}"
            values.append(changed.alias(flag))
            warnings.append(Rule(column.name, reason, pl.col(flag)))
        values.append(value.alias(column.name))
    extra = [name for name in source if name != ROW and name not in names.values()]
    if table.keeps_attributes:
        for name in extra:
            value, attribute_rules = _attribute(name, source[name])
            values.append(value)
            rules += attribute_rules
    else:
        problems += [
            Problem(
                file=table.file,
                column=name,
                reason="is no column of this table: left out",
                severity="warning",
            )
            for name in extra
        ]
    columns = [column.name for column in table.columns] + (extra if table.keeps_attributes else [])
    return Conformed(frame.select(values), columns, rules, warnings, problems)


def _source_names(source: pl.Schema, table: Table) -> tuple[dict[str, str], list[Problem]]:
    """The file's name of each contract column that it has, and what is missing or there twice."""
    names: dict[str, str] = {}
    problems: list[Problem] = []
    for column in table.columns:
        given = [name for name in (column.name, *column.aliases) if name in source]
        if len(given) > 1:
            reason = f"is given twice, as {' and '.join(given)}: remove one"
            problems.append(Problem(file=table.file, column=column.name, reason=reason, severity="fatal"))
        if given:
            names[column.name] = given[0]
        elif column.required:
            reason = f"is missing: every row needs it ({column.meaning}); the file has {', '.join(source)}"
            problems.append(Problem(file=table.file, column=column.name, reason=reason, severity="fatal"))
    if table.one_of and not any(name in names for name in table.one_of):
        reason = f"is missing, and so is {' and '.join(table.one_of[1:])}: a history's order needs one of them"
        problems.append(Problem(file=table.file, column=table.one_of[0], reason=reason, severity="fatal"))
    return names, problems


def read_as(raw: pl.Expr, source: pl.DataType, target: pl.DataType) -> pl.Expr | None:
    """`raw` as `target` as `conform` reads it, null where a value cannot be read; None where the type cannot."""
    if source == pl.Null:
        return raw.cast(target)
    if target == _INSTANT:
        return _read_instant(raw, source)
    if target == _STRING:
        readable = source.is_integer() or isinstance(source, pl.String | pl.Categorical | pl.Enum)
        return raw.cast(pl.String) if readable else None
    if target == _TEXTS:
        return _read_texts(raw, source)
    if target.is_float():
        return raw.cast(target) if source.is_numeric() else None
    if target.is_integer():
        if source.is_float():
            return pl.when(raw == raw.floor()).then(raw.cast(target, strict=False))
        return raw.cast(target, strict=False) if source.is_integer() else None
    return raw if source == target else None


def _read_instant(raw: pl.Expr, source: pl.DataType) -> pl.Expr | None:
    """Microseconds since 1970 without a zone, meaning UTC; null outside of 1970 to 9999."""
    if isinstance(source, pl.Datetime):
        zoneless = raw if source.time_zone is None else raw.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        value = zoneless.cast(_INSTANT)
    elif source == pl.Date:
        value = raw.cast(_INSTANT)
    elif source.is_numeric():
        value = _from_seconds(raw, source)
    elif isinstance(source, pl.String):
        value = _from_text(raw)
    else:
        return None
    return pl.when(value.dt.timestamp("us") >= 0).then(value)


def _from_seconds(seconds: pl.Expr, source: pl.DataType) -> pl.Expr:
    # The range is checked before the product, which would wrap around.
    exact = seconds.cast(pl.Int64, strict=False) if source.is_integer() else seconds.cast(pl.Float64, strict=False)
    microseconds = pl.when(exact.is_between(0, MAX_TIMESTAMP)).then(exact) * 1_000_000
    return microseconds.round().cast(pl.Int64, strict=False).cast(_INSTANT)


def _from_text(text: pl.Expr) -> pl.Expr:
    iso = text.str.replace(" ", "T", literal=True).str.replace("Z$", "+00:00")
    seconds = "%Y-%m-%dT%H:%M:%S%.f"
    return pl.coalesce(
        iso.str.to_datetime(seconds, strict=False, time_unit="us"),
        iso.str.to_datetime(f"{seconds}%:z", strict=False, time_unit="us").dt.replace_time_zone(None),
        iso.str.to_date("%Y-%m-%d", strict=False).cast(_INSTANT),
        _from_seconds(text, pl.String()),
    )


def _read_texts(raw: pl.Expr, source: pl.DataType) -> pl.Expr | None:
    if isinstance(source, pl.List):
        inner = read_as(pl.element(), _inner(source), _STRING)
        return None if inner is None else raw.cast(_TEXTS)
    one = read_as(raw, source, _STRING)
    return None if one is None else pl.when(raw.is_not_null()).then(pl.concat_list(one))


def _inner(dtype: pl.List | pl.Array) -> pl.DataType:
    # Polars types the element of a list as a class or an instance; a schema that was read holds instances.
    assert isinstance(dtype.inner, pl.DataType)
    return dtype.inner


def _unreadable(dtype: pl.DataType) -> str:
    if dtype == _INSTANT:
        return "is no time between 1970 and 9999 (unix seconds; divide milliseconds by 1000)"
    return f"cannot be read as {dtype}"


def _tidied(value: pl.Expr, column: Column) -> tuple[pl.Expr, dict[str, tuple[str, pl.Expr]]]:
    """A column's value, cut and without blanks where its declaration says so; kind of change to reason and where."""
    changes = {}
    if column.cut and column.max_length is not None:
        changes["cut"] = f"is longer than {column.max_length:,} characters: cut", _longer(value, column.max_length)
        value = value.str.head(column.max_length)
    if column.blank_is_null:
        blank = value.str.strip_chars().str.len_bytes() == 0
        changes["blank"] = "is blank: read as null", blank
        value = pl.when(~blank).then(value)
    return value, changes


def _longer(text: pl.Expr, max_length: int) -> pl.Expr:
    return text.str.len_chars() > max_length


def _value_rules(column: Column, unreadable: str) -> list[Rule]:
    """Rules that follow from a column's declaration."""
    value = pl.col(column.name)
    rules = []
    if not column.nullable:
        empty = value.str.strip_chars().str.len_bytes() == 0
        rules.append(Rule(column.name, "is null or empty", ~pl.col(unreadable) & (value.is_null() | empty)))
    if column.max_length is not None and not column.cut:
        reason = f"is longer than {column.max_length:,} characters, which no request may hold"
        rules.append(Rule(column.name, reason, _longer(value, column.max_length)))
    if column.dtype.is_float():
        rules.append(Rule(column.name, "is NaN or infinite", ~value.is_finite()))
    return rules


def _attribute(name: str, dtype: pl.DataType) -> tuple[pl.Expr, list[Rule]]:
    """An attribute as it is, or, if it is a list of floats, as an embedding."""
    if not isinstance(dtype, pl.List | pl.Array) or not _inner(dtype).is_float():
        return pl.col(name), []
    vector = pl.List(pl.Float32())
    not_finite = pl.col(name).list.eval(~pl.element().is_finite()).list.any()
    return pl.col(name).cast(vector), [Rule(name, "holds NaN or infinite values", not_finite)]
