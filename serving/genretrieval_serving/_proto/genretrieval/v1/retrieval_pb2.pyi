from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExcludeHistory(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXCLUDE_HISTORY_UNSPECIFIED: _ClassVar[ExcludeHistory]
    EXCLUDE_HISTORY_OFF: _ClassVar[ExcludeHistory]
    EXCLUDE_HISTORY_PURCHASED: _ClassVar[ExcludeHistory]
    EXCLUDE_HISTORY_ALL: _ClassVar[ExcludeHistory]

class Bindings(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BINDINGS_UNSPECIFIED: _ClassVar[Bindings]
    BINDINGS_FIRST: _ClassVar[Bindings]
    BINDINGS_ROUTED: _ClassVar[Bindings]
    BINDINGS_OFF: _ClassVar[Bindings]
EXCLUDE_HISTORY_UNSPECIFIED: ExcludeHistory
EXCLUDE_HISTORY_OFF: ExcludeHistory
EXCLUDE_HISTORY_PURCHASED: ExcludeHistory
EXCLUDE_HISTORY_ALL: ExcludeHistory
BINDINGS_UNSPECIFIED: Bindings
BINDINGS_FIRST: Bindings
BINDINGS_ROUTED: Bindings
BINDINGS_OFF: Bindings

class HistoryEvent(_message.Message):
    __slots__ = ("item_id", "event", "timestamp")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    event: str
    timestamp: int
    def __init__(self, item_id: _Optional[str] = ..., event: _Optional[str] = ..., timestamp: _Optional[int] = ...) -> None: ...

class StringList(_message.Message):
    __slots__ = ("values",)
    VALUES_FIELD_NUMBER: _ClassVar[int]
    values: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, values: _Optional[_Iterable[str]] = ...) -> None: ...

class Filters(_message.Message):
    __slots__ = ("attributes", "min_price", "max_price", "in_stock")
    class AttributesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: StringList
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[StringList, _Mapping]] = ...) -> None: ...
    ATTRIBUTES_FIELD_NUMBER: _ClassVar[int]
    MIN_PRICE_FIELD_NUMBER: _ClassVar[int]
    MAX_PRICE_FIELD_NUMBER: _ClassVar[int]
    IN_STOCK_FIELD_NUMBER: _ClassVar[int]
    attributes: _containers.MessageMap[str, StringList]
    min_price: float
    max_price: float
    in_stock: bool
    def __init__(self, attributes: _Optional[_Mapping[str, StringList]] = ..., min_price: _Optional[float] = ..., max_price: _Optional[float] = ..., in_stock: _Optional[bool] = ...) -> None: ...

class RetrieveRequest(_message.Message):
    __slots__ = ("user_id", "query", "history", "profile", "filters", "exclude_item_ids", "exclude_history", "top_k", "beam_width", "scenario", "min_revision", "bindings", "collapse_by", "collapse_cap")
    class ProfileEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    QUERY_FIELD_NUMBER: _ClassVar[int]
    HISTORY_FIELD_NUMBER: _ClassVar[int]
    PROFILE_FIELD_NUMBER: _ClassVar[int]
    FILTERS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ITEM_IDS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_HISTORY_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    SCENARIO_FIELD_NUMBER: _ClassVar[int]
    MIN_REVISION_FIELD_NUMBER: _ClassVar[int]
    BINDINGS_FIELD_NUMBER: _ClassVar[int]
    COLLAPSE_BY_FIELD_NUMBER: _ClassVar[int]
    COLLAPSE_CAP_FIELD_NUMBER: _ClassVar[int]
    user_id: str
    query: str
    history: _containers.RepeatedCompositeFieldContainer[HistoryEvent]
    profile: _containers.ScalarMap[str, str]
    filters: Filters
    exclude_item_ids: _containers.RepeatedScalarFieldContainer[str]
    exclude_history: ExcludeHistory
    top_k: int
    beam_width: int
    scenario: str
    min_revision: int
    bindings: Bindings
    collapse_by: str
    collapse_cap: int
    def __init__(self, user_id: _Optional[str] = ..., query: _Optional[str] = ..., history: _Optional[_Iterable[_Union[HistoryEvent, _Mapping]]] = ..., profile: _Optional[_Mapping[str, str]] = ..., filters: _Optional[_Union[Filters, _Mapping]] = ..., exclude_item_ids: _Optional[_Iterable[str]] = ..., exclude_history: _Optional[_Union[ExcludeHistory, str]] = ..., top_k: _Optional[int] = ..., beam_width: _Optional[int] = ..., scenario: _Optional[str] = ..., min_revision: _Optional[int] = ..., bindings: _Optional[_Union[Bindings, str]] = ..., collapse_by: _Optional[str] = ..., collapse_cap: _Optional[int] = ...) -> None: ...

class RetrievedItem(_message.Message):
    __slots__ = ("item_id", "score", "semantic_id", "level_scores", "dense_score", "keyword_path", "touched_by")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    SEMANTIC_ID_FIELD_NUMBER: _ClassVar[int]
    LEVEL_SCORES_FIELD_NUMBER: _ClassVar[int]
    DENSE_SCORE_FIELD_NUMBER: _ClassVar[int]
    KEYWORD_PATH_FIELD_NUMBER: _ClassVar[int]
    TOUCHED_BY_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    score: float
    semantic_id: _containers.RepeatedScalarFieldContainer[int]
    level_scores: _containers.RepeatedScalarFieldContainer[float]
    dense_score: float
    keyword_path: _containers.RepeatedScalarFieldContainer[str]
    touched_by: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, item_id: _Optional[str] = ..., score: _Optional[float] = ..., semantic_id: _Optional[_Iterable[int]] = ..., level_scores: _Optional[_Iterable[float]] = ..., dense_score: _Optional[float] = ..., keyword_path: _Optional[_Iterable[str]] = ..., touched_by: _Optional[_Iterable[str]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("queue_ms", "inference_ms", "total_ms")
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    queue_ms: float
    inference_ms: float
    total_ms: float
    def __init__(self, queue_ms: _Optional[float] = ..., inference_ms: _Optional[float] = ..., total_ms: _Optional[float] = ...) -> None: ...

class RetrieveResponse(_message.Message):
    __slots__ = ("items", "missing_ids", "degraded", "revision", "bundle_version", "attribution_token", "timings", "applied", "catalogue_revision")
    ITEMS_FIELD_NUMBER: _ClassVar[int]
    MISSING_IDS_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    CATALOGUE_REVISION_FIELD_NUMBER: _ClassVar[int]
    items: _containers.RepeatedCompositeFieldContainer[RetrievedItem]
    missing_ids: _containers.RepeatedScalarFieldContainer[str]
    degraded: _containers.RepeatedScalarFieldContainer[str]
    revision: int
    bundle_version: str
    attribution_token: str
    timings: Timings
    applied: _containers.RepeatedScalarFieldContainer[str]
    catalogue_revision: int
    def __init__(self, items: _Optional[_Iterable[_Union[RetrievedItem, _Mapping]]] = ..., missing_ids: _Optional[_Iterable[str]] = ..., degraded: _Optional[_Iterable[str]] = ..., revision: _Optional[int] = ..., bundle_version: _Optional[str] = ..., attribution_token: _Optional[str] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., applied: _Optional[_Iterable[str]] = ..., catalogue_revision: _Optional[int] = ...) -> None: ...

class BatchRetrieveRequest(_message.Message):
    __slots__ = ("requests",)
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    requests: _containers.RepeatedCompositeFieldContainer[RetrieveRequest]
    def __init__(self, requests: _Optional[_Iterable[_Union[RetrieveRequest, _Mapping]]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("reason", "detail")
    REASON_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    reason: str
    detail: str
    def __init__(self, reason: _Optional[str] = ..., detail: _Optional[str] = ...) -> None: ...

class BatchResult(_message.Message):
    __slots__ = ("response", "error")
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    response: RetrieveResponse
    error: Error
    def __init__(self, response: _Optional[_Union[RetrieveResponse, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class BatchRetrieveResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[BatchResult]
    def __init__(self, results: _Optional[_Iterable[_Union[BatchResult, _Mapping]]] = ...) -> None: ...

class FeedbackEvent(_message.Message):
    __slots__ = ("item_id", "event", "attribution_token", "user_id", "timestamp", "value")
    ITEM_ID_FIELD_NUMBER: _ClassVar[int]
    EVENT_FIELD_NUMBER: _ClassVar[int]
    ATTRIBUTION_TOKEN_FIELD_NUMBER: _ClassVar[int]
    USER_ID_FIELD_NUMBER: _ClassVar[int]
    TIMESTAMP_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    item_id: str
    event: str
    attribution_token: str
    user_id: str
    timestamp: int
    value: float
    def __init__(self, item_id: _Optional[str] = ..., event: _Optional[str] = ..., attribution_token: _Optional[str] = ..., user_id: _Optional[str] = ..., timestamp: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...

class RecordEventsRequest(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[FeedbackEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[FeedbackEvent, _Mapping]]] = ...) -> None: ...

class RecordEventsResponse(_message.Message):
    __slots__ = ("accepted", "degraded")
    ACCEPTED_FIELD_NUMBER: _ClassVar[int]
    DEGRADED_FIELD_NUMBER: _ClassVar[int]
    accepted: int
    degraded: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, accepted: _Optional[int] = ..., degraded: _Optional[_Iterable[str]] = ...) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Limits(_message.Message):
    __slots__ = ("max_top_k", "max_beam_width", "max_history_events", "max_batch_requests", "max_body_bytes", "max_events")
    MAX_TOP_K_FIELD_NUMBER: _ClassVar[int]
    MAX_BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_HISTORY_EVENTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    MAX_BODY_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_EVENTS_FIELD_NUMBER: _ClassVar[int]
    max_top_k: int
    max_beam_width: int
    max_history_events: int
    max_batch_requests: int
    max_body_bytes: int
    max_events: int
    def __init__(self, max_top_k: _Optional[int] = ..., max_beam_width: _Optional[int] = ..., max_history_events: _Optional[int] = ..., max_batch_requests: _Optional[int] = ..., max_body_bytes: _Optional[int] = ..., max_events: _Optional[int] = ...) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("server_version", "bundle_version", "bundle_uuid", "n_items", "default_beam_width", "max_history", "reads_queries", "limits", "max_past", "scenarios")
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_VERSION_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_UUID_FIELD_NUMBER: _ClassVar[int]
    N_ITEMS_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_BEAM_WIDTH_FIELD_NUMBER: _ClassVar[int]
    MAX_HISTORY_FIELD_NUMBER: _ClassVar[int]
    READS_QUERIES_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    MAX_PAST_FIELD_NUMBER: _ClassVar[int]
    SCENARIOS_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    bundle_version: str
    bundle_uuid: str
    n_items: int
    default_beam_width: int
    max_history: int
    reads_queries: bool
    limits: Limits
    max_past: int
    scenarios: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, server_version: _Optional[str] = ..., bundle_version: _Optional[str] = ..., bundle_uuid: _Optional[str] = ..., n_items: _Optional[int] = ..., default_beam_width: _Optional[int] = ..., max_history: _Optional[int] = ..., reads_queries: _Optional[bool] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., max_past: _Optional[int] = ..., scenarios: _Optional[_Iterable[str]] = ...) -> None: ...
