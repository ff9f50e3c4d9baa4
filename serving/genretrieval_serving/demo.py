"""The demo's last act: start a server on a bundle and ask it, by gRPC and by REST."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from genretrieval.bundle import Bundle
from genretrieval.errors import UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.client import Client


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
    with running_server(bundle.path, command) as (http, grpc, process):
        for title, request in requests.items():
            with Client(grpc) as by_grpc, Client(http) as by_rest:
                answers = {"gRPC": by_grpc.retrieve(request), "REST": by_rest.retrieve(request)}
            for transport, answer in answers.items():
                console.print(_table(f"{title} by {transport}", request, answer, titles))
        if once:
            return
        console.print(f"\nServing on {http} and {grpc}; Ctrl-C stops it. Try:\n")
        console.print(f"  genretrieval retrieve --endpoint {grpc} --query ...\n  curl {http}/readyz\n", highlight=False)
        try:
            process.wait()
        except KeyboardInterrupt:
            console.print("stopping")


@contextmanager
def running_server(bundle: Path, command: Sequence[str]) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """A server on free ports: its REST address, its gRPC address and its process. It is stopped at the end.

    Its log goes to ``server.log`` beside the bundle.

    Raises:
        UnavailableError: it ended before it was ready.
    """
    arguments = [*command, "serve", "--bundle", str(bundle), "--http-port", "0", "--grpc-port", "0"]
    log = bundle.with_name("server.log")
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output)  # noqa: S603
    try:
        http, grpc = _addresses(process, log)
        yield http, grpc, process
    finally:
        process.terminate()
        process.wait()


def _addresses(process: subprocess.Popen[bytes], log: Path) -> tuple[str, str]:
    """Read the log up to the line that says the server is ready."""
    with log.open(encoding="utf-8") as lines:
        while True:
            line = lines.readline()
            if line.endswith("\n"):
                entry = json.loads(line)
                if entry.get("event") == "ready":
                    return entry["http"], entry["grpc"]
            elif process.poll() is not None:
                raise UnavailableError(f"the server ended with exit code {process.returncode}; see {log}")
            else:
                time.sleep(0.05)


def _table(title: str, request: RetrieveRequest, answer: RetrieveResponse, titles: Mapping[str, str]) -> Table:
    asked = f"“{request.query}”, " if request.query else ""
    last = ", ".join(titles.get(event.item_id, event.item_id) for event in request.history[-2:])
    table = Table("item", "title", "semantic ID", "score", title=f"{title}: {asked}after {last}", title_justify="left")
    for item in answer.items:
        codes = " ".join(map(str, item.semantic_id))
        table.add_row(item.item_id, titles.get(item.item_id, ""), codes, f"{item.score:.2f}")
    return table
