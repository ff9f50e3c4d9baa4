"""The server against a FastAPI app around Hugging Face ``generate``, and against nothing but its own graph.

Both servers have one core and one thread for the model, the load generator has another core. They hold the same T5,
catalogue and beam width, answer the same requests, and their answers are compared first. Contenders take turns.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from genretrieval.bundle import load_bundle
from genretrieval.errors import GenRetrievalError, InvalidInputError, UnavailableError
from genretrieval.figures import Figure
from genretrieval.request import HistoryEvent, RetrieveRequest
from genretrieval.retrieval import Backend, Leaves, Retriever
from genretrieval_serving.backend import OnnxBackend
from genretrieval_serving.closed_loop import Generator, Load, threads, wrk
from genretrieval_serving.live_server import running_server

# More connections that bring less throughput than this only wait.
KNEE = 0.95
SCORE_TOLERANCE = 2e-4
ROWS = "genretrieval_batch_rows"
Inputs = dict[str, NDArray[Any]]


class DifferentAnswersError(GenRetrievalError):
    """The two servers answer differently, so their speeds are not comparable."""


@dataclass(frozen=True)
class ServeConfig:
    """Settings of the bench.

    Attributes:
        rounds: how often each contender takes its turn.
        seconds: of load on our server, and of the bare graph.
        peer_seconds: of load on the peer, which answers fewer requests in them.
        connections: of our server, rising.
        peer_connections: of the peer, rising.
        compiled: the load generator is `wrk`; else threads of this process.
        n_requests: distinct requests.
        history: items of each.
    """

    rounds: int = 5
    seconds: float = 4.0
    peer_seconds: float = 12.0
    connections: tuple[int, ...] = (1, 2, 4, 8, 12, 16, 24, 32)
    peer_connections: tuple[int, ...] = (1, 2, 4)
    compiled: bool = True
    n_requests: int = 256
    history: int = 20


QUICK = ServeConfig(1, 1.0, 1.0, (1, 4), (1,), compiled=False, n_requests=16)


class Round(NamedTuple):
    """One turn of every contender.

    Attributes:
        ours: by number of connections.
        peer: by number of connections.
        bare_ms: median milliseconds of the graph for one request.
        rows: mean rows of our server's batches where it answered the most.
        bare_per_second: requests that the bare graph answers in batches of so many rows.
    """

    ours: dict[int, Load]
    peer: dict[int, Load]
    bare_ms: float
    rows: float
    bare_per_second: float


def bench_serve(
    bundle: Path, command: Sequence[str], peer: Sequence[str], console: Console, config: ServeConfig | None = None
) -> dict[str, Figure]:
    """Measure.

    *Equal p99*: P is the peer's p99 at its best throughput, at the fewest connections that bring 95 % of what any
    number brings. Its throughput there is compared with the most that ours brings at any number of connections whose
    p99 is at most P. A request that fails disqualifies its number of connections.

    *Overhead*: half of the requests of a single caller took at most so much longer than half of the runs of the bare
    graph on the same inputs, one request each, in a loop on the same core.

    *Share of bare*: the most throughput of our server at any number of connections, over that of the bare graph on the
    same core in batches of the same mean size; a batch takes a fixed time and one for each row, so that the mean
    decides.

    Args:
        bundle: what our server serves; its folder gets requests and logs.
        command: how to call the command line.
        peer: how to start the peer; ``--port`` is added.
        console: progress.
        config: settings.

    Returns:
        Figures by name: the median of all rounds with the lowest and the highest.

    Raises:
        DifferentAnswersError: the two servers answer differently.
        InvalidInputError: there is only one core.
        MissingExtraError: the load generator is not installed.
        UnavailableError: a server does not start.
    """
    config = config or ServeConfig()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise InvalidInputError("one core for the server and one for the load are needed, and this process has one")
    load_core, server_core = cores[0], cores[-1]
    pinned = ["taskset", "-c", str(server_core)]
    bodies = bundle.with_name("requests.jsonl")
    requests = _requests(bundle, config)
    bodies.write_text("".join(request.model_dump_json(exclude_defaults=True) + "\n" for request in requests), "utf-8")
    load = wrk(bodies, load_core) if config.compiled else threads(bodies)
    with (
        running_server(bundle, [*pinned, *command], "--threads", "1") as ours,
        _running_peer([*pinned, *peer], bundle.with_name("peer.log")) as theirs,
    ):
        bench = _Bench(ours.http, theirs, load, BareGraph(bundle, requests, server_core), config)
        bench.compare(requests)
        rounds = [bench.round(console, number) for number in range(config.rounds)]
    return figures(rounds)


class BareGraph:
    """The graph of a bundle, run again and again on what the server would give it, on a core of its own."""

    def __init__(self, bundle: Path, requests: Sequence[RetrieveRequest], core: int) -> None:
        """Open the bundle as a server of one thread does."""
        opened = load_bundle(bundle)
        self.backend = OnnxBackend.of(opened, threads=1)
        self._recording = _Recording(self.backend)
        self._retriever = Retriever(opened, self._recording)
        self._requests = requests
        self._core = core

    def seconds_a_call(self, n_rows: int, seconds: float) -> NDArray[np.float64]:
        """Seconds of each call with batches of `n_rows` requests, for so many seconds."""
        given: list[Inputs] = []
        for first in range(0, len(self._requests) - n_rows + 1, n_rows):
            self._retriever.retrieve(self._requests[first : first + n_rows])
            given.append(self._recording.inputs)
        session, outputs = self.backend.session, self.backend.outputs
        taken: list[float] = []
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {self._core})
        try:
            end = time.perf_counter() + seconds
            while (begun := time.perf_counter()) < end:
                session.run(outputs, given[len(taken) % len(given)])
                taken.append(time.perf_counter() - begun)
        finally:
            os.sched_setaffinity(0, before)
        return np.asarray(taken)

    def per_second(self, rows: float, seconds: float) -> float:
        """Requests a second in batches of `rows` on average."""
        low = int(rows)
        share = rows - low
        of_low = self.seconds_a_call(low, seconds * (1 - share)).mean()
        of_high = self.seconds_a_call(low + 1, seconds * share).mean() if share else 0.0
        return float(rows / ((1 - share) * of_low + share * of_high))


@dataclass
class _Recording:
    backend: Backend
    inputs: Inputs = None  # type: ignore[assignment]

    def run(self, inputs: Inputs) -> Leaves:
        self.inputs = inputs
        return self.backend.run(inputs)


@dataclass(frozen=True)
class _Bench:
    ours: str
    peer: str
    load: Generator
    bare: BareGraph
    config: ServeConfig

    def compare(self, requests: Sequence[RetrieveRequest]) -> None:
        """Ask both the same.

        Raises:
            DifferentAnswersError: they answer differently.
        """
        for request in requests[:16]:
            body = request.model_dump(mode="json", exclude_defaults=True)
            ours, theirs = (_answer(url, body) for url in (self.ours, self.peer))
            same = len(ours) == len(theirs) and all(
                abs(a[1] - b[1]) <= SCORE_TOLERANCE and (a[0] == b[0] or _tied(a, theirs))
                for a, b in zip(ours, theirs, strict=True)
            )
            if not same:
                raise DifferentAnswersError(
                    f"ours and the peer answer {body} differently: {ours[:3]} and {theirs[:3]}. No speed is reported "
                    "for unequal answers; this is a bug of one of them"
                )

    def round(self, console: Console, number: int) -> Round:
        """Every contender in turn."""
        config = self.config
        ours, peer, rows = {}, {}, {}
        with console.status(f"round {number + 1} of {config.rounds}"):
            for step, connections in enumerate(config.connections):
                if connections == 1:
                    bare_ms = float(np.median(self.bare.seconds_a_call(1, config.seconds)) * 1e3)
                before = _batches(self.ours)
                ours[connections] = self.load(f"{self.ours}/v1/retrieve", connections, config.seconds)
                rows[connections] = _mean_rows(before, _batches(self.ours))
                for theirs in config.peer_connections[step : step + 1]:
                    peer[theirs] = self.load(f"{self.peer}/v1/retrieve", theirs, config.peer_seconds)
            busiest = max(ours, key=lambda n: ours[n].per_second)
            bare = self.bare.per_second(rows[busiest], config.seconds)
        return Round(ours, peer, bare_ms, rows[busiest], bare)


def figures(rounds: Sequence[Round]) -> dict[str, Figure]:
    """What the rounds say; see `bench_serve`."""
    named: dict[str, tuple[str, list[float]]] = {}

    def note(name: str, unit: str, value: float) -> None:
        named.setdefault(f"serve.{name}", (unit, []))[1].append(value)

    for turn in rounds:
        theirs = _knee(turn.peer)
        p99 = turn.peer[theirs].p99_ms
        fast = {n: load for n, load in turn.ours.items() if not load.failed and load.p99_ms <= p99}
        mine = max(fast, key=lambda n: fast[n].per_second, default=0)
        reached = fast[mine].per_second if mine else 0.0
        note("throughput_vs_hf_fastapi.equal_p99", "ratio", reached / turn.peer[theirs].per_second)
        note("requests_per_second.ours", "requests/s", reached)
        note("requests_per_second.hf_fastapi", "requests/s", turn.peer[theirs].per_second)
        note("connections.ours", "connections", mine)
        note("connections.hf_fastapi", "connections", theirs)
        note("p99_ms.ours", "ms", fast[mine].p99_ms if mine else float("inf"))
        note("p99_ms.hf_fastapi", "ms", p99)
        note("overhead_ms.p50", "ms", turn.ours[1].p50_ms - turn.bare_ms)
        note("latency_ms.p50", "ms", turn.ours[1].p50_ms)
        note("bare_ms.p50", "ms", turn.bare_ms)
        most = max(load.per_second for load in turn.ours.values())
        note("share_of_bare", "share", most / turn.bare_per_second)
        note("requests_per_second.most", "requests/s", most)
        note("requests_per_second.bare", "requests/s", turn.bare_per_second)
        note("batch_rows", "requests", turn.rows)
    return {name: _median(unit, values) for name, (unit, values) in named.items()}


def _median(unit: str, values: Sequence[float]) -> Figure:
    return Figure(float(np.median(values)), unit, (min(values), max(values)))


def _knee(loads: dict[int, Load]) -> int:
    """The fewest connections that bring `KNEE` of what any number brings."""
    best = max(load.per_second for load in loads.values())
    return min(n for n, load in loads.items() if load.per_second >= KNEE * best)


def _requests(bundle: Path, config: ServeConfig) -> list[RetrieveRequest]:
    ids = load_bundle(bundle).catalogue()["item_id"].to_list()
    rng = np.random.default_rng(0)
    histories = rng.integers(len(ids), size=(config.n_requests, config.history)).tolist()
    return [RetrieveRequest(history=[HistoryEvent(item_id=ids[row]) for row in history]) for history in histories]


def _answer(url: str, body: dict[str, Any]) -> list[tuple[str, float]]:
    answer = httpx.post(f"{url}/v1/retrieve", json=body, timeout=60).raise_for_status()
    return [(item["item_id"], item["score"]) for item in answer.json()["items"]]


def _tied(item: tuple[str, float], others: Sequence[tuple[str, float]]) -> bool:
    """Whether another place of the other answer, or its end, has the score: float32 sums in another order."""
    near = [other for other in others if abs(other[1] - item[1]) <= SCORE_TOLERANCE]
    return item[0] in {other[0] for other in near} or others[-1] in near


def _batches(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    samples = (sample for family in text_string_to_metric_families(text) for sample in family.samples)
    return {sample.name: sample.value for sample in samples if sample.name.startswith(ROWS)}


def _mean_rows(before: dict[str, float], after: dict[str, float]) -> float:
    rows, batches = (after[f"{ROWS}{part}"] - before[f"{ROWS}{part}"] for part in ("_sum", "_count"))
    return rows / batches


@contextmanager
def _running_peer(command: Sequence[str], log: Path) -> Iterator[str]:
    """The peer on a free port.

    Raises:
        UnavailableError: it ended before it answered.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--port", str(port)], stdout=output, stderr=output)  # noqa: S603
    try:
        while True:
            try:
                httpx.get(f"{url}/openapi.json", timeout=60).raise_for_status()
                break
            except httpx.ConnectError:
                if process.poll() is not None:
                    raise UnavailableError(f"the peer ended with exit code {process.returncode}; see {log}") from None
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait()
