"""The language server: completions at the cursor, in any editor that speaks LSP.

Typing has priority: the engine stops work on a request that is cancelled, superseded or out of date. While
the cursor rests, its context is read into the prefix cache. Files that context.FilePolicy refuses enter no
prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lsprotocol import types
from pygls.exceptions import FeatureRequestError
from pygls.lsp.server import LanguageServer
from pygls.uris import to_fs_path

from codegemma import __version__
from codegemma.editor.buffers import Buffer, normalize
from codegemma.editor.connection import NOTEBOOKS, LspConnection
from codegemma.editor.context import COMMENTS, GIT_IGNORES, TRAINED, ContextFiles, ContextLimits, FilePolicy
from codegemma.editor.documents import Documents
from codegemma.editor.frames import FrameReader
from codegemma.editor.settings import EditorSettings
from codegemma.editor.sources import SuggestionSource
from codegemma.editor.suggestion import CursorPosition, Suggestion, window
from codegemma.files import explain
from codegemma.generate.completion import is_worth_showing
from codegemma.generate.request import Infill, Request
from codegemma.prompts import File
from codegemma.safety.secrets import redact_at_cursor
from codegemma.serve import stats
from codegemma.serve.requests import Busy

MAX_INDENTATION = 1000  # characters that are looked at before the cursor
TRIGGERS = list(".([{=,: ")
CURSOR = "codegemma/cursor"  # our own notification {textDocument, position}: the cursor rests there


class EditorServer(LanguageServer):
    """The language server of one editor. When the editor connects, it calls `make_suggestion_source` once,
    in a thread."""

    def __init__(self, make_suggestion_source: Callable[[], SuggestionSource]) -> None:
        super().__init__(
            "codegemma", __version__, notebook_document_sync=NOTEBOOKS, protocol_cls=LspConnection
        )
        self.make_suggestion_source = make_suggestion_source
        self.settings = self._initial_settings = EditorSettings()
        self.documents = Documents(self.log)
        self.context = ContextFiles(FilePolicy(), self.log)
        self.suggestion: Suggestion | None = None
        self.session = f"lsp-{os.getpid()}-{time.monotonic_ns():x}"
        self._reported_errors: set[str] = set()
        self._told_refusals: set[str] = set()  # URIs of documents whose refusal the user was shown
        self._source: asyncio.Task[SuggestionSource] | None = None
        # The newest request: its document's URI, and its task.
        self._request: tuple[str, asyncio.Task[str]] | None = None
        self._reading_ahead: asyncio.Task[None] | None = None
        for name, feature in FEATURES.items():
            self.feature(name, OPTIONS.get(name))(feature)

    # ----------------------------------------------------------------------------- what the editor reports
    def connect(self: EditorServer, params: types.InitializeParams) -> None:
        self.configure(params.initialization_options)
        self._initial_settings = self.settings
        folders = [to_fs_path(uri) for uri in [*self.workspace.folders, self.workspace.root_uri or ""]]
        self.context.policy = FilePolicy([Path(folder) for folder in dict.fromkeys(folders) if folder])
        inline = params.capabilities.text_document and params.capabilities.text_document.inline_completion
        if self.settings.completion == "always" or (self.settings.completion == "auto" and not inline):
            options = types.CompletionOptions(trigger_characters=TRIGGERS, resolve_provider=False)
            self.feature(types.TEXT_DOCUMENT_COMPLETION, options)(completion)
        encoding: Any = self.workspace.position_encoding
        self.documents.encoding = str(getattr(encoding, "value", encoding))  # type: ignore[assignment]
        if self._source:
            return  # a second `initialize`
        self._source = asyncio.create_task(self._make_source())
        self._source.add_done_callback(lambda task: task.cancelled() or task.exception())  # reported already

    def configure(self, options: Any) -> None:
        """Applies new settings on top of those of the initialization."""
        if isinstance(options, Mapping) and isinstance(options.get("codegemma"), Mapping):
            options = options["codegemma"]
        self.settings, complaints = self._initial_settings.updated(options)
        for complaint in complaints:
            self.log(complaint, types.MessageType.Warning)

    def document_opened(self, item: types.TextDocumentItem) -> None:
        self.documents.open(item)
        self.cursor_rests(item.uri, 0)

    def document_changed(self, uri: str, changes: Sequence[types.TextDocumentContentChangeEvent]) -> None:
        edit = self.documents.change(uri, changes)
        if edit is None:
            return
        last = self.suggestion
        if last and last.uri == uri and not last.follow_edit(edit):
            self.end_suggestion()
        if self._request and self._request[0] == uri:
            self._request[1].cancel()
        self.cursor_rests(uri, len(edit.after) - edit.tail)

    def document_closed(self, uri: str) -> None:
        self.documents.close(uri)
        self._told_refusals.discard(uri)
        if self.suggestion and self.suggestion.uri == uri:
            self.end_suggestion()

    def cursor_rests(self, uri: str, offset: int) -> None:
        """Reads the context of `offset` into the prefix cache once the editor has been idle for `rest_ms`."""
        if self._reading_ahead:
            self._reading_ahead.cancel()
        self._reading_ahead = asyncio.create_task(self._read_ahead(CursorPosition(uri, offset, offset)))

    async def disconnect(self: EditorServer, params: None) -> None:
        self._interrupt()
        self.end_suggestion()
        source, self._source = self._source, None
        if source and source.done() and not source.cancelled() and not source.exception():
            try:
                await source.result().close()
            except OSError as error:
                self.log(f"the prompt cache is not saved: {explain(error)}", types.MessageType.Warning)
            except ValueError as error:  # the file is no prompt cache
                self.log(f"the prompt cache is not saved: {error}", types.MessageType.Warning)

    def report_server_error(self, error: Exception, source: Any) -> None:
        """Logs that a message cannot be read or handled; a failed request is answered by an error."""
        if source is not FeatureRequestError:
            text = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            self.log(f"a message is skipped: {text}", types.MessageType.Error)

    def log(self, text: str, kind: types.MessageType = types.MessageType.Info) -> None:
        """Writes to the editor's log."""
        self.window_log_message(types.LogMessageParams(kind, text))

    # ----------------------------------------------------------------------------------------- suggestions
    async def suggest(self, cursor: CursorPosition) -> str:
        """The suggestion; "" if there is none.

        With `cursor.chosen` it is what follows that entry, else what to put in place of the text from
        cursor.start to cursor.end. A new call cancels the one before.
        """
        self._interrupt()
        buffer = self.documents.use(cursor.uri)
        if buffer is None or self._is_unwanted(cursor):
            return ""
        last = self.suggestion
        can_reuse = last and last.uri == cursor.uri and cursor.automatic and not cursor.chosen
        if last and can_reuse and (remaining := last.remaining(cursor.end)):
            return buffer.slice(cursor.start, cursor.end) + remaining
        self.end_suggestion()
        task = asyncio.create_task(self._ask(cursor))
        self._request = cursor.uri, task
        try:
            return await task
        except asyncio.CancelledError:
            if (current := asyncio.current_task()) and current.cancelling():
                raise  # the editor cancelled this call; otherwise a newer request or an edit cancelled `task`
        except Busy:
            pass  # the next keystroke asks again
        except (ValueError, OSError) as error:
            self._report_once(error)
        return ""

    def end_suggestion(self) -> None:
        """Records what became of the last suggestion."""
        if self.suggestion and self.settings.stats:
            stats.record(self.suggestion.shown)
        self.suggestion = None

    async def _make_source(self) -> SuggestionSource:
        started = time.monotonic()
        try:
            source = await asyncio.to_thread(self.make_suggestion_source)
        except (ValueError, OSError, ImportError) as error:
            self._report_once(error)
            raise
        self.log(f"codegemma {__version__}: {source.name}, ready after {time.monotonic() - started:.1f} s")
        return source

    async def _ask(self, cursor: CursorPosition) -> str:
        """Gets a suggestion from the source, and remembers it."""
        buffer, started = self.documents.buffers[cursor.uri], time.perf_counter()
        text = normalize(await self._fill(cursor, self.settings.max_tokens))
        self._reported_errors.clear()
        if not text.strip():
            return ""
        shown = stats.Shown(buffer.language, 1000 * (time.perf_counter() - started), len(text))
        entry, present = normalize(cursor.chosen), buffer.slice(cursor.start, cursor.end)
        if entry or text.startswith(present):  # else it removes blanks, so that typing cannot continue it
            self.suggestion = Suggestion(cursor.uri, cursor.start, entry + text, shown, len(entry), present)
        return text

    async def _read_ahead(self, cursor: CursorPosition) -> None:
        """Reads a cursor's context into the prefix cache. Reports no errors: the next suggestion will."""
        await asyncio.sleep(self.settings.rest_ms / 1000)
        if cursor.uri in self.documents.buffers and self._source and not self._is_unwanted(cursor):
            with contextlib.suppress(ValueError, OSError, ImportError, Busy):
                await self._fill(cursor, 0)

    async def _fill(self, cursor: CursorPosition, max_tokens: int) -> str:
        assert self._source
        source = await asyncio.shield(self._source)
        if cursor.uri not in self.documents.buffers:  # closed by now
            return ""
        (buffer, start), others = self.documents.whole(cursor.uri), self.documents.others(cursor.uri)
        cursor = replace(cursor, start=start + cursor.start, end=start + cursor.end)
        limits = TRAINED
        if self.settings.context == "auto" and not await source.reads_files():
            limits = COMMENTS
        request = await asyncio.to_thread(self._make_request, cursor, buffer, others, max_tokens, limits)
        if request is None:
            return ""
        filled, infill = await source.fill(request), request.prompt
        assert isinstance(infill, Infill)
        min_confidence = self.settings.min_confidence
        if cursor.automatic and not is_worth_showing(filled.text, filled.confidence, infill, min_confidence):
            return ""
        return filled.text

    def _make_request(
        self,
        cursor: CursorPosition,
        buffer: Buffer,
        others: Sequence[Buffer],
        max_tokens: int,
        limits: ContextLimits,
    ) -> Request | None:
        """The request for a cursor in `buffer`; None if its file must not be read. Runs in a thread.

        Only a request of max_tokens 0, which nobody waits for, may list the files of the repository.
        """
        settings, policy = self.settings, self.context.policy
        if buffer.path and (reason := policy.refusal(buffer.path, buffer.language, settings.ignored_files)):
            self._tell_refusal(cursor, f"{buffer.path} gets no completions: {reason}")
            return None
        prefix, suffix = redact_at_cursor(*cursor.text_to_redact(buffer))
        prefix, suffix = window(prefix, suffix)
        files: list[File] = []
        if settings.context != "none":
            imports = settings.context in ("auto", "imports")
            files = self.context.collect(buffer, others, imports, may_walk=not max_tokens, limits=limits)
        path = self.context.prompt_path(buffer.path) if buffer.path and files else None
        return Request(
            Infill(
                prefix, suffix, path, tuple(files), settings.mode, settings.trim, language=buffer.language
            ),
            max_tokens,
            adapter=settings.adapter,
            session=self.session,
            client=self.session,
            prompt_seconds=settings.time_budget_ms / 1000,
            predict_seconds=settings.predict_ms / 1000,
        )

    def _is_unwanted(self, cursor: CursorPosition) -> bool:
        """Whether suggestions are off for the document, or nobody asked and the cursor is inside a word."""
        buffer = self.documents.buffers[cursor.uri]
        if not self.settings.enabled or buffer.language in self.settings.disabled_languages:
            return True
        around = buffer.slice(cursor.end - 1, cursor.end + 1)
        return cursor.automatic and not cursor.chosen and bool(re.fullmatch(r"\w\w", around))

    def _interrupt(self) -> None:
        for task in (self._reading_ahead, self._request and self._request[1]):
            if task:
                task.cancel()

    def _tell_refusal(self, cursor: CursorPosition, text: str) -> None:
        """Logs why a document gets no suggestion, and shows it to a user who asked for one, once each."""
        self.context.log_once(text)
        if not cursor.automatic and cursor.uri not in self._told_refusals:
            self._told_refusals.add(cursor.uri)
            remedy = " (codegemma.ignoredFiles allows it)" if text.endswith(GIT_IGNORES) else ""
            message = types.ShowMessageParams(types.MessageType.Info, f"codegemma: {text}{remedy}")
            self.window_show_message(message)

    def _report_once(self, error: Exception) -> None:
        """Shows an error to the user, but not the same one again before a suggestion has succeeded."""
        text = explain(error) if isinstance(error, OSError) else str(error)
        if text not in self._reported_errors:
            self._reported_errors.add(text)
            self.log(text, types.MessageType.Error)
            self.window_show_message(types.ShowMessageParams(types.MessageType.Error, f"codegemma: {text}"))


# ------------------------------------------------------------------------------------------------- features
async def inline_completion(
    server: EditorServer, params: types.InlineCompletionParams
) -> types.InlineCompletionList:
    """Answers with an empty list if there is no suggestion: on null, editors keep showing the old one."""
    uri, chosen = params.text_document.uri, params.context.selected_completion_info
    buffer = server.documents.buffers.get(uri)
    if buffer is None:
        return types.InlineCompletionList([])
    automatic = params.context.trigger_kind == types.InlineCompletionTriggerKind.Automatic
    if chosen:
        span = chosen.range
        start, end = (buffer.offset(edge.line, edge.character) for edge in (span.start, span.end))
    else:
        end = buffer.offset(params.position.line, params.position.character)
        line_start = buffer.offset(params.position.line, 0)
        # Blanks that begin the line may be the wrong ones: the suggestion replaces them.
        is_blank = end - line_start <= MAX_INDENTATION and not buffer.slice(line_start, end).strip(" \t")
        start = line_start if is_blank else end
    cursor = CursorPosition(uri, start, end, chosen.text if chosen else "", automatic)
    text = await server.suggest(cursor)
    present = buffer.slice(start, end)
    if not chosen:
        kept = len(present) if text.startswith(present) else 0
        text, span = text[kept:], _range(buffer, start + kept, end)
    text = text.replace("\n", buffer.newline)
    items = [types.InlineCompletionItem(cursor.chosen + text, range=span)] if text else []
    return types.InlineCompletionList(items)


async def completion(server: EditorServer, params: types.CompletionParams) -> types.CompletionList:
    """The suggestion as an entry of the pop-up.

    It replaces the word before the cursor by text that starts with that word, to pass the editor's filter.
    """
    uri, position, context = params.text_document.uri, params.position, params.context
    buffer = server.documents.buffers.get(uri)
    if buffer is None:
        return types.CompletionList(True, [])
    offset = buffer.offset(position.line, position.character)
    automatic = context is not None and context.trigger_kind != types.CompletionTriggerKind.Invoked
    added = await server.suggest(CursorPosition(uri, offset, offset, automatic=automatic))
    if not added:
        return types.CompletionList(True, [])
    word = re.search(r"\w*$", buffer.slice(offset - 100, offset))
    start = offset - len(word[0] if word else "")
    text = buffer.slice(start, offset) + added
    label = next(line for line in text.splitlines() if line.strip()).strip()
    item = types.CompletionItem(
        label + " …" * (text.strip() != label),
        kind=types.CompletionItemKind.Text,
        detail="codegemma",
        documentation=_documentation(server, text, buffer.language),
        sort_text=" ",
        filter_text=text,
        insert_text_mode=types.InsertTextMode.AsIs,
        insert_text_format=types.InsertTextFormat.PlainText,
        text_edit=types.TextEdit(_range(buffer, start, offset), text.replace("\n", buffer.newline)),
    )
    return types.CompletionList(True, [item])


def _documentation(server: EditorServer, code: str, language: str) -> types.MarkupContent | str:
    document = server.client_capabilities.text_document
    item = document.completion.completion_item if document and document.completion else None
    if item and types.MarkupKind.Markdown in (item.documentation_format or ()):
        return types.MarkupContent(types.MarkupKind.Markdown, f"```{language}\n{code}\n```")
    return code


def cursor_notification(server: EditorServer, params: Any) -> None:
    """Handles our notification and documentHighlight, which editors send when the cursor rests."""
    uri = (params.text_document if hasattr(params, "text_document") else params.textDocument).uri
    if buffer := server.documents.buffers.get(uri):
        server.cursor_rests(uri, buffer.offset(params.position.line, params.position.character))


async def configuration_changed(server: EditorServer, params: types.DidChangeConfigurationParams) -> None:
    """Asks the client for its settings, if it supports that: those in the notification are often empty."""
    workspace = server.client_capabilities.workspace
    if workspace and workspace.configuration:
        section = types.ConfigurationParams([types.ConfigurationItem(section="codegemma")])
        sections = await server.workspace_configuration_async(section)
        if sections and isinstance(sections[0], Mapping) and sections[0]:
            server.configure(sections[0])
    elif isinstance(params.settings, Mapping) and "codegemma" in params.settings:
        server.configure(params.settings)


async def initialized(server: EditorServer, params: types.InitializedParams) -> None:
    workspace = server.client_capabilities.workspace
    changes = workspace and workspace.did_change_configuration
    if changes and changes.dynamic_registration:
        method, options = types.WORKSPACE_DID_CHANGE_CONFIGURATION, {"section": "codegemma"}
        registration = types.Registration("settings", method, options)
        server.client_register_capability(types.RegistrationParams([registration]))
    await configuration_changed(server, types.DidChangeConfigurationParams({}))


# pygls passes the server to a function whose first parameter is annotated with the server's class.
FEATURES: dict[str, Callable[..., Any]] = {
    types.INITIALIZE: EditorServer.connect,
    types.INITIALIZED: initialized,
    types.SHUTDOWN: EditorServer.disconnect,
    types.TEXT_DOCUMENT_INLINE_COMPLETION: inline_completion,
    types.TEXT_DOCUMENT_DOCUMENT_HIGHLIGHT: cursor_notification,
    types.WORKSPACE_DID_CHANGE_CONFIGURATION: configuration_changed,
    CURSOR: cursor_notification,
}
OPTIONS: dict[str, Any] = {types.TEXT_DOCUMENT_INLINE_COMPLETION: types.InlineCompletionOptions()}


def _range(buffer: Buffer, start: int, end: int) -> types.Range:
    return types.Range(types.Position(*buffer.position(start)), types.Position(*buffer.position(end)))


def serve(make_suggestion_source: Callable[[], SuggestionSource]) -> None:
    """Speaks LSP over stdin and stdout until the editor exits. All other output goes to stderr."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    logging.getLogger("pygls").setLevel(logging.CRITICAL)  # no tracebacks: see report_server_error
    server = EditorServer(make_suggestion_source)
    was_shut_down = False
    try:
        server.start_io(FrameReader(sys.stdin.buffer), out)  # type: ignore[arg-type]
        was_shut_down = server.protocol._shutdown
        if not was_shut_down:  # the editor died
            asyncio.run(server.disconnect(None))
    except Exception as error:
        print(f"codegemma lsp: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        sys.stderr.flush()
        os._exit(0 if was_shut_down else 1)  # without waiting for the engine's thread
