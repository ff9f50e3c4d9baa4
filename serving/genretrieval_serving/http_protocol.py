"""HTTP/1.1 as uvicorn speaks it, for callers that may mean no good: a request ends, in bytes and in time.

Uvicorn by itself keeps headers of any length, any number of connections, and a connection whose request never ends, or
whose answer is never read, for as long as it is open.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from genretrieval.errors import OverloadedError
from genretrieval_serving.web import refusal

MAX_HEAD_BYTES = 64 * 1024
# From when a connection is made, or a further request on it begins, until the last byte of the request is there.
RECEIVE_SECONDS = 60.0
# Until an answer that fills the buffers is read on.
SEND_SECONDS = 60.0
# Of one port. On those beyond, only probes are answered.
MAX_CONNECTIONS = 1000


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _overdue: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    _in_head = True
    _head_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A caller is there."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = partial(_too_many, self.app)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The caller is gone."""
        self._end_of_request()
        self._end_of_pause()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """What belongs to a head that has not ended counts."""
        super().data_received(data)
        if not self._in_head or self.transport.is_closing():
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        if self._overdue is None:
            self._await_request()

    def on_headers_complete(self) -> None:
        """Its head is there."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """All of it is there."""
        self._end_of_request()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """The caller reads too slowly."""
        super().pause_writing()
        self._unread = self.loop.call_later(SEND_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read on."""
        self._end_of_pause()
        super().resume_writing()

    def _end_of_pause(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _await_request(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._overdue = self.loop.call_later(RECEIVE_SECONDS, self._refuse, HTTPStatus.REQUEST_TIMEOUT)

    def _end_of_request(self) -> None:
        if self._overdue is not None:
            self._overdue.cancel()
            self._overdue = None

    def _refuse(self, status: HTTPStatus) -> None:
        """End the connection; before an application has been called there is somebody to tell why."""
        if self.transport.is_closing():
            return
        if self._in_head:
            line = f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            self.transport.write(f"{line}content-length: 0\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()


async def _too_many(app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Answers a call on a connection beyond the limit: no load makes a probe fail."""
    if not scope["path"].startswith("/v1/"):
        await app(scope, receive, send)
        return
    response = refusal(OverloadedError(f"{MAX_CONNECTIONS} connections are open already; use fewer, or add replicas"))
    response.headers["connection"] = "close"
    await response(scope, receive, send)
