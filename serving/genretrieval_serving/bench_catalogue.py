"""How long a change of the catalogue takes: to make the new state, and until servers answer from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
from rich.console import Console

from genretrieval.bundle import GRAPH, Bundle, load_bundle
from genretrieval.catalogue import build_index
from genretrieval.catalogue_changes import ITEM_ID, SEMANTIC_ID, ChangeChecker, ChangesFile, file_name
from genretrieval.errors import UnavailableError
from genretrieval.figures import Figure
from genretrieval.request import Filters, RetrieveRequest
from genretrieval.retrieval import Backend, Retriever
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.client import Client
from genretrieval_serving.live_server import running_server

NEW_ITEMS = 1000
PRICE = "price"
ASK_AGAIN_SECONDS = 0.02


def bench_catalogue(
    bundle: Path, command: Sequence[str], open_backend: Callable[[Path], Backend], console: Console, rounds: int = 20
) -> dict[str, Figure]:
    """Change the catalogue of `bundle` in this process, then on two servers that share a folder of changes.

    The peer of a change is to open the catalogue anew, as a restart does; both take turns. On servers an item gets a
    price that no other has and is asked for by it: through the admin API of the first, then by a file that is put into
    the folder. Time runs until the end of the first answer that has the item.

    Args:
        bundle: with an attribute ``price``.
        command: how to call the command line.
        open_backend: opens the bundle's graph.
        console: progress.
        rounds: how often each is measured.

    Returns:
        Medians, with the lowest and highest as spread.
    """
    opened = load_bundle(bundle)
    figures = _in_process(opened, open_backend(bundle / GRAPH), rounds)
    console.print("measured in process", style="dim", highlight=False)
    return figures | _on_servers(opened, command, rounds)


def _in_process(bundle: Bundle, backend: Backend, rounds: int) -> dict[str, Figure]:
    retriever = Retriever(bundle, backend)
    catalogue = retriever.catalogue
    checker = ChangeChecker(catalogue, bundle.manifest, retriever.features.keywords)
    stock = ChangesFile(pl.DataFrame({ITEM_ID: [catalogue.item_ids[0]], PRICE: [1.0]}))
    few = min(NEW_ITEMS, len(catalogue.item_ids))
    codes = pl.Series(catalogue.ids.codes[:few].tolist(), dtype=pl.List(pl.Int32()))
    new = ChangesFile(pl.DataFrame({ITEM_ID: [f"new-{n}" for n in range(few)], PRICE: [1.0] * few, SEMANTIC_ID: codes}))
    paths = catalogue.index.leaf_codes(catalogue.index.keyword_leaves)
    contenders: dict[str, Callable[[], object]] = {
        "stock_change": lambda: retriever.on(catalogue.updated(checker.check(stock, "stock"))),
        "new_items": lambda: retriever.on(catalogue.updated(checker.check(new, "new"))),
        "index": lambda: build_index(catalogue.ids, -catalogue.table["popularity"].to_numpy().astype(np.int64), paths),
        "opened_anew": lambda: Retriever(bundle, backend),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            begun = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begun)
    figures = {f"scale.rebuild.{name}_ms": _median(of) for name, of in seconds.items()}
    anew = np.median(seconds["opened_anew"])
    return figures | {
        "scale.rebuild.opened_anew_over_stock_change": Figure(
            float(anew / np.median(seconds["stock_change"])), "times"
        ),
        "scale.rebuild.items": Figure(len(catalogue.item_ids), "items"),
        "scale.rebuild.new_items": Figure(few, "items"),
    }


def _on_servers(bundle: Bundle, command: Sequence[str], rounds: int) -> dict[str, Figure]:
    folder = bundle.path.with_name("changes")
    folder.mkdir(exist_ok=True)
    for old in [*folder.iterdir(), *bundle.path.parent.glob("catalogue.db*")]:
        old.unlink()
    ids = bundle.catalogue()[ITEM_ID].head(2 * rounds).to_list()
    store = f"sqlite:///{bundle.path.with_name('catalogue.db').resolve()}"
    options = ["--quiet", "--threads", "1", "--catalogue-changes", str(folder)]
    acknowledged, here, there, dropped = [], [], [], []
    with ExitStack() as stack:
        first, second = (
            stack.enter_context(running_server(bundle.path, command, *options, *admin, log=bundle.path.with_name(log)))
            for log, admin in (
                ("first.log", ("--admin-store", store, "--admin-port", "0")),
                ("second.log", ()),
            )
        )
        assert first.admin is not None
        admin = stack.enter_context(AdminClient(first.admin))
        clients = [stack.enter_context(Client(at.grpc)) for at in (first, second)]
        for number in range(rounds):
            item, price = ids[number % len(ids)], -1.0 - number
            begun = time.perf_counter()
            admin.change_items([{ITEM_ID: item, PRICE: price}])
            acknowledged.append(time.perf_counter() - begun)
            here.append(_until_found(clients[0], item, price, begun))
            there.append(_until_found(clients[1], item, price, begun))
        for number in range(rounds):
            item, price = ids[(rounds + number) % len(ids)], -1.0 - rounds - number
            name = file_name(datetime.now(UTC), str(number))
            begun = time.perf_counter()
            ChangesFile(pl.DataFrame({ITEM_ID: [item], PRICE: [price]})).write(folder / name)
            dropped.append(max(_until_found(client, item, price, begun) for client in clients))
    return {
        "catalogue.acknowledged_ms": _median(acknowledged),
        "catalogue.visible_ms.same_replica": _median(here),
        "catalogue.visible_ms.other_replica": _median(there),
        "catalogue.visible_ms.dropped_file": _median(dropped),
    }


def _until_found(client: Client, item: str, price: float, begun: float) -> float:
    """Seconds from `begun` until an answer has the item by its price."""
    request = RetrieveRequest(filters=Filters(min_price=price, max_price=price), top_k=1)
    while time.perf_counter() - begun < 60:
        if [found.item_id for found in client.retrieve(request).items] == [item]:
            return time.perf_counter() - begun
        time.sleep(ASK_AGAIN_SECONDS)
    raise UnavailableError(f"{item!r} was changed a minute ago and is not found; see the logs of the servers")


def _median(seconds: Sequence[float]) -> Figure:
    """In milliseconds, with the lowest and highest as spread."""
    ms = np.asarray(seconds) * 1e3
    return Figure(float(np.median(ms)), "ms", (float(ms.min()), float(ms.max())))
