"""What waits, in the order in which it is served: callers take turns, and a turn is a row of work."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Generic, TypeVar


@dataclass(eq=False, slots=True)
class Entry:
    """Something that waits; subclasses say what.

    Attributes:
        caller: who brought it.
        rows: the work that it is, at least 1.
    """

    caller: str
    rows: int


E = TypeVar("E", bound=Entry)


@dataclass(slots=True)
class _Line(Generic[E]):
    """What one caller has waiting, oldest first, and when its first one's turn is."""

    turn: int
    entries: OrderedDict[E, None] = field(default_factory=OrderedDict)
    rows: int = 0


class FairQueue(Generic[E]):
    """Entries of several callers. Whoever has had the fewest rows since it began to wait is next.

    This is start-time fair queueing (Goyal, Vin and Cheng 1996): a caller's turn comes once all others have had as many
    rows as it has, so a flood of one caller delays another one's single request by a single entry.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._lines: dict[str, _Line[E]] = {}
        # A line stands here once, also after its last entry has left: a caller that comes back keeps its turn.
        self._turns: list[tuple[int, int, str]] = []
        self._ties = count()
        self._now = 0
        self._size = 0

    def __len__(self) -> int:
        """Entries that wait."""
        return self._size

    def __iter__(self) -> Iterator[E]:
        """All that waits, by caller."""
        for line in self._lines.values():
            yield from line.entries

    def add(self, entry: E) -> None:
        """Let an entry wait, behind those of its caller."""
        line = self._lines.get(entry.caller)
        if line is None:
            line = self._lines[entry.caller] = _Line(self._now)
            heapq.heappush(self._turns, (line.turn, next(self._ties), entry.caller))
        line.entries[entry] = None
        line.rows += entry.rows
        self.rows += entry.rows
        self._size += 1

    def remove(self, entry: E) -> bool:
        """Take an entry off the queue; False where it does not wait any more."""
        line = self._lines.get(entry.caller)
        if line is None or entry not in line.entries:
            return False
        del line.entries[entry]
        self._left(line, entry)
        return True

    def take(self, room: float) -> E | None:
        """The next entry, if it has at most `room` rows; None where it has more, or nothing waits."""
        while self._turns:
            turn, _, caller = self._turns[0]
            line = self._lines[caller]
            if not line.entries:
                heapq.heappop(self._turns)
                del self._lines[caller]
                continue
            entry = next(iter(line.entries))
            if entry.rows > room:
                return None
            line.entries.popitem(last=False)
            self._now = turn
            line.turn = turn + entry.rows
            heapq.heapreplace(self._turns, (line.turn, next(self._ties), caller))
            self._left(line, entry)
            return entry
        return None

    def ahead(self, caller: str) -> int:
        """Rows that would be served before one more entry of `caller`, if nothing else came."""
        own = self._lines.get(caller)
        turn = self._now if own is None else own.turn + own.rows
        rows = 0
        for name, line in self._lines.items():
            if name == caller:
                rows += line.rows
            elif line.entries and line.turn <= turn:
                rows += min(line.rows, turn - line.turn + next(iter(line.entries)).rows)
        return rows

    def _left(self, line: _Line[E], entry: E) -> None:
        line.rows -= entry.rows
        self.rows -= entry.rows
        self._size -= 1
        if not self._size:
            # Nobody waits, so nobody is owed a turn.
            self._lines.clear()
            self._turns.clear()
            self._now = 0
