"""Messages of the admin API beside its resources: what is created, pages, batches, tests, snapshots."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from typing import Annotated, Any, Generic, Literal, TypeVar, cast

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StrictInt, ValidationError, create_model

from genretrieval.keywords import normalise
from genretrieval.request import Id, RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin.resources import (
    Alias,
    AliasFields,
    AuditEvent,
    Fields,
    Keyword,
    KeywordFields,
    Kind,
    Resource,
    ResourceId,
    Rule,
    RuleFields,
    Synonyms,
    SynonymsFields,
)
from genretrieval_serving.messages import request_error

MAX_OPERATIONS = 1000
MAX_ITEMS = 10_000
MAX_PAGE = 1000

R = TypeVar("R")


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class _New(_Message):
    id: ResourceId | None = Field(default=None, description="Made from the fields where none is given.")


class NewKeyword(_New, KeywordFields):
    """A keyword to create."""


class NewRule(_New, RuleFields):
    """A rule to create."""


class NewSynonyms(_New, SynonymsFields):
    """A synonym set to create."""


class NewAlias(_New, AliasFields):
    """An alias to create."""

    id: ResourceId = Field(description="Servers name it with `--alias`.")


NewResource = NewKeyword | NewRule | NewSynonyms | NewAlias
FIELDS: dict[Kind, type[Fields]] = {
    Kind.KEYWORDS: KeywordFields,
    Kind.RULES: RuleFields,
    Kind.SYNONYMS: SynonymsFields,
    Kind.ALIASES: AliasFields,
}
NEW: dict[Kind, type[NewResource]] = {
    Kind.KEYWORDS: NewKeyword,
    Kind.RULES: NewRule,
    Kind.SYNONYMS: NewSynonyms,
    Kind.ALIASES: NewAlias,
}
STORED: dict[Kind, type[Resource]] = {
    Kind.KEYWORDS: Keyword,
    Kind.RULES: Rule,
    Kind.SYNONYMS: Synonyms,
    Kind.ALIASES: Alias,
}


def fields_of(kind: Kind, source: Resource | NewResource) -> Fields:
    """What a caller wrote of a resource, without what the server added."""
    return FIELDS[kind].model_construct(**{name: getattr(source, name) for name in FIELDS[kind].model_fields})


def id_of(kind: Kind, new: NewResource) -> str:
    """The id that was given, or one made from the fields: the same fields make the same id."""
    if new.id is not None:
        return new.id
    if isinstance(new, NewRule):
        return f"{new.effect.kind}-{_digest(fields_of(kind, new).model_dump_json())}"
    text = normalise(new.text if isinstance(new, NewKeyword) else " ".join(new.terms))
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    slug = "-".join(re.findall("[a-z0-9]+", plain))[:50].rstrip("-")
    if slug and slug.replace("-", " ") == text:
        return slug
    # The letters lost something that tells it from another text.
    return f"{slug}-{_digest(text)}".lstrip("-")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def patched(kind: Kind, resource: Resource, patch: dict[str, Any]) -> Fields:
    """Fields of a resource after a merge patch (RFC 7396): null takes a field away, objects are merged.

    Raises:
        RequestError: the result is no valid resource.
    """
    before = fields_of(kind, resource).model_dump(mode="json")
    try:
        return FIELDS[kind].model_validate_json(json.dumps(_merged(before, patch)))
    except ValidationError as error:
        raise request_error(error.errors()) from error


def _merged(target: Any, patch: Any) -> Any:
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


def patch_model(kind: Kind) -> type[BaseModel]:
    """How a merge patch of a kind looks, for the interface's description."""
    optional: dict[str, Any] = {
        name: (field.annotation if field.is_required() else cast(Any, field.annotation) | None, None)
        for name, field in FIELDS[kind].model_fields.items()
    }
    name = FIELDS[kind].__name__.removesuffix("Fields") + "Patch"
    return create_model(name, __config__=ConfigDict(extra="forbid"), **optional)


class Listed(_Message, Generic[R]):
    """Some resources, and where the next page begins; no token at the end."""

    resources: list[R]
    next_page_token: str = ""


class AuditPage(_Message):
    """Audit events, newest first."""

    events: list[AuditEvent]
    next_page_token: str = ""


class CreateOperation(_Message, Generic[R]):
    """One resource more."""

    action: Literal["create"]
    resource: R


class UpdateOperation(_Message):
    """A merge patch of one resource."""

    action: Literal["update"]
    id: ResourceId
    patch: dict[str, Any]
    etag: str | None = None


class DeleteOperation(_Message):
    """One resource less."""

    action: Literal["delete"]
    id: ResourceId
    etag: str | None = None


class UndeleteOperation(_Message):
    """A deleted resource back."""

    action: Literal["undelete"]
    id: ResourceId
    etag: str | None = None


class Batch(_Message, Generic[R]):
    """Operations that are done together, in this order, or not at all."""

    operations: list[
        Annotated[
            CreateOperation[R] | UpdateOperation | DeleteOperation | UndeleteOperation, Field(discriminator="action")
        ]
    ] = Field(min_length=1, max_length=MAX_OPERATIONS)


class Changed(_Message, Generic[R]):
    """Resources as they are after a change, in the order of its operations, and its revision."""

    revision: int
    resources: list[R]


class Imported(_Message):
    """What an import did; resources that were the same already are left alone."""

    revision: int
    created: int
    updated: int
    unchanged: int


class Trial(_Message, Generic[R]):
    """A resource, which is not stored, and the request to try it on."""

    resource: R
    request: RetrieveRequest


class TrialResult(_Message):
    """The answer to one request without the resource, and with it."""

    before: RetrieveResponse
    after: RetrieveResponse
    missing_ids: list[str] = Field(description="Items that the resource names and the catalogue does not have.")


class LevelSlots(_Message):
    """Slots of one level of the keyword codebooks."""

    level: int
    free: int


class Slots(_Message):
    """Reserved slots by state."""

    free: int
    bound: int
    quarantined: int = Field(description="Given up lately; free again when no replica can still refer to them.")
    levels: list[LevelSlots] = Field(description="Levels that have a free one.")


class Revision(_Message):
    """The revision that is in force."""

    revision: int


class Snapshot(_Message):
    """All admin state at one revision, deleted resources included."""

    revision: int
    taken_at: AwareDatetime
    keywords: list[Keyword]
    rules: list[Rule]
    synonyms: list[Synonyms]
    aliases: list[Alias]


class ArmStatus(_Message):
    """A bundle that this server answers with, or should."""

    arm: Literal["primary", "canary"]
    wanted: str | None = Field(default=None, description="Bundle that the alias asks for; none without an alias.")
    bundle: str | None = Field(default=None, description="Bundle that answers; none where no alias is followed.")
    version: str | None = Field(default=None, description="Of the bundle that answers; none while none does.")
    uuid: str | None = None
    since: AwareDatetime | None = Field(default=None, description="When it began to answer as this arm.")
    share: float = Field(description="Of the users.")
    items: int = Field(default=0, description="That can be retrieved.")
    catalogue_revision: int = 0
    error: str | None = Field(default=None, description="Why what is wanted does not answer.")
    failures: int = Field(default=0, description="How often it was tried.")
    retry_at: AwareDatetime | None = None


class DeploymentStatus(_Message):
    """What one server answers with, and what the alias that it follows asks of it."""

    alias: str | None = None
    error: str | None = Field(default=None, description="Why the alias is not followed now; that is tried again.")
    arms: list[ArmStatus]


class BundleInfo(_Message):
    """A folder among those that a server can be told to serve; its files are not checked."""

    name: str
    version: str | None = None
    uuid: str | None = None
    parent_uuid: str | None = None
    created: AwareDatetime | None = None
    items: int | None = None
    metrics: dict[str, float] = {}
    error: str | None = Field(default=None, description="Why it cannot be served.")


class BundleList(_Message):
    """Bundles by name."""

    bundles: list[BundleInfo]


class ItemChange(BaseModel):
    """One item to add, change or remove; further members are attributes of the catalogue.

    An attribute that is not there stays as it is; null takes its value away.
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    item_id: Id
    op: Literal["upsert", "remove"] = "upsert"
    semantic_id: list[StrictInt] | None = Field(
        default=None, max_length=64, description="Of an item that the catalogue does not have, as a tokenizer made it."
    )


class ItemChanges(_Message):
    """Items that are changed together, or not at all."""

    items: list[ItemChange] = Field(min_length=1, max_length=MAX_ITEMS)


class ItemsChanged(_Message):
    """What a change came to."""

    catalogue_revision: int = Field(description="Of the catalogue that has it, on this server.")
    file: str = Field(description="Name of the file in the folder of changes; empty where it was only checked.")
    upserted: int
    removed: int
    missing_ids: list[str] = Field(description="Items that were to be removed and are not there.")


class Item(_Message):
    """An item as this server has it now."""

    item_id: str
    semantic_id: list[int]
    removed: bool
    popularity: int
    attributes: dict[str, Any]
    catalogue_revision: int
