"""gRPC: the same operations as REST, health by service name, reflection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from genretrieval.errors import GenRetrievalError, RequestError
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


class _Servicer(stubs.RetrievalServiceServicer):
    """Between messages and `RetrievalService`."""

    def __init__(self, service: RetrievalService, auth: Authenticator, *, quiet: bool, tracer: Tracer | None) -> None:
        self.service, self.auth, self.quiet, self.tracer = service, auth, quiet, tracer

    async def Retrieve(self, message: Any, context: Any) -> Any:  # noqa: N802
        async def call(caller: Principal) -> Any:
            self.service.check_room(caller)
            request = wire.request_from_proto(message)
            return wire.response_to_proto(await self.service.retrieve(request, context.time_remaining(), caller))

        return await self._call("retrieve", message, call, context)

    async def BatchRetrieve(self, message: Any, context: Any) -> Any:  # noqa: N802
        async def call(caller: Principal) -> Any:
            self.service.check_room(caller)
            requests = wire.batch_from_proto(message)
            outcomes = await self.service.batch_retrieve(requests, context.time_remaining(), caller)
            return pb.BatchRetrieveResponse(results=[wire.outcome_to_proto(outcome) for outcome in outcomes])

        return await self._call("batchRetrieve", message, call, context)

    async def RecordEvents(self, message: Any, context: Any) -> Any:  # noqa: N802
        async def call(_: Principal) -> Any:
            return wire.recorded_to_proto(await self.service.record_events(wire.events_from_proto(message)))

        return await self._call("recordEvents", message, call, context)

    async def GetInfo(self, message: Any, context: Any) -> Any:  # noqa: N802
        async def call(_: Principal) -> Any:
            return wire.info_to_proto(self.service.info())

        return await self._call("getInfo", message, call, context)

    async def _call(self, method: str, message: Any, call: Callable[[Principal], Awaitable[Any]], context: Any) -> Any:
        """Around every call: who calls, its request id, its error's code, its metric and its log line."""
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        id_ = request_id(metadata.get("x-request-id"))
        # What gRPC answers for an error that is none of ours.
        code, begun = "UNKNOWN", time.perf_counter()
        with tracing.call(self.tracer, "grpc", metadata, id_) as traced:
            try:
                try:
                    caller = await self.auth.allow(metadata.get("authorization"), Scope.RETRIEVE)
                    if isinstance(message, DecodeError):
                        raise RequestError(f"the message is no protobuf of this call: {message}")
                    answer = await call(caller)
                except GenRetrievalError as error:
                    code = error.grpc_code
                    told = (("reason", error.reason), ("x-request-id", id_), *retry_headers(error).items())
                    await context.abort(grpc.StatusCode[code], str(error), trailing_metadata=told)
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


def _handlers(servicer: _Servicer) -> dict[str, Any]:
    """As the generated code would register the servicer, but bytes that are no message are the caller's fault.

    gRPC takes an exception of a deserialiser for the server's.
    """

    def decode(kind: Any) -> Callable[[bytes], Any]:
        def decoded(content: bytes) -> Any:
            try:
                return kind.FromString(content)
            except DecodeError as error:
                return error

        return decoded

    return {
        method.name: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method.name),
            request_deserializer=decode(GetMessageClass(method.input_type)),
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
        for method in pb.DESCRIPTOR.services_by_name["RetrievalService"].methods
    }


def create_server(
    service: RetrievalService, auth: Authenticator, *, quiet: bool = False, tracer: Tracer | None = None
) -> tuple[grpc.aio.Server, health.aio.HealthServicer]:
    """The gRPC server over `service`, without a port, and its health, which says not serving."""
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_BODY_BYTES),
            # A port that is taken is an error, not a second server behind it.
            ("grpc.so_reuseport", 0),
        ]
    )
    servicer = _Servicer(service, auth, quiet=quiet, tracer=tracer)
    server.add_registered_method_handlers(SERVICE, _handlers(servicer))
    probes = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(probes, server)
    reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
    return server, probes


async def set_health(servicer: health.aio.HealthServicer, *, serving: bool) -> None:
    """Tell health checks whether to send requests here."""
    status = health_pb2.HealthCheckResponse
    for name in HEALTH_NAMES:
        await servicer.set(name, status.SERVING if serving else status.NOT_SERVING)
