"""Callers who go on asking while something breaks, and know what the right answers are."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from genretrieval.bundle import GRAPH, load_bundle
from genretrieval.errors import GenRetrievalError
from genretrieval.request import HistoryEvent, RetrieveRequest, RetrieveResponse
from genretrieval.retrieval import Retriever
from genretrieval_serving.backend import OnnxBackend
from genretrieval_serving.client import Client

# Two runs of a graph in batches of other sizes round differently by no more.
SCORE_TOLERANCE = 1e-4
N_REQUESTS = 50


@dataclass(frozen=True)
class Truth:
    """Requests, and what the bundles that may be served answer to them.

    Attributes:
        requests: what is asked.
        answers: by bundle version, the answer to each request.
    """

    requests: Sequence[RetrieveRequest]
    answers: Mapping[str, Sequence[RetrieveResponse]]

    @classmethod
    def of(cls, *bundles: Path, seed: int = 0) -> Truth:
        """Requests for the items of the first bundle, answered by the graph of each without a server."""
        opened = [load_bundle(path) for path in bundles]
        ids = opened[0].catalogue()["item_id"].to_list()
        rng = np.random.default_rng(seed)
        requests = [
            RetrieveRequest(
                history=[HistoryEvent(item_id=ids[row], event="click") for row in rng.integers(len(ids), size=5)]
            )
            for _ in range(N_REQUESTS)
        ]
        retrievers = {one.manifest.version: Retriever(one, OnnxBackend(one.path / GRAPH, 1)) for one in opened}
        return cls(requests, {name: retriever.retrieve(requests) for name, retriever in retrievers.items()})

    def holds(self, number: int, answer: RetrieveResponse) -> bool:
        """Whether an answer to request `number` is the one of the bundle that it names."""
        answers = self.answers.get(answer.bundle_version)
        if answers is None or len(answers[number].items) != len(answer.items):
            return False
        pairs = zip(answers[number].items, answer.items, strict=True)
        return all(a.item_id == b.item_id or abs(a.score - b.score) < SCORE_TOLERANCE for a, b in pairs)


@dataclass
class Tally:
    """What callers met.

    Attributes:
        answered: right answers.
        failed: calls that failed for good, by the error's reason.
        wrong: answers that are of no bundle that may be served.
        seconds: that each answered call took, in the order of the answers.
        versions: answers of each bundle.
        degraded: answers by the reasons that they name.
    """

    answered: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    wrong: int = 0
    seconds: list[float] = field(default_factory=list)
    versions: Counter[str] = field(default_factory=Counter)
    degraded: Counter[str] = field(default_factory=Counter)

    @property
    def asked(self) -> int:
        """All calls."""
        return self.answered + sum(self.failed.values()) + self.wrong

    @property
    def problems(self) -> list[str]:
        """In words: what should not have happened."""
        found = [f"{n} requests failed with {reason}" for reason, n in self.failed.items()]
        found += [f"{self.wrong} answers are wrong"] if self.wrong else []
        return found + ([] if self.answered else ["nothing was answered"])

    @classmethod
    def sum(cls, tallies: Iterable[Tally]) -> Tally:
        """What callers met in all of them."""
        total = cls()
        for tally in tallies:
            total.answered += tally.answered
            total.failed += tally.failed
            total.wrong += tally.wrong
            total.seconds += tally.seconds
            total.versions += tally.versions
            total.degraded += tally.degraded
        return total

    def p99_ms(self) -> float:
        """Milliseconds within which 99 of 100 right answers came."""
        return float(np.percentile(self.seconds, 99)) * 1e3 if self.seconds else float("nan")


@contextmanager
def asking(
    truth: Truth, connect: Callable[[], Client], *, callers: int = 4, pause: float = 0.02, user_id: str | None = None
) -> Iterator[Tally]:
    """Ask in the background while the block runs; the tally is complete after it.

    Args:
        truth: requests and their answers.
        connect: a client; every caller has one of its own.
        callers: threads.
        pause: seconds between an answer and the next request of a caller.
        user_id: of all requests.
    """
    requests = [request.model_copy(update={"user_id": user_id}) for request in truth.requests]
    tally, guard, done = Tally(), threading.Lock(), threading.Event()

    def ask(number: int) -> None:
        with connect() as client:
            while not done.is_set():
                number = (number + callers) % len(truth.requests)
                begun = time.perf_counter()
                try:
                    answer = client.retrieve(requests[number])
                except GenRetrievalError as error:
                    with guard:
                        tally.failed[f"{error.reason}: {error}"[:200]] += 1
                    done.wait(pause)
                    continue
                seconds = time.perf_counter() - begun
                with guard:
                    tally.degraded.update(answer.degraded)
                    if truth.holds(number, answer):
                        tally.answered += 1
                        tally.seconds.append(seconds)
                        tally.versions[answer.bundle_version] += 1
                    else:
                        tally.wrong += 1
                done.wait(pause)

    threads = [threading.Thread(target=ask, args=(number,), daemon=True) for number in range(callers)]
    for thread in threads:
        thread.start()
    try:
        yield tally
    finally:
        done.set()
        for thread in threads:
            thread.join()
