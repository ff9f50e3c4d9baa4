"""Processes to break: PostgreSQL and Redis of our own, and servers that may be killed and started again."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from genretrieval_serving.live_server import Addresses, read_addresses

PATIENCE_S = 60.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


class KillableServer:
    """`genretrieval serve` on ports of its own, which it keeps when it is started again. A context manager."""

    def __init__(
        self,
        command: Sequence[str],
        options: Sequence[str],
        log: Path,
        *,
        admin: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """A server that does not run yet.

        Args:
            command: how to call the command line.
            options: of `genretrieval serve`, without ports.
            log: where its log goes; of each start anew.
            admin: whether it has an admin port.
            environment: variables beside those of this process.
        """
        ports = ["--http-port", str(free_port()), "--grpc-port", str(free_port())]
        ports += ["--admin-port", str(free_port())] if admin else []
        self._arguments = [*command, "serve", *options, *ports]
        self._log = log
        self._environment = {**os.environ, **(environment or {})}
        self.addresses: Addresses
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The process, running or not."""
        assert self._process is not None
        return self._process

    def start(self) -> None:
        """Start it; returns when it is ready.

        Raises:
            UnavailableError: it ended before that.
        """
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(self._arguments, stdout=output, env=self._environment)  # noqa: S603
        self.addresses = read_addresses(self._process, self._log)

    def kill(self) -> None:
        """SIGKILL: nothing of what it was doing is finished."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def terminate(self) -> int:
        """SIGTERM, and wait until it has drained; its exit code."""
        self.process.terminate()
        return self.process.wait()

    def resident_mib(self) -> float:
        """Memory that it holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        kib = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(kib.split()[1]) / 1024


class RedisServer:
    """A Redis of our own on a free port. A context manager."""

    def __init__(self) -> None:
        self._port = free_port()
        self._folder = Path(tempfile.mkdtemp(prefix="genretrieval-redis-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"redis://127.0.0.1:{self._port}/0"

    @staticmethod
    def installed() -> bool:
        """Whether there is a ``redis-server``."""
        return shutil.which("redis-server") is not None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, empty; returns when it answers."""
        options = ["--port", str(self._port), "--bind", "127.0.0.1", "--save", "", "--dir", str(self._folder)]
        self._process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)  # noqa: S603, S607
        deadline = time.monotonic() + PATIENCE_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port), timeout=1):
                return
            assert time.monotonic() < deadline, "redis-server does not answer"
            time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL; what it kept is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class PostgresCluster:
    """A PostgreSQL of our own on a free port, which may be crashed. A context manager: it stops and goes at the end."""

    def __init__(self, binaries: Path) -> None:
        self._binaries = binaries
        # Not below a folder of the caller: PostgreSQL refuses to run as root, and others may not enter there.
        self._folder = Path(tempfile.mkdtemp(prefix="genretrieval-postgres-"))
        self._as: dict[str, Any] = {"cwd": self._folder}
        if os.geteuid() == 0:
            shutil.chown(self._folder, "postgres", "postgres")
            self._as |= {"user": "postgres", "group": "postgres", "extra_groups": []}
        self._port = free_port()
        self._log: IO[bytes] = (self._folder / "log").open("ab")
        self._server: subprocess.Popen[bytes] | None = None
        self._databases = 0

    @staticmethod
    def binaries() -> Path | None:
        """Where PostgreSQL is installed: the newest of Debian's places, else on the path."""
        folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: p.parent.name.zfill(4))
        on_path = shutil.which("initdb")
        folders = [f for f in folders if (f / "initdb").exists()] or ([Path(on_path).parent] if on_path else [])
        return folders[-1] if folders else None

    def __enter__(self) -> PostgresCluster:
        try:
            self._run("initdb", "--pgdata=data", "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None and self._server.poll() is None:
            self._server.send_signal(signal.SIGQUIT)  # "immediate": nobody needs what it would write yet
            self._server.wait(PATIENCE_S)
        self._log.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def database(self) -> str:
        """URL of a new database."""
        self._databases += 1
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres", f"faults{self._databases}")
        return f"postgresql://postgres@127.0.0.1:{self._port}/faults{self._databases}"

    def stop(self) -> None:
        """SIGKILL all of it; `start` brings it back."""
        assert self._server is not None
        children = self._children()
        # The first goes first, or it would begin to recover.
        self._server.kill()
        for child in children:
            self._kill(child)
        self._server.wait()

    def crash(self, rng: random.Random) -> None:
        """SIGKILL one of its processes, upon which it ends all sessions and recovers; or all of them, and start it."""
        assert self._server is not None
        children = self._children()
        if rng.random() < 0.5 and children:
            self._kill(rng.choice(children))
            return
        self.stop()
        self.start()

    def _children(self) -> list[int]:
        assert self._server is not None
        listed = subprocess.run(  # noqa: S603
            ["ps", "-o", "pid=", "--ppid", str(self._server.pid)],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
        return [int(pid) for pid in listed.stdout.split()]

    @staticmethod
    def _kill(pid: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def start(self) -> None:
        """Start it; returns when it takes connections."""
        deadline = time.monotonic() + PATIENCE_S
        # Waiting for the disk shows nothing where only processes die, and after a crash it would be waited for file by
        # file.
        settings = ["-D", "data", "-p", str(self._port), "-h", "127.0.0.1", "-k", ""]
        settings += ["-c", "max_connections=300", "-c", "fsync=off"]
        while True:
            self._server = subprocess.Popen(  # noqa: S603
                [self._binaries / "postgres", *settings], stdout=self._log, stderr=self._log, **self._as
            )
            while self._server.poll() is None:
                if self._is_ready():
                    return
                assert time.monotonic() < deadline, (self._folder / "log").read_text()
                time.sleep(0.05)
            # It refuses while a process of the one before it is not quite dead.
            assert time.monotonic() < deadline, (self._folder / "log").read_text()
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        arguments = ["-q", "-h", "127.0.0.1", "-p", str(self._port), "-U", "postgres"]
        done = subprocess.run([self._binaries / "pg_isready", *arguments], check=False)  # noqa: S603
        return done.returncode == 0

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(  # noqa: S603
            [self._binaries / program, *arguments], capture_output=True, text=True, check=False, **self._as
        )
        assert done.returncode == 0, done.stderr
