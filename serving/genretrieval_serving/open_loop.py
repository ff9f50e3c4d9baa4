"""An open load over HTTP: requests leave when they are due, whether or not earlier ones were answered.

Time runs from the moment a request was to leave, so a server that stalls is charged for what it held up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

# Below this before a request is due the load looks at the clock without pause: timers of a loop are a millisecond off.
_SPIN_SECONDS = 0.002
# So long a caller that waits for its answers stays away when it was refused.
_REFUSED_SECONDS = 0.02
_PROBE_EVERY_SECONDS = 0.1
# A probe that takes longer has failed, as it has for Kubernetes by default.
_PROBE_SECONDS = 1.0


@dataclass
class Answers:
    """What came back, in the order in which it was to leave.

    Attributes:
        due: float64, seconds since the load began at which requests were to leave.
        late: float64, by how many seconds the load missed that.
        took: float64, seconds from there to the last byte of the answer; NaN for none.
        status: int, of HTTP; 0 for none.
    """

    due: NDArray[np.float64]
    late: NDArray[np.float64] = field(init=False)
    took: NDArray[np.float64] = field(init=False)
    status: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.late, self.took = np.full((2, len(self.due)), np.nan)
        self.status = np.zeros(len(self.due), np.int64)

    def ms(self, status: int, since: float = 0.0, until: float = np.inf) -> NDArray[np.float64]:
        """Milliseconds that answers with `status` to requests of a stretch of time took."""
        wanted: NDArray[np.float64] = self.took[(self.status == status) & (self.due >= since) & (self.due < until)]
        return wanted * 1e3


class _Connection(asyncio.Protocol):
    """One connection, one call at a time; hardly any work, so that the load is not what is measured."""

    def __init__(self) -> None:
        self._buffer, self._needed = b"", 0
        self._answered: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def call(self, request: bytes) -> asyncio.Future[int]:
        """Send; the status of the answer when its last byte is there."""
        self._answered = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return self._answered

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._needed:
            head = self._buffer.find(b"\r\n\r\n")
            if head < 0:
                return
            length = self._buffer.lower().index(b"content-length:") + 15
            self._needed = head + 4 + int(self._buffer[length : self._buffer.index(b"\r", length)])
        if len(self._buffer) >= self._needed and self._answered is not None and not self._answered.done():
            status = int(self._buffer[9:12])
            self._buffer, self._needed = b"", 0
            self._answered.set_result(status)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_result(0)


class OpenLoad:
    """Requests to one server over as many connections as there are calls at once."""

    def __init__(self, url: str, requests: Sequence[bytes]) -> None:
        place = urlsplit(url)
        self._host, self._port = place.hostname or "", place.port or 80
        self._requests = requests
        self._idle: list[_Connection] = []
        self._made: list[_Connection] = []

    async def connect(self) -> _Connection:
        """A connection of one's own."""
        _, connection = await asyncio.get_running_loop().create_connection(_Connection, self._host, self._port)
        self._made.append(connection)
        return connection

    def close(self) -> None:
        """End all connections."""
        for connection in self._made:
            connection.transport.abort()

    async def closed(self, connections: int, seconds: float) -> float:
        """Answers a second to callers that each wait for one before the next."""
        ends, answered = time.perf_counter() + seconds, 0

        async def ask(number: int) -> None:
            nonlocal answered
            connection = await self.connect()
            while time.perf_counter() < ends:
                number += connections
                if await connection.call(self._requests[number % len(self._requests)]) == 200:
                    answered += 1
                else:
                    await asyncio.sleep(_REFUSED_SECONDS)
            connection.transport.close()

        await asyncio.gather(*map(ask, range(connections)))
        return answered / seconds

    async def open(self, rate: float, seconds: float, rng: np.random.Generator) -> Answers:
        """`rate` requests a second on average, whatever becomes of them."""
        gaps = rng.exponential(1.0 / rate, int(rate * seconds * 1.2) + 100)
        due = np.cumsum(gaps)
        answers, tasks = Answers(due[due < seconds]), []
        begun = time.perf_counter()
        for number, at in enumerate(answers.due.tolist()):
            while (left := begun + at - time.perf_counter()) > 0:  # noqa: ASYNC110
                await asyncio.sleep(max(0.0, left - _SPIN_SECONDS))
            tasks.append(asyncio.ensure_future(self._ask(number, begun + at, answers)))
        await asyncio.gather(*tasks)
        return answers

    async def _ask(self, number: int, due: float, answers: Answers) -> None:
        while self._idle and self._idle[-1].transport.is_closing():
            self._idle.pop()  # the server keeps no connection that is idle for long
        connection = self._idle.pop() if self._idle else await self.connect()
        answers.late[number] = time.perf_counter() - due
        answers.status[number] = await connection.call(self._requests[number % len(self._requests)])
        answers.took[number] = time.perf_counter() - due
        self._idle.append(connection)


@dataclass
class Probes:
    """Asks for liveness and readiness all the while, as Kubernetes would, only more often."""

    load: OpenLoad
    failed: int = 0
    slowest: float = 0.0

    async def run(self) -> None:
        """Until it is cancelled."""
        connection = await self.load.connect()
        while True:
            for path in ("livez", "readyz"):
                begun = time.perf_counter()
                status = await connection.call(f"GET /{path} HTTP/1.1\r\nHost: bench\r\n\r\n".encode())
                took = time.perf_counter() - begun
                self.slowest = max(self.slowest, took)
                self.failed += status != 200 or took > _PROBE_SECONDS
            await asyncio.sleep(_PROBE_EVERY_SECONDS)
