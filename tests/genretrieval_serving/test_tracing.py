"""Spans of calls: continued from the caller, with what they waited for and what ran; and ids in the log."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import grpc
import httpx
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from genretrieval.bundle import GRAPH
from genretrieval.errors import InvalidInputError, MissingExtraError
from genretrieval_serving import tracing
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.backend import OnnxBackend
from genretrieval_serving.client import Client
from genretrieval_serving.tracing import Tracer

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def parent(trace: str = TRACE, *, sampled: bool = True) -> str:
    return f"00-{trace}-{CALLER}-0{int(sampled)}"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter, monkeypatch) -> Tracer:
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    return Tracer("http://nowhere:4318", exporter)


@pytest.fixture
def backend(backend, bundle, monkeypatch) -> Any:
    """The fake, with the graph itself behind its gate."""
    waits, real = backend.run, OnnxBackend(bundle.path / GRAPH, 1)

    def run(inputs: Any) -> Any:
        waits(inputs)
        return real.run(inputs)

    monkeypatch.setattr(backend, "run", run)
    return backend


@pytest.fixture
def start(start, tracer, monkeypatch) -> Any:
    """A server whose spans go to `exporter`."""
    monkeypatch.setattr("genretrieval_serving.app.Tracer", lambda _: tracer)
    return partial(start, trace_endpoint="http://nowhere:4318")


def traces(exporter: InMemorySpanExporter, n_calls: int) -> dict[str, list[ReadableSpan]]:
    """Spans by trace, once so many calls have ended."""
    while True:
        spans = exporter.get_finished_spans()
        if sum(span.kind is SpanKind.SERVER for span in spans) >= n_calls:
            break
        time.sleep(0.01)
    found: dict[str, list[ReadableSpan]] = {}
    for span in spans:
        found.setdefault(f"{span.context.trace_id:032x}", []).append(span)
    return found


def named(spans: list[ReadableSpan], name: str) -> Any:
    (span,) = [span for span in spans if span.name == name]
    return span


def retrieve_by_grpc(address: str, *metadata: tuple[str, str]) -> None:
    with grpc.insecure_channel(address) as channel:
        stubs.RetrievalServiceStub(channel).Retrieve(pb.RetrieveRequest(), metadata=metadata, timeout=10)


def test_a_call_continues_its_callers_trace(start, exporter) -> None:
    with start() as running:
        headers = {"traceparent": parent(), "x-request-id": "r-1"}
        assert httpx.post(f"{running.http}/v1/retrieve", json={}, headers=headers).is_success
        other = TRACE[::-1]
        retrieve_by_grpc(running.grpc_address, ("traceparent", parent(other)))
        found = traces(exporter, 2)
    for trace, code in ((TRACE, "200"), (other, "OK")):
        call, queue, batch, inference = (named(found[trace], n) for n in ("retrieve", "queue", "batch", "inference"))
        assert f"{call.parent.span_id:016x}" == CALLER
        assert call.attributes["genretrieval.code"] == code
        assert queue.parent.span_id == batch.parent.span_id == call.context.span_id
        assert inference.parent.span_id == batch.context.span_id
        assert [link.context.span_id for link in batch.links] == [call.context.span_id]
        assert [link.context.span_id for link in queue.links] == [batch.context.span_id]
        assert call.start_time <= queue.start_time <= queue.end_time
        assert batch.start_time <= inference.start_time <= inference.end_time <= batch.end_time <= call.end_time
        assert call.resource.attributes["service.name"] == "genretrieval"
    assert named(found[TRACE], "retrieve").attributes["genretrieval.request_id"] == "r-1"


def test_a_batch_is_one_span_with_links_to_all_its_calls(start, exporter, backend) -> None:
    with start() as running, ThreadPoolExecutor(4) as pool, Client(running.http) as client:
        backend.gate.clear()
        calls = [pool.submit(client.retrieve, top_k=1)]
        assert backend.entered.acquire(timeout=10)
        calls += [pool.submit(client.retrieve, top_k=1) for _ in range(3)]
        while running.server.service.metrics.registry.get_sample_value("genretrieval_queue_depth") != 3:
            time.sleep(0.01)
        backend.gate.set()
        for call in calls:
            call.result(10)
        found = traces(exporter, 4)
    assert len(found) == 4
    spans = [span for trace in found.values() for span in trace]
    batches = [span for span in spans if span.name == "batch"]
    assert sorted(len(span.links) for span in batches) == [1, 3]
    assert sum(span.name == "queue" for span in spans) == 4
    assert sum(span.name == "inference" for span in spans) == 2
    (large,) = [span for span in batches if len(span.links) == 3]
    assert large.attributes["genretrieval.requests"] == 3


def test_what_its_caller_does_not_sample_costs_nothing(start, exporter) -> None:
    with start() as running:
        httpx.post(f"{running.http}/v1/retrieve", json={}, headers={"traceparent": parent(sampled=False)})
        httpx.get(f"{running.http}/v1/info", headers={"traceparent": parent("1" * 32)})
        found = traces(exporter, 1)
    assert set(found) == {"1" * 32}


def test_faults_of_ours_are_errors_and_those_of_callers_are_not(start, exporter) -> None:
    with start(load=False) as running:
        httpx.get(f"{running.http}/v1/info", headers={"traceparent": parent("1" * 32)})
        httpx.get(f"{running.http}/v1/info?top_k=1", headers={"traceparent": parent("2" * 32)})
        with pytest.raises(grpc.RpcError):
            retrieve_by_grpc(running.grpc_address, ("traceparent", parent("3" * 32)))
        found = traces(exporter, 3)
    states = [found[digit * 32][0].status.status_code for digit in "123"]
    assert states == [StatusCode.ERROR, StatusCode.UNSET, StatusCode.ERROR]


@pytest.mark.parametrize("traced", [False, True])
def test_ids_of_a_call_stand_in_the_log(start, traced, logged) -> None:
    with start(trace_endpoint="http://nowhere:4318" if traced else None, quiet=False) as running:
        httpx.get(f"{running.http}/v1/info", headers={"traceparent": parent(), "x-request-id": "r-1"})
        with Client(running.grpc) as client:
            client.info()
    lines = [line for line in logged.getvalue().splitlines() if "getInfo" in line]
    assert TRACE in lines[0]
    assert "r-1" in lines[0]
    assert ("trace_id" in lines[1]) == traced


@pytest.mark.parametrize("given", ["", "00", parent("0" * 32), parent().upper(), "é" + parent()])
def test_what_is_no_trace_is_passed_over(given, tracer, exporter) -> None:
    for makes in (None, tracer):
        with tracing.call(makes, "rest", {"traceparent": given}, "r-1"):
            pass
    (span,) = exporter.get_finished_spans()
    assert span.parent is None


def test_settings() -> None:
    for endpoint in ("collector:4318", "ftp://collector", "http://"):
        with pytest.raises(InvalidInputError, match="endpoint"):
            Tracer(endpoint)


def test_a_collector_that_is_away_costs_spans_and_no_time() -> None:
    tracer = Tracer("http://127.0.0.1:1")
    with tracing.call(tracer, "rest", {}, "r-1"):
        pass
    tracer.close()


def test_without_the_extra_it_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(MissingExtraError, match=r"genretrieval\[otel\]"):
        Tracer("http://collector:4318")
