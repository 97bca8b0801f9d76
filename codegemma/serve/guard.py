"""The checks before every route: the client's key, the page that calls, the request's size and duration.

A page of another origin cannot call the API: browsers send the page's Origin, which must be the server's or
an allowed one. DNS rebinding shows in Host, which must be a name of this server. Keys are compared in
constant time. A body is read whole and measured before anything parses it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

import numpy as np
from fastapi import HTTPException, Response
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger("codegemma.serve")

MAX_BODY_BYTES = 16 << 20
MAX_VALUES = 1 << 18  # in the JSON of a body: while it is parsed, all clients wait
MAX_CONTAINERS = MAX_VALUES >> 4  # lists and objects in the JSON of a body
MAX_CONNECTIONS = 4096  # open together; a further one is closed immediately
CLIENT_TIMEOUT_S = 30.0  # for a request to arrive, and for a client to go on reading its answer
# The status of requests that are cut off because the server stops. Not logged here: uvicorn logs how many.
STOPPING = 503
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
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no route uses web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        path, method = "/" + scope["path"].strip("/"), scope["method"]
        # HEAD is answered by the route for GET; uvicorn leaves out the body.
        scope = {**scope, "path": path, "method": "GET" if method == "HEAD" else method}
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        allowed = origins[0] if len(origins) == 1 and origins[0] in self.rules.origins else None
        sending = _Sending(send, f"{method} {quote(path[:200])}", allowed)
        try:
            await self._answer(scope, receive, sending, headers)
            return
        except HTTPException as error:
            status, message = error.status_code, error.detail
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # the server stops before the answer is complete
            status, message = STOPPING, "the server is stopping: try again in a moment"
            if sending.started:
                await send({"type": "http.response.body", "body": b""})
        except Exception as error:
            if sending.started:
                raise  # all that is left is to close the connection
            log.exception("%s failed", sending.request_line)
            status, message = 500, f"the server failed: {type(error).__name__}; its log says more"
        if not sending.started:
            await self.error_response(path, status, message)(scope, receive, sending)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, headers: Headers) -> None:
        """Answers a request. Raises HTTPException where a check fails."""
        self._check_sender(scope, headers)
        scope["client_name"] = self._authenticate(scope, headers)
        if scope["method"] == "OPTIONS" and "origin" in headers:
            return await _preflight_response(headers)(scope, receive, send)
        if scope["method"] == "POST":  # every body is JSON, even where `curl -d` declares a form
            other = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
            scope["headers"] = [*other, (b"content-type", b"application/json")]
            receive = _replayed(await self._read_body(receive), receive)
        return await self.app(scope, receive, send)

    def _check_sender(self, scope: Scope, headers: Headers) -> None:
        """Raises HTTPException if the Host, the Origin, the body's size or its encoding is not allowed."""
        host, origins, limit = headers.get("host", ""), headers.getlist("origin"), self.rules.max_body_bytes
        if self.rules.hosts is not None and _without_port(host) not in self.rules.hosts:
            remedy = "use its address, or start the server with --host or --allow-host"
            raise HTTPException(403, f"Host {host!r} is not this server's name: {remedy}")
        if len(origins) > 1:
            raise HTTPException(403, f"a request has one Origin, but this one has {len(origins)}: send one")
        # A page cannot send X-Forwarded-Proto without a preflight.
        forwarded = headers.get("x-forwarded-proto", "").lower()
        scheme = forwarded if forwarded in ("http", "https") else scope["scheme"]
        for origin in origins:
            if origin not in self.rules.origins and origin != f"{scheme}://{host}".lower():
                remedy = "start the server with --allow-origin to allow the page"
                raise HTTPException(403, f"a page of {origin[:200]!r} may not call this server: {remedy}")
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

    async def _read_body(self, receive: Receive) -> bytes:
        """The whole body. Raises HTTPException where it is too large, too slow or has too many values."""
        limit, deadline = self.rules.max_body_bytes, time.monotonic() + self.rules.timeout_s
        body, more = bytearray(), True
        while more:
            try:
                message = await asyncio.wait_for(receive(), deadline - time.monotonic())
            except TimeoutError:
                rule = f"the body did not arrive within {self.rules.timeout_s:g} seconds"
                raise HTTPException(408, f"{rule}: send it at once") from None
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > limit:
                raise HTTPException(413, f"the body has more than {limit:,} bytes: send less")
        if len(body) > MAX_CONTAINERS:  # a shorter body can exceed neither limit
            await asyncio.to_thread(_check_values, bytes(body))
        return bytes(body)


def _check_values(body: bytes) -> None:
    """Raises HTTPException where JSON has so many values that parsing them would delay other clients."""
    for what, marks, limit in (("values", b",[{", MAX_VALUES), ("lists and objects", b"[{", MAX_CONTAINERS)):
        if sum(body.count(mark) for mark in marks) <= limit:
            continue  # few enough, even with those inside texts
        # A mark is outside of texts if the number of unescaped quotes before it is even.
        unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
        characters, is_mark = np.frombuffer(unescaped, np.uint8), np.zeros(256, bool)
        is_mark[list(marks)] = True
        is_inside = np.logical_xor.accumulate(characters == ord('"'))
        count = int(np.count_nonzero(is_mark[characters] & ~is_inside))
        if count > limit:
            rule = f"the body has {count:,} {what}, but at most {limit:,} are read"
            raise HTTPException(400, f"{rule}: send several requests")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` for a request whose body was read already: it gives that body, then whatever follows."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return messages.pop() if messages else await receive()  # waits for the client to disconnect

    return replayed


class _Sending:
    """`send` that adds our headers and logs errors. `origin`: a page that may read the answer."""

    def __init__(self, send: Send, request_line: str, origin: str | None) -> None:
        self.send, self.request_line, self.origin, self.started = send, request_line, origin, False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["Vary"] = "Origin"
            if self.origin is not None:
                headers["Access-Control-Allow-Origin"] = self.origin
                headers["Access-Control-Expose-Headers"] = "Retry-After"
            if message["status"] == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if message["status"] >= 400 and message["status"] != STOPPING:
                log.warning("%s: %d", self.request_line, message["status"])
        await self.send(message)


def _preflight_response(headers: Headers) -> Response:
    """The answer to a browser that asks what an allowed page may send.

    It may send all headers that it asks for: OpenAI's client has many of its own. A page on the Internet may
    call a server on this machine or in this network only if the answer says so
    (https://wicg.github.io/private-network-access).
    """
    allowed = headers.get("access-control-request-headers", "Authorization, Content-Type")
    cors = {"Allow-Methods": "GET, POST", "Allow-Headers": allowed, "Max-Age": "600"}
    if headers.get("access-control-request-private-network", "").lower() == "true":
        cors["Allow-Private-Network"] = "true"
    return Response(status_code=204, headers={f"Access-Control-{name}": cors[name] for name in cors})


def key_digest(key: str) -> bytes:
    """SHA-256 of a key, the form in which the server keeps it."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_keys(lines: Sequence[str]) -> tuple[bytes, ...]:
    """The digests of the keys in the lines of a key file, one key a line; # begins a comment.

    Raises ValueError where there is no key, or one that is short enough to be guessed.
    """
    keys = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
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
