"""Requests that do not end: heads without an end, and callers that are silent."""

from __future__ import annotations

import socket
import time
from urllib.parse import urlsplit

import httpx
import pytest

from genretrieval_serving import http_protocol
from genretrieval_serving.client import Client


def connected(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((address.hostname, address.port), timeout=10)


@pytest.mark.parametrize(
    "endless", [b"GET /" + b"a" * 10_000, b"x: " + b"a" * 10_000, b"x: " + b"a" * 10_000 + b"\r\n"]
)
def test_a_head_that_does_not_end_is_refused(running, endless) -> None:
    with connected(running.http) as caller:
        caller.sendall(b"" if endless.startswith(b"GET") else b"GET /livez HTTP/1.1\r\nHost: here\r\n")
        sent = 0
        try:
            while sent < 100 * http_protocol.MAX_HEAD_BYTES:
                caller.sendall(endless)
                sent += len(endless)
            said = caller.recv(1000)
        except ConnectionError:
            said = b""
        assert sent < 100 * http_protocol.MAX_HEAD_BYTES
    assert said in (b"",) or said.startswith((b"HTTP/1.1 431", b"HTTP/1.1 400"))
    assert httpx.get(f"{running.http}/livez").is_success


def test_long_heads_and_bodies_within_the_limits_are_answered(running) -> None:
    with httpx.Client() as client:  # one connection
        for _ in range(3):
            headers = {"x-note": "a" * (http_protocol.MAX_HEAD_BYTES // 2)}
            body = {"exclude_item_ids": [f"{i:0>200}" for i in range(900)]}
            assert client.post(f"{running.http}/v1/retrieve", headers=headers, json=body).is_success


@pytest.mark.parametrize(
    ("begun", "said"),
    [
        (b"", b"HTTP/1.1 408"),
        (b"GET /livez HT", b"HTTP/1.1 408"),
        (b"POST /v1/retrieve HTTP/1.1\r\nHost: here\r\nContent-Length: 5\r\n\r\n{", b""),
        (b"GET /livez HTTP/1.1\r\nHost: here\r\n\r\nGET /li", b"HTTP/1.1 200"),
    ],
)
def test_a_caller_that_falls_silent_is_left(start, monkeypatch, begun, said) -> None:
    monkeypatch.setattr(http_protocol, "RECEIVE_SECONDS", 0.2)
    with start() as running, connected(running.http) as caller:
        caller.sendall(begun)
        answer = b""
        while part := caller.recv(1000):
            answer += part
        assert answer.startswith(said)
        assert bool(said) == bool(answer)


def test_an_answer_may_take_longer_than_a_request(start, backend, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIVE_SECONDS", 0.05)
    with start() as running, Client(running.http) as client:
        backend.gate.clear()
        running.loop.call_soon_threadsafe(running.loop.call_later, 0.3, backend.gate.set)
        assert client.retrieve(top_k=1).items


def test_beyond_so_many_connections_only_probes_are_answered(start, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_CONNECTIONS", 2)
    with start() as running, httpx.Client() as first, httpx.Client() as second, httpx.Client() as third:
        for client in (first, second):
            assert client.get(f"{running.http}/v1/info").is_success
        assert third.get(f"{running.http}/livez").is_success
        assert third.get(f"{running.http}/readyz").is_success
        refused = third.get(f"{running.http}/v1/info")
        assert (refused.status_code, refused.json()["reason"]) == (429, "OVERLOADED")
        assert refused.headers["retry-after"] == "1"
        assert first.get(f"{running.http}/v1/info").is_success


def test_a_caller_that_does_not_read_is_left(start, monkeypatch) -> None:
    monkeypatch.setattr(http_protocol, "SEND_SECONDS", 0.1)
    with start() as running, connected(running.http) as caller:
        caller.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: here\r\n\r\n" * 1000)
        state = running.server._http["http"]._server.server_state
        while state.total_requests == 0 or state.connections:
            time.sleep(0.01)
