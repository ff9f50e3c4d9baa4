"""Traces by OpenTelemetry: a span for every call, and below it how long it waited and what then ran.

The caller's trace (W3C ``traceparent``) is continued. Of a batch there is one span, below the first of its calls that
is traced and linked to all of them; their ``queue`` spans link to it. Without a tracer nothing here does more than look
at one variable. What is sampled, and what a service is called, is set by OpenTelemetry's own environment variables.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar, copy_context
from functools import partial
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from genretrieval.errors import InvalidInputError, MissingExtraError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

CARRIED = ("traceparent", "tracestate")
EXPORT_SECONDS = 5.0
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")

_T = TypeVar("_T")


class Tracer:
    """Makes spans and sends them to a collector, in a thread of its own; ends with `close`."""

    def __init__(self, endpoint: str, exporter: SpanExporter | None = None) -> None:
        """Connect lazily; a collector that is away costs spans and nothing else.

        Args:
            endpoint: of a collector that takes OTLP by HTTP, for example ``http://collector:4318``.
            exporter: where spans go instead, one by one as they end.

        Raises:
            InvalidInputError: the endpoint is no URL.
            MissingExtraError: the extra ``otel`` is not installed.
        """
        url = urlsplit(endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InvalidInputError(f"the endpoint of traces cannot be {endpoint!r}; give http://HOST:4318")
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor, SimpleSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ModuleNotFoundError as error:
            raise MissingExtraError(
                f"traces need {error.name}; install it with: pip install 'genretrieval[otel]'"
            ) from error
        resource = Resource.create()
        if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):  # the environment names none
            resource = resource.merge(Resource({SERVICE_NAME: "genretrieval"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(
            BatchSpanProcessor(OTLPSpanExporter(f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_SECONDS))
            if exporter is None
            else SimpleSpanProcessor(exporter)
        )
        self._tracer = self._provider.get_tracer("genretrieval_serving")
        self._extract = TraceContextTextMapPropagator().extract

    def close(self) -> None:
        """Send what has not been sent; waits for the collector, but not for long."""
        self._provider.shutdown()

    def call(self, name: str, carrier: Mapping[str, str]) -> Span:
        """A span of a server, in the trace that `carrier` names."""
        from opentelemetry.trace import SpanKind

        return self._tracer.start_span(name, context=self._extract(carrier), kind=SpanKind.SERVER)

    def below(self, parent: Span, name: str, since: float | None = None, links: Sequence[Span] = ()) -> Span:
        """A span below another one, begun now or at a time of `time.perf_counter`."""
        from opentelemetry.trace import Link, set_span_in_context

        return self._tracer.start_span(
            name,
            context=set_span_in_context(parent),
            links=[Link(span.get_span_context()) for span in links],
            start_time=None if since is None else time.time_ns() - int((time.perf_counter() - since) * 1e9),
        )


class Traced:
    """A span that others may come below, with what makes them."""

    __slots__ = ("span", "tracer")

    def __init__(self, tracer: Tracer, span: Span) -> None:
        self.tracer, self.span = tracer, span


class Call:
    """One call of a server, traced or not."""

    __slots__ = ("_span",)

    def __init__(self, span: Span | None = None) -> None:
        self._span = span

    def ended(self, method: str, code: str, *, failed: bool) -> None:
        """Name the span by the operation, which is known only at its end, and say how it went."""
        if self._span is None:
            return
        from opentelemetry.trace import StatusCode

        self._span.update_name(method)
        self._span.set_attribute("genretrieval.code", code)
        if failed:
            self._span.set_status(StatusCode.ERROR)


_current: ContextVar[Traced | None] = ContextVar("genretrieval_traced", default=None)


def current() -> Traced | None:
    """The span that what happens now belongs to; None where it is not traced."""
    return _current.get()


@contextmanager
def call(tracer: Tracer | None, transport: str, carrier: Mapping[str, str], request_id: str) -> Iterator[Call]:
    """Around a call of a server: its span, and its ids in every line that is logged meanwhile.

    Args:
        tracer: None makes no span; the id of the caller's trace is logged all the same.
        transport: the span's name until there is a better one.
        carrier: those of the call's headers that `CARRIED` names.
        request_id: see `genretrieval_serving.observability.request_id`.
    """
    from structlog.contextvars import bound_contextvars  # not where a graph is run without a server

    if tracer is None:
        known = _TRACEPARENT.fullmatch(carrier.get("traceparent", ""))
        with bound_contextvars(request_id=request_id, **({"trace_id": known[1]} if known else {})):
            yield Call()
        return
    span = tracer.call(transport, carrier)
    trace_id = f"{span.get_span_context().trace_id:032x}"
    with _within(tracer, span), bound_contextvars(request_id=request_id, trace_id=trace_id):
        span.set_attribute("genretrieval.request_id", request_id)
        yield Call(span)


def inside(name: str) -> AbstractContextManager[None]:
    """Around a part of what is traced now."""
    now = _current.get()
    return nullcontext() if now is None else _within(now.tracer, now.tracer.below(now.span, name))


def batch(members: Sequence[tuple[Traced | None, float]], *, requests: int, rows: int) -> AbstractContextManager[None]:
    """Around the run of a batch.

    Args:
        members: the span of each request, and since when it waited, by `time.perf_counter`.
        requests: in the batch.
        rows: in the batch.
    """
    traced = [(member, since) for member, since in members if member is not None and member.span.is_recording()]
    if not traced:
        return nullcontext()
    first, _ = traced[0]
    span = first.tracer.below(first.span, "batch", links=[member.span for member, _ in traced])
    span.set_attributes({"genretrieval.requests": requests, "genretrieval.rows": rows})
    for member, since in traced:
        member.tracer.below(member.span, "queue", since, links=[span]).end()
    return _within(first.tracer, span)


def carried(work: Callable[..., _T]) -> Callable[..., _T]:
    """`work` for another thread, in what is traced now."""
    return work if _current.get() is None else partial(copy_context().run, work)


@contextmanager
def _within(tracer: Tracer, span: Span) -> Iterator[None]:
    """While it lasts, spans come below this one; an unsampled one has none below."""
    token = _current.set(Traced(tracer, span) if span.is_recording() else None)
    try:
        yield
    finally:
        _current.reset(token)
        span.end()
