"""One service behind two transports: the same answers, the same errors, over real sockets."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from genretrieval import errors
from genretrieval.request import RetrievedItem, RetrieveRequest, RetrieveResponse, Timings
from genretrieval_serving import wire
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2_grpc as stubs
from genretrieval_serving.admin.replica import STALE_SECONDS, Replica
from genretrieval_serving.admin.resources import Kind, RuleFields, SynonymsFields
from genretrieval_serving.admin.sql import SqlStore
from genretrieval_serving.admin.store import Call, Create
from genretrieval_serving.client import Client
from genretrieval_serving.messages import MAX_BODY_BYTES

POISON = "item-23"


def kinds(kind: type[errors.GenRetrievalError]) -> Iterator[type[errors.GenRetrievalError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from kinds(child)


ALL_ERRORS = sorted(set(kinds(errors.GenRetrievalError)), key=lambda kind: kind.__name__)


def untimed(response: RetrieveResponse) -> RetrieveResponse:
    """Without what is never twice the same."""
    return response.model_copy(update={"timings": Timings(), "attribution_token": ""})


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    """Raw calls, beside those of the client."""
    with httpx.Client(timeout=10) as client:
        yield client


@pytest.fixture(params=["grpc", "http"])
def url(request: Any, running: Any) -> str:
    return str(getattr(running, request.param))


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    with Client(url) as client:
        yield client


def test_both_transports_answer_as_the_retriever_does(running, example) -> None:
    requests = [
        example,
        RetrieveRequest(),
        RetrieveRequest(top_k=3, exclude_history="all", history=[{"item_id": "item-5"}]),
    ]
    for request in requests:
        direct = untimed(running.retriever.retrieve([request])[0])
        with Client(running.grpc) as by_grpc, Client(running.http) as by_rest:
            assert untimed(by_grpc.retrieve(request)) == direct
            assert untimed(by_rest.retrieve(request)) == direct


def test_a_response_says_what_it_could_not_use(client, example) -> None:
    response = client.retrieve(example)
    assert response.missing_ids == ["gone", "unknown"]
    assert "query_ignored" in response.degraded
    assert "item-1" not in [item.item_id for item in response.items]
    assert response.attribution_token.startswith(response.bundle_version)
    assert response.timings.total_ms >= response.timings.inference_ms


def test_filters_and_exclusions_hold(client) -> None:
    filters = {"attributes": {"brand": ["acme"]}, "min_price": 3, "max_price": 15}
    response = client.retrieve(filters=filters, exclude_item_ids=["item-6"], top_k=10)
    assert {item.item_id for item in response.items} == {"item-3", "item-9", "item-12", "item-15"}
    assert response.degraded == ["fewer_than_top_k"]
    nothing = client.retrieve(filters={"attributes": {"brand": ["nobody"]}})
    assert nothing.items == []
    assert nothing.degraded == ["fewer_than_top_k"]


def test_a_batch_answers_each_request_as_if_alone(client, example) -> None:
    requests = [
        example,
        RetrieveRequest(filters={"attributes": {"colour": ["red"]}}),
        RetrieveRequest(top_k=1),
        RetrieveRequest(history=[{"item_id": POISON}]),
        RetrieveRequest(history=[{"item_id": "item-4"}], beam_width=3),
    ]
    answers = client.batch_retrieve(requests)
    assert [type(answer) for answer in answers] == [
        RetrieveResponse,
        errors.RequestError,
        RetrieveResponse,
        errors.GenRetrievalError,
        RetrieveResponse,
    ]
    assert "colour" in str(answers[1])
    for i in (0, 2, 4):
        assert untimed(answers[i]) == untimed(client.retrieve(requests[i]))


def test_info(client, bundle) -> None:
    info = client.info()
    assert (info.bundle_version, info.bundle_uuid) == (bundle.manifest.version, bundle.manifest.uuid)
    assert (info.n_items, info.default_beam_width, info.max_history) == (24, 12, 5)
    assert info.limits.max_batch_requests == 32
    assert info.limits.max_top_k == 500


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 501}, "top_k"),
        ({"beam_width": 513}, "beam_width"),
        ({"history": [{"item_id": "i"}] * 1001}, "history"),
        ({"history": [{"item_id": ""}]}, "history.0.item_id"),
        ({"history": [{"item_id": "i", "timestamp": 1_700_000_000_000}]}, "history.0.timestamp"),
        ({"query": "x" * 2049}, "query"),
        ({"exclude_item_ids": ["x" * 513]}, "exclude_item_ids.0"),
    ],
)
def test_limits_are_the_same_everywhere(running, fields, message, http) -> None:
    with Client(running.http) as client, pytest.raises(errors.RequestError, match=message):
        client.retrieve(**fields)
    answer = http.post(f"{running.http}/v1/retrieve", json=fields)
    assert answer.status_code == 400
    assert answer.json()["detail"].startswith(message)
    with grpc.insecure_channel(running.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        stubs.RetrievalServiceStub(channel).Retrieve(pb.RetrieveRequest(**fields), timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details() == answer.json()["detail"]


@pytest.mark.parametrize("n", [0, 33])
def test_the_size_of_a_batch_is_limited(client, n) -> None:
    with pytest.raises(errors.RequestError, match="requests"):
        client.batch_retrieve([RetrieveRequest()] * n)


def test_a_body_over_the_limit_is_refused(client) -> None:
    with pytest.raises(errors.RequestError):
        client.batch_retrieve([RetrieveRequest(profile={"x": "x" * MAX_BODY_BYTES})])


def test_an_unknown_filter_is_the_callers_fault(client, running) -> None:
    with pytest.raises(errors.RequestError, match=r"'colour'.*the catalogue has brand"):
        client.retrieve(filters={"attributes": {"colour": ["red"]}})


def test_a_fault_of_ours_is_shown_without_its_insides(client) -> None:
    with pytest.raises(errors.GenRetrievalError, match="inference_failed") as caught:
        client.retrieve(history=[{"item_id": POISON}])
    assert type(caught.value) is errors.GenRetrievalError
    assert "poisoned" not in str(caught.value)


@pytest.mark.parametrize("kind", ALL_ERRORS, ids=lambda kind: kind.__name__)
def test_every_error_arrives_as_what_it_was(running, monkeypatch, kind, http) -> None:
    async def fail(*_: object) -> RetrieveResponse:
        raise kind("what was wrong")

    monkeypatch.setattr(running.server.service, "retrieve", fail)
    # Without the client's retries, which would answer an unavailable server by waiting.
    with grpc.insecure_channel(running.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        stubs.RetrievalServiceStub(channel).Retrieve(pb.RetrieveRequest(), timeout=10)
    assert caught.value.code().name == kind.grpc_code
    assert dict(caught.value.trailing_metadata())["reason"] == kind("").reason
    answer = http.post(f"{running.http}/v1/retrieve", json={})
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.status_code == answer.json()["status"] == kind.http_status
    assert answer.json()["reason"] == kind("").reason
    assert answer.json()["detail"] == "what was wrong"
    assert ("retry-after" in answer.headers) == (kind.http_status in (429, 503))
    for url in (running.http, running.grpc):
        # Too little time to come again, as an overloaded server asks for.
        with Client(url, timeout=1.0) as client, pytest.raises(kind) as raised:
            client.retrieve()
        assert type(raised.value) is kind


def test_an_unforeseen_error_has_the_same_shape(running, monkeypatch, http) -> None:
    async def fail(*_: object) -> RetrieveResponse:
        raise KeyError("secret")

    monkeypatch.setattr(running.server.service, "retrieve", fail)
    answer = http.post(f"{running.http}/v1/retrieve", json={})
    assert (answer.status_code, answer.json()["reason"]) == (500, "GEN_RETRIEVAL")
    assert "secret" not in answer.text
    with Client(running.grpc) as client, pytest.raises(errors.GenRetrievalError):
        client.retrieve()


def test_a_request_id_is_echoed_or_made(running, http) -> None:
    given = http.get(f"{running.http}/v1/info", headers={"X-Request-ID": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = http.get(f"{running.http}/v1/info", headers={"X-Request-ID": "spaces are refused"})
    assert len(made.headers["x-request-id"]) == 32
    with grpc.insecure_channel(running.grpc_address) as channel:
        call = stubs.RetrievalServiceStub(channel).GetInfo.with_call
        _, answer = call(pb.GetInfoRequest(), metadata=(("x-request-id", "abc-2"),), timeout=10)
    assert dict(answer.trailing_metadata())["x-request-id"] == "abc-2"


def test_rest_errors_of_the_framework_have_the_same_shape(running, http) -> None:
    calls = {
        404: http.get(f"{running.http}/v1/nothing"),
        405: http.get(f"{running.http}/v1/retrieve"),
        400: http.post(f"{running.http}/v1/retrieve", content=b"{"),
        413: http.post(f"{running.http}/v1/retrieve", content=b" " * (MAX_BODY_BYTES + 1)),
    }
    for status, answer in calls.items():
        assert answer.status_code == status
        assert answer.headers["content-type"] == "application/problem+json"
        assert set(answer.json()) == {"type", "title", "status", "detail", "reason"}


@pytest.mark.parametrize("header", ["soon", "nan", "0", "-1", "inf"])
def test_a_deadline_must_be_a_positive_number(running, header, http) -> None:
    answer = http.post(f"{running.http}/v1/retrieve", json={}, headers={"X-Request-Timeout": header})
    assert answer.status_code == 400
    assert "X-Request-Timeout" in answer.json()["detail"]


def test_health_and_reflection(running) -> None:
    with grpc.insecure_channel(running.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "genretrieval.v1.RetrievalService"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name), timeout=10).status
            assert status == health_pb2.HealthCheckResponse.SERVING
        reflect = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
        question = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = reflect(iter([question]), timeout=10)
        services = {service.name for service in answer.list_services_response.service}
    assert "genretrieval.v1.RetrievalService" in services


def test_metrics(start, example, http) -> None:
    with start() as running, Client(running.http) as by_rest, Client(running.grpc) as by_grpc:
        by_rest.retrieve(example)
        by_grpc.retrieve(filters={"attributes": {"brand": ["nobody"]}})
        text = http.get(f"{running.http}/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    name = "genretrieval_request_duration_seconds_count"
    assert lines[f'{name}{{code="200",method="retrieve",transport="rest"}}'] == "1.0"
    assert lines[f'{name}{{code="OK",method="retrieve",transport="grpc"}}'] == "1.0"
    assert lines['genretrieval_empty_results_total{arm="primary"}'] == "1.0"
    assert lines['genretrieval_results_returned_count{arm="primary"}'] == "2.0"
    assert lines["genretrieval_batch_rows_sum"] == "3.0"  # 20 beams where the bundle has 12 are two rows
    assert lines["genretrieval_in_flight_requests"] == "0.0"
    assert lines["genretrieval_in_flight_rows"] == "0.0"
    assert lines["genretrieval_queue_depth"] == "0.0"
    assert lines["genretrieval_queue_duration_seconds_count"] == "2.0"
    assert lines['genretrieval_inference_duration_seconds_count{arm="primary"}'] == "2.0"
    assert any(line.startswith('genretrieval_bundle_info{arm="primary"') for line in lines)
    assert float(lines["process_resident_memory_bytes"]) > 0
    assert float(lines["process_open_fds"]) > 0


def test_a_long_queue_rejects_at_once_and_what_waits_is_batched(start, backend, http) -> None:
    with start(max_batch=2) as running, ThreadPoolExecutor(6) as pool:
        backend.gate.clear()
        # As if rows took minutes: three may be waited for, here the one that runs and two before the last one taken.
        running.batcher.row_seconds = 100.0
        with Client(running.http, timeout=1e4) as client:
            first = pool.submit(client.retrieve, top_k=1)
            assert backend.entered.acquire(timeout=10)
            queued = [pool.submit(client.retrieve, top_k=1) for _ in range(3)]
            wait_for(running, "genretrieval_queue_depth", 3)
            assert running.metric("genretrieval_in_flight_rows") == 4
            for url in (running.http, running.grpc):
                with Client(url) as overloaded, pytest.raises(errors.OverloadedError, match="3 rows wait already"):
                    overloaded.retrieve(top_k=1)
            assert http.get(f"{running.http}/livez").status_code == 200
            assert http.get(f"{running.http}/readyz").status_code == 200
            backend.gate.set()
            assert all(len(future.result(10).items) == 1 for future in [first, *queued])
            text = http.get(f"{running.http}/metrics").text
        assert 'genretrieval_rejected_total{reason="OVERLOADED"} 2.0' in text
    assert backend.batches == [1, 2, 1]


def wait_for(running: Any, metric: str, value: float) -> None:
    while running.metric(metric) != value:
        time.sleep(0.005)


def test_who_closes_the_connection_leaves_the_queue(start, backend, http) -> None:
    body = b'{"top_k": 1}'
    head = f"Host: here\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    with start() as running, ThreadPoolExecutor(2) as pool, Client(running.http) as client:
        backend.gate.clear()
        first = pool.submit(client.retrieve)
        assert backend.entered.acquire(timeout=10)
        address = urlsplit(running.http)
        with socket.create_connection((address.hostname, address.port)) as caller:
            caller.sendall(b"POST /v1/retrieve HTTP/1.1\r\n" + head + body)
            wait_for(running, "genretrieval_queue_depth", 1)
        wait_for(running, "genretrieval_queue_depth", 0)
        batch = b'{"requests": [%s, %s]}' % (body, body)
        head = head.replace(b": %d\r" % len(body), b": %d\r" % len(batch))
        with socket.create_connection((address.hostname, address.port)) as caller:
            caller.sendall(b"POST /v1/retrieve:batch HTTP/1.1\r\n" + head + batch)
            wait_for(running, "genretrieval_queue_depth", 2)
        wait_for(running, "genretrieval_queue_depth", 0)
        with grpc.insecure_channel(running.grpc_address) as channel:
            call = stubs.RetrievalServiceStub(channel).Retrieve.future(pb.RetrieveRequest())
            wait_for(running, "genretrieval_queue_depth", 1)
            call.cancel()
            wait_for(running, "genretrieval_queue_depth", 0)
        assert running.metric("genretrieval_in_flight_rows") == 1
        backend.gate.set()
        first.result(10)
        labels = {"transport": "rest", "code": "499"}
        assert running.metric("genretrieval_request_duration_seconds_count", method="retrieve", **labels) == 1
        assert running.metric("genretrieval_request_duration_seconds_count", method="batchRetrieve", **labels) == 1
        assert running.metric("genretrieval_in_flight_requests") == 0
    assert backend.batches == [1]


def test_both_transports_say_when_to_come_again(running, monkeypatch, http) -> None:
    async def fail(*_: object) -> RetrieveResponse:
        raise errors.OverloadedError("too much", 0.0123)

    monkeypatch.setattr(running.server.service, "retrieve", fail)
    answer = http.post(f"{running.http}/v1/retrieve", json={})
    with grpc.insecure_channel(running.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        stubs.RetrievalServiceStub(channel).Retrieve(pb.RetrieveRequest(), timeout=10)
    for told in (answer.headers, dict(caught.value.trailing_metadata())):
        assert (told["retry-after"], told["retry-after-ms"]) == ("1", "13")
    for url in (running.http, running.grpc):
        with Client(url) as client, pytest.raises(errors.OverloadedError) as raised:
            client.retrieve()
        assert raised.value.retry_after == 0.013


def test_the_client_comes_again_when_the_server_says(running, monkeypatch, client, example) -> None:
    retrieve, refused = running.server.service.retrieve, []

    async def sometimes(*arguments: Any) -> RetrieveResponse:
        if len(refused) < 2:
            refused.append(time.monotonic())
            raise errors.OverloadedError("too much", 0.01)
        return await retrieve(*arguments)

    monkeypatch.setattr(running.server.service, "retrieve", sometimes)
    assert client.retrieve(example).items
    assert len(refused) == 2


def test_a_batch_of_one_caller_waits_in_its_own_line(start, backend) -> None:
    with start(max_batch=2, max_wait=0.0) as running, Client(running.http) as client:
        running.batcher.row_seconds = 1e-3
        answers = client.batch_retrieve([RetrieveRequest(top_k=1)] * 32)
    assert all(type(answer) is RetrieveResponse for answer in answers)


def test_a_request_whose_deadline_passes_in_the_queue_is_never_run(start, backend, http) -> None:
    with start() as running, ThreadPoolExecutor(4) as pool:
        backend.gate.clear()
        with (
            Client(running.http) as patient,
            Client(running.http, timeout=0.05) as by_rest,
            Client(running.grpc, timeout=0.05) as by_grpc,
        ):
            first = pool.submit(patient.retrieve)
            assert backend.entered.acquire(timeout=10)
            for client in (by_rest, by_grpc):
                with pytest.raises(errors.DeadlineError):
                    client.retrieve()
            by_header = http.post(f"{running.http}/v1/retrieve", json={}, headers={"X-Request-Timeout": "0.02"})
            assert by_header.status_code == 504
            assert by_header.json()["reason"] == "DEADLINE"
            wait_for(running, "genretrieval_in_flight_requests", 1)
            backend.gate.set()
            first.result(10)
            patient.retrieve()
    assert backend.batches == [1, 1]


def test_a_poisoned_request_fails_alone(start, backend, http) -> None:
    with start() as running, ThreadPoolExecutor(4) as pool, Client(running.grpc) as client:
        backend.gate.clear()
        first = pool.submit(client.retrieve)
        assert backend.entered.acquire(timeout=10)
        waiting = [pool.submit(client.retrieve, history=[{"item_id": item}]) for item in ("item-1", POISON, "item-2")]
        wait_for(running, "genretrieval_queue_depth", 3)
        backend.gate.set()
        assert isinstance(waiting[1].exception(10), errors.GenRetrievalError)
        assert all(len(future.result(10).items) == 10 for future in (first, waiting[0], waiting[2]))
        assert http.get(f"{running.http}/livez").status_code == 200
    assert backend.batches == [1, 3, 1, 1, 1]


@pytest.fixture
def store(tmp_path: Any) -> Iterator[SqlStore]:
    store = SqlStore.open(f"sqlite:///{tmp_path}/admin.db")
    yield store
    store.close()


def pin(item: str) -> Create:
    effect = {"kind": "pin", "items": [{"item_id": item, "position": 1}]}
    return Create(Kind.RULES, item, RuleFields(condition={"scenarios": ["home"]}, effect=effect))


def test_both_transports_show_what_operators_changed(start, store) -> None:
    sofa = SynonymsFields(kind="two_way", terms=["sofa", "couch"])
    (_, rule) = store.apply(Call("ann"), [Create(Kind.SYNONYMS, "sofa", sofa), pin("item-9")])
    home = RetrieveRequest(query="sofa", scenario="home")
    with start(store=store) as running, Client(running.grpc) as by_grpc, Client(running.http) as by_rest:
        response = by_grpc.retrieve(home)
        assert untimed(by_rest.retrieve(home)) == untimed(response)
        assert response.items[0].item_id == "item-9"
        assert [item.touched_by for item in response.items] == [["rules/item-9"]] + [[]] * 9
        assert response.applied == ["rules/item-9", "synonyms/sofa"]
        assert response.revision == rule.revision
        # Nobody tells the server of this one, so a reader asks for it.
        (rule,) = store.apply(Call("ann"), [pin("item-14")])
        newer = home.model_copy(update={"min_revision": rule.revision})
        for client in (by_grpc, by_rest):
            (response,) = client.batch_retrieve([newer])
            assert response.applied == ["rules/item-14", "rules/item-9", "synonyms/sofa"]
            assert response.revision == rule.revision
        # Whoever matches nothing gets what the model alone would give.
        plain = RetrieveRequest(history=[{"item_id": "item-4"}])
        (direct,) = running.retriever.retrieve([plain])
        assert by_grpc.retrieve(plain).items == by_rest.retrieve(plain).items == direct.items


def test_a_request_keeps_the_admin_state_that_it_began_with(start, backend, store) -> None:
    store.apply(Call("ann"), [pin("item-9")])
    home = RetrieveRequest(scenario="home")
    with start(store=store) as running, ThreadPoolExecutor(2) as pool, Client(running.grpc) as client:
        backend.gate.clear()
        first = pool.submit(client.retrieve, home)
        assert backend.entered.acquire(timeout=10)
        waiting = pool.submit(client.retrieve, home)
        wait_for(running, "genretrieval_queue_depth", 1)
        store.apply(Call("ann"), [pin("item-14")])
        wait_for(running, "genretrieval_admin_revision", 2)
        backend.gate.set()
        for begun in (first, waiting):
            assert (begun.result(10).revision, begun.result(10).applied) == (1, ["rules/item-9"])
        assert client.retrieve(home).applied == ["rules/item-14", "rules/item-9"]


def test_a_revision_that_is_not_there_yet_is_an_error_of_its_own(start, store, http) -> None:
    with start(store=store) as running:
        for url in (running.grpc, running.http):
            with Client(url) as client, pytest.raises(errors.StaleReplicaError, match="this replica has 0"):
                client.retrieve(min_revision=5)
        answer = http.post(f"{running.http}/v1/retrieve", json={"min_revision": 5})
        assert (answer.status_code, answer.json()["reason"]) == (409, "STALE_REPLICA")
        with grpc.insecure_channel(running.grpc_address) as channel:
            stub = stubs.RetrievalServiceStub(channel)
            with pytest.raises(grpc.RpcError) as failed:
                stub.Retrieve(pb.RetrieveRequest(min_revision=5), timeout=10)
            assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
        text = http.get(f"{running.http}/metrics").text
        assert 'genretrieval_rejected_total{reason="STALE_REPLICA"} 4.0' in text


def test_without_admin_state_there_is_no_revision_to_wait_for(client) -> None:
    assert client.retrieve(min_revision=0).revision == 0
    with pytest.raises(errors.StaleReplicaError, match="has no admin state"):
        client.retrieve(min_revision=1)


def test_a_response_says_that_the_admin_state_may_be_old(start, store, monkeypatch) -> None:
    store.apply(Call("ann"), [pin("item-9")])
    with start(store=store) as running, Client(running.grpc) as by_grpc, Client(running.http) as by_rest:
        monkeypatch.setattr(Replica, "lag", STALE_SECONDS + 1)
        for client in (by_grpc, by_rest):
            response = client.retrieve(scenario="home")
            assert response.degraded == ["admin_state_stale"]
            assert response.items[0].item_id == "item-9"


def test_wire_keeps_every_field(example) -> None:
    for request in (example, example.model_copy(update={"min_revision": 2**40, "bindings": "off"})):
        assert wire.request_from_proto(wire.request_to_proto(request)) == request
    assert wire.request_from_proto(pb.RetrieveRequest()) == RetrieveRequest()
    assert set(pb.RetrieveRequest.DESCRIPTOR.fields_by_name) == set(RetrieveRequest.model_fields)
    assert set(pb.RetrieveResponse.DESCRIPTOR.fields_by_name) == set(RetrieveResponse.model_fields)
    assert set(pb.RetrievedItem.DESCRIPTOR.fields_by_name) == set(RetrievedItem.model_fields)
    written = RetrievedItem(item_id="a", score=-1.5, semantic_id=[1, 2], level_scores=[-0.5, -1.0])
    # Added by the dense head, whose score may be 0 and is then given all the same.
    added = RetrievedItem(item_id="b", score=-2.0, semantic_id=[0, 1], level_scores=[], dense_score=0.0)
    bound = added.model_copy(update={"keyword_path": ["shoe", "", "red"], "touched_by": ["keywords/new", "rules/r"]})
    response = RetrieveResponse(items=[written, added, bound], bundle_version="v", revision=2**40, applied=["rules/r"])
    assert wire.response_from_proto(wire.response_to_proto(response)) == response


def test_the_client_refuses_other_addresses_and_mixed_arguments() -> None:
    for url in ("localhost:80", "ftp://localhost", "grpc://"):
        with pytest.raises(errors.InvalidInputError, match="grpc://host:port"):
            Client(url)
    with Client("http://127.0.0.1:9") as client:
        with pytest.raises(errors.InvalidInputError, match="not both"):
            client.retrieve(RetrieveRequest(), top_k=1)
        with pytest.raises(errors.UnavailableError, match="cannot be reached"):
            client.retrieve()


def test_bytes_that_are_no_message_are_the_callers_fault(running) -> None:
    with grpc.insecure_channel(running.grpc_address) as channel:
        # Without a serialiser, bytes go as they are: a length that the message does not have.
        call = channel.unary_unary("/genretrieval.v1.RetrievalService/Retrieve")
        with pytest.raises(grpc.RpcError) as refused:
            call(b"\x0a\xff", timeout=10)
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "no protobuf of this call" in refused.value.details()
