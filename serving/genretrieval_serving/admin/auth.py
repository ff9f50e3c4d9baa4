"""Who calls, and what the caller may do: API keys and tokens, the same on every port.

A key is sent as ``Authorization: Bearer grk_...`` (gRPC: metadata ``authorization``). The store knows keys by a hash;
what it said is kept for `CACHE_SECONDS`, so that retrieval does not ask SQL each time and a revoked key stops working
within that time. What does not begin as a key is a token of an identity provider, where the server takes those.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import structlog

from genretrieval.errors import PermissionDeniedError, UnauthenticatedError, UnavailableError
from genretrieval_serving.admin.resources import Scope

if TYPE_CHECKING:
    from genretrieval_serving.admin.tokens import Tokens

log = structlog.get_logger(__name__)

KEY_PREFIX = "grk_"
CACHE_SECONDS = 3.0
# A store that is away does not stop retrieval: keys it knew before are taken for so long.
AWAY_SECONDS = 3600.0
# So long a call waits for a silent store about a key that it knew before.
PATIENCE_SECONDS = 0.5
MAX_CACHED = 10_000
# Refusals are kept apart: whoever tries many keys pushes out no good one.
MAX_REFUSED = 1_000
# Questions to the store at once: fewer than the threads that there are on a machine of one CPU, five.
MAX_ASKING = 4
_INCLUDES = {Scope.ADMIN_WRITE: frozenset({Scope.ADMIN_READ})}


class KeyStore(Protocol):
    """What knows keys. It says `UnavailableError` when it cannot be asked."""

    def verify_key(self, secret: str) -> tuple[str, frozenset[Scope]]:
        """Principal and scopes of an active key; `UnauthenticatedError` for any other."""
        ...

    def list_keys(self) -> Sequence[object]:
        """All keys that were ever made."""
        ...


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls."""

    name: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether it has a scope, itself or by a wider one."""
        return scope in self.scopes or any(scope in _INCLUDES.get(held, ()) for held in self.scopes)


ANONYMOUS = Principal("anonymous", frozenset(Scope))


@dataclass(frozen=True, slots=True)
class _Known:
    """What the store said of a key and when, and when it was last asked, whether or not it could answer."""

    principal: Principal | None
    refusal: str
    said_at: float
    asked_at: float


class Authenticator:
    """Decides for every call. Used in one event loop."""

    def __init__(
        self,
        keys: KeyStore | None = None,
        *,
        tokens: Tokens | None = None,
        always: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ask `keys` whether there is any.

        Args:
            keys: where keys are known.
            tokens: what checks tokens. Without `tokens` and `keys` everybody may do everything.
            always: keys are required although none may have been made. Else they are from the first one on, for
                good: revoking the last one opens nothing. With `tokens` it is so in any case.
            clock: seconds.
        """
        self._keys, self._tokens, self._clock = keys, tokens, clock
        self._known: dict[bytes, _Known] = {}
        self._refused: dict[bytes, _Known] = {}
        self._may_ask = asyncio.Semaphore(MAX_ASKING)
        self._asking: dict[bytes, asyncio.Task[_Known]] = {}
        self._required = always or tokens is not None or (keys is not None and bool(keys.list_keys()))
        self._look_again = clock() + CACHE_SECONDS
        self._looking: asyncio.Task[None] | None = None

    @property
    def required(self) -> bool:
        """Whether calls need a key or a token."""
        return self._required

    async def prepare(self) -> None:
        """Do before the first call what it would wait for; what fails is logged and done with that call."""
        if self._tokens is not None:
            await self._tokens.refresh()

    async def allow(self, authorization: str | None, scope: Scope) -> Principal:
        """Who calls, if the caller may.

        Raises:
            UnauthenticatedError: there is no key, or none that is known.
            PermissionDeniedError: the key lacks the scope.
            UnavailableError: the store cannot be asked about a key that it has not seen lately, or the issuer about
                any token.
        """
        if not self._required:
            await self._look_for_keys()
        if not self._required or (self._keys is None and self._tokens is None):
            return ANONYMOUS
        kind, _, secret = (authorization or "").partition(" ")
        secret = secret.strip()
        if kind.lower() != "bearer" or not secret:
            raise UnauthenticatedError(f"this server needs {self._wanted}")
        if self._tokens is not None and not secret.startswith(KEY_PREFIX):
            principal, held = Principal(*await self._tokens.verify(secret)), "token"
        elif self._keys is None:
            raise UnauthenticatedError(f"this server has no API keys, it needs {self._wanted}")
        else:
            known = await self._look_up(self._keys, secret)
            if known.principal is None:
                raise UnauthenticatedError(known.refusal)
            principal, held = known.principal, "API key"
        if not principal.may(scope):
            raise PermissionDeniedError(
                f"the {held} of {principal.name} lacks the scope {scope.value}; "
                f"it has {', '.join(sorted(principal.scopes)) or 'none'}"
            )
        return principal

    @property
    def _wanted(self) -> str:
        key = f"an API key: send it as `Authorization: Bearer {KEY_PREFIX}...`; `genretrieval keys create` makes one"
        other = "a token of its identity provider: send it as `Authorization: Bearer ...`"
        return key if self._tokens is None else other if self._keys is None else f"{other}; or {key}"

    async def _look_for_keys(self) -> None:
        """Ask now and then whether there is a key by now; a silent store holds up no call for long."""
        keys, now = self._keys, self._clock()
        if keys is None or self._looking is not None or now < self._look_again:
            return
        self._look_again = now + CACHE_SECONDS

        async def look() -> None:
            try:
                self._required = bool(await asyncio.to_thread(keys.list_keys))
            except UnavailableError as error:
                log.warning("keys_unknown", error=str(error))
            finally:
                self._looking = None

        self._looking = asyncio.create_task(look(), name="look-for-keys")
        await asyncio.wait((self._looking,), timeout=PATIENCE_SECONDS)

    async def _look_up(self, keys: KeyStore, secret: str) -> _Known:
        digest = hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()
        known = self._known.get(digest) or self._refused.get(digest)
        if known is not None and self._clock() < known.asked_at + CACHE_SECONDS:
            return known
        # One question for all calls that wait for its answer, whichever of them goes away meanwhile.
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._ask(keys, secret, known))
            task.add_done_callback(lambda done: self._answered(digest, done))
        if known is None or not self._outlasts(known):
            return await asyncio.shield(task)
        await asyncio.wait((task,), timeout=PATIENCE_SECONDS)
        if task.done():
            return task.result()
        known = replace(known, asked_at=self._clock())
        self._remember(digest, known)
        return known

    async def _ask(self, keys: KeyStore, secret: str, before: _Known | None) -> _Known:
        async with self._may_ask:
            now = self._clock()
            try:
                name, scopes = await asyncio.to_thread(keys.verify_key, secret)
            except UnauthenticatedError as error:
                return _Known(None, str(error), now, now)
            except UnavailableError:
                if before is None or not self._outlasts(before):
                    raise
                # Not `now`: a store that fails slowly would be waited for by every call.
                return replace(before, asked_at=self._clock())
            return _Known(Principal(name, scopes), "", now, now)

    def _outlasts(self, known: _Known) -> bool:
        """Whether a key is taken although the store is away."""
        return known.principal is not None and self._clock() < known.said_at + AWAY_SECONDS

    def _answered(self, digest: bytes, task: asyncio.Task[_Known]) -> None:
        """Keep an answer, also one that nobody waits for any more."""
        del self._asking[digest]
        if not task.cancelled() and task.exception() is None:
            self._remember(digest, task.result())

    def _remember(self, digest: bytes, known: _Known) -> None:
        """Keep what is known of a key, as the last one to be forgotten of its cache."""
        for cache in (self._known, self._refused):
            cache.pop(digest, None)
        cache, most = (self._refused, MAX_REFUSED) if known.principal is None else (self._known, MAX_CACHED)
        while len(cache) >= most:
            cache.pop(next(iter(cache)))
        cache[digest] = known
