"""How many calls a caller may make: a bound for each principal, beside the queue, in which all share the graph."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from genretrieval.errors import InvalidInputError, RateLimitedError

_UNITS = {"second": 1, "minute": 60, "hour": 3600, "day": 86_400}
_RATE = re.compile(r"\s*([1-9]\d*)\s*(?:/|per)\s*([1-9]\d*)?\s*(second|minute|hour|day)s?\s*", re.IGNORECASE)


class RateLimiter:
    """Counts the requests of every caller, each of a batch for itself, and calls with events, in this process alone.

    What is shown brings events back, so they do not count as requests: a caller may send as many calls with them
    besides. A caller may make all of its requests at once, and afterwards one more in every even share of the time (the
    generic cell rate algorithm, ITU-T I.371, which keeps one number for each). Clocks that jump change nothing.
    """

    def __init__(self, rate: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Nobody has called yet.

        Args:
            rate: for example ``100/second``, ``1000 per minute`` or ``50/10 seconds``.
            clock: seconds.

        Raises:
            InvalidInputError: `rate` says no such thing.
        """
        if (parsed := _RATE.fullmatch(rate)) is None:
            raise InvalidInputError(f"{rate!r} is no rate limit; give one such as 100/second")
        self._amount = int(parsed[1])
        self._seconds = int(parsed[2] or 1) * _UNITS[parsed[3].lower()]
        self._clock = clock
        # When what a caller has made is worked off, one share after another.
        self._worked_off: dict[tuple[str, str], float] = {}
        self._sweep_at = 0.0

    def count(self, caller: str, what: str = "requests") -> None:
        """Count one of what `caller` makes.

        Raises:
            RateLimitedError: it is one too many, and was not counted.
        """
        made = caller, what
        now, share = self._clock(), self._seconds / self._amount
        self._sweep(now)
        worked_off = max(now, self._worked_off.get(made, now)) + share
        early = worked_off - now - self._seconds
        # A share that is missing by rounding alone is there.
        if early > 1e-9 * self._seconds:
            raise RateLimitedError(
                f"{caller} may make {self._amount} {what} in {self._seconds} s and has made them; "
                "send fewer, or have the server's rate limit raised",
                early,
            )
        self._worked_off[made] = worked_off

    def _sweep(self, now: float) -> None:
        """Forget, once in a while, who has nothing left to work off."""
        if now >= self._sweep_at:
            self._worked_off = {made: at for made, at in self._worked_off.items() if at > now}
            self._sweep_at = now + self._seconds
