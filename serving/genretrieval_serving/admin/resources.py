"""The resources of the admin API, as they travel, are stored and are exported.

What a caller writes stands in the classes whose names end in ``Fields``; the server adds the rest.
"""

from __future__ import annotations

import re
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Literal, Self

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    model_validator,
)

from genretrieval.keywords import AttributeType
from genretrieval.request import Filters, Id

MAX_ITEM_IDS = 100_000
MAX_PINS = 50
MAX_BOOST = 1000.0
MAX_REGEX = 256

ResourceId = Annotated[str, StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?$")]
BundleName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
Term = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _no_number(value: object) -> object:
    """Of seconds or milliseconds nobody can tell which were meant."""
    if isinstance(value, int | float) or (isinstance(value, str) and re.fullmatch(r"\s*[-+]?[\d.]+\s*", value)):
        raise ValueError("give a time as 2026-01-31T12:00:00Z, not as a number")
    return value


Instant = Annotated[AwareDatetime, BeforeValidator(_no_number)]


class Kind(StrEnum):
    """Collections of the API; ``keywords/labubu`` is the name of a resource."""

    KEYWORDS = "keywords"
    RULES = "rules"
    SYNONYMS = "synonyms"
    ALIASES = "aliases"


class _Resource(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Selector(_Resource):
    """A set of items: explicit ids, or everything that satisfies a rule, kept up to date as items arrive.

    Exactly one of the two; a rule's parts hold together. Ids that the catalogue does not have are kept and count as
    missing, because the item may arrive.
    """

    item_ids: list[Id] | None = Field(default=None, min_length=1, max_length=MAX_ITEM_IDS)
    text: Term | None = Field(
        default=None, description="Words that stand, one after another, in title, brand or a category."
    )
    filters: Filters | None = Field(default=None, description="Attributes, price range, stock, as in a request.")

    @model_validator(mode="after")
    def _ids_or_a_rule(self) -> Self:
        by_rule = self.text is not None or self.filters is not None
        if (self.item_ids is not None) == by_rule:
            raise ValueError("give item_ids, or a rule of text and filters; not both, and not neither")
        return self


class _Window(_Resource):
    """When something is in force: from `valid_from`, before `valid_until`; None is without an end."""

    valid_from: Instant | None = None
    valid_until: Instant | None = None

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> Self:
        if self.valid_from and self.valid_until and self.valid_from >= self.valid_until:
            raise ValueError("valid_until must lie after valid_from")
        return self

    def valid_at(self, now: datetime) -> bool:
        """Whether it is in force at `now`."""
        begun = self.valid_from is None or self.valid_from <= now
        return begun and (self.valid_until is None or now < self.valid_until)


class Binding(_Window):
    """What a keyword stands for, and when."""

    items: Selector


class KeywordFields(_Resource):
    """A word, and what it is bound to; unbound it holds no slot."""

    text: Term = Field(description="One or more words. No two keywords are equal once normalised.")
    type: AttributeType = Field(
        default=AttributeType.ENTITY, description="Decides in which group a reserved slot is taken first."
    )
    binding: Binding | None = None
    note: str = Field(default="", max_length=1000)


class QueryMatch(_Resource):
    """Which queries; case, width and accents never count."""

    match: Literal["exact", "contains", "regex"] = Field(
        description="`contains` finds whole words; `regex` is sought in linear time, as typed and as normalised."
    )
    text: str = Field(min_length=1, max_length=MAX_REGEX)


class Condition(_Resource):
    """When a rule applies; every part that is given must hold, and none given is always."""

    query: QueryMatch | None = None
    scenarios: list[Annotated[str, StringConstraints(max_length=64)]] = Field(
        default_factory=list, max_length=50, description="Any of these."
    )


class PinnedItem(_Resource):
    """An item at an exact place."""

    item_id: Id
    position: int = Field(ge=1, le=500, strict=True, description="Of the result; 1 is first.")


class PinEffect(_Resource):
    """Items at exact places."""

    kind: Literal["pin"]
    items: list[PinnedItem] = Field(min_length=1, max_length=MAX_PINS)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        positions, ids = [i.position for i in self.items], [i.item_id for i in self.items]
        if len(set(positions)) < len(positions) or len(set(ids)) < len(ids):
            raise ValueError("an item or a position stands there twice")
        return self


class BoostEffect(_Resource):
    """Adds to (`boost`) or subtracts from (`bury`) the score of items."""

    kind: Literal["boost", "bury"]
    items: Selector
    amount: float = Field(
        gt=0, le=MAX_BOOST, strict=True, description="In log-probability: 0.7 is about a factor of two."
    )


class BlockEffect(_Resource):
    """Items that are never returned."""

    kind: Literal["block"]
    items: Selector


Effect = Annotated[PinEffect | BoostEffect | BlockEffect, Field(discriminator="kind")]


class RuleFields(_Window):
    """A condition and an effect. Of two rules that pin to one place, the higher `priority` wins, then the older id."""

    condition: Condition = Condition()
    effect: Effect
    priority: int = Field(default=0, ge=-1000, le=1000, strict=True)
    enabled: StrictBool = True
    note: str = Field(default="", max_length=1000)


class SynonymsFields(_Resource):
    """Terms that mean the same (`two_way`), or of which the first stands for the others too (`one_way`).

    A query that carries a term is read with the other terms, or those it stands for, added at its end.
    """

    kind: Literal["one_way", "two_way"]
    terms: list[Term] = Field(min_length=2, max_length=50)
    enabled: StrictBool = True
    note: str = Field(default="", max_length=1000)


class Canary(_Resource):
    """A bundle that answers a share of the users, always the same ones."""

    bundle: BundleName
    share: float = Field(ge=0, le=1, strict=True)


class AliasFields(_Resource):
    """Which bundle is served: by every server that follows the alias, as soon as it has loaded it."""

    bundle: BundleName = Field(description="Name of its folder in the servers' folder of bundles.")
    canary: Canary | None = None
    note: str = Field(default="", max_length=1000)

    @model_validator(mode="after")
    def _two_bundles(self) -> Self:
        if self.canary and self.canary.bundle == self.bundle:
            raise ValueError(f"{self.bundle} is the bundle and the canary; `:promote` makes a canary the bundle")
        return self

    @property
    def bundles(self) -> list[str]:
        """Names of the bundles that are served."""
        return [self.bundle] + ([self.canary.bundle] if self.canary else [])


class _Stored(_Resource):
    """What the server adds to every resource."""

    id: ResourceId
    etag: str = Field(description="Changes with every change of the resource; send it as If-Match.")
    revision: int = Field(description="Of the admin state at the last change.")
    created_at: AwareDatetime
    updated_at: AwareDatetime
    deleted_at: AwareDatetime | None = Field(default=None, description="Deleted, and may be undeleted.")


class SlotRef(_Resource):
    """A reserved slot of the keyword codebooks."""

    level: int = Field(ge=0)
    code: int = Field(ge=0)


class Keyword(_Stored, KeywordFields):
    """A keyword as it is kept."""

    slot: SlotRef | None = Field(default=None, description="That it holds while it is bound, expired or not.")


class Rule(_Stored, RuleFields):
    """A rule as it is kept."""


class Synonyms(_Stored, SynonymsFields):
    """A synonym set as it is kept."""


class Alias(_Stored, AliasFields):
    """An alias as it is kept."""

    previous: BundleName | None = Field(
        default=None, description="The bundle before, to which `:rollback` goes back; none after a rollback."
    )


Fields = KeywordFields | RuleFields | SynonymsFields | AliasFields
Resource = Keyword | Rule | Synonyms | Alias


class Scope(StrEnum):
    """What an API key may do; `admin.write` includes `admin.read`."""

    RETRIEVE = "retrieve"
    ADMIN_READ = "admin.read"
    ADMIN_WRITE = "admin.write"


class AuditEvent(_Resource):
    """One change of one resource, written in the transaction of the change itself."""

    revision: int
    at: AwareDatetime
    principal: str
    action: Literal["create", "update", "delete", "undelete"]
    name: str = Field(description="Of the resource, e.g. keywords/labubu.")
    before: dict[str, object] | None
    after: dict[str, object] | None
    request_id: str = ""
