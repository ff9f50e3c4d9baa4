"""gRPC: the same operations as REST, health by service name, reflection.

For callers that may mean no good: who calls is known before a message is read, a message is there within a minute or
never, and connections, calls and messages under way are bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from genretrieval.errors import GenRetrievalError, OverloadedError, RequestError
from genretrieval_serving import tracing, wire
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.admin.auth import Authenticator, Principal
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.messages import MAX_BODY_BYTES, retry_headers
from genretrieval_serving.observability import request_id
from genretrieval_serving.service import RetrievalService
from genretrieval_serving.tracing import Tracer

log = structlog.get_logger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["RetrievalService"].full_name
# The names a health check may ask for: the server as a whole, and its one service.
HEALTH_NAMES = (health.OVERALL_HEALTH, SERVICE)
# Codes of a call that failed by no fault of its caller.
FAULTS = frozenset({"UNKNOWN", "INTERNAL", "UNAVAILABLE", "DEADLINE_EXCEEDED"})

# As of REST: from when a call begins until its message is there.
RECEIVE_SECONDS = 60.0
# Messages that are not there yet, of all connections; each may take up to `MAX_BODY_BYTES`. Less of what needs no key.
MAX_UNDER_WAY, MAX_OPEN_UNDER_WAY = 64, 8
# What is beyond that has so long.
SLOW_SECONDS = 1.0
# Of what needs no key: watchers of health and streams of reflection, and the bytes of a message, which says a name and
# is held as long as its stream.
MAX_OPEN_STREAMS, MAX_OPEN_BYTES = 256, 1024
# A call that was cancelled looks at first like one without a message.
_CANCEL_SECONDS = 0.05
MAX_CONNECTIONS = 1000
OPTIONS = (
    # A port that is taken is an error, not a second server behind it.
    ("grpc.so_reuseport", 0),
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    # Whoever connects and says nothing: two minutes by default.
    ("grpc.server_handshake_timeout_ms", 20_000),
    # Of one connection; further calls wait at the client. That many keep a server busy, and it would refuse more.
    ("grpc.max_concurrent_streams", 64),
    # A batch of 32 requests with all that each may carry comes near it.
    ("grpc.max_receive_message_length", MAX_BODY_BYTES),
    # What is not asked for yet stays with the caller, but for 64 KiB a call. By default windows grow with the speed of
    # the link, and whole messages are taken in before it is known who calls.
    ("grpc.http2.bdp_probe", 0),
    # Room for a token with many claims. By default what is over 8 KiB is refused at random, the more often the longer.
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 16 * 1024),
    # A client that is told to connect anew asks DNS again: that is how it finds a replica that was added. No call is
    # lost by it, whereas a limit of idle time would cut off the call that comes just then. Calls in flight have the
    # grace, and a connection is closed at its end whatever it holds.
    ("grpc.max_connection_age_ms", 120_000),
    ("grpc.max_connection_age_grace_ms", 60_000),
    # Ours finds clients that went without a word. Which of the two timeouts counts depends on the release of gRPC.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.ping_timeout_ms", 10_000),
    # Theirs: clients may ask every 10 seconds, also between calls, for which they are cut off by default. Enforced is
    # half of that, because pings may arrive closer together than they were sent.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
)


class _Arrivals:
    """Messages that are under way, of all calls together. gRPC takes them into memory as they come."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._begun: dict[asyncio.Timeout, float] = {}  # the oldest first

    async def message(self, context: Any) -> Any:
        """The next message of a call, or ``grpc.aio.EOF``.

        Raises:
            OverloadedError: it is slow, and too many are under way.
            RequestError: it is not there in time.
        """
        self._make_room()
        try:
            async with asyncio.timeout(RECEIVE_SECONDS) as limit:
                self._begun[limit] = asyncio.get_running_loop().time()
                return await context.read()
        except TimeoutError:
            if self._begun.pop(limit, None) is not None:
                raise RequestError(f"the message was not there within {RECEIVE_SECONDS:g} seconds") from None
            raise OverloadedError(f"{self._most} messages are under way, and this one was slow") from None
        finally:
            self._begun.pop(limit, None)

    async def only_message(self, context: Any) -> Any:
        """The message of a call that has one; raises as `message`, also where there is none."""
        message = await self.message(context)
        if message is grpc.aio.EOF:
            await asyncio.sleep(_CANCEL_SECONDS)
            raise RequestError("the call has no message")
        return message

    async def messages(self, context: Any) -> AsyncIterator[Any]:
        """All messages of a call; raises as `message`."""
        while (message := await self.message(context)) is not grpc.aio.EOF:
            yield message

    def _make_room(self) -> None:
        """Give up the oldest, or soon: one that is young may be there and just not have been looked at."""
        if len(self._begun) < self._most:
            return
        oldest, begun = next(iter(self._begun.items()))
        del self._begun[oldest]
        if not oldest.expired():
            oldest.reschedule(max(begun + SLOW_SECONDS, asyncio.get_running_loop().time()))


class _Servicer(stubs.RetrievalServiceServicer):
    """Between messages and `RetrievalService`."""

    def __init__(
        self,
        service: RetrievalService,
        auth: Authenticator,
        arrivals: _Arrivals,
        *,
        quiet: bool,
        tracer: Tracer | None,
    ) -> None:
        self.service, self.auth, self.arrivals, self.quiet, self.tracer = service, auth, arrivals, quiet, tracer

    async def Retrieve(self, _: Any, context: Any) -> Any:  # noqa: N802
        async def call(caller: Principal, message: Any) -> Any:
            request = wire.request_from_proto(message)
            return wire.response_to_proto(await self.service.retrieve(request, context.time_remaining(), caller))

        return await self._call("retrieve", call, context, takes_room=True)

    async def BatchRetrieve(self, _: Any, context: Any) -> Any:  # noqa: N802
        async def call(caller: Principal, message: Any) -> Any:
            requests = wire.batch_from_proto(message)
            outcomes = await self.service.batch_retrieve(requests, context.time_remaining(), caller)
            return pb.BatchRetrieveResponse(results=[wire.outcome_to_proto(outcome) for outcome in outcomes])

        return await self._call("batchRetrieve", call, context, takes_room=True)

    async def RecordEvents(self, _: Any, context: Any) -> Any:  # noqa: N802
        async def call(caller: Principal, message: Any) -> Any:
            events = wire.events_from_proto(message)
            return wire.recorded_to_proto(await self.service.record_events(events, caller))

        return await self._call("recordEvents", call, context)

    async def GetInfo(self, _: Any, context: Any) -> Any:  # noqa: N802
        async def call(_caller: Principal, _message: Any) -> Any:
            return wire.info_to_proto(self.service.info())

        return await self._call("getInfo", call, context)

    async def _call(
        self, method: str, call: Callable[[Principal, Any], Awaitable[Any]], context: Any, *, takes_room: bool = False
    ) -> Any:
        """Around every call: who calls, its message, its request id, its error's code, its metric and its log line."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        id_ = request_id(metadata.get("x-request-id"))
        # What gRPC answers for an error that is none of ours.
        code, begun = "UNKNOWN", time.perf_counter()
        with tracing.call(self.tracer, "grpc", metadata, id_) as traced:
            try:
                try:
                    caller = await self.auth.allow(metadata.get("authorization"), Scope.RETRIEVE)
                    if takes_room:
                        self.service.check_room(caller)
                    try:
                        message = await self.arrivals.only_message(context)
                    finally:
                        # What a caller takes to send is not the server's time.
                        begun = time.perf_counter()
                    if isinstance(message, DecodeError):
                        raise RequestError(f"the message is no protobuf of this call: {message}")
                    answer = await call(caller, message)
                except GenRetrievalError as error:
                    code = error.grpc_code
                    await _abort(context, error, ("x-request-id", id_))
                # At the end, with the answer: a call that has begun to be answered is never tried on another replica.
                context.set_trailing_metadata((("x-request-id", id_),))
                code = "OK"
                return answer
            except asyncio.CancelledError:
                # The caller went away, or its deadline passed.
                code = "CANCELLED"
                raise
            finally:
                seconds = time.perf_counter() - begun
                self.service.metrics.request_duration.labels("grpc", method, code).observe(seconds)
                traced.ended(method, code, failed=code in FAULTS)
                if not self.quiet:
                    log.info("request", transport="grpc", method=method, code=code, ms=round(seconds * 1e3, 3))


async def _abort(context: Any, error: GenRetrievalError, *metadata: tuple[str, str]) -> None:
    """End a call with an error."""
    told = (("reason", error.reason), *metadata, *retry_headers(error).items())
    await context.abort(grpc.StatusCode[error.grpc_code], str(error), trailing_metadata=told)


def _handlers(servicer: _Servicer) -> dict[str, Any]:
    """As the generated code would register the servicer, with two differences that callers do not see.

    A handler of one message is called when it is there; one of several reads them itself, when it knows who calls. And
    bytes that are no message are the caller's fault, where gRPC takes an exception of a deserialiser for the server's.
    """

    def decode(kind: Any) -> Callable[[bytes], Any]:
        def decoded(content: bytes) -> Any:
            try:
                return kind.FromString(content)
            except DecodeError as error:
                return error

        return decoded

    return {
        method.name: grpc.stream_unary_rpc_method_handler(
            getattr(servicer, method.name),
            request_deserializer=decode(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in pb.DESCRIPTOR.services_by_name["RetrievalService"].methods
    }


class _Open:
    """What whoever connects may ask for, without a key: few at a time, in few bytes."""

    def __init__(self) -> None:
        self._arrivals = _Arrivals(MAX_OPEN_UNDER_WAY)
        self._n_streams = 0

    async def message(self, context: Any) -> Any:
        """The message of a call that has one."""
        return _small(await self._arrivals.only_message(context))

    async def messages(self, context: Any) -> AsyncIterator[Any]:
        """All messages of a call."""
        async for message in self._arrivals.messages(context):
            yield _small(message)

    @asynccontextmanager
    async def call(self, context: Any, *, stream: bool = False) -> AsyncIterator[None]:
        """Around a call: what it is refused for."""
        self._n_streams += stream
        try:
            if self._n_streams > MAX_OPEN_STREAMS and stream:
                raise OverloadedError(f"{MAX_OPEN_STREAMS} streams are open that need no key")
            yield
        except GenRetrievalError as error:
            await _abort(context, error)
        finally:
            self._n_streams -= stream


def _small(message: Any) -> Any:
    if message.ByteSize() > MAX_OPEN_BYTES:
        raise RequestError(f"the message has {message.ByteSize()} bytes; {MAX_OPEN_BYTES} are enough for any name")
    return message


class Health:
    """What health checks by gRPC are told."""

    def __init__(self, server: grpc.aio.Server, open_: _Open) -> None:
        """Answer on `server`: not serving."""
        self._servicer, self._open = health.aio.HealthServicer(), open_
        self._watchers: set[asyncio.Task[Any]] = set()
        self._ended = False
        decode, encode = health_pb2.HealthCheckRequest.FromString, health_pb2.HealthCheckResponse.SerializeToString
        handlers = {
            "Check": grpc.stream_unary_rpc_method_handler(self._check, decode, encode),
            "Watch": grpc.stream_stream_rpc_method_handler(self._watch, decode, encode),
        }
        server.add_registered_method_handlers(health.SERVICE_NAME, handlers)

    async def set(self, *, serving: bool) -> None:
        """Whether to send requests here."""
        status = health_pb2.HealthCheckResponse
        for name in HEALTH_NAMES:
            await self._servicer.set(name, status.SERVING if serving else status.NOT_SERVING)

    async def drain(self) -> None:
        """Not serving, for good."""
        await self._servicer.enter_graceful_shutdown()

    def end(self) -> None:
        """Let go of those who watch: a server that stops waits for every call."""
        self._ended = True
        for watcher in self._watchers:
            watcher.cancel()

    async def _check(self, _: Any, context: Any) -> Any:
        async with self._open.call(context):
            return await self._servicer.Check(await self._open.message(context), context)

    async def _watch(self, _: Any, context: Any) -> None:
        watcher = asyncio.current_task()
        assert watcher is not None
        async with self._open.call(context, stream=True):
            message = await self._open.message(context)
            self._watchers.add(watcher)
            try:
                await self._servicer.Watch(message, context)
            except asyncio.CancelledError:
                if not self._ended:
                    raise
                watcher.uncancel()
            finally:
                self._watchers.discard(watcher)


def _add_reflection(server: grpc.aio.Server, open_: _Open) -> None:
    """Reflection, open as well."""
    servicer = reflection.aio.ReflectionServicer((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME))

    async def reflect(_: Any, context: Any) -> AsyncIterator[Any]:
        async with open_.call(context, stream=True):
            async for answer in servicer.ServerReflectionInfo(open_.messages(context), context):
                yield answer

    handler = grpc.stream_stream_rpc_method_handler(
        reflect,
        reflection_pb2.ServerReflectionRequest.FromString,
        reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_registered_method_handlers(reflection.SERVICE_NAME, {"ServerReflectionInfo": handler})


def create_server(
    service: RetrievalService, auth: Authenticator, *, quiet: bool = False, tracer: Tracer | None = None
) -> tuple[grpc.aio.Server, Health]:
    """The gRPC server over `service`, without a port, and its health, which says not serving."""
    server, open_ = grpc.aio.server(options=OPTIONS), _Open()
    servicer = _Servicer(service, auth, _Arrivals(MAX_UNDER_WAY), quiet=quiet, tracer=tracer)
    server.add_registered_method_handlers(SERVICE, _handlers(servicer))
    _add_reflection(server, open_)
    return server, Health(server, open_)
