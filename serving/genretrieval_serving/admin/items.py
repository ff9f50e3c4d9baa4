"""Items over the admin API: what the catalogue says of them now, and changes for every server on its folder.

A change is checked against the catalogue that is served, written as a file into the folder of
`genretrieval_serving.catalogue_feed`, and in force here when the call is answered.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Protocol

import polars as pl
import structlog
from fastapi import Depends, Path, Request

from genretrieval.catalogue_changes import FIELDS, ITEM_ID, OP, SEMANTIC_ID
from genretrieval.errors import ConflictError, GenRetrievalError, NotFoundError, RequestError
from genretrieval.servable import NO_ATTRIBUTES, Catalogue
from genretrieval_serving.admin.calls import JSON, MERGE_PATCH, READ_ERRORS, WRITE_ERRORS, body, call_of, merge_patch
from genretrieval_serving.admin.messages import Item, ItemChange, ItemChanges, ItemsChanged
from genretrieval_serving.admin.resources import Scope
from genretrieval_serving.admin.store import Call
from genretrieval_serving.catalogue_feed import CatalogueFeed, Changed
from genretrieval_serving.web import documented, guarded_router

log = structlog.get_logger(__name__)

# An audit event names so many items; the file of the change has them all.
_NAMED = 100
_NOT_CHANGED_SO = frozenset({ITEM_ID, OP, SEMANTIC_ID, FIELDS})


class _HasCatalogue(Protocol):
    def catalogue(self) -> Catalogue:
        """The items that requests are answered with."""
        ...


class _Audit(Protocol):
    def note(self, call: Call, name: str, after: dict[str, Any]) -> None:
        """Note a change of something that is kept elsewhere."""
        ...


def _catalogue(request: Request) -> Catalogue:
    serving: _HasCatalogue = request.app.state.serving
    return serving.catalogue()


class _Changer:
    """Makes the change of one call."""

    def __init__(
        self,
        request: Request,
        catalogue: Annotated[Catalogue, Depends(_catalogue)],
        call: Annotated[Call, Depends(call_of)],
    ) -> None:
        feed: CatalogueFeed | None = request.app.state.feed
        if feed is None:
            raise ConflictError(
                "this server follows no folder of catalogue changes, so items cannot be changed; start it with "
                "--catalogue-changes FOLDER"
            )
        self.catalogue = catalogue
        self._feed, self._call = feed, call
        self._audit: _Audit = request.app.state.store

    def change(self, items: Sequence[ItemChange]) -> ItemsChanged:
        """Change items on every server; in force on this one."""
        call = self._call
        name = f"items/{items[0].item_id}" if len(items) == 1 else "items"
        ids = [item.item_id for item in items[:_NAMED]]

        def note(changed: Changed) -> None:
            after = {"file": changed.file, "upserted": changed.n_upserted, "removed": changed.n_removed, "items": ids}
            self._audit.note(call, name, after)

        def not_made(changed: Changed, error: BaseException) -> None:
            why = (error.strerror if isinstance(error, OSError) else None) or repr(error)
            try:
                self._audit.note(call, name, {"file": changed.file, "failed": why})
            except GenRetrievalError as unmarked:
                # What the caller is told is true all the same: nothing was changed.
                log.error("item_change_not_marked_as_failed", file=changed.file, why=why, error=str(unmarked))

        changed = self._feed.change(
            lambda catalogue: table_of(items, catalogue),
            call={"principal": call.principal, "request_id": call.request_id, "fingerprint": call.fingerprint},
            key=None if call.idempotency_key is None else f"{call.principal}\n{call.idempotency_key}",
            validate_only=call.validate_only,
            note=note,
            not_made=not_made,
        )
        if changed.file:
            told = {"principal": call.principal, "file": changed.file, "catalogue_revision": changed.revision}
            log.info("items_changed", **told, upserted=changed.n_upserted, removed=changed.n_removed)
        return ItemsChanged(
            catalogue_revision=changed.revision,
            file=changed.file,
            upserted=changed.n_upserted,
            removed=changed.n_removed,
            missing_ids=changed.missing_ids,
        )


def table_of(items: Sequence[ItemChange], catalogue: Catalogue) -> pl.DataFrame:
    """Changes that came as JSON in the columns of `genretrieval.catalogue_changes`.

    Raises:
        RequestError: a value is of another type than the catalogue's, or is none of an attribute.
    """
    given = [item.model_extra or {} for item in items]
    names = dict.fromkeys(name for row in given for name in row)
    if FIELDS in names:
        raise RequestError(f"items: {FIELDS} is for files; what an item does not name stays as it is")
    schema = catalogue.table.schema
    columns = [
        pl.Series(ITEM_ID, [item.item_id for item in items], pl.String()),
        pl.Series(OP, [item.op for item in items], pl.String()),
        # Null is its own type, which is read as any: that a name is no attribute is told with all other problems.
        *(_column(name, [row.get(name) for row in given], schema.get(name, pl.Null())) for name in names),
        pl.Series(FIELDS, [list(row) for row in given], pl.List(pl.String())),
    ]
    ids = [item.semantic_id for item in items]
    if any(id_ is not None for id_ in ids):
        columns.append(_column(SEMANTIC_ID, ids, pl.List(pl.Int64())))
    return pl.DataFrame(columns)


def _column(name: str, values: list[Any], dtype: pl.DataType) -> pl.Series:
    if dtype == pl.Null:
        return pl.Series(name, [None] * len(values), pl.Null())
    if dtype.is_temporal():
        dtype = pl.String()  # JSON has no times; what reads them from texts knows more
    if not any(map(_bad(dtype), values)):
        try:
            return pl.Series(name, values, dtype, strict=True)
        except (TypeError, OverflowError, pl.exceptions.PolarsError):
            pass
    rows = [row for row, value in enumerate(values) if not _fits(value, dtype)]
    first = ", ".join(map(str, rows[:5]))
    unit = "item has" if len(rows) == 1 else "items have"
    raise RequestError(f"items: {name} is {dtype} in the catalogue; {len(rows)} {unit} no such value, first {first}")


def _fits(value: Any, dtype: pl.DataType) -> bool:
    if _bad(dtype)(value):
        return False
    try:
        pl.Series([value], dtype=dtype, strict=True)
    except (TypeError, OverflowError, pl.exceptions.PolarsError):
        return False
    return True


def _bad(dtype: pl.DataType) -> Callable[[Any], bool]:
    """Whether a value would be taken for another one: true is no number."""
    return (lambda value: isinstance(value, bool)) if dtype.is_numeric() else (lambda value: False)


_reads = guarded_router(Scope.ADMIN_READ, READ_ERRORS)
_writes = guarded_router(Scope.ADMIN_WRITE, WRITE_ERRORS)
ROUTERS = (_reads, _writes)

ItemId = Annotated[str, Path(min_length=1, max_length=512)]
Changer = Annotated[_Changer, Depends()]
Patch = Annotated[dict[str, Any], Depends(merge_patch)]
_PATCHED = {"type": "object", "description": "Attributes to change; null takes a value away."}


@_reads.get("/v1/items/{item_id:path}", operation_id="items.get")
def get(item_id: ItemId, catalogue: Annotated[Catalogue, Depends(_catalogue)]) -> Item:
    """An item as this server has it now, removed or not."""
    row = _row(catalogue, item_id)
    values = catalogue.table.row(row, named=True)
    return Item(
        item_id=item_id,
        semantic_id=catalogue.ids.codes[row].tolist(),
        removed=row in catalogue.gone,
        popularity=values["popularity"],
        attributes={name: _plain(value) for name, value in values.items() if name not in NO_ATTRIBUTES},
        catalogue_revision=catalogue.revision,
    )


@_writes.post("/v1/items:batch", operation_id="items.batch", responses=documented(415))
def batch(changes: ItemChanges, changer: Changer) -> ItemsChanged:
    """Add, change and remove items, all or none."""
    return changer.change(changes.items)


@_writes.patch(
    "/v1/items/{item_id:path}",
    operation_id="items.patch",
    responses=documented(415),
    openapi_extra=body(**{MERGE_PATCH: _PATCHED, JSON: _PATCHED}),
)
def patch(item_id: ItemId, patch: Patch, changer: Changer) -> ItemsChanged:
    """Change some attributes of an item; one that was removed comes back."""
    _row(changer.catalogue, item_id)
    if wrong := sorted(_NOT_CHANGED_SO & patch.keys()):
        raise RequestError(f"body: {', '.join(wrong)} is no attribute; a merge patch has attributes alone")
    return changer.change([ItemChange(item_id=item_id, **patch)])


@_writes.delete("/v1/items/{item_id:path}", operation_id="items.delete")
def delete(item_id: ItemId, changer: Changer) -> ItemsChanged:
    """Return an item no more; an upsert brings it back."""
    _row(changer.catalogue, item_id)
    return changer.change([ItemChange(item_id=item_id, op="remove")])


def _row(catalogue: Catalogue, item_id: str) -> int:
    row = catalogue.item_ids.row_of(item_id)
    if row is None:
        raise NotFoundError(f"there is no item {item_id!r} in the catalogue; `POST /v1/items:batch` adds one")
    return row


def _plain(value: Any) -> Any:
    """As JSON can say it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
