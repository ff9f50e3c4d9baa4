"""The server as one process: one event loop, REST and gRPC, probes from the first moment, a clean end."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvicorn

from genretrieval.bundle import GRAPH, load_bundle
from genretrieval.errors import InvalidInputError
from genretrieval.retrieval import MASK_ROWS, Retriever
from genretrieval_serving import grpc_server, rest
from genretrieval_serving.engine import Device, Engine, OnnxBackend
from genretrieval_serving.observability import Metrics, configure_logging
from genretrieval_serving.service import RetrievalService, State

log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host: address to listen on.
        http_port: port of REST, probes and metrics; 0 takes a free one.
        grpc_port: port of gRPC; 0 takes a free one.
        max_queue: requests that may wait; one more is rejected.
        max_batch: most requests the graph runs at once, and most of one batch request.
        drain_delay: seconds between a failing /readyz and closed ports, for load balancers to notice.
        drain_seconds: most seconds to finish requests after that.
        quiet: no log line for every request.
        insecure: allow a `host` that others can reach, although there is no authentication.

    Raises:
        InvalidInputError: the settings contradict each other, or expose the server without `insecure`.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    max_queue: int = 256
    max_batch: int = 32
    drain_delay: float = 0.0
    drain_seconds: float = 20.0
    quiet: bool = False
    insecure: bool = False

    def __post_init__(self) -> None:
        """Refuse rather than adjust."""
        if not self.insecure and not _is_loopback(self.host):
            raise InvalidInputError(
                f"host {self.host!r} can be reached from other machines and there is no authentication yet: "
                "anyone could read the catalogue. Serve on 127.0.0.1 behind a proxy that authenticates, or "
                "allow it with `insecure`"
            )
        if not 1 <= self.max_batch <= min(self.max_queue, MASK_ROWS - 1):
            raise InvalidInputError(
                f"max_batch is {self.max_batch}; it must lie between 1 and max_queue ({self.max_queue}), "
                f"and be at most {MASK_ROWS - 1}, the filters that one batch may carry"
            )
        if self.drain_delay < 0 or self.drain_seconds < 0:
            raise InvalidInputError("drain_delay and drain_seconds must not be negative")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Uvicorn(uvicorn.Server):
    """Uvicorn that leaves signals to `run`, which has to drain more than HTTP."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


class Server:
    """A server in the running event loop: `start`, then `stop`."""

    def __init__(self, open_retriever: Callable[[], Retriever], settings: Settings) -> None:
        """A server that is not listening yet.

        Args:
            open_retriever: loads the model; called once, in a thread, when probes already answer.
            settings: how to serve.
        """
        self.settings = settings
        self._open_retriever = open_retriever
        self.service = RetrievalService(Metrics(), settings.max_batch)
        self._grpc, self._health = grpc_server.create_server(self.service, quiet=settings.quiet)
        app = rest.create_app(self.service, quiet=settings.quiet)
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
        )
        self._http = _Uvicorn(config)
        self._http_task: asyncio.Task[None] | None = None
        self.http_url = ""
        self.grpc_url = ""

    async def listen(self) -> None:
        """Open both ports; probes answer, requests are refused as unavailable.

        Raises:
            InvalidInputError: a port is taken, or the host is not an address of this machine.
        """
        host = self.settings.host
        bracketed = f"[{host}]" if ":" in host else host
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, self.settings.http_port), family=family, backlog=2048)
        except OSError as error:
            raise _cannot_listen(host, self.settings.http_port, error) from error
        self.http_url = f"http://{bracketed}:{sock.getsockname()[1]}"
        try:
            port = self._grpc.add_insecure_port(f"{bracketed}:{self.settings.grpc_port}")
        except RuntimeError as error:
            sock.close()
            raise _cannot_listen(host, self.settings.grpc_port, error) from error
        self.grpc_url = f"grpc://{bracketed}:{port}"
        await grpc_server.set_health(self._health, serving=False)
        await self._grpc.start()
        self._http_task = asyncio.create_task(self._http.serve(sockets=[sock]), name="http")

    async def load(self) -> None:
        """Load and warm the model, then become ready."""
        retriever = await asyncio.to_thread(self._open_retriever)
        engine = Engine(
            retriever,
            self.service.metrics,
            max_queue=self.settings.max_queue,
            max_batch=self.settings.max_batch,
        )
        await engine.start()
        self.service.open(engine)
        await grpc_server.set_health(self._health, serving=True)
        version = retriever.bundle.manifest.version
        log.info("ready", http=self.http_url, grpc=self.grpc_url, bundle_version=version)

    async def stop(self) -> None:
        """Stop being ready, stop listening, finish what was accepted."""
        loaded = self.service.state is State.READY
        self.service.state = State.DRAINING
        await self._health.enter_graceful_shutdown()
        log.info("draining", drain_delay=self.settings.drain_delay, drain_seconds=self.settings.drain_seconds)
        if loaded:
            await asyncio.sleep(self.settings.drain_delay)
        self._http.should_exit = True
        loop = asyncio.get_running_loop()
        latest = loop.time() + self.settings.drain_seconds
        await self._grpc.stop(self.settings.drain_seconds)
        if self._http_task is not None:
            await self._http_task
        if loaded:
            await self.service.engine.stop(max(0.0, latest - loop.time()))
        log.info("stopped")


def _cannot_listen(host: str, port: int, error: Exception) -> InvalidInputError:
    return InvalidInputError(f"cannot listen on {host} port {port}: {error}. Choose another port; 0 takes a free one")


async def run(server: Server) -> None:
    """Serve until SIGTERM or SIGINT."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_, asked_to_stop.set)
    await server.listen()
    try:
        loading = asyncio.create_task(server.load())
        stopping = asyncio.create_task(asked_to_stop.wait())
        await asyncio.wait((loading, stopping), return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            loading.result()
            await stopping
        else:
            loading.cancel()
    finally:
        await server.stop()


def run_forever(server_of: Callable[[], Server]) -> None:
    """Run a server, made inside its event loop, until the process is told to stop."""
    if sys.platform == "win32":
        factory = None
    else:
        import uvloop

        factory = uvloop.new_event_loop

    async def main() -> None:
        await run(server_of())

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())


def serve(
    bundle: Path,
    host: str = "127.0.0.1",
    http_port: int = 8080,
    grpc_port: int = 8081,
    *,
    threads: int | None = None,
    device: Device = "cpu",
    max_queue: int = 256,
    max_batch: int = 32,
    drain_delay: float = 0.0,
    drain_seconds: float = 20.0,
    log_level: str = "info",
    quiet: bool = False,
    insecure: bool = False,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; returns when all accepted requests are answered.

    Args:
        bundle: folder of the bundle.
        host: see `Settings`, as for all that is not described here.
        http_port: 0 takes a free port; the log line ``ready`` says which.
        grpc_port: as `http_port`.
        threads: threads of the graph; by default the CPUs this process may use.
        device: ``cpu`` or ``cuda``.
        max_queue: requests that may wait.
        max_batch: most requests of one batch.
        drain_delay: seconds between a failing /readyz and closed ports.
        drain_seconds: most seconds to finish requests.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        quiet: no log line for every request.
        insecure: allow a host that others can reach.

    Raises:
        BundleError: the bundle cannot be served.
        InvalidInputError: a setting is wrong or a port is taken.
    """
    settings = Settings(host, http_port, grpc_port, max_queue, max_batch, drain_delay, drain_seconds, quiet, insecure)
    configure_logging(log_level)

    def open_retriever() -> Retriever:
        opened = load_bundle(bundle)
        return Retriever(opened, OnnxBackend(opened.path / GRAPH, threads, device))

    run_forever(lambda: Server(open_retriever, settings))
