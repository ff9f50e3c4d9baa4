"""Tokens of an identity provider (JWT, RFC 7519), checked against the keys that it publishes (JWKS, RFC 7517)."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import jwt
import structlog
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from genretrieval.errors import InvalidInputError, UnauthenticatedError, UnavailableError
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.web import is_loopback

log = structlog.get_logger(__name__)

# Signatures by a private key alone: with a shared secret, or none, whoever checks a token could also make one.
ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})
MIN_RSA_BITS = 2048
LEEWAY_SECONDS = 30.0
# Keys are read again after so long, and at most so often for a token that names one that is not known.
KEYS_SECONDS = 600.0
PAUSE_SECONDS = 10.0
FETCH_SECONDS = 5.0
MAX_JWKS_BYTES = 1 << 20
MAX_TOKEN_CHARACTERS = 16_384
MAX_NAME = 255

_REFUSALS: dict[type[Exception], str] = {
    jwt.ExpiredSignatureError: "the token has expired; get a new one",
    jwt.ImmatureSignatureError: "the token is not valid yet; compare the clocks of this server and of the issuer",
    jwt.InvalidAudienceError: "the token is not for this server; ask the issuer for the audience that it expects",
    jwt.InvalidIssuerError: "the token is of another issuer; get one of the issuer that this server trusts",
}


@dataclass(frozen=True)
class JwtSettings:
    """Which tokens are taken.

    Attributes:
        issuer: the claim ``iss`` that they must have.
        audience: one that the claim ``aud`` must have.
        jwks_url: where the issuer publishes its keys; ``https``, or ``http`` on this machine.
        jwks_file: the same as a file. Exactly one of the two.
        scope_claim: the claim that holds the scopes, as a list or separated by spaces; those that are none of ours
            are passed over.

    Raises:
        InvalidInputError: not exactly one place of keys is given, or what is given cannot be used.
    """

    issuer: str
    audience: str
    jwks_url: str | None = None
    jwks_file: Path | None = None
    scope_claim: str = "scope"

    def __post_init__(self) -> None:
        """Refuse what would let in nobody, or everybody."""
        if not (self.issuer and self.audience and self.scope_claim):
            raise InvalidInputError("tokens need an issuer, an audience and the name of the claim with scopes")
        if (self.jwks_url is None) == (self.jwks_file is None):
            raise InvalidInputError("tokens need the keys of their issuer: give a JWKS URL or a JWKS file, one of them")
        if self.jwks_url is not None:
            try:
                url = httpx.URL(self.jwks_url)
            except httpx.InvalidURL as error:
                raise InvalidInputError(f"the JWKS URL cannot be read: {error}") from error
            if not url.host or not (url.scheme == "https" or (url.scheme == "http" and is_loopback(url.host))):
                raise InvalidInputError(
                    f"the JWKS URL, of the host {url.host!r}, must begin with https://: whoever could change the keys "
                    "on their way could sign any token. Or give the keys as a file"
                )


class Tokens:
    """Checks tokens. Used in one event loop.

    Keys are kept, also while the issuer is away. A token that names an unknown key has them read again, at most every
    `PAUSE_SECONDS`, however many such tokens come.
    """

    def __init__(self, settings: JwtSettings, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Without keys as yet.

        Raises:
            InvalidInputError: the JWKS file cannot be used.
        """
        self._settings, self._clock = settings, clock
        self._keys: dict[str, jwt.PyJWK] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading: asyncio.Task[None] | None = None
        self._ssl = None if settings.jwks_url is None else httpx.create_ssl_context()
        if settings.jwks_file is not None:
            try:
                self._keys, self._read_at = keys_of(_read(settings.jwks_file)), clock()
            except (OSError, ValueError) as error:
                raise InvalidInputError(f"the JWKS file {settings.jwks_file} cannot be used: {error}") from error

    async def verify(self, token: str) -> tuple[str, frozenset[Scope]]:
        """Who holds a token, its claim ``sub``, and what it may do.

        Raises:
            UnauthenticatedError: it is malformed, of another issuer, for somebody else, expired or wrongly signed.
            UnavailableError: no keys could be read yet.
        """
        try:
            if len(token) > MAX_TOKEN_CHARACTERS:
                raise jwt.DecodeError
            kid = jwt.get_unverified_header(token).get("kid", "")
            key = await self._key(kid)
            claims = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                issuer=self._settings.issuer,
                audience=self._settings.audience,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.InvalidTokenError, OverflowError, RecursionError) as error:  # of an `exp` that is infinite; of JSON
            said = "the token cannot be read, lacks a claim, or is not signed by a key of the issuer; get a new one"
            raise UnauthenticatedError(_REFUSALS.get(type(error), said)) from None
        name = claims["sub"]
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            raise UnauthenticatedError(f"the token's `sub` must have 1 to {MAX_NAME} characters that can be printed")
        return name, _scopes(claims.get(self._settings.scope_claim))

    async def refresh(self) -> None:
        """Read the keys; where they cannot be read, say so in the log and keep those that there are."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._refresh(), name="jwks")
        # One reading for all that wait, whichever of them goes away meanwhile.
        await asyncio.shield(self._reading)

    async def _key(self, kid: object) -> jwt.PyJWK:
        if not isinstance(kid, str):
            raise jwt.DecodeError
        now = self._clock()
        may_read = now >= self._tried_at + PAUSE_SECONDS
        if kid not in self._keys and (may_read or self._reading is not None):
            await self.refresh()
        elif now >= self._read_at + KEYS_SECONDS and may_read and self._reading is None:
            self._reading = asyncio.create_task(self._refresh(), name="jwks")
        if not self._keys:
            raise UnavailableError(
                "the keys of the issuer of tokens cannot be read, so none can be checked; try again, or use an API key"
            )
        try:
            return self._keys[kid]
        except KeyError:
            raise jwt.DecodeError from None

    async def _refresh(self) -> None:
        self._tried_at = self._clock()
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                self._keys, self._read_at = keys_of(await self._content()), self._clock()
        except (OSError, ValueError, httpx.HTTPError) as error:  # a TimeoutError is an OSError
            log.warning("jwks_not_read", issuer=self._settings.issuer, kept=len(self._keys), error=repr(error))
        finally:
            self._reading = None

    async def _content(self) -> bytes:
        """The JWKS; raises ValueError where it is none, or too large."""
        if self._settings.jwks_file is not None:
            return await asyncio.to_thread(_read, self._settings.jwks_file)
        assert self._settings.jwks_url is not None
        assert self._ssl is not None
        content = bytearray()
        async with (
            httpx.AsyncClient(verify=self._ssl, timeout=FETCH_SECONDS) as client,
            client.stream("GET", self._settings.jwks_url, headers={"Accept": "application/json"}) as answer,
        ):
            answer.raise_for_status()
            async for part in answer.aiter_bytes():
                content += part
                _check_size(len(content))
        return bytes(content)


def keys_of(content: bytes) -> dict[str, jwt.PyJWK]:
    """The keys of a JWKS that may sign tokens, by their ``kid``; one without has the empty one.

    Others (for encryption, of other algorithms, too short) are passed over.

    Raises:
        ValueError: it is no JWKS, or no key is left.
    """
    document = json.loads(content)
    listed = document.get("keys") if isinstance(document, dict) else None
    if not isinstance(listed, list):
        raise ValueError("it has no list `keys`")
    keys: dict[str, jwt.PyJWK] = {}
    for entry in listed:
        if not isinstance(entry, dict) or entry.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(entry)
        except (jwt.PyJWTError, TypeError):  # TypeError: of a name that is no text
            continue
        weak = isinstance(key.key, RSAPublicKey) and key.key.key_size < MIN_RSA_BITS
        if key.algorithm_name in ALGORITHMS and not weak:
            keys[str(entry.get("kid", ""))] = key
    if not keys:
        raise ValueError(f"it has no key for signatures by {', '.join(sorted(ALGORITHMS))}")
    return keys


def _read(file: Path) -> bytes:
    _check_size(file.stat().st_size)
    return file.read_bytes()


def _check_size(n_bytes: int) -> None:
    if n_bytes > MAX_JWKS_BYTES:
        raise ValueError(f"it has more than {MAX_JWKS_BYTES} bytes")


def _scopes(claim: object) -> frozenset[Scope]:
    """Those of ours; none where the claim is missing or is of another shape."""
    names: Sequence[object] = claim.split() if isinstance(claim, str) else claim if isinstance(claim, list) else ()
    return frozenset(Scope(name) for name in names if isinstance(name, str) and name in list(Scope))
