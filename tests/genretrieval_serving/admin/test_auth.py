"""Who may do what: every operation by every kind of key, on every port; and how long a revoked key still works."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from genretrieval.errors import (
    InvalidInputError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving.admin.auth import AWAY_SECONDS, CACHE_SECONDS, MAX_ASKING, Authenticator
from genretrieval_serving.admin.client import AdminClient
from genretrieval_serving.admin.resources import Kind, Scope
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.tokens import JwtSettings
from genretrieval_serving.client import Client

OPEN, RETRIEVE, READ, WRITE = "open", "retrieve", "admin.read", "admin.write"

# What each operation needs. An operation that is not here fails `test_every_operation_is_in_the_table`.
COLLECTION = {
    "GET /v1/{kind}": READ,
    "POST /v1/{kind}": WRITE,
    "GET /v1/{kind}/{id}": READ,
    "PATCH /v1/{kind}/{id}": WRITE,
    "DELETE /v1/{kind}/{id}": WRITE,
    "POST /v1/{kind}/{id}:undelete": WRITE,
    "POST /v1/{kind}:batch": WRITE,
    "POST /v1/{kind}:import": WRITE,
    "GET /v1/{kind}:export": READ,
    "POST /v1/{kind}:test": READ,
}
NEEDS = {
    "rest": {
        "POST /v1/retrieve": RETRIEVE,
        "POST /v1/retrieve:batch": RETRIEVE,
        "POST /v1/events": RETRIEVE,
        "GET /v1/info": RETRIEVE,
        "GET /livez": OPEN,
        "GET /readyz": OPEN,
        "GET /metrics": OPEN,
        "GET /openapi.json": OPEN,
    },
    "admin": {
        **{
            operation.replace("{kind}", kind): scope
            for kind in ("keywords", "rules", "synonyms", "aliases")
            for operation, scope in COLLECTION.items()
            if (kind, operation) != ("aliases", "POST /v1/{kind}:test")
        },
        "POST /v1/aliases/{id}:rollback": WRITE,
        "POST /v1/aliases/{id}:promote": WRITE,
        "GET /v1/deployment": READ,
        "GET /v1/bundles": READ,
        "POST /v1/keywords/{id}:bind": WRITE,
        "POST /v1/keywords/{id}:unbind": WRITE,
        "GET /v1/items/{id}": READ,
        "PATCH /v1/items/{id}": WRITE,
        "DELETE /v1/items/{id}": WRITE,
        "POST /v1/items:batch": WRITE,
        "GET /v1/slots": READ,
        "GET /v1/auditEvents": READ,
        "GET /v1/revision": READ,
        "POST /v1/snapshots": READ,
        "POST /v1/retrieve": READ,
        "GET /openapi.json": OPEN,
        "GET /": OPEN,
        "GET /console": OPEN,
        "GET /console/{name}": OPEN,
    },
    "grpc": {
        "genretrieval.v1.RetrievalService/Retrieve": RETRIEVE,
        "genretrieval.v1.RetrievalService/BatchRetrieve": RETRIEVE,
        "genretrieval.v1.RetrievalService/RecordEvents": RETRIEVE,
        "genretrieval.v1.RetrievalService/GetInfo": RETRIEVE,
        "grpc.health.v1.Health/Check": OPEN,
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": OPEN,
    },
}
# What each caller is let into; any other operation answers with the second code.
CALLERS: dict[str, tuple[set[str], int]] = {
    "without a key": ({OPEN}, 401),
    "with an unknown key": ({OPEN}, 401),
    "with a revoked key": ({OPEN}, 401),
    "with an expired key": ({OPEN}, 401),
    "retrieve": ({OPEN, RETRIEVE}, 403),
    "admin.read": ({OPEN, READ}, 403),
    "admin.write": ({OPEN, READ, WRITE}, 403),
    "retrieve and admin.read": ({OPEN, RETRIEVE, READ}, 403),
    "with a token to retrieve": ({OPEN, RETRIEVE}, 403),
    "with a token to write": ({OPEN, READ, WRITE}, 403),
    "with a token for nothing": ({OPEN}, 403),
    "with an expired token": ({OPEN}, 401),
    "with a token for others": ({OPEN}, 401),
}


@dataclass
class World:
    """A server that needs keys or tokens, and one of every kind."""

    running: Any
    store: SqlStore
    keys: dict[str, str | None]


@pytest.fixture(scope="module")
def world(keyword_bundle: Any, serving: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    now = datetime.now(UTC)
    past = SqlStore.open(f"sqlite:///{tmp_path_factory.mktemp('auth')}/admin.db", clock=lambda: now - timedelta(1))
    keys: dict[str, str | None] = {"without a key": None, "with an unknown key": "grk_0123456789ab_nothing"}
    id_, revoked = past.create_key("revoked", [Scope.RETRIEVE, Scope.ADMIN_WRITE])
    past.revoke_key(id_)
    _, expired = past.create_key("expired", [Scope.RETRIEVE, Scope.ADMIN_WRITE], now - timedelta(hours=1))
    keys |= {"with a revoked key": revoked, "with an expired key": expired}
    for name in ("retrieve", "admin.read", "admin.write", "retrieve and admin.read"):
        _, keys[name] = past.create_key(name, map(Scope, name.split(" and ")))
    past.close()
    signer, jwks = ec.generate_private_key(ec.SECP256R1()), tmp_path_factory.mktemp("jwks") / "jwks.json"
    published = jwt.get_algorithm_by_name("ES256").to_jwk(signer.public_key(), as_dict=True)
    jwks.write_text(json.dumps({"keys": [published | {"kid": "1"}]}))

    def token(**claims: Any) -> str:
        whole = {"iss": "issuer", "aud": "shop", "sub": "ann", "exp": now + timedelta(hours=1)} | claims
        return jwt.encode(whole, signer, "ES256", headers={"kid": "1"})

    keys |= {
        "with a token to retrieve": token(scope="openid retrieve"),
        "with a token to write": token(scope="admin.write"),
        "with a token for nothing": token(),
        "with an expired token": token(scope="retrieve admin.write", exp=now - timedelta(hours=1)),
        "with a token for others": token(scope="retrieve admin.write", aud="another shop"),
    }
    store = SqlStore.open(str(past._engine.url))
    with serving(keyword_bundle, store=store, jwt=JwtSettings("issuer", "shop", jwks_file=jwks)) as running:
        yield World(running, store, keys)
    store.close()


def routes_of(app: Any) -> set[str]:
    """Every operation that an application answers, described or not."""
    found, left = set(), list(app.routes)
    while left:
        route = left.pop()
        if inner := getattr(route, "original_router", None):
            left += inner.routes
        else:
            methods = set(route.methods) - ({"HEAD"} if "GET" in route.methods else set())
            path = re.sub(r"\{\w+:\w+\}", "{id}", route.path)
            found |= {f"{method} {path}" for method in methods}
    return found


def test_every_operation_is_in_the_table(world) -> None:
    rest, admin = (http.app for http in world.running.server._http.values())
    assert routes_of(rest) == set(NEEDS["rest"])
    assert routes_of(admin) == set(NEEDS["admin"])
    served = {"genretrieval.v1.RetrievalService", "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    with grpc.insecure_channel(world.running.grpc_address) as channel:
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        (answer,) = reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), timeout=10)
    assert {service.name for service in answer.list_services_response.service} == served
    assert {name.partition("/")[0] for name in NEEDS["grpc"]} == served
    methods = {method.full_name for method in pb.DESCRIPTOR.services_by_name["RetrievalService"].methods}
    tested = [name.replace("/", ".") for name in NEEDS["grpc"] if name.startswith("genretrieval")]
    assert methods == set(tested)


HTTP_CELLS = [
    (transport, operation, caller)
    for transport in ("rest", "admin")
    for operation in NEEDS[transport]
    for caller in CALLERS
]


@pytest.mark.parametrize(("transport", "operation", "caller"), HTTP_CELLS)
def test_http(world, http, transport, operation, caller) -> None:
    allowed, refusal = CALLERS[caller]
    method, path = operation.split(" ")
    url = (world.running.http if transport == "rest" else world.running.admin) + path.replace("{id}", "nobody")
    secret = world.keys[caller]
    headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
    # A body that nobody can read: who calls is looked at first.
    answer = http.request(method, url, headers={"Content-Type": "application/json", **headers}, content=b"{")
    if NEEDS[transport][operation] in allowed:
        assert answer.status_code not in (401, 403)
        return
    assert answer.status_code == refusal
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reason"] == {401: "UNAUTHENTICATED", 403: "PERMISSION_DENIED"}[refusal]
    assert answer.headers.get("www-authenticate") == ("Bearer" if refusal == 401 else None)
    assert secret is None or secret not in answer.text


GRPC_CELLS = [(method, caller) for method in NEEDS["grpc"] for caller in CALLERS]


@pytest.mark.parametrize(("method", "caller"), GRPC_CELLS)
def test_grpc(world, channel, method, caller) -> None:
    allowed, refusal = CALLERS[caller]
    secret = world.keys[caller]
    metadata = () if secret is None else (("authorization", f"Bearer {secret}"),)
    code = grpc_code(channel, method, metadata)
    if NEEDS["grpc"][method] in allowed:
        # An empty batch is refused for what it is.
        assert code in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT)
    else:
        expected = {401: grpc.StatusCode.UNAUTHENTICATED, 403: grpc.StatusCode.PERMISSION_DENIED}
        assert code is expected[refusal]


def grpc_code(channel: grpc.Channel, method: str, metadata: Any) -> grpc.StatusCode:
    if method == "grpc.health.v1.Health/Check":
        call = health_pb2_grpc.HealthStub(channel).Check
        message = health_pb2.HealthCheckRequest()
    elif method.startswith("grpc.reflection"):
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        list(reflect(iter([reflection_pb2.ServerReflectionRequest(list_services="")]), metadata=metadata, timeout=10))
        return grpc.StatusCode.OK
    else:
        call, message = channel.unary_unary(f"/{method}"), b""
    try:
        call(message, metadata=metadata, timeout=10)
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture(scope="module")
def channel(world: World) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(world.running.grpc_address) as channel:
        yield channel


def test_clients_send_their_key_and_get_the_servers_errors(world) -> None:
    running, keys = world.running, world.keys
    for url in (running.http, running.grpc):
        with Client(url, api_key=keys["retrieve"]) as client:
            assert client.retrieve(top_k=1).items
        with Client(url, api_key=keys["with a token to retrieve"]) as client:
            assert client.info()
        with Client(url) as client, pytest.raises(UnauthenticatedError, match=r"needs a token .*; or an API key"):
            client.info()
        with Client(url, api_key=keys["admin.write"]) as client, pytest.raises(PermissionDeniedError, match="retrieve"):
            client.info()
        with pytest.raises(InvalidInputError, match="copy it again"):
            Client(url, api_key="grk_1_2\n")
    with AdminClient(running.admin, api_key=keys["admin.read"]) as admin:
        assert list(admin.pages(Kind.RULES)) == []
        with pytest.raises(PermissionDeniedError, match=r"lacks the scope admin\.write"):
            admin.delete(Kind.RULES, "x")
    with AdminClient(running.admin) as admin, pytest.raises(UnauthenticatedError):
        admin.revision()


def test_the_audit_names_who_holds_the_key(world) -> None:
    for caller, name in (("admin.write", "admin.write"), ("with a token to write", "ann")):
        with AdminClient(world.running.admin, api_key=world.keys[caller]) as admin:
            admin.create(Kind.KEYWORDS, {"text": f"Labubu {name}", "id": name})
            event = next(admin.audit(f"keywords/{name}"))
        assert (event.principal, event.action) == (name, "create")


@pytest.mark.parametrize("header", ["", "Bearer", "Basic {key}", "{key}", "Bearer {key} {key}", "Bearer \xff"])
def test_what_is_no_bearer_token_is_no_key(world, http, header) -> None:
    value = header.replace("{key}", str(world.keys["retrieve"])).encode("latin-1")
    assert http.get(f"{world.running.http}/v1/info", headers={b"Authorization": value}).status_code == 401


def test_the_name_of_the_scheme_has_no_case(world, http) -> None:
    headers = {"Authorization": f"bearer {world.keys['retrieve']}"}
    assert http.get(f"{world.running.http}/v1/info", headers=headers).status_code == 200


def test_a_store_without_keys_leaves_its_server_open_until_the_first(
    keyword_bundle, serving, tmp_path, monkeypatch
) -> None:
    with store_in(tmp_path) as store, serving(keyword_bundle, store=store) as running:
        monkeypatch.setattr(running.server.auth, "_clock", iter(range(0, 10**9, 10**6)).__next__)
        with AdminClient(running.admin) as admin, Client(running.http) as client:
            admin.create(Kind.KEYWORDS, {"text": "Labubu"})
            assert next(admin.audit()).principal == "anonymous"
            id_, secret = store.create_key("ann", [Scope.RETRIEVE])
            for call in (client.info, admin.revision):
                with pytest.raises(UnauthenticatedError):
                    call()
            store.revoke_key(id_)
            with Client(running.http, api_key=secret) as revoked, pytest.raises(UnauthenticatedError, match="revoked"):
                revoked.info()
            with pytest.raises(UnauthenticatedError):
                client.info()


def test_keys_may_be_required_before_there_is_one(keyword_bundle, serving, tmp_path) -> None:
    with store_in(tmp_path) as store, serving(keyword_bundle, store=store, auth=True) as running:
        with Client(running.grpc) as client, pytest.raises(UnauthenticatedError):
            client.info()
        assert httpx.get(f"{running.http}/readyz").status_code == 200


def test_no_secret_is_logged(keyword_bundle, serving, tmp_path, capfd) -> None:
    with store_in(tmp_path) as store:
        _, secret = store.create_key("ann", [Scope.RETRIEVE])
        with serving(keyword_bundle, store=store, quiet=False) as running:
            for url in (running.http, running.grpc):
                with Client(url, api_key=secret) as client:
                    client.info()
            with AdminClient(running.admin, api_key=secret) as admin, pytest.raises(PermissionDeniedError):
                admin.revision()
            with Client(running.http, api_key=secret[:-1]) as client, pytest.raises(UnauthenticatedError):
                client.info()
        written = "".join(capfd.readouterr())
    assert "getInfo" in written
    assert "revision.get" in written
    assert secret.rpartition("_")[2][:8] not in written
    assert "Bearer" not in written


@contextmanager
def store_in(folder: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(f"sqlite:///{folder}/admin.db")
    try:
        yield store
    finally:
        store.close()


@dataclass
class FakeKeys:
    """Knows one key, and counts how often it is asked."""

    failure: Exception | None = None
    scopes: frozenset[Scope] = frozenset({Scope.RETRIEVE})
    asked: int = 0
    gate: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    def verify_key(self, secret: str) -> tuple[str, frozenset[Scope]]:
        self.asked += 1
        assert self.gate.wait(10)
        if self.failure is not None:
            raise self.failure
        if secret != "grk_1":
            raise UnauthenticatedError("not known")
        return "ann", self.scopes

    def list_keys(self) -> list[object]:
        return [object()]


@pytest.fixture
def keys() -> FakeKeys:
    return FakeKeys()


@dataclass
class Ticks:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_store_is_asked_once_a_while(keys) -> None:
    ticks = Ticks()

    async def calls() -> None:
        auth = Authenticator(keys, clock=ticks)
        for _ in range(3):
            assert (await auth.allow("Bearer grk_1", Scope.RETRIEVE)).name == "ann"
        with pytest.raises(UnauthenticatedError):
            await auth.allow("Bearer grk_2", Scope.RETRIEVE)
        with pytest.raises(UnauthenticatedError):
            await auth.allow("Bearer grk_2", Scope.RETRIEVE)
        assert keys.asked == 2
        keys.failure = UnauthenticatedError("revoked")
        ticks.now = CACHE_SECONDS - 0.001
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        ticks.now = CACHE_SECONDS
        with pytest.raises(UnauthenticatedError, match="revoked"):
            await auth.allow("Bearer grk_1", Scope.RETRIEVE)

    asyncio.run(calls())


def test_calls_that_come_together_ask_once_and_survive_the_first_giving_up(keys) -> None:
    async def calls() -> None:
        auth = Authenticator(keys)
        keys.gate.clear()
        first, *others = [asyncio.create_task(auth.allow("Bearer grk_1", Scope.RETRIEVE)) for _ in range(5)]
        await asyncio.sleep(0.05)
        first.cancel()
        keys.gate.set()
        assert [who.name for who in await asyncio.gather(*others)] == ["ann"] * 4
        assert keys.asked == 1

    asyncio.run(calls())


def test_a_store_that_is_away_stops_nobody_it_knew(keys) -> None:
    ticks = Ticks()

    async def calls() -> None:
        auth = Authenticator(keys, clock=ticks)
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        keys.failure = UnavailableError("away")
        ticks.now = CACHE_SECONDS
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        assert keys.asked == 2
        with pytest.raises(UnavailableError, match="away"):
            await auth.allow("Bearer grk_2", Scope.RETRIEVE)
        ticks.now = AWAY_SECONDS
        with pytest.raises(UnavailableError, match="away"):
            await auth.allow("Bearer grk_1", Scope.RETRIEVE)

    asyncio.run(calls())


def test_a_silent_store_holds_up_nobody_it_knew_for_long(keys, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.admin.auth.PATIENCE_SECONDS", 0.01)
    ticks = Ticks()

    async def calls() -> None:
        auth = Authenticator(keys, clock=ticks)
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        keys.gate.clear()
        ticks.now = CACHE_SECONDS
        try:
            async with asyncio.timeout(5):
                assert (await auth.allow("Bearer grk_1", Scope.RETRIEVE)).name == "ann"
            # The next one does not wait at all; what the store says late counts.
            monkeypatch.setattr("genretrieval_serving.admin.auth.PATIENCE_SECONDS", 60)
            async with asyncio.timeout(5):
                await auth.allow("Bearer grk_1", Scope.RETRIEVE)
            assert keys.asked == 2
            keys.failure = UnauthenticatedError("revoked")
        finally:
            keys.gate.set()
        await asyncio.gather(*auth._asking.values())
        with pytest.raises(UnauthenticatedError, match="revoked"):
            await auth.allow("Bearer grk_1", Scope.RETRIEVE)

    asyncio.run(calls())


def test_a_silent_store_that_had_no_key_holds_up_one_call_a_little(keys, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.admin.auth.PATIENCE_SECONDS", 0.01)
    made: list[object] = []
    gate = threading.Event()

    def list_keys() -> list[object]:
        keys.asked += 1
        assert not made or gate.wait(10)
        return made[1:]

    monkeypatch.setattr(keys, "list_keys", list_keys)
    ticks = Ticks()

    async def calls() -> None:
        auth = Authenticator(keys, clock=ticks)
        made.append("silent from now on")
        async with asyncio.timeout(5):
            for ticks.now in (CACHE_SECONDS, 2 * CACHE_SECONDS, 3 * CACHE_SECONDS):
                await auth.allow(None, Scope.RETRIEVE)
        assert keys.asked == 2  # at the beginning, and the one that is not answered
        made.append("a key")
        gate.set()
        assert auth._looking is not None
        await auth._looking
        with pytest.raises(UnauthenticatedError):
            await auth.allow(None, Scope.RETRIEVE)

    asyncio.run(calls())


def test_refusals_push_out_no_good_key_and_take_few_threads(keys, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.admin.auth.MAX_REFUSED", 3)

    async def calls() -> None:
        auth = Authenticator(keys)
        await auth.allow("Bearer grk_1", Scope.RETRIEVE)
        keys.gate.clear()
        asking = [asyncio.create_task(auth.allow(f"Bearer grk_{i}", Scope.RETRIEVE)) for i in range(2, 22)]
        await asyncio.sleep(0.05)
        assert keys.asked == 1 + MAX_ASKING
        keys.gate.set()
        outcomes = await asyncio.gather(*asking, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {UnauthenticatedError}
        assert (len(auth._known), len(auth._refused)) == (1, 3)

    asyncio.run(calls())


def test_no_more_keys_are_remembered_than_fit_and_the_oldest_goes(keys, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.admin.auth.MAX_CACHED", 3)
    monkeypatch.setattr(keys, "verify_key", lambda secret: (secret, keys.scopes))
    ticks = Ticks()

    async def calls() -> None:
        auth = Authenticator(keys, clock=ticks)
        for i in range(3):
            await auth.allow(f"Bearer grk_{i}", Scope.RETRIEVE)
        ticks.now = CACHE_SECONDS
        for i in (0, 3):
            await auth.allow(f"Bearer grk_{i}", Scope.RETRIEVE)
        assert [known.principal.name for known in auth._known.values()] == ["grk_2", "grk_0", "grk_3"]

    asyncio.run(calls())
