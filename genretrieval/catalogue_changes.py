"""Changes of a catalogue while it is served: what a file of them may say, and what several come to.

A change is a table with one row an item:

    item_id       string, each once
    op            "upsert" (default) or "remove"
    semantic_id   list<int32>, for items that the bundle does not have
    fields        list<string>, the attributes that this row changes; null for all that the table has
    NAME          any attribute of the catalogue

An attribute that is not there stays as it is, and null is a value like any other: it takes the price away. A removal
changes attributes only where `fields` names them, and an upsert brings a removed item back.

The catalogue is at any time that of the bundle with all files in the order of their names, which begin with a time in
UTC, as ``20260131T120000-stock.parquet`` does: of an attribute the last
value holds, of an item the last `op`, and of its semantic ID the first one, because a published ID never moves. Whether
a file is refused depends on the bundle and on nothing that came before it, so every server that has the same files has
the same catalogue, in whatever order and groups it met them. A row about an item that the bundle does not have, without
an ID, waits until one comes.

A name that lies more than `AHEAD` ahead of the clock is a slip, and would outrank all that is written until then. Such
a file is no part of the catalogue before the clock comes that near; then it is, in its place.

A semantic ID means something only by the codebooks that it was made with. A file may say which
(`ChangesFile.codebooks`); a bundle with others passes over its IDs. Another bundle may have other attributes, too:
those that a bundle does not have are passed over, because the removals beside them count everywhere.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from genretrieval.bundle import CODEBOOKS, Manifest
from genretrieval.errors import DataError
from genretrieval.item_texts import item_fields
from genretrieval.keyword_codebook import EMPTY, KeywordCodebook
from genretrieval.schemas import Problem, read_as
from genretrieval.servable import NO_ATTRIBUTES, Catalogue

ITEM_ID, OP, SEMANTIC_ID, FIELDS = "item_id", "op", "semantic_id", "fields"
UPSERT, REMOVE = "upsert", "remove"
SUFFIX = ".parquet"
# Clocks of servers may differ by less than this: what one writes now, no other may take for a slip.
AHEAD = timedelta(minutes=10)

_TIME = "%Y%m%dT%H%M%S"
_BEGINS_WITH_TIME = re.compile(r"(\d{8}T\d{6})(?!\d)")
_OURS = re.compile(r"\d{8}T\d{6}\.(\d{6})Z-")
_POPULARITY = "popularity"
_VALUE = "value"
_HEADER = b"genretrieval"
_FIRST_ROWS = 5
_LONGEST_ID = 512
_CODES = pl.List(pl.Int32())


def file_name(time: datetime, rest: str) -> str:
    """Name of a file of changes made at `time`, and what tells it from others."""
    return f"{time.astimezone(UTC):{_TIME}.%f}Z-{rest}{SUFFIX}"


def time_of(name: str) -> datetime | None:
    """The time with which a file's name begins; None where it begins with none."""
    found = _BEGINS_WITH_TIME.match(name)
    try:
        return None if found is None else datetime.strptime(found[1], _TIME).replace(tzinfo=UTC)
    except ValueError:
        return None


def time_after(name: str) -> datetime | None:
    """A time whose `file_name` sorts behind a name, as close as can be; None where that begins with no time.

    Behind one of `file_name` it is a microsecond: were it a second, servers that write more often would run ahead.
    """
    time, ours = time_of(name), _OURS.match(name)
    if time is None:
        return None
    return time + (timedelta(seconds=1) if ours is None else timedelta(microseconds=int(ours[1]) + 1))


def early(names: Iterable[str], now: datetime) -> list[str]:
    """Those of files that are no part of the catalogue yet, because their time is more than `AHEAD` after `now`."""
    latest = f"{now.astimezone(UTC) + AHEAD:{_TIME}}~"
    return [name for name in names if name > latest and time_of(name) is not None]


@dataclass(frozen=True)
class ChangesFile:
    """A table of changes as it lies in a file, unchecked.

    Attributes:
        table: one row an item, see the module.
        codebooks: sha256 of the ``codebooks.safetensors`` that its semantic IDs were made with; None takes them for
            those of any bundle that they fit.
        n_sets: how many changes it is; more than one where several were merged.
        merges: names of the files whose place it takes.
        call: what the writer wants to know again, e.g. who asked for it.
    """

    table: pl.DataFrame
    codebooks: str | None = None
    n_sets: int = 1
    merges: tuple[str, ...] = ()
    call: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> ChangesFile:
        """Read one; in a file of somebody else's, the key ``genretrieval`` of the metadata may be missing.

        Raises:
            DataError: it is no whole Parquet file.
            OSError: its bytes cannot be had, which says nothing about what it is.
        """
        content = path.read_bytes()
        try:
            file = pq.ParquetFile(io.BytesIO(content))
            header: dict[str, Any] = json.loads((file.metadata.metadata or {}).get(_HEADER, b"{}"))
            table = pl.from_arrow(file.read())
            assert isinstance(table, pl.DataFrame)
            return cls(
                table,
                header.get("codebooks"),
                int(header.get("n_sets", 1)),
                tuple(header.get("merges", ())),
                dict(header.get("call", {})),
            )
        except (OSError, pa.ArrowException, pl.exceptions.PolarsError, ValueError, TypeError, AttributeError) as error:
            why = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise DataError(
                f"{path.name} cannot be read as Parquet ({why}); write it again, under another name"
            ) from error

    def write(self, path: Path) -> None:
        """Write it; it becomes visible by rename, whole.

        Raises:
            OSError: the folder is full or cannot be written to.
        """
        header = {
            "codebooks": self.codebooks,
            "n_sets": self.n_sets,
            "merges": self.merges,
            "call": dict(self.call),
        }
        # Into memory first: Polars calls a full disk an error of the format.
        content = io.BytesIO()
        self.table.write_parquet(content, metadata={_HEADER.decode(): json.dumps(header)})
        partial = path.with_name(f".{path.name}.tmp")
        try:
            with partial.open("wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class CatalogueChanges:
    """Checked changes: of each item what it becomes. Frames have the columns ``item_id``, each once, and ``value``.

    Attributes:
        removed: bool, of every item that is changed: whether it is gone afterwards.
        ids: list<int32>, semantic IDs of items that the bundle may not have, in the order in which they came.
        attributes: of each attribute that is changed, its new values.
        n_sets: how many changes they are.
        unlisted: new items whose leaf has as many items already as a response lists.
        unknown: attributes of the table that the catalogue does not have; they were passed over.
    """

    removed: pl.DataFrame
    ids: pl.DataFrame
    attributes: Mapping[str, pl.DataFrame]
    n_sets: int = 1
    unlisted: int = 0
    unknown: frozenset[str] = frozenset()

    @classmethod
    def merged(cls, changes: Sequence[CatalogueChanges]) -> CatalogueChanges:
        """What at least one comes to, one after another."""
        names = dict.fromkeys(chain.from_iterable(part.attributes for part in changes))
        return cls(
            _kept("last", [part.removed for part in changes]),
            _kept("first", [part.ids for part in changes]),
            {
                name: _kept("last", [part.attributes[name] for part in changes if name in part.attributes])
                for name in names
            },
            sum(part.n_sets for part in changes),
            sum(part.unlisted for part in changes),
            frozenset(chain.from_iterable(part.unknown for part in changes)),
        )

    def only(self, items: pl.Series) -> CatalogueChanges:
        """What becomes of some items; as a change of its own it counts as none."""

        def those(frame: pl.DataFrame) -> pl.DataFrame:
            return frame.filter(pl.col(ITEM_ID).is_in(items.implode()))

        attributes = {name: part for name, frame in self.attributes.items() if len(part := those(frame))}
        return CatalogueChanges(those(self.removed), those(self.ids), attributes, 0)

    def table(self) -> pl.DataFrame:
        """As a file says it."""
        table = self.ids.rename({_VALUE: SEMANTIC_ID}).join(
            self.removed.rename({_VALUE: OP}), on=ITEM_ID, how="full", coalesce=True, maintain_order="left_right"
        )
        table = table.with_columns(pl.when(OP).then(pl.lit(REMOVE)).otherwise(pl.lit(UPSERT)).alias(OP))
        changed = [pl.DataFrame(schema={ITEM_ID: pl.String(), FIELDS: pl.String()})]
        for name, frame in self.attributes.items():
            table = table.join(frame.rename({_VALUE: name}), on=ITEM_ID, how="left", maintain_order="left")
            changed.append(frame.select(ITEM_ID, pl.lit(name).alias(FIELDS)))
        fields = pl.concat(changed).group_by(ITEM_ID).agg(FIELDS)
        return table.join(fields, on=ITEM_ID, how="left", maintain_order="left").with_columns(
            pl.col(FIELDS).fill_null([])
        )


def _kept(keep: Any, frames: Sequence[pl.DataFrame]) -> pl.DataFrame:
    """All rows, of an item the first or the last."""
    return frames[0] if len(frames) == 1 else pl.concat(frames).unique(ITEM_ID, keep=keep, maintain_order=True)


@dataclass(frozen=True)
class ChangeChecker:
    """Finds out whether changes fit a catalogue.

    Attributes:
        catalogue: what they are checked against; for files, the bundle's as it was exported.
        manifest: of the bundle.
        keywords: where semantic IDs begin with keyword slots, what they stand for.
        strict: whether an attribute that the catalogue does not have, an item without an ID, and one that no response
            would list are mistakes, too. Somebody who changes an item by a call wants to know; in a file they are
            passed over, waited with and listed behind.
    """

    catalogue: Catalogue
    manifest: Manifest
    keywords: KeywordCodebook | None = None
    strict: bool = False

    def check(self, file: ChangesFile, source: str) -> CatalogueChanges:
        """What a file comes to.

        Args:
            file: the changes.
            source: its name, for messages.

        Raises:
            DataError: something in it is wrong; with every problem, by column and row.
        """
        return _Checked(self, file, source).changes()


class _Checked:
    """One table under examination: columns as the catalogue has them, and what is wrong with them."""

    def __init__(self, checker: ChangeChecker, file: ChangesFile, source: str) -> None:
        self.catalogue, self.manifest = checker.catalogue, checker.manifest
        self.keywords, self.strict = checker.keywords, checker.strict
        self.source, self.given = source, file.table
        ours = self.manifest.files.get(CODEBOOKS)
        self.of_our_codebooks = file.codebooks is None or ours is None or file.codebooks == ours
        self.n_sets = file.n_sets
        self.problems: list[Problem] = []
        self.unknown: set[str] = set()

    def changes(self) -> CatalogueChanges:
        """All of it, if nothing is wrong."""
        attributes = self._attributes()
        items = self._item_ids()
        removed = self._removed()
        named = self._fields()
        ids = self._semantic_ids(items)
        unlisted = 0
        for name, values in attributes.items():
            if values.dtype.is_float():
                self._wrong(name, "is NaN or infinite", ~values.is_finite())
        # What follows reads these together, so each must be right.
        if not {problem.column for problem in self.problems} & {ITEM_ID, OP, SEMANTIC_ID}:
            known = self.catalogue.item_ids.rows_of(items) >= 0
            upserted = ~removed.to_numpy()
            ids = self._with_encoded(ids, attributes, ~known & upserted)
            new = ~known & ids.is_not_null().to_numpy()
            if self.strict:
                self._wrong(ITEM_ID, self._no_id(), pl.Series(~known & ~new & upserted))
            unlisted = self._unlisted(items, ids, removed, new)
        if self.problems:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            raise DataError(f"{self.source}: refused whole, nothing of it was applied:\n{lines}")

        def frame(values: pl.Series, rows: pl.Series | None = None) -> pl.DataFrame:
            made = pl.DataFrame([items.alias(ITEM_ID), values.alias(_VALUE)])
            return made if rows is None else made.filter(rows)

        return CatalogueChanges(
            frame(removed),
            frame(ids, ids.is_not_null()),
            {name: frame(values, rows) for name, values, rows in self._set(attributes, removed, named) if rows.any()},
            self.n_sets,
            unlisted,
            frozenset(self.unknown),
        )

    def _wrong(self, column: str | None, reason: str, rows: pl.Series | None = None) -> None:
        """Note a problem: of the column as a whole, or of some rows, where there are any."""
        at: list[int] = [] if rows is None else rows.fill_null(value=False).arg_true().to_list()
        if rows is None or at:
            self.problems.append(
                Problem(
                    file=self.source,
                    column=column,
                    reason=reason,
                    severity="fatal",
                    rows=len(at),
                    first_rows=tuple(at[:_FIRST_ROWS]),
                )
            )

    def _read(self, name: str, dtype: pl.DataType, otherwise: str) -> pl.Series:
        """A column as the catalogue has it; nulls where it cannot be read so."""
        source = self.given.schema[name]
        value = read_as(pl.col(name), source, dtype)
        if value is None:
            self._wrong(name, f"is {source}, which cannot be read as {dtype}{otherwise}")
            return pl.Series(name, [None] * len(self.given), dtype)
        read = self.given.select(value.alias(name))[name]
        self._wrong(name, f"cannot be read as {dtype}{otherwise}", self.given[name].is_not_null() & read.is_null())
        return read

    def _attributes(self) -> dict[str, pl.Series]:
        """The attributes that the table has."""
        schema = {n: dtype for n, dtype in self.catalogue.table.schema.items() if n not in NO_ATTRIBUTES}
        found = {}
        for name in self.given.columns:
            if name in (ITEM_ID, OP, SEMANTIC_ID, FIELDS):
                continue
            if name == _POPULARITY:
                self._wrong(name, "comes with the bundle and is 0 for an item that comes later: leave it out")
            elif name in schema:
                found[name] = self._read(name, schema[name], ", as the catalogue has it")
            elif self.strict:
                self._wrong(name, f"is no attribute of this catalogue, which has {', '.join(sorted(schema))}")
            else:
                self.unknown.add(name)
        return found

    def _item_ids(self) -> pl.Series:
        if ITEM_ID not in self.given.columns:
            self._wrong(ITEM_ID, f"is missing: every row needs it; the table has {', '.join(self.given.columns)}")
            return pl.Series(ITEM_ID, [""] * len(self.given), pl.String())
        items = self._read(ITEM_ID, pl.String(), "")
        self._wrong(ITEM_ID, "is null or empty", self.given[ITEM_ID].is_null() | (items.str.strip_chars() == ""))
        self._wrong(ITEM_ID, f"has more than {_LONGEST_ID} characters", items.str.len_chars() > _LONGEST_ID)
        again = items.is_not_null() & ~items.is_first_distinct()
        self._wrong(ITEM_ID, "stands in an earlier row, too: which one is meant? Keep one", again)
        return items

    def _removed(self) -> pl.Series:
        """Whether each row is a removal."""
        if OP not in self.given.columns:
            return pl.Series([False] * len(self.given), dtype=pl.Boolean())
        op = self._read(OP, pl.String(), f" ({UPSERT} or {REMOVE})")
        self._wrong(OP, f"is neither {UPSERT!r} nor {REMOVE!r}", ~op.is_in([UPSERT, REMOVE]))
        return (op == REMOVE).fill_null(value=False)

    def _fields(self) -> pl.Series | None:
        """The attributes that each row changes, null for all."""
        if FIELDS not in self.given.columns:
            return None
        named = self._read(FIELDS, pl.List(pl.String()), " (names of attributes)")
        there = [name for name in self.given.columns if name not in (ITEM_ID, OP, SEMANTIC_ID, FIELDS)]
        strange = named.list.eval(~pl.element().is_in(there) | pl.element().is_null()).list.any()
        self._wrong(FIELDS, "names what is no attribute column of this table", strange)
        return named

    @staticmethod
    def _set(
        attributes: Mapping[str, pl.Series], removed: pl.Series, named: pl.Series | None
    ) -> Iterator[tuple[str, pl.Series, pl.Series]]:
        """Of each attribute its values, and which rows change it."""
        for name, values in attributes.items():
            rows = ~removed if named is None else named.list.contains(name).fill_null(~removed)
            yield name, values, rows

    def _semantic_ids(self, items: pl.Series) -> pl.Series:
        """The IDs that were given, null for none."""
        if SEMANTIC_ID not in self.given.columns or not self.of_our_codebooks:
            return pl.Series(SEMANTIC_ID, [None] * len(self.given), _CODES)
        raw = self.given[SEMANTIC_ID]
        inner = raw.dtype.inner if isinstance(raw.dtype, pl.List | pl.Array) else raw.dtype
        if not (isinstance(raw.dtype, pl.List | pl.Array) and inner.is_integer()) and raw.dtype != pl.Null:
            self._wrong(SEMANTIC_ID, f"is {raw.dtype}, not list<int32>")
            return pl.Series(SEMANTIC_ID, [None] * len(self.given), _CODES)
        given = raw.cast(pl.List(pl.Int64), strict=False)  # what is too large becomes null, and so no code
        sizes = self.manifest.codebook_sizes
        frame = pl.DataFrame({SEMANTIC_ID: given})
        codes = [pl.col(SEMANTIC_ID).list.get(level, null_on_oob=True) for level in range(len(sizes))]
        fits = [code.is_between(0, size - 1) for code, size in zip(codes, sizes, strict=True)]
        whole = pl.all_horizontal(pl.col(SEMANTIC_ID).list.len() == len(sizes), *fits).fill_null(value=False)
        there = pl.col(SEMANTIC_ID).is_not_null()
        shape = ", ".join(map(str, sizes))
        misfit = frame.select(there & ~whole).to_series()
        self._wrong(SEMANTIC_ID, f"is no ID of this bundle, which has codebooks of {shape} codes, from 0", misfit)
        if reserved := self.manifest.reserved_slots:
            first = [size - n for size, n in zip(sizes, reserved, strict=True)]
            held = pl.any_horizontal(code >= start for code, start in zip(codes, first, strict=True))
            taken = frame.select(there & whole & held).to_series()
            self._wrong(SEMANTIC_ID, "holds a reserved slot, which stands for a keyword and for no item", taken)
        if {problem.column for problem in self.problems} & {ITEM_ID, SEMANTIC_ID}:
            return given.cast(_CODES, strict=False)
        given = given.cast(_CODES)
        rows = self.catalogue.item_ids.rows_of(items)
        at = np.flatnonzero((rows >= 0) & given.is_not_null().to_numpy())
        moved = np.zeros(len(given), bool)
        if len(at):
            there_already = self.catalogue.ids.codes[rows[at]]
            asked = given.gather(at).explode().to_numpy().reshape(len(at), -1)
            moved[at] = (asked != there_already).any(axis=1)
        reason = (
            "differs from the ID that the item has, and a published ID never moves: leave it out, or take a new item_id"
        )
        self._wrong(SEMANTIC_ID, reason, pl.Series(moved))
        return given

    def _with_encoded(
        self, ids: pl.Series, attributes: Mapping[str, pl.Series], unknown: NDArray[np.bool_]
    ) -> pl.Series:
        """IDs, with those that words make: where every level of the bundle is of words, or the last one numbers."""
        numbered = self.manifest.dedup_level
        if self.keywords is None or self.keywords.n_groups + numbered != len(self.manifest.codebook_sizes):
            return ids
        rows = np.flatnonzero(unknown & ids.is_null().to_numpy())
        if not len(rows):
            return ids
        described = pl.DataFrame(
            [
                attributes[name].gather(rows) if name in attributes else pl.Series(name, [None] * len(rows), dtype)
                for name, dtype in self.catalogue.table.schema.items()
                if name not in NO_ATTRIBUTES
            ]
        )
        made = ids.to_list()
        taken: Counter[tuple[int, ...]] = Counter()
        for row, texts in zip(rows.tolist(), item_fields(described), strict=True):
            slots = tuple(self.keywords.encode_fields(texts).tolist())
            if any(slot != EMPTY for slot in slots):
                number = () if not numbered else (self._free_number(slots, taken[slots]),)
                taken[slots] += 1
                made[row] = [*slots, *number]
        return pl.Series(SEMANTIC_ID, made, _CODES)

    def _free_number(self, slots: tuple[int, ...], taken: int) -> int:
        """The next number of items with equal slots; when all are given out, the last one is shared."""
        index = self.catalogue.index
        nodes = self.catalogue.way_to(slots)
        first = 0
        if len(nodes) == len(slots):
            end = index.child_starts[-1][nodes[-1] + 1]
            first = int(index.tokens[-1][end - 1]) + 1
        return min(first + taken, self.manifest.codebook_sizes[-1] - 1)

    def _no_id(self) -> str:
        wanted = (
            "is not in the catalogue and has no semantic_id, by which a new item is found; `genretrieval tokenize "
            "append` makes one"
        )
        if self.keywords is not None:
            wanted += "; its texts make none: they have no keyword of the bundle, or its IDs say more than keywords do"
        return wanted

    def _unlisted(self, items: pl.Series, ids: pl.Series, removed: pl.Series, new: NDArray[np.bool_]) -> int:
        """Count new items on leaves that hold as many as a response lists; they come last there."""
        cap = self.manifest.leaf_cap
        if cap is None or not new.any():
            return 0
        gone = set(self.catalogue.gone.tolist())
        gone |= set(self.catalogue.item_ids.rows_of(items.filter(removed)).tolist())
        held: Counter[tuple[int, ...]] = Counter()
        full = np.zeros(len(items), bool)
        for row in np.flatnonzero(new & ~removed.to_numpy()).tolist():
            codes = tuple(ids[row].to_list())
            if codes not in held:
                nodes = self.catalogue.way_to(codes)
                on_leaf = self.catalogue.index.items_of(nodes[-1]).tolist() if len(nodes) == len(codes) else []
                held[codes] = sum(item not in gone for item in on_leaf)
            held[codes] += 1
            full[row] = held[codes] > cap
        if self.strict:
            reason = (
                f"is the ID of as many items as a response lists of one ({cap}), so that this one would not be "
                "returned: remove another one first"
            )
            self._wrong(SEMANTIC_ID, reason, pl.Series(full))
        return int(full.sum())
