"""What callers notice when another bundle takes over while they ask: how many fail, and how long the others wait."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from genretrieval.figures import Figure
from genretrieval_serving.faults.load import Tally
from genretrieval_serving.faults.swaps import PHASES, SwapConfig, swap_under_load


def bench_swap(
    bundles: Path,
    names: tuple[str, str],
    command: Sequence[str],
    folder: Path,
    console: Console,
    config: SwapConfig | None = None,
) -> dict[str, Figure]:
    """Failures and latency before, during and after swaps, see `swap_under_load`.

    Each phase's percentiles are of all its answers; their spread is the lowest and highest of a single swap.
    """
    config = config or SwapConfig()
    swaps = swap_under_load(bundles, names, command, folder, config)
    for problem in swaps.problems:
        console.print(problem, style="red", highlight=False)
    tallies = [tally for phase in PHASES for tally in swaps.tallies[phase]]
    figures = {
        "swap.swaps": Figure(config.swaps, "swaps"),
        "swap.requests": Figure(sum(tally.asked for tally in tallies), "requests"),
        "swap.failed": Figure(sum(sum(tally.failed.values()) for tally in tallies), "requests"),
        "swap.wrong": Figure(sum(tally.wrong for tally in tallies), "answers"),
        "swap.seconds": Figure(float(np.median(swaps.seconds)), "s", (min(swaps.seconds), max(swaps.seconds))),
    }
    for phase in PHASES:
        figures |= _latencies(phase, swaps.tallies[phase])
    during, before = figures["swap.p99_ms.during"].value, figures["swap.p99_ms.before"].value
    figures["swap.p99_during_vs_before"] = Figure(during / before, "ratio")
    figures["swap.resident_mib.first"] = Figure(swaps.resident_mib[0], "MiB")
    figures["swap.resident_mib.last"] = Figure(swaps.resident_mib[-1], "MiB")
    return figures


def _latencies(phase: str, tallies: Sequence[Tally]) -> dict[str, Figure]:
    ms = [np.asarray(tally.seconds) * 1e3 for tally in tallies if tally.seconds]
    figures = {}
    for q in (50, 99):
        each = [float(np.percentile(one, q)) for one in ms]
        figures[f"swap.p{q}_ms.{phase}"] = Figure(
            float(np.percentile(np.concatenate(ms), q)), "ms", (min(each), max(each))
        )
    return figures
