"""What a server does at three times the load that it can carry, and how soon it is well again.

The server has one core and the load another one. Requests leave at random moments (Poisson); see
`genretrieval_serving.open_loop`. How late the load itself was is among the figures.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console

from genretrieval.bundle import load_bundle
from genretrieval.errors import GenRetrievalError
from genretrieval.figures import Figure
from genretrieval.request import HistoryEvent, RetrieveRequest
from genretrieval_serving.batcher import STANDING_BATCHES
from genretrieval_serving.live_server import running_server
from genretrieval_serving.open_loop import Answers, OpenLoad, Probes

_FIRST_SECONDS = 2.0


@dataclass(frozen=True)
class OverloadConfig:
    """Settings of the bench.

    Attributes:
        seconds: of each of the three loads: moderate, overload, moderate again.
        capacity_seconds: of the closed loop before them, which finds out what the server can carry.
        moderate: share of the capacity.
        overload: the same, above 1.
        max_batch: of the server.
        n_requests: distinct requests.
        history: items of each.
        seed: of everything drawn.
    """

    seconds: float = 60.0
    capacity_seconds: float = 10.0
    moderate: float = 0.8
    overload: float = 3.0
    max_batch: int = 8
    n_requests: int = 256
    history: int = 10
    seed: int = 0


QUICK = OverloadConfig(seconds=2.0, capacity_seconds=1.0, n_requests=16)


def bench_overload(
    bundle: Path, command: Sequence[str], console: Console, config: OverloadConfig | None = None
) -> dict[str, Figure]:
    """Serve `bundle` and load it moderately, far too much, and moderately again.

    Args:
        bundle: what is served.
        command: how to call the command line.
        console: progress.
        config: settings.

    Raises:
        GenRetrievalError: the server answers otherwise than with items or a refusal.
    """
    config = config or OverloadConfig()
    requests = _requests(bundle, config)
    options = ["--quiet", "--threads", "1", "--max-batch", str(config.max_batch)]
    cores = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(cores)})  # the server inherits it
        with running_server(bundle, command, *options) as server:
            os.sched_setaffinity(0, {max(cores)})
            # What is there stays; to look for garbage in it between loads would hold up the probes.
            gc.collect()
            gc.freeze()
            return asyncio.run(_measure(server.http, server.process.pid, requests, console, config))
    finally:
        gc.unfreeze()
        os.sched_setaffinity(0, cores)


async def _measure(
    url: str, pid: int, requests: Sequence[bytes], console: Console, config: OverloadConfig
) -> dict[str, Figure]:
    rng, load = np.random.default_rng(config.seed), OpenLoad(url, requests)
    probes = Probes(load)
    probing = asyncio.create_task(probes.run())
    callers = math.ceil(STANDING_BATCHES * config.max_batch)  # as many as are never refused
    await load.closed(callers, config.capacity_seconds / 5)
    capacity = await load.closed(callers, config.capacity_seconds)
    if not capacity:
        raise GenRetrievalError("the server answered no request; see its log")
    console.print(f"{capacity:.0f} requests/s is what it can carry", style="dim", highlight=False)
    resident, loads = [_resident_mib(pid)], []
    for share in (config.moderate, config.overload, config.moderate):
        answers = await _open(load, share * capacity, config.seconds, rng)
        loads.append(answers)
        resident.append(_resident_mib(pid))
        counts = {int(status): int((answers.status == status).sum()) for status in np.unique(answers.status)}
        console.print(f"{share:g} of that: answers by status {counts}", style="dim", highlight=False)
        if unknown := set(counts) - {200, 429}:
            raise GenRetrievalError(f"the server answered with status {sorted(unknown)}; see its log")
    probing.cancel()
    load.close()
    return _figures(capacity, loads, resident, probes, config)


async def _open(load: OpenLoad, rate: float, seconds: float, rng: np.random.Generator) -> Answers:
    """`OpenLoad.open`, undisturbed by the collector of garbage."""
    gc.collect()
    gc.disable()
    try:
        return await load.open(rate, seconds, rng)
    finally:
        gc.enable()


def _figures(
    capacity: float, loads: Sequence[Answers], resident: Sequence[float], probes: Probes, config: OverloadConfig
) -> dict[str, Figure]:
    before, during, after = loads
    refused = np.concatenate([answers.ms(429) for answers in loads])
    late = np.concatenate([answers.late for answers in loads]) * 1e3
    first = after.ms(200, until=_FIRST_SECONDS)
    accepted = (after.status == 200)[after.due < _FIRST_SECONDS]
    figures = {"overload.capacity": Figure(capacity, "requests/s")}
    for name, answers in (("moderate", before), ("overload", during), ("recovered", after)):
        figures |= {
            f"overload.{name}.p50_ms": _quantile(answers, config, 50),
            f"overload.{name}.p99_ms": _quantile(answers, config, 99),
            f"overload.{name}.accepted": Figure(float((answers.status == 200).mean()), "share of requests"),
            f"overload.{name}.throughput": Figure(
                float((answers.status == 200).sum()) / config.seconds / capacity, "share of capacity"
            ),
        }
    ratio = figures["overload.overload.p99_ms"].value / figures["overload.moderate.p99_ms"].value
    figures["overload.p99_ratio"] = Figure(ratio, "x")
    for q in (50, 99) if len(refused) else ():
        spread = (float(refused.min()), float(refused.max()))
        figures[f"overload.refused.p{q}_ms"] = Figure(float(np.percentile(refused, q)), "ms", spread)
    figures |= {
        "overload.recovery.first_2s.p99_ms": Figure(float(np.percentile(first, 99)), "ms"),
        "overload.recovery.first_2s.accepted": Figure(float(accepted.mean()), "share of requests"),
        "overload.resident.before": Figure(resident[1], "MiB"),
        "overload.resident.grown": Figure(resident[-1] - resident[1], "MiB"),
        "overload.probes.failed": Figure(probes.failed, "probes"),
        "overload.probes.slowest_ms": Figure(probes.slowest * 1e3, "ms"),
        "overload.load.late_p99_ms": Figure(float(np.percentile(late, 99)), "ms"),
    }
    return figures


def _quantile(answers: Answers, config: OverloadConfig, q: int) -> Figure:
    """Of accepted requests; the spread is that of sixths of the time."""
    sixth = config.seconds / 6
    parts = [answers.ms(200, n * sixth, (n + 1) * sixth) for n in range(6)]
    of_parts = [float(np.percentile(part, q)) for part in parts if len(part)]
    return Figure(float(np.percentile(answers.ms(200), q)), "ms", (min(of_parts), max(of_parts)))


def _requests(bundle: Path, config: OverloadConfig) -> list[bytes]:
    """Calls as they are sent."""
    rng = np.random.default_rng(config.seed)
    opened = load_bundle(bundle)
    ids, event = opened.catalogue()["item_id"].to_list(), opened.manifest.events[0]
    calls = []
    for _ in range(config.n_requests):
        rows = rng.choice(len(ids), min(config.history, len(ids)), replace=False)
        request = RetrieveRequest(history=[HistoryEvent(item_id=ids[row], event=event) for row in rows])
        body = json.dumps(request.model_dump(mode="json", exclude_defaults=True)).encode()
        head = "POST /v1/retrieve HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        calls.append(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return calls


def _resident_mib(pid: int) -> float:
    """Memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise GenRetrievalError(f"process {pid} has ended; see the log of the server")
