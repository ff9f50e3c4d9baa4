"""The console: one page over the admin API, for people.

Its files hold no data, so they are open, as the API's description is; what they show comes from the API, by its keys.
Their names are a fixed table: nothing of a URL reaches the file system. The page may load, run and call what this port
has and nothing else, and no other page may frame it.
"""

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

PAGE = "index.html"
_SCRIPT = "text/javascript; charset=utf-8"
_MEDIA = {
    PAGE: "text/html; charset=utf-8",
    "console.css": "text/css; charset=utf-8",
    "console.js": _SCRIPT,
    "core.js": _SCRIPT,
    "resources.js": _SCRIPT,
    "views.js": _SCRIPT,
}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _Asset:
    content: bytes
    media: str
    etag: str


def _read(name: str, media: str) -> _Asset:
    content = (files("genretrieval_serving.admin") / "_console" / name).read_bytes()
    return _Asset(content, media, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


ASSETS = {name: _read(name, media) for name, media in _MEDIA.items()}
router = APIRouter(include_in_schema=False)


@router.api_route("/", methods=["GET", "HEAD"])
async def root() -> Response:
    """Whoever opens the port in a browser wants the page."""
    return RedirectResponse("/console", 307, headers=HEADERS)


@router.api_route("/console", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return _answer(request, PAGE)


@router.api_route("/console/{name}", methods=["GET", "HEAD"])
async def asset(request: Request, name: str) -> Response:
    """What the page loads."""
    if name == PAGE or name not in ASSETS:
        raise HTTPException(404)
    return _answer(request, name)


def _answer(request: Request, name: str) -> Response:
    found = ASSETS[name]
    headers = {**HEADERS, "ETag": found.etag}
    # A proxy that compresses makes an etag weak; for a page that is the same one.
    known = {etag.strip().removeprefix("W/") for etag in request.headers.get("if-none-match", "").split(",")}
    if known & {found.etag, "*"}:
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media, headers=headers)
