"""REST: the same operations as gRPC, probes and metrics."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect

from genretrieval.errors import DeadlineError, OverloadedError, RequestError, StaleReplicaError, UnavailableError
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.auth import Authenticator, Principal
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.messages import (
    BatchResult,
    BatchRetrieveRequest,
    BatchRetrieveResponse,
    RecordEventsRequest,
    RecordEventsResponse,
    ServerInfo,
)
from genretrieval_serving.service import RetrievalService, State
from genretrieval_serving.tracing import Tracer
from genretrieval_serving.web import answered_by, application, body_of, guarded_router, json_of, open_application

_T = TypeVar("_T")


# Coroutines: the framework runs plain functions in threads, all of which may wait for the admin store.
async def _service(request: Request) -> RetrievalService:
    service: RetrievalService = request.app.state.service
    return service


async def _within(
    x_request_timeout: Annotated[
        str | None, Header(description="Seconds until the answer is of no more use.", examples=["0.25"])
    ] = None,
) -> float | None:
    """The caller's deadline, as a gRPC call carries one by itself."""
    if x_request_timeout is None:
        return None
    try:
        seconds = float(x_request_timeout)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"X-Request-Timeout: {x_request_timeout!r} is not a positive number of seconds")
    return seconds


async def _caller(request: Request) -> Principal:
    principal: Principal = request.state.principal
    return principal


async def _unless_gone(http: Request, answer: Awaitable[_T]) -> _T:
    """What is asked for, as long as somebody waits for it; gRPC cancels a call by itself.

    Raises:
        ClientDisconnect: the caller closed the connection.
    """
    asking = asyncio.current_task()
    assert asking is not None

    async def gone() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass
        asking.cancel()

    leaving = asyncio.create_task(gone())
    try:
        return await answer
    except asyncio.CancelledError:
        if leaving.done() and not asking.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        leaving.cancel()


Service = Annotated[RetrievalService, Depends(_service)]
Caller = Annotated[Principal, Depends(_caller)]
Within = Annotated[float | None, Depends(_within)]
router = guarded_router(Scope.RETRIEVE, (OverloadedError, StaleReplicaError, UnavailableError, DeadlineError))
probes = APIRouter(include_in_schema=False)


async def _retrieve(http: Request) -> Response:
    request = await body_of(http, RetrieveRequest)
    within = await _within(http.headers.get("x-request-timeout"))
    return json_of(await retrieve(request, http, await _service(http), within, await _caller(http)))


@router.post("/v1/retrieve", operation_id="retrieve")
@answered_by(_retrieve)
async def retrieve(
    request: RetrieveRequest, http: Request, service: Service, within: Within, caller: Caller
) -> RetrieveResponse:
    """Items for one request: a search, a recommendation, or both."""
    return await _unless_gone(http, service.retrieve(request, within, caller))


async def _batch_retrieve(http: Request) -> Response:
    batch = await body_of(http, BatchRetrieveRequest)
    within = await _within(http.headers.get("x-request-timeout"))
    return json_of(await batch_retrieve(batch, http, await _service(http), within, await _caller(http)))


@router.post("/v1/retrieve:batch", operation_id="batchRetrieve")
@answered_by(_batch_retrieve)
async def batch_retrieve(
    batch: BatchRetrieveRequest, http: Request, service: Service, within: Within, caller: Caller
) -> BatchRetrieveResponse:
    """Several requests at once, each with its own result; a malformed one fails the whole call."""
    outcomes = await _unless_gone(http, service.batch_retrieve(batch.requests, within, caller))
    return BatchRetrieveResponse(results=[BatchResult.of(outcome) for outcome in outcomes])


async def _record_events(http: Request) -> Response:
    batch = await body_of(http, RecordEventsRequest)
    return json_of(await record_events(batch, await _service(http), await _caller(http)), status_code=202)


@router.post("/v1/events", operation_id="recordEvents", status_code=202)
@answered_by(_record_events)
async def record_events(batch: RecordEventsRequest, service: Service, caller: Caller) -> RecordEventsResponse:
    """What somebody did with items: it is logged, and joins the user's history before this answers."""
    return await service.record_events(batch.events, caller)


@router.get("/v1/info", operation_id="getInfo")
async def info(service: Service) -> ServerInfo:
    """What is being served, and its limits."""
    return service.info()


@probes.get("/livez")
async def livez(service: Service) -> Response:
    """Whether the process works; a full queue or a drain does not make it fail."""
    return Response(status_code=200 if service.alive else 503)


@probes.get("/readyz")
async def readyz(service: Service) -> JSONResponse:
    """Whether to send requests here."""
    ready = service.state is State.READY and service.alive
    return JSONResponse({"state": service.state.value}, 200 if ready else 503)


@probes.get("/metrics")
async def metrics(service: Service) -> Response:
    """Prometheus metrics."""
    return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def create_app(
    service: RetrievalService,
    auth: Authenticator,
    *,
    quiet: bool = False,
    probes_here: bool = True,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The REST application over `service`; `quiet` leaves out the log line of every request."""
    app = _application(probes) if probes_here else _application()
    app.state.service = service

    async def admit(authorization: str | None) -> None:
        service.check_room(await auth.allow(authorization, Scope.RETRIEVE))

    doors = {"retrieve": admit, "batchRetrieve": admit}
    return open_application(app, auth, service.metrics, transport="rest", quiet=quiet, tracer=tracer, admit=doors)


def create_probes(service: RetrievalService) -> FastAPI:
    """Probes and metrics as an application of their own, for a port that only the cluster reaches."""
    app = FastAPI(openapi_url=None)
    app.include_router(probes)
    app.state.service = service
    return app


def openapi() -> dict[str, Any]:
    """The interface as an OpenAPI document."""
    return _application().openapi()


def _application(*more: APIRouter) -> FastAPI:
    return application("genretrieval", (router, *more))
