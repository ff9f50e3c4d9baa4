"""What gRPC does for callers that may mean no good, and for those that stay connected for long."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from genretrieval.errors import UnavailableError
from genretrieval_serving import app, batcher, grpc_server
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.client import Client

RETRIEVE = "/genretrieval.v1.RetrievalService/Retrieve"
REFLECTION = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
# Of its own: by itself gRPC shares a connection between the channels of a process.
ALONE = ("grpc.use_local_subchannel_pool", 1)


@contextmanager
def connected(running: Any, *options: tuple[str, Any]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(running.grpc_address, options=[ALONE, *options]) as channel:
        yield channel


@contextmanager
def silent(channel: grpc.Channel, method: str = RETRIEVE, **arguments: Any) -> Iterator[Any]:
    """A call whose message never comes, which on the wire is one of a message as any other."""
    over = threading.Event()

    def nothing() -> Iterator[bytes]:
        over.wait()
        yield from ()

    call = channel.stream_unary(method).future(nothing(), timeout=30, **arguments)
    try:
        yield call
    finally:
        call.cancel()
        over.set()


def watching(channel: grpc.Channel) -> Any:
    """What health checks are told, as it changes."""
    return channel.unary_stream(
        "/grpc.health.v1.Health/Watch",
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )(health_pb2.HealthCheckRequest(), timeout=60)


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets arguments of gRPC for servers that start later."""

    def limits_(**given: int) -> None:
        names = {name.rpartition(".")[2]: name for name, _ in grpc_server.OPTIONS}
        changed = dict(grpc_server.OPTIONS) | {names[name]: value for name, value in given.items()}
        monkeypatch.setattr(grpc_server, "OPTIONS", tuple(changed.items()))

    return limits_


def test_who_calls_is_known_before_a_message_is_read(start, tmp_path) -> None:
    with (
        closing(SqlStore.open(f"sqlite:///{tmp_path}/admin.db")) as store,
        start(store=store, auth=True) as running,
        connected(running) as channel,
        silent(channel) as call,
    ):
        assert call.exception(20).code() is grpc.StatusCode.UNAUTHENTICATED
        assert dict(call.trailing_metadata())["reason"] == "UNAUTHENTICATED"


def test_a_server_that_cannot_answer_does_not_read(start) -> None:
    with start(load=False) as running, connected(running) as channel, silent(channel) as call:
        assert call.exception(20).code() is grpc.StatusCode.UNAVAILABLE


@pytest.mark.parametrize(
    "method",
    [
        RETRIEVE,
        "/genretrieval.v1.RetrievalService/RecordEvents",
        "/grpc.health.v1.Health/Check",
        "/grpc.health.v1.Health/Watch",
        REFLECTION,
    ],
)
def test_a_message_that_does_not_come_is_not_waited_for(start, monkeypatch, method) -> None:
    monkeypatch.setattr(grpc_server, "RECEIVE_SECONDS", 0.1)
    with start() as running, connected(running) as channel, silent(channel, method) as call:
        assert call.exception(20).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not there within 0.1 seconds" in call.details()


def test_an_answer_may_take_longer_than_a_message(start, backend, monkeypatch) -> None:
    monkeypatch.setattr(grpc_server, "RECEIVE_SECONDS", 0.5)
    with start() as running, Client(running.grpc) as client:
        backend.gate.clear()
        running.loop.call_soon_threadsafe(running.loop.call_later, 1.0, backend.gate.set)
        assert client.retrieve(top_k=1).items


def test_a_call_without_a_message_is_the_callers_fault(running) -> None:
    with connected(running) as channel:
        for method in (RETRIEVE, "/grpc.health.v1.Health/Check"):
            with pytest.raises(grpc.RpcError) as caught:
                channel.stream_unary(method)(iter(()), timeout=20)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details() == "the call has no message"


@pytest.mark.parametrize("method", [RETRIEVE, "/grpc.health.v1.Health/Check"])
@pytest.mark.parametrize("slow", [False, True])
def test_the_slowest_make_room_for_others(start, monkeypatch, slow, method) -> None:
    most = "MAX_UNDER_WAY" if method == RETRIEVE else "MAX_OPEN_UNDER_WAY"
    monkeypatch.setattr(grpc_server, most, 2)
    monkeypatch.setattr(grpc_server, "SLOW_SECONDS", 0.0 if slow else 1000.0)
    with start() as running, connected(running) as channel, ExitStack() as stack:
        # Which of the two comes first is not for their caller to say.
        calls = [stack.enter_context(silent(channel, method)) for _ in range(2)]
        ask = channel.unary_unary(method)
        for _ in range(10):
            assert ask(b"", timeout=20)
        while slow and not any(call.done() for call in calls):
            ask(b"", timeout=20)
        given_up = [call for call in calls if call.done()]
        assert len(given_up) == slow
        for call in given_up:
            assert call.exception(20).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert dict(call.trailing_metadata())["reason"] == "OVERLOADED"


def test_one_connection_has_so_many_calls(start, limits) -> None:
    limits(max_concurrent_streams=2)
    with start() as running, connected(running) as channel, connected(running) as other, ExitStack() as stack:
        # The client knows the limit when it has been answered once.
        assert stubs.RetrievalServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=20).n_items
        for _ in range(2):
            stack.enter_context(silent(channel))
        with pytest.raises(grpc.RpcError) as waited:
            stubs.RetrievalServiceStub(channel).GetInfo(pb.GetInfoRequest(), timeout=0.5)
        assert waited.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stubs.RetrievalServiceStub(other).GetInfo(pb.GetInfoRequest(), timeout=20).n_items


def test_so_many_connections_are_taken(start, limits) -> None:
    limits(max_allowed_incoming_connections=2)
    with start() as running, ExitStack() as stack:
        ask = [stubs.RetrievalServiceStub(stack.enter_context(connected(running))).GetInfo for _ in range(3)]
        for call in ask[:2]:
            assert call(pb.GetInfoRequest(), timeout=20).n_items
        with pytest.raises(grpc.RpcError) as refused:
            ask[2](pb.GetInfoRequest(), timeout=20)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ask[0](pb.GetInfoRequest(), timeout=20).n_items


def test_a_connection_that_says_nothing_is_closed(start, limits) -> None:
    limits(server_handshake_timeout_ms=200)
    with start() as running, raw(running) as caller:
        while caller.recv(1000):  # what the server says of itself
            pass


def test_long_metadata_is_taken_or_refused_and_never_now_and_then(running) -> None:
    with connected(running) as channel:
        info = stubs.RetrievalServiceStub(channel).GetInfo
        for _ in range(20):
            assert info(pb.GetInfoRequest(), metadata=[("x-claims", "a" * 14_000)], timeout=20).n_items
        with pytest.raises(grpc.RpcError) as refused:
            info(pb.GetInfoRequest(), metadata=[("x-claims", "a" * 17_000)], timeout=20)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_connections_are_made_anew_and_no_call_is_lost(start, limits) -> None:
    limits(max_connection_age_ms=100, max_connection_age_grace_ms=5000)
    enough, failed = threading.Event(), []

    def ask(call: Any) -> None:
        while not enough.is_set():
            try:
                call()
            except (grpc.RpcError, UnavailableError) as error:
                failed.append(error)

    # Without retries of ours, so that nothing is hidden by them.
    with start(max_wait=20) as running, connected(running, ("grpc.enable_retries", 0)) as channel:
        stub, times = stubs.RetrievalServiceStub(channel), []

        def changed(state: grpc.ChannelConnectivity) -> None:
            if state is grpc.ChannelConnectivity.READY:
                times.append(state)
                if len(times) == 8:
                    enough.set()

        channel.subscribe(changed)
        with Client(running.grpc) as client:
            calls = [lambda: stub.Retrieve(pb.RetrieveRequest(top_k=1), timeout=20), lambda: client.retrieve(top_k=1)]
            threads = [threading.Thread(target=ask, args=(call,)) for call in [*calls, *calls]]
            for thread in threads:
                thread.start()
            made_anew = enough.wait(60)
            enough.set()
            for thread in threads:
                thread.join()
        channel.unsubscribe(changed)
    assert made_anew
    assert not failed


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """Of a connection as a whole."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags, 0, 0, 0, 0]) + payload


def raw(running: Any) -> socket.socket:
    host, _, port = running.grpc_address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def kinds(content: bytes) -> Sequence[int]:
    """Of the frames that are whole."""
    found = []
    while len(content) >= 9 and len(content) >= (size := 9 + int.from_bytes(content[:3], "big")):
        found.append(content[3])
        content = content[size:]
    return found


def test_keepalive_of_an_idle_client_is_answered(start, limits) -> None:
    settings, ping, goaway = 4, 6, 7
    limits(min_ping_interval_without_data_ms=10)
    with start() as running, raw(running) as caller:
        caller.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(settings, 0, b""))
        received = b""
        for number in range(8):
            caller.sendall(frame(ping, 0, struct.pack(">Q", number)))
            while struct.pack(">Q", number) not in received:
                part = caller.recv(10_000)
                assert part, "the connection was closed"
                received += part
            time.sleep(0.05)
        assert goaway not in kinds(received)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("/grpc.health.v1.Health/Check", health_pb2.HealthCheckRequest(service="x" * 2000)),
        ("/grpc.health.v1.Health/Watch", health_pb2.HealthCheckRequest(service="x" * 2000)),
        (REFLECTION, reflection_pb2.ServerReflectionRequest(file_by_filename="x" * 2000)),
    ],
)
def test_what_needs_no_key_is_short(running, method, message) -> None:
    # It is held as long as the stream is.
    with connected(running) as channel, pytest.raises(grpc.RpcError) as caught:
        list(channel.stream_stream(method)(iter([message.SerializeToString()]), timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "enough for any name" in caught.value.details()


def test_streams_that_need_no_key_are_few(start, monkeypatch) -> None:
    monkeypatch.setattr(grpc_server, "MAX_OPEN_STREAMS", 2)
    with start() as running, connected(running) as channel:
        watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
        first = [watch(b"", timeout=30) for _ in range(2)]
        assert all(next(call) for call in first)
        with pytest.raises(grpc.RpcError) as caught:
            next(watch(b"", timeout=30))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=30)
        first[0].cancel()
        with Client(running.grpc) as client:
            assert client.retrieve(top_k=1).items


def test_a_caller_that_goes_before_its_message_is_there_is_cancelled(start) -> None:
    with start() as running, connected(running) as channel:
        with silent(channel) as call:
            time.sleep(0.2)
        assert call.cancelled()
        late = time.monotonic() + 20
        counted = {"transport": "grpc", "method": "retrieve"}
        while not running.metric("genretrieval_request_duration_seconds_count", **counted, code="CANCELLED"):
            assert time.monotonic() < late
            time.sleep(0.01)
        assert running.metric("genretrieval_request_duration_seconds_count", **counted, code="INVALID_ARGUMENT") is None


def test_a_graph_that_is_stuck_is_told_to_health_checks_and_to_those_who_wait(start, backend, monkeypatch) -> None:
    monkeypatch.setattr(batcher, "STUCK_SECONDS", 0.3)
    monkeypatch.setattr(app, "_LOOK_SECONDS", 0.01)
    with (
        start() as running,
        connected(running) as channel,
        Client(running.http) as client,
        ThreadPoolExecutor(1) as pool,
    ):
        watch = watching(channel)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        backend.gate.clear()
        waiting = pool.submit(client.retrieve)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(waiting.exception(30), UnavailableError)
        backend.gate.set()
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING


def test_health_may_be_watched(start) -> None:
    with start(drain_seconds=1000.0) as running, connected(running) as channel:
        watch = watching(channel)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        stopped = running.begin_to_stop()
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        # It is let go, or the server would stay for it.
        assert list(watch) == []
        stopped.result(20)
