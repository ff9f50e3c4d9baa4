"""The admin API: keywords with their bindings, rules and synonyms over REST, on a port of its own.

Every change is one transaction and one revision, takes an ``Idempotency-Key``, can be tried with ``validate_only``, and
is refused by ``If-Match`` where somebody else was first. What blocks runs in threads.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from starlette.convertors import Convertor, register_url_convertor
from starlette.exceptions import HTTPException

from genretrieval.errors import (
    ConflictError,
    EtagMismatchError,
    IdempotencyKeyReusedError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval_serving.admin import transfer
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.messages import (
    MAX_PAGE,
    NEW,
    STORED,
    AuditPage,
    Batch,
    Changed,
    DeleteOperation,
    Imported,
    LevelSlots,
    Listed,
    NewResource,
    Revision,
    Slots,
    Snapshot,
    Tested,
    Trial,
    UndeleteOperation,
    UpdateOperation,
    fields_of,
    id_of,
    patch_model,
    patched,
)
from genretrieval_serving.admin.resources import Binding, Keyword, KeywordFields, Kind, Resource, ResourceId, Scope
from genretrieval_serving.admin.store import Call, Create, Delete, Operation, Store, Undelete, Update
from genretrieval_serving.admin.transfer import FileFormat
from genretrieval_serving.observability import Metrics
from genretrieval_serving.web import application, guarded_router, open_application

JSONL, CSV, MERGE_PATCH = "application/jsonl", "text/csv", "application/merge-patch+json"
_MEDIA = {FileFormat.JSONL: JSONL, FileFormat.CSV: CSV}
_READ_ERRORS = (NotFoundError, UnavailableError)
_WRITE_ERRORS = (*_READ_ERRORS, ConflictError, EtagMismatchError, IdempotencyKeyReusedError)


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


class AdminStore(Store, Protocol):
    """A store that counts its slots."""

    def slot_counts(self) -> Counts:
        """Reserved slots by state."""
        ...


Try = Callable[[Kind, Resource, RetrieveRequest], Awaitable[tuple[RetrieveResponse, RetrieveResponse]]]


class _IdConvertor(Convertor[str]):
    """A resource id in a path: ``keywords/labubu:bind`` is an operation and no resource."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("resource", _IdConvertor())


def _store(request: Request) -> AdminStore:
    store: AdminStore = request.app.state.store
    return store


async def _call(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(
            min_length=1,
            max_length=128,
            pattern=r"^[!-~]+$",
            description="A repeated call with this key gets the first answer and changes nothing.",
        ),
    ] = None,
    validate_only: Annotated[bool, Query(description="Check and answer as if done, and store nothing.")] = False,
) -> Call:
    what = hashlib.sha256()
    for part in (request.method.encode(), request.url.path.encode(), await request.body()):
        what.update(len(part).to_bytes(8, "big") + part)
    return Call(
        principal=request.state.principal.name,
        request_id=request.state.request_id,
        idempotency_key=idempotency_key,
        fingerprint=what.hexdigest(),
        validate_only=validate_only,
    )


def _if_match(
    if_match: Annotated[
        str | None, Header(description="The etag that the resource must still have; `*` or none for any.")
    ] = None,
) -> str | None:
    if if_match is None or if_match.strip() == "*":
        return None
    etag = if_match.strip().removeprefix('"').removesuffix('"')
    if '"' in etag or not etag:
        raise RequestError(f"If-Match: {if_match!r} is not one etag in double quotes")
    return etag


def _media(request: Request, *accepted: str) -> str:
    """The body's media type. Browsers send none of ours to another site without asking it first."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in accepted:
        raise HTTPException(415, f"Content-Type is {media!r}; send {' or '.join(accepted)}")
    return media


async def _merge_patch(request: Request) -> dict[str, Any]:
    _media(request, MERGE_PATCH, "application/json")
    try:
        patch = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: no JSON: {error}") from error
    if not isinstance(patch, dict):
        raise RequestError("body: a merge patch is a JSON object of the fields to change")
    return patch


async def _content(request: Request) -> tuple[bytes, FileFormat]:
    return await request.body(), FileFormat.CSV if _media(request, JSONL, CSV) == CSV else FileFormat.JSONL


def _body(**schemas: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that FastAPI does not read itself."""
    content = {media: {"schema": schema} for media, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}


InStore = Annotated[AdminStore, Depends(_store)]
AsCall = Annotated[Call, Depends(_call)]
IfMatch = Annotated[str | None, Depends(_if_match)]
PageSize = Annotated[int, Query(ge=0, description=f"0 is the default; more than {MAX_PAGE} are {MAX_PAGE}.")]
PageToken = Annotated[str, Query(max_length=2048, description="The `next_page_token` of the page before.")]
Patch = Annotated[dict[str, Any], Depends(_merge_patch)]
Content = Annotated[tuple[bytes, FileFormat], Depends(_content)]


def _size(asked: int) -> int:
    return min(asked or 100, MAX_PAGE)


def _answer(response: Response, call: Call | None, resource: Resource) -> Resource:
    """The resource, with its etag and, after a change, the revision in headers."""
    response.headers["ETag"] = f'"{resource.etag}"'
    if call is not None and not call.validate_only:
        response.headers["X-Revision"] = str(resource.revision)
    return resource


def _apply_one(store: AdminStore, response: Response, call: Call, operation: Operation) -> Resource:
    return _answer(response, call, store.apply(call, [operation])[0])


def _apply_all(store: AdminStore, response: Response, call: Call, operations: Sequence[Operation]) -> dict[str, Any]:
    """The fields of `Changed`."""
    resources = store.apply(call, operations)
    revision = resources[-1].revision if resources else store.revision()
    if not call.validate_only:
        response.headers["X-Revision"] = str(revision)
    return {"revision": revision, "resources": resources}


def _creation(kind: Kind, new: Any) -> Create:
    return Create(kind, id_of(kind, new), fields_of(kind, new))


def _update(kind: Kind, id_: str, patch: dict[str, Any], etag: str | None) -> Update:
    return Update(kind, id_, lambda before: patched(kind, before, patch), etag)


def _rebinding(id_: str, binding: Binding | None, etag: str | None) -> Update:
    def rebound(before: Resource) -> KeywordFields:
        assert isinstance(before, Keyword)
        return KeywordFields.model_construct(**dict(fields_of(Kind.KEYWORDS, before)) | {"binding": binding})

    return Update(Kind.KEYWORDS, id_, rebound, etag)


def _operation(kind: Kind, operation: Any) -> Operation:
    match operation:
        case UpdateOperation():
            return _update(kind, operation.id, operation.patch, operation.etag)
        case DeleteOperation():
            return Delete(kind, operation.id, operation.etag)
        case UndeleteOperation():
            return Undelete(kind, operation.id)
        case _:
            return _creation(kind, operation.resource)


def _importing(kind: Kind, before: dict[str, Resource], new: NewResource) -> list[Operation]:
    """What makes a resource what a file says it is."""
    id_, fields = id_of(kind, new), fields_of(kind, new)
    old = before.get(id_)
    if old is None:
        return [Create(kind, id_, fields)]
    back: list[Operation] = [Undelete(kind, id_)] if old.deleted_at else []
    return back if fields_of(kind, old) == fields else [*back, Update(kind, id_, lambda _: fields)]


def _collection(kind: Kind) -> tuple[APIRouter, APIRouter]:
    """Operations on the resources of a kind: those that read, and those that write.

    FastAPI takes the model of a body from an annotation; here it is a value, of which mypy cannot know that it is one.
    """
    reads, writes = guarded_router(Scope.ADMIN_READ, _READ_ERRORS), guarded_router(Scope.ADMIN_WRITE, _WRITE_ERRORS)
    all_, one = f"/v1/{kind}", f"/v1/{kind}/{{id:resource}}"
    New, Stored = NEW[kind], STORED[kind]
    patch_schema = {"$ref": f"#/components/schemas/{patch_model(kind).__name__}"}

    @reads.get(all_, operation_id=f"{kind}.list", response_model=Listed[Stored])  # type: ignore[valid-type]
    def list_(store: InStore, page_size: PageSize = 0, page_token: PageToken = "", show_deleted: bool = False) -> Any:
        """Resources in the order of their ids."""
        page = store.page(kind, size=_size(page_size), token=page_token, show_deleted=show_deleted)
        return {"resources": page.resources, "next_page_token": page.next_page_token}

    @reads.get(one, operation_id=f"{kind}.get", response_model=Stored)
    def get(id: ResourceId, store: InStore, response: Response) -> Any:
        """One resource, deleted or not."""
        return _answer(response, None, store.get(kind, id))

    @reads.get(
        f"{all_}:export",
        operation_id=f"{kind}.export",
        response_class=Response,
        responses={200: {"content": {media: {"schema": {"type": "string"}} for media in _MEDIA.values()}}},
    )
    def export(store: InStore, format: FileFormat = FileFormat.JSONL) -> Response:
        """All that are not deleted, as a file that `:import` takes."""
        found = [r for k, r in store.changes(0).resources if k is kind and r.deleted_at is None]
        content = transfer.write(kind, sorted(found, key=lambda r: r.id), format)
        return Response(content, media_type=_MEDIA[format])

    @reads.post(f"{all_}:test", operation_id=f"{kind}.test")
    async def test(trial: Trial[New], request: Request) -> Tested:  # type: ignore[valid-type]
        """What a request returns without a resource and with it; nothing is stored."""
        attempt: Try = request.app.state.attempt
        now = datetime.now(UTC)
        added = {"id": id_of(kind, trial.resource), "etag": "", "revision": 0, "created_at": now, "updated_at": now}
        resource = Stored.model_validate({**dict(fields_of(kind, trial.resource)), **added})
        before, after = await attempt(kind, resource, trial.request)
        return Tested(before=before, after=after)

    @writes.post(all_, operation_id=f"{kind}.create", response_model=Stored, status_code=201)
    def create(new: New, store: InStore, call: AsCall, response: Response) -> Any:  # type: ignore[valid-type]
        """A new resource."""
        return _apply_one(store, response, call, _creation(kind, new))

    @writes.patch(
        one,
        operation_id=f"{kind}.patch",
        response_model=Stored,
        openapi_extra=_body(**{MERGE_PATCH: patch_schema, "application/json": patch_schema}),
    )
    def patch(id: ResourceId, patch: Patch, store: InStore, call: AsCall, etag: IfMatch, response: Response) -> Any:
        """Change some fields, by a merge patch (RFC 7396): null takes a field away, objects are merged."""
        return _apply_one(store, response, call, _update(kind, id, patch, etag))

    @writes.delete(one, operation_id=f"{kind}.delete", response_model=Stored)
    def delete(id: ResourceId, store: InStore, call: AsCall, etag: IfMatch, response: Response) -> Any:
        """Delete; `:undelete` brings it back."""
        return _apply_one(store, response, call, Delete(kind, id, etag))

    @writes.post(f"{one}:undelete", operation_id=f"{kind}.undelete", response_model=Stored)
    def undelete(id: ResourceId, store: InStore, call: AsCall, response: Response) -> Any:
        """Bring a deleted resource back as it was."""
        return _apply_one(store, response, call, Undelete(kind, id))

    @writes.post(f"{all_}:batch", operation_id=f"{kind}.batch", response_model=Changed[Stored])  # type: ignore[valid-type]
    def batch(batch: Batch[New], store: InStore, call: AsCall, response: Response) -> Any:  # type: ignore[valid-type]
        """Several operations, all or none, with one revision."""
        return _apply_all(store, response, call, [_operation(kind, operation) for operation in batch.operations])

    @writes.post(
        f"{all_}:import",
        operation_id=f"{kind}.import",
        openapi_extra=_body(**{media: {"type": "string"} for media in _MEDIA.values()}),
    )
    def import_(content: Content, store: InStore, call: AsCall, response: Response) -> Imported:
        """Create or overwrite what the file has, all or nothing; what it does not have stays as it is."""
        rows = transfer.read(kind, *content)
        if twice := [id_ for id_, n in Counter(id_of(kind, row) for row in rows).items() if n > 1]:
            raise RequestError(
                f"{', '.join(twice)}: more than once in the file; give each an id of its own, or drop it"
            )
        before = {resource.id: resource for kind_, resource in store.changes(0).resources if kind_ is kind}
        operations = [operation for row in rows for operation in _importing(kind, before, row)]
        changed = _apply_all(store, response, call, operations)
        # Counted in the answer: of a repeated call it is the first one's.
        after = {resource.id: resource for resource in changed["resources"]}
        created = sum(resource.created_at == resource.updated_at for resource in after.values())
        return Imported(
            revision=changed["revision"],
            created=created,
            updated=len(after) - created,
            unchanged=len(rows) - len(after),
        )

    return reads, writes


_reads = guarded_router(Scope.ADMIN_READ, _READ_ERRORS)
_writes = guarded_router(Scope.ADMIN_WRITE, _WRITE_ERRORS)


@_writes.post("/v1/keywords/{id:resource}:bind", operation_id="keywords.bind")
def bind(id: ResourceId, binding: Binding, store: InStore, call: AsCall, etag: IfMatch, response: Response) -> Keyword:
    """Bind a keyword to items, in place of those it was bound to."""
    return _keyword(_apply_one(store, response, call, _rebinding(id, binding, etag)))


@_writes.post("/v1/keywords/{id:resource}:unbind", operation_id="keywords.unbind")
def unbind(id: ResourceId, store: InStore, call: AsCall, etag: IfMatch, response: Response) -> Keyword:
    """Give the keyword's slot back."""
    return _keyword(_apply_one(store, response, call, _rebinding(id, None, etag)))


def _keyword(resource: Resource) -> Keyword:
    assert isinstance(resource, Keyword)
    return resource


@_reads.get("/v1/slots", operation_id="slots.get")
def slots(store: InStore) -> Slots:
    """How many keywords can still be bound."""
    counts = store.slot_counts()
    levels = sorted(Counter(slot.level for slot in store.free_slots()).items())
    return Slots(
        free=counts.free,
        bound=counts.bound,
        quarantined=counts.quarantined,
        levels=[LevelSlots(level=level, free=free) for level, free in levels],
    )


@_reads.get("/v1/auditEvents", operation_id="auditEvents.list")
def audit_events(
    store: InStore,
    page_size: PageSize = 0,
    page_token: PageToken = "",
    name: Annotated[
        str | None, Query(max_length=200, description="Of one resource alone, e.g. keywords/labubu.")
    ] = None,
) -> AuditPage:
    """Who changed what and when, newest first."""
    events, token = store.audit(size=_size(page_size), token=page_token, name=name)
    return AuditPage(events=events, next_page_token=token)


@_reads.get("/v1/revision", operation_id="revision.get")
def revision(store: InStore) -> Revision:
    """The revision that is in force."""
    return Revision(revision=store.revision())


@_reads.post("/v1/snapshots", operation_id="snapshots.create")
def snapshot(store: InStore) -> Snapshot:
    """All admin state at one revision."""
    changes = store.changes(0)
    by_kind: dict[Kind, list[Any]] = {kind: [] for kind in Kind}
    for kind, resource in sorted(changes.resources, key=lambda found: (found[0], found[1].id)):
        by_kind[kind].append(resource)
    return Snapshot(
        revision=changes.revision,
        taken_at=datetime.now(UTC),
        keywords=by_kind[Kind.KEYWORDS],
        rules=by_kind[Kind.RULES],
        synonyms=by_kind[Kind.SYNONYMS],
    )


_ROUTERS = (*(router for kind in Kind for router in _collection(kind)), _reads, _writes)


def create_app(
    store: AdminStore, attempt: Try, auth: Authenticator, metrics: Metrics, *, quiet: bool = False
) -> FastAPI:
    """The admin application.

    Args:
        store: where admin state is kept.
        attempt: answers a request without a resource and with it.
        auth: who may call.
        metrics: of the server.
        quiet: no log line for every call.
    """
    app = _application()
    app.state.store, app.state.attempt = store, attempt
    return open_application(app, auth, metrics, transport="admin", quiet=quiet)


def openapi() -> dict[str, Any]:
    """The interface as an OpenAPI document."""
    return _application().openapi()


def _application() -> FastAPI:
    return application("genretrieval admin", _ROUTERS, [patch_model(kind) for kind in Kind])
