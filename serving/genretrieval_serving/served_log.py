"""What was answered and what came of it, written to Parquet beside the requests, not in their way.

Rows wait in memory, a thread of its own turns them into Arrow and writes a file after a minute or `ROWS_PER_FILE` rows.
A stop writes what waits; a process that is killed loses it, at most a minute. While files cannot be written, as on a
full disk, rows are kept and tried again as long as there is room, then new ones are left out and counted. Nothing that
goes wrong with some rows ends the thread, or nobody's would be logged any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import structlog

from genretrieval.errors import InvalidInputError, OverloadedError
from genretrieval.masks import canonical_filters
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.served_logs import (
    EVENTS,
    EVENTS_FOLDER,
    SERVED,
    SERVED_FOLDER,
    Forgotten,
    UserKeys,
    forget_user,
    remove_before,
    remove_unfinished,
    unfinished,
    write_table,
)
from genretrieval_serving.deployment import Answering
from genretrieval_serving.history import open_histories
from genretrieval_serving.messages import FeedbackEvent
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

WRITE_SECONDS = 60.0
ROWS_PER_FILE = 10_000
# Rows that are no Arrow yet; the thread takes them away at once unless a disk hangs.
MAX_WAITING = 5_000
# Rows that could not be written yet.
MAX_HELD = 4 * ROWS_PER_FILE
RETRY_SECONDS = 5.0
# A stop waits so long for files where nobody says otherwise; a disk that hangs must not keep a server.
CLOSE_SECONDS = 5.0
# No write takes so long, so that a file which is unfinished since is of a server that was killed. Age decides, because
# several servers may share the folder.
UNFINISHED_SECONDS = 3600.0
# Short, so that few rows at a time are turned into Arrow: the thread holds the interpreter meanwhile.
_TAKE_SECONDS = 0.05

T = TypeVar("T")
Count = Callable[[str, int], None]
Row = dict[str, Any]


@dataclass(frozen=True)
class LogSettings:
    """How to keep served logs.

    Attributes:
        folder: made if it is not there; several servers may share it.
        sample: share of users whose answers are logged, so that what is logged of a user is whole; of answers, where
            there is no user.
        retention_days: files are removed when they are older; None keeps them.
        keys: what stands for users; without, rows are of nobody.

    Raises:
        InvalidInputError: `sample` is no share, or `retention_days` not positive.
    """

    folder: Path
    sample: float = 1.0
    retention_days: int | None = None
    keys: UserKeys | None = None

    def __post_init__(self) -> None:
        """Refuse rather than adjust."""
        if not 0 < self.sample <= 1:
            raise InvalidInputError(f"log_sample is {self.sample:g}; give a share above 0, up to 1")
        if self.retention_days is not None and self.retention_days < 1:
            raise InvalidInputError(f"log_retention_days is {self.retention_days}; give 1 or more")


@dataclass(frozen=True, slots=True)
class Answered:
    """An answer and what it was made of.

    Attributes:
        time: unix seconds at which the request came.
        request: as it was answered, with what was stored of its user.
        response: as it was sent.
        answering: what answered.
        arm: its name.
    """

    time: float
    request: RetrieveRequest
    response: RetrieveResponse
    answering: Answering
    arm: str


class ServedLog:
    """The served logs of one server."""

    def __init__(self, settings: LogSettings, metrics: Metrics, *, write_seconds: float = WRITE_SECONDS) -> None:
        """Open the folder and start to write.

        Args:
            settings: where and what.
            metrics: counts what becomes of rows.
            write_seconds: most seconds that a row waits for its file.

        Raises:
            InvalidInputError: nothing can be written to the folder.
        """
        self._settings = settings

        def open_log(kind: str, schema: pa.Schema, as_row: Callable[[Any], Row], counter: Any) -> _ParquetLog[Any]:
            def count(outcome: str, rows: int) -> None:
                counter.labels(outcome).inc(rows)

            folder = settings.folder / kind
            return _ParquetLog(folder, schema, as_row, count, write_seconds, settings.retention_days)

        self._answers = open_log(SERVED_FOLDER, SERVED, self._answer_row, metrics.served_log_records)
        self._events = open_log(EVENTS_FOLDER, EVENTS, self._event_row, metrics.events)

    def answered(self, answered: Answered) -> None:
        """Log an answer, if its user is in the sample; one too many is left out and counted."""
        if self._in_sample(answered):
            self._answers.offer([answered])

    def record(self, events: Sequence[FeedbackEvent], now: float) -> None:
        """Log events that came at `now`, in unix seconds.

        Raises:
            OverloadedError: they cannot be written fast enough; none of them was taken.
        """
        if not self._events.offer([(event, now) for event in events]):
            raise OverloadedError("events come faster than they can be written; none of these was taken: try again")

    def close(self, grace: float = CLOSE_SECONDS) -> None:
        """Write what waits, then stop; what is not written within `grace` seconds is told in the log."""
        latest = time.monotonic() + grace
        kinds = (self._answers, self._events)
        for kind in kinds:
            kind.end()
        for kind in kinds:
            kind.join(max(0.0, latest - time.monotonic()))

    def _in_sample(self, answered: Answered) -> bool:
        if self._settings.sample == 1.0:
            return True
        drawn_by = answered.request.user_id or answered.response.attribution_token
        digest = hashlib.blake2b(drawn_by.encode(), digest_size=7).digest()
        return int.from_bytes(digest, "big") < self._settings.sample * 2**56

    def _user_key(self, user_id: str | None) -> str | None:
        keys = self._settings.keys
        return keys.of(user_id) if user_id and keys is not None else None

    def _answer_row(self, answered: Answered) -> Row:
        request, response, answering = answered.request, answered.response, answered.answering
        return {
            "attribution_token": response.attribution_token,
            "time": _instant(answered.time),
            "user_key": self._user_key(request.user_id),
            "bundle_version": response.bundle_version,
            "arm": answered.arm,
            "revision": response.revision,
            "catalogue_revision": response.catalogue_revision,
            "query": request.query,
            "query_read": request.query if answering.edits.query is None else answering.edits.query,
            "history_read": [event.model_dump() for event in answering.retriever.history_read(request)],
            "scenario": request.scenario,
            "profile": [{"name": name, "value": value} for name, value in sorted(request.profile.items())],
            "filters": None if request.filters is None else canonical_filters(request.filters),
            "exclude_item_ids": request.exclude_item_ids,
            "exclude_history": request.exclude_history,
            "top_k": request.top_k,
            "beam_width": answering.retriever.beam_width(request),
            "items": [
                {
                    "item_id": item.item_id,
                    "rank": rank,
                    "score": item.score,
                    "semantic_id": item.semantic_id,
                    "touched_by": item.touched_by,
                }
                for rank, item in enumerate(response.items)
            ],
            "degraded": response.degraded,
        }

    def _event_row(self, received: tuple[FeedbackEvent, float]) -> Row:
        event, now = received
        return {
            "attribution_token": event.attribution_token or None,
            "user_key": self._user_key(event.user_id),
            "item_id": event.item_id,
            "event": event.event,
            "time": _instant(now if event.timestamp is None else event.timestamp),
            "value": event.value,
            "received": _instant(now),
        }


def forget(user_id: str, folder: Path, keys: UserKeys, histories: str | None, *, wait: bool) -> Iterator[str]:
    """Remove a user from served logs and from the store of histories; what was done, line by line.

    Args:
        user_id: as requests had it.
        folder: of the logs.
        keys: by which users are named in them.
        histories: of `open_histories`; None looks at the logs alone.
        wait: look again when running servers have written what they held in memory.

    Raises:
        DataError: `folder` holds no logs.
        UnavailableError: the store of histories cannot be reached; nothing was removed.
    """
    if histories == "memory":
        raise InvalidInputError("histories in memory are the server's own: restart it, and leave out --histories here")
    if histories is not None:
        asyncio.run(_forget_history(user_id, histories))
        yield "history: removed"
    left = [path for kind in (SERVED_FOLDER, EVENTS_FOLDER) for path in unfinished(folder / kind)]
    tokens: frozenset[str] = frozenset()
    if wait:
        removed = forget_user(folder, keys.of(user_id))
        yield _forgotten(removed)
        yield f"waiting {WRITE_SECONDS + 2 * _TAKE_SECONDS:g} s for what running servers hold; --no-wait if none runs"
        time.sleep(WRITE_SECONDS + 2 * _TAKE_SECONDS)
        tokens = removed.tokens
    # Whatever is unfinished since the beginning is of a server that was killed, and may hold the user.
    if left := [path for path in left if path.exists()]:
        for path in left:
            path.unlink(missing_ok=True)
        yield f"logs: {len(left)} files removed that were left unfinished"
    yield _forgotten(forget_user(folder, keys.of(user_id), tokens))


async def _forget_history(user_id: str, histories: str) -> None:
    provider = open_histories(histories)
    try:
        await provider.forget(user_id)
    finally:
        await provider.close()


def _forgotten(removed: Forgotten) -> str:
    return f"logs: {removed.answers} answers and {removed.events} events removed, {removed.files} files written anew"


def _instant(seconds: float) -> int:
    """As Arrow takes it without loss or a time zone's help: microseconds."""
    return round(seconds * 1e6)


class _ParquetLog(Generic[T]):
    """Rows of one kind on their way to files."""

    def __init__(
        self,
        folder: Path,
        schema: pa.Schema,
        as_row: Callable[[T], Row],
        count: Count,
        write_seconds: float,
        retention_days: int | None,
    ) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{id(self)}-{time.time_ns()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise InvalidInputError(
                f"served logs cannot be written to {folder}: {error.strerror}; give a folder that can be"
            ) from error
        self._folder, self._schema, self._as_row, self._count = folder, schema, as_row, count
        self._write_seconds, self._retention_days = write_seconds, retention_days
        # The wall clock, and then no more of its jumps: one of a year would make every file too old.
        self._epoch = time.time() - time.monotonic()
        self._waiting: deque[T] = deque()
        self._held: list[pa.RecordBatch] = []
        self._n_held = 0
        self._held_since = 0.0
        self._try_again = 0.0
        self._swept = ""
        self._closing = False
        self._wake = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=f"log-{folder.name}", daemon=True)
        self._thread.start()

    def offer(self, records: Sequence[T]) -> bool:
        """Take records, all or none; False, and counted as dropped, where there is no room. Never waits for a disk."""
        with self._wake:
            full = len(self._waiting) + len(records) > MAX_WAITING or self._n_held > MAX_HELD
            if not full and not self._closing and self._thread.is_alive():
                self._waiting.extend(records)
                return True
        self._count("dropped", len(records))
        return False

    def end(self) -> None:
        """Take no more, write what waits, and end: begun, and not waited for."""
        with self._wake:
            self._closing = True
            self._wake.notify()

    def join(self, grace: float) -> None:
        """Wait until it has ended, `grace` seconds at most."""
        self._thread.join(grace)
        if self._thread.is_alive():
            # Not counted as dropped: the write that hangs may yet succeed.
            rows = self._n_held + len(self._waiting)
            log.error("served_log_given_up", folder=str(self._folder), rows=rows, waited=round(grace, 1))

    def _work(self) -> None:
        closing = False
        while not closing:
            try:
                closing = self._turn()
            except Exception as error:  # no fault may end the thread that writes all that comes later
                closing = self._closing
                with suppress(Exception):  # there may be no memory to say so, either
                    log.error("served_log_failed", folder=str(self._folder), exc_info=error)
        if self._held or self._waiting:
            rows = self._n_held + len(self._waiting)
            self._count("dropped", rows)
            log.error("served_log_lost", folder=str(self._folder), rows=rows)

    def _turn(self) -> bool:
        """Take what has come and write what is due; whether that was all."""
        with self._wake:
            self._wake.wait_for(lambda: self._closing, timeout=_TAKE_SECONDS)
            closing = self._closing
            taken = list(self._waiting)  # whole, or not at all where there is no memory for it
            self._waiting.clear()
        now = time.monotonic()
        if taken:
            self._held_since = self._held_since if self._held else now
            self._hold(taken)
        due = now >= self._held_since + self._write_seconds or self._n_held >= ROWS_PER_FILE
        if self._held and (closing or (due and now >= self._try_again)):
            self._write()
        self._sweep()
        return closing

    def _hold(self, taken: Sequence[T]) -> None:
        """Keep records as rows until they are written; one that Arrow cannot hold is left out alone."""
        try:
            self._held.append(pa.RecordBatch.from_pylist(list(map(self._as_row, taken)), schema=self._schema))
        except Exception as error:  # noqa: BLE001 - no record may end the thread that writes all others
            if len(taken) > 1:
                for record in taken:
                    self._hold([record])
                return
            self._count("dropped", 1)
            log.error("served_log_cannot_hold", folder=str(self._folder), error=repr(error))
            return
        self._n_held += len(taken)

    def _now(self) -> datetime:
        return datetime.fromtimestamp(self._epoch + time.monotonic(), UTC)

    def _write(self) -> None:
        rows = self._n_held
        try:
            write_table(self._folder, pa.Table.from_batches(self._held, self._schema), self._now())
        except (OSError, MemoryError) as error:  # they pass
            self._try_again = time.monotonic() + RETRY_SECONDS
            self._count("failed", rows)
            why = None if isinstance(error, OSError) else error
            log.error("served_log_not_written", folder=str(self._folder), rows=rows, error=str(error), exc_info=why)
            return
        except Exception as error:  # whatever it is: rows that nobody can write must not keep out all that come later
            self._held, self._n_held = [], 0
            self._count("dropped", rows)
            log.error("served_log_lost", folder=str(self._folder), rows=rows, exc_info=error)
            return
        self._held, self._n_held = [], 0
        self._count("written", rows)

    def _sweep(self) -> None:
        """At the start and then once a day, remove what is too old, and what killed servers left unfinished."""
        today = f"{self._now():%Y-%m-%d}"
        if today == self._swept:
            return
        self._swept = today
        try:
            removed = remove_unfinished(self._folder, time.time() - UNFINISHED_SECONDS)
            if self._retention_days is not None:
                removed += remove_before(self._folder, (self._now() - timedelta(days=self._retention_days)).date())
        except (OSError, OverflowError) as error:  # the latter: of a retention that is longer than the calendar
            log.warning("served_log_not_removed", folder=str(self._folder), error=str(error))
            return
        if removed:
            log.info("served_log_removed", folder=str(self._folder), files=removed)
