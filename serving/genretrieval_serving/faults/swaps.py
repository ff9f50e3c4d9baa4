"""Bundles that take over from each other while callers ask."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from genretrieval.errors import InvalidInputError, UnavailableError
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import AliasFields, Kind
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.client import Client
from genretrieval_serving.faults.load import Tally, Truth, asking
from genretrieval_serving.faults.processes import KillableServer

PHASES = ("before", "during", "after")
_PATIENCE = 600.0


@dataclass(frozen=True, slots=True)
class SwapConfig:
    """Settings of the bench.

    Attributes:
        swaps: how often the bundle changes, to the other one and back.
        seconds: that callers ask before each swap, and after it.
        callers: that ask at a time, each the next request a little after the last answer.
        threads: of the server's graph.

    Raises:
        InvalidInputError: a setting is out of range.
    """

    swaps: int = 6
    seconds: float = 8.0
    callers: int = 4
    threads: int = 1

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if min(self.swaps, self.callers, self.threads) < 1 or self.seconds <= 0:
            raise InvalidInputError("swaps, callers, threads and seconds must be positive")


@dataclass
class Swaps:
    """What swaps have shown.

    Attributes:
        seconds: of each, from the call that moves the alias to the first answer of the new bundle.
        tallies: what callers met, by phase.
        resident_mib: memory of the server before the first and after each.
    """

    seconds: list[float] = field(default_factory=list)
    tallies: dict[str, list[Tally]] = field(default_factory=lambda: {phase: [] for phase in PHASES})
    resident_mib: list[float] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """In words: what should not have happened."""
        tallies = [tally for phase in PHASES for tally in self.tallies[phase]]
        return [problem for tally in tallies for problem in tally.problems]


def swap_under_load(
    bundles: Path, names: tuple[str, str], command: Sequence[str], folder: Path, config: SwapConfig
) -> Swaps:
    """Serve one bundle and then another, to and fro, while callers ask and look whether each answer is of one alone.

    Args:
        bundles: folder of both.
        names: of the bundle that is served first, and of the other one.
        command: how to call the command line.
        folder: of the admin store and the server's log; both are overwritten.
        config: settings.

    Raises:
        UnavailableError: the server ended, or did not swap.
    """
    for old in folder.glob("swap.db*"):
        old.unlink()
    url = f"sqlite:///{(folder / 'swap.db').resolve()}"
    with closing(SqlStore.open(url)) as store:
        store.apply(Call("bench"), [Create(Kind.ALIASES, "swap", AliasFields(bundle=names[0]))])
    options = ["--bundles", str(bundles), "--alias", "swap", "--admin-store", url]
    options += ["--threads", str(config.threads), "--quiet"]
    truth, swaps = Truth.of(*(bundles / name for name in names)), Swaps()
    with KillableServer(command, options, folder / "swap.log", admin=True) as server:
        addresses = server.addresses
        assert addresses.admin is not None
        with AdminClient(addresses.admin, timeout=_PATIENCE) as admin, Client(addresses.grpc) as client:
            ask = partial(asking, truth, lambda: Client(addresses.grpc), callers=config.callers)
            swaps.resident_mib.append(server.resident_mib())
            for number in range(config.swaps):
                with ask() as tally:
                    time.sleep(config.seconds)
                swaps.tallies["before"].append(tally)
                with ask() as tally:
                    swaps.seconds.append(_swap(admin, client, names[(number + 1) % 2]))
                swaps.tallies["during"].append(tally)
                with ask() as tally:
                    time.sleep(config.seconds)
                swaps.tallies["after"].append(tally)
                swaps.resident_mib.append(server.resident_mib())
    return swaps


def _swap(admin: AdminClient, client: Client, name: str) -> float:
    """Move the alias; seconds until the server answers with the other bundle."""
    begun = time.perf_counter()
    admin.move("swap", {"bundle": name})
    while admin.deployment().arms[0].bundle != name:
        if time.perf_counter() - begun > _PATIENCE:
            raise UnavailableError(f"the server does not come to serve {name}; see its log")
        time.sleep(0.02)
    client.retrieve(top_k=1)
    return time.perf_counter() - begun
