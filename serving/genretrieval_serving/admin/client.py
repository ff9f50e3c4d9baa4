"""The client of the admin API: ``AdminClient("http://host:8082", api_key=...)``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx
from pydantic import BaseModel

from genretrieval.errors import DeadlineError, OverloadedError, UnavailableError
from genretrieval.request import RetrieveRequest
from genretrieval_serving.admin.messages import (
    MAX_PAGE,
    NEW,
    STORED,
    AuditPage,
    BundleInfo,
    BundleList,
    DeploymentStatus,
    Imported,
    Item,
    ItemsChanged,
    Slots,
    Snapshot,
    TrialResult,
)
from genretrieval_serving.admin.resources import Alias, AuditEvent, Binding, Keyword, Kind, Resource
from genretrieval_serving.client import ATTEMPTS, ClientTls, answered, bearer, tls_for

_MEDIA = {"jsonl": "application/jsonl", "csv": "text/csv"}


class AdminClient:
    """Changes what one server, and every other on its admin store, retrieves. Safe to share between threads.

    A change carries an idempotency key, so it is tried again where no answer came, and is still made once. Errors of
    the server arrive as the same classes of `genretrieval.errors` that it raised. New resources are given as models
    or as their JSON.
    """

    def __init__(
        self, url: str, *, api_key: str | None = None, timeout: float = 30.0, tls: ClientTls | None = None
    ) -> None:
        """Connect lazily.

        Args:
            url: ``http://host:port`` of the admin API, or ``https``.
            api_key: or token, with the scope ``admin.read`` or ``admin.write``.
            timeout: seconds for one try of a call.
            tls: authorities and certificate, where not the usual ones.
        """
        tls = tls_for(urlsplit(url).scheme, tls)
        verify = True if tls is None else tls.context()
        self._http = httpx.Client(base_url=url, timeout=timeout, headers=bearer(api_key), verify=verify)

    def pages(self, kind: Kind, *, deleted: bool = False, size: int = MAX_PAGE) -> Iterator[Resource]:
        """All resources of a kind in the order of their ids."""
        params = {"page_size": str(size), "show_deleted": str(deleted).lower()}
        while True:
            page = self._call("GET", f"/v1/{kind}", params=params).json()
            yield from map(STORED[kind].model_validate, page["resources"])
            if not page["next_page_token"]:
                return
            params["page_token"] = page["next_page_token"]

    def get(self, kind: Kind, id_: str) -> Resource:
        """One resource, deleted or not."""
        return self._one(kind, "GET", f"/{id_}")

    def create(self, kind: Kind, new: BaseModel | Mapping[str, Any], *, validate_only: bool = False) -> Resource:
        """A new resource; its id is made from its fields where `new` has none."""
        return self._one(kind, "POST", "", json=_json(new), validate_only=validate_only)

    def patch(self, kind: Kind, id_: str, patch: Mapping[str, Any], *, etag: str | None = None) -> Resource:
        """Change some fields, by a merge patch: None takes a field away."""
        return self._one(kind, "PATCH", f"/{id_}", json=dict(patch), etag=etag)

    def move(
        self,
        alias: str,
        patch: Mapping[str, Any],
        *,
        allow_unbound: bool = False,
        etag: str | None = None,
        validate_only: bool = False,
    ) -> Alias:
        """Change which bundles an alias names, by a merge patch; the server opens each before it answers.

        `allow_unbound` leaves out bindings and rules that cannot hold on a bundle, instead of refusing it.
        """
        params = _unbound(allow_unbound)
        changed = self._one(
            Kind.ALIASES, "PATCH", f"/{alias}", json=dict(patch), params=params, etag=etag, validate_only=validate_only
        )
        assert isinstance(changed, Alias)
        return changed

    def delete(self, kind: Kind, id_: str, *, etag: str | None = None) -> Resource:
        """Delete; `undelete` brings it back."""
        return self._one(kind, "DELETE", f"/{id_}", etag=etag)

    def undelete(self, kind: Kind, id_: str) -> Resource:
        """Bring a deleted resource back as it was."""
        return self._one(kind, "POST", f"/{id_}:undelete")

    def bind(self, id_: str, binding: Binding | Mapping[str, Any], *, etag: str | None = None) -> Keyword:
        """Bind a keyword to items, in place of those it was bound to."""
        bound = self._one(Kind.KEYWORDS, "POST", f"/{id_}:bind", json=_json(binding), etag=etag)
        assert isinstance(bound, Keyword)
        return bound

    def unbind(self, id_: str, *, etag: str | None = None) -> Keyword:
        """Give a keyword's slot back."""
        unbound = self._one(Kind.KEYWORDS, "POST", f"/{id_}:unbind", etag=etag)
        assert isinstance(unbound, Keyword)
        return unbound

    def promote(self, alias: str, *, etag: str | None = None) -> Alias:
        """Serve the canary of an alias to everybody."""
        return self._alias(alias, "promote", {}, etag)

    def rollback(self, alias: str, *, allow_unbound: bool = False, etag: str | None = None) -> Alias:
        """Serve the bundle before, and end the canary."""
        return self._alias(alias, "rollback", _unbound(allow_unbound), etag)

    def deployment(self) -> DeploymentStatus:
        """What the server answers with, and what the alias that it follows asks of it."""
        return DeploymentStatus.model_validate_json(self._call("GET", "/v1/deployment").content)

    def bundles(self) -> list[BundleInfo]:
        """What an alias may name, in the server's folder of bundles."""
        return BundleList.model_validate_json(self._call("GET", "/v1/bundles").content).bundles

    def batch(self, kind: Kind, operations: Sequence[Mapping[str, Any]]) -> list[Resource]:
        """Several operations, all or none: ``{"action": "create", "resource": ...}`` and so on, see docs/admin.md."""
        body = self._call("POST", f"/v1/{kind}:batch", json={"operations": [dict(o) for o in operations]}).json()
        return [STORED[kind].model_validate(resource) for resource in body["resources"]]

    def import_(self, kind: Kind, content: bytes, file_format: str, *, validate_only: bool = False) -> Imported:
        """Create or overwrite what a file has, all or nothing; ``jsonl`` or ``csv``."""
        path, headers = f"/v1/{kind}:import", {"Content-Type": _MEDIA[file_format]}
        answer = self._call("POST", path, content=content, headers=headers, validate_only=validate_only)
        return Imported.model_validate_json(answer.content)

    def export(self, kind: Kind, file_format: str) -> bytes:
        """All that are not deleted, as a file for `import_`."""
        return self._call("GET", f"/v1/{kind}:export", params={"format": file_format}).content

    def test(self, kind: Kind, resource: BaseModel | Mapping[str, Any], request: RetrieveRequest) -> TrialResult:
        """What a request returns without a resource and with it; nothing is stored."""
        body = {"resource": _json(resource), "request": request.model_dump(mode="json")}
        return TrialResult.model_validate_json(self._call("POST", f"/v1/{kind}:test", json=body).content)

    def item(self, item_id: str) -> Item:
        """An item as the server has it now, removed or not."""
        return Item.model_validate_json(self._call("GET", f"/v1/items/{quote(item_id, safe='')}").content)

    def change_items(self, items: Sequence[Mapping[str, Any]], *, validate_only: bool = False) -> ItemsChanged:
        """Add, change and remove up to 10,000 items, all or none, on every server that shares the folder of changes.

        Args:
            items: ``{"item_id": ..., "op": "upsert" or "remove", "semantic_id": ..., ATTRIBUTE: ...}``; what one does
                not name stays as it is.
            validate_only: only find out whether it could be done.
        """
        body = {"items": [dict(item) for item in items]}
        answer = self._call("POST", "/v1/items:batch", json=body, validate_only=validate_only)
        return ItemsChanged.model_validate_json(answer.content)

    def slots(self) -> Slots:
        """How many keywords can still be bound."""
        return Slots.model_validate_json(self._call("GET", "/v1/slots").content)

    def revision(self) -> int:
        """The revision that is in force."""
        return int(self._call("GET", "/v1/revision").json()["revision"])

    def audit(self, name: str | None = None) -> Iterator[AuditEvent]:
        """Who changed what, newest first; of one resource alone where `name` says which."""
        params = {"page_size": str(MAX_PAGE)} | ({"name": name} if name else {})
        while True:
            page = AuditPage.model_validate_json(self._call("GET", "/v1/auditEvents", params=params).content)
            yield from page.events
            if not page.next_page_token:
                return
            params["page_token"] = page.next_page_token

    def snapshot(self) -> Snapshot:
        """All admin state at one revision."""
        return Snapshot.model_validate_json(self._call("POST", "/v1/snapshots").content)

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def __enter__(self) -> Self:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close connections."""
        self.close()

    def _alias(self, id_: str, verb: str, params: Mapping[str, str], etag: str | None) -> Alias:
        alias = self._one(Kind.ALIASES, "POST", f"/{id_}:{verb}", params=params, etag=etag)
        assert isinstance(alias, Alias)
        return alias

    def _one(self, kind: Kind, method: str, path: str, **call: Any) -> Resource:
        return STORED[kind].model_validate_json(self._call(method, f"/v1/{kind}{path}", **call).content)

    def _call(
        self,
        method: str,
        path: str,
        *,
        etag: str | None = None,
        validate_only: bool = False,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
        **body: Any,
    ) -> httpx.Response:
        sent = dict(headers or {})
        if method != "GET":
            sent["Idempotency-Key"] = uuid.uuid4().hex
        if etag is not None:
            sent["If-Match"] = f'"{etag}"'
        asked = dict(params or {}) | ({"validate_only": "true"} if validate_only else {})
        request = self._http.build_request(method, path, headers=sent, params=asked, **body)
        for pause in (*(0.1 * 2**n for n in range(ATTEMPTS - 1)), None):
            try:
                return answered(self._http, request)
            except (UnavailableError, DeadlineError) as error:
                if pause is None or isinstance(error, OverloadedError):
                    raise
                time.sleep(pause)
        raise AssertionError("unreachable")


def _unbound(allow: bool) -> dict[str, str]:
    return {"allow_unbound": "true"} if allow else {}


def _json(given: BaseModel | Mapping[str, Any]) -> dict[str, Any]:
    """A model's fields that differ from their defaults, or JSON as it is."""
    return given.model_dump(mode="json", exclude_defaults=True) if isinstance(given, BaseModel) else dict(given)


def as_new(kind: Kind, resource: Resource) -> BaseModel:
    """A stored resource as one could be created again, to copy or to test it."""
    fields = {name: getattr(resource, name) for name in NEW[kind].model_fields}
    return NEW[kind].model_validate(fields)
