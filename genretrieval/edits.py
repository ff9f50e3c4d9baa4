"""Edits: what operators changed for one request, as plain values that a `Retriever` applies.

Who decides them (bindings, rules and synonyms of the admin state) is the server's business; how they act on a result
is defined here and in `genretrieval.retrieval`. In this order, so that a later line cannot undo an earlier one:

1. the request's own filters and exclusions, then blocked items: what they leave out is never returned;
2. pinned items stand at exactly their positions, as far as the result is that long;
3. items of a bound keyword come before all others; or, if the request asks for that, from the place on at which the
   search wrote the keyword's leaf;
4. within the bound items, and within the others, by score plus the sum of the item's boosts.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class BoundKeyword:
    """A keyword that the request's query carries, bound to a reserved slot.

    Attributes:
        name: as responses show it, e.g. ``keywords/labubu``.
        text: the word; the search among its items reads the query without it, as it sets none of them apart.
        level: level of the reserved slot.
        slot: its code on that level.
        rows: int64, sorted item rows that it stands for; may be empty.
    """

    name: str
    text: str
    level: int
    slot: int
    rows: Rows


@dataclass(frozen=True, slots=True)
class Boost:
    """An amount added to the score of some items; negative to bury them.

    Attributes:
        name: as responses show it, e.g. ``rules/summer``.
        rows: int64, sorted item rows.
        amount: in units of the score, which is a log-probability: 0.7 doubles an item's chance.
    """

    name: str
    rows: Rows
    amount: float


@dataclass(frozen=True, slots=True)
class Pin:
    """An item at an exact place.

    Attributes:
        name: as responses show it.
        row: the item.
        position: of the result, 0 is first. Of two pins at one position the first given stands there, and the other
            at the next free one.
    """

    name: str
    row: int
    position: int


@dataclass(frozen=True, slots=True)
class Edits:
    """What operators changed for one request. Without any, the result is the same to the bit.

    Attributes:
        query: what the model reads in place of the request's query, synonyms added; None leaves it as it is.
        bound: keywords of the query that are bound.
        blocked: int64, item rows that are never returned.
        boosts: added to scores.
        pins: at exact places.
        applied: names of all rules, synonyms and bindings that matched, whether or not they touched an item.
        revision: of the admin state that they come from.
    """

    query: str | None = None
    bound: tuple[BoundKeyword, ...] = ()
    blocked: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    boosts: tuple[Boost, ...] = ()
    pins: tuple[Pin, ...] = ()
    applied: tuple[str, ...] = ()
    revision: int = 0


NO_EDITS = Edits()
