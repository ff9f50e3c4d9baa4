"""Between the protobuf messages and the pydantic ones. Validation is pydantic's, whatever the transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import ValidationError

from genretrieval.errors import GenRetrievalError
from genretrieval.request import (
    Filters,
    HistoryEvent,
    RetrievedItem,
    RetrieveRequest,
    RetrieveResponse,
    Timings,
)
from genretrieval_serving._proto.genretrieval.v1 import retrieval_pb2 as pb
from genretrieval_serving.messages import (
    BatchRetrieveRequest,
    FeedbackEvent,
    Limits,
    RecordEventsRequest,
    RecordEventsResponse,
    ServerInfo,
    error_from,
    request_error,
)

_EXCLUDE: dict[int, Literal["off", "purchased", "all"]] = {
    pb.EXCLUDE_HISTORY_OFF: "off",
    pb.EXCLUDE_HISTORY_PURCHASED: "purchased",
    pb.EXCLUDE_HISTORY_ALL: "all",
}
_EXCLUDE_PROTO: dict[str, Any] = {name: number for number, name in _EXCLUDE.items()}
_BINDINGS: dict[int, Literal["first", "routed", "off"]] = {
    pb.BINDINGS_FIRST: "first",
    pb.BINDINGS_ROUTED: "routed",
    pb.BINDINGS_OFF: "off",
}
_BINDINGS_PROTO: dict[str, Any] = {name: number for number, name in _BINDINGS.items()}


def _given(message: Any, *names: str) -> dict[str, Any]:
    """Those of the optional fields that were set."""
    return {name: getattr(message, name) for name in names if message.HasField(name)}


def _request_fields(message: Any) -> dict[str, Any]:
    fields = _given(
        message, "user_id", "query", "top_k", "beam_width", "scenario", "min_revision", "collapse_by", "collapse_cap"
    ) | {
        "history": [{"item_id": e.item_id, "event": e.event} | _given(e, "timestamp") for e in message.history],
        "profile": dict(message.profile),
        "exclude_item_ids": list(message.exclude_item_ids),
    }
    if message.HasField("filters"):
        given = _given(message.filters, "min_price", "max_price", "in_stock")
        attributes = {name: list(list_.values) for name, list_ in message.filters.attributes.items()}
        fields["filters"] = given | {"attributes": attributes}
    if message.exclude_history:
        fields["exclude_history"] = _EXCLUDE.get(message.exclude_history, message.exclude_history)
    if message.bindings:
        fields["bindings"] = _BINDINGS.get(message.bindings, message.bindings)
    return fields


def request_from_proto(message: Any) -> RetrieveRequest:
    """A ``RetrieveRequest`` message, validated.

    Raises:
        RequestError: a field is malformed or out of range.
    """
    try:
        return RetrieveRequest.model_validate(_request_fields(message))
    except ValidationError as error:
        raise request_error(error.errors()) from error


def batch_from_proto(message: Any) -> list[RetrieveRequest]:
    """The requests of a ``BatchRetrieveRequest`` message, validated.

    Raises:
        RequestError: a request is malformed, or there is none.
    """
    try:
        fields = {"requests": [_request_fields(request) for request in message.requests]}
        return BatchRetrieveRequest.model_validate(fields).requests
    except ValidationError as error:
        raise request_error(error.errors()) from error


def events_from_proto(message: Any) -> list[FeedbackEvent]:
    """The events of a ``RecordEventsRequest`` message, validated.

    Raises:
        RequestError: an event is malformed, or there is none.
    """
    optional = ("attribution_token", "user_id", "timestamp", "value")
    events = [{"item_id": e.item_id, "event": e.event} | _given(e, *optional) for e in message.events]
    try:
        return RecordEventsRequest.model_validate({"events": events}).events
    except ValidationError as error:
        raise request_error(error.errors()) from error


def events_to_proto(events: Sequence[FeedbackEvent]) -> Any:
    """A ``RecordEventsRequest`` message."""
    return pb.RecordEventsRequest(events=[pb.FeedbackEvent(**event.model_dump()) for event in events])


def recorded_to_proto(recorded: RecordEventsResponse) -> Any:
    """A ``RecordEventsResponse`` message."""
    return pb.RecordEventsResponse(**recorded.model_dump())


def recorded_from_proto(message: Any) -> RecordEventsResponse:
    """A ``RecordEventsResponse`` from its message."""
    return RecordEventsResponse(accepted=message.accepted, degraded=list(message.degraded))


def _event_to_proto(event: HistoryEvent) -> Any:
    return pb.HistoryEvent(item_id=event.item_id, event=event.event, timestamp=event.timestamp)


def _filters_to_proto(filters: Filters) -> Any:
    return pb.Filters(
        attributes={name: pb.StringList(values=values) for name, values in filters.attributes.items()},
        min_price=filters.min_price,
        max_price=filters.max_price,
        in_stock=filters.in_stock,
    )


def request_to_proto(request: RetrieveRequest) -> Any:
    """A ``RetrieveRequest`` message."""
    return pb.RetrieveRequest(
        user_id=request.user_id,
        query=request.query,
        history=[_event_to_proto(event) for event in request.history],
        profile=request.profile,
        filters=_filters_to_proto(request.filters) if request.filters is not None else None,
        exclude_item_ids=request.exclude_item_ids,
        exclude_history=_EXCLUDE_PROTO[request.exclude_history],
        top_k=request.top_k,
        beam_width=request.beam_width,
        scenario=request.scenario,
        bindings=_BINDINGS_PROTO[request.bindings],
        min_revision=request.min_revision,
        collapse_by=request.collapse_by,
        collapse_cap=request.collapse_cap,
    )


def response_to_proto(response: RetrieveResponse) -> Any:
    """A ``RetrieveResponse`` message."""
    return pb.RetrieveResponse(
        items=[
            pb.RetrievedItem(
                item_id=item.item_id,
                score=item.score,
                semantic_id=item.semantic_id,
                level_scores=item.level_scores,
                dense_score=item.dense_score,
                keyword_path=item.keyword_path,
                touched_by=item.touched_by,
            )
            for item in response.items
        ],
        missing_ids=response.missing_ids,
        degraded=response.degraded,
        revision=response.revision,
        bundle_version=response.bundle_version,
        attribution_token=response.attribution_token,
        applied=response.applied,
        catalogue_revision=response.catalogue_revision,
        timings=pb.Timings(**response.timings.model_dump()),
    )


def response_from_proto(message: Any) -> RetrieveResponse:
    """A ``RetrieveResponse`` from its message."""
    return RetrieveResponse(
        items=[
            RetrievedItem(
                item_id=item.item_id,
                score=item.score,
                semantic_id=list(item.semantic_id),
                level_scores=list(item.level_scores),
                dense_score=item.dense_score if item.HasField("dense_score") else None,
                keyword_path=list(item.keyword_path),
                touched_by=list(item.touched_by),
            )
            for item in message.items
        ],
        missing_ids=list(message.missing_ids),
        degraded=list(message.degraded),
        revision=message.revision,
        bundle_version=message.bundle_version,
        attribution_token=message.attribution_token,
        applied=list(message.applied),
        catalogue_revision=message.catalogue_revision,
        timings=Timings(
            queue_ms=message.timings.queue_ms,
            inference_ms=message.timings.inference_ms,
            total_ms=message.timings.total_ms,
        ),
    )


def outcome_to_proto(outcome: RetrieveResponse | GenRetrievalError) -> Any:
    """A ``BatchResult`` message."""
    if isinstance(outcome, GenRetrievalError):
        return pb.BatchResult(error=pb.Error(reason=outcome.reason, detail=str(outcome)))
    return pb.BatchResult(response=response_to_proto(outcome))


def outcome_from_proto(message: Any) -> RetrieveResponse | GenRetrievalError:
    """The response or the error of a ``BatchResult`` message."""
    if message.HasField("error"):
        return error_from(message.error.reason, message.error.detail, otherwise=GenRetrievalError)
    return response_from_proto(message.response)


def info_to_proto(info: ServerInfo) -> Any:
    """A ``GetInfoResponse`` message."""
    return pb.GetInfoResponse(**info.model_dump(exclude={"limits"}), limits=info.limits.model_dump())


def info_from_proto(message: Any) -> ServerInfo:
    """A ``ServerInfo`` from its message."""
    values = {field.name: getattr(message, field.name) for field in message.DESCRIPTOR.fields}
    limits = {field.name: getattr(message.limits, field.name) for field in message.limits.DESCRIPTOR.fields}
    return ServerInfo(**values | {"limits": Limits(**limits)})
