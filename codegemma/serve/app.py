"""The server's ASGI application: the routes of every protocol, the page, the terms of use, and errors."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Response
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from pydantic import Discriminator, Tag
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from codegemma import __version__
from codegemma.serve.bodies import JsonRoute
from codegemma.serve.dialects import llamacpp, mistral, ollama, openai, tabby
from codegemma.serve.guard import RequestGuard, Rules
from codegemma.serve.requests import Busy, CompletionService
from codegemma.serve.wire import AnswerWriter, dumps, reply, shortened

WEB_FOLDER = Path(__file__).parent / "web"
PUBLIC_PATHS = {"/", "/health", "/v1/health", "/terms"}  # these and the page's files need no key
MISTRAL_PATHS = ("/v1/fim", "/fim")
MAX_PROBLEMS = 5  # of a body that one error names
NO_PAGE = "codegemma is running. The page was not built into this installation: see /openapi.json\n"

shared_router = APIRouter(route_class=JsonRoute)

CompletionBody = Annotated[
    Annotated[openai.OpenAICompletionBody, Tag("openai")]
    | Annotated[tabby.TabbyCompletionBody, Tag("tabby")],
    Discriminator(lambda body: "tabby" if tabby.is_tabby(body) else "openai"),
]


@shared_router.post("/v1/completions", tags=["OpenAI", "Tabby"])
async def completions(body: CompletionBody, http: HttpRequest) -> Response:
    """OpenAI's completions, or with `segments` or `debug_options` Tabby's."""
    if isinstance(body, tabby.TabbyCompletionBody):
        return await tabby.complete(body, http)
    return await openai.complete(body, http)


def create(
    open_service: Callable[[], Awaitable[CompletionService]],
    rules: Rules = Rules(),  # noqa: B008
    terms: str = "",
    web_folder: Path = WEB_FOLDER,
    redact: bool = True,
) -> FastAPI:
    """The application. It awaits `open_service` when it starts, and closes that service when it ends.

    `terms` is the text of /terms, `web_folder` the folder of the page's files. `redact`: whether secrets are
    removed from the context files of fill-in-the-middle requests.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.service = await open_service()
        try:
            yield
        finally:
            await app.state.service.close()

    app = FastAPI(title="codegemma", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.redact = redact
    app.include_router(shared_router)
    for dialect in (openai, llamacpp, ollama, mistral, tabby):
        app.include_router(dialect.router)

    @app.get("/terms", tags=["codegemma"])
    async def show_terms() -> Response:
        return Response(terms, media_type="text/plain; charset=utf-8")

    files = _PageFiles(web_folder)
    app.router.default = files  # answers where no route has the path
    for kind in (RequestValidationError, ValueError, Busy, HTTPException):
        app.add_exception_handler(kind, _on_error)
    app.add_middleware(
        RequestGuard,
        rules=rules,
        error_response=error_response,
        is_public=lambda path: path in PUBLIC_PATHS or files.has(path),
    )
    return app


class _PageFiles(StaticFiles):
    """The page's files. / always has an answer, since Ollama's client asks there whether the server runs."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory=directory, html=True, check_dir=False)

    def has(self, path: str) -> bool:
        try:
            return self.lookup_path(path.lstrip("/"))[1] is not None
        except (ValueError, OSError):
            return False

    async def get_response(self, path: str, scope: Scope) -> Response:
        """The file. Raises HTTPException 404 where there is none."""
        try:
            return await super().get_response(path, scope)
        except (HTTPException, ValueError, OSError) as error:
            # ValueError: the path has a NUL. OSError: a name in it is too long.
            if path == "." and isinstance(error, HTTPException) and error.status_code == 404:
                return Response(NO_PAGE, media_type="text/plain")
            raise HTTPException(404) from None


def error_response(path: str, status: int, message: str, body: Any = None) -> Response:
    """An error in the form of the path's protocol. The request's `body` shows whether it is Tabby's."""
    message = shortened(message)
    writer: type[AnswerWriter] = llamacpp.LlamaWriter
    if path.startswith("/api/"):
        writer = ollama.OllamaWriter
    elif path.startswith(MISTRAL_PATHS):
        writer = mistral.MistralWriter
    elif path in ("/v1/events", "/v1beta/server_setting") or tabby.is_tabby(body):
        return Response(dumps(message)[1:-1], status, media_type="text/plain")
    elif path.startswith("/v1/") or path in ("/chat/completions", "/models"):
        writer = openai.OpenAIWriter
    return reply(writer.error(status, message), status)


async def _on_error(http: HttpRequest, error: Exception) -> Response:
    """The response to an exception of a route."""
    path = http.url.path
    match error:
        case RequestValidationError():
            return _on_invalid_body(path, error)
        case ValueError():
            return error_response(path, 400, str(error))
        case Busy():
            response = error_response(path, 429, str(error))
            response.headers["Retry-After"] = str(error.retry_after)
        case HTTPException():
            response = error_response(path, error.status_code, error.detail)
            response.headers.update(error.headers or {})
        case _:  # `create` registers no other kind
            raise error
    return response


def _on_invalid_body(path: str, error: RequestValidationError) -> Response:
    """The response to a wrong body: 400, or 422 where Mistral's or Tabby's own server answers that."""
    problems = [
        {"loc": [_short(part) for part in p["loc"]], "msg": _rule(p["msg"]), "type": p["type"]}
        for p in error.errors()[:MAX_PROBLEMS]
    ]
    if path.startswith(MISTRAL_PATHS):
        return reply({"detail": problems}, 422)
    messages = []
    for problem in problems:
        field = ".".join(str(part) for part in problem["loc"] if part not in ("body", "openai", "tabby"))
        messages.append(f"{field}: {problem['msg']}" if field else problem["msg"])
    message = "; ".join(dict.fromkeys(messages))
    status = 422 if tabby.is_tabby(error.body) or path == "/v1/events" else 400
    return error_response(path, status, message, error.body)


def _rule(message: str) -> str:
    """What a validator says, without the name of its exception."""
    return shortened(message.removeprefix("Value error, "))


def _short(part: str | int) -> str | int:
    """A part of a field's path, which may be a name from the request."""
    return part[:60] if isinstance(part, str) else part
