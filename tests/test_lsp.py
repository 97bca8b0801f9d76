"""The language server under a raw JSON-RPC client: positions, edits, cancellation, and what it requests."""

import asyncio
import io
import json
import os
import queue
import re
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lsprotocol import types
from serving import served
from tiny import tiny_config, write_tiny_gguf

import codegemma
from codegemma.editor import buffers, sources, suggestion
from codegemma.editor.buffers import Buffer, normalize
from codegemma.editor.frames import FrameReader
from codegemma.editor.lsp import EditorServer
from codegemma.editor.settings import EditorSettings
from codegemma.editor.sources import Filled, LocalSource, RemoteSource
from codegemma.editor.suggestion import (
    MAX_PREFIX,
    MAX_SUFFIX,
    REDACTION_MARGIN,
    WINDOW_STEP,
    CursorPosition,
    window,
)
from codegemma.serve import stats
from codegemma.serve.scheduler import Scheduler

WAIT = 20  # seconds; the machine may be busy


# ------------------------------------------------------------------------------------------------ positions
WIDTH = {"utf-8": 1, "utf-16": 2, "utf-32": 4}
CODEC = {"utf-8": "utf-8", "utf-16": "utf-16-le", "utf-32": "utf-32-le"}
LETTERS = st.lists(
    st.sampled_from([*"ab (é中\r\n\n\x0c\x1d\u2028", "\r\n", "😋", "𝔊", "e\u0301"]), max_size=30
).map("".join)


class ReferenceDocument:
    """A document as an editor sees it: a list of code units. It shares no code with Buffer."""

    def __init__(self, text, encoding):
        self.encoding = encoding
        self.units = self.split(text)

    def split(self, text):
        data, width = text.encode(CODEC[self.encoding]), WIDTH[self.encoding]
        return [int.from_bytes(data[index : index + width], "little") for index in range(0, len(data), width)]

    def text(self, units=None):
        units = self.units if units is None else units
        return b"".join(unit.to_bytes(WIDTH[self.encoding], "little") for unit in units).decode(
            CODEC[self.encoding]
        )

    def place(self, line, character):
        """The index of a position's unit: past a line it is the line's end, within a character its start."""
        starts = [0]
        for index, unit in enumerate(self.units):
            if unit == 10 or (unit == 13 and self.units[index + 1 : index + 2] != [10]):
                starts.append(index + 1)
        if line >= len(starts):
            return len(self.units)
        end = starts[line]
        while end < len(self.units) and self.units[end] not in (10, 13):
            end += 1
        index = min(starts[line] + character, end)
        while 0 < index < len(self.units) and (
            self.encoding == "utf-8"
            and self.units[index] & 0xC0 == 0x80
            or self.encoding == "utf-16"
            and 0xDC00 <= self.units[index] < 0xE000
        ):
            index -= 1
        return index


@pytest.fixture(params=[2, 5, buffers.CHUNK_CHARACTERS], scope="module")
def chunk_characters(request):
    """Texts are kept in chunks of so many characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "CHUNK_CHARACTERS", request.param)
        yield request.param


@pytest.mark.usefixtures("chunk_characters")
@pytest.mark.parametrize("encoding", CODEC)
@settings(max_examples=80, deadline=None)
@given(
    text=LETTERS, edits=st.lists(st.tuples(*[st.integers(0, 6), st.integers(0, 12)] * 2, LETTERS), max_size=8)
)
def test_edits_at_any_position_give_the_text_that_the_editor_has(encoding, text, edits):
    ours, twin = Buffer(text, encoding), ReferenceDocument(text, encoding)
    for line, character, line2, character2, new in edits:
        first, last = sorted((twin.place(line, character), twin.place(line2, character2)))
        assert ours.text[: ours.offset(line, character)] == twin.text(
            twin.units[: twin.place(line, character)]
        )
        ours = ours.edited((line, character), (line2, character2), new)
        twin.units[first:last] = twin.split(new)
        assert ours.text == twin.text() and ours.newline == (re.search(r"\r\n|\r|\n", ours.text) or ["\n"])[0]


@pytest.mark.usefixtures("chunk_characters")
@pytest.mark.parametrize("encoding", CODEC)
@settings(max_examples=80, deadline=None)
@given(text=LETTERS)
def test_a_position_made_of_an_offset_leads_back_to_it(encoding, text):
    ours = Buffer(text, encoding)
    for offset in range(len(text) + 1):
        if not (text[offset - 1 : offset + 1] == "\r\n" and offset):  # no position is inside a line's end
            line, character = ours.position(offset)
            assert ours.offset(line, character) == offset
            assert ReferenceDocument(text, encoding).place(line, character) == len(
                ReferenceDocument(text[:offset], encoding).units
            )
            before = ours.normalized_length(offset)
            assert before == len(normalize(text[:offset])) and ours.offset_of_normalized(before) == offset
            assert ours.slice(offset, offset + 7) == text[offset : offset + 7]


def test_halves_of_a_surrogate_pair_count_one_unit_each_and_meet_in_the_prompt():
    text = Buffer("x", "utf-16").edited((0, 1), (0, 1), "\ud83d").edited((0, 2), (0, 2), "\ude0b!")
    assert text.offset(0, 4) == 4 and text.position(4) == (0, 4)
    assert normalize(text.text) == "x😋!" and normalize("a\udc00b\r\nc\rd") == "a\ufffdb\nc\nd"


def test_windows_are_near_the_cursor_in_whole_lines_and_stay_put_while_one_types():
    lines = "".join(f"line {number}\n" for number in range(20_000))
    first, after = window(lines, lines)
    assert (
        lines.endswith(first)
        and lines.startswith(after)
        and first.startswith("line ")
        and after.endswith("\n")
    )
    assert MAX_PREFIX / 2 < len(first) <= MAX_PREFIX and MAX_SUFFIX / 2 < len(after) <= MAX_SUFFIX
    starts = {lines.rfind(window(lines + "x" * typed, "")[0][:40]) for typed in range(2000)}
    assert len(starts) <= 2
    assert window("ab", "cd") == ("ab", "cd") and window("x" * 60_000, "")[0] == "x" * (60_000 - 16_384)


# ------------------------------------------------------------------------------------------------- a client
class Client:
    """A JSON-RPC client over two pipes."""

    def __init__(self, incoming, outgoing):
        self.incoming, self.outgoing, self.id = incoming, outgoing, 0
        self.answers, self.notes, self.server_requests = {}, queue.Queue(), queue.Queue()
        self.replies = {"workspace/configuration": [None]}
        self.arrived = threading.Condition()
        self.thread = threading.Thread(target=self.listen, daemon=True)
        self.thread.start()

    def listen(self):
        while header := self.incoming.readline():
            size = int(header.split(b":")[1])
            while self.incoming.readline().strip():
                pass
            message = json.loads(self.incoming.read(size))
            if "method" in message and "id" in message:
                self.server_requests.put(message)
                self.send(id=message["id"], result=self.replies.get(message["method"]))
            elif "method" in message:
                self.notes.put(message)
            else:
                with self.arrived:
                    self.answers[message["id"]] = message
                    self.arrived.notify_all()

    def send(self, **message):
        body = json.dumps({"jsonrpc": "2.0"} | message).encode()
        self.outgoing.write(b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
        self.outgoing.flush()

    def start(self, method, **params):
        self.id += 1
        self.send(id=self.id, method=method, params=params)
        return self.id

    def answer(self, id):
        with self.arrived:
            assert self.arrived.wait_for(lambda: id in self.answers, WAIT), f"no answer to {id}"
            return self.answers[id]

    def ask(self, method, **params):
        answer = self.answer(self.start(method, **params))
        assert "error" not in answer, answer
        return answer["result"]

    def notify(self, method, **params):
        self.send(method=method, params=params)

    def note(self, method, text=""):
        while True:
            note = self.notes.get(timeout=WAIT)
            if note["method"] == method and text in note["params"].get("message", ""):
                return note["params"]

    def open(self, uri, text, language="python"):
        self.notify(
            "textDocument/didOpen",
            textDocument={"uri": uri, "languageId": language, "version": 1, "text": text},
        )

    def change(self, uri, start, end, text):
        self.notify(
            "textDocument/didChange",
            textDocument={"uri": uri, "version": 2},
            contentChanges=[
                {"range": {"start": lsp_position(*start), "end": lsp_position(*end)}, "text": text}
            ],
        )

    def inline(self, uri, line, character, kind=2, **context):
        return self.start(
            "textDocument/inlineCompletion",
            textDocument={"uri": uri},
            position=lsp_position(line, character),
            context={"triggerKind": kind} | context,
        )

    def texts(self, id):
        return [item["insertText"] for item in self.answer(id)["result"]["items"]]


def wait_until(condition):
    """Waits for a condition that no event announces."""
    pause = threading.Event()
    for _ in range(WAIT * 100):
        if condition():
            return
        pause.wait(0.01)
    raise AssertionError("the condition never came true")


def lsp_position(line, character):
    return {"line": line, "character": character}


class Stub:
    """A source that the test answers: every request waits in `requests` until its future has a text."""

    name = "stub"

    def __init__(self, reads_files=True):
        self._reads_files = reads_files
        self.requests, self.cancelled, self.closed = queue.Queue(), queue.Queue(), threading.Event()

    async def reads_files(self):
        return self._reads_files

    async def fill(self, request):
        future = asyncio.get_running_loop().create_future()
        self.requests.put((request, future))
        try:
            return await future
        except asyncio.CancelledError:
            self.cancelled.put(request)
            raise

    async def close(self):
        self.closed.set()

    def next(self):
        return self.requests.get(timeout=WAIT)


def resolve(future, text, confidence=1.0):
    future.get_loop().call_soon_threadsafe(future.set_result, Filled(text, confidence))


@contextmanager
def session(source, folder=None, encodings=("utf-16",), inline=True, capabilities=None, **options):
    """A client that has initialized a server in this process."""
    to_server, to_client = os.pipe(), os.pipe()
    ends = ((to_server[0], "rb"), (to_client[1], "wb"), (to_client[0], "rb"), (to_server[1], "wb"))
    files = [os.fdopen(*end) for end in ends]
    server = EditorServer(lambda: source() if callable(source) else source)
    thread = threading.Thread(target=server.start_io, args=files[:2])
    thread.start()
    client = Client(*files[2:])
    document = {"inlineCompletion": {}} if inline else {}
    client.initialize_result = client.ask(
        "initialize",
        processId=None,
        rootUri=folder.as_uri() if folder else None,
        initializationOptions={"restMs": 9**9} | options,
        capabilities={"general": {"positionEncodings": [*encodings]}, "textDocument": document}
        | (capabilities or {}),
    )
    client.notify("initialized")
    client.server = server
    try:
        yield client
    finally:
        client.ask("shutdown")
        client.notify("exit")
        client.outgoing.close()
        thread.join(WAIT)
        client.thread.join(WAIT)
        assert not thread.is_alive() and not client.thread.is_alive()
        for file in files:
            file.close()


@pytest.fixture(autouse=True)
def private_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    """Large enough that its longest answer takes seconds."""
    config = tiny_config("gemma3", layers=6, width=512, ffn_width=2048, context=8192)
    return write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", config, "Q8_0")


@pytest.fixture(scope="module")
def model_text(model_path):
    """What the model itself writes between PREFIX and SUFFIX."""
    answer = codegemma.load(model_path, threads=1).complete(PREFIX, SUFFIX, trim="none", max_tokens=48)
    assert len(answer.ids) == 48 and answer.text.strip()
    return answer.text


PREFIX, SUFFIX = "def re(th):\n    retu", "\n\nreturn 1\n"


# ------------------------------------------------------------------------------------------------- requests
def test_what_the_server_says_it_can_do_is_what_the_client_can_use():
    with session(Stub(), encodings=("utf-32", "utf-8")) as client:
        capabilities = client.initialize_result["capabilities"]
        assert capabilities["positionEncoding"] == "utf-32" and "completionProvider" not in capabilities
        assert capabilities["textDocumentSync"]["change"] == 2 and "inlineCompletionProvider" in capabilities
    with session(Stub(), inline=False, encodings=("klingon",)) as client:
        capabilities = client.initialize_result["capabilities"]
        assert (
            capabilities["positionEncoding"] == "utf-16"
            and "." in capabilities["completionProvider"]["triggerCharacters"]
        )
    for choice, offered in (("never", False), ("always", True)):
        with session(Stub(), inline=choice == "always", completion=choice) as client:
            assert ("completionProvider" in client.initialize_result["capabilities"]) == offered


@pytest.mark.parametrize("encoding, column", [("utf-8", 16), ("utf-16", 12), ("utf-32", 10)])
def test_the_hole_is_where_the_editor_says(encoding, column):
    stub, uri = Stub(), "untitled:main"
    with session(stub, encodings=(encoding,)) as client:
        client.open(uri, "# 😋\r\nx = '😋𝔊' + \r\nend\r\n")
        client.change(uri, (0, 0), (0, 1), "#中")
        id = client.inline(uri, 1, column)
        request, future = stub.next()
        assert (request.prompt.prefix, request.prompt.suffix) == ("#中 😋\nx = '😋𝔊' +", " \nend\n")
        assert request.prompt.trim == "auto" and request.max_tokens == 64 and request.prompt.path is None
        resolve(future, " f(\n  1)")
        (item,) = client.answer(id)["result"]["items"]
        assert item["insertText"] == " f(\r\n  1)"  # as the document's lines end
        assert item["range"] == {"start": lsp_position(1, column), "end": lsp_position(1, column)}


def test_a_chosen_entry_of_the_popup_is_completed_in_its_own_range():
    stub, uri = Stub(), "untitled:main"
    with session(stub) as client:
        client.open(uri, "a = os.pa + b\n")
        span = {"start": lsp_position(0, 7), "end": lsp_position(0, 9)}
        id = client.inline(uri, 0, 9, selectedCompletionInfo={"range": span, "text": "path"})
        request, future = stub.next()
        assert (request.prompt.prefix, request.prompt.suffix, request.prompt.trim) == (
            "a = os.path",
            " + b\n",
            "auto",
        )
        resolve(future, ".sep")
        (item,) = client.answer(id)["result"]["items"]
        assert (item["insertText"], item["range"]) == ("path.sep", span)


def test_clients_without_inline_completion_get_an_entry_of_the_popup_that_replaces_the_word():
    stub, uri = Stub(), "untitled:main"
    reads = {
        "textDocument": {"completion": {"completionItem": {"documentationFormat": ["markdown", "plaintext"]}}}
    }
    with session(stub, inline=False, capabilities=reads) as client:
        client.open(uri, "x = 'é'; pri\n")
        id = client.start(
            "textDocument/completion",
            textDocument={"uri": uri},
            position=lsp_position(0, 12),
            context={"triggerKind": 1},
        )
        request, future = stub.next()
        assert request.prompt.prefix == "x = 'é'; pri"
        resolve(future, "nt(x)\nprint(y)")
        result = client.answer(id)["result"]
        (item,) = result["items"]
        assert (
            result["isIncomplete"]
            and item["label"] == "print(x) …"
            and item["filterText"].startswith("print(")
        )
        assert item["textEdit"] == {
            "range": {"start": lsp_position(0, 9), "end": lsp_position(0, 12)},
            "newText": "print(x)\nprint(y)",
        }
        assert item["documentation"] == {"kind": "markdown", "value": "```python\nprint(x)\nprint(y)\n```"}


def test_a_cancelled_request_stops_the_work_and_says_so():
    stub, uri = Stub(), "untitled:main"
    with session(stub) as client:
        client.open(uri, "x = \n")
        id = client.inline(uri, 0, 4)
        request, _ = stub.next()
        client.notify("$/cancelRequest", id=id)
        assert stub.cancelled.get(timeout=WAIT) is request
        assert client.answer(id)["error"]["code"] == -32800


def test_a_newer_request_and_an_edit_stop_the_older_one():
    stub, uri = Stub(), "untitled:main"
    with session(stub) as client:
        client.open(uri, "x = \n")
        first = client.inline(uri, 0, 4)
        old, _ = stub.next()
        second = client.inline(uri, 0, 4)
        assert stub.cancelled.get(timeout=WAIT) is old and client.texts(first) == []
        newer, _ = stub.next()
        client.change(uri, (0, 4), (0, 4), "y")
        assert stub.cancelled.get(timeout=WAIT) is newer and client.texts(second) == []


def test_the_engine_itself_stops(model_path):
    """Cancelling a long answer: the engine counts it as cancelled, and is idle long before its last token."""
    source = []

    def make_suggestion_source():
        source.append(LocalSource(codegemma.load(model_path, threads=1)))
        return source[0]

    with session(
        make_suggestion_source, maxTokens=8000, trim="none", predictMs=10**8, timeBudgetMs=10**6
    ) as client:
        client.open("untitled:main", PREFIX + SUFFIX)
        id = client.inline("untitled:main", 1, 8, kind=1)
        wait_until(lambda: source and source[0].scheduler.metrics.running)
        client.notify("$/cancelRequest", id=id)
        assert client.answer(id)["error"]["code"] == -32800
        metrics = source[0].scheduler.metrics
        wait_until(lambda: metrics.counts["cancelled"] and not metrics.running)
        assert metrics.counts["cancelled"] == 1 and metrics.counts["predicted_tokens"] < 4000


def test_suggestions_are_the_models_own(model_path, model_text):
    with session(
        lambda: LocalSource(codegemma.load(model_path, threads=1)),
        maxTokens=48,
        trim="none",
        timeBudgetMs=10**6,
        predictMs=10**6,
    ) as client:
        client.open("untitled:main", PREFIX + SUFFIX)
        assert client.texts(client.inline("untitled:main", 1, 8, kind=1)) == [model_text]


def test_while_the_cursor_rests_its_context_is_read(model_path):
    source = []

    def make_suggestion_source():
        source.append(LocalSource(codegemma.load(model_path, threads=1)))
        return source[0]

    text = "def re(th):\n    return th\n" * 6
    with session(make_suggestion_source, restMs=1, timeBudgetMs=10**6) as client:
        client.open("untitled:main", text)
        client.notify("codegemma/cursor", textDocument={"uri": "untitled:main"}, position=lsp_position(11, 0))
        wait_until(lambda: source and source[0].scheduler.metrics.counts["prompt_tokens"] > 50)
        counts = source[0].scheduler.metrics.counts
        wait_until(lambda: not source[0].scheduler.metrics.running)
        read = counts["prompt_tokens"]
        assert read > 50 and not counts["predicted_tokens"]
        client.texts(client.inline("untitled:main", 11, 0, kind=1))
        assert counts["cached_tokens"] >= 40


def test_typing_stops_the_reading_ahead_and_highlights_ask_for_it():
    stub, uri = Stub(), "untitled:main"
    with session(stub, restMs=1) as client:
        client.open(uri, "x = \ny = 1\n")
        request, _ = stub.next()
        assert request.max_tokens == 0 and request.prompt.prefix == ""
        assert (
            client.ask(
                "textDocument/documentHighlight", textDocument={"uri": uri}, position=lsp_position(0, 4)
            )
            is None
        )
        assert stub.cancelled.get(timeout=WAIT) is request
        rested, _ = stub.next()
        assert (rested.max_tokens, rested.prompt.prefix) == (0, "x = ")
        id = client.inline(uri, 0, 4, kind=1)
        assert stub.cancelled.get(timeout=WAIT) is rested
        newest, future = stub.next()
        assert newest.max_tokens == 64
        resolve(future, "")
        assert client.texts(id) == []


def test_what_is_typed_of_a_suggestion_needs_no_model_and_what_is_taken_is_counted():
    stub, uri = Stub(), "untitled:main"
    with session(stub) as client:
        client.open(uri, "x = \n")
        id = client.inline(uri, 0, 4)
        resolve(stub.next()[1], "foo(bar)")
        assert client.texts(id) == ["foo(bar)"]
        client.change(uri, (0, 4), (0, 4), "f")
        assert client.texts(client.inline(uri, 0, 5)) == ["oo(bar)"]
        client.change(uri, (0, 5), (0, 5), "oo(bar)")  # accepted
        id = client.inline(uri, 0, 12)
        resolve(stub.next()[1], "\nprint(x)")
        client.texts(id)
        client.change(uri, (0, 12), (0, 12), "!")  # typed something else
        id = client.inline(uri, 0, 13)
        resolve(stub.next()[1], "  ")
        assert client.texts(id) == []  # blank is nothing
    first, second = stats.load()
    assert (first.language, first.characters, first.taken) == ("python", 8, 7)
    assert (second.characters, second.taken) == (9, 0)
    assert stub.closed.is_set()


def test_nothing_is_asked_inside_a_word_or_where_it_is_switched_off():
    stub = Stub()
    with session(stub, disabledLanguages=["markdown"]) as client:
        client.open("untitled:a", "value = other\n")
        client.open("untitled:b", "# Title\n", "markdown")
        assert client.texts(client.inline("untitled:a", 0, 10)) == []
        assert client.texts(client.inline("untitled:b", 0, 7, kind=1)) == []
        assert client.texts(client.inline("untitled:unknown", 0, 0)) == []
        id = client.inline("untitled:a", 0, 10, kind=1)  # asked for by hand
        resolve(stub.next()[1], "x")
        assert client.texts(id) == ["x"]


def test_trigger_kinds_of_older_clients_are_understood():
    stub = Stub()
    with session(stub) as client:
        client.open("untitled:a", "x = \n")
        id = client.inline("untitled:a", 0, 4, kind=0)
        resolve(stub.next()[1], "1")
        assert client.texts(id) == ["1"]


def test_wrong_parameters_are_answered():
    with session(Stub()) as client:
        for method in ("textDocument/inlineCompletion", "textDocument/documentHighlight"):
            assert client.answer(client.start(method, position="here"))["error"]["code"] == -32602
        assert client.answer(client.start("no/such"))["error"]["code"] == -32601
        for number, params in enumerate(
            (None, [], {"textDocument": {"uri": "untitled:a"}, "position": lsp_position(0, 0), "context": 3})
        ):
            client.send(id=-number, method="textDocument/inlineCompletion", params=params)
            assert client.answer(-number)["error"]["code"] == -32602
        bare = client.start(
            "textDocument/inlineCompletion",
            textDocument={"uri": "untitled:a"},
            position=lsp_position(0, 0),
            context=None,
        )
        assert client.texts(bare) == []  # Emacs' null


def test_an_editor_that_dies_leaves_nothing_behind(tmp_path):
    command = [sys.executable, "-m", "codegemma.cli", "lsp", "--server", "http://127.0.0.1:9"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(
        b'Content-Length: 86\r\n\r\n{"jsonrpc": "2.0", "id": 1, "method": "initialize", '
        b'"params": {"capabilities": {}   }}'
    )
    process.stdin.close()
    out = process.stdout.read()
    assert b'"positionEncoding": "utf-16"' in out and process.wait(WAIT) == 1
    assert process.stderr.read() == b""
    process.stdout.close()
    process.stderr.close()


def test_settings_come_with_the_greeting_and_from_the_configuration_and_are_checked():
    stub = Stub()
    capabilities = {
        "workspace": {"configuration": True, "didChangeConfiguration": {"dynamicRegistration": True}}
    }
    with session(
        stub,
        capabilities=capabilities | {"textDocument": {"inlineCompletion": {}}},
        maxTokens=7,
        colour="red",
    ) as client:
        client.note("window/logMessage", "no setting codegemma.colour")
        client.note("window/logMessage", "stub, ready")
        methods = {client.server_requests.get(timeout=WAIT)["method"] for _ in range(2)}
        assert methods == {"client/registerCapability", "workspace/configuration"}
        client.replies["workspace/configuration"] = [{"trim": "line", "timeBudgetMs": "fast"}]
        client.notify("workspace/didChangeConfiguration", settings=None)
        client.note(
            "window/logMessage", "codegemma.timeBudgetMs: Input should be a valid integer, got 'fast'"
        )
        client.open("untitled:a", "x = \n")
        id = client.inline("untitled:a", 0, 4)
        request, future = stub.next()
        assert (request.max_tokens, request.prompt.trim, request.prompt_seconds) == (7, "line", 0.3)
        resolve(future, "")
        client.answer(id)


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("enabled", 1),
        ("maxTokens", 0),
        ("maxTokens", True),
        ("trim", "word"),
        ("mode", 3),
        ("disabledLanguages", "c"),
        ("adapter", None),
    ],
)
def test_a_wrong_setting_changes_nothing(name, wrong):
    settings, complaints = EditorSettings().updated({name: wrong})
    assert (
        settings == EditorSettings()
        and len(complaints) == 1
        and repr(wrong) in complaints[0]
        and f"codegemma.{name}:" in complaints[0]
    )


def test_a_model_that_is_not_there_is_told_once():
    def fails():
        raise ValueError("no model 'x': check the path")

    with session(fails) as client:
        assert "no model 'x'" in client.note("window/showMessage")["message"]
        client.open("untitled:a", "x = \n")
        assert (
            client.texts(client.inline("untitled:a", 0, 4))
            == []
            == client.texts(client.inline("untitled:a", 0, 4))
        )
        client.ask(
            "textDocument/documentHighlight", textDocument={"uri": "untitled:a"}, position=lsp_position(0, 0)
        )
        assert all(note["method"] != "window/showMessage" for note in [*client.notes.queue])


# ---------------------------------------------------------------------------------------------- what is read
def test_ignored_files_and_secrets_enter_no_prompt(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("build/\n")
    (tmp_path / "lib.py").write_text("def helper(): pass\n")
    key, other = "AKIAQYLPMN5HNM4CJX2B", "AKIA2E5HXQ7RZ3NLWMTK"
    stub = Stub()
    with session(stub, folder=tmp_path) as client:

        def uri(name):
            return (tmp_path / name).as_uri()

        client.open(uri(".env"), "KEY=1\n")
        client.open(uri("build/made.py"), "made = 1\n")
        client.open(
            uri("keys.py"),
            f"password = 'hunter2-Tr0ub4dor&3xyz'\nTOKEN = 'sk_live_{'4eC39HqLyjWDarjtT1' * 2}'\n",
        )
        client.open(uri("plain.py"), "plain = 1\n")
        client.open(uri("app.py"), f"import lib\nAWS = '{key}'\nx = \nOLD = '{other}'\n")
        for refused in (".env", "build/made.py"):
            assert client.texts(client.inline(uri(refused), 0, 3, kind=1)) == []
        client.note("window/logMessage", ".env gets no completions: files of this name hold credentials")
        id = client.inline(uri("app.py"), 2, 4)
        request, future = stub.next()
        keys, plain = request.prompt.files
        assert (keys.path, plain.path, request.prompt.path) == ("keys.py", "plain.py", "app.py")
        assert "hunter2" not in keys.text and "4eC39" not in keys.text and keys.text.count("EXAMPLE") == 2
        assert keys.text.startswith("password = '") and plain.text == "plain = 1\n"
        assert key[4:] not in request.prompt.prefix and len(request.prompt.prefix) == len(
            f"import lib\nAWS = '{key}'\nx = "
        )
        assert (
            other[4:] not in request.prompt.suffix
            and "EXAMPLE" in request.prompt.prefix
            and "EXAMPLE" in request.prompt.suffix
        )
        resolve(future, "1")
        client.answer(id)


def test_imports_are_read_once_the_cursor_has_rested(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / "lib.py").write_text("def helper(): pass\n")
    stub = Stub()
    with session(stub, folder=tmp_path, restMs=1) as client:
        client.open((tmp_path / "app.py").as_uri(), "from lib import helper\nhelper\n")
        request, _ = stub.next()
        assert [(file.path, file.text) for file in request.prompt.files] == [
            ("lib.py", "def helper(): pass\n")
        ]
        id = client.inline((tmp_path / "app.py").as_uri(), 1, 6, kind=1)
        request, future = stub.next()
        assert [file.path for file in request.prompt.files] == ["lib.py"]
        resolve(future, "()")
        client.answer(id)


# ------------------------------------------------------------------------------------------- another server
@contextmanager
def http(answer):
    """A loopback HTTP server. `answer(path, body)` gives (status, JSON), or None to leave the client waiting.

    Yields its port, the list of requests as (path, body, key), and an event that a client's hanging up sets.
    """
    received, hung_up, ready, done = [], threading.Event(), threading.Event(), {}

    async def handle(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        fields = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:] if line)
        if head.startswith(b"GET"):  # /props, which other servers may lack
            writer.write(b"HTTP/1.1 404 X\r\n\r\n{}")
            writer.close()
            return
        body = json.loads(await reader.readexactly(int(fields["Content-Length"])))
        received.append((head.split()[1].decode(), body, fields.get("Authorization")))
        if (response := answer(*received[-1][:2])) is None:
            await reader.read()
            hung_up.set()
        else:
            writer.write(f"HTTP/1.1 {response[0]} X\r\n\r\n{json.dumps(response[1])}".encode())
        writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        done["port"], done["stop"], done["loop"] = (
            server.sockets[0].getsockname()[1],
            asyncio.Event(),
            asyncio.get_running_loop(),
        )
        ready.set()
        async with server:
            await done["stop"].wait()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    ready.wait(WAIT)
    try:
        yield done["port"], received, hung_up
    finally:
        done["loop"].call_soon_threadsafe(done["stop"].set)
        thread.join(WAIT)


def test_a_running_server_is_asked_over_infill_and_hung_up_on_when_cancelled():
    def answer(path, body):
        end = "\r\n" if body["prompt"] == "end = " else "\n"
        return None if body["prompt"] == "hang = " else (200, {"content": f"1{end}{end}other = 2"})

    with (
        http(answer) as (port, received, hung_up),
        session(RemoteSource(f"127.0.0.1:{port}", "key")) as client,
    ):
        client.open("untitled:a", "one = 1\nx = \nrest\nhang = \n")
        assert client.texts(client.inline("untitled:a", 1, 4)) == [
            "1"
        ]  # trimmed here, where the server did not
        path, body, key = received[0]
        assert (path, key) == ("/infill", "Bearer key")
        assert (body["input_prefix"], body["prompt"], body["input_suffix"]) == (
            "one = 1\n",
            "x = ",
            "\nrest\nhang = \n",
        )
        assert body["n_predict"] == 64 and body["t_max_prompt_ms"] == 300 and body["trim"] == "auto"
        client.open("untitled:b", "end = \n")
        assert client.texts(client.inline("untitled:b", 0, 6)) == ["1"]
        id = client.inline("untitled:a", 3, 7)
        wait_until(lambda: len(received) == 3)
        client.notify("$/cancelRequest", id=id)
        assert hung_up.wait(WAIT) and client.answer(id)["error"]["code"] == -32800


def test_our_own_server_gives_the_models_suggestion_reads_ahead_and_can_be_cancelled(model_path, model_text):
    async def opened():
        return Scheduler(codegemma.load(model_path, threads=1))

    options = {"trim": "none", "timeBudgetMs": 10**6, "predictMs": 10**6}
    with served(opened) as server:
        with session(RemoteSource(server.url), maxTokens=48, **options, restMs=1) as client:
            client.open("untitled:main", PREFIX + SUFFIX)
            client.notify(
                "codegemma/cursor", textDocument={"uri": "untitled:main"}, position=lsp_position(1, 8)
            )
            wait_until(
                lambda: (
                    server.service.metrics.counts["prompt_tokens"] >= 10
                    and not server.service.metrics.running
                )
            )
            assert server.service.metrics.counts["predicted_tokens"] == 0
            assert client.texts(client.inline("untitled:main", 1, 8, kind=1)) == [model_text]
            assert server.service.metrics.counts["cached_tokens"] > 0
        with session(RemoteSource(server.url), maxTokens=8000, **options) as client:
            client.open("untitled:main", PREFIX + SUFFIX)
            id = client.inline("untitled:main", 1, 8, kind=1)
            wait_until(lambda: server.service.metrics.running)
            client.notify("$/cancelRequest", id=id)
            assert client.answer(id)["error"]["code"] == -32800
            wait_until(lambda: not server.service.metrics.running)
            assert server.service.metrics.counts["cancelled"] == 1


def test_servers_without_infill_are_asked_for_a_completion_with_a_suffix_and_errors_are_told():
    def answer(path, body):
        if path == "/infill":
            return 404, {"detail": "Not Found"}
        return (
            (500, {"error": "out of memory"})
            if body["prompt"] == "bad"
            else (200, {"choices": [{"text": "1"}]})
        )

    with http(answer) as (port, received, _), session(RemoteSource(f"http://127.0.0.1:{port}/v1")) as client:
        client.open("untitled:a", "x = \nbad")
        assert (
            client.texts(client.inline("untitled:a", 0, 4))
            == ["1"]
            == client.texts(client.inline("untitled:a", 0, 4, kind=1))
        )
        assert [path for path, *_ in received] == ["/infill", "/v1/completions", "/v1/completions"]
        assert received[1][1]["suffix"] == "\nbad"
        client.open("untitled:b", "bad")
        assert client.texts(client.inline("untitled:b", 0, 3)) == []
        assert "answered 500" in client.note("window/showMessage")["message"]
    with session(RemoteSource(f"http://127.0.0.1:{port}")) as client:
        client.open("untitled:a", "x = \n")
        assert client.texts(client.inline("untitled:a", 0, 4)) == []
        assert "start `codegemma serve`" in client.note("window/showMessage")["message"]
    with pytest.raises(ValueError, match="must be a URL such as"):
        RemoteSource("ftp://x")


def test_a_server_that_knows_no_confidence_gives_suggestions():
    """`codegemma serve --remote` answers so where the other server gives no log-probabilities."""

    def answer(path, body):
        return 200, {"content": "1", "confidence": None}

    with http(answer) as (port, *_), session(RemoteSource(f"http://127.0.0.1:{port}")) as client:
        client.open("untitled:a", "x = \n")
        for kind in types.InlineCompletionTriggerKind:
            assert client.texts(client.inline("untitled:a", 0, 4, kind=kind)) == ["1"]


# --------------------------------------------------------------------------------------- work per keystroke
LARGE = {
    "a short file": "x = 'é'\n" * 20,
    "a line of 5 MB": "x = 'é'; " + "y = f(1); " * 500_000,
    "a line of 3 M wide characters": "中😋 = 1; " * 400_000,
    "200,000 lines": "value = f(1)  # é\r\n" * 200_000,
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_a_keystroke_reads_as_little_of_a_large_file_as_of_a_short_one(monkeypatch, encoding):
    """Counts the characters that are measured or taken out of the text, once each file is open."""
    work = []

    def counted(function):
        def call(*arguments):
            result = function(*arguments)
            work.append(len(result.text if isinstance(result, buffers.Chunk) else result))
            return result

        return call

    for place, name in ((buffers, "_measured"), (buffers, "normalize"), (suggestion, "normalize")):
        monkeypatch.setattr(place, name, counted(getattr(place, name)))
    monkeypatch.setattr(Buffer, "slice", counted(Buffer.slice))
    monkeypatch.setattr(Buffer, "text", None)  # nothing takes the whole text
    stub, most = Stub(), dict.fromkeys(LARGE, 0)
    with session(stub, encodings=(encoding,), context="open") as client:
        for name, text in LARGE.items():
            uri, line, column = f"untitled:{name}", 100_000 * ("lines" in name), min(len(text), 2_000_000)
            client.open(uri, text)
            client.texts(client.inline("untitled:none", 0, 0))  # the file is open
            for typed in ("z", "\n", "z"):
                work.clear()
                client.change(uri, (line, column), (line, column), typed)
                id = client.inline(uri, line, column + 1, kind=1)
                resolve(stub.next()[1], "(1)")
                assert client.texts(id) == ["(1)"]
                most[name] = max(most[name], sum(work))
    window_characters = MAX_PREFIX + WINDOW_STEP + REDACTION_MARGIN + 2 * (MAX_SUFFIX + REDACTION_MARGIN)
    for name, characters in most.items():  # read, normalized and cut
        assert 0 < characters < 3 * window_characters + 16 * buffers.CHUNK_CHARACTERS, name


# ------------------------------------------------------------------------------- line ends, names, notebooks
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_one_suggestion_whatever_the_line_ends_and_the_answer_has_the_documents(end):
    stub, lines = Stub(), [f"value_{number} = f({number})" for number in range(6000)]
    lines[4000] = ""
    with session(stub) as client:
        client.open("untitled:a", end.join(lines))
        id = client.inline("untitled:a", 4000, 0)
        request, future = stub.next()
        assert request.prompt.suffix.startswith("\nvalue_4001 = f(4001)\n")
        before, after = "\n".join(lines[:4000]) + "\n", "\n".join(lines[4000:])
        wide = CursorPosition("", len(before), len(before)).text_to_redact(Buffer(before + after))
        assert (request.prompt.prefix, request.prompt.suffix) == window(*wide)
        resolve(future, "if a:\r\n    b()\n    c()\n")  # a server may answer with either
        assert client.texts(id) == [f"if a:{end}    b(){end}    c(){end}"]
        client.change("untitled:a", (4000, 0), (4000, 0), f"if a:{end}    b")
        assert client.texts(client.inline("untitled:a", 4001, 5)) == [f"(){end}    c(){end}"]


def test_what_the_editor_changes_around_a_suggestion_does_not_end_it():
    stub, uri = Stub(), "untitled:a"
    with session(stub) as client:
        client.open(uri, "total = su\nend\n")
        id = client.inline(uri, 0, 10)
        resolve(stub.next()[1], "m(values)")
        client.texts(id)
        client.change(uri, (0, 8), (0, 10), "sum")  # the pop-up's entry replaces the word
        assert client.texts(client.inline(uri, 0, 11)) == ["(values)"]
        whole = [{"text": "total = sum(\nend\n"}]  # a client without incremental changes
        client.notify("textDocument/didChange", textDocument={"uri": uri, "version": 3}, contentChanges=whole)
        assert client.texts(client.inline(uri, 0, 12)) == ["values)"]
        client.change(uri, (0, 11), (0, 12), "")
        assert client.texts(client.inline(uri, 0, 11)) == ["(values)"]
        client.change(uri, (1, 0), (1, 0), "x")  # elsewhere
        id = client.inline(uri, 0, 11)
        resolve(stub.next()[1], "[0]")
        assert client.texts(id) == ["[0]"]


def prompt_at(client, stub, uri, line, character):
    """The prompt of an explicit request, which is answered with nothing."""
    id = client.inline(uri, line, character, kind=1)
    request, future = stub.next()
    resolve(future, "")
    client.answer(id)
    return request.prompt


def test_a_document_without_a_path_has_no_name_in_a_prompt(tmp_path):
    stub = Stub()
    unnamed = ["untitled:Untitled-1", "inmemory://model/2", "untitled:h0", "output:/3"]
    with session(stub, folder=tmp_path) as client:
        for number, uri in enumerate(unnamed):
            client.open(uri, f"helper{number} = 1\n")
        client.open(f"untitled:{tmp_path}/new.py", "new = 1\n")
        client.open("untitled:m", "x = \n")
        client.open("sftp://host/home/me/.env", "TOKEN=1\n")
        client.open(f"untitled:{tmp_path}/.env", "TOKEN=1\n")
        prompt = prompt_at(client, stub, "untitled:m", 0, 4)
        assert [file.path for file in prompt.files] == ["", "", "", "", "new.py"] and prompt.path is None
        assert [file.text for file in prompt.files[:2]] == ["helper0 = 1\n", "helper1 = 1\n"]


CELL = "vscode-notebook-cell:/nowhere/a.ipynb#"


def test_cells_of_a_notebook_stand_before_and_after_the_cursor():
    stub = Stub()
    with session(stub) as client:
        for number in (0, 2, 10, 1):  # as an editor that does not report notebooks names them
            client.open(f"{CELL}W{number}", f"cell{number} = {number}")
        client.open(f"{CELL}W3", "# Title", "markdown")
        client.open("vscode-notebook-cell:/nowhere/b.ipynb#W0", "other = 1\n")
        client.open("vscode-notebook-cell:/nowhere/b.ipynb#W1", "other = 2\n")
        prompt = prompt_at(client, stub, f"{CELL}W1", 0, 5)
        assert (prompt.prefix, prompt.suffix) == (
            "cell0 = 0\n\ncell1",
            " = 1\n\ncell2 = 2\n\ncell10 = 10",
        )
        assert [(file.path, file.text) for file in prompt.files] == [
            ("b.ipynb", "other = 1\n\n\nother = 2\n")
        ]
        assert prompt_at(client, stub, f"{CELL}W3", 0, 7).prefix == "# Title"


def notebook_cells(*names):
    return [{"kind": 2, "document": CELL + name} for name in names]


def items(**texts):
    return [
        {"uri": CELL + name, "languageId": "python", "version": 1, "text": text}
        for name, text in texts.items()
    ]


def test_a_reported_notebook_has_its_cells_in_its_own_order_and_follows_their_edits():
    stub, notebook = Stub(), {"uri": "file:///nowhere/a.ipynb", "version": 1}
    with session(stub, capabilities={"notebookDocument": {"synchronization": {}}}) as client:
        assert client.initialize_result["capabilities"]["notebookDocumentSync"]["notebookSelector"]
        client.notify(
            "notebookDocument/didOpen",
            notebookDocument=notebook
            | {"notebookType": "jupyter-notebook", "cells": notebook_cells("B", "A")},
            cellTextDocuments=items(A="a = 1", B="b = 1"),
        )
        structure = {
            "array": {"start": 1, "deleteCount": 0, "cells": notebook_cells("C")},
            "didOpen": items(C="c = "),
        }
        change = {"range": {"start": lsp_position(0, 4), "end": lsp_position(0, 5)}, "text": "2"}
        content = [{"document": {"uri": CELL + "A", "version": 2}, "changes": [change]}]
        client.notify(
            "notebookDocument/didChange",
            notebookDocument=notebook,
            change={"cells": {"structure": structure, "textContent": content}},
        )
        id = client.inline(CELL + "C", 0, 4)
        request, future = stub.next()
        assert (request.prompt.prefix, request.prompt.suffix) == ("b = 1\n\nc = ", "\n\na = 2")
        resolve(future, "3")
        (item,) = client.answer(id)["result"]["items"]
        assert item["range"] == {"start": lsp_position(0, 4), "end": lsp_position(0, 4)}  # in the cell
        client.change(CELL + "C", (0, 4), (0, 4), "4")
        removed = {"array": {"start": 0, "deleteCount": 1}, "didClose": [{"uri": CELL + "B"}]}
        client.notify(
            "notebookDocument/didChange", notebookDocument=notebook, change={"cells": {"structure": removed}}
        )
        assert prompt_at(client, stub, CELL + "C", 0, 5).prefix == "c = 4"
        closed = [{"uri": CELL + name} for name in "AC"]
        client.notify("notebookDocument/didClose", notebookDocument=notebook, cellTextDocuments=closed)
        assert client.texts(client.inline(CELL + "C", 0, 4, kind=1)) == []


def test_an_explicit_request_in_an_ignored_file_says_why_once_and_a_setting_allows_it(tmp_path):
    (tmp_path / ".git").mkdir()
    (tmp_path / ".gitignore").write_text("made*\n")
    stub = Stub()
    uris = {name: (tmp_path / name).as_uri() for name in ("made.py", "app.py", ".env")}
    uris["cell"] = f"vscode-notebook-cell:{tmp_path}/made.ipynb#W0"

    with session(stub, folder=tmp_path) as client:
        for uri in uris.values():
            client.open(uri, "x = \n")
        assert client.texts(client.inline(uris["made.py"], 0, 4)) == []  # while typing
        client.note("window/logMessage", "made.py gets no completions: git ignores it")
        assert all(note["method"] != "window/showMessage" for note in [*client.notes.queue])
        for _ in range(2):
            assert client.texts(client.inline(uris["made.py"], 0, 4, kind=1)) == []
        shown = client.note("window/showMessage")["message"]
        assert "made.py gets no completions: git ignores it" in shown and "codegemma.ignoredFiles" in shown
        assert client.texts(client.inline(uris[".env"], 0, 4, kind=1)) == []
        shown = client.note("window/showMessage")["message"]
        assert "hold credentials" in shown and "ignoredFiles" not in shown
        assert client.texts(client.inline(uris["cell"], 0, 4, kind=1)) == []
        assert "made.ipynb gets no" in client.note("window/showMessage")["message"]
        assert all(note["method"] != "window/showMessage" for note in [*client.notes.queue])

    with session(stub, folder=tmp_path, ignoredFiles=True) as client:
        for uri in uris.values():
            client.open(uri, "x = \n")
        assert prompt_at(client, stub, uris["made.py"], 0, 4).prefix == "x = "
        assert prompt_at(client, stub, uris["app.py"], 0, 4).files == ()  # it stays out of others' prompts
        assert client.texts(client.inline(uris[".env"], 0, 4, kind=1)) == []


def test_files_that_git_ignores_by_any_source_get_nothing_and_enter_no_prompt(tmp_path):
    def git(folder, *arguments):
        options = ("-c", "user.name=n", "-c", "user.email=n@example.com", "-c", "protocol.file.allow=always")
        subprocess.run(["git", *options, *arguments], cwd=folder, check=True, capture_output=True)

    top, tree, sub = tmp_path / "top", tmp_path / "tree", tmp_path / "sub"
    for folder in (top, sub):
        folder.mkdir()
        git(folder, "init", "-q", "-b", "main")
        git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    git(top, "worktree", "add", "-q", tree, "-b", "b")
    git(top, "submodule", "add", "-q", sub, "dep")
    for exclude in (top / ".git/info/exclude", top / ".git/modules/dep/info/exclude"):
        exclude.parent.mkdir(exist_ok=True)
        exclude.write_text("private_*.py\n")
    (tmp_path / "ignore").write_text("global_*.py\n")
    git(top, "config", "core.excludesFile", tmp_path / "ignore")
    ignored = [tree / "private_a.py", top / "dep" / "private_b.py", top / "global_c.py"]
    stub = Stub()
    with session(stub, folder=top) as client:
        for path in (*ignored, top / "keep.py"):
            client.open(path.as_uri(), "x = \n")
        for path in ignored:
            assert client.texts(client.inline(path.as_uri(), 0, 4, kind=1)) == []
        assert prompt_at(client, stub, (top / "keep.py").as_uri(), 0, 4).files == ()


@pytest.mark.parametrize(
    "name", ["credentials.go", "Secret.java", "credentials.proto", ".env.d.ts", ".env.example"]
)
def test_source_code_named_after_credentials_is_completed_with_its_secrets_replaced(tmp_path, name):
    stub, uri, key = Stub(), (tmp_path / name).as_uri(), "AKIAQYLPMN5HNM4CJX2B"
    with session(stub, folder=tmp_path) as client:
        client.open(uri, f"KEY={key}\nx = \n", "plaintext")
        client.open((tmp_path / "app.py").as_uri(), "y = \n")
        assert key not in prompt_at(client, stub, uri, 1, 4).prefix
        (file,) = prompt_at(client, stub, (tmp_path / "app.py").as_uri(), 0, 4).files
        assert file.path == name and key not in file.text and file.text.endswith("x = \n")


# ------------------------------------------------------------------------------------------------- hostile
def framed(body):
    return b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


NO_MESSAGES = {
    "a length beyond memory": b"Content-Length: 99999999999\r\n\r\n{}",
    "a length beyond numbers": b"Content-Length: %s\r\n\r\n" % (b"9" * 5000),
    "a negative length": b"Content-Length: -5\r\n\r\n{}",
    "no message of length 0": b"Content-Length: 0\r\n\r\n",
    "bytes": b"\x00\xff\r\n\n" * 3000,
    "no JSON": framed(b"{nope"),
    "no UTF-8": framed(b'{"jsonrpc":"2.0","method":"\xff"}'),
    "nested too deep": framed(b"[" * 100_000),
    "a list": framed(b'[{"jsonrpc":"2.0","id":3,"method":"shutdown"}]'),
    "a number": framed(b"5"),
    "nothing": framed(b"null"),
    "no version": framed(b'{"id":5,"method":"shutdown"}'),
    "another version": framed(b'{"jsonrpc":"1.0","id":5,"method":"shutdown"}'),
    "a list as id": framed(b'{"jsonrpc":"2.0","id":[1],"method":"textDocument/hover","params":{}}'),
    "wrong parameters": framed(b'{"jsonrpc":"2.0","method":"textDocument/didOpen","params":7}'),
    "an answer to nothing": framed(b'{"jsonrpc":"2.0","id":77,"result":1}'),
    "an error of nothing": framed(b'{"jsonrpc":"2.0","id":77,"error":{"code":1,"message":"x"}}'),
    "a second greeting": framed(
        b'{"jsonrpc":"2.0","id":2,"method":"initialize","params":{"capabilities":{}}}'
    ),
}


def test_what_is_no_message_is_skipped_and_the_server_goes_on():
    """Each alone and all together: the next request is answered, and stderr has a line at most for each."""
    command = [sys.executable, "-m", "codegemma.cli", "lsp", "--server", "http://127.0.0.1:9"]
    greeting = framed(b'{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"capabilities":{}}}')
    leave = framed(b'{"jsonrpc":"2.0","id":9,"method":"shutdown"}')
    leave += framed(b'{"jsonrpc":"2.0","method":"exit"}')
    noise = b""
    for number, part in enumerate(NO_MESSAGES.values()):
        noise += part + framed(b'{"jsonrpc":"2.0","id":%d,"method":"no/such"}' % (1000 + number))
    run = subprocess.run(command, input=greeting + noise + leave, capture_output=True, timeout=120)
    for number, name in enumerate(NO_MESSAGES):
        assert b'"id": %d' % (1000 + number) in run.stdout, name
    assert b'"id": 9' in run.stdout and run.returncode == 0
    rule = "a message has 99,999,999,999 bytes, but at most 268,435,456 are read: it is skipped"
    assert run.stderr.decode().splitlines() == [f"codegemma lsp: {rule}"]


@given(
    st.lists(st.one_of(st.binary(max_size=40), st.binary(min_size=1, max_size=40).map(framed)), max_size=8)
)
def test_frames_come_whole_from_any_stream(parts):
    """Whatever the bytes are: the reader ends, and gives headers that are followed by their messages."""
    reader = FrameReader(io.BytesIO(b"".join(parts)))
    while header := reader.readline():
        size = int(header.removeprefix(b"Content-Length: "))
        assert reader.readline() == b"\r\n" and len(reader.read(size)) == size > 0


def test_messages_with_other_headers_and_names_in_any_case():
    stream = b"Content-Type: a\r\ncontent-length: 2\r\nX: y\r\n\r\n{}rubbish Content-Length:3\r\n\r\n[1]"
    reader = FrameReader(io.BytesIO(stream))
    assert [reader.readline(), reader.readline(), reader.read(2)] == [
        b"Content-Length: 2\r\n",
        b"\r\n",
        b"{}",
    ]
    assert [reader.readline(), reader.readline(), reader.read(3)] == [
        b"Content-Length: 3\r\n",
        b"\r\n",
        b"[1]",
    ]
    assert reader.readline() == b""


def test_the_prompt_cache_is_kept_where_an_editor_dies_and_a_foreign_file_is_named(tmp_path):
    model, cache = tmp_path / "tiny.gguf", tmp_path / "cache"
    write_tiny_gguf(model, tiny_config("gemma-mqa"))
    command = [sys.executable, "-m", "codegemma.cli", "lsp", "-m", str(model), "--cache", str(cache)]
    for text, words in ((None, ""), ("mine", "was not written by codegemma, and is kept")):
        if text:
            cache.write_text(text)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            client = Client(process.stdout, process.stdin)
            client.ask("initialize", capabilities={}, processId=None)
            client.note("window/logMessage", words or "ready after")
            process.stdin.close()
            assert process.wait(WAIT) == 1
        assert cache.read_bytes().startswith(b"mine" if text else b"codegemma prefix cache")


# ------------------------------------------------------------------------------------- the cursor's line
@pytest.mark.parametrize(
    "line, text, expected, span",
    [
        ("        ", "\n    return a", "\n    return a", (0, 8)),  # the line loses its blanks
        ("        ", "    return a", "    return a", (0, 8)),
        ("        ", "        g()", "g()", (8, 8)),
        ("     ", "        g()", "   g()", (5, 5)),
        ("\t", "\tg()", "g()", (1, 1)),
        ("", "    g()", "    g()", (0, 0)),
        ("    x = ", "1", "1", (8, 8)),
    ],
)
def test_blanks_before_the_cursor_are_the_suggestions(line, text, expected, span):
    """The model is asked from the start of the line; what it agrees with stays, the rest is replaced."""
    stub = Stub()
    with session(stub) as client:
        client.open("untitled:d", f"def f(a):\n    for x in a:\n{line}\nprint(f(1))\n")
        id = client.inline("untitled:d", 2, len(line))
        request, future = stub.next()
        assert request.prompt.prefix.endswith("in a:\n" + ("" if not line.strip() else line))
        resolve(future, text)
        (item,) = client.answer(id)["result"]["items"]
        columns = tuple(item["range"][edge]["character"] for edge in ("start", "end"))
        assert (item["insertText"], columns) == (expected, span)
        assert {item["range"][edge]["line"] for edge in ("start", "end")} == {2}


def test_a_suggestion_in_the_indentation_can_be_typed_on():
    stub = Stub()
    with session(stub) as client:
        client.open("untitled:d", "if a:\n    \nb\n")
        id = client.inline("untitled:d", 1, 4)
        resolve(stub.next()[1], "    return x")
        assert client.texts(id) == ["return x"]
        client.change("untitled:d", (1, 4), (1, 4), "re")
        assert client.texts(client.inline("untitled:d", 1, 6)) == ["turn x"]
        assert stub.requests.empty()


@pytest.mark.parametrize(
    "language, text, confidence, shown",
    [
        ("python", "x = 1", 0.9, True),
        ("python", "x = 1", 0.1, False),
        ("python", "x = 1\nx = 1\nx = 1\n", 0.9, False),
        ("shellscript", "rm -rf /var/log/messages", 0.9, False),
        ("shellscript", "ls -l", 0.9, True),
    ],
)
def test_what_is_worth_less_than_nothing_is_hidden_unless_asked_for(language, text, confidence, shown):
    stub = Stub()
    with session(stub, minConfidence=0.5) as client:
        client.open("untitled:c", "\n", language=language)
        for kind in types.InlineCompletionTriggerKind:
            id = client.inline("untitled:c", 0, 0, kind=kind)
            resolve(stub.next()[1], text, confidence)
            assert bool(client.texts(id)) == (shown or kind == types.InlineCompletionTriggerKind.Invoked)
            client.change("untitled:c", (0, 0), (0, 0), "\n")  # a suggestion is not reused


@pytest.mark.parametrize(
    "context, reads_files, sizes",
    [
        ("auto", True, [3_000, 3_000, 8_000]),
        ("auto", False, [2_000, 2_000]),  # which it is shown as comments
        ("open", False, [3_000, 3_000, 8_000]),
        ("none", True, []),
    ],
)
def test_a_model_gets_as_much_of_other_files_as_it_knows_to_read(tmp_path, context, reads_files, sizes):
    stub = Stub(reads_files)
    for name, size in (("a.py", 10), ("b.py", 3_000), ("c.py", 3_000), ("d.py", 9_000)):
        (tmp_path / name).write_text("x = 1234\n\n" * (size // 10))
    with session(stub, tmp_path, context=context) as client:
        for name in ("b.py", "c.py", "d.py", "a.py"):
            client.open((tmp_path / name).as_uri(), (tmp_path / name).read_text())
        client.inline((tmp_path / "a.py").as_uri(), 1, 0)
        request, _ = stub.next()
        assert [len(file.text) for file in request.prompt.files] == sizes


def test_a_server_that_never_says_what_it_serves_costs_one_wait(monkeypatch):
    """It listens, takes the request for /props and says nothing."""
    monkeypatch.setattr(sources, "PROPS_SECONDS", 0.2)

    async def ask():
        asked, closed = 0, asyncio.Event()

        async def handle(reader, writer):
            nonlocal asked
            asked += 1
            await reader.read()
            writer.close()
            await writer.wait_closed()
            closed.set()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        source = RemoteSource(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        answers = [await source.reads_files() for _ in range(3)]
        await source.close()
        await closed.wait()
        server.close()
        return answers, asked

    assert asyncio.run(ask()) == ([True] * 3, 1)
