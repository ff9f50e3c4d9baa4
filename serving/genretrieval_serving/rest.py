"""REST: the same operations as gRPC, errors as RFC 9457 problem+json, probes and metrics."""

from __future__ import annotations

import math
import time
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any

import structlog
from fastapi import APIRouter, Depends, FastAPI, Header, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from genretrieval.errors import (
    DeadlineError,
    GenRetrievalError,
    OverloadedError,
    RequestError,
    UnavailableError,
)
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.messages import (
    MAX_BODY_BYTES,
    BatchResult,
    BatchRetrieveRequest,
    BatchRetrieveResponse,
    Problem,
    ServerInfo,
    request_error,
)
from genretrieval_serving.observability import request_id
from genretrieval_serving.service import RetrievalService, State

log = structlog.get_logger(__name__)

PROBLEM = "application/problem+json"
RETRY_AFTER_SECONDS = "1"
_DOCUMENTED = (RequestError, OverloadedError, GenRetrievalError, UnavailableError, DeadlineError)


def _service(request: Request) -> RetrievalService:
    service: RetrievalService = request.app.state.service
    return service


def _within(
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


Service = Annotated[RetrievalService, Depends(_service)]
Within = Annotated[float | None, Depends(_within)]
router = APIRouter(
    responses={
        kind.http_status: {
            "description": HTTPStatus(kind.http_status).phrase,
            "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for kind in _DOCUMENTED
    }
)
probes = APIRouter(include_in_schema=False)


@router.post("/v1/retrieve", operation_id="retrieve")
async def retrieve(request: RetrieveRequest, service: Service, within: Within) -> RetrieveResponse:
    """Items for one request: a search, a recommendation, or both."""
    return await service.retrieve(request, within)


@router.post("/v1/retrieve:batch", operation_id="batchRetrieve")
async def batch_retrieve(batch: BatchRetrieveRequest, service: Service, within: Within) -> BatchRetrieveResponse:
    """Several requests at once, each with its own result; a malformed one fails the whole call."""
    outcomes = await service.batch_retrieve(batch.requests, within)
    return BatchRetrieveResponse(results=[BatchResult.of(outcome) for outcome in outcomes])


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


def create_app(service: RetrievalService, *, quiet: bool = False) -> FastAPI:
    """The REST application over `service`; `quiet` leaves out the log line of every request."""
    app = _application()
    app.state.service = service
    app.add_middleware(_Calls, service=service, quiet=quiet)
    return app


def openapi() -> dict[str, Any]:
    """The interface as an OpenAPI document."""
    return _application().openapi()


def _application() -> FastAPI:
    # No documentation page: it would load scripts from the internet. The document is at /openapi.json.
    app = FastAPI(title="genretrieval", version=version("genretrieval"), docs_url=None, redoc_url=None)
    app.include_router(router)
    app.include_router(probes)
    app.add_exception_handler(GenRetrievalError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(Exception, _on_fault)
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        document["components"]["schemas"]["Problem"] = Problem.model_json_schema()
        # FastAPI announces 422 for malformed bodies; here they are 400 like every other fault of the caller.
        for name in ("HTTPValidationError", "ValidationError"):
            document["components"]["schemas"].pop(name, None)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        return document

    app.openapi = described  # type: ignore[method-assign]
    return app


def _problem(problem: Problem) -> JSONResponse:
    retry = {"Retry-After": RETRY_AFTER_SECONDS} if problem.status in (429, 503) else None
    return JSONResponse(problem.model_dump(), problem.status, headers=retry, media_type=PROBLEM)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GenRetrievalError)
    return _problem(Problem.of(error))


async def _on_malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _problem(Problem.of(request_error(error.errors())))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """No such path, wrong method, body too large: the framework's errors in the same shape."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    return _problem(Problem(title=status.phrase, status=status, detail=str(error.detail), reason=status.name))


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    """An error that is none of ours; it is logged with its traceback and shown without its insides."""
    return _problem(Problem.of(GenRetrievalError("the server failed on this request; its log says why")))


class _Calls:
    """Around every call: its request id, the limit on its body, its metric and its log line."""

    def __init__(self, app: ASGIApp, service: RetrievalService, quiet: bool) -> None:
        self.app, self.service, self.quiet = app, service, quiet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id_ = request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        received, status, begun = 0, 500, time.perf_counter()

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is over {MAX_BODY_BYTES} bytes; split the batch")
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id_.encode())]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=id_):
            try:
                await self.app(scope, limited_receive, noting_send)
            finally:
                seconds = time.perf_counter() - begun
                route = scope.get("route")
                method = getattr(route, "operation_id", None) or "none"
                self.service.metrics.request_duration.labels("rest", method, str(status)).observe(seconds)
                if not self.quiet:
                    log.info("request", transport="rest", method=method, code=status, ms=round(seconds * 1e3, 3))
