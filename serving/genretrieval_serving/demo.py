"""The demo's last act: start a server on a bundle and ask it, by gRPC and by REST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from genretrieval.bundle import Bundle
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import Kind
from genretrieval_serving.client import Client
from genretrieval_serving.live_server import Addresses, running_server

NEW_WORD = "glimmora"
BOUND_ROWS = (3, 500, 1500)  # of the catalogue: items that nothing but the word joins


def show_demo(
    bundle: Bundle, requests: Mapping[str, RetrieveRequest], command: Sequence[str], console: Console, *, once: bool
) -> None:
    """Serve `bundle` in a process of its own, show its answers, and go on serving until Ctrl-C unless `once`.

    Args:
        bundle: what to serve.
        requests: requests to show, by title.
        command: how to call the command line.
        console: where to print.
        once: stop after the answers.
    """
    titles = dict(bundle.catalogue().select("item_id", "title").iter_rows())
    store = bundle.path.with_name("admin.db")
    for earlier in store.parent.glob(f"{store.name}*"):
        earlier.unlink()
    options = ("--admin-store", f"sqlite:///{store.resolve()}", "--admin-port", "0")
    with running_server(bundle.path, command, *options) as server:
        for title, request in requests.items():
            with Client(server.grpc) as by_grpc, Client(server.http) as by_rest:
                answers = {"gRPC": by_grpc.retrieve(request), "REST": by_rest.retrieve(request)}
            for transport, answer in answers.items():
                console.print(_table(f"{title} by {transport}", request, answer, titles))
        if any(bundle.manifest.reserved_slots):
            _show_binding(server, titles, console)
        if once:
            return
        console.print(f"\nServing on {server.http} and {server.grpc}; Ctrl-C stops it. Try:\n")
        console.print(
            f"  genretrieval retrieve --endpoint {server.grpc} --query {NEW_WORD}\n"
            f"  genretrieval keywords list --endpoint {server.admin}\n  curl {server.http}/readyz\n"
            f"  the console, in a browser: {server.admin}/console\n",
            highlight=False,
        )
        try:
            server.process.wait()
        except KeyboardInterrupt:
            console.print("stopping")


def _show_binding(server: Addresses, titles: Mapping[str, str], console: Console) -> None:
    """A word that did not exist in training is bound to items, and asked for before and after."""
    request = RetrieveRequest(query=NEW_WORD, top_k=len(BOUND_ROWS) + 1)
    ids = list(titles)
    bound = [ids[row] for row in BOUND_ROWS]
    assert server.admin is not None
    with Client(server.grpc) as client, AdminClient(server.admin) as admin:
        console.print(_table(f"“{NEW_WORD}” is a word that nobody knows", request, client.retrieve(request), titles))
        admin.create(Kind.KEYWORDS, {"id": NEW_WORD, "text": NEW_WORD, "binding": {"items": {"item_ids": bound}}})
        answer = client.retrieve(request.model_copy(update={"min_revision": admin.revision()}))
        console.print(_table(f"“{NEW_WORD}” is bound to {', '.join(bound)}", request, answer, titles))


def _table(title: str, request: RetrieveRequest, answer: RetrieveResponse, titles: Mapping[str, str]) -> Table:
    asked = f"“{request.query}”, " if request.query else ""
    last = ", ".join(titles.get(event.item_id, event.item_id) for event in request.history[-2:])
    context = f": {asked}after {last}" if last else ""
    table = Table("item", "title", "semantic ID", "score", title=f"{title}{context}", title_justify="left")
    for item in answer.items:
        codes = " ".join(map(str, item.semantic_id))
        table.add_row(item.item_id, titles.get(item.item_id, ""), codes, f"{item.score:.2f}")
    return table
