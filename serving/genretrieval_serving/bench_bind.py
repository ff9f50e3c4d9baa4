"""How long after an operator binds a word it is retrieved: on the server that took the change, and on all replicas."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from genretrieval.bundle import load_bundle
from genretrieval.errors import InvalidInputError, UnavailableError
from genretrieval.figures import Figure
from genretrieval.request import RetrieveRequest
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import Kind
from genretrieval_serving.client import Client
from genretrieval_serving.live_server import running_server

ASK_AGAIN_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class BindConfig:
    """Settings of the bench.

    Attributes:
        replicas: servers on one admin store.
        bindings: words that are bound, one after another.
        items: items of a word.
        reads: requests a second that every replica answers meanwhile.
        notify: whether PostgreSQL tells servers of changes; without, they poll.
        seed: of the items drawn.

    Raises:
        InvalidInputError: a setting is out of range.
    """

    replicas: int = 4
    bindings: int = 200
    items: int = 50
    reads: float = 5.0
    notify: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what measures nothing."""
        if min(self.replicas, self.bindings, self.items) < 1 or self.reads < 0:
            raise InvalidInputError("replicas, bindings and items must be at least 1, reads not negative")


def bench_bind(
    bundle: Path, command: Sequence[str], store: str, console: Console, config: BindConfig | None = None
) -> dict[str, Figure]:
    """Serve `bundle` by several replicas, bind words through the first one's admin API, and ask all of them.

    A word is visible on a replica when the first item of an answer to it is one that it was bound to; time runs from
    the moment the change is sent to the end of that answer. The replica that took the change is asked once it has
    acknowledged it, the others every 20 ms: replicas of a bench share the cores that they are measured on.

    Args:
        bundle: with reserved slots.
        command: how to call the command line.
        store: URL of an empty admin store; one that all replicas reach.
        console: progress.
        config: settings.

    Raises:
        InvalidInputError: the bundle has fewer reserved slots than words are bound.
    """
    config = config or BindConfig()
    opened = load_bundle(bundle)
    slots = sum(opened.manifest.reserved_slots)
    if slots < config.bindings:
        raise InvalidInputError(f"{bundle} has {slots} reserved slots, fewer than the {config.bindings} bindings asked")
    ids = opened.catalogue()["item_id"].to_list()
    rng = np.random.default_rng(config.seed)
    sent, same, everywhere = [], [], []
    with ExitStack() as stack:
        replicas = [stack.enter_context(_replica(bundle, command, store, config, n)) for n in range(config.replicas)]
        admin, clients = replicas[0][1], [client for client, _ in replicas]
        console.print(f"{config.replicas} replicas of {len(ids):,} items are ready", style="dim", highlight=False)
        pool = stack.enter_context(ThreadPoolExecutor(config.replicas))
        stack.enter_context(_reading(clients, config.reads))
        for number in range(config.bindings):
            word = f"novelty{number}"
            bound = [ids[row] for row in rng.choice(len(ids), min(config.items, len(ids)), replace=False)]
            begun = time.perf_counter()
            waiting = [pool.submit(_until_visible, client, word, set(bound), begun) for client in clients[1:]]
            admin.create(Kind.KEYWORDS, {"id": word, "text": word, "binding": {"items": {"item_ids": bound}}})
            sent.append(time.perf_counter() - begun)
            same.append(_until_visible(clients[0], word, set(bound), begun))
            everywhere.append(max([same[-1], *(wait.result() for wait in waiting)]))
    return {
        **_quantiles("bind.acknowledged_ms", sent),
        **_quantiles("bind.visible_ms.same_replica", same),
        **_quantiles("bind.visible_ms.all_replicas", everywhere),
        "bind.items": Figure(len(ids), "items"),
        "bind.replicas": Figure(config.replicas, "replicas"),
        "bind.reads": Figure(config.reads, "requests/s and replica"),
    }


@contextmanager
def _replica(
    bundle: Path, command: Sequence[str], store: str, config: BindConfig, number: int
) -> Iterator[tuple[Client, AdminClient]]:
    options = ["--quiet", "--threads", "1", "--admin-store", store, "--admin-port", "0"]
    options += [] if config.notify else ["--no-admin-notify"]
    log = bundle.with_name(f"replica-{number}.log")
    with running_server(bundle, command, *options, log=log) as server, Client(server.grpc) as client:
        assert server.admin is not None
        # Texts for selectors are prepared in the background, once after a start.
        while b"admin_text_prepared" not in log.read_bytes():
            time.sleep(0.5)
        with AdminClient(server.admin) as admin:
            yield client, admin


def _until_visible(client: Client, word: str, bound: set[str], begun: float) -> float:
    """Seconds from `begun` until an answer begins with a bound item."""
    request = RetrieveRequest(query=word, top_k=1)
    while time.perf_counter() - begun < 60:
        items = client.retrieve(request).items
        if items and items[0].item_id in bound:
            return time.perf_counter() - begun
        time.sleep(ASK_AGAIN_SECONDS)
    raise UnavailableError(f"{word!r} was bound a minute ago and is not retrieved; see the logs of the replicas")


@contextmanager
def _reading(clients: Sequence[Client], rate: float) -> Iterator[None]:
    """Ask every replica at an even rate, as visitors would."""
    done = threading.Event()

    def read(client: Client) -> None:
        while not done.wait(1.0 / rate):
            client.retrieve(RetrieveRequest(query="entity1 modifier2", top_k=10))

    threads = [threading.Thread(target=read, args=(client,), daemon=True) for client in clients] if rate else []
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def _quantiles(name: str, seconds: Sequence[float]) -> dict[str, Figure]:
    """Median and 99th percentile, with the lowest and highest as spread."""
    ms: NDArray[np.float64] = np.asarray(seconds) * 1e3
    spread = (float(ms.min()), float(ms.max()))
    return {f"{name}.p{q}": Figure(float(np.percentile(ms, q)), "ms", spread) for q in (50, 99)}
