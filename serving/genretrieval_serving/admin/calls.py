"""What routes of the admin API ask of a call: who changes something and how, and what its body is."""

import hashlib
import json
from typing import Annotated, Any

from fastapi import Header, Query, Request
from starlette.exceptions import HTTPException

from genretrieval.errors import (
    ConflictError,
    EtagMismatchError,
    IdempotencyKeyReusedError,
    NotFoundError,
    RequestError,
    UnavailableError,
)
from genretrieval_serving.admin.store import Call

JSON, MERGE_PATCH = "application/json", "application/merge-patch+json"
READ_ERRORS = (NotFoundError, UnavailableError)
WRITE_ERRORS = (*READ_ERRORS, ConflictError, EtagMismatchError, IdempotencyKeyReusedError)


async def call_of(
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
    """Who calls, and how the change is to be taken."""
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


def media_of(request: Request, *accepted: str) -> str:
    """The body's media type. Browsers send none of ours to another site without asking it first."""
    media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media not in accepted:
        raise HTTPException(415, f"Content-Type is {media!r}; send {' or '.join(accepted)}")
    return media


async def merge_patch(request: Request) -> dict[str, Any]:
    """The body of a PATCH."""
    media_of(request, MERGE_PATCH, JSON)
    try:
        patch = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise RequestError(f"body: no JSON: {error}") from error
    if not isinstance(patch, dict):
        raise RequestError("body: a merge patch is a JSON object of the fields to change")
    return patch


def body(**schemas: dict[str, Any]) -> dict[str, Any]:
    """The description of a body that FastAPI does not read itself."""
    content = {media: {"schema": schema} for media, schema in schemas.items()}
    return {"requestBody": {"required": True, "content": content}}
