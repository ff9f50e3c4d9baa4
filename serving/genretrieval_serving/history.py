"""Histories by user id: what is stored of a user completes the request, in time or not at all.

How the two are put together (`merged`):

1. A stored event that the request carries too (same item, behaviour and time) is left out; so is a dated one that is
   stored twice, as when a caller sent it again.
2. All events of the request stay. Of the stored ones there is room for the newest, up to `MAX_HISTORY_EVENTS` in all.
3. They are ordered by time. At equal times what is stored comes first, as the request is newer.
4. An undated event of the request stands right before the next dated one of the request, and behind everything where
   there is none. A stored one stands right behind the dated one before it, and before everything where there is none.

A request without stored events stays as it came.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast
from urllib.parse import urlsplit

import structlog
from pydantic import TypeAdapter, ValidationError

from genretrieval.errors import DataError, InvalidInputError, MissingExtraError, UnavailableError
from genretrieval.request import MAX_HISTORY_EVENTS, HistoryEvent, RetrieveRequest, RetrieveResponse
from genretrieval.schemas import EXPOSURE
from genretrieval_serving.messages import FeedbackEvent
from genretrieval_serving.observability import Metrics

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = structlog.get_logger(__name__)

HISTORY_UNAVAILABLE = "history_unavailable"
# So long a request waits for its stored history.
BUDGET_SECONDS = 0.02
# So long the store may take when nobody waits any more: a first connection may need longer than the budget.
PATIENCE_SECONDS = 1.0
# After so many failures in a row, over so many seconds, nobody waits for the store, until one request in
# `PAUSE_SECONDS` finds it well again. A burst at a pool without connections, or a loop that was held up, is no reason.
MAX_FAILURES = 5
FAILING_SECONDS = 1.0
PAUSE_SECONDS = 5.0
MAX_USERS_IN_MEMORY = 10_000
MAX_CONNECTIONS = 32
KEPT_SECONDS = 90 * 86_400
KEY_PREFIX = "genretrieval:history:"
_EVENTS = TypeAdapter(list[HistoryEvent])


class HistoryProvider(Protocol):
    """Keeps the newest events of users. Raises `UnavailableError` when it cannot be asked."""

    async def get(self, user_id: str) -> list[HistoryEvent]:
        """A user's events, in the order in which they were added; none of a user that is not known.

        Raises:
            UnavailableError: the store cannot be asked.
            DataError: what is stored of the user cannot be read.
        """
        ...

    async def append(self, user_id: str, events: Sequence[HistoryEvent]) -> None:
        """Add events; beyond `MAX_HISTORY_EVENTS` the first that were added go."""
        ...

    async def forget(self, user_id: str) -> None:
        """Remove all of a user."""
        ...

    async def close(self) -> None:
        """Give connections back."""
        ...


class MemoryHistories:
    """Histories of the users last seen, in the process and gone with it: for one server, and to try things out."""

    def __init__(self, max_users: int = MAX_USERS_IN_MEMORY) -> None:
        """Keep up to `max_users`; a further one takes the place of the one that was longest not seen."""
        self._max_users = max_users
        self._of_user: OrderedDict[str, deque[HistoryEvent]] = OrderedDict()

    async def get(self, user_id: str) -> list[HistoryEvent]:
        """See `HistoryProvider`."""
        if user_id not in self._of_user:
            return []
        self._of_user.move_to_end(user_id)
        return list(self._of_user[user_id])

    async def append(self, user_id: str, events: Sequence[HistoryEvent]) -> None:
        """See `HistoryProvider`."""
        self._of_user.setdefault(user_id, deque(maxlen=MAX_HISTORY_EVENTS)).extend(events)
        self._of_user.move_to_end(user_id)
        if len(self._of_user) > self._max_users:
            self._of_user.popitem(last=False)

    async def forget(self, user_id: str) -> None:
        """See `HistoryProvider`."""
        self._of_user.pop(user_id, None)

    async def close(self) -> None:
        """Nothing to give back."""


class RedisHistories:
    """Histories in Redis, which all replicas share; reading and writing are one round trip each.

    Of every user one list ``genretrieval:history:USER_ID``; an element is an event as in a request, in JSON, so that a
    shop's own pipeline can write them too. A list that nobody adds to is gone after 90 days.
    """

    def __init__(self, url: str) -> None:
        """Connect when first asked.

        Args:
            url: ``redis://``, ``rediss://`` or ``unix://``, as the Redis client reads it.

        Raises:
            MissingExtraError: the Redis client is not installed.
            InvalidInputError: it cannot read `url`.
        """
        try:
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
            from redis.exceptions import RedisError
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                "histories in Redis need its client; `pip install 'genretrieval[redis]'` brings it"
            ) from error
        self._failures = (RedisError, OSError, TimeoutError)
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=MAX_CONNECTIONS,
                timeout=PATIENCE_SECONDS,
                socket_timeout=PATIENCE_SECONDS,
                socket_connect_timeout=PATIENCE_SECONDS,
                # Once more for a connection that broke while nobody used it.
                retry=Retry(NoBackoff(), 1),
            )
        except ValueError:
            # Without what was given: it may hold a password.
            raise InvalidInputError(
                "histories: the address is none of Redis; give redis://HOST:PORT/DATABASE"
            ) from None
        self._redis: Redis = Redis.from_pool(pool)

    async def get(self, user_id: str) -> list[HistoryEvent]:
        """See `HistoryProvider`."""
        try:
            elements = cast("list[bytes]", await self._redis.lrange(KEY_PREFIX + user_id, 0, -1))
        except self._failures as error:
            raise _away(error) from error
        try:
            return _EVENTS.validate_json(b"[" + b",".join(elements[-MAX_HISTORY_EVENTS:]) + b"]")
        except ValidationError as error:
            # Without key and values, which are a user's.
            raise DataError(
                f"a list in Redis under {KEY_PREFIX} has {error.error_count()} elements that are no events; whoever "
                'else writes there must write {"item_id": ..., "event": ..., "timestamp": ...}'
            ) from None

    async def append(self, user_id: str, events: Sequence[HistoryEvent]) -> None:
        """See `HistoryProvider`."""
        key = KEY_PREFIX + user_id
        written = [event.model_dump_json(exclude_defaults=True) for event in events]
        try:
            async with self._redis.pipeline(transaction=True) as pipeline:
                pipeline.rpush(key, *written)
                pipeline.ltrim(key, -MAX_HISTORY_EVENTS, -1)
                pipeline.expire(key, KEPT_SECONDS)
                await pipeline.execute()
        except self._failures as error:
            raise _away(error) from error

    async def forget(self, user_id: str) -> None:
        """See `HistoryProvider`."""
        try:
            await self._redis.delete(KEY_PREFIX + user_id)
        except self._failures as error:
            raise _away(error) from error

    async def close(self) -> None:
        """See `HistoryProvider`."""
        await self._redis.aclose()


def _away(error: Exception) -> UnavailableError:
    return UnavailableError(f"histories: Redis cannot be asked: {type(error).__name__}")


def open_histories(where: str) -> HistoryProvider:
    """The provider that ``serve --histories`` names.

    Args:
        where: ``memory``, or a URL of Redis.

    Raises:
        InvalidInputError: it is neither.
        MissingExtraError: the client of Redis is not installed.
    """
    if where == "memory":
        return MemoryHistories()
    if urlsplit(where).scheme in ("redis", "rediss", "unix"):
        return RedisHistories(where)
    raise InvalidInputError("histories: give memory, or redis://HOST:PORT/DATABASE (rediss:// with TLS)")


def merged(stored: Sequence[HistoryEvent], own: Sequence[HistoryEvent]) -> list[HistoryEvent]:
    """A user's stored events and those of the request, oldest first, as the module says.

    Args:
        stored: in the order in which they were added.
        own: of the request, oldest first.
    """
    further = _placed_stored(stored, {(event.item_id, event.event, event.timestamp) for event in own})
    further.sort(key=lambda placed: placed[0])
    room = MAX_HISTORY_EVENTS - len(own)
    placed = further[max(0, len(further) - room) :] + _placed_own(own)
    # A stable sort: at equal times what is stored stays first.
    placed.sort(key=lambda of_event: of_event[0])
    return [event for _, event in placed]


_Placed = list[tuple[float, HistoryEvent]]


def _placed_stored(stored: Iterable[HistoryEvent], known: set[tuple[str, str, int | None]]) -> _Placed:
    """Those that are not known, each with its time; an undated one has that of the dated one before it."""
    placed, before = [], -1.0
    for event in stored:
        identity = (event.item_id, event.event, event.timestamp)
        if event.timestamp is not None:
            before = event.timestamp
        if identity not in known:
            placed.append((before, event))
            if event.timestamp is not None:
                known.add(identity)
    return placed


def _placed_own(own: Sequence[HistoryEvent]) -> _Placed:
    """Each with its time; an undated one has that of the next dated one."""
    placed, following = [], float("inf")
    for event in reversed(own):
        if event.timestamp is not None:
            following = event.timestamp
        placed.append((following, event))
    return placed[::-1]


def by_user(events: Iterable[FeedbackEvent], now: int, *, exposures: bool) -> dict[str, list[HistoryEvent]]:
    """What events add to the histories of their users.

    Args:
        events: those without a user add nothing.
        now: unix seconds, the time of an event that has none.
        exposures: keep them, too. There are many to an interaction, whose room they take.
    """
    added: dict[str, list[HistoryEvent]] = {}
    for event in events:
        if event.user_id and (exposures or event.event != EXPOSURE):
            at = now if event.timestamp is None else event.timestamp
            read = HistoryEvent(item_id=event.item_id, event=event.event, timestamp=at)
            added.setdefault(event.user_id, []).append(read)
    return added


@dataclass(frozen=True, slots=True)
class Completed:
    """A request with what is stored of its user.

    Attributes:
        request: to be answered.
        came: as it came.
        available: whether what is stored was read; also where there was nothing to read.
    """

    request: RetrieveRequest
    came: RetrieveRequest
    available: bool = True

    def told(self, response: RetrieveResponse, max_events: int) -> RetrieveResponse:
        """The response as the caller should see it: about the events that it sent, not about those it never saw.

        Args:
            response: to the completed request.
            max_events: that the model reads of a history.
        """
        degraded, missing = response.degraded, response.missing_ids
        if self.request is self.came and self.available:
            return response
        if self.request is not self.came:
            sent = {event.item_id for event in self.came.history} | set(self.came.exclude_item_ids)
            missing = [item for item in missing if item in sent]
            if len(self.came.history) <= max_events:
                degraded = [reason for reason in degraded if reason != "history_truncated"]
        if not self.available:
            degraded = [*degraded, HISTORY_UNAVAILABLE]
        return response.model_copy(update={"degraded": degraded, "missing_ids": missing})


class _Breaker:
    """Says whether to ask a store that may be away."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures = 0
        self._failing_since = 0.0
        self._ask_again: float | None = None

    def lets_through(self) -> bool:
        """Whether to ask; of a store that is away one in `PAUSE_SECONDS` may."""
        if self._ask_again is None:
            return True
        now = self._clock()
        if now < self._ask_again:
            return False
        self._ask_again = now + PAUSE_SECONDS
        return True

    def succeeded(self) -> None:
        if self._ask_again is not None:
            log.info("histories_back")
        self._failures, self._ask_again = 0, None

    def failed(self, error: str) -> None:
        now = self._clock()
        self._failing_since = now if not self._failures else self._failing_since
        self._failures += 1
        long = now >= self._failing_since + FAILING_SECONDS
        if self._ask_again is None and self._failures >= MAX_FAILURES and long:
            self._ask_again = now + PAUSE_SECONDS
            log.warning("histories_away", error=error, pause_seconds=PAUSE_SECONDS)


class Histories:
    """A provider as the service uses it: it never holds up a request, and never fails one."""

    def __init__(
        self, provider: HistoryProvider, metrics: Metrics, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask `provider` in time; `clock` counts seconds."""
        self._provider = provider
        self._lookups = metrics.history_lookups
        self._breaker = _Breaker(clock)
        self._asking: set[asyncio.Task[list[HistoryEvent]]] = set()

    async def complete(self, request: RetrieveRequest, within: float | None = None) -> Completed:
        """The request with what is stored of its user.

        Args:
            request: without a user id it stays as it is.
            within: seconds of the request's deadline.
        """
        if not request.user_id:
            return Completed(request, request)
        if not self._breaker.lets_through():
            self._lookups.labels("skipped").inc()
            return Completed(request, request, available=False)
        task = asyncio.create_task(self._provider.get(request.user_id))
        self._asking.add(task)
        task.add_done_callback(self._asked)
        # The task is left alone when time is up: it may be making the connection that the next one will use.
        await asyncio.wait((task,), timeout=BUDGET_SECONDS if within is None else min(BUDGET_SECONDS, within))
        if not task.done():
            self._breaker.failed("no answer in time")
            self._lookups.labels("timeout").inc()
            return Completed(request, request, available=False)
        try:
            stored = task.result()
        except UnavailableError as error:
            self._breaker.failed(str(error))
            self._lookups.labels("failed").inc()
            return Completed(request, request, available=False)
        except DataError as error:
            self._lookups.labels("malformed").inc()
            log.warning("history_malformed", error=str(error))
            return Completed(request, request, available=False)
        self._breaker.succeeded()
        self._lookups.labels("found" if stored else "empty").inc()
        if not stored:
            return Completed(request, request)
        return Completed(request.model_copy(update={"history": merged(stored, request.history)}), request)

    async def append(self, events: Mapping[str, Sequence[HistoryEvent]]) -> bool:
        """Add events to the histories of their users; whether all are stored now."""
        if not self._breaker.lets_through():
            return False
        calls = (self._provider.append(user_id, of_user) for user_id, of_user in events.items())
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await asyncio.gather(*calls)
        except (UnavailableError, TimeoutError) as error:
            self._breaker.failed(str(error) or "no answer in time")
            return False
        self._breaker.succeeded()
        return True

    async def close(self) -> None:
        """Give connections back."""
        for task in self._asking:
            task.cancel()
        await asyncio.gather(*self._asking, return_exceptions=True)
        await self._provider.close()

    def _asked(self, task: asyncio.Task[list[HistoryEvent]]) -> None:
        """Take note of what became of a task, also where nobody waits for it any more."""
        self._asking.discard(task)
        if not task.cancelled() and task.exception() is None:
            # Also one that came too late for its request: the store is there.
            self._breaker.succeeded()
