"""Does a live server return what offline retrieval returns, item by item?"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from genretrieval.errors import GenRetrievalError
from genretrieval.figures import Figure
from genretrieval.request import RetrievedItem, RetrieveRequest, RetrieveResponse

# Scores nearer than this may change places: the two sides batch differently, and float32 sums with them.
TIE = 1e-5

Offline = Callable[[list[RetrieveRequest]], list[RetrieveResponse]]
Live = Callable[[Sequence[RetrieveRequest]], list[RetrieveResponse | GenRetrievalError]]


class Agreement:
    """Answers from a live server, and counts how they differ from offline retrieval of the same requests."""

    def __init__(self, offline: Offline, live: Live) -> None:
        """Keep both sides."""
        self.offline = offline
        self.live = live
        self.requests = self.identical = self.disagreeing = 0
        self.largest_gap = 0.0

    def __call__(self, requests: list[RetrieveRequest]) -> list[RetrieveResponse]:
        """The live answers.

        Raises:
            GenRetrievalError: what the server answered to a request.
        """
        answers = []
        for expected, answer in zip(self.offline(requests), self.live(requests), strict=True):
            if isinstance(answer, GenRetrievalError):
                raise answer
            self._compare(expected.items, answer.items)
            answers.append(answer)
        return answers

    def _compare(self, expected: list[RetrievedItem], found: list[RetrievedItem]) -> None:
        self.requests += 1
        if [item.item_id for item in expected] == [item.item_id for item in found]:
            self.identical += 1
        elif not same_but_for_ties(expected, found):
            self.disagreeing += 1
        gaps = [abs(a.score - b.score) for a, b in zip(expected, found, strict=False)]
        self.largest_gap = max([self.largest_gap, *gaps])

    def figures(self) -> dict[str, Figure]:
        """``agreement.*`` figures over all requests so far."""
        ties = self.requests - self.identical - self.disagreeing
        return {
            "agreement.requests": Figure(self.requests, "requests"),
            "agreement.identical": Figure(self.identical, "requests"),
            "agreement.equal_but_for_ties": Figure(ties, "requests"),
            "agreement.disagreeing": Figure(self.disagreeing, "requests"),
            "agreement.largest_score_gap": Figure(self.largest_gap, "nats"),
        }


def same_but_for_ties(expected: list[RetrievedItem], found: list[RetrievedItem]) -> bool:
    """Whether two lists differ only in the order of items whose scores are within `TIE`, or in which came last."""
    if len(expected) != len(found):
        return False
    scores = {item.item_id: item.score for item in expected}
    for place, item in enumerate(found):
        if abs(item.score - expected[place].score) > TIE:
            return False
        if item.item_id in scores:
            if abs(item.score - scores[item.item_id]) > TIE:
                return False
        elif abs(item.score - expected[-1].score) > TIE:
            return False
    return True
