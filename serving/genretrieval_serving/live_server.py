"""A server in a process of its own, for benches and the demo: started on free ports, stopped at the end."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from genretrieval.errors import GenRetrievalError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.served_logs import KEY_VARIABLE, UserKeys
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import Kind
from genretrieval_serving.client import Client


@dataclass(frozen=True)
class Addresses:
    """Where a running server listens.

    Attributes:
        http: of REST.
        grpc: of gRPC.
        admin: of the admin API; None without an admin store.
        process: the server.
    """

    http: str
    grpc: str
    admin: str | None
    process: subprocess.Popen[bytes]


@contextmanager
def running_server(
    bundle: Path,
    command: Sequence[str],
    *options: str,
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Iterator[Addresses]:
    """A server on free ports.

    Args:
        bundle: what it serves.
        command: how to call the command line.
        options: further ones of `genretrieval serve`.
        log: where its log goes; by default ``server.log`` beside the bundle.
        environment: variables beside those of this process.

    Raises:
        UnavailableError: it ended before it was ready.
    """
    arguments = [*command, "serve", "--bundle", str(bundle), "--http-port", "0", "--grpc-port", "0", *options]
    log = log or bundle.with_name("server.log")
    with log.open("wb") as output:
        variables = {**os.environ, **(environment or {})}
        process = subprocess.Popen(arguments, stdout=output, env=variables)  # noqa: S603
    try:
        yield read_addresses(process, log)
    finally:
        process.terminate()
        process.wait()


def read_addresses(process: subprocess.Popen[bytes], log: Path) -> Addresses:
    """Read the log of a server that starts, up to the line that says it is ready.

    Raises:
        UnavailableError: it ended before that.
    """
    with log.open(encoding="utf-8") as lines:
        while True:
            line = lines.readline()
            if line.endswith("\n"):
                entry = json.loads(line)
                if entry.get("event") == "ready":
                    return Addresses(entry["http"], entry["grpc"], entry.get("admin"), process)
            elif process.poll() is not None:
                raise UnavailableError(f"the server ended with exit code {process.returncode}; see {log}")
            else:
                time.sleep(0.05)


class BoundServer:
    """A running server whose keywords are bound and asked for by words alone."""

    def __init__(self, client: Client, admin: AdminClient) -> None:
        """A server without keywords; `client` asks and `admin` binds."""
        self._client = client
        self._admin = admin
        self._revision = admin.revision()
        slots = admin.slots()
        self.n_slots = slots.free + slots.bound
        self._ids: list[str] = []

    def bind(self, words: Mapping[str, Sequence[str]]) -> None:
        """Bind each word to items, in place of those that were bound; answers from now on show it.

        A keyword that is bound already becomes the next word: so its slot need not rest between two words.
        """
        bindings = [{"text": word, "binding": {"items": {"item_ids": list(ids)}}} for word, ids in words.items()]
        renamed = list(zip(self._ids, bindings, strict=False))
        operations = [{"action": "update", "id": id_, "patch": fields} for id_, fields in renamed]
        operations += [
            {"action": "create", "resource": {"id": f"bound-{n}", **fields}}
            for n, fields in enumerate(bindings[len(renamed) :], len(renamed))
        ]
        operations += [
            {"action": "update", "id": id_, "patch": {"binding": None}} for id_ in self._ids[len(bindings) :]
        ]
        resources = self._admin.batch(Kind.KEYWORDS, operations)
        self._ids = [resource.id for resource in resources]
        self._revision = max(resource.revision for resource in resources)

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        """Answers that show all that was bound.

        Raises:
            GenRetrievalError: what the server says is wrong with a request.
        """
        asked = [request.model_copy(update={"min_revision": self._revision}) for request in requests]
        return _answers(self._client, asked)


def _answers(client: Client, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
    """An answer to every request, or the first error."""
    answers = []
    for answer in client.batch_retrieve(requests):
        if isinstance(answer, GenRetrievalError):
            raise answer
        answers.append(answer)
    return answers


@contextmanager
def bound_server(bundle: Path, command: Sequence[str], store: str) -> Iterator[BoundServer]:
    """Serve `bundle` with an admin store of its own.

    Args:
        bundle: what is served.
        command: how to call the command line.
        store: URL of an empty admin store.
    """
    options = ("--quiet", "--admin-store", store, "--admin-port", "0")
    with running_server(bundle, command, *options) as addresses:
        assert addresses.admin is not None
        with Client(addresses.grpc, timeout=120.0) as client, AdminClient(addresses.admin) as admin:
            yield BoundServer(client, admin)


class VisitedServer:
    """A running server that is told what became of its answers."""

    def __init__(self, client: Client) -> None:
        """A server that `client` reaches."""
        self._client = client

    def retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse]:
        """Ask.

        Raises:
            GenRetrievalError: what the server says is wrong with a request.
        """
        return _answers(self._client, requests)

    def record(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Tell what was seen and taken; events by their fields."""
        self._client.record_events(events)


@contextmanager
def visited_server(bundle: Path, command: Sequence[str], logs: Path, keys: UserKeys) -> Iterator[VisitedServer]:
    """Serve `bundle` with histories in memory; all is in the logs when the block ends.

    Args:
        bundle: what is served.
        command: how to call the command line.
        logs: folder of its logs.
        keys: what stands for users there.
    """
    # Whoever asks here can wait; a visitor of its own could not.
    options = ("--quiet", "--histories", "memory", "--log-folder", str(logs), "--max-wait", "60")
    environment = {KEY_VARIABLE: keys.secret.decode()}
    with (
        running_server(bundle, command, *options, environment=environment) as addresses,
        Client(addresses.http, timeout=120.0) as client,
    ):
        yield VisitedServer(client)
