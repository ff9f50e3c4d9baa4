"""`genretrieval bench faults`: one fault after another, each with what was lost by it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console

from genretrieval.errors import InvalidInputError
from genretrieval.figures import Figure
from genretrieval_serving.faults import serving
from genretrieval_serving.faults.admin_store import admin_store_faults
from genretrieval_serving.faults.serving import Ground, Verdict


def _admin_store(ground: Ground) -> Verdict:
    """Writers race for slots, and are killed, as is their database; see `genretrieval_serving.faults.admin_store`."""
    figures, problems = admin_store_faults(ground.count(100), writers=ground.count(50))
    prefix = "faults.admin_store."
    return Verdict({name.removeprefix(prefix): figure.value for name, figure in figures.items()}, None, problems)


FAULTS: dict[str, Callable[[Ground], Verdict]] = {
    fault.__name__.removeprefix("_"): fault
    for fault in (
        serving.replica_killed,
        serving.replica_drained,
        serving.postgresql_gone,
        serving.redis_gone,
        serving.disk_full,
        serving.bundle_corrupted,
        serving.bundle_swapped,
        serving.clock_jumped,
        serving.slow_clients,
        serving.malformed_requests,
        _admin_store,
    )
}


def bench_faults(ground: Ground, console: Console, names: Sequence[str] = ()) -> tuple[dict[str, Figure], list[str]]:
    """Cause faults one after another.

    Args:
        ground: where.
        console: progress.
        names: of `FAULTS`; all without.

    Returns:
        Figures, and every problem in words.

    Raises:
        InvalidInputError: there is no such fault.
    """
    if unknown := set(names) - set(FAULTS):
        raise InvalidInputError(f"no fault {', '.join(sorted(unknown))}; there are {', '.join(FAULTS)}")
    figures: dict[str, Figure] = {}
    problems: list[str] = []
    ground.folder.mkdir(parents=True, exist_ok=True)
    for name in names or FAULTS:
        verdict = FAULTS[name](ground)
        if verdict.skipped:
            console.print(f"{name}: not caused: {verdict.skipped}", style="yellow", highlight=False)
            continue
        found = verdict.all_problems
        for what, number in verdict.done.items():
            figures[f"faults.{name}.{what}"] = Figure(number, _unit(what))
        if verdict.tally is not None:
            figures[f"faults.{name}.requests"] = Figure(verdict.tally.asked, "requests")
            figures[f"faults.{name}.failed"] = Figure(sum(verdict.tally.failed.values()), "requests")
            figures[f"faults.{name}.wrong"] = Figure(verdict.tally.wrong, "answers")
        figures[f"faults.{name}.problems"] = Figure(len(found), "problems")
        problems += [f"{name}: {problem}" for problem in found]
        console.print(f"{name}: {len(found)} problems", style="red" if found else "dim", highlight=False)
    return figures, problems


def _unit(what: str) -> str:
    units = {"seconds_away": "s", "seconds_back": "s", "bytes_free": "bytes", "grown_mib": "MiB", "p99_ms": "ms"}
    return units.get(what, what.rsplit(".", 1)[-1].rsplit("_", 1)[-1])
