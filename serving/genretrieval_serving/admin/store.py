"""Where admin state is kept: SQLite or PostgreSQL, one transaction a call, one revision a transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from genretrieval_serving.admin.resources import AuditEvent, Fields, Kind, Resource, SlotRef


@dataclass(frozen=True, slots=True)
class Call:
    """Who changes something, and how the change is to be taken.

    Attributes:
        principal: for the audit.
        request_id: for the audit.
        idempotency_key: a repeated call with the same key and fingerprint gets the first answer and changes nothing.
        fingerprint: of method, path and body; another one under the same key is refused.
        validate_only: everything is checked and answered as if done, and nothing is stored.
    """

    principal: str
    request_id: str = ""
    idempotency_key: str | None = None
    fingerprint: str = ""
    validate_only: bool = False


@dataclass(frozen=True, slots=True)
class Create:
    """A new resource; its id must be free, also of deleted ones."""

    kind: Kind
    id: str
    fields: Fields


@dataclass(frozen=True, slots=True)
class Update:
    """New fields in place of the old ones, made from what is stored inside the transaction (a PATCH merges there)."""

    kind: Kind
    id: str
    change: Callable[[Resource], Fields]
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Soft deletion: a keyword gives its slot to quarantine."""

    kind: Kind
    id: str
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Undelete:
    """Back as it was; a bound keyword takes its old slot if that is still free, else another one.

    `check` sees what is stored, inside the transaction, and raises if that may not come back.
    """

    kind: Kind
    id: str
    etag: str | None = None
    check: Callable[[Resource], object] | None = None


Operation = Create | Update | Delete | Undelete


@dataclass(frozen=True, slots=True)
class Page:
    """Some resources in the order of their ids, and where the next page begins; empty at the end."""

    resources: list[Resource]
    next_page_token: str = ""


@dataclass(frozen=True, slots=True)
class Changes:
    """Everything that changed after a revision, deleted resources included, read in one transaction."""

    revision: int
    resources: list[tuple[Kind, Resource]]


class Counts(Protocol):
    """How many slots are in which state."""

    @property
    def free(self) -> int:
        """Can be bound."""
        ...

    @property
    def bound(self) -> int:
        """A keyword holds it."""
        ...

    @property
    def quarantined(self) -> int:
        """Given up lately."""
        ...


class Store(Protocol):
    """What the API and the replicas need of a store."""

    def apply(self, call: Call, operations: Sequence[Operation]) -> list[Resource]:
        """Do all operations in one transaction, or none; the resources as they are afterwards, in order."""
        ...

    def get(self, kind: Kind, id_: str) -> Resource:
        """One resource, deleted or not."""
        ...

    def page(self, kind: Kind, *, size: int, token: str = "", show_deleted: bool = False) -> Page:
        """Resources in the order of their ids."""
        ...

    def audit(self, *, size: int, token: str = "", name: str | None = None) -> tuple[list[AuditEvent], str]:
        """Audit events, newest first, and where the next page begins."""
        ...

    def revision(self) -> int:
        """The revision that is in force; cheap."""
        ...

    def changes(self, since: int) -> Changes:
        """What changed after revision `since`; 0 for everything."""
        ...

    def free_slots(self) -> list[SlotRef]:
        """Reserved slots that can be bound now."""
        ...

    def slot_counts(self) -> Counts:
        """Reserved slots by state."""
        ...
