"""The request and the response of a retrieval: the same offline, by REST, by gRPC and in the client."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_TOP_K = 500
MAX_BEAM_WIDTH = 512
MAX_HISTORY_EVENTS = 1000
# The end of the year 9999: milliseconds given by mistake lie beyond it.
MAX_TIMESTAMP = 253_402_300_799
# Characters. Logs are held to them too (`genretrieval.schemas`), for every case of an evaluation is a request.
MAX_ID_LENGTH = 512
MAX_NAME_LENGTH = 64
MAX_QUERY_LENGTH = 2048

Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HistoryEvent(_Message):
    """One past interaction of the user, oldest first in a request.

    An `exposure` is no interaction. A bundle whose model reads a long past reads those before its history; every other
    one passes over them.
    """

    item_id: Id
    event: str = Field(default="", max_length=MAX_NAME_LENGTH, description="Behaviour, e.g. click or purchase.")
    timestamp: int | None = Field(default=None, ge=0, le=MAX_TIMESTAMP, strict=True, description="Unix seconds.")


class Filters(_Message):
    """What an item must satisfy to be returned; all conditions hold together."""

    attributes: dict[str, list[str]] = Field(
        default_factory=dict,
        description="Attribute to accepted values, any of which will do; `category` looks into `categories`.",
    )
    min_price: float | None = Field(default=None, allow_inf_nan=False, strict=True)
    max_price: float | None = Field(default=None, allow_inf_nan=False, strict=True)
    in_stock: bool | None = Field(default=None, strict=True, description="True: only items in stock.")


class RetrieveRequest(_Message):
    """A search (a query, with or without a history), a recommendation (a history alone), or neither.

    Without a query and a history the answer is what the model expects of an unknown visitor, which is close
    to popularity. Items that the catalogue does not have are ignored and named in `missing_ids`.
    """

    user_id: str | None = Field(
        default=None,
        max_length=MAX_ID_LENGTH,
        description="Whose stored history joins, where the server stores any; logs have a keyed hash of it alone.",
    )
    query: str | None = Field(default=None, max_length=MAX_QUERY_LENGTH)
    history: list[HistoryEvent] = Field(default_factory=list, max_length=MAX_HISTORY_EVENTS)
    profile: dict[str, str] = Field(default_factory=dict, description="Profile features by name.")
    scenario: str | None = Field(
        default=None, max_length=MAX_NAME_LENGTH, description="Page or surface that asks, e.g. home."
    )
    filters: Filters | None = None
    exclude_item_ids: list[Id] = Field(default_factory=list, max_length=MAX_HISTORY_EVENTS)
    exclude_history: Literal["off", "purchased", "all"] = "off"
    collapse_by: str | None = Field(
        default=None,
        max_length=MAX_NAME_LENGTH,
        description="Attribute of which no value may fill the result, e.g. parent_id, brand.",
    )
    collapse_cap: int = Field(
        default=1, ge=1, le=MAX_TOP_K, strict=True, description="Items of one value of `collapse_by` at most."
    )
    top_k: int = Field(default=10, ge=1, le=MAX_TOP_K, strict=True)
    beam_width: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEAM_WIDTH,
        strict=True,
        description="Default: the bundle's; never below top_k. Wider finds more.",
    )
    bindings: Literal["first", "routed", "off"] = Field(
        default="first",
        description="Items of a bound keyword in the query come first; or where the model itself writes the keyword's "
        "slot; or as if nothing were bound.",
    )
    min_revision: int | None = Field(
        default=None,
        ge=0,
        le=2**63 - 1,
        strict=True,
        description="Of the admin state, as a change of it returned: the answer waits for it within the deadline.",
    )


class RetrievedItem(_Message):
    """An item and how it was written."""

    item_id: str
    score: float = Field(
        description="What items are ordered by: the summed log-probability of the codes, and where the bundle has a "
        "dense head its weighted score."
    )
    semantic_id: list[int]
    level_scores: list[float] = Field(
        description="Log-probability of each code; empty for an item that the dense head added to what was written."
    )
    dense_score: float | None = Field(default=None, description="By the dense head, where the bundle has one.")
    keyword_path: list[str] = Field(
        default_factory=list,
        description="Where codebooks are keyword-aligned, the word of each group in the item's ID; empty for none.",
    )
    touched_by: list[str] = Field(
        default_factory=list, description="Bindings and rules that brought or moved it, e.g. keywords/labubu."
    )


class Timings(_Message):
    """Milliseconds spent on a request."""

    queue_ms: float = 0.0
    inference_ms: float = 0.0
    total_ms: float = 0.0


class RetrieveResponse(_Message):
    """Items, best first; equal scores are ordered by leaf, then by popularity within a leaf."""

    items: list[RetrievedItem]
    missing_ids: list[str] = Field(default_factory=list, description="Ids of the request not in the catalogue.")
    degraded: list[str] = Field(
        default_factory=list,
        description="Why this is less than asked: `fewer_than_top_k`, `query_ignored`, `history_truncated`, "
        "`history_unavailable`; or older: `admin_state_stale`.",
    )
    revision: int = Field(default=0, description="Revision of the admin state that was applied.")
    applied: list[str] = Field(
        default_factory=list, description="Rules, synonyms and bindings that the request matched, by name."
    )
    bundle_version: str = ""
    catalogue_revision: int = Field(
        default=0, description="Changes of the catalogue since the bundle was written that this answer has seen."
    )
    attribution_token: str = Field(
        default="", description="Opaque, and of this answer alone; send it back with events so that they can be joined."
    )
    timings: Timings = Timings()
