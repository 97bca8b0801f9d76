"""uvicorn's HTTP/1.1 with timeouts for clients that send half a request, or do not read their answer."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from codegemma.serve.guard import CLIENT_TIMEOUT_S, MAX_CONNECTIONS

log = logging.getLogger("codegemma.serve")


class HttpProtocol(H11Protocol):
    """One connection. h11 limits the size of a request's headers, RequestGuard that of its body."""

    _request_timer: asyncio.TimerHandle | None = None  # runs while we wait for the headers of a request
    _read_timer: asyncio.TimerHandle | None = None  # runs while the client does not read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            log.warning("more than %d connections: one is closed", MAX_CONNECTIONS)
            transport.abort()
        self._update_request_timer()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._update_request_timer()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._request_timer, self._read_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(CLIENT_TIMEOUT_S, self._abort, "does not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def _update_request_timer(self) -> None:
        """Limits the time for a request's headers: starts a timer, or stops it once they are read."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if self._request_timer is not None and answering:
            self._request_timer.cancel()
            self._request_timer = None
        elif self._request_timer is None and not answering:
            self._request_timer = self.loop.call_later(CLIENT_TIMEOUT_S, self._abort, "sends no request")

    def _abort(self, reason: str) -> None:
        log.warning("a client %s: its connection is closed", reason)
        self.transport.abort()
