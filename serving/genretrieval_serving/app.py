"""The server as one process: one event loop, REST and gRPC, probes from the first moment, a clean end."""

from __future__ import annotations

import asyncio
import gc
import math
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import structlog
import uvicorn
from fastapi import FastAPI

from genretrieval.errors import InvalidInputError
from genretrieval.masks import MASK_ROWS
from genretrieval.retrieval import Retriever
from genretrieval_serving import grpc_server, rest
from genretrieval_serving.admin import api
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.live import Live
from genretrieval_serving.admin.replica import Replica
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.tokens import JwtSettings, Tokens
from genretrieval_serving.backend import Device
from genretrieval_serving.batcher import Batcher
from genretrieval_serving.bundle_folder import BundleFolder, open_retriever
from genretrieval_serving.catalogue_feed import CatalogueFeed
from genretrieval_serving.daemon_thread import DaemonThread
from genretrieval_serving.deployment import Arm, Deployment, preferred_levels, reserved_slots
from genretrieval_serving.history import Histories, open_histories
from genretrieval_serving.http_protocol import BoundedHttp
from genretrieval_serving.observability import Metrics, configure_logging
from genretrieval_serving.rate_limit import RateLimiter
from genretrieval_serving.rollout import Followed, Rollout
from genretrieval_serving.served_log import LogSettings, ServedLog
from genretrieval_serving.service import RetrievalService, State
from genretrieval_serving.tls import Certificates, TlsSettings
from genretrieval_serving.tracing import Tracer
from genretrieval_serving.web import is_loopback

log = structlog.get_logger(__name__)

# Longer than nginx and the balancers of clouds keep a connection that is idle, most of them 60 seconds: whoever closes
# first, a request that was just sent on it is lost to the other.
KEEP_ALIVE_SECONDS = 75
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Settings:
    """How to serve.

    Attributes:
        host: address to listen on.
        http_port: port of REST, probes and metrics; 0 takes a free one.
        grpc_port: port of gRPC; 0 takes a free one.
        max_wait: seconds that a request may wait, see `Batcher`; one that would wait longer is refused at once.
        max_batch: most rows that the graph runs at once, see `Batcher`.
        rate_limit: of each caller, see `RateLimiter`; None for none.
        drain_delay: seconds between a failing /readyz and closed ports, for load balancers to notice.
        drain_seconds: most seconds to finish requests after that.
        quiet: no log line for every request.
        insecure: allow a `host` that others can reach, although retrieval needs no API key.
        auth: calls need an API key.
        admin_port: port of the admin API; 0 takes a free one, None is without it.
        listen: URL of the PostgreSQL database whose notifications say that admin state has changed; without, it is
            found by asking four times a second.
        allow_unbound: serve also where bindings or rules cannot hold on the bundle, and leave those out.
        tls: certificate of all ports but the one for probes; None is without TLS.
        jwt: tokens that are taken beside API keys; with it calls need one or the other.
        probe_port: port of probes and metrics alone, in plain HTTP; 0 takes a free one. None has them on `http_port`.
        trace_endpoint: of an OpenTelemetry collector, see `Tracer`; None makes no traces.
        histories: where histories of users are, see `open_histories`; None knows those of requests alone.
        served_log: logs answers and events; None keeps none.
        catalogue_changes: folder of changes of the catalogue that is followed, see `CatalogueFeed`; None for none.

    Raises:
        InvalidInputError: the settings contradict each other, or expose the server to whoever can reach it.
    """

    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    max_wait: float = 0.25
    max_batch: int = 8
    drain_delay: float = 0.0
    drain_seconds: float = 20.0
    quiet: bool = False
    insecure: bool = False
    auth: bool = False
    admin_port: int | None = None
    listen: str | None = None
    allow_unbound: bool = False
    tls: TlsSettings | None = None
    jwt: JwtSettings | None = None
    probe_port: int | None = None
    trace_endpoint: str | None = None
    histories: str | None = field(default=None, repr=False)  # a URL may have a password
    served_log: LogSettings | None = None
    catalogue_changes: Path | None = None
    rate_limit: str | None = None

    def __post_init__(self) -> None:
        """Refuse rather than adjust."""
        if self.auth and self.admin_port is None and self.jwt is None:
            raise InvalidInputError("auth needs an admin store, which keeps the API keys; give one")
        exposed = not (self.auth or self.jwt) and not is_loopback(self.host)
        if exposed and self.admin_port is not None:
            raise InvalidInputError(
                f"host {self.host!r} can be reached from other machines and calls need no API key: anyone could change "
                "what is retrieved. Make a key with `genretrieval keys create`, or require one with `auth`; `insecure` "
                "does not allow this"
            )
        only_known_clients = self.tls is not None and self.tls.client_ca is not None
        if exposed and not only_known_clients and not self.insecure:
            raise InvalidInputError(
                f"host {self.host!r} can be reached from other machines and there is no authentication: "
                "anyone could read the catalogue. Give an admin store and require API keys with `auth`, serve on "
                "127.0.0.1 behind a proxy that authenticates, or allow it with `insecure`"
            )
        if not 1 <= self.max_batch <= MASK_ROWS - 1:
            raise InvalidInputError(
                f"max_batch is {self.max_batch}; it must lie between 1 and {MASK_ROWS - 1}, the filters that one batch "
                "may carry"
            )
        if not 0 <= self.max_wait < math.inf:
            raise InvalidInputError(f"max_wait is {self.max_wait:g}; it is a number of seconds, not negative")
        if self.drain_delay < 0 or self.drain_seconds < 0:
            raise InvalidInputError("drain_delay and drain_seconds must not be negative")


class _Uvicorn(uvicorn.Server):
    """Uvicorn that leaves signals to `run`, which has to drain more than HTTP."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        return nullcontext()


class _Http:
    """One port of HTTP."""

    def __init__(self, app: FastAPI, port: int, drain_seconds: float, certificates: Certificates | None = None) -> None:
        self.app, self.url = app, ""
        self._port, self._scheme = port, "http" if certificates is None else "https"
        self._server = _Uvicorn(
            uvicorn.Config(
                app,
                http=BoundedHttp,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # nothing asks for the address of a caller
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=max(1, round(drain_seconds)),
                ssl_context_factory=None if certificates is None else lambda *_: certificates.ssl_context(),
            )
        )
        self._socket: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None

    def open(self, host: str) -> None:
        """Take the port; `url` is where it answers once it is served."""
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            self._socket = socket.create_server((host, self._port), family=family, backlog=2048)
        except OSError as error:
            raise _cannot_listen(host, self._port, error) from error
        self.url = f"{self._scheme}://{_bracketed(host)}:{self._socket.getsockname()[1]}"

    def close(self) -> None:
        """Give the port back, unserved."""
        if self._socket is not None:
            self._socket.close()

    def serve(self) -> None:
        """Answer."""
        assert self._socket is not None
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="http")

    def begin_to_stop(self) -> None:
        """Take no more connections."""
        self._server.should_exit = True

    async def stop(self) -> None:
        """End when all calls are answered."""
        if self._task is not None:
            await self._task


class Server:
    """A server in the running event loop: `start`, then `stop`."""

    def __init__(
        self, model: Callable[[], Retriever] | Followed, settings: Settings, store: SqlStore | None = None
    ) -> None:
        """A server that is not listening yet.

        Args:
            model: loads the model; called once, in a thread, when probes already answer. Or the alias that says which,
                now and later; it needs a store.
            settings: how to serve.
            store: admin state and API keys, where `settings` have an admin port.
        """
        self.settings = settings
        self._model, self._store = model, store
        self._live = Live()
        self._replica: Replica | None = None
        self._rollout: Rollout | None = None
        self._watching: asyncio.Task[None] | None = None
        metrics = Metrics()
        histories = None if settings.histories is None else Histories(open_histories(settings.histories), metrics)
        served_log = None if settings.served_log is None else ServedLog(settings.served_log, metrics)
        rate_limiter = None if settings.rate_limit is None else RateLimiter(settings.rate_limit)
        self.service = RetrievalService(metrics, histories, served_log, rate_limiter)
        self._batcher = Batcher(metrics, max_wait=settings.max_wait, max_batch=settings.max_batch)
        changes = settings.catalogue_changes
        self._feed = None if changes is None else CatalogueFeed(changes, metrics)
        tokens = None if settings.jwt is None else Tokens(settings.jwt)
        self.auth = Authenticator(store, tokens=tokens, always=settings.auth)
        tracer = self._tracer = None if settings.trace_endpoint is None else Tracer(settings.trace_endpoint)
        quiet = settings.quiet
        self._grpc, self._health = grpc_server.create_server(self.service, self.auth, quiet=quiet, tracer=tracer)
        self._certificates = None if settings.tls is None else Certificates(settings.tls, metrics)
        probes_here = settings.probe_port is None
        app = rest.create_app(self.service, self.auth, quiet=quiet, probes_here=probes_here, tracer=tracer)
        self._http = {"http": _Http(app, settings.http_port, settings.drain_seconds, self._certificates)}
        if store is not None and settings.admin_port is not None:
            app = api.create_app(
                store, self._live, self.auth, self.service.metrics, feed=self._feed, quiet=quiet, tracer=tracer
            )
            self._http["admin"] = _Http(app, settings.admin_port, settings.drain_seconds, self._certificates)
        if settings.probe_port is not None:
            # Plain, because what asks for probes shows no certificate.
            app = rest.create_probes(self.service)
            self._http["probes"] = _Http(app, settings.probe_port, settings.drain_seconds)
        self.grpc_url = ""

    @property
    def http_url(self) -> str:
        """Where REST is."""
        return self._http["http"].url

    @property
    def admin_url(self) -> str:
        """Where the admin API is; empty without."""
        return self._http["admin"].url if "admin" in self._http else ""

    @property
    def probes_url(self) -> str:
        """Where probes and metrics are."""
        return self._http["probes" if "probes" in self._http else "http"].url

    async def listen(self) -> None:
        """Open the ports; probes answer, requests are refused as unavailable.

        Raises:
            InvalidInputError: a port is taken, or the host is not an address of this machine.
        """
        host, address = self.settings.host, f"{_bracketed(self.settings.host)}:{self.settings.grpc_port}"
        try:
            for http in self._http.values():
                http.open(host)
            if self._certificates is None:
                port = self._grpc.add_insecure_port(address)
            else:
                port = self._grpc.add_secure_port(address, self._certificates.grpc_credentials())
        except (InvalidInputError, RuntimeError) as error:
            for http in self._http.values():
                http.close()
            if isinstance(error, InvalidInputError):
                raise
            raise _cannot_listen(host, self.settings.grpc_port, error) from error
        self.grpc_url = f"{'grpc' if self._certificates is None else 'grpcs'}://{_bracketed(host)}:{port}"
        if self._certificates is None and self.auth.required and not is_loopback(host):
            # Usual behind a mesh or a proxy; anywhere else they can be read on their way.
            log.warning("keys_travel_in_the_clear", host=host, remedy="--tls-cert and --tls-key, or TLS in front")
        await self._health.set(serving=False)
        await self._grpc.start()
        for http in self._http.values():
            http.serve()

    async def load(self) -> None:
        """Load and warm the model, then become ready."""
        await self.auth.prepare()
        if self._store is not None:
            self._replica = Replica(self._store, self.service.metrics, listen=self.settings.listen)
            await self._replica.start()
        thread = DaemonThread("loading")
        try:
            deployment = await asyncio.get_running_loop().run_in_executor(thread, self._deploy)
        finally:
            thread.shutdown()
        await self._batcher.warm_up(deployment.primary.retriever)
        await self._batcher.start()
        if self._feed is not None:
            self._feed.follow(deployment)
        if self._replica is not None:
            self._live.open(self._batcher, deployment, self._replica, self._rollout)
        self.service.open(self._batcher, deployment)
        await self._health.set(serving=True)
        self._watching = asyncio.create_task(self._watch_graph(), name="watch")
        addresses = {name: http.url for name, http in self._http.items()} | {"grpc": self.grpc_url}
        version = deployment.primary.manifest.version
        log.info("ready", **addresses, bundle_version=version, auth=self.auth.required)
        if self._rollout is not None:
            self._rollout.start()

    async def _watch_graph(self) -> None:
        """Take a server whose graph is stuck out of rotation, and let those go who wait; /livez has it restarted."""
        alive = True
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            before, alive = alive, self._batcher.alive
            if not alive:
                self._batcher.give_up()
            if alive != before:
                log.error("graph_goes_on" if alive else "graph_stuck")
                await self._health.set(serving=alive)

    def _deploy(self) -> Deployment:
        """Take over what is bound, then tell the store which slots the bundle has.

        In this order, so that a server that is refused leaves the slots as those that run have them.
        """
        if isinstance(self._model, Followed):
            assert self._store is not None
            assert self._replica is not None
            self._rollout = Rollout(self._model, self._replica, self._store, self.service.metrics, self._feed)
            return self._rollout.begin()
        retriever = self._model()
        if self._feed is not None:
            retriever = self._feed.current(retriever)
        arm = Arm("primary", retriever, self._replica, allow_unbound=self.settings.allow_unbound)
        if self._store is not None:
            self._store.sync_slots(reserved_slots(arm.manifest), preferred_levels(retriever))
        return Deployment(arm)

    async def stop(self) -> None:
        """Stop being ready, stop listening, finish what was accepted."""
        loaded = self.service.state is State.READY
        self.service.state = State.DRAINING
        if self._watching is not None:
            self._watching.cancel()
        await self._health.drain()
        log.info("draining", drain_delay=self.settings.drain_delay, drain_seconds=self.settings.drain_seconds)
        if loaded:
            await asyncio.sleep(self.settings.drain_delay)
        for http in self._http.values():
            http.begin_to_stop()
        loop = asyncio.get_running_loop()
        latest = loop.time() + self.settings.drain_seconds
        self._health.end()
        await self._grpc.stop(self.settings.drain_seconds)
        for http in self._http.values():
            await http.stop()
        if loaded:
            await self._batcher.stop(max(0.0, latest - loop.time()))
        # A drain that took all of its time is no reason to lose what a disk takes in no time.
        await self.service.close(max(1.0, latest - loop.time()))
        if self._feed is not None:
            await asyncio.to_thread(self._feed.stop, max(0.0, latest - loop.time()))
        if self._rollout is not None:
            await asyncio.to_thread(self._rollout.stop, max(0.0, latest - loop.time()))
        if self._replica is not None:
            await self._replica.stop()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        log.info("stopped")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _cannot_listen(host: str, port: int, error: Exception) -> InvalidInputError:
    return InvalidInputError(f"cannot listen on {host} port {port}: {error}. Choose another port; 0 takes a free one")


async def run(server: Server) -> None:
    """Serve until SIGTERM or SIGINT."""
    asked_to_stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_ in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_, asked_to_stop.set)
    # What was imported stays. Looking for garbage in it takes a tenth of a second, for which every request would wait.
    gc.collect()
    gc.freeze()
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
    bundle: Path | None,
    host: str = "127.0.0.1",
    http_port: int = 8080,
    grpc_port: int = 8081,
    *,
    bundles: Path | None = None,
    alias: str | None = None,
    threads: int | None = None,
    device: Device = "cpu",
    max_wait: float = 0.25,
    max_batch: int = 8,
    drain_delay: float = 0.0,
    drain_seconds: float = 20.0,
    log_level: str = "info",
    quiet: bool = False,
    insecure: bool = False,
    auth: bool = False,
    admin_port: int = 8082,
    admin_store: str | None = None,
    notify: bool = True,
    slot_quarantine: float = 3600.0,
    allow_unbound: bool = False,
    tls: TlsSettings | None = None,
    jwt: JwtSettings | None = None,
    probe_port: int | None = None,
    trace_endpoint: str | None = None,
    histories: str | None = None,
    served_log: LogSettings | None = None,
    catalogue_changes: Path | None = None,
    rate_limit: str | None = None,
) -> None:
    """Serve a bundle until SIGTERM or SIGINT; returns when all accepted requests are answered.

    Args:
        bundle: folder of the bundle; None where an alias says which.
        host: see `Settings`, as for all that is not described here.
        http_port: 0 takes a free port; the log line ``ready`` says which.
        grpc_port: as `http_port`.
        bundles: folder of the folders of bundles.
        alias: resource of the admin state that says which of them is served; another one takes over while it runs.
        threads: threads of the graph; by default the CPUs this process may use.
        device: ``cpu`` or ``cuda``.
        max_wait: seconds that a request may wait.
        max_batch: most rows of one batch.
        drain_delay: seconds between a failing /readyz and closed ports.
        drain_seconds: most seconds to finish requests.
        log_level: ``debug``, ``info``, ``warning`` or ``error``.
        quiet: no log line for every request.
        insecure: allow a host that others can reach.
        auth: require API keys also while the store has none; with one it has had, they are required anyway.
        admin_port: as `http_port`; not opened without `admin_store`.
        admin_store: where admin state and API keys are kept, see `SqlStore.open`; by default there is no admin API.
        notify: let PostgreSQL tell servers of changes, which they find a little later without.
        slot_quarantine: seconds that a slot rests between two keywords, not negative.
        allow_unbound: leave out bindings and rules that cannot hold on the bundle, instead of refusing to serve it.
        tls: see `Settings`.
        jwt: see `Settings`.
        probe_port: as `http_port`; not opened by default.
        trace_endpoint: see `Settings`.
        histories: see `Settings`.
        served_log: see `Settings`.
        catalogue_changes: see `Settings`.
        rate_limit: see `Settings`.

    Raises:
        BundleError: the bundle cannot be served.
        InvalidInputError: a setting is wrong or a port is taken.
        UnavailableError: the admin store cannot be reached.
    """

    def settings(*, admin: bool, keys: bool) -> Settings:
        hears = admin_store if admin_store and notify and admin_store.startswith("postgresql") else None
        return Settings(
            host,
            http_port,
            grpc_port,
            max_wait,
            max_batch,
            drain_delay,
            drain_seconds,
            quiet,
            insecure,
            auth=keys,
            admin_port=admin_port if admin else None,
            listen=hears,
            allow_unbound=allow_unbound,
            tls=tls,
            jwt=jwt,
            probe_port=probe_port,
            trace_endpoint=trace_endpoint,
            histories=histories,
            served_log=served_log,
            catalogue_changes=catalogue_changes,
            rate_limit=rate_limit,
        )

    def opener(path: Path) -> Retriever:
        return open_retriever(path, threads, device)

    if bundle is not None and (bundles, alias) == (None, None):
        model: Callable[[], Retriever] | Followed = partial(opener, bundle)
    elif bundle is None and bundles is not None and alias is not None and admin_store is not None:
        model = Followed(BundleFolder(bundles, opener, max_batch), alias)
    else:
        raise InvalidInputError(
            "say what to serve: --bundle FOLDER, or --bundles FOLDER with the --alias that says which of them, and the "
            "--admin-store that knows the alias"
        )
    configure_logging(log_level)
    if admin_store is None:
        chosen = settings(admin=False, keys=auth)
        run_forever(lambda: Server(model, chosen))
        return
    if slot_quarantine < 0:
        raise InvalidInputError(f"slot_quarantine is {slot_quarantine:g} seconds; give 0 or more")
    quarantine = timedelta(seconds=slot_quarantine)
    with closing(SqlStore.open(admin_store, quarantine=quarantine, notify=notify)) as store:
        chosen = settings(admin=True, keys=auth or bool(store.list_keys()))
        run_forever(lambda: Server(model, chosen, store))
