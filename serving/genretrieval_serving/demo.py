"""The demo's last act: start a server on a bundle and ask it, by gRPC and by REST."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from genretrieval.bundle import Bundle
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.client import Client
from genretrieval_serving.live_server import running_server


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
    with running_server(bundle.path, command) as server:
        for title, request in requests.items():
            with Client(server.grpc) as by_grpc, Client(server.http) as by_rest:
                answers = {"gRPC": by_grpc.retrieve(request), "REST": by_rest.retrieve(request)}
            for transport, answer in answers.items():
                console.print(_table(f"{title} by {transport}", request, answer, titles))
        if once:
            return
        console.print(f"\nServing on {server.http} and {server.grpc}; Ctrl-C stops it. Try:\n")
        console.print(
            f"  genretrieval retrieve --endpoint {server.grpc} --query ...\n  curl {server.http}/readyz\n",
            highlight=False,
        )
        try:
            server.process.wait()
        except KeyboardInterrupt:
            console.print("stopping")


def _table(title: str, request: RetrieveRequest, answer: RetrieveResponse, titles: Mapping[str, str]) -> Table:
    asked = f"“{request.query}”, " if request.query else ""
    last = ", ".join(titles.get(event.item_id, event.item_id) for event in request.history[-2:])
    table = Table("item", "title", "semantic ID", "score", title=f"{title}: {asked}after {last}", title_justify="left")
    for item in answer.items:
        codes = " ".join(map(str, item.semantic_id))
        table.add_row(item.item_id, titles.get(item.item_id, ""), codes, f"{item.score:.2f}")
    return table
