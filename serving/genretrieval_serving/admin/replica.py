"""A server's copy of the admin state, which follows the store."""

from __future__ import annotations

import asyncio
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import structlog
from sqlalchemy import make_url

from genretrieval.edits import Edits
from genretrieval.errors import BundleError, InvalidInputError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest
from genretrieval.servable import Catalogue
from genretrieval_serving.admin.snapshot import AdminSnapshot
from genretrieval_serving.admin.sql import CHANNEL, shown
from genretrieval_serving.admin.store import Store
from genretrieval_serving.observability import Metrics

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.25
# Each pause is up to this much shorter or longer, so that replicas that started together do not ask together.
JITTER = 0.2
# Without a successful poll for so long, responses say `admin_state_stale`.
STALE_SECONDS = 10.0
# Most that a request waits for its `min_revision`: twice the longest pause, should a poll be missed.
WAIT_SECONDS = 0.5
# Readers that wait have the store read at most so often.
HINT_SECONDS = 0.05
ADMIN_STATE_STALE = "admin_state_stale"


class Replica:
    """Keeps an `AdminSnapshot` up to date in a thread of its own; `start`, then `stop`.

    A store that cannot be read is logged and tried again, and what was read last stays in force. Thread-safe.

    Attributes:
        snapshot: what is in force; a request keeps the one it began with.
        ready: whether the store was read at least once.
    """

    def __init__(
        self,
        store: Store,
        catalogue: Catalogue,
        reserved_slots: Sequence[int],
        metrics: Metrics,
        *,
        listen: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """A replica that has read nothing yet.

        Args:
            store: what it follows.
            catalogue: where selectors find their items.
            reserved_slots: of each level, as the bundle's manifest says.
            metrics: where revision, lag and slots are shown.
            listen: URL of the PostgreSQL database whose notifications are a hint to poll at once.
            clock: the time by which bindings and rules begin and end.

        Raises:
            InvalidInputError: `listen` is no URL of a PostgreSQL database.
        """
        self.store = store
        self.snapshot = AdminSnapshot.empty(catalogue, reserved_slots)
        self.ready = False
        self._metrics = metrics
        self._listen = None if listen is None else _postgresql(listen)
        self._clock = clock
        self._began = time.monotonic()
        self._read_at: float | None = None
        self._counted: tuple[AdminSnapshot, float] | None = None
        self._failing = False
        # One reads at a time, so that an older state never follows a newer one.
        self._reading = threading.Lock()
        self._guard = threading.Lock()
        self._waiting: dict[asyncio.Event, tuple[int, asyncio.AbstractEventLoop]] = {}
        self._hint = threading.Event()
        self._stopping = threading.Event()
        works = [self._poll, self._prepare] + ([self._heed_notifications] if listen else [])
        self._threads = [threading.Thread(target=work, name=f"admin-{i}", daemon=True) for i, work in enumerate(works)]
        metrics.watch_admin_lag(lambda: self.lag)

    @property
    def lag(self) -> float:
        """Seconds since the store was last read."""
        return time.monotonic() - (self._began if self._read_at is None else self._read_at)

    @property
    def stale(self) -> bool:
        """Whether the state may be older than a response should leave unsaid."""
        return self.lag > STALE_SECONDS

    def edits(self, request: RetrieveRequest) -> Edits:
        """What is in force for a request now."""
        return self.snapshot.edits(request, self._clock())

    async def start(self, *, allow_unbound: bool = False) -> None:
        """Begin to follow the store; returns when everything was read once, however long that takes.

        Raises:
            BundleError: bindings or rules cannot hold on this bundle, and `allow_unbound` does not leave them out.
        """
        for thread in self._threads:
            thread.start()
        try:
            await self._reached(0)
            problems = self.snapshot.problems()
            if problems and not allow_unbound:
                raise BundleError(cannot_hold(problems))
        except BaseException:
            self._end()
            raise

    async def stop(self) -> None:
        """Stop following; the snapshot stays as it is, and the store is not read any more."""
        self._end()
        await asyncio.to_thread(self._threads[0].join)

    def _end(self) -> None:
        self._stopping.set()
        self._hint.set()

    async def wait_for(self, revision: int, within: float | None = None) -> None:
        """Wait until the snapshot is at `revision` or later.

        Args:
            revision: as a change of the state returned it.
            within: seconds that the caller has; never more than `WAIT_SECONDS` are waited.

        Raises:
            StaleReplicaError: it is not there yet.
        """
        seconds = WAIT_SECONDS if within is None else min(within, WAIT_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await self._reached(revision)
        except TimeoutError:
            raise StaleReplicaError(
                f"min_revision: {revision} was asked for and this replica has {self.snapshot.revision}, after "
                f"{seconds:g} s; try again, ask another replica, or leave it out to take what there is"
            ) from None

    def refresh(self) -> int:
        """Read what changed in the store now, as after a change through this server; never raises.

        Returns:
            The revision that is in force afterwards: that of the store, unless it cannot be read.
        """
        with self._reading:
            try:
                self._catch_up()
            except Exception as error:  # noqa: BLE001 - whatever the store meets, what was read last is served
                if not self._failing:
                    log.warning("admin_state_not_read", revision=self.snapshot.revision, error=repr(error))
                self._failing = True
            else:
                if self._failing:
                    log.info("admin_state_read_again", revision=self.snapshot.revision)
                self._failing = False
            return self.snapshot.revision

    def _catch_up(self) -> None:
        begun, before = time.monotonic(), self.snapshot
        revision = self.store.revision()
        if revision < before.revision:
            raise UnavailableError(
                f"the admin store is at revision {revision} and was at {before.revision} before: an older copy of it? "
                "Start this server again to serve that"
            )
        snapshot = before
        if revision > before.revision:
            snapshot = before.updated(self.store.changes(before.revision))
        with self._guard:
            self.snapshot, self.ready, self._read_at = snapshot, True, begun
            for event, (wanted, loop) in self._waiting.items():
                if wanted <= snapshot.revision and not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)
        self._metrics.admin_revision.set(snapshot.revision)
        self._metrics.admin_skipped.set(len(snapshot.broken))
        for name, why in snapshot.broken.items() - before.broken.items():
            log.warning("admin_resource_skipped", name=name, why=why)

    def _count_slots(self) -> None:
        """Count after a change, and now and then: a slot also becomes free by the passing of time."""
        snapshot, now = self.snapshot, time.monotonic()
        if self._counted is not None and self._counted[0] is snapshot and now - self._counted[1] < STALE_SECONDS:
            return
        try:
            free = len(self.store.free_slots())
        except Exception:  # noqa: BLE001 - a store that cannot be read is logged where changes are read
            return
        self._counted = snapshot, now
        bound = snapshot.held_slots
        for state, n in (("free", free), ("bound", bound)):
            self._metrics.keyword_slots.labels(state).set(n)
        reserved = sum(snapshot.items.reserved_slots)
        self._metrics.keyword_slots.labels("quarantined").set(max(0, reserved - free - bound))

    def _poll(self) -> None:
        while not self._stopping.is_set():
            self._hint.clear()
            self.refresh()
            self._count_slots()
            self._hint.wait(POLL_SECONDS * random.uniform(1 - JITTER, 1 + JITTER))

    def _prepare(self) -> None:
        """Make text selectors quick; the first would wait for this, and a large catalogue takes a minute."""
        begun = time.monotonic()
        self.snapshot.items.prepare()
        log.info("admin_text_prepared", seconds=round(time.monotonic() - begun, 3))

    def _heed_notifications(self) -> None:
        """Poll at once where PostgreSQL says so. What is lost here is found by the next poll."""
        import psycopg

        while not self._stopping.is_set():
            try:
                with psycopg.connect(self._listen or "", autocommit=True) as connection:
                    connection.execute(f"LISTEN {CHANNEL}".encode())
                    while not self._stopping.is_set():
                        for _ in connection.notifies(timeout=STALE_SECONDS, stop_after=1):
                            self._hint.set()
            except psycopg.Error as error:
                log.warning("admin_notifications_lost", error=repr(error))
                self._stopping.wait(STALE_SECONDS)

    async def _reached(self, revision: int) -> None:
        """Wait until the store was read and was at `revision`."""
        arrived = asyncio.Event()
        with self._guard:
            if self.ready and self.snapshot.revision >= revision:
                return
            loop = asyncio.get_running_loop()
            self._waiting[arrived] = revision, loop
            age = math.inf if self._read_at is None else time.monotonic() - self._read_at
        hint = loop.call_later(max(0.0, HINT_SECONDS - age), self._hint.set)
        try:
            await arrived.wait()
        finally:
            hint.cancel()
            with self._guard:
                del self._waiting[arrived]


def cannot_hold(problems: Sequence[str]) -> str:
    """What to tell who serves a bundle on which admin state cannot hold."""
    return (
        f"the admin state does not fit this bundle in {len(problems)} places:\n"
        + "\n".join(f"- {problem}" for problem in problems)
        + "\nMend them through the admin API of a server with the old bundle, or leave them out with --allow-unbound"
    )


def _postgresql(url: str) -> str:
    """A URL of SQLAlchemy as libpq reads it."""
    parsed = make_url(url)
    if parsed.get_backend_name() != "postgresql":
        raise InvalidInputError(f"{shown(parsed)} sends no notifications, only PostgreSQL does; leave `listen` out")
    return parsed.set(drivername="postgresql").render_as_string(hide_password=False)
