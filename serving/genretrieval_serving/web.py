"""What both REST applications share: errors as RFC 9457 problem+json, request ids, limits, metrics, API keys."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Any, ClassVar, TypeVar
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Send
from starlette.types import Scope as AsgiScope

from genretrieval.errors import GenRetrievalError, PermissionDeniedError, RequestError
from genretrieval_serving import tracing
from genretrieval_serving.admin.auth import ANONYMOUS, Authenticator
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.messages import MAX_BODY_BYTES, Problem, request_error, retry_headers
from genretrieval_serving.observability import Metrics, request_id
from genretrieval_serving.tracing import Tracer

log = structlog.get_logger(__name__)

PROBLEM = "application/problem+json"
CLIENT_CLOSED_REQUEST = 499  # what proxies log; HTTP has no status for it
_COMPONENT = "#/components/schemas/"

# Raises where a call with this `Authorization` would be refused whatever it asked.
Admit = Callable[[str | None], Awaitable[None]]
Handler = Callable[[Request], Coroutine[Any, Any, Response]]
_Body = TypeVar("_Body", bound=BaseModel)
_Operation = TypeVar("_Operation", bound=Callable[..., Any])


class _Guarded(APIRoute):
    """A route that looks at the caller's key before it reads the body; `request.state.principal` is who calls.

    It refuses parameters that it does not know, and those that come twice: a dry run with a slip of the pen must not
    become the real thing.
    """

    scope: ClassVar[Scope]

    def get_route_handler(self) -> Handler:
        handle: Handler = getattr(self.endpoint, "handler", None) or super().get_route_handler()

        async def guarded(request: Request) -> Response:
            auth: Authenticator = request.app.state.auth
            request.state.principal = await auth.allow(request.headers.get("authorization"), self.scope)
            if self.scope is Scope.ADMIN_WRITE and request.state.principal is ANONYMOUS and _from_elsewhere(request):
                raise PermissionDeniedError(
                    "another site's page may not change anything here while no API key is needed; "
                    "`genretrieval keys create` makes one"
                )
            if request.scope["query_string"]:
                self._check_parameters(request)
            return await handle(request)

        return guarded

    def _check_parameters(self, request: Request) -> None:
        known: frozenset[str] = request.app.state.parameters[self.operation_id]
        if unknown := sorted(set(request.query_params) - known):
            raise RequestError(
                f"there is no parameter {', '.join(map(repr, unknown))}; "
                f"this operation takes {', '.join(sorted(known)) or 'none'}"
            )
        names = [name for name, _ in request.query_params.multi_items()]
        if len(names) > len(set(names)):
            raise RequestError("a parameter is there more than once; give each one once")


def answered_by(handler: Handler) -> Callable[[_Operation], _Operation]:
    """Have `handler` answer an operation, in place of what the framework makes of the declaration for every call.

    That costs more than the rest of a call: docs/decisions/0010-serving-engine.md. What is declared is still what is
    described.
    """

    def mark(operation: _Operation) -> _Operation:
        operation.handler = handler  # type: ignore[attr-defined]
        return operation

    return mark


async def body_of(request: Request, model: type[_Body]) -> _Body:
    """The body as a `model`.

    Raises:
        RequestError: it is none.
    """
    body = await request.body()
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise RequestError(f"content-type is {kind!r}; send JSON, as application/json")
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        raise request_error(error.errors(include_url=False, include_input=False)) from error


def json_of(model: BaseModel, status_code: int = 200) -> Response:
    """A `model` as a response."""
    return Response(model.model_dump_json(), status_code, media_type="application/json")


def _from_elsewhere(request: Request) -> bool:
    """Whether a browser calls for a page of another site: it reaches loopback addresses that the site does not."""
    if request.headers.get("sec-fetch-site") == "cross-site":
        return True
    origin = request.headers.get("origin")
    if origin is None:
        return False
    try:
        return not is_loopback(urlsplit(origin).hostname or "")
    except ValueError:
        return True


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, as nobody else reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def guarded_router(scope: Scope, errors: Sequence[type[GenRetrievalError]]) -> APIRouter:
    """A router whose operations need a key with `scope`, and which document `errors` and what every one can answer."""
    route = type(f"Needs{scope.name.title()}", (_Guarded,), {"scope": scope})
    statuses = sorted({kind.http_status for kind in errors} | {400, 401, 403, 413, 500})
    return APIRouter(route_class=route, responses=documented(*statuses))


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """How an operation describes that it can fail with these."""
    content = {PROBLEM: {"schema": {"$ref": f"{_COMPONENT}Problem"}}}
    return {status: {"description": HTTPStatus(status).phrase, "content": content} for status in statuses}


def application(title: str, routers: Sequence[APIRouter], models: Sequence[type[BaseModel]] = ()) -> FastAPI:
    """An application without its state; `models` are described although no operation declares them."""
    # No documentation page: it would load scripts from the internet. The document is at /openapi.json.
    app = FastAPI(
        title=title,
        version=version("genretrieval"),
        docs_url=None,
        redoc_url=None,
        separate_input_output_schemas=False,
    )
    for router in routers:
        app.include_router(router)
    app.add_exception_handler(GenRetrievalError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_malformed)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_gone)
    app.add_exception_handler(Exception, _on_fault)
    app.state.routes = [route for router in routers for route in router.routes]
    scopes = {route.operation_id: route.scope for route in app.state.routes if isinstance(route, _Guarded)}
    describe = app.openapi

    def described() -> dict[str, Any]:
        document = describe()
        components = document["components"]
        undeclared: list[type[BaseModel]] = [Problem, *models]
        for model in undeclared:
            schema = model.model_json_schema(ref_template=_COMPONENT + "{model}")
            components["schemas"].update({**schema.pop("$defs", {}), model.__name__: schema})
        components["securitySchemes"] = {"apiKey": {"type": "http", "scheme": "bearer"}}
        # FastAPI announces its own 422 for malformed bodies; here they are 400 like every other fault of the caller.
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["security"] = [{"apiKey": [scopes[operation["operationId"]]]}]
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    operation["responses"].pop("422")
        return document

    app.openapi = described  # type: ignore[method-assign]
    return app


def open_application(
    app: FastAPI,
    auth: Authenticator,
    metrics: Metrics,
    *,
    transport: str,
    quiet: bool,
    tracer: Tracer | None = None,
    admit: Mapping[str, Admit] | None = None,
) -> FastAPI:
    """Let `app` take calls, counted, logged and traced as `transport`.

    Args:
        app: without its state.
        auth: who may call.
        metrics: of the server.
        transport: what calls are counted as.
        quiet: no line in the log for a call.
        tracer: makes spans.
        admit: by operation id, what is asked before anything of a call but its headers is looked at. An overloaded
            server refuses most calls, so that must cost little.
    """
    app.state.auth = auth
    app.state.parameters = {
        operation["operationId"]: frozenset(p["name"] for p in operation.get("parameters", ()) if p["in"] == "query")
        for operations in app.openapi()["paths"].values()
        for operation in operations.values()
    }
    admit = admit or {}
    doors = {
        route.path: (route, admit[route.operation_id]) for route in app.state.routes if route.operation_id in admit
    }
    app.add_middleware(_Calls, metrics=metrics, transport=transport, quiet=quiet, tracer=tracer, doors=doors)
    return app


def refusal(error: GenRetrievalError) -> JSONResponse:
    """An error as a response."""
    headers = retry_headers(error)
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return _problem(Problem.of(error), headers)


def _problem(problem: Problem, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(problem.model_dump(), problem.status, headers=headers, media_type=PROBLEM)


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, GenRetrievalError)
    return refusal(error)


async def _on_malformed(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return refusal(request_error(error.errors()))


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """No such path, wrong method, body too large: the framework's errors in the same shape."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    answer = _problem(Problem(title=status.phrase, status=status, detail=str(error.detail), reason=status.name))
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        # The framework knows one route's methods; several may share the path.
        routes: list[Route] = request.app.state.routes
        here = [route for route in routes if route.path_regex.match(request.url.path)]
        answer.headers["Allow"] = ", ".join(sorted({method for route in here for method in route.methods or ()}))
    return answer


async def _on_gone(request: Request, error: Exception) -> Response:
    """Nobody will read this; the code is for metrics and logs."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _on_fault(request: Request, error: Exception) -> JSONResponse:
    """An error that is none of ours; it is logged with its traceback and shown without its insides."""
    return refusal(GenRetrievalError("the server failed on this request; its log says why"))


class _Calls:
    """Around every call: its request id, the limit on its body, its metric and its log line."""

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        transport: str,
        quiet: bool,
        tracer: Tracer | None,
        doors: Mapping[str, tuple[Route, Admit]],
    ) -> None:
        self.app, self.metrics, self.transport, self.quiet, self.tracer = app, metrics, transport, quiet, tracer
        self.doors = doors

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        id_ = request_id(headers.get(b"x-request-id", b"").decode("latin-1"))
        scope.setdefault("state", {})["request_id"] = id_
        received, status, begun = 0, 500, time.perf_counter()

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is over {MAX_BODY_BYTES} bytes; split it")
            return message

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", id_.encode())]
            await send(message)

        carrier = {name: headers.get(name.encode(), b"").decode("latin-1") for name in tracing.CARRIED}
        with tracing.call(self.tracer, self.transport, carrier, id_) as call:
            try:
                await self._enter(scope, limited_receive, noting_send, headers.get(b"authorization"))
            finally:
                seconds = time.perf_counter() - begun
                route = scope.get("route")
                method = getattr(route, "operation_id", None) or "none"
                self.metrics.request_duration.labels(self.transport, method, str(status)).observe(seconds)
                call.ended(method, str(status), failed=status >= 500)
                if not self.quiet:
                    log.info(
                        "request", transport=self.transport, method=method, code=status, ms=round(seconds * 1e3, 3)
                    )

    async def _enter(self, scope: AsgiScope, receive: Receive, send: Send, authorization: bytes | None) -> None:
        """Hand a call on, if it may come in at all."""
        route, admit = self.doors.get(scope["path"], (None, None))
        if admit is not None and scope["method"] == "POST":
            try:
                await admit(None if authorization is None else authorization.decode("latin-1"))
            except GenRetrievalError as error:
                scope["route"] = route
                await refusal(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)
