"""The checks before every route: the client's key, the page that calls, the request's size and duration.

A page of another origin cannot call the API: browsers send the page's Origin, which must be the server's or
an allowed one. DNS rebinding shows in Host, which must be a name of this server. Keys are compared in
constant time.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastapi import HTTPException, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("codegemma.serve")

MAX_BODY_BYTES = 16 << 20
MAX_CONNECTIONS = 4096  # open together; a further one is closed immediately
CLIENT_TIMEOUT_S = 30.0  # for a request to arrive, and for a client that does not read its answer
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "[::1]", "::1"}
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; font-src 'self' data:; "
    "worker-src 'self' blob:; connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Resource-Policy": "same-origin",
}

ErrorResponse = Callable[[str, int, str], Response]  # (path, status, message), in the path's protocol


@dataclass(frozen=True)
class Rules:
    """Who may call the server.

    `hosts`: the names that Host may have; None for any, which is safe where a key is needed. `origins`: the
    pages that may call beside the server's own. `keys`: digests of the API keys; () where no key is needed.
    """

    hosts: frozenset[str] | None = frozenset(LOOPBACK_NAMES)
    origins: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = ()
    max_body_bytes: int = MAX_BODY_BYTES
    timeout_s: float = CLIENT_TIMEOUT_S


class RequestGuard:
    """ASGI middleware. It leaves the client's name in the scope's `client_name`."""

    def __init__(
        self, app: ASGIApp, rules: Rules, error_response: ErrorResponse, is_public: Callable[[str], bool]
    ) -> None:
        """`is_public` says which paths need no key."""
        self.app, self.rules, self.error_response, self.is_public = app, rules, error_response, is_public

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # no route uses web sockets
            return await send({"type": "websocket.close", "code": 1008})
        path, method = "/" + scope["path"].strip("/"), scope["method"]
        # No route has the method HEAD. For GET's answer to it, uvicorn leaves out the body.
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        send = _with_headers(send, f"{method} {path[:200]}", origin if origin in self.rules.origins else None)
        try:
            self._check_sender(headers)
            scope["client_name"] = self._authenticate(scope, headers)
        except HTTPException as error:
            return await self.error_response(path, error.status_code, error.detail)(scope, receive, send)
        if method == "OPTIONS" and origin is not None:
            return await _preflight_response(headers)(scope, receive, send)
        if method == "POST":  # every body is JSON, even where `curl -d` declares a form
            other = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*other, (b"content-type", b"application/json")]
        return await self.app(scope, self._bounded(receive), send)

    def _check_sender(self, headers: Headers) -> None:
        """Raises HTTPException if the Host, the Origin, the body's size or its encoding is not allowed."""
        host, origin, limit = headers.get("host", ""), headers.get("origin"), self.rules.max_body_bytes
        if self.rules.hosts is not None and _without_port(host) not in self.rules.hosts:
            remedy = "use its address, or start it with --host or --allow-host"
            raise HTTPException(403, f"Host {host!r} is not this server's name: {remedy}")
        if origin is not None and origin not in self.rules.origins and origin.partition("://")[2] != host:
            remedy = "start it with --allow-origin to let it"
            raise HTTPException(403, f"a page of {origin!r} may not call this server: {remedy}")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > limit:
            size = f"{int(length):,} bytes, but at most {limit:,} are read"
            raise HTTPException(413, f"the body has {size}: send less")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise HTTPException(415, "the body is compressed: send it as it is, without Content-Encoding")

    def _authenticate(self, scope: Scope, headers: Headers) -> str:
        """The client's name: its key's number, or its address. Raises HTTPException without a valid key."""
        if self.rules.keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            key = (key.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
            digest = key_digest(key)
            matches = [hmac.compare_digest(digest, known) for known in self.rules.keys]
            if any(matches):
                return f"key {matches.index(True)}"
            if scope["method"] != "OPTIONS" and not self.is_public(scope["path"]):
                raise HTTPException(401, "this server needs a key: send it as Authorization: Bearer KEY")
        return scope["client"][0] if scope.get("client") else ""

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` with limits on the body's size and the time it takes."""
        remaining, complete = self.rules.max_body_bytes, False
        deadline = time.monotonic() + self.rules.timeout_s

        async def bounded() -> Message:
            nonlocal remaining, complete
            if complete:
                return await receive()  # waits for the client to disconnect
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive: send it at once") from None
            remaining -= len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if remaining < 0:
                limit = f"{self.rules.max_body_bytes:,}"
                raise HTTPException(413, f"the body has more than {limit} bytes: send less")
            return message

        return bounded


def _with_headers(send: Send, request_line: str, origin: str | None) -> Send:
    """`send` that adds our headers and logs errors. `origin`: a page that may read the answer."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["Vary"] = "Origin"
            if origin is not None:
                headers["Access-Control-Allow-Origin"] = origin
            if message["status"] == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if message["status"] >= 400:
                log.warning("%s: %d", request_line, message["status"])
        await send(message)

    return send_with_headers


def _preflight_response(headers: Headers) -> Response:
    """The answer to a browser that asks what an allowed page may send: any headers, for OpenAI's client."""
    allowed = headers.get("access-control-request-headers", "Authorization, Content-Type")
    cors = {"Allow-Methods": "GET, POST", "Allow-Headers": allowed, "Max-Age": "600"}
    return Response(status_code=204, headers={f"Access-Control-{name}": cors[name] for name in cors})


def key_digest(key: str) -> bytes:
    """SHA-256 of a key, the form in which the server keeps it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(lines: Sequence[str]) -> tuple[bytes, ...]:
    """The digests of the keys in the lines of a key file, one key a line; # begins a comment.

    Raises ValueError where there is no key, or one that is short enough to be guessed.
    """
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError("the key file has no key: put each key on its own line")
    shortest = min(map(len, keys))
    if shortest < 16:
        remedy = "make one with `openssl rand -hex 16`"
        raise ValueError(f"a key has {shortest} characters, but needs 16: {remedy}")
    return tuple(map(key_digest, keys))


def _without_port(host: str) -> str:
    name, _, port = host.rpartition(":")
    return (name if port.isdigit() and not host.endswith("]") else host).lower()
