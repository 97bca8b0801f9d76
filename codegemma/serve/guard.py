"""What stands before every route: who may ask, from where, how much, and for how long.

A page of another origin cannot call the API: browsers send its Origin, which must be ours, and a name that was rebound
to this machine's address shows in Host. A key is compared in constant time.
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

MOST_BODY = 16 << 20  # bytes
PATIENCE = 30.0  # seconds for a request to arrive, and for a reader to take an answer's part
LOOPBACK = {"localhost", "127.0.0.1", "[::1]", "::1"}
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

Refuse = Callable[[str, int, str], Response]  # (path, status, message), in the form of the path's protocol


@dataclass(frozen=True)
class Rules:
    """`hosts`: names that Host may have, None for any (with a key, a rebound name gains nothing). `origins`: pages
    beside our own that may call. `keys`: hashes of the keys, none for no key."""

    hosts: frozenset[str] | None = frozenset(LOOPBACK)
    origins: frozenset[str] = frozenset()
    keys: tuple[bytes, ...] = ()
    most_body: int = MOST_BODY
    patience: float = PATIENCE


class Guard:
    """ASGI middleware. The name of who asks is left in the scope's `client_name`."""

    def __init__(self, app: ASGIApp, rules: Rules, refuse: Refuse, is_open: Callable[[str], bool]) -> None:
        self.app, self.rules, self.refuse, self.is_open = app, rules, refuse, is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # nothing here speaks over web sockets
            await send({"type": "websocket.close", "code": 1008})
            return
        path, method = "/" + scope["path"].strip("/"), scope["method"]
        scope = {
            **scope,
            "path": path,
            "method": "GET" if method == "HEAD" else method,
        }  # uvicorn leaves HEAD's body out
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        sender = _Sender(send, method, path, origin if origin in self.rules.origins else None)
        fault = self._fault(scope, headers)
        if fault is not None:
            await self.refuse(path, *fault)(scope, receive, sender)
            return
        if method == "OPTIONS" and origin is not None:
            wanted = headers.get(
                "access-control-request-headers", "Authorization, Content-Type"
            )  # OpenAI's client has many
            await Response(
                status_code=204,
                headers={
                    "Access-Control-Allow-Methods": "GET, POST",
                    "Access-Control-Max-Age": "600",
                    "Access-Control-Allow-Headers": wanted,
                },
            )(scope, receive, sender)
            return
        if method == "POST":  # a body is JSON, whatever its sender calls it: `curl -d` says it is a form
            scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"content-type"] + [
                (b"content-type", b"application/json")
            ]
        await self.app(scope, self._bounded(receive), sender)

    def _bounded(self, receive: Receive) -> Receive:
        """`receive` of a body in time and size; FastAPI hands an HTTPException on."""
        left, whole, end = self.rules.most_body, False, time.monotonic() + self.rules.patience

        async def bounded() -> Message:
            nonlocal left, whole
            if whole:
                return await receive()  # that is: wait for the client to leave
            try:
                message = await asyncio.wait_for(receive(), end - time.monotonic())
            except TimeoutError:
                raise HTTPException(408, "the body did not arrive: send it at once") from None
            left -= len(message.get("body", b""))
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            if left < 0:
                raise HTTPException(413, f"the body has more than {self.rules.most_body:,} bytes: send less")
            return message

        return bounded

    def _fault(self, scope: Scope, headers: Headers) -> tuple[int, str] | None:
        """Status and message where the request is not let in; sets the client's name where it is."""
        host, origin, path = headers.get("host", ""), headers.get("origin"), scope["path"]
        if self.rules.hosts is not None and _name(host) not in self.rules.hosts:
            return (
                403,
                f"Host {host!r} is not this server's name: use its address, or start it with --host or --allow-host",
            )
        if origin is not None and origin not in self.rules.origins and origin.partition("://")[2] != host:
            return (
                403,
                f"a page of {origin!r} may not call this server: start it with --allow-origin to let it",
            )
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length) > self.rules.most_body:
            return (
                413,
                f"the body has {int(length):,} bytes, but at most {self.rules.most_body:,} are read: send less",
            )
        if headers.get("content-encoding", "identity").lower() != "identity":
            return 415, "the body is compressed: send it as it is, without Content-Encoding"
        client = scope.get("client")
        name = client[0] if client else ""
        if self.rules.keys:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            given = (given.strip() if scheme.lower() == "bearer" else "") or headers.get("x-api-key", "")
            digest = key_digest(given)
            known = [hmac.compare_digest(digest, key) for key in self.rules.keys]
            if any(known):
                name = f"key {known.index(True)}"
            elif scope["method"] != "OPTIONS" and not self.is_open(path):
                return 401, "this server needs a key: send it as Authorization: Bearer KEY"
        scope["client_name"] = name
        return None


class _Sender:
    """`send` with our headers, and a line in the log where a request failed."""

    def __init__(self, send: Send, method: str, path: str, origin: str | None) -> None:
        self.send, self.method, self.path, self.origin = send, method, path, origin

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers.setdefault(name, value)
            headers["Vary"] = "Origin"
            if self.origin is not None:
                headers["Access-Control-Allow-Origin"] = self.origin
            if message["status"] == 401:
                headers["WWW-Authenticate"] = "Bearer"
            if message["status"] >= 400:
                log.warning("%s %s: %d", self.method, self.path[:200], message["status"])
        await self.send(message)


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def keys_of(lines: Sequence[str]) -> tuple[bytes, ...]:
    """The keys of a file, one a line; # begins a comment. Raises ValueError where a key is short enough to be guessed."""
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ValueError("the key file has no key: put one on a line of its own")
    if short := next((key for key in keys if len(key) < 16), None):
        raise ValueError(
            f"a key has {len(short)} characters, but needs 16: make one with `openssl rand -hex 16`"
        )
    return tuple(key_digest(key) for key in keys)


def _name(host: str) -> str:
    """Host without its port."""
    return (
        host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    ).lower()
