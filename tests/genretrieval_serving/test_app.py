"""The life of a server: settings, readiness, draining, its end; and what importing it costs."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import anyio.to_thread
import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from genretrieval.bundle import load_bundle
from genretrieval.errors import BundleError, BundleIncompleteError, InvalidInputError, UnavailableError
from genretrieval.retrieval import Retriever
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.tokens import JwtSettings
from genretrieval_serving.app import Server, Settings, run_forever, serve
from genretrieval_serving.client import Client

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING

# `serve` itself, with a graph that says when it is entered and takes its time.
SLOW_SERVER = """
import sys, time
from pathlib import Path
from genretrieval_serving import app, backend, bundle_folder

class Slow(backend.OnnxBackend):
    def run(self, inputs):
        print("entered", file=sys.stderr, flush=True)
        time.sleep(0.4)
        return super().run(inputs)

bundle_folder.OnnxBackend = Slow
app.serve(Path(sys.argv[1]), http_port=0, grpc_port=0, threads=1, drain_delay=float(sys.argv[2]))
"""


def health_of(running: Any) -> int:
    with grpc.insecure_channel(running.grpc_address) as channel:
        question = health_pb2.HealthCheckRequest(service="genretrieval.v1.RetrievalService")
        return int(health_pb2_grpc.HealthStub(channel).Check(question, timeout=10).status)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "no authentication"),
        ({"host": "shop.example"}, "no authentication"),
        ({"host": "0.0.0.0", "admin_port": 0}, "no API key"),
        ({"host": "0.0.0.0", "admin_port": 0, "insecure": True}, "does not allow this"),
        ({"auth": True}, "admin store"),
        ({"max_batch": 0}, "max_batch"),
        ({"max_batch": 33}, "between 1 and 32"),
        ({"max_wait": -0.1}, "max_wait"),
        ({"drain_seconds": -1}, "negative"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        Settings(**settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_needs_no_permission(host) -> None:
    assert Settings(host=host).host == host
    assert Settings(host="0.0.0.0", insecure=True).insecure
    assert Settings(host=host, admin_port=0).admin_port == 0
    assert Settings(host="0.0.0.0", admin_port=0, auth=True).auth


def test_tokens_are_permission(tmp_path) -> None:
    jwt = JwtSettings("issuer", "shop", jwks_file=tmp_path / "jwks.json")
    assert Settings(host="0.0.0.0", admin_port=0, jwt=jwt).jwt
    assert Settings(auth=True, jwt=jwt).auth  # without an admin store


def test_probes_answer_while_the_model_loads(start) -> None:
    with start(load=False) as running, Client(running.http) as client:
        assert httpx.get(f"{running.http}/livez").status_code == 200
        answer = httpx.get(f"{running.http}/readyz")
        assert (answer.status_code, answer.json()) == (503, {"state": "loading"})
        assert health_of(running) == NOT_SERVING
        with pytest.raises(UnavailableError, match="still being loaded"):
            client.retrieve()
        with pytest.raises(UnavailableError, match="still being loaded"):
            client.info()


def test_readiness_goes_first_and_what_was_accepted_is_answered(start, backend) -> None:
    with start(drain_delay=1.0) as running, ThreadPoolExecutor(2) as pool:
        assert httpx.get(f"{running.http}/readyz").status_code == 200
        assert health_of(running) == SERVING
        backend.gate.clear()
        with Client(running.http) as by_rest, Client(running.grpc) as by_grpc:
            accepted = [pool.submit(client.retrieve) for client in (by_rest, by_grpc)]
            assert backend.entered.acquire(timeout=10)
            stopped = running.begin_to_stop()
            while (answer := httpx.get(f"{running.http}/readyz")).status_code == 200:
                time.sleep(0.01)
            assert answer.json() == {"state": "draining"}
            assert httpx.get(f"{running.http}/livez").status_code == 200
            assert health_of(running) == NOT_SERVING
            backend.gate.set()
            assert all(len(future.result(10).items) == 10 for future in accepted)
            stopped.result(20)
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{running.http}/livez")


def test_sigterm_ends_the_process_when_its_requests_are_answered(bundle_path) -> None:
    command = [sys.executable, "-c", SLOW_SERVER, str(bundle_path), "0.3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        ready = json.loads(process.stdout.readline())
        assert ready["event"] == "ready"
        assert [process.stderr.readline() for _ in range(2)] == ["entered\n"] * 2  # the warm-up
        with (
            Client(ready["http"]) as by_rest,
            Client(ready["grpc"]) as by_grpc,
            ThreadPoolExecutor(2) as pool,
        ):
            accepted = [pool.submit(by_rest.retrieve)]
            assert process.stderr.readline() == "entered\n"
            # Waits for the first to end, so it is still in the queue when the signal comes.
            accepted.append(pool.submit(by_grpc.retrieve))
            while "genretrieval_queue_depth 1.0" not in httpx.get(f"{ready['http']}/metrics").text:
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            assert all(len(future.result(20).items) == 10 for future in accepted)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert errors == "entered\n"
    events = [json.loads(line) for line in output.splitlines()]
    assert [event["event"] for event in events if event["event"] != "request"] == ["draining", "stopped"]
    calls = [event for event in events if event["event"] == "request"]
    assert {(call["transport"], call["code"]) for call in calls} == {("rest", 200), ("grpc", "OK")}
    assert all(call["request_id"] for call in calls)


def test_connections_that_are_idle_are_kept_for_proxies_and_do_not_hold_up_the_end(start) -> None:
    with start(drain_seconds=1000) as running, httpx.Client() as by_rest, Client(running.grpc) as by_grpc:
        # nginx and most balancers of clouds reuse a connection that has been idle for up to 60 seconds.
        assert running.server._http["http"]._server.config.timeout_keep_alive > 60
        assert by_rest.get(f"{running.http}/v1/info").is_success
        assert by_grpc.info()
        running.begin_to_stop().result(20)


def test_a_bundle_that_loads_for_long_does_not_hold_up_the_end() -> None:
    go_on, loaded = threading.Event(), threading.Event()

    def open_retriever() -> Retriever:
        os.kill(os.getpid(), signal.SIGTERM)
        go_on.wait(60)
        loaded.set()
        raise BundleError("too late for anybody")

    run_forever(lambda: Server(open_retriever, Settings(http_port=0, grpc_port=0)))
    assert not loaded.is_set()
    go_on.set()
    assert loaded.wait(10)


def test_a_bundle_that_cannot_be_served_ends_serve(tmp_path, backend) -> None:
    def open_retriever() -> Retriever:
        return Retriever(load_bundle(tmp_path), backend)

    with pytest.raises(BundleIncompleteError, match="never finished"):
        run_forever(lambda: Server(open_retriever, Settings(http_port=0, grpc_port=0)))


def test_probes_answer_while_all_threads_wait(start) -> None:
    async def take_all_threads() -> None:
        limiter = anyio.to_thread.current_default_thread_limiter()
        for _ in range(int(limiter.available_tokens)):
            await limiter.acquire_on_behalf_of(object())

    with start() as running:
        asyncio.run_coroutine_threadsafe(take_all_threads(), running.loop).result(10)
        for path in ("livez", "readyz", "v1/info"):
            assert httpx.get(f"{running.http}/{path}", headers={"X-Request-Timeout": "5"}, timeout=5).is_success
        assert httpx.post(f"{running.http}/v1/retrieve", json={"top_k": 1}, timeout=5).is_success


@pytest.mark.parametrize("taken", ["http_port", "grpc_port", "admin_port"])
def test_a_taken_port_is_named(start, taken, tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, closing(SqlStore.open(f"sqlite:///{tmp_path}/db")) as store:
        port = other.getsockname()[1]
        with pytest.raises(InvalidInputError, match=f"port {port}.*another port"), start(store=store, **{taken: port}):
            pass


def test_serve_refuses_other_hosts_before_it_reads_anything(tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="insecure"):
        serve(Path("no-such-bundle"), host="0.0.0.0")
    url = f"sqlite:///{tmp_path}/admin.db"
    with pytest.raises(InvalidInputError, match="keys create"):
        serve(Path("no-such-bundle"), host="0.0.0.0", admin_store=url, insecure=True)
    with closing(SqlStore.open(url)) as store:
        store.create_key("ann", [Scope.ADMIN_WRITE])
    # With a key in its store it may listen, and gets as far as the bundle.
    with pytest.raises(BundleError):
        serve(Path("no-such-bundle"), host="0.0.0.0", http_port=0, grpc_port=0, admin_port=0, admin_store=url)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("app", {"torch", "faiss", "genretrieval_pipelines", "genretrieval_tokenizers", "opentelemetry.sdk"}),
        ("client", {"torch", "fastapi", "onnxruntime", "uvicorn", "structlog", "prometheus_client"}),
    ],
)
def test_importing_loads_only_what_the_extra_installs(module, absent) -> None:
    code = f"import sys, genretrieval_serving.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not absent & set(loaded.stdout.split())
