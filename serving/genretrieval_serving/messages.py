"""Messages of server and client beside the core's: batches, errors on the wire, what is being served."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from genretrieval.errors import GenRetrievalError, RequestError, UnavailableError
from genretrieval.request import (
    MAX_BEAM_WIDTH,
    MAX_HISTORY_EVENTS,
    MAX_TIMESTAMP,
    MAX_TOP_K,
    Id,
    RetrieveRequest,
    RetrieveResponse,
)

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_BATCH_REQUESTS = 32
MAX_EVENTS = 1000


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Problem(_Message):
    """An error as RFC 9457 problem+json; `reason` is stable, `detail` is for people."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    reason: str

    @classmethod
    def of(cls, error: GenRetrievalError) -> Problem:
        """The error on the wire; its codes come from its class."""
        return cls(
            title=HTTPStatus(error.http_status).phrase,
            status=error.http_status,
            detail=str(error),
            reason=error.reason,
        )


def retry_headers(error: GenRetrievalError) -> dict[str, str]:
    """When a call that was refused for now may come again; headers of REST, trailing metadata of gRPC.

    ``retry-after`` has whole seconds, as HTTP wants; a queue is often shorter than one, so ``retry-after-ms`` is there
    for those who read it.
    """
    if not isinstance(error, UnavailableError):
        return {}
    seconds = max(error.retry_after, 0.001)
    return {"retry-after": str(math.ceil(seconds)), "retry-after-ms": str(math.ceil(seconds * 1e3))}


def with_retry(error: GenRetrievalError, headers: Mapping[str, str]) -> GenRetrievalError:
    """The error, knowing what `retry_headers` said of it; a proxy may say less, or a date, which nothing reads."""
    said = {name: headers.get(name, "") for name in ("retry-after", "retry-after-ms")}
    if isinstance(error, UnavailableError) and said["retry-after-ms"].isdecimal():
        error.retry_after = int(said["retry-after-ms"]) / 1e3
    elif isinstance(error, UnavailableError) and said["retry-after"].isdecimal():
        error.retry_after = float(said["retry-after"])
    return error


class BatchRetrieveRequest(_Message):
    """Several requests at once; a server's limit is `max_batch_requests` of its info."""

    requests: list[RetrieveRequest] = Field(min_length=1)


class BatchResult(_Message):
    """Either a response or what went wrong with this one request."""

    response: RetrieveResponse | None = None
    error: Problem | None = None

    @classmethod
    def of(cls, outcome: RetrieveResponse | GenRetrievalError) -> BatchResult:
        """Wrap an outcome."""
        if isinstance(outcome, GenRetrievalError):
            return cls(error=Problem.of(outcome))
        return cls(response=outcome)


class BatchRetrieveResponse(_Message):
    """One result for every request, in their order."""

    results: list[BatchResult]


class FeedbackEvent(_Message):
    """What somebody did with an item: it was seen, clicked, put into the cart, purchased."""

    item_id: Id
    event: str = Field(
        min_length=1,
        max_length=64,
        description="Behaviour in the words of the training logs, e.g. click or purchase; exposure: it was seen.",
    )
    attribution_token: str | None = Field(
        default=None, max_length=256, description="Of the answer that brought the item; none for what has no answer."
    )
    user_id: str | None = Field(
        default=None, max_length=512, description="Whose history it joins; stored in logs as a keyed hash alone."
    )
    timestamp: int | None = Field(
        default=None, ge=0, le=MAX_TIMESTAMP, strict=True, description="Unix seconds; by default when it arrived."
    )
    value: float | None = Field(default=None, allow_inf_nan=False, strict=True, description="Amount or quantity.")

    @model_validator(mode="after")
    def _belongs_somewhere(self) -> Self:
        if not self.attribution_token and not self.user_id:
            raise ValueError("needs an attribution_token or a user_id: without both it belongs to nothing")
        return self


class RecordEventsRequest(_Message):
    """Events, sent back by whoever shows what was retrieved."""

    events: list[FeedbackEvent] = Field(min_length=1, max_length=MAX_EVENTS)


class RecordEventsResponse(_Message):
    """The events were taken; they are in files within a minute."""

    accepted: int
    degraded: list[str] = Field(
        default_factory=list, description="`history_unavailable`: some users' next requests will not see them."
    )


class Limits(_Message):
    """A request beyond one of these is refused."""

    max_top_k: int = MAX_TOP_K
    max_beam_width: int = MAX_BEAM_WIDTH
    max_history_events: int = MAX_HISTORY_EVENTS
    max_events: int = MAX_EVENTS
    max_batch_requests: int = MAX_BATCH_REQUESTS
    max_body_bytes: int = MAX_BODY_BYTES


class ServerInfo(_Message):
    """What is being served."""

    server_version: str
    bundle_version: str
    bundle_uuid: str
    n_items: int
    default_beam_width: int
    max_history: int = Field(description="Newest interactions of a history that the model reads in full.")
    max_past: int = Field(description="Events before those, exposures among them, that it reads compressed.")
    scenarios: list[str] = Field(description="Values of `scenario` that it knows.")
    reads_queries: bool
    limits: Limits


def _tree(kind: type[GenRetrievalError]) -> Iterator[type[GenRetrievalError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _tree(child)


def error_from(reason: str, detail: str, *, otherwise: type[GenRetrievalError]) -> GenRetrievalError:
    """The error that was put on the wire; `otherwise` where `reason` is none of ours, as from a proxy."""
    kinds = {kind("").reason: kind for kind in _tree(GenRetrievalError)}
    return kinds.get(reason, otherwise)(detail)


def error_from_status(status: int, body: dict[str, Any], text: str) -> GenRetrievalError:
    """The error of an HTTP answer; without a `reason` of ours, the status decides."""
    retry = status in (429, 502, 503, 504)
    kind = UnavailableError if retry else RequestError if status < 500 else GenRetrievalError
    detail = str(body.get("detail") or f"HTTP {status}: {text[:200]}")
    return error_from(str(body.get("reason", "")), detail, otherwise=kind)


def request_error(problems: Sequence[Any]) -> RequestError:
    """What pydantic found wrong with a request in one message: ``history.3.item_id: Field required``."""
    places = (".".join(str(part) for part in p["loc"] if part != "body") or "body" for p in problems)
    return RequestError("; ".join(f"{place}: {p['msg']}" for place, p in zip(places, problems, strict=True)))
