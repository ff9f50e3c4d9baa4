"""What callers notice when a replica, a database, a disk, a bundle, a clock or another caller breaks.

Every fault returns a `Verdict`: what was done, what callers met, and every problem in words. A fault whose tools are
not installed here says so in `Verdict.skipped`, and is no success.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar, Self
from urllib.parse import urlsplit

import grpc
import httpx

from genretrieval.bundle import CATALOGUE, GRAPH, MANIFEST
from genretrieval.errors import BundleError, GenRetrievalError, UnavailableError
from genretrieval.request import RetrieveRequest
from genretrieval_serving import wire
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import AliasFields, Kind, Scope
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.client import Client
from genretrieval_serving.faults.load import Tally, Truth, asking
from genretrieval_serving.faults.processes import KillableServer, PostgresCluster, RedisServer
from genretrieval_serving.faults.swaps import SwapConfig, swap_under_load
from genretrieval_serving.messages import MAX_BODY_BYTES

# Gone for so long at full length, as long as a failover of a managed database takes.
AWAY_SECONDS = 30.0
# More than sockets and buffers of refused calls take, and much less than their messages.
_HELD_MIB = 128.0
# What says that the server is at fault.
_SERVER_FAULTS = ("UNKNOWN", "INTERNAL", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED")


@dataclass(frozen=True)
class Ground:
    """Where faults happen.

    Attributes:
        bundle: what is served.
        other: a bundle beside it in the same folder, which takes over where one has to.
        folder: logs, stores and copies; its files are overwritten.
        command: how to call the command line.
        share: of the full lengths and numbers; a test takes a small one.
        seed: of what is broken when.
    """

    bundle: Path
    other: Path
    folder: Path
    command: Sequence[str]
    share: float = 1.0
    seed: int = 0

    def count(self, full: int) -> int:
        """A number of rounds."""
        return max(2, round(full * self.share))

    def seconds(self, full: float) -> float:
        """A length of time, at least two seconds."""
        return max(2.0, full * self.share)

    def server(
        self, name: str, *options: str, admin: bool = False, environment: Mapping[str, str] | None = None
    ) -> KillableServer:
        """A server of the bundle with its log in the folder."""
        given = ["--bundle", str(self.bundle), "--threads", "1", "--quiet", *options]
        log = self.folder / f"{name}.log"
        return KillableServer(self.command, given, log, admin=admin, environment=environment)


@dataclass
class Verdict:
    """What a fault has shown.

    Attributes:
        done: what was broken and how often, in numbers.
        tally: what callers met meanwhile; None where none asked.
        problems: what should not have happened, in words, beside those of the tally.
        skipped: why the fault could not be caused here; empty if it was.
    """

    done: dict[str, float] = field(default_factory=dict)
    tally: Tally | None = None
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def all_problems(self) -> list[str]:
        """What should not have happened."""
        return self.problems + (self.tally.problems if self.tally else [])


def _both(*servers: KillableServer) -> Client:
    """A client that knows several replicas."""
    addresses = ",".join(urlsplit(server.addresses.grpc).netloc for server in servers)
    return Client(f"grpc://{addresses}")


def replica_killed(ground: Ground) -> Verdict:
    """One of two replicas is killed with SIGKILL under load, again and again; callers retry on the other one."""
    rng, truth, rounds = random.Random(ground.seed), Truth.of(ground.bundle), ground.count(20)
    with (
        ground.server("killed-0") as one,
        ground.server("killed-1") as two,
        asking(truth, lambda: _both(one, two)) as tally,
    ):
        for _ in range(rounds):
            time.sleep(rng.uniform(1.5, 2.5))
            victim = rng.choice([one, two])
            victim.kill()
            time.sleep(rng.uniform(0.2, 1.0))
            victim.start()
    return Verdict({"kills": rounds}, tally)


def replica_drained(ground: Ground) -> Verdict:
    """One of two replicas is told to stop by SIGTERM under load and started again, as in a rolling upgrade."""
    rng, truth, rounds = random.Random(ground.seed), Truth.of(ground.bundle), ground.count(20)
    problems = []
    with (
        ground.server("drained-0") as one,
        ground.server("drained-1") as two,
        asking(truth, lambda: _both(one, two)) as tally,
    ):
        for number in range(rounds):
            # As an orchestrator waits until clients have found the one before.
            time.sleep(rng.uniform(1.5, 2.5))
            leaving = (one, two)[number % 2]
            if (code := leaving.terminate()) != 0:
                problems.append(f"a drained replica exited with {code}")
            leaving.start()
    return Verdict({"drains": rounds}, tally, problems)


def postgresql_gone(ground: Ground) -> Verdict:
    """PostgreSQL is killed and stays away; retrieval goes on, changes are refused and none that was made is lost."""
    if (binaries := PostgresCluster.binaries()) is None:
        return Verdict(skipped="PostgreSQL is not installed: there is no initdb")
    truth, away = Truth.of(ground.bundle), ground.seconds(AWAY_SECONDS)
    with PostgresCluster(binaries) as postgres, ExitStack() as stack:
        options = ("--admin-store", postgres.database())
        server = stack.enter_context(ground.server("postgresql", *options, admin=True))
        assert server.addresses.admin is not None
        admin = stack.enter_context(AdminClient(server.addresses.admin, timeout=5.0))
        changes = _Changes(admin, server.addresses.http)
        with asking(truth, lambda: Client(server.addresses.grpc)) as tally:
            changes.make(3)
            postgres.stop()
            gone = time.monotonic()
            while time.monotonic() - gone < away:
                changes.attempt()
                time.sleep(0.2)
            refused = changes.refused
            postgres.start()
            changes.make(3)
        problems = changes.problems + changes.lost()
        with Client(server.addresses.grpc) as client:
            answer = client.retrieve(RetrieveRequest(min_revision=admin.revision()))
        if "admin_state_stale" in answer.degraded:
            problems.append("the server never caught up with its store")
    if not refused:
        problems.append("changes were taken while PostgreSQL was away")
    done = {"seconds_away": away, "changes": len(changes.made), "changes_refused": refused}
    return Verdict(done, tally, problems)


class _Changes:
    """An operator who makes rules, and notes which were acknowledged; liveness is looked at each time."""

    def __init__(self, admin: AdminClient, http: str) -> None:
        self._admin, self._http = admin, http
        self._tried = 0
        self.made: list[str] = []
        self.refused = 0
        self.problems: list[str] = []

    def attempt(self) -> None:
        """Make one rule."""
        self._tried += 1
        rule = {
            "id": f"made-{self._tried}",
            "condition": {"query": {"match": "exact", "text": "nobody asks this"}},
            "effect": {"kind": "block", "items": {"item_ids": ["nothing"]}},
        }
        try:
            self._admin.create(Kind.RULES, rule)
            self.made.append(f"made-{self._tried}")
        except GenRetrievalError as error:
            self.refused += 1
            if error.http_status not in (503, 504):
                self.problems.append(f"a change was refused with {error.reason}: {error}")
        if httpx.get(f"{self._http}/livez").status_code != 200:
            self.problems.append("liveness failed, which would restart a server that works")

    def make(self, number: int) -> None:
        """Go on until so many more are made, a minute at most."""
        wanted, begun = len(self.made) + number, time.monotonic()
        while len(self.made) < wanted:
            if time.monotonic() - begun > 60:
                self.problems.append("no change succeeds for a minute although the store is there")
                return
            self.attempt()
            time.sleep(0.2)

    def lost(self) -> list[str]:
        """In words: which of the acknowledged rules are not there."""
        kept = {rule.id for rule in self._admin.pages(Kind.RULES)}
        return [f"rule {id_} was acknowledged and is lost" for id_ in self.made if id_ not in kept]


def redis_gone(ground: Ground) -> Verdict:
    """Redis is killed and stays away; retrieval goes on without stored histories, says so, and finds them again."""
    if not RedisServer.installed():
        return Verdict(skipped="Redis is not installed: there is no redis-server")
    truth, away = Truth.of(ground.bundle), ground.seconds(AWAY_SECONDS)
    problems = []
    with RedisServer() as redis, ground.server("redis", "--histories", redis.url) as server:
        with asking(truth, lambda: Client(server.addresses.grpc), user_id="somebody") as tally:
            time.sleep(1)
            redis.kill()
            time.sleep(away)
            redis.start()
            with Client(server.addresses.grpc) as client:
                back = time.monotonic()
                request = truth.requests[0].model_copy(update={"user_id": "somebody"})
                while "history_unavailable" in client.retrieve(request).degraded:
                    if time.monotonic() - back > 30:
                        problems.append("histories are not read again half a minute after Redis is back")
                        break
                    time.sleep(0.2)
            seconds_back = time.monotonic() - back
        if not tally.degraded["history_unavailable"]:
            problems.append("no answer said that the history was unavailable")
    done = {"seconds_away": away, "seconds_back": seconds_back, "degraded": tally.degraded["history_unavailable"]}
    return Verdict(done, tally, problems)


def disk_full(ground: Ground) -> Verdict:
    """A bundle is written to a file system that is too small; nothing that looks like a bundle is left."""
    size = sum(file.stat().st_size for file in ground.bundle.iterdir())
    copy = (
        "import shutil, sys\n"
        "from pathlib import Path\n"
        "from genretrieval.bundle import load_bundle, write_bundle\n"
        "bundle = load_bundle(Path(sys.argv[1]))\n"
        "with write_bundle(Path(sys.argv[2]), bundle.manifest) as folder:\n"
        "    for name in bundle.manifest.files:\n"
        "        shutil.copyfile(bundle.path / name, folder / name)\n"
    )
    own = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*own, "true"], check=False).returncode:  # noqa: S603
        return Verdict(skipped="this system lets us mount no file system of our own")
    with tempfile.TemporaryDirectory() as place:
        # A mount of its own in a namespace of its own: it goes with the process.
        inside = (
            f"mount -t tmpfs -o size={size // 2} none {place} && "
            f"{sys.executable} -c '{copy}' {ground.bundle.resolve()} {place}/new; code=$?; ls -A {place}; exit $code"
        )
        written = subprocess.run(  # noqa: S603
            [*own, "sh", "-c", inside], capture_output=True, text=True, check=False
        )
    problems = []
    if written.returncode == 0:
        problems.append("a bundle was written to a disk that is too small")
    if "BundleError" not in written.stderr and "No space left" not in written.stderr:
        problems.append(f"the error does not say what was wrong: {written.stderr[-500:]}")
    if written.stdout.strip():
        problems.append(f"left behind on the full disk: {written.stdout.strip()}")
    return Verdict({"bytes_free": size // 2}, None, problems)


def corruptions(bundle: Path, folder: Path, rng: random.Random) -> Iterator[tuple[str, Path]]:
    """Copies of a bundle, each broken in one way; what was done, and the copy, which goes when the next one comes."""

    def flip(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        file.write_bytes(content)

    ways: dict[str, Callable[[Path], object]] = {
        "flipped in one bit": flip,
        "cut in half": lambda file: os.truncate(file, file.stat().st_size // 2),
        "emptied": lambda file: os.truncate(file, 0),
        "missing": Path.unlink,
    }
    broken = folder / "broken-bundle"
    for name in (GRAPH, CATALOGUE, MANIFEST):
        for way, break_ in ways.items():
            if name == MANIFEST and break_ is flip:
                continue  # a bit of a description or a figure may be another and nothing is wrong
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(bundle, broken)
            break_(broken / name)
            yield f"{name} {way}", broken
    shutil.rmtree(broken)


def bundle_corrupted(ground: Ground) -> Verdict:
    """A server is started on a bundle with a file flipped, cut, emptied or missing; it ends and says why."""
    problems, refused = [], 0
    for what, broken in corruptions(ground.bundle, ground.folder, random.Random(ground.seed)):
        server = KillableServer(ground.command, ["--bundle", str(broken)], ground.folder / "corrupted.log")
        try:
            with server:
                problems.append(f"a bundle with {what} is served")
        except UnavailableError:
            refused += 1
            if server.process.returncode != BundleError.exit_code:
                problems.append(f"with {what} the server exited with {server.process.returncode}, not as of a bundle")
    return Verdict({"refused": refused}, None, problems)


def bundle_swapped(ground: Ground) -> Verdict:
    """Another bundle takes over under load, to and fro; then broken ones try to, and the one that works stays."""
    bundles, config = ground.bundle.parent, SwapConfig(swaps=ground.count(20), seconds=0.5)
    swaps = swap_under_load(bundles, (ground.bundle.name, ground.other.name), ground.command, ground.folder, config)
    tallies = [tally for phase in swaps.tallies.values() for tally in phase]
    truth, url, refused, problems = Truth.of(ground.bundle), _new_store(ground.folder / "refused.db"), 0, swaps.problems
    with closing(SqlStore.open(url)) as store:
        store.apply(Call("faults"), [Create(Kind.ALIASES, "refused", AliasFields(bundle=ground.bundle.name))])
    options = ["--bundles", str(bundles), "--alias", "refused", "--admin-store", url, "--threads", "1", "--quiet"]
    with KillableServer(ground.command, options, ground.folder / "refused.log", admin=True) as server:
        assert server.addresses.admin is not None
        with (
            AdminClient(server.addresses.admin, timeout=60.0) as admin,
            asking(truth, lambda: Client(server.addresses.grpc)) as tally,
        ):
            for what, broken in corruptions(ground.bundle, bundles, random.Random(ground.seed)):
                try:
                    admin.move("refused", {"bundle": broken.name})
                except GenRetrievalError:
                    refused += 1
                else:
                    problems.append(f"an alias could be moved to a bundle with {what}")
    done: dict[str, float] = {"swaps": config.swaps, "refused": refused}
    return Verdict(done, Tally.sum([*tallies, tally]), problems)


def clock_jumped(ground: Ground) -> Verdict:
    """The wall clock jumps a day ahead and back under load; nothing fails, and what is bound by time follows it."""
    libraries = list(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
    if not libraries:
        return Verdict(skipped="libfaketime is not installed, without which a process has no clock of its own")
    truth, clock = Truth.of(ground.bundle), ground.folder / "clock"
    clock.write_text("+0", "ascii")
    faked = {"LD_PRELOAD": str(libraries[0]), "FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1"}
    faked |= {"FAKETIME_DONT_FAKE_MONOTONIC": "1", "DONT_FAKE_MONOTONIC": "1"}
    rule = {
        "id": "until-tonight",
        "condition": {"query": {"match": "exact", "text": "sale"}},
        "effect": {"kind": "block", "items": {"item_ids": ["nothing"]}},
        "valid_until": (datetime.now(UTC) + timedelta(hours=12)).isoformat(),
    }
    jumps, problems = {"+1d": False, "+0": True, "-1d": True}, []
    options = ("--admin-store", _new_store(ground.folder / "clock.db"))
    with ExitStack() as stack:
        server = stack.enter_context(ground.server("clock", *options, admin=True, environment=faked))
        assert server.addresses.admin is not None
        admin = stack.enter_context(AdminClient(server.addresses.admin))
        client = stack.enter_context(Client(server.addresses.grpc))
        admin.create(Kind.RULES, rule)
        request = RetrieveRequest(query="sale", min_revision=admin.revision())
        with asking(truth, lambda: Client(server.addresses.grpc)) as tally:
            for jump, applies in jumps.items():
                clock.write_text(jump, "ascii")
                time.sleep(ground.seconds(5))
                if (client.retrieve(request).applied == ["rules/until-tonight"]) != applies:
                    problems.append(f"{jump}: a rule that ends tonight is {'not ' if applies else ''}in force")
    return Verdict({"jumps": len(jumps)}, tally, problems)


def slow_clients(ground: Ground) -> Verdict:
    """Callers who dribble their request, never read the answers or leave messages unfinished; others notice nothing."""
    by_rest, by_grpc = _slow_rest(ground), _slow_grpc(ground)
    assert by_rest.tally is not None
    assert by_grpc.tally is not None
    tally = Tally.sum([by_rest.tally, by_grpc.tally])
    done = by_rest.done | by_grpc.done | {"p99_ms": tally.p99_ms()}
    return Verdict(done, tally, by_rest.problems + by_grpc.problems)


def _slow_rest(ground: Ground) -> Verdict:
    truth, n_slow = Truth.of(ground.bundle), ground.count(200)
    body = truth.requests[0].model_dump_json().encode()
    lines = ("POST /v1/retrieve HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}")
    whole = "\r\n".join([*lines, "", ""]).encode() + body
    with ground.server("slow") as server, ExitStack() as stack:
        address = urlsplit(server.addresses.http)
        sockets = []
        for number in range(n_slow):
            connection = stack.enter_context(socket.create_connection((address.hostname, address.port), timeout=5))
            connection.sendall(whole if number % 2 else whole[:20])
            sockets.append(connection)
        with asking(truth, lambda: Client(server.addresses.http)) as tally:
            ends, at = time.monotonic() + ground.seconds(30), 20
            while time.monotonic() < ends:
                for connection in sockets[::2]:
                    with suppress(OSError):  # the server may have had enough of it
                        connection.sendall(whole[at : at + 1])
                at = min(at + 1, len(whole) - 2)
                time.sleep(0.2)
    return Verdict({"slow": n_slow}, tally)


def _slow_grpc(ground: Ground) -> Verdict:
    """Strangers whose messages of 4 MiB never end; were they kept, half a gigabyte would be held at the least."""
    truth, url, problems = Truth.of(ground.bundle), _new_store(ground.folder / "slow.db"), []
    with closing(SqlStore.open(url)) as store:
        _, key = store.create_key("somebody", [Scope.RETRIEVE])
    with (
        ground.server("slow-grpc", "--admin-store", url, "--auth", admin=True) as server,
        ExitStack() as stack,
        asking(truth, lambda: Client(server.addresses.grpc, api_key=key)) as tally,
    ):
        address = urlsplit(server.addresses.grpc).netloc
        time.sleep(1.0)
        before = most = server.resident_mib()
        strangers = [stack.enter_context(_Unfinished(address)) for _ in range(ground.count(20))]
        ends = time.monotonic() + ground.seconds(30)
        while time.monotonic() < ends:
            for stranger in strangers:
                stranger.go_on()
            most = max(most, server.resident_mib())
    grown, begun = most - before, sum(stranger.begun for stranger in strangers)
    if grown > _HELD_MIB:
        problems.append(f"unfinished messages of strangers took {grown:.0f} MiB")
    return Verdict({"unfinished_messages": begun, "grown_mib": grown}, tally, problems)


class _Unfinished:
    """One gRPC connection with as many calls as it may have, all but the last byte of each sent. A context manager.

    HTTP/2 by hand, because no library leaves a message unfinished.
    """

    _DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
    _STREAMS, _INITIAL_WINDOW, _FRAME, _ACKNOWLEDGED, _END_OF_HEADERS = 64, 65_535, 16_384, 1, 4
    _FIELDS: ClassVar = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/genretrieval.v1.RetrievalService/Retrieve",
        ":authority": "x",
        "te": "trailers",
        "content-type": "application/grpc",
    }

    def __init__(self, address: str) -> None:
        self.begun = 0
        host, _, port = address.rpartition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=5)
        self._received, self._closed = b"", False
        # What the server takes now: in all, on a stream that begins, on each that is open; and what each has left.
        self._window, self._initial = self._INITIAL_WINDOW, self._INITIAL_WINDOW
        self._windows: dict[int, int] = {}
        self._left: dict[int, int] = {}
        self._send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + self._frame(self._SETTINGS, 0, 0, b""))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def go_on(self) -> None:
        """Begin calls in place of those that ended, send what may be sent, and take in what the server says."""
        head = b"".join(
            b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
            for name, value in self._FIELDS.items()
        )
        while len(self._left) < self._STREAMS and not self._closed:
            stream = 2 * self.begun + 1
            self.begun += 1
            self._send(self._frame(self._HEADERS, self._END_OF_HEADERS, stream, head))
            self._windows[stream], self._left[stream] = self._initial, 5 + MAX_BODY_BYTES - 1
        for stream in self._left:
            while size := min(self._left[stream], self._window, self._windows[stream], self._FRAME):
                if size < 0 or self._closed:  # a server may take back what it allowed
                    break
                first = self._left[stream] == 5 + MAX_BODY_BYTES - 1
                begins = struct.pack(">BI", 0, MAX_BODY_BYTES) if first else b""
                self._send(self._frame(self._DATA, 0, stream, begins.ljust(size, b"\0")[:size]))
                self._left[stream] -= size
                self._windows[stream] -= size
                self._window -= size
        self._take_in()

    @staticmethod
    def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload

    def _send(self, content: bytes) -> None:
        try:
            self._socket.sendall(content)
        except OSError:  # the server has had enough of it
            self._closed = True

    def _take_in(self) -> None:
        self._socket.settimeout(0.01)
        with suppress(OSError):
            self._received += self._socket.recv(1 << 20)
        self._socket.settimeout(5)
        while len(self._received) >= 9:
            size = 9 + int.from_bytes(self._received[:3], "big")
            if len(self._received) < size:
                return
            kind, flags, stream = self._received[3], self._received[4], int.from_bytes(self._received[5:9], "big")
            payload, self._received = self._received[9:size], self._received[size:]
            self._heard(kind, flags, stream, payload)

    def _heard(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == self._WINDOW and stream == 0:
            self._window += int.from_bytes(payload, "big")
        elif kind == self._WINDOW and stream in self._windows:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == self._RESET:
            self._left.pop(stream, None)
            self._windows.pop(stream, None)
        elif kind in (self._SETTINGS, self._PING) and not flags & self._ACKNOWLEDGED:
            for name, value in struct.iter_unpack(">HI", payload) if kind == self._SETTINGS else ():
                if name == 4:  # the window that streams begin with
                    self._windows = {each: left + value - self._initial for each, left in self._windows.items()}
                    self._initial = value
            self._send(self._frame(kind, self._ACKNOWLEDGED, 0, payload if kind == self._PING else b""))


def malformed_requests(ground: Ground) -> Verdict:
    """Thousands of broken messages, by REST and gRPC; each is refused as its caller's fault, and no other suffers."""
    rng, truth, number = random.Random(ground.seed), Truth.of(ground.bundle), ground.count(10_000)
    with ground.server("malformed") as server:
        before = server.resident_mib()
        with asking(truth, lambda: Client(server.addresses.grpc), callers=1) as tally:
            statuses = _send_json(server.addresses.http, [_mutated_json(rng, truth) for _ in range(number // 2)])
            codes = _send_proto(server.addresses.grpc, [_mutated_proto(rng, truth) for _ in range(number // 2)])
        grown = server.resident_mib() - before
    at_fault = {f"HTTP {status}": n for status, n in statuses.items() if status >= 500}
    at_fault |= {f"gRPC {code}": n for code, n in codes.items() if code in _SERVER_FAULTS}
    refused = sum(n for status, n in statuses.items() if status >= 400) + codes.total() - codes["OK"]
    done = {"sent": statuses.total() + codes.total(), "refused": refused, "grown_mib": grown}
    return Verdict(done, tally, [f"{n} malformed requests ended with {what}" for what, n in at_fault.items()])


def _mutated_json(rng: random.Random, truth: Truth) -> bytes:
    """A request in JSON with something wrong with it, mostly."""
    fields = rng.choice(truth.requests).model_dump(mode="json")
    odd: list[object] = [
        None,
        -1,
        10**30,
        float("inf"),
        "x" * 5000,
        [],
        {},
        [[]] * 50,
        True,
        "\ud800",
        {"a": {"b": {"c": None}}},
    ]
    match rng.randrange(4):
        case 0:
            fields[rng.choice([*fields, "unknown", ""])] = rng.choice(odd)
        case 1:
            fields["history"] = [{"item_id": rng.choice(odd), "event": rng.choice(odd), "timestamp": rng.choice(odd)}]
        case 2:
            return b"[" * rng.randrange(1, 5000)
    return _mutated(rng, json.dumps(fields).encode())


def _mutated_proto(rng: random.Random, truth: Truth) -> bytes:
    """A request as protobuf with some bytes changed, left out or put in."""
    content: bytes = wire.request_to_proto(rng.choice(truth.requests)).SerializeToString()
    return _mutated(rng, content)


def _mutated(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(changed) + 1)
        match rng.randrange(3):
            case 0:
                changed[at : at + 1] = rng.randbytes(1)
            case 1:
                del changed[at : at + rng.randrange(20)]
            case 2:
                changed[at:at] = rng.randbytes(rng.randrange(20))
    return bytes(changed)


def _send_json(url: str, bodies: Sequence[bytes]) -> Counter[int]:
    with httpx.Client(base_url=url, headers={"Content-Type": "application/json"}, timeout=30) as client:
        return Counter(client.post("/v1/retrieve", content=body).status_code for body in bodies)


def _send_proto(url: str, messages: Sequence[bytes]) -> Counter[str]:
    codes: Counter[str] = Counter()
    with grpc.insecure_channel(urlsplit(url).netloc) as channel:
        # Without a serialiser, bytes go as they are.
        call = channel.unary_unary("/genretrieval.v1.RetrievalService/Retrieve")
        for message in messages:
            try:
                call(message, timeout=30)
                codes["OK"] += 1
            except grpc.RpcError as error:
                codes[error.code().name] += 1
    return codes


def _new_store(file: Path) -> str:
    """URL of a SQLite store that does not exist yet."""
    for old in file.parent.glob(f"{file.name}*"):
        old.unlink()
    return f"sqlite:///{file.resolve()}"
