"""Served logs: what a server answered, and what came of it, as Parquet. A server writes them, an importer reads them.

    FOLDER/served/2026-01-31/...parquet    one row an answer: SERVED
    FOLDER/events/2026-01-31/...parquet    one row an event that a caller sent back: EVENTS

A file appears by rename when it is complete, and lies under the day (UTC) on which it was written. No file holds a
user's id: `UserKeys` says what stands for it.
"""

from __future__ import annotations

import hmac
import os
import uuid
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from genretrieval.errors import DataError, InvalidInputError

KEY_VARIABLE = "GENRETRIEVAL_LOG_KEY"
MIN_KEY_BYTES = 16
SERVED_FOLDER = "served"
EVENTS_FOLDER = "events"
PARTIAL = ".partial"

_INSTANT = pa.timestamp("us", tz="UTC")
_TEXTS = pa.list_(pa.string())
_READ = pa.struct([("item_id", pa.string()), ("event", pa.string()), ("timestamp", pa.int64())])
_ITEM = pa.struct(
    [
        ("item_id", pa.string()),
        ("rank", pa.int32()),
        ("score", pa.float32()),
        ("semantic_id", pa.list_(pa.int32())),
        ("touched_by", _TEXTS),
    ]
)

SERVED = pa.schema(
    [
        ("attribution_token", pa.string()),
        ("time", _INSTANT),
        ("user_key", pa.string()),
        # What answered.
        ("bundle_version", pa.string()),
        ("arm", pa.string()),
        ("revision", pa.int64()),
        ("catalogue_revision", pa.int64()),
        # What was asked, and of that what the model read: the query with its synonyms, events of known items.
        ("query", pa.string()),
        ("query_read", pa.string()),
        ("history_read", pa.list_(_READ)),
        ("scenario", pa.string()),
        ("profile", pa.list_(pa.struct([("name", pa.string()), ("value", pa.string())]))),
        ("filters", pa.string()),
        ("exclude_item_ids", _TEXTS),
        ("exclude_history", pa.string()),
        ("top_k", pa.int32()),
        ("beam_width", pa.int32()),
        # What was answered.
        ("items", pa.list_(_ITEM)),
        ("degraded", _TEXTS),
    ]
)
"""`filters` is JSON; `rank` counts from 0."""

EVENTS = pa.schema(
    [
        ("attribution_token", pa.string()),
        ("user_key", pa.string()),
        ("item_id", pa.string()),
        ("event", pa.string()),
        ("time", _INSTANT),
        ("value", pa.float64()),
        ("received", _INSTANT),
    ]
)
"""`time` is the caller's or, where it gave none, `received`."""

SCHEMAS = {SERVED_FOLDER: SERVED, EVENTS_FOLDER: EVENTS}


@dataclass(frozen=True)
class UserKeys:
    """What stands for users in logs: an HMAC of their id, which nobody without the secret can compute or reverse.

    Equal secrets give equal keys, so that logs of several servers, and of the time before, fit together.

    Raises:
        InvalidInputError: the secret is too short to keep ids from being guessed.
    """

    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse what is no secret."""
        if len(self.secret) < MIN_KEY_BYTES:
            raise InvalidInputError(
                f"the log key has {len(self.secret)} bytes; give at least {MIN_KEY_BYTES} random ones, e.g. those of "
                "`openssl rand -hex 32`: with a short one user ids can be guessed from the log"
            )

    @classmethod
    def load(cls, file: Path | None) -> Self | None:
        """The secret in `file`, else in the environment variable GENRETRIEVAL_LOG_KEY; None without either.

        Raises:
            InvalidInputError: the file cannot be read, or the secret is too short.
        """
        if file is None:
            given = os.environ.get(KEY_VARIABLE)
            return None if given is None else cls(given.strip().encode())
        try:
            return cls(file.read_bytes().strip())
        except OSError as error:
            raise InvalidInputError(f"the log key cannot be read from {file}: {error.strerror}") from error

    def of(self, user_id: str) -> str:
        """What stands for a user, 32 hexadecimal digits."""
        return hmac.digest(self.secret, user_id.encode(), "sha256")[:16].hex()


def write_table(folder: Path, table: pa.Table, now: datetime) -> Path:
    """Write one file of a log, durable and complete before it has its name.

    Args:
        folder: of the kind, e.g. ``LOGS/served``.
        table: rows.
        now: decides the day it lies under.

    Raises:
        OSError: as when the disk is full; nothing is left behind.
    """
    day = folder / f"{now.astimezone(UTC):%Y-%m-%d}"
    day.mkdir(parents=True, exist_ok=True)
    path = day / f"{now.astimezone(UTC):%H%M%S}-{uuid.uuid4().hex[:12]}.parquet"
    _write(path, table)
    return path


def _write(path: Path, table: pa.Table) -> None:
    # By its end no reader takes it for a file of the log, and by its beginning none lists it.
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def log_files(folder: Path) -> list[Path]:
    """Files of one kind, oldest first; those that are still being written are not among them."""
    return sorted(folder.glob("*/*.parquet"))


def unfinished(folder: Path) -> list[Path]:
    """Files of one kind that are being written, or that a writer which was killed left behind.

    Removing one of a writer that lives loses nothing: it finds that out, keeps its rows and writes them again.
    """
    return sorted(folder.glob(f"*/.*{PARTIAL}"))


def remove_unfinished(folder: Path, before: float) -> int:
    """Remove what nobody has gone on writing since `before`, in unix seconds; the number of files removed."""
    removed = 0
    for path in unfinished(folder):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()
                removed += 1
    return removed


def remove_before(folder: Path, day: date) -> int:
    """Remove what was written before `day`, also what a killed server left unfinished; the number of files removed."""
    removed = 0
    for old in (path for path in folder.glob("????-??-??") if path.name < day.isoformat()):
        for file in old.iterdir():
            file.unlink(missing_ok=True)
            removed += 1
        with suppress(FileNotFoundError):
            old.rmdir()
    return removed


@dataclass(frozen=True, slots=True)
class Forgotten:
    """What `forget_user` removed.

    Attributes:
        answers: rows of answers.
        events: rows of events.
        files: files that were written anew, or removed as nothing was left in them.
        tokens: of the user's answers, those that were given included.
    """

    answers: int
    events: int
    files: int
    tokens: frozenset[str] = frozenset()


def forget_user(folder: Path, user_key: str, tokens: Set[str] = frozenset()) -> Forgotten:
    """Remove a user's answers, and events that carry the user's key or the token of one of those answers.

    Each file is replaced by one without those rows, so that readers see either. What servers have not written yet is
    not seen: look again later, with the tokens of answers that are gone by then.

    Args:
        folder: that has ``served/`` and ``events/``.
        user_key: of `UserKeys`.
        tokens: of answers of the user that were removed before.

    Raises:
        DataError: `folder` holds no served logs.
    """
    answers = folder / SERVED_FOLDER
    if not any((folder / kind).is_dir() for kind in SCHEMAS):
        raise DataError(f"{folder} holds neither {SERVED_FOLDER}/ nor {EVENTS_FOLDER}/; give `serve --log-folder`'s")
    # Tokens lead to events that came without the user's id. The answers that have them go last, so that who is
    # interrupted finds those events the next time.
    theirs = set(tokens)
    for _, table, mine in _of_user(answers, user_key, tokens):
        theirs.update(table.filter(mine)["attribution_token"].to_pylist())
    rows, files = {SERVED_FOLDER: 0, EVENTS_FOLDER: 0}, 0
    for kind in (EVENTS_FOLDER, SERVED_FOLDER):
        for path, table, mine in _of_user(folder / kind, user_key, theirs):
            if kind == SERVED_FOLDER:  # one may have come since
                theirs.update(table.filter(mine)["attribution_token"].to_pylist())
            kept = table.filter(pc.invert(mine))
            if len(kept):
                _write(path, kept)
            else:
                path.unlink()
            rows[kind] += len(table) - len(kept)
            files += 1
    return Forgotten(rows[SERVED_FOLDER], rows[EVENTS_FOLDER], files, frozenset(theirs))


def _of_user(folder: Path, user_key: str, tokens: Set[str]) -> Iterator[tuple[Path, pa.Table, pa.Array]]:
    """Files that have rows of a user, their tables, and which rows those are."""
    known = pa.array(sorted(tokens), pa.string())

    def mine(table: pa.Table) -> pa.Array:
        by_key = pc.fill_null(pc.equal(table["user_key"], user_key), False)
        return pc.or_(by_key, pc.is_in(table["attribution_token"], value_set=known))

    for path in log_files(folder):
        if pc.any(mine(pq.read_table(path, columns=["user_key", "attribution_token"]))).as_py():
            table = pq.read_table(path)
            yield path, table, mine(table)
