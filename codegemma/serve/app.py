"""The server: every dialect over one backend, the page, the terms. `create` makes the ASGI application."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException
from starlette.routing import Match, Mount
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from codegemma import __version__
from codegemma.serve.dialects import llamacpp, mistral, ollama, openai, tabby
from codegemma.serve.guard import RequestGuard, Rules
from codegemma.serve.requests import Backend, Busy
from codegemma.serve.wire import dumps, reply

log = logging.getLogger("codegemma.serve")

WEB = Path(__file__).parent / "web"
OPEN = {"/", "/health", "/v1/health", "/terms"}  # without a key, as the page's files

clash = APIRouter()

_Either = Annotated[
    Annotated[openai.Completion, Tag("openai")] | Annotated[tabby.Completion, Tag("tabby")],
    Discriminator(lambda body: "tabby" if tabby.owns(body) else "openai"),
]


@clash.post("/v1/completions", tags=["OpenAI", "Tabby"])
async def completions(body: _Either, request: Request) -> Response:
    """OpenAI's, or with `segments` or `debug_options` Tabby's."""
    return await (
        tabby.complete(body, request)
        if isinstance(body, tabby.Completion)
        else openai.complete(body, request)
    )


def create(
    open_backend: Callable[[], Awaitable[Backend]], rules: Rules = Rules(), terms: str = "", web: Path = WEB
) -> FastAPI:  # noqa: B008
    """The application. `open_backend` is called once it runs, and what it gives is closed when it ends."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.backend = await open_backend()
        try:
            yield
        finally:
            await app.state.backend.close()

    app = FastAPI(title="codegemma", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    for router in (clash, openai.router, llamacpp.router, ollama.router, mistral.router, tabby.router):
        app.include_router(router)

    @app.get("/terms", tags=["codegemma"])
    async def show_terms() -> Response:
        return Response(terms, media_type="text/plain; charset=utf-8")

    page = _Page(web)
    app.mount("/", page)
    for kind, handler in _HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(
        RequestGuard, rules=rules, error_response=error_response, is_public=lambda path: path in OPEN or page.has(path)
    )
    return app


class _Page(StaticFiles):
    """The page's files; without them, a line at / that tells what this is. HEAD / is how Ollama's client asks for life."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory, html=True, check_dir=False)

    def has(self, path: str) -> bool:
        try:
            return self.lookup_path(path.lstrip("/"))[1] is not None
        except (ValueError, OSError):
            return False

    async def get_response(self, path: str, scope: Scope) -> Response:
        try:
            return await super().get_response(path, scope)
        except HTTPException as error:
            if path == "." and error.status_code == 404:
                return Response(
                    "codegemma is running. The page was not built into this installation: see /openapi.json\n",
                    media_type="text/plain",
                )
            allowed = [
                method
                for method in ("GET", "POST")
                for route in scope["app"].routes
                if not isinstance(route, Mount)
                and route.matches({**scope, "method": method})[0] == Match.FULL
            ]
            raise (
                HTTPException(405, headers={"Allow": ", ".join(allowed)}) if allowed else HTTPException(404)
            ) from None
        except (ValueError, OSError):  # a NUL in the path, or a name that is too long
            raise HTTPException(404) from None


def error_response(path: str, status: int, message: str, body: Any = None) -> Response:
    """An error in the form of the path's protocol."""
    if path.startswith("/api/"):
        return reply(ollama.error(status, message), status)
    if path.startswith(("/v1/fim", "/fim")):
        return reply(mistral.error(status, message), status)
    if path in ("/v1/events", "/v1beta/server_setting") or tabby.owns(body):
        return Response(dumps(message)[1:-1], status, media_type="text/plain")
    if path.startswith("/v1/") or path in ("/chat/completions", "/models"):
        return reply(openai.error(status, message), status)
    return reply(llamacpp.error(status, message), status)


async def _invalid(request: Request, error: Exception) -> Response:
    """400, and 422 where Mistral's and Tabby's servers say so."""
    assert isinstance(error, RequestValidationError)
    problems = [{"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
    path = request.url.path
    if path.startswith(("/v1/fim", "/fim")):
        return reply({"detail": problems}, 422)
    status = 422 if tabby.owns(error.body) or path == "/v1/events" else 400
    places = [
        ".".join(str(part) for part in one["loc"] if part not in ("body", "openai", "tabby"))
        for one in problems
    ]
    message = "; ".join(
        dict.fromkeys(
            f"{place}: {one['msg']}" if place else one["msg"]
            for place, one in zip(places, problems, strict=True)
        )
    )
    return error_response(path, status, message[:2000], error.body)


async def _wrong(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, 400, str(error))


async def _busy(request: Request, error: Exception) -> Response:
    assert isinstance(error, Busy)
    response = error_response(request.url.path, 429, str(error))
    response.headers["Retry-After"] = str(error.retry_after)
    return response


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(request.url.path, error.status_code, str(error.detail))
    response.headers.update(error.headers or {})
    return response


async def _failed(request: Request, error: Exception) -> Response:
    return error_response(request.url.path, 500, f"the server failed: {type(error).__name__}; its log says more")


_HANDLERS: dict[Any, Any] = {
    RequestValidationError: _invalid,
    ValueError: _wrong,
    Busy: _busy,
    HTTPException: _refused,
    Exception: _failed,
}
