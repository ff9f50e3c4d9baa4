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
from genretrieval_serving.admin.resources import Kind, Resource
from genretrieval_serving.admin.snapshot import AdminSnapshot, Items
from genretrieval_serving.admin.sql import CHANNEL, shown
from genretrieval_serving.admin.store import Changes, Store
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


class View:
    """The admin state on one state of a catalogue, kept at the revision of its replica until that drops it.

    Attributes:
        snapshot: what is in force; a request keeps the one it began with.
    """

    def __init__(self, replica: Replica, snapshot: AdminSnapshot) -> None:
        """Use `Replica.view`."""
        self.snapshot = snapshot
        self._replica = replica

    @property
    def stale(self) -> bool:
        """Whether the state may be older than a response should leave unsaid."""
        return self._replica.stale

    def edits(self, request: RetrieveRequest) -> Edits:
        """What is in force for a request now."""
        return self.snapshot.edits(request, self._replica.clock())

    def on(self, catalogue: Catalogue) -> View:
        """Another view, on a later state of the catalogue, whose rows did not move."""
        return self._replica.view(self.snapshot.items.on(catalogue), before=self)

    def drop(self) -> None:
        """Stay as it is from now on, for those that still use it."""
        self._replica.drop(self)


class Replica:
    """Keeps the admin state up to date in a thread of its own, on every catalogue that is served.

    `start`, then `stop`. A store that cannot be read is logged and tried again, and what was read last stays in force.
    Thread-safe.

    Attributes:
        clock: the time by which bindings and rules begin and end.
        revision: of the state that is in force.
        ready: whether the store was read at least once.
    """

    def __init__(
        self,
        store: Store,
        metrics: Metrics,
        *,
        listen: str | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """A replica that has read nothing yet.

        Args:
            store: what it follows.
            metrics: where revision, lag and slots are shown.
            listen: URL of the PostgreSQL database whose notifications are a hint to poll at once.
            clock: see above.

        Raises:
            InvalidInputError: `listen` is no URL of a PostgreSQL database.
        """
        self.store = store
        self.clock = clock
        self.revision = 0
        self.ready = False
        self._resources: dict[str, tuple[Kind, Resource]] = {}
        self._views: tuple[View, ...] = ()
        # For every view that is being built, what changed since it was begun.
        self._missed: list[list[Changes]] = []
        self._broken: dict[str, str] = {}
        self._metrics = metrics
        self._listen = None if listen is None else _postgresql(listen)
        self._began = time.monotonic()
        self._read_at: float | None = None
        self._counted: tuple[int, float] | None = None
        self._failing = False
        # One reads at a time, so that an older state never follows a newer one.
        self._reading = threading.Lock()
        self._guard = threading.Lock()
        self._waiting: dict[asyncio.Event, tuple[int, asyncio.AbstractEventLoop]] = {}
        self._hint = threading.Event()
        self._stopping = threading.Event()
        works = [self._poll] + ([self._heed_notifications] if listen else [])
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

    def get(self, kind: Kind, id_: str) -> Resource | None:
        """A resource as it is in force; None where there is none, or it was deleted."""
        _, resource = self._resources.get(f"{kind}/{id_}", (None, None))
        return resource

    def all(self, kind: Kind) -> list[Resource]:
        """Every resource of a kind that is in force."""
        return [resource for found, resource in self._resources.values() if found is kind]

    def view(self, items: Items, *, before: View | None = None, allow_unbound: bool = True) -> View:
        """The state on a catalogue, from now on kept up to date as all views are. Takes a while; not for the loop.

        Args:
            items: of the catalogue, with the slots that its bundle reserves.
            before: of an earlier state of the catalogue, not dropped yet; what cannot differ is taken from it.
            allow_unbound: leave out what cannot hold there.

        Raises:
            BundleError: bindings or rules cannot hold there, and `allow_unbound` does not leave them out.
        """
        missed: list[Changes] = []
        with self._reading:
            assert before is None or before in self._views
            base = AdminSnapshot(items, self.revision, self._resources, {}, {}) if before is None else before.snapshot
            self._missed.append(missed)
        try:
            # Selectors are resolved while changes go on being followed; what came meanwhile is made up for.
            snapshot = base.on(items)
            if not allow_unbound and (problems := snapshot.problems()):
                raise BundleError(cannot_hold(problems))
        except BaseException:
            with self._reading:
                self._forget(missed)
            raise
        with self._reading:
            self._forget(missed)
            for changes in missed:
                snapshot = snapshot.updated(changes)
            view = View(self, snapshot)
            self._views = (*self._views, view)
            self._note_broken()
        return view

    def drop(self, view: View) -> None:
        """Keep a view up to date no longer."""
        with self._reading:
            self._views = tuple(kept for kept in self._views if kept is not view)
            self._note_broken()

    def _forget(self, missed: list[Changes]) -> None:
        self._missed = [other for other in self._missed if other is not missed]

    async def start(self) -> None:
        """Begin to follow the store; returns when everything was read once, however long that takes."""
        for thread in self._threads:
            thread.start()
        try:
            await self._reached(0)
        except BaseException:
            self._end()
            raise

    async def stop(self) -> None:
        """Stop following; the views stay as they are, and the store is not read any more."""
        self._end()
        await asyncio.to_thread(self._threads[0].join)

    def _end(self) -> None:
        self._stopping.set()
        self._hint.set()

    async def wait_for(self, revision: int, within: float | None = None) -> None:
        """Wait until the state in force is at `revision` or later.

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
                f"min_revision: {revision} was asked for and this replica has {self.revision}, after "
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
                    log.warning("admin_state_not_read", revision=self.revision, error=repr(error))
                self._failing = True
            else:
                if self._failing:
                    log.info("admin_state_read_again", revision=self.revision)
                self._failing = False
            return self.revision

    def _catch_up(self) -> None:
        begun, before = time.monotonic(), self.revision
        revision = self.store.revision()
        if revision < before:
            raise UnavailableError(
                f"the admin store is at revision {revision} and was at {before} before: an older copy of it? "
                "Start this server again to serve that"
            )
        if revision > before:
            changes = self.store.changes(before)
            revision = changes.revision
            snapshots = [view.snapshot.updated(changes) for view in self._views]
            for missed in self._missed:
                missed.append(changes)
            self._resources = _after(self._resources, changes)
            for view, snapshot in zip(self._views, snapshots, strict=True):
                view.snapshot = snapshot
            self._note_broken()
        with self._guard:
            self.revision, self.ready, self._read_at = revision, True, begun
            for event, (wanted, loop) in self._waiting.items():
                if wanted <= revision and not loop.is_closed():
                    loop.call_soon_threadsafe(event.set)
        self._metrics.admin_revision.set(revision)

    def _note_broken(self) -> None:
        """Log what is newly left out of any view, and count all that is."""
        before, self._broken = self._broken, {}
        for view in self._views:
            self._broken |= view.snapshot.broken
        self._metrics.admin_skipped.set(len(self._broken))
        for name, why in self._broken.items() - before.items():
            log.warning("admin_resource_skipped", name=name, why=why)

    def _count_slots(self) -> None:
        """Count after a change, and now and then: a slot also becomes free by the passing of time."""
        revision, now = self.revision, time.monotonic()
        if self._counted is not None and self._counted[0] == revision and now - self._counted[1] < STALE_SECONDS:
            return
        try:
            counts = self.store.slot_counts()
        except Exception:  # noqa: BLE001 - a store that cannot be read is logged where changes are read
            return
        self._counted = revision, now
        for state, n in (("free", counts.free), ("bound", counts.bound), ("quarantined", counts.quarantined)):
            self._metrics.keyword_slots.labels(state).set(n)

    def _poll(self) -> None:
        while not self._stopping.is_set():
            self._hint.clear()
            self.refresh()
            self._count_slots()
            self._hint.wait(POLL_SECONDS * random.uniform(1 - JITTER, 1 + JITTER))

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
            if self.ready and self.revision >= revision:
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


def _after(resources: dict[str, tuple[Kind, Resource]], changes: Changes) -> dict[str, tuple[Kind, Resource]]:
    """Resources that are not deleted, by name, after some changes."""
    changed = {f"{kind}/{resource.id}": (kind, resource) for kind, resource in changes.resources}
    return {name: found for name, found in {**resources, **changed}.items() if found[1].deleted_at is None}


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
