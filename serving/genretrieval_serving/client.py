"""The client, one class for both transports: ``Client("grpc://host:port")`` or ``Client("http://host:port")``."""

from __future__ import annotations

import json
import random
import re
import ssl
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import grpc
import httpx
from pydantic import ValidationError

from genretrieval.errors import (
    DeadlineError,
    GenRetrievalError,
    InvalidInputError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving import wire
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.messages import (
    BatchRetrieveRequest,
    BatchRetrieveResponse,
    FeedbackEvent,
    RecordEventsRequest,
    RecordEventsResponse,
    ServerInfo,
    error_from,
    error_from_status,
    request_error,
    with_retry,
)

_T = TypeVar("_T")

ATTEMPTS = 4
_SERVICE = "genretrieval.v1.RetrievalService"
_RETRIES = {
    "methodConfig": [
        {
            # Not RecordEvents: a server may have kept the events of a call whose answer was lost.
            "name": [{"service": _SERVICE, "method": name} for name in ("Retrieve", "BatchRetrieve", "GetInfo")],
            "retryPolicy": {
                "maxAttempts": ATTEMPTS,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                # A call that reaches a server while it drains ends as cancelled.
                "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
            },
        }
    ],
    # All addresses that a name has, one after another, as behind a headless service.
    "loadBalancingConfig": [{"round_robin": {}}],
}
_CHANNEL = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    ("grpc.enable_retries", 1),
    # A replica that is back is found before the next one goes: by itself gRPC waits for up to two minutes, and for
    # 20 seconds on a port that is open while its server still starts.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.min_reconnect_backoff_ms", 2000),
]


@dataclass(frozen=True)
class ClientTls:
    """Files in PEM, for ``grpcs`` and ``https``.

    Attributes:
        ca: authorities of servers; by default those that gRPC and certifi bring.
        cert: the client's certificate, for a server that asks for one.
        key: its private key, not encrypted.

    Raises:
        InvalidInputError: one of `cert` and `key` is missing, or a file cannot be used.
    """

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None

    def __post_init__(self) -> None:
        """Find out now, not with the first call."""
        try:
            self.context()
        except (OSError, ValueError) as error:  # an SSLError is an OSError
            raise InvalidInputError(
                f"TLS cannot be used with ca {self.ca}, cert {self.cert} and key {self.key}: {error}"
            ) from error

    def context(self) -> ssl.SSLContext:
        """For ``https``."""
        context = httpx.create_ssl_context() if self.ca is None else ssl.create_default_context(cafile=self.ca)
        if self.cert is not None and self.key is not None:
            context.load_cert_chain(self.cert, self.key, password=b"")
        elif self.cert is not None or self.key is not None:
            raise ValueError("a certificate and its key belong together; give both")
        return context

    def credentials(self) -> grpc.ChannelCredentials:
        """For ``grpcs``."""
        ca, key, cert = (None if file is None else file.read_bytes() for file in (self.ca, self.key, self.cert))
        return grpc.ssl_channel_credentials(ca, key, cert)


class _Transport(Protocol):
    def retrieve(self, request: RetrieveRequest) -> RetrieveResponse: ...
    def batch_retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse | GenRetrievalError]: ...
    def record_events(self, events: Sequence[FeedbackEvent]) -> RecordEventsResponse: ...
    def info(self) -> ServerInfo: ...
    def close(self) -> None: ...


class Client:
    """Talks to one server. Safe to share between threads.

    A server that cannot be reached is tried again a few times (gRPC: also one that is draining), and so is one that is
    overloaded, when it says and if the timeout allows it. Errors of the server arrive as the same classes of
    `genretrieval.errors` that it raised.
    """

    def __init__(
        self, url: str, timeout: float = 10.0, *, api_key: str | None = None, tls: ClientTls | None = None
    ) -> None:
        """Connect lazily.

        Args:
            url: ``grpc://host:port`` or ``http://host:port``, with TLS ``grpcs`` or ``https``; or several replicas by
                their addresses, ``grpc://10.0.0.1:8081,10.0.0.2:8081``, which take turns and stand in for one another.
            timeout: seconds for a call with its retries; the server gives up on it then, too.
            api_key: API key or token, for a server that needs one; without TLS it is sent as it is, so keep to a
                trusted network.
            tls: authorities and certificate, where not the usual ones.

        Raises:
            InvalidInputError: `url` has another scheme, or the key cannot be sent.
        """
        scheme, address = urlsplit(url).scheme, urlsplit(url).netloc
        if scheme not in ("grpc", "grpcs", "http", "https") or not address:
            raise InvalidInputError(f"{url!r} is no server's address; expected grpc://host:port or http://...")
        authorization = bearer(api_key)
        tls = tls_for(scheme, tls)
        self._transport: _Transport = (
            _Grpc(address, timeout, authorization, tls)
            if scheme.startswith("grpc")
            else _Http(url.rstrip("/"), timeout, authorization, tls)
        )

    def retrieve(self, request: RetrieveRequest | None = None, /, **fields: Any) -> RetrieveResponse:
        """Items for a request, given whole or by its fields.

        Raises:
            RequestError: the request is malformed, or the server cannot answer it as asked.
            UnavailableError: the server cannot be reached, is not ready, or is overloaded (`OverloadedError`).
            DeadlineError: the timeout passed.
        """
        if request is not None and fields:
            raise InvalidInputError("give a RetrieveRequest or its fields, not both")
        if request is None:
            try:
                request = RetrieveRequest.model_validate(fields)
            except ValidationError as error:
                raise request_error(error.errors()) from error
        return self._transport.retrieve(request)

    def batch_retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse | GenRetrievalError]:
        """A response or an error for each request, in order; raises as `retrieve` if the call fails."""
        return self._transport.batch_retrieve(requests)

    def record_events(self, events: Sequence[FeedbackEvent | Mapping[str, Any]]) -> RecordEventsResponse:
        """Tell what somebody did with items; each event whole or by its fields.

        Raises:
            RequestError: an event is malformed, or the server keeps none.
            OverloadedError: the server cannot write them fast enough; try again later.
            GenRetrievalError: what `retrieve` raises.
        """
        try:
            taken = [e if isinstance(e, FeedbackEvent) else FeedbackEvent.model_validate(e) for e in events]
        except ValidationError as error:
            raise request_error(error.errors()) from error
        return self._transport.record_events(taken)

    def info(self) -> ServerInfo:
        """What is being served, and its limits."""
        return self._transport.info()

    def close(self) -> None:
        """Close connections."""
        self._transport.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close connections."""
        self.close()


class _Grpc:
    """Retries by the channel's retry policy."""

    def __init__(self, address: str, timeout: float, authorization: dict[str, str], tls: ClientTls | None) -> None:
        target = f"ipv4:{address}" if "," in address else address
        self.channel = (
            grpc.insecure_channel(target, options=_CHANNEL)
            if tls is None
            else grpc.secure_channel(target, tls.credentials(), options=_CHANNEL)
        )
        self.stub = stubs.RetrievalServiceStub(self.channel)  # type: ignore[no-untyped-call]
        self.timeout = timeout
        self.metadata = tuple((name.lower(), value) for name, value in authorization.items())

    def retrieve(self, request: RetrieveRequest) -> RetrieveResponse:
        return wire.response_from_proto(self._call(self.stub.Retrieve, wire.request_to_proto(request)))

    def batch_retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse | GenRetrievalError]:
        message = pb.BatchRetrieveRequest(requests=[wire.request_to_proto(request) for request in requests])
        answer = self._call(self.stub.BatchRetrieve, message)
        return [wire.outcome_from_proto(result) for result in answer.results]

    def record_events(self, events: Sequence[FeedbackEvent]) -> RecordEventsResponse:
        return wire.recorded_from_proto(self._call(self.stub.RecordEvents, wire.events_to_proto(events)))

    def info(self) -> ServerInfo:
        return wire.info_from_proto(self._call(self.stub.GetInfo, pb.GetInfoRequest()))

    def close(self) -> None:
        self.channel.close()

    def _call(self, method: Any, message: Any) -> Any:
        def call(left: float) -> Any:
            try:
                return method(message, timeout=left, metadata=self.metadata)
            except grpc.RpcError as error:
                raise _grpc_error(error) from error

        return _patiently(call, self.timeout)


def _grpc_error(error: Any) -> GenRetrievalError:
    """The error of a failed call; without a `reason` of ours, gRPC itself failed and its code decides."""
    told = dict(error.trailing_metadata() or ())
    kinds = {
        grpc.StatusCode.UNAVAILABLE: UnavailableError,
        grpc.StatusCode.CANCELLED: UnavailableError,
        grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
        # Not our queue, which has a reason: a message over the size limit.
        grpc.StatusCode.RESOURCE_EXHAUSTED: RequestError,
        grpc.StatusCode.INVALID_ARGUMENT: RequestError,
    }
    otherwise = kinds.get(error.code(), GenRetrievalError)
    return with_retry(error_from(told.get("reason", ""), error.details() or "", otherwise=otherwise), told)


class _Http:
    """Retries connecting, by httpx."""

    def __init__(self, url: str, timeout: float, authorization: dict[str, str], tls: ClientTls | None) -> None:
        self.timeout = timeout
        self.client = httpx.Client(
            base_url=url,
            headers=authorization,
            transport=httpx.HTTPTransport(retries=ATTEMPTS - 1, verify=tls is None or tls.context()),
        )

    def retrieve(self, request: RetrieveRequest) -> RetrieveResponse:
        body = self._call("POST", "/v1/retrieve", request.model_dump_json())
        return RetrieveResponse.model_validate_json(body)

    def batch_retrieve(self, requests: Sequence[RetrieveRequest]) -> list[RetrieveResponse | GenRetrievalError]:
        # Built without a check: an empty batch is refused by the server, as by gRPC.
        batch = BatchRetrieveRequest.model_construct(requests=list(requests))
        body = self._call("POST", "/v1/retrieve:batch", batch.model_dump_json())
        results = BatchRetrieveResponse.model_validate_json(body).results
        outcomes: list[RetrieveResponse | GenRetrievalError] = []
        for result in results:
            if result.error is not None:
                outcomes.append(error_from(result.error.reason, result.error.detail, otherwise=GenRetrievalError))
            elif result.response is not None:
                outcomes.append(result.response)
        return outcomes

    def record_events(self, events: Sequence[FeedbackEvent]) -> RecordEventsResponse:
        body = RecordEventsRequest.model_construct(events=list(events)).model_dump_json()
        return RecordEventsResponse.model_validate_json(self._call("POST", "/v1/events", body))

    def info(self) -> ServerInfo:
        return ServerInfo.model_validate_json(self._call("GET", "/v1/info", None))

    def close(self) -> None:
        self.client.close()

    def _call(self, method: str, path: str, body: str | None) -> bytes:
        def call(left: float) -> bytes:
            headers = {"Content-Type": "application/json", "X-Request-Timeout": str(left)}
            request = self.client.build_request(method, path, content=body, headers=headers, timeout=left)
            return answered(self.client, request).content

        return _patiently(call, self.timeout)


def _patiently(call: Callable[[float], _T], timeout: float) -> _T:
    """What a call brings within `timeout` seconds; one that is refused for now comes again when the server says."""
    until, attempt = time.monotonic() + timeout, 0
    while True:
        attempt += 1
        try:
            return call(until - time.monotonic())
        except OverloadedError as error:
            # Not all at the same moment.
            pause = error.retry_after * random.uniform(1.0, 1.5)
            if attempt == ATTEMPTS or pause >= until - time.monotonic():
                raise
        time.sleep(pause)


def tls_for(scheme: str, tls: ClientTls | None) -> ClientTls | None:
    """How a scheme is spoken; None is in the clear.

    Raises:
        InvalidInputError: files are given for a scheme that uses none.
    """
    if scheme in ("grpcs", "https"):
        return tls or ClientTls()
    if tls is not None:
        raise InvalidInputError(f"{scheme}:// is without TLS; give grpcs:// or https://, or no files for it")
    return None


def bearer(api_key: str | None) -> dict[str, str]:
    """The header that carries an API key; none without.

    Raises:
        InvalidInputError: it is no key, as it has other characters than one.
    """
    if api_key is None:
        return {}
    if not re.fullmatch(r"[!-~]+", api_key):
        raise InvalidInputError("the API key has spaces or letters that no key has; copy it again, without line ends")
    return {"Authorization": f"Bearer {api_key}"}


def answered(client: httpx.Client, request: httpx.Request) -> httpx.Response:
    """Send a request; a successful answer.

    Raises:
        GenRetrievalError: as the server raised it.
        DeadlineError: no answer came in time.
        UnavailableError: the server cannot be reached.
    """
    try:
        answer = client.send(request)
    except httpx.TimeoutException as error:
        raise DeadlineError(f"no answer from {client.base_url} in time") from error
    except httpx.TransportError as error:
        raise UnavailableError(f"{client.base_url} cannot be reached: {error}") from error
    if answer.is_success:
        return answer
    try:
        problem = answer.json()
    except ValueError:
        problem = {}
    refused = error_from_status(answer.status_code, problem if isinstance(problem, dict) else {}, answer.text)
    raise with_retry(refused, answer.headers)
