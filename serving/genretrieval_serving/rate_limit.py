"""How many requests a caller may make: a bound for each principal, beside the queue, in which all share the graph."""

from __future__ import annotations

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import SlidingWindowCounterRateLimiter

from genretrieval.errors import InvalidInputError, RateLimitedError


class RateLimiter:
    """Counts the requests of every caller, each of a batch for itself, in this process alone.

    The window slides: the requests of the last one count by how much of it is still within reach.
    """

    def __init__(self, rate: str) -> None:
        """Nobody has called yet.

        Args:
            rate: for example ``100/second``, ``1000 per minute`` or ``50/10 seconds``.

        Raises:
            InvalidInputError: `rate` says no such thing.
        """
        try:
            self._rate = parse(rate)
        except ValueError as error:
            raise InvalidInputError(f"{rate!r} is no rate limit; give one such as 100/second") from error
        if self._rate.amount < 1:
            raise InvalidInputError(f"{rate!r} would refuse every request; give one such as 100/second")
        self._counts = MemoryStorage()
        self._windows = SlidingWindowCounterRateLimiter(self._counts)

    def count(self, caller: str) -> None:
        """Count a request of `caller`.

        Raises:
            RateLimitedError: it is one too many, and was not counted.
        """
        if not self._windows.hit(self._rate, caller):
            raise RateLimitedError(
                f"{caller} may make {self._rate.amount} requests in {self._rate.get_expiry()} s and has made them; "
                "send fewer, or have the server's rate limit raised",
                self._free_in(caller),
            )

    def _free_in(self, caller: str) -> float:
        """Seconds until one more would be taken; what `limits` itself tells is when the window ends, which is sooner.

        A request of the last window counts by the share of it that is still within one window from now.
        """
        most, window = self._rate.amount, self._rate.get_expiry()
        last, last_ends, now, now_ends = self._counts.get_sliding_window(self._rate.key_for(caller), window)
        if now < most:
            return max(0.0, last_ends - window * (most - now) / max(1, last))
        return now_ends - window + window * (1 - most / now)
