"""The whole admin state as one file, and back into an empty store of either kind.

A file is JSON Lines: a header, every row of every table as it stood at one moment, deleted resources and the hashes of
API keys included, and at the end their number and the hash of all that comes before it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from genretrieval.errors import ConflictError, InvalidInputError
from genretrieval_serving.admin.sql import SqlStore, metadata

FORMAT = "genretrieval-admin-backup"
_AT_ONCE = 500
# What JSON does not have, by the type of a column: how it is written, and how it is read.
_WRITTEN: dict[type[Any], tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    datetime: (datetime.isoformat, datetime.fromisoformat),
    bytes: (lambda value: base64.b64encode(value).decode(), base64.b64decode),
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What a backup holds: the revision of the state, and the rows of each table."""

    revision: int
    rows: dict[str, int]


def backup(store: SqlStore, file: Path) -> Contents:
    """Write everything to `file`, which becomes visible when it is complete, for its owner alone to read.

    Writers are not held up.

    Raises:
        InvalidInputError: the file cannot be written.
        UnavailableError: the store cannot be reached.
    """
    unfinished = file.with_name(file.name + ".unfinished")
    try:
        with open(os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), "w+b") as output:

            def write(connection: Connection) -> Contents:
                output.seek(0)
                output.truncate()
                digest, rows = hashlib.sha256(), {}

                def line(value: object) -> None:
                    content = json.dumps(value, ensure_ascii=False).encode() + b"\n"
                    digest.update(content)
                    output.write(content)

                revision = _revision(connection)
                begun = {"revision": revision, "created_at": datetime.now(UTC).isoformat()}
                line({"format": FORMAT, "schema": _schema(connection), **begun})
                for table in metadata.sorted_tables:
                    found = connection.execution_options(yield_per=_AT_ONCE).execute(table.select())
                    rows[table.name] = 0
                    for row in found.mappings():
                        line([table.name, {c.name: _written(c, row[c.name]) for c in table.columns}])
                        rows[table.name] += 1
                line({"rows": sum(rows.values()), "sha256": digest.hexdigest()})
                return Contents(revision, rows)

            contents = store.read_all(write)
            output.flush()
            os.fsync(output.fileno())
        unfinished.replace(file)
    except OSError as error:
        raise InvalidInputError(f"the backup cannot be written to {file}: {error.strerror}") from error
    finally:
        with suppress(OSError):
            unfinished.unlink(missing_ok=True)
    return contents


def restore(store: SqlStore, file: Path) -> Contents:
    """Fill an empty store from `file`, all or nothing; the revision goes on where it was.

    Raises:
        InvalidInputError: the file cannot be read, is no backup or not a whole one, or is of a newer genretrieval.
        ConflictError: the store is not empty.
        UnavailableError: the store cannot be reached.
    """
    header = _checked(file)

    def fill(connection: Connection) -> Contents:
        known = store.known_schemas()
        if header["schema"] not in known:
            raise InvalidInputError(
                f"{file} was made from tables of version {header['schema']}, and this genretrieval knows "
                f"{', '.join(sorted(known))}; restore it with the one that made it, or a newer one"
            )
        tables = metadata.tables
        # The row that every writer locks first, so that the store is still empty when this is done.
        connection.execute(tables["revision"].select().with_for_update())
        used = [name for name in ("documents", "audit_events", "api_keys") if _count(connection, tables[name])]
        if _revision(connection) or used:
            raise ConflictError(
                "the store to restore to is not empty: what it has would be mixed with the backup. Give an empty "
                "database"
            )
        rows = {table.name: 0 for table in metadata.sorted_tables}
        for name in ("slots", "revision"):  # what a server declared that has begun on it; and 0
            connection.execute(tables[name].delete())
        for name, entries in groupby(_rows(file), key=lambda entry: entry[0]):
            while chunk := [row for _, row in islice(entries, _AT_ONCE)]:
                columns = tables[name].c
                connection.execute(
                    tables[name].insert(), [{c: _read(columns[c], value) for c, value in row.items()} for row in chunk]
                )
                rows[name] += len(chunk)
        if connection.dialect.name == "postgresql":
            last = sa.select(sa.func.max(tables["audit_events"].c.seq)).scalar_subquery()
            sequence = sa.func.pg_get_serial_sequence("audit_events", "seq")
            connection.execute(sa.select(sa.func.setval(sequence, last)))
        return Contents(_revision(connection), rows)

    return store.write_all(fill)


def _written(column: sa.Column[Any], value: Any) -> Any:
    ways = _WRITTEN.get(column.type.python_type)
    return value if value is None or ways is None else ways[0](value)


def _read(column: sa.Column[Any], value: Any) -> Any:
    ways = _WRITTEN.get(column.type.python_type)
    return value if value is None or ways is None else ways[1](value)


def _revision(connection: Connection) -> int:
    return int(connection.scalars(sa.select(metadata.tables["revision"].c.value)).one())


def _schema(connection: Connection) -> str:
    return str(connection.scalars(sa.text("SELECT version_num FROM alembic_version")).one())


def _count(connection: Connection, table: sa.Table) -> int:
    return int(connection.scalars(sa.select(sa.func.count()).select_from(table)).one())


def _checked(file: Path) -> dict[str, Any]:
    """The header of a whole backup."""
    digest, n_rows, lines = hashlib.sha256(), 0, _lines(file)
    header = next(lines, b"")
    last = header
    for line in lines:
        digest.update(last)
        n_rows += 1
        last = line
    try:
        first, end = json.loads(header), json.loads(last)
        if first["format"] != FORMAT:
            raise ValueError("it is of another format")
        if end != {"rows": n_rows - 1, "sha256": digest.hexdigest()}:
            raise ValueError("it ends too early, or was changed")
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(f"{file} is no whole backup of admin state: {error!r}; take another one") from error
    return dict(first)


def _rows(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in _lines(file):
        entry = json.loads(line)
        if isinstance(entry, list):
            yield entry[0], entry[1]


def _lines(file: Path) -> Iterator[bytes]:
    try:
        with file.open("rb") as lines:
            yield from lines
    except OSError as error:
        raise InvalidInputError(f"the backup {file} cannot be read: {error.strerror}") from error
