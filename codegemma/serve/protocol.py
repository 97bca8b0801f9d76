"""HTTP/1.1 as uvicorn speaks it, with patience at an end: for half a request, for a reader that does not read."""

from __future__ import annotations

import asyncio
import logging

from uvicorn.protocols.http.h11_impl import H11Protocol

from codegemma.serve.guard import PATIENCE
from codegemma.serve.run import CONNECTIONS

log = logging.getLogger("codegemma.serve")


class Protocol(H11Protocol):
    """One connection. h11 bounds the size of a request's head; the body's is bounded by `guard`."""

    _unheard: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            log.warning("more than %d connections: one is closed", CONNECTIONS)
            transport.abort()
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, error: Exception | None) -> None:
        for timer in (self._unheard, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(error)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(PATIENCE, self._give_up, "does not read its answer")

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()

    def _watch(self) -> None:
        """A connection has PATIENCE to send the head of its first request, and of any that it began."""
        busy = self.cycle is not None and not self.cycle.response_complete
        if self._unheard is not None and busy:
            self._unheard.cancel()
            self._unheard = None
        elif self._unheard is None and not busy:
            self._unheard = self.loop.call_later(PATIENCE, self._give_up, "sends no request")

    def _give_up(self, why: str) -> None:
        log.warning("a client %s: its connection is closed", why)
        self.transport.abort()
