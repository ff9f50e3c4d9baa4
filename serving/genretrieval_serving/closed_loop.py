"""Callers who each wait for an answer before they ask again: throughput and latency of a server over HTTP.

`wrk`, a compiled load generator, takes next to nothing of the core it runs on. Where it is not installed threads do as
well, for smoke tests: they measure themselves as much as the server.
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from genretrieval.errors import MissingExtraError, UnavailableError

# Requests of a file of JSON lines in turn; at the end one line of figures.
_WRK = """
local requests, n = {}, 0
function init(args)
  for body in io.lines(args[1]) do
    requests[#requests + 1] = wrk.format("POST", nil, {["Content-Type"] = "application/json"}, body)
  end
end
function request()
  n = n % #requests + 1
  return requests[n]
end
function done(summary, latency, _)
  local e = summary.errors
  io.write(string.format('\\n{"answers": %d, "failed": %d, "seconds": %f, "p50_ms": %f, "p99_ms": %f}\\n',
    summary.requests, e.connect + e.read + e.write + e.status + e.timeout, summary.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True, slots=True)
class Load:
    """What callers met.

    Attributes:
        per_second: answers a second.
        p50_ms: milliseconds within which half of the answers came.
        p99_ms: milliseconds within which 99 of 100 came.
        failed: calls without a good answer.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    failed: int


Generator = Callable[[str, int, float], Load]


def wrk(bodies: Path, core: int) -> Generator:
    """Load by `wrk` on a core of its own.

    Args:
        bodies: request bodies, one JSON document a line.
        core: the core that it runs on.

    Returns:
        Called with a URL, a number of connections and seconds.

    Raises:
        MissingExtraError: it is not installed.
    """
    if shutil.which("wrk") is None:
        raise MissingExtraError(
            "wrk, the load generator, is not installed (Debian, Ubuntu: apt install wrk); --quick does without"
        )
    script = bodies.with_suffix(".lua")
    script.write_text(_WRK, "ascii")

    def load(url: str, connections: int, seconds: float) -> Load:
        command = ["taskset", "-c", str(core), "wrk", "-t1", f"-c{connections}", f"-d{round(seconds)}s"]
        command += ["--timeout", "60s", "-s", str(script), url, "--", str(bodies)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise UnavailableError(f"wrk could not ask {url}: {done.stderr.strip() or done.stdout.strip()}")
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return Load(
            (told["answers"] - told["failed"]) / told["seconds"], told["p50_ms"], told["p99_ms"], told["failed"]
        )

    return load


def threads(bodies: Path) -> Generator:
    """Load by threads of this process; see `wrk`."""
    requests = bodies.read_bytes().splitlines()
    headers = {"Content-Type": "application/json"}

    def load(url: str, connections: int, seconds: float) -> Load:
        place = urlsplit(url)
        begun = time.perf_counter()
        took: list[float] = []
        failed: list[float] = []

        def ask(number: int) -> None:
            connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=60)
            while time.perf_counter() < begun + seconds:
                sent = time.perf_counter()
                connection.request("POST", place.path, requests[number % len(requests)], headers)
                with connection.getresponse() as answer:
                    answer.read()
                    (took if answer.status == 200 else failed).append(time.perf_counter() - sent)
                number += connections
            connection.close()

        callers = [threading.Thread(target=ask, args=(number,)) for number in range(connections)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        p50, p99 = np.quantile(took, [0.5, 0.99]) * 1e3 if took else (np.nan, np.nan)
        return Load(len(took) / (time.perf_counter() - begun), float(p50), float(p99), len(failed))

    return load
