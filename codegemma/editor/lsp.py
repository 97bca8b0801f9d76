"""The language server: completions where people type, in any editor that speaks LSP.

Its laws: typing pre-empts everything (a request that is cancelled, superseded or out of date stops the engine's work);
while the cursor rests, its context is read into the prefix cache; what context.Guard refuses enters no prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from lsprotocol import types
from pygls.exceptions import JsonRpcException
from pygls.lsp.server import LanguageServer
from pygls.protocol import JsonRPCNotification, LanguageServerProtocol, lsp_method
from pygls.uris import to_fs_path

from codegemma import __version__
from codegemma.editor.buffers import Text, plain
from codegemma.editor.context import Guard, Neighbours, Open, redacted
from codegemma.editor.sources import Source
from codegemma.generate.completion import Mode, Trim
from codegemma.prompts import File
from codegemma.serve import stats
from codegemma.serve.requests import Ask, Busy, Fill

MOST_PREFIX, MOST_SUFFIX = 49_152, 12_288  # characters around the cursor that are looked at
STEP = 8_192  # by which their edges move, so that they stay put while one types
MARGIN = 8_192  # more of them, in which secrets are looked for
TRIGGERS = list(".([{=,: ")
CURSOR = "codegemma/cursor"  # our own notification {textDocument, position}: the cursor rests there


# ------------------------------------------------------------------------------------------------ settings
@dataclass(frozen=True)
class Settings:
    """What an editor may set, in camelCase, as initializationOptions or under "codegemma" in its configuration."""

    enabled: bool = True
    disabled_languages: tuple[str, ...] = ()  # the editor's names for them
    trim: Literal["auto", "none", "line", "block"] = (
        "auto"  # auto: the line where text follows the cursor, else the block
    )
    mode: Mode = "auto"
    context: Literal["imports", "open", "none"] = (
        "imports"  # other files: open ones and imports, open ones, none
    )
    completion: Literal["auto", "always", "never"] = (
        "auto"  # in the pop-up: auto is where inline completion is missing
    )
    max_tokens: int = 64
    time_budget_ms: int = 300  # to the first token: sizes the context
    predict_ms: int = 2000  # after it
    rest_ms: int = 300  # the cursor rests: its context is read ahead
    adapter: str = "auto"
    stats: bool = True

    def given(self, options: Any) -> tuple[Settings, list[str]]:
        """With what an editor gave, and a complaint about each thing that is not so."""
        changes, complaints = dict[str, Any](), []
        hints = get_type_hints(Settings)
        for key, value in options.items() if isinstance(options, Mapping) else ():
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
            if name not in hints:
                complaints.append(f"there is no setting codegemma.{key}")
            elif problem := _wrong(value, hints[name]):
                complaints.append(f"codegemma.{key} must be {problem}, got {value!r}")
            else:
                changes[name] = tuple(value) if isinstance(value, list) else value
        return replace(self, **changes), complaints


def _wrong(value: Any, hint: Any) -> str:
    """What a setting must be; "" where it is."""
    if hint is bool:
        return "" if isinstance(value, bool) else "true or false"
    if hint is int:
        return (
            ""
            if isinstance(value, int) and not isinstance(value, bool) and value > 0
            else "a whole number above 0"
        )
    if hint is str:
        return "" if isinstance(value, str) else "a text"
    if choices := [one for one in get_args(hint) if isinstance(one, str)]:
        return "" if value in choices else f"one of {', '.join(choices)}"
    return "" if isinstance(value, list) and all(isinstance(one, str) for one in value) else "a list of texts"


def names() -> list[str]:
    """The settings as an editor spells them."""
    return [re.sub(r"_(.)", lambda match: match[1].upper(), one.name) for one in fields(Settings)]


# ------------------------------------------------------------------------------------------------- protocol
class Protocol(LanguageServerProtocol):
    """pygls with documents of our own: its own split lines where LSP does not, and end a long line too early."""

    _server: Server

    @lsp_method(types.TEXT_DOCUMENT_DID_OPEN)
    def lsp_text_document__did_open(self, params: types.DidOpenTextDocumentParams) -> None:
        self._server.opened(params.text_document)

    @lsp_method(types.TEXT_DOCUMENT_DID_CHANGE)
    def lsp_text_document__did_change(self, params: types.DidChangeTextDocumentParams) -> None:
        self._server.changed(params.text_document.uri, params.content_changes)

    @lsp_method(types.TEXT_DOCUMENT_DID_CLOSE)
    def lsp_text_document__did_close(self, params: types.DidCloseTextDocumentParams) -> None:
        self._server.closed(params.text_document.uri)

    def structure_message(self, data: dict[str, Any]) -> Any:
        """Clients made before the specification was settled count trigger kinds from 0. A request whose parameters are
        wrong gets an answer, where pygls would leave its client waiting."""
        params = data.get("params")
        if data.get("method") == types.TEXT_DOCUMENT_INLINE_COMPLETION and isinstance(params, dict):
            context = params.get("context") or {}
            if isinstance(context, dict):
                params["context"] = context | {"triggerKind": context.get("triggerKind") or 1}
        try:
            return super().structure_message(data)
        except JsonRpcException as error:
            if "id" not in data or "method" not in data:
                raise
            self._send_response(data["id"], error=error.to_response_error())
            return JsonRPCNotification("$/wrong", self.VERSION, None)


@dataclass
class Suggestion:
    """What the editor was last given: `text`, to stand between `before` and `after` in a document."""

    uri: str
    before: str
    text: str
    after: str
    shown: stats.Shown
    there: int = 0  # characters of it that the document has by now


@dataclass(frozen=True)
class Place:
    """Where text is wanted. `chosen` (of a pop-up) is to replace what stands between `start` and `at`."""

    uri: str
    start: int
    at: int
    chosen: str = ""
    automatic: bool = True


class Server(LanguageServer):
    """One editor's server. `open_source` is called in a thread, once, when the editor has said hello."""

    def __init__(self, open_source: Callable[[], Source]) -> None:
        super().__init__("codegemma", __version__, protocol_cls=Protocol)
        self.open_source = open_source
        self.settings = self._given = Settings()  # _given: with what the editor said at first
        self.documents: dict[
            str, tuple[Text, str]
        ] = {}  # uri: text, language; what was used last stands last
        self.neighbours = Neighbours(Guard(), self.tell)
        self.suggestion: Suggestion | None = None
        self.key = f"lsp-{os.getpid()}-{time.monotonic_ns():x}"
        self._complaints: set[str] = set()
        self._source: asyncio.Task[Source] | None = None
        self._asking: tuple[str, asyncio.Task[str]] | None = None
        self._reading: asyncio.Task[None] | None = None
        for name, feature in FEATURES.items():
            self.feature(name, OPTIONS.get(name))(feature)

    # --------------------------------------------------------------------------------------- what the editor tells
    def hello(self, params: types.InitializeParams) -> None:
        self.configure(params.initialization_options)
        self._given = self.settings
        folders = [to_fs_path(uri) for uri in [*self.workspace.folders, self.workspace.root_uri or ""]]
        self.neighbours.guard = Guard([Path(folder) for folder in dict.fromkeys(folders) if folder])
        inline = params.capabilities.text_document and params.capabilities.text_document.inline_completion
        if self.settings.completion == "always" or (self.settings.completion == "auto" and not inline):
            self.feature(
                types.TEXT_DOCUMENT_COMPLETION,
                types.CompletionOptions(trigger_characters=TRIGGERS, resolve_provider=False),
            )(completion)
        self._source = asyncio.create_task(self._open())
        self._source.add_done_callback(lambda task: task.cancelled() or task.exception())  # told already

    def configure(self, options: Any) -> None:
        if isinstance(options, Mapping) and isinstance(options.get("codegemma"), Mapping):
            options = options["codegemma"]
        self.settings, complaints = self._given.given(options)
        for complaint in complaints:
            self.tell(complaint, types.MessageType.Warning)

    def opened(self, item: types.TextDocumentItem) -> None:
        encoding: Any = str(
            getattr(self.workspace.position_encoding, "value", self.workspace.position_encoding)
        )
        self.documents.pop(item.uri, None)
        self.documents[item.uri] = Text(item.text, encoding), item.language_id
        self.rest(item.uri, 0)

    def changed(self, uri: str, changes: Sequence[types.TextDocumentContentChangeEvent]) -> None:
        if uri not in self.documents:
            return
        text, language = self.documents.pop(uri)
        at = 0
        for change in changes:
            if isinstance(change, types.TextDocumentContentChangePartial):
                start, end = change.range.start, change.range.end
                at = text.offset(start.line, start.character) + len(change.text)
                text = text.edited((start.line, start.character), (end.line, end.character), change.text)
            else:
                text = Text(change.text, text.encoding)
        self.documents[uri] = text, language
        self._judge(uri, plain(text.text))
        if self._asking and self._asking[0] == uri:
            self._asking[1].cancel()
        self.rest(uri, at)

    def closed(self, uri: str) -> None:
        self.documents.pop(uri, None)
        if self.suggestion and self.suggestion.uri == uri:
            self.forget()

    def tell(self, text: str, kind: types.MessageType = types.MessageType.Info) -> None:
        """Into the editor's log."""
        self.window_log_message(types.LogMessageParams(kind, text))

    # ------------------------------------------------------------------------------------------------ suggestions
    async def suggest(self, place: Place) -> str:
        """The text for a place, "" where there is none. The newest call stops the older one."""
        self._interrupt()
        if place.uri not in self.documents or self._unwanted(place):
            return ""
        self.documents[place.uri] = self.documents.pop(place.uri)
        if rest := self._typed(place):
            return rest
        self.forget()
        task = asyncio.create_task(self._ask(place))
        self._asking = place.uri, task
        try:
            return await task
        except asyncio.CancelledError:
            if (own := asyncio.current_task()) and own.cancelling():
                raise  # by the editor; else by what came after
            return ""
        except Busy:
            return ""
        except (ValueError, OSError) as error:
            self._complain(error)
            return ""

    def rest(self, uri: str, at: int) -> None:
        """Reads the context of a place ahead, once nothing has happened for a while."""
        if self._reading:
            self._reading.cancel()
        self._reading = asyncio.create_task(self._read(Place(uri, at, at)))

    async def goodbye(self) -> None:
        self._interrupt()
        self.forget()
        if (
            self._source
            and self._source.done()
            and not self._source.cancelled()
            and not self._source.exception()
        ):
            await self._source.result().close()

    async def _open(self) -> Source:
        started = time.monotonic()
        try:
            source = await asyncio.to_thread(self.open_source)
        except (ValueError, OSError, ImportError) as error:
            self._complain(error)
            raise
        self.tell(f"codegemma {__version__}: {source.name}, ready after {time.monotonic() - started:.1f} s")
        return source

    async def _ask(self, place: Place) -> str:
        assert self._source
        text, language = self.documents[place.uri]
        settings, started = self.settings, time.perf_counter()
        source = await asyncio.shield(self._source)
        fill = await asyncio.to_thread(self._fill, place, True)
        if fill is None:
            return ""
        found = await source.fill(self._request(fill, settings.max_tokens))
        self._complaints.clear()
        if found.strip():
            shown = stats.Shown(language, 1000 * (time.perf_counter() - started), len(found))
            before = plain(text.text[: place.start]) + place.chosen
            self.suggestion = Suggestion(place.uri, before, found, plain(text.text[place.at :]), shown)
        return found if found.strip() else ""

    async def _read(self, place: Place) -> None:
        """In the background; errors were told by what the user asked for."""
        await asyncio.sleep(self.settings.rest_ms / 1000)
        if place.uri in self.documents and self._source and not self._unwanted(place):
            with contextlib.suppress(ValueError, OSError, ImportError, Busy):
                source = await asyncio.shield(self._source)
                if fill := await asyncio.to_thread(self._fill, place, False):
                    await source.fill(self._request(fill, 0))

    def _request(self, fill: Fill, max_tokens: int) -> Ask:
        settings = self.settings
        return Ask(
            fill,
            max_tokens,
            adapter=None if settings.adapter == "auto" else settings.adapter,
            session=self.key,
            client=self.key,
            prompt_seconds=settings.time_budget_ms / 1000,
            predict_seconds=settings.predict_ms / 1000,
        )

    def _fill(self, place: Place, hurry: bool) -> Fill | None:
        """The hole, and other files; None where the file must not be read. Runs in a thread."""
        documents = dict(self.documents)
        if place.uri not in documents:
            return None
        text = documents[place.uri][0].text
        path = _path(place.uri)
        if path and (reason := self.neighbours.guard.refuses(path)):
            self.neighbours.tell(f"{path} gets no completions: {reason}")
            return None
        before, after = window(
            plain(text[: place.start]) + plain(place.chosen), plain(text[place.at :]), MARGIN
        )
        prefix, suffix = window(*redacted(before, after))
        files: list[File] = []
        if self.settings.context != "none":
            others = [
                Open(_path(uri), other.text) for uri, (other, _) in documents.items() if uri != place.uri
            ]
            files = self.neighbours.files(Open(path, text), others, self.settings.context == "imports", hurry)
        shown = self.neighbours.shown(path) if path and files else None
        return Fill(prefix, suffix, shown, tuple(files), self.settings.mode, self._trim(suffix))

    def _trim(self, suffix: str) -> Trim:
        if self.settings.trim != "auto":
            return self.settings.trim
        return "line" if re.match(r"[^\n]*\w", suffix) else "block"

    def _unwanted(self, place: Place) -> bool:
        """Switched off, or in the middle of a word where nobody asked."""
        text, language = self.documents[place.uri]
        around = text.text[place.at - 1 : place.at + 1] if place.at else ""
        inside = place.automatic and not place.chosen and len(around) == 2 and re.fullmatch(r"\w\w", around)
        return not self.settings.enabled or language in self.settings.disabled_languages or bool(inside)

    def _typed(self, place: Place) -> str:
        """What is left of the last suggestion where the user has typed its start."""
        last = self.suggestion
        if last is None or last.uri != place.uri or not place.automatic or place.chosen:
            return ""
        text = self.documents[place.uri][0].text
        before = plain(text[: place.at])
        typed = before[len(last.before) :]
        if (
            plain(text[place.at :]) != last.after
            or before != last.before + typed
            or not last.text.startswith(typed)
        ):
            return ""
        return last.text[len(typed) :] if len(typed) < len(last.text) else ""

    def _judge(self, uri: str, text: str) -> None:
        """Notes what an edit took of the last suggestion: more than two characters at once were accepted."""
        last = self.suggestion
        if last is None or last.uri != uri:
            return
        size = len(text) - len(last.before) - len(last.after)
        taken = text[len(last.before) : len(last.before) + size] if size > 0 else ""
        if size < 0 or text != last.before + taken + last.after or not last.text.startswith(taken):
            self.forget()
            return
        more, last.there = size - last.there, size
        if more > 2 or (more > 1 and taken == last.text):
            last.shown.taken += more
        if taken == last.text:
            self.forget()

    def forget(self) -> None:
        """The last suggestion is over: it is recorded."""
        if self.suggestion and self.settings.stats:
            stats.record(self.suggestion.shown)
        self.suggestion = None

    def _interrupt(self) -> None:
        for task in (self._reading, self._asking and self._asking[1]):
            if task:
                task.cancel()

    def _complain(self, error: Exception) -> None:
        """Once, until something has worked again."""
        if str(error) not in self._complaints:
            self._complaints.add(str(error))
            self.tell(str(error), types.MessageType.Error)
            self.window_show_message(types.ShowMessageParams(types.MessageType.Error, f"codegemma: {error}"))


def window(prefix: str, suffix: str, more: int = 0) -> tuple[str, str]:
    """What is nearest to the cursor, in whole lines."""
    drop = -(-max(0, len(prefix) - MOST_PREFIX - more) // STEP) * STEP
    if drop:
        prefix = prefix[prefix.find("\n", drop, len(prefix) - STEP) + 1 or drop :]
    if len(suffix) > MOST_SUFFIX + more:
        suffix = suffix[: suffix.rfind("\n", 0, MOST_SUFFIX + more) + 1 or MOST_SUFFIX + more]
    return prefix, suffix


def _path(uri: str) -> Path | None:
    path = to_fs_path(uri) if uri.startswith("file:") else None
    return Path(path) if path else None


# ------------------------------------------------------------------------------------------------- features
async def inline_completion(ls: Server, params: types.InlineCompletionParams) -> types.InlineCompletionList:
    """An empty list, not null, where there is nothing: editors take null for no news and go on showing the old text."""
    found = ls.documents.get(params.text_document.uri)
    if found is None:
        return types.InlineCompletionList([])
    text, chosen = found[0], params.context.selected_completion_info
    at = text.offset(params.position.line, params.position.character)
    automatic = params.context.trigger_kind == types.InlineCompletionTriggerKind.Automatic
    place, span = Place(params.text_document.uri, at, at, automatic=automatic), _span(text, at, at)
    if chosen:
        start, end = (
            text.offset(edge.line, edge.character) for edge in (chosen.range.start, chosen.range.end)
        )
        place, span = Place(place.uri, start, end, chosen.text, automatic), chosen.range
    added = (await ls.suggest(place)).replace("\n", text.newline)
    return types.InlineCompletionList(
        [types.InlineCompletionItem(place.chosen + added, range=span)] if added else []
    )


async def completion(ls: Server, params: types.CompletionParams) -> types.CompletionList:
    """The same as one entry of the pop-up. It replaces the word before the cursor by itself, so that filters let it pass."""
    found = ls.documents.get(params.text_document.uri)
    if found is None:
        return types.CompletionList(True, [])
    text = found[0]
    at = text.offset(params.position.line, params.position.character)
    asked = params.context is None or params.context.trigger_kind == types.CompletionTriggerKind.Invoked
    added = await ls.suggest(Place(params.text_document.uri, at, at, automatic=not asked))
    if not added:
        return types.CompletionList(True, [])
    word = re.search(r"\w*$", text.text[max(0, at - 100) : at])
    start = at - len(word[0] if word else "")
    whole = text.text[start:at] + added
    label = next(line for line in whole.splitlines() if line.strip()).strip()
    item = types.CompletionItem(
        label + " …" * (whole.strip() != label),
        kind=types.CompletionItemKind.Text,
        detail="codegemma",
        documentation=_documentation(ls, whole, found[1]),
        sort_text=" ",
        filter_text=whole,
        insert_text_mode=types.InsertTextMode.AsIs,
        insert_text_format=types.InsertTextFormat.PlainText,
        text_edit=types.TextEdit(_span(text, start, at), whole.replace("\n", text.newline)),
    )
    return types.CompletionList(True, [item])


def _documentation(ls: Server, code: str, language: str) -> types.MarkupContent | str:
    document = ls.client_capabilities.text_document
    item = document.completion.completion_item if document and document.completion else None
    if item and types.MarkupKind.Markdown in (item.documentation_format or ()):
        return types.MarkupContent(types.MarkupKind.Markdown, f"```{language}\n{code}\n```")
    return code


def document_highlight(ls: Server, params: types.DocumentHighlightParams) -> None:
    """Highlights nothing: editors ask for it where the cursor rests, which they tell in no other way."""
    cursor_rests(ls, params)


def cursor_rests(ls: Server, params: Any) -> None:
    uri = (params.text_document if hasattr(params, "text_document") else params.textDocument).uri
    if found := ls.documents.get(uri):
        ls.rest(uri, found[0].offset(params.position.line, params.position.character))


async def configuration_changed(ls: Server, params: types.DidChangeConfigurationParams) -> None:
    """Where a client can be asked it is: what it sends along is often empty."""
    workspace = ls.client_capabilities.workspace
    if workspace and workspace.configuration:
        section = types.ConfigurationParams([types.ConfigurationItem(section="codegemma")])
        found = await ls.workspace_configuration_async(section)
        if found and isinstance(found[0], Mapping) and found[0]:
            ls.configure(found[0])
    elif isinstance(params.settings, Mapping) and "codegemma" in params.settings:
        ls.configure(params.settings)


async def initialized(ls: Server, params: types.InitializedParams) -> None:
    workspace = ls.client_capabilities.workspace
    if (
        workspace
        and workspace.did_change_configuration
        and workspace.did_change_configuration.dynamic_registration
    ):
        ls.client_register_capability(
            types.RegistrationParams(
                [
                    types.Registration(
                        "settings", types.WORKSPACE_DID_CHANGE_CONFIGURATION, {"section": "codegemma"}
                    )
                ]
            )
        )
    await configuration_changed(ls, types.DidChangeConfigurationParams({}))


def initialize(ls: Server, params: types.InitializeParams) -> None:
    ls.hello(params)


async def shutdown(ls: Server, params: None) -> None:
    await ls.goodbye()


FEATURES: dict[str, Callable[..., Any]] = {
    types.INITIALIZE: initialize,
    types.INITIALIZED: initialized,
    types.SHUTDOWN: shutdown,
    types.TEXT_DOCUMENT_INLINE_COMPLETION: inline_completion,
    types.TEXT_DOCUMENT_DOCUMENT_HIGHLIGHT: document_highlight,
    types.WORKSPACE_DID_CHANGE_CONFIGURATION: configuration_changed,
    CURSOR: cursor_rests,
}
OPTIONS: dict[str, Any] = {types.TEXT_DOCUMENT_INLINE_COMPLETION: types.InlineCompletionOptions()}


def _span(text: Text, start: int, end: int) -> types.Range:
    return types.Range(types.Position(*text.position(start)), types.Position(*text.position(end)))


def serve(open_source: Callable[[], Source]) -> None:
    """Speaks LSP over stdin and stdout until the editor leaves. Whatever else prints goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    server = Server(open_source)
    server.start_io(sys.stdin.buffer, out)
    server.forget()  # an editor that died said no goodbye
    sys.stderr.flush()
    os._exit(0 if server.protocol._shutdown else 1)  # the engine's thread needs not be waited for
