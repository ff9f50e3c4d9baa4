"""The admin API: keywords with their bindings, rules and synonyms over REST, on a port of its own.

Every change is one transaction and one revision, takes an ``Idempotency-Key``, can be tried with ``validate_only``, and
is refused by ``If-Match`` where somebody else was first. What blocks runs in threads.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Annotated, Any, Protocol

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from genretrieval.errors import (
    ConflictError,
    RequestError,
)
from genretrieval.request import RetrieveRequest, RetrieveResponse
from genretrieval.servable import Catalogue
from genretrieval_serving.admin import console, items, transfer
from genretrieval_serving.admin.auth import Authenticator
from genretrieval_serving.admin.calls import (
    JSON,
    MERGE_PATCH,
    READ_ERRORS,
    WRITE_ERRORS,
    body,
    call_of,
    media_of,
    merge_patch,
)
from genretrieval_serving.admin.messages import (
    MAX_PAGE,
    NEW,
    STORED,
    AuditPage,
    Batch,
    BundleList,
    Changed,
    DeleteOperation,
    DeploymentStatus,
    Imported,
    LevelSlots,
    Listed,
    NewResource,
    Revision,
    Slots,
    Snapshot,
    Trial,
    TrialResult,
    UndeleteOperation,
    UpdateOperation,
    fields_of,
    id_of,
    patch_model,
    patched,
)
from genretrieval_serving.admin.resources import (
    Alias,
    AliasFields,
    Binding,
    Fields,
    Keyword,
    KeywordFields,
    Kind,
    Resource,
    ResourceId,
    Scope,
)
from genretrieval_serving.admin.store import Call, Create, Delete, Operation, Store, Undelete, Update
from genretrieval_serving.admin.transfer import FileFormat
from genretrieval_serving.catalogue_feed import CatalogueFeed
from genretrieval_serving.observability import Metrics
from genretrieval_serving.tracing import Tracer
from genretrieval_serving.web import application, documented, guarded_router, open_application

JSONL, CSV = "application/jsonl", "text/csv"
_MEDIA = {FileFormat.JSONL: JSONL, FileFormat.CSV: CSV}
MAX_IMPORTED = 10_000


class Serving(Protocol):
    """What the API needs of the server that it runs in; see `genretrieval_serving.admin.live.Live`."""

    def validate(self, fields: Fields) -> None:
        """Refuse what could not be applied."""
        ...

    def changed(self) -> None:
        """Bring a change of the store into force here."""
        ...

    async def test(self, kind: Kind, resource: Resource, request: RetrieveRequest, caller: str) -> TrialResult:
        """What a request returns without a resource and with it."""
        ...

    async def retrieve(self, request: RetrieveRequest, caller: str) -> RetrieveResponse:
        """What a request returns now."""
        ...

    def check_bundles(self, aliases: Sequence[AliasFields], *, allow_unbound: bool) -> None:
        """Refuse what could not be served. Takes a while."""
        ...

    def catalogue(self) -> Catalogue:
        """The items that requests are answered with."""
        ...

    def deployment(self) -> DeploymentStatus:
        """What answers, and what should."""
        ...

    def bundles(self) -> BundleList:
        """What could be served."""
        ...


class _IdConvertor(Convertor[str]):
    """A resource id in a path: ``keywords/labubu:bind`` is an operation and no resource."""

    regex = "[^/:]+"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


register_url_convertor("resource", _IdConvertor())


async def _store(request: Request) -> Store:
    store: Store = request.app.state.store
    return store


async def _if_match(
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


async def _content(request: Request) -> tuple[bytes, FileFormat]:
    return await request.body(), FileFormat.CSV if media_of(request, JSONL, CSV) == CSV else FileFormat.JSONL


class _Writer:
    """Makes the changes of one call: each is checked against what is served, then all are one transaction."""

    def __init__(self, request: Request, response: Response, call: Annotated[Call, Depends(call_of)]) -> None:
        self.store: Store = request.app.state.store
        self._serving: Serving = request.app.state.serving
        self._headers, self._call = response.headers, call

    def creation(self, kind: Kind, new: NewResource) -> Operation:
        return Create(kind, id_of(kind, new), self._checked(fields_of(kind, new)))

    def update(self, kind: Kind, id_: str, change: Callable[[Resource], Fields], etag: str | None = None) -> Operation:
        return Update(kind, id_, lambda before: self._checked(change(before)), etag)

    def undeletion(self, kind: Kind, id_: str, etag: str | None = None) -> Operation:
        return Undelete(kind, id_, etag, lambda before: self._checked(fields_of(kind, before)))

    def patch(self, kind: Kind, id_: str, patch: dict[str, Any], etag: str | None) -> Operation:
        return self.update(kind, id_, lambda before: patched(kind, before, patch), etag)

    def binding(self, id_: str, binding: Binding | None, etag: str | None) -> Operation:
        def rebound(before: Resource) -> KeywordFields:
            assert isinstance(before, Keyword)
            return KeywordFields(text=before.text, type=before.type, binding=binding, note=before.note)

        return self.update(Kind.KEYWORDS, id_, rebound, etag)

    def one_of_batch(self, kind: Kind, operation: Any) -> Operation:
        match operation:
            case UpdateOperation():
                return self.patch(kind, operation.id, operation.patch, operation.etag)
            case DeleteOperation():
                return Delete(kind, operation.id, operation.etag)
            case UndeleteOperation():
                return self.undeletion(kind, operation.id, operation.etag)
            case _:
                return self.creation(kind, operation.resource)

    def importing(self, kind: Kind, old: Resource | None, new: NewResource) -> list[Operation]:
        """What makes a resource what a file says it is."""
        if old is None:
            return [self.creation(kind, new)]
        fields = fields_of(kind, new)
        if fields_of(kind, old) == fields:
            return [self.undeletion(kind, old.id)] if old.deleted_at else []
        # What comes back is overwritten at once, so that it need not hold.
        back: list[Operation] = [Undelete(kind, old.id)] if old.deleted_at else []
        return [*back, self.update(kind, old.id, lambda _: fields)]

    def one(self, operation: Operation) -> Resource:
        """Do one operation; the resource as it is then, its etag in a header."""
        resource: Resource = self.all([operation]).resources[0]
        self._headers["ETag"] = f'"{resource.etag}"'
        return resource

    def all(self, operations: Sequence[Operation]) -> Changed[Any]:
        """Do all operations, or none; the revision in a header, once it is in force here."""
        resources = self.store.apply(self._call, operations)
        revision = resources[-1].revision if resources else self.store.revision()
        if not self._call.validate_only:
            self._serving.changed()
            self._headers["X-Revision"] = str(revision)
        return Changed[Any].model_construct(revision=revision, resources=resources)

    def _checked(self, fields: Fields) -> Fields:
        self._serving.validate(fields)
        return fields


class _AliasWriter(_Writer):
    """Makes the changes of one call to aliases.

    To open a bundle takes a while, and nobody else may write during a transaction. So what a call would store is found
    by a trial, then its bundles are checked, then the change is made, if it still is that one.
    """

    def __init__(
        self,
        request: Request,
        response: Response,
        call: Annotated[Call, Depends(call_of)],
        allow_unbound: Annotated[
            bool, Query(description="Leave out bindings and rules that cannot hold on a bundle, and do not refuse it.")
        ] = False,
    ) -> None:
        super().__init__(request, response, call)
        self._allow_unbound = allow_unbound
        self._asked: list[AliasFields] = []
        self._good: list[AliasFields] | None = None

    def rollback(self, id_: str, etag: str | None) -> Operation:
        def rolled_back(before: Resource) -> Alias:
            assert isinstance(before, Alias)
            if before.previous is None:
                raise ConflictError(
                    f"aliases/{id_} has no bundle before {before.bundle}: it was never moved, or was rolled back "
                    "already; say which bundle is to be served"
                )
            return before.model_copy(update={"bundle": before.previous, "canary": None, "previous": None})

        return self.update(Kind.ALIASES, id_, rolled_back, etag)

    def promotion(self, id_: str, etag: str | None) -> Operation:
        def promoted(before: Resource) -> AliasFields:
            assert isinstance(before, Alias)
            if before.canary is None:
                raise ConflictError(f"aliases/{id_} has no canary; it serves {before.bundle} alone")
            return AliasFields(bundle=before.canary.bundle, note=before.note)

        return self.update(Kind.ALIASES, id_, promoted, etag)

    def all(self, operations: Sequence[Operation]) -> Changed[Any]:
        """Do all operations, or none, once their bundles are found good."""
        self.store.apply(replace(self._call, validate_only=True), operations)
        good = list(self._asked)
        self._serving.check_bundles(good, allow_unbound=self._allow_unbound)
        self._good = good
        return super().all(operations)

    def _checked(self, fields: Fields) -> Fields:
        assert isinstance(fields, AliasFields)
        if self._good is None:
            self._asked.append(fields)
        elif fields not in self._good:
            raise ConflictError("the alias has changed while its bundles were checked; read it again, then decide")
        return fields


InStore = Annotated[Store, Depends(_store)]
Writer = Annotated[_Writer, Depends()]
AliasWriter = Annotated[_AliasWriter, Depends()]
IfMatch = Annotated[str | None, Depends(_if_match)]
PageSize = Annotated[int, Query(ge=0, description=f"0 is the default; more than {MAX_PAGE} are {MAX_PAGE}.")]
PageToken = Annotated[str, Query(max_length=2048, description="The `next_page_token` of the page before.")]
Patch = Annotated[dict[str, Any], Depends(merge_patch)]
Content = Annotated[tuple[bytes, FileFormat], Depends(_content)]


def _size(asked: int) -> int:
    return min(asked or 100, MAX_PAGE)


def _collection(kind: Kind) -> tuple[APIRouter, APIRouter]:
    """Operations on the resources of a kind: those that read, and those that write.

    FastAPI takes the model of a body from an annotation; here it is a value, of which mypy cannot know that it is one.
    """
    reads, writes = guarded_router(Scope.ADMIN_READ, READ_ERRORS), guarded_router(Scope.ADMIN_WRITE, WRITE_ERRORS)
    all_, one = f"/v1/{kind}", f"/v1/{kind}/{{id:resource}}"
    New, Stored = NEW[kind], STORED[kind]
    writer_of_kind = _AliasWriter if kind is Kind.ALIASES else _Writer
    KindWriter = Annotated[_Writer, Depends(writer_of_kind)]
    patch_schema = {"$ref": f"#/components/schemas/{patch_model(kind).__name__}"}

    @reads.get(all_, operation_id=f"{kind}.list", response_model=Listed[Stored])  # type: ignore[valid-type]
    def list_(store: InStore, page_size: PageSize = 0, page_token: PageToken = "", show_deleted: bool = False) -> Any:
        """Resources in the order of their ids."""
        page = store.page(kind, size=_size(page_size), token=page_token, show_deleted=show_deleted)
        return {"resources": page.resources, "next_page_token": page.next_page_token}

    @reads.get(one, operation_id=f"{kind}.get", response_model=Stored)
    def get(id: ResourceId, store: InStore, response: Response) -> Any:
        """One resource, deleted or not."""
        resource = store.get(kind, id)
        response.headers["ETag"] = f'"{resource.etag}"'
        return resource

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

    @writes.post(all_, operation_id=f"{kind}.create", response_model=Stored, status_code=201)
    def create(new: New, writer: KindWriter) -> Any:  # type: ignore[valid-type]
        """A new resource."""
        return writer.one(writer.creation(kind, new))

    @writes.patch(
        one,
        operation_id=f"{kind}.patch",
        response_model=Stored,
        responses=documented(415),
        openapi_extra=body(**{MERGE_PATCH: patch_schema, JSON: patch_schema}),
    )
    def patch(id: ResourceId, patch: Patch, writer: KindWriter, etag: IfMatch) -> Any:
        """Change some fields, by a merge patch (RFC 7396): null takes a field away, objects are merged."""
        return writer.one(writer.patch(kind, id, patch, etag))

    @writes.delete(one, operation_id=f"{kind}.delete", response_model=Stored)
    def delete(id: ResourceId, writer: KindWriter, etag: IfMatch) -> Any:
        """Delete; `:undelete` brings it back."""
        return writer.one(Delete(kind, id, etag))

    @writes.post(f"{one}:undelete", operation_id=f"{kind}.undelete", response_model=Stored)
    def undelete(id: ResourceId, writer: KindWriter, etag: IfMatch) -> Any:
        """Bring a deleted resource back as it was."""
        return writer.one(writer.undeletion(kind, id, etag))

    @writes.post(f"{all_}:batch", operation_id=f"{kind}.batch", response_model=Changed[Stored])  # type: ignore[valid-type]
    def batch(batch: Batch[New], writer: KindWriter) -> Any:  # type: ignore[valid-type]
        """Several operations, all or none, with one revision."""
        return writer.all([writer.one_of_batch(kind, operation) for operation in batch.operations])

    @writes.post(
        f"{all_}:import",
        operation_id=f"{kind}.import",
        responses=documented(415),
        openapi_extra=body(**{media: {"type": "string"} for media in _MEDIA.values()}),
    )
    def import_(content: Content, writer: KindWriter) -> Imported:
        """Create or overwrite what the file has, all or nothing; what it does not have stays as it is."""
        rows = transfer.read(kind, *content)
        if len(rows) > MAX_IMPORTED:
            raise RequestError(f"the file has {len(rows)} resources, more than {MAX_IMPORTED}; split larger files")
        if twice := [id_ for id_, n in Counter(id_of(kind, row) for row in rows).items() if n > 1]:
            raise RequestError(
                f"{', '.join(twice)}: more than once in the file; give each an id of its own, or drop it"
            )
        old = {resource.id: resource for kind_, resource in writer.store.changes(0).resources if kind_ is kind}
        operations = [o for row in rows for o in writer.importing(kind, old.get(id_of(kind, row)), row)]
        changed = writer.all(operations)
        # Counted in the answer: of a repeated call it is the first one's.
        after = {resource.id: resource for resource in changed.resources}
        created = sum(resource.created_at == resource.updated_at for resource in after.values())
        unchanged = len(rows) - len(after)
        return Imported(revision=changed.revision, created=created, updated=len(after) - created, unchanged=unchanged)

    return reads, writes


def _trials(kind: Kind) -> APIRouter:
    """What can be tried before it is stored."""
    reads = guarded_router(Scope.ADMIN_READ, READ_ERRORS)
    New, Stored = NEW[kind], STORED[kind]

    @reads.post(f"/v1/{kind}:test", operation_id=f"{kind}.test", responses=documented(409, 429, 504))
    async def test(trial: Trial[New], request: Request) -> TrialResult:  # type: ignore[valid-type]
        """What a request returns without a resource and with it; nothing is stored."""
        serving: Serving = request.app.state.serving
        now = datetime.now(UTC)
        added = {"id": id_of(kind, trial.resource), "etag": "", "revision": 0, "created_at": now, "updated_at": now}
        resource = Stored.model_validate({**dict(fields_of(kind, trial.resource)), **added})
        return await serving.test(kind, resource, trial.request, request.state.principal.name)

    return reads


_reads = guarded_router(Scope.ADMIN_READ, READ_ERRORS)
_writes = guarded_router(Scope.ADMIN_WRITE, WRITE_ERRORS)


@_writes.post("/v1/keywords/{id:resource}:bind", operation_id="keywords.bind", response_model=Keyword)
def bind(id: ResourceId, binding: Binding, writer: Writer, etag: IfMatch) -> Any:
    """Bind a keyword to items, in place of those it was bound to."""
    return writer.one(writer.binding(id, binding, etag))


@_writes.post("/v1/keywords/{id:resource}:unbind", operation_id="keywords.unbind", response_model=Keyword)
def unbind(id: ResourceId, writer: Writer, etag: IfMatch) -> Any:
    """Give the keyword's slot back."""
    return writer.one(writer.binding(id, None, etag))


@_reads.post("/v1/retrieve", operation_id="retrieve", responses=documented(409, 429, 504))
async def retrieve(body: RetrieveRequest, request: Request) -> RetrieveResponse:
    """What the server answers now; nobody's history joins it, and no log of what was served has it."""
    serving: Serving = request.app.state.serving
    return await serving.retrieve(body, request.state.principal.name)


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
        aliases=by_kind[Kind.ALIASES],
    )


@_writes.post("/v1/aliases/{id:resource}:rollback", operation_id="aliases.rollback", response_model=Alias)
def rollback(id: ResourceId, writer: AliasWriter, etag: IfMatch) -> Any:
    """Serve the bundle before, and end the canary."""
    return writer.one(writer.rollback(id, etag))


@_writes.post("/v1/aliases/{id:resource}:promote", operation_id="aliases.promote", response_model=Alias)
def promote(id: ResourceId, writer: AliasWriter, etag: IfMatch) -> Any:
    """Serve the canary to everybody."""
    return writer.one(writer.promotion(id, etag))


@_reads.get("/v1/deployment", operation_id="deployment.get")
def deployment(request: Request) -> DeploymentStatus:
    """What this server answers with, and what the alias that it follows asks of it."""
    serving: Serving = request.app.state.serving
    return serving.deployment()


@_reads.get("/v1/bundles", operation_id="bundles.list", responses=documented(409))
def bundles(request: Request) -> BundleList:
    """Bundles that an alias may name, in this server's folder of them."""
    serving: Serving = request.app.state.serving
    return serving.bundles()


_TRIED = (Kind.KEYWORDS, Kind.RULES, Kind.SYNONYMS)
_ROUTERS = (
    *(router for kind in Kind for router in _collection(kind)),
    *map(_trials, _TRIED),
    _reads,
    _writes,
    *items.ROUTERS,
    console.router,
)


def create_app(
    store: Store,
    serving: Serving,
    auth: Authenticator,
    metrics: Metrics,
    *,
    feed: CatalogueFeed | None = None,
    quiet: bool = False,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The admin application.

    Args:
        store: where admin state is kept.
        serving: the server that it runs in.
        auth: who may call.
        metrics: of the server.
        feed: takes changes of items; None for a server that follows no folder of them.
        quiet: no log line for every call.
        tracer: makes a span of every call; None makes none.
    """
    app = _application()
    app.state.store, app.state.serving, app.state.feed = store, serving, feed
    return open_application(app, auth, metrics, transport="admin", quiet=quiet, tracer=tracer)


def openapi() -> dict[str, Any]:
    """The interface as an OpenAPI document."""
    return _application().openapi()


def _application() -> FastAPI:
    return application("genretrieval admin", _ROUTERS, [patch_model(kind) for kind in Kind])
