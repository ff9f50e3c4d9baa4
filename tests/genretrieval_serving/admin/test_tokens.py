"""Tokens of an identity provider: what passes and what does not, and how seldom the issuer is asked."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

from genretrieval.errors import InvalidInputError, PermissionDeniedError, UnauthenticatedError, UnavailableError
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.admin.tokens import KEYS_SECONDS, MAX_JWKS_BYTES, PAUSE_SECONDS, JwtSettings, Tokens

ISSUER, AUDIENCE = "https://login.example", "genretrieval"
KEYS: dict[str, Any] = {
    "RS256": rsa.generate_private_key(65537, 2048),
    "ES256": ec.generate_private_key(ec.SECP256R1()),
    "EdDSA": ed25519.Ed25519PrivateKey.generate(),
}
PEM = (
    KEYS["RS256"].public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
)


def jwk(algorithm: str, key: Any, **more: Any) -> dict[str, Any]:
    """The public half of a key, as an issuer publishes it."""
    public: dict[str, Any] = json.loads(jwt.get_algorithm_by_name(algorithm).to_jwk(key.public_key()))
    return public | more


JWKS = {"keys": [jwk(name, key, kid=name) for name, key in KEYS.items()]}


def claims(**changed: Any) -> dict[str, Any]:
    now = datetime.now(UTC)
    whole = {"iss": ISSUER, "aud": AUDIENCE, "sub": "ann", "scope": "openid retrieve", "exp": now + timedelta(hours=1)}
    return {name: value for name, value in (whole | changed).items() if value is not None}


def token(algorithm: str = "RS256", *, key: Any = None, headers: Any = None, **changed: Any) -> str:
    headers = {"kid": algorithm} if headers is None else headers
    return jwt.encode(claims(**changed), key or KEYS[algorithm], algorithm, headers=headers)


def forged(header: dict[str, Any], secret: bytes = b"") -> str:
    """A token that a library would refuse to make: signed with a shared secret, or not at all."""
    body = claims() | {"exp": 4_000_000_000}
    parts = [base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, body)]
    text = b".".join(parts)
    signature = hmac.digest(secret, text, hashlib.sha256) if secret else b""
    return (text + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.fixture
def settings(tmp_path: Path) -> JwtSettings:
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps(JWKS))
    return JwtSettings(ISSUER, AUDIENCE, jwks_file=file)


def verified(settings: JwtSettings, given: str) -> tuple[str, frozenset[Scope]]:
    return asyncio.run(Tokens(settings).verify(given))


@pytest.mark.parametrize("algorithm", sorted(KEYS))
def test_a_signed_token_says_who_and_what(settings, algorithm) -> None:
    assert verified(settings, token(algorithm)) == ("ann", {Scope.RETRIEVE})
    assert verified(settings, token(algorithm, aud=["other", AUDIENCE]))[0] == "ann"
    late = datetime.now(UTC) - timedelta(seconds=10)
    assert verified(settings, token(algorithm, exp=late))[0] == "ann"  # clocks differ a little


def test_scopes_are_a_list_or_words_of_the_claim_that_was_named(settings) -> None:
    assert verified(settings, token(scope=["admin.write", "other", 3]))[1] == {Scope.ADMIN_WRITE}
    for nothing in (None, 7, {"retrieve": True}, "Retrieve retrieve.all"):
        assert verified(settings, token(scope=nothing))[1] == frozenset()
    roles = JwtSettings(ISSUER, AUDIENCE, jwks_file=settings.jwks_file, scope_claim="roles")
    assert verified(roles, token(roles="admin.read"))[1] == {Scope.ADMIN_READ}


SECOND = timedelta(seconds=1)
OTHER = rsa.generate_private_key(65537, 2048)
REFUSED: dict[str, Callable[[], str]] = {
    "alg none": lambda: forged({"alg": "none", "kid": "RS256"}),
    "alg missing": lambda: forged({"kid": "RS256"}),
    "alg of another shape": lambda: forged({"alg": ["RS256"], "kid": "RS256"}),
    "the public key as a shared secret": lambda: forged({"alg": "HS256", "kid": "RS256"}, PEM),
    "the same by another name": lambda: forged({"alg": "hs256", "kid": "RS256"}, PEM),
    "its own key in the header": lambda: token(key=OTHER, headers={"kid": "x", "jwk": jwk("RS256", OTHER)}),
    "a key of another algorithm": lambda: token("ES256", headers={"kid": "RS256"}),
    "another key": lambda: token(key=OTHER),
    "an unknown kid": lambda: token(headers={"kid": "other"}),
    "no kid": lambda: token(headers={}),
    "a kid that is no text": lambda: forged({"alg": "RS256", "kid": {}}),
    "what must be understood": lambda: token(headers={"kid": "RS256", "crit": ["b64"], "b64": False}),
    "a stronger algorithm than agreed": lambda: token("RS512", key=KEYS["RS256"], headers={"kid": "RS256"}),
    "another audience": lambda: token(aud="other"),
    "another audience in part": lambda: token(aud=AUDIENCE + "2"),
    "no audience": lambda: token(aud=None),
    "another issuer": lambda: token(iss=ISSUER + "/"),
    "no issuer": lambda: token(iss=None),
    "expired": lambda: token(exp=datetime.now(UTC) - 31 * SECOND),
    "without an end": lambda: token(exp=None),
    "an endless end": lambda: token(exp=float("inf")),
    "not yet": lambda: token(nbf=datetime.now(UTC) + 40 * SECOND),
    "nobody": lambda: token(sub=None),
    "an empty name": lambda: token(sub=""),
    "a name with a line end": lambda: token(sub="ann\nroot"),
    "a long name": lambda: token(sub="a" * 256),
    "changed": lambda: token()[:-8] + "AAAAAAAA",
    "no signature": lambda: token().rpartition(".")[0] + ".",
    "no token": lambda: "hunter2",
    "many dots": lambda: "." * 50,
    "too long": lambda: token(more="x" * 20_000),
    "deep": lambda: base64.urlsafe_b64encode(b"[" * 9_000).decode() + "..",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(settings, case) -> None:
    given = REFUSED[case]()
    with pytest.raises(UnauthenticatedError) as refusal:
        verified(settings, given)
    assert AUDIENCE not in str(refusal.value)
    assert given not in str(refusal.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [({"aud": "x"}, "audience"), ({"iss": "x"}, "issuer"), ({"exp": datetime(2020, 1, 1, tzinfo=UTC)}, "expired")],
)
def test_a_refusal_says_what_to_do(settings, changed, message) -> None:
    with pytest.raises(UnauthenticatedError, match=message):
        verified(settings, token(**changed))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "list `keys`"),
        ("{", "Expecting"),
        (json.dumps({"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "RS256"}]}), "no key for signatures"),
        (json.dumps({"keys": [jwk("RS256", rsa.generate_private_key(65537, 1024))]}), "no key for signatures"),
        (json.dumps({"keys": [jwk("RS256", KEYS["RS256"], use="enc"), 1, {"kty": "RSA", "alg": {}}]}), "no key for"),
        (json.dumps({"keys": [jwk("RS512", KEYS["RS256"], alg="RS512")]}), "no key for signatures"),
        (" " * (MAX_JWKS_BYTES + 1), "bytes"),
    ],
)
def test_files_without_a_key_that_can_be_trusted(tmp_path, content, message) -> None:
    file = tmp_path / "jwks.json"
    file.write_text(content)
    with pytest.raises(InvalidInputError, match=message):
        Tokens(JwtSettings(ISSUER, AUDIENCE, jwks_file=file))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "one of them"),
        ({"jwks_url": "https://a", "jwks_file": Path("b")}, "one of them"),
        ({"jwks_url": "http://login.example/keys"}, "https"),
        ({"jwks_url": "file:///etc/passwd"}, "https"),
        ({"jwks_url": "https://[::1"}, "cannot be read"),
        ({"jwks_url": "https://a", "audience": ""}, "audience"),
    ],
)
def test_settings_that_would_trust_too_much(given, message) -> None:
    with pytest.raises(InvalidInputError, match=message):
        JwtSettings(**{"issuer": ISSUER, "audience": AUDIENCE} | given)


@dataclass
class Issuer:
    """An HTTP server with keys, that counts how often it is asked."""

    url: str = ""
    content: bytes = json.dumps(JWKS).encode()
    status: int = 200
    asked: int = 0
    gate: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    here = Issuer()
    here.gate.set()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            here.asked += 1
            here.gate.wait(10)
            self.send_response(here.status)
            self.end_headers()
            self.wfile.write(here.content)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    here.url = f"http://127.0.0.1:{server.server_port}/keys"
    yield here
    here.gate.set()
    server.shutdown()
    thread.join(10)
    server.server_close()


class Ticks:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def asking(issuer: Issuer, work: Callable[[Tokens, Ticks], Awaitable[None]]) -> None:
    ticks = Ticks()

    async def main() -> None:
        await work(Tokens(JwtSettings(ISSUER, AUDIENCE, jwks_url=issuer.url), clock=ticks), ticks)

    asyncio.run(main())


def test_the_issuer_is_asked_once_for_all(issuer) -> None:
    async def work(tokens: Tokens, ticks: Ticks) -> None:
        issuer.gate.clear()
        first, *others = [asyncio.create_task(tokens.verify(token())) for _ in range(20)]
        await asyncio.sleep(0.05)
        first.cancel()
        issuer.gate.set()
        assert {name for name, _ in await asyncio.gather(*others)} == {"ann"}
        ticks.now = KEYS_SECONDS - 1
        await tokens.verify(token())
        assert issuer.asked == 1

    asking(issuer, work)


def test_a_flood_of_unknown_kids_reaches_the_issuer_seldom_and_a_new_key_is_found(issuer) -> None:
    async def work(tokens: Tokens, ticks: Ticks) -> None:
        await tokens.refresh()
        flood = [token(key=OTHER, headers={"kid": f"new-{i}"}) for i in range(50)]
        issuer.content = json.dumps({"keys": [*JWKS["keys"], jwk("RS256", OTHER, kid="new-0")]}).encode()
        for given in flood:
            with pytest.raises(UnauthenticatedError):
                await tokens.verify(given)
        assert issuer.asked == 1
        ticks.now = PAUSE_SECONDS
        outcomes = await asyncio.gather(*map(tokens.verify, flood), return_exceptions=True)
        assert outcomes[0] == ("ann", {Scope.RETRIEVE})
        assert {type(outcome) for outcome in outcomes[1:]} == {UnauthenticatedError}
        assert issuer.asked == 2

    asking(issuer, work)


def test_an_issuer_that_is_away_stops_nobody_whose_key_is_known(issuer) -> None:
    async def work(tokens: Tokens, ticks: Ticks) -> None:
        await tokens.refresh()
        for issuer.status, issuer.content in ((500, b""), (302, b""), (200, b"<html>"), (200, b'{"keys": []}')):
            ticks.now += KEYS_SECONDS
            issuer.gate.clear()
            assert (await tokens.verify(token()))[0] == "ann"  # and waits for nothing
            issuer.gate.set()
            assert tokens._reading is not None
            await tokens._reading
        assert issuer.asked == 5
        assert (await tokens.verify(token()))[0] == "ann"
        ticks.now += PAUSE_SECONDS
        issuer.content = json.dumps({"keys": [jwk("RS256", OTHER, kid="RS256")]}).encode()
        await tokens.refresh()
        with pytest.raises(UnauthenticatedError):
            await tokens.verify(token())

    asking(issuer, work)


def test_without_keys_nobody_is_let_in_and_a_silent_issuer_is_given_up(issuer, monkeypatch) -> None:
    monkeypatch.setattr("genretrieval_serving.admin.tokens.FETCH_SECONDS", 0.05)
    issuer.gate.clear()

    async def work(tokens: Tokens, ticks: Ticks) -> None:
        async with asyncio.timeout(5):
            for _ in range(3):
                with pytest.raises(UnavailableError, match="issuer"):
                    await tokens.verify(token())
        assert issuer.asked == 1
        with pytest.raises(UnauthenticatedError):
            await tokens.verify("hunter2")

    asking(issuer, work)


def test_large_answers_are_not_read(issuer) -> None:
    issuer.content = json.dumps(JWKS).encode() + b" " * MAX_JWKS_BYTES

    async def work(tokens: Tokens, ticks: Ticks) -> None:
        with pytest.raises(UnavailableError):
            await tokens.verify(token())

    asking(issuer, work)


class OneKey:
    """A store that knows one key, and would take a token for one."""

    def verify_key(self, secret: str) -> tuple[str, frozenset[Scope]]:
        assert secret.startswith("grk_")
        if secret != "grk_1":
            raise UnauthenticatedError("not known")
        return "by key", frozenset({Scope.ADMIN_READ})

    def list_keys(self) -> list[object]:
        return []


def test_keys_and_tokens_side_by_side(settings) -> None:
    async def calls() -> None:
        both = Authenticator(OneKey(), tokens=Tokens(settings))
        assert both.required
        assert (await both.allow("Bearer grk_1", Scope.ADMIN_READ)).name == "by key"
        assert (await both.allow(f"Bearer {token()}", Scope.RETRIEVE)).name == "ann"
        with pytest.raises(PermissionDeniedError, match=r"token of ann lacks the scope admin\.read"):
            await both.allow(f"Bearer {token()}", Scope.ADMIN_READ)
        for nobody in (None, "Bearer grk_2", "Bearer hunter2", f"Basic {token()}", f"Bearer grk_{token()}"):
            with pytest.raises(UnauthenticatedError):
                await both.allow(nobody, Scope.RETRIEVE)
        alone = Authenticator(tokens=Tokens(settings))
        assert (await alone.allow(f"Bearer {token()}", Scope.RETRIEVE)).name == "ann"
        with pytest.raises(UnauthenticatedError, match="no API keys"):
            await alone.allow("Bearer grk_1", Scope.RETRIEVE)
        with pytest.raises(UnauthenticatedError):
            await alone.allow(None, Scope.RETRIEVE)

    asyncio.run(calls())
