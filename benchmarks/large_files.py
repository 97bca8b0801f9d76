"""Milliseconds from a keystroke to its suggestion in large files, over LSP, without a model's own time.

    .venv/bin/python benchmarks/large_files.py [--rounds 3] [--log]

`codegemma lsp` asks a server here that answers at once. A keystroke is an edit and a request at the cursor.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from logbook import parser, publish

KEYSTROKES = 30
FILES = {
    "a short file": ("x = 'é'\n" * 20, (10, 3)),
    "a line of 5 MB with one é": ("x = 'é'; " + "y = f(1); " * 500_000, (0, 2_500_000)),
    "200,000 lines": ("value = compute(first, second)  # é\n" * 200_000, (100_000, 30)),
}


class Instant(BaseHTTPRequestHandler):
    """Answers every request with the same suggestion, and says nothing of itself."""

    protocol_version = "HTTP/1.1"
    wbufsize = (
        -1
    )  # head and body in one packet: two would wait for the client's delayed acknowledgement, 40 ms

    def do_GET(self) -> None:
        self.answer(b"{}")

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(b'{"content": "(1)"}')

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


class Editor:
    """A client of `codegemma lsp`."""

    def __init__(self, url: str) -> None:
        command = [sys.executable, "-m", "codegemma.cli", "lsp", "--server", url]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.id = 0
        capabilities: dict[str, Any] = {"textDocument": {"inlineCompletion": {}}}
        self.ask("initialize", capabilities=capabilities, initializationOptions={"stats": False})
        self.notify("initialized")

    def notify(self, method: str, **message: Any) -> None:
        id = message.pop("id", None)
        body = {"jsonrpc": "2.0", "method": method, "params": message} | ({"id": id} if id else {})
        data = json.dumps(body).encode()
        assert self.process.stdin
        self.process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        self.process.stdin.flush()

    def ask(self, method: str, **params: Any) -> Any:
        self.id += 1
        self.notify(method, **params, id=self.id)
        assert self.process.stdout
        while True:
            size = int(self.process.stdout.readline().split(b":")[1])
            while self.process.stdout.readline().strip():
                pass
            message = json.loads(self.process.stdout.read(size))
            if message.get("id") == self.id and "method" not in message:
                return message["result"]

    def processor_seconds(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def suggestion(self, uri: str, line: int, character: int) -> str:
        position = {"line": line, "character": character}
        document, context = {"uri": uri}, {"triggerKind": 1}
        answer = self.ask(
            "textDocument/inlineCompletion", textDocument=document, position=position, context=context
        )
        return str(answer["items"][0]["insertText"])


def keystrokes(editor: Editor, text: str, line: int, character: int) -> tuple[list[float], float]:
    """Seconds from each of KEYSTROKES letters to the suggestion behind it; processor seconds of all."""
    uri, seconds = f"untitled:{time.monotonic_ns()}", []
    document = {"uri": uri, "languageId": "python", "version": 1, "text": text}
    editor.notify("textDocument/didOpen", textDocument=document)
    editor.suggestion(uri, line, character)
    used = editor.processor_seconds()
    for number in range(KEYSTROKES):
        start = time.perf_counter()
        edge = {"line": line, "character": character + number}
        change = {"range": {"start": edge, "end": edge}, "text": "z"}
        editor.notify(
            "textDocument/didChange", textDocument={"uri": uri, "version": number}, contentChanges=[change]
        )
        assert editor.suggestion(uri, line, character + number + 1) == "(1)"
        seconds.append(time.perf_counter() - start)
    used = editor.processor_seconds() - used
    editor.notify("textDocument/didClose", textDocument={"uri": uri})
    return seconds, used


def main() -> None:
    args = parser(__doc__, rounds=3).parse_args()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Instant)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    editor = Editor(f"http://127.0.0.1:{server.server_port}")
    seconds: dict[str, list[float]] = {name: [] for name in FILES}
    used = dict.fromkeys(FILES, 0.0)
    for _ in range(args.rounds):
        for name, (text, cursor) in FILES.items():
            measured, processor = keystrokes(editor, text, *cursor)
            seconds[name] += measured
            used[name] += processor
    editor.ask("shutdown")
    editor.notify("exit")
    editor.process.wait()
    rows = ["| file | median, ms | 95th, ms | processor time of the server, ms |", "|---|---|---|---|"]
    for name, times in seconds.items():
        median, late = statistics.median(times), statistics.quantiles(times, n=20)[-1]
        mean = used[name] / len(times)
        rows.append(f"| {name} | {1000 * median:.1f} | {1000 * late:.1f} | {1000 * mean:.1f} |")
    head = f"\n## {datetime.date.today()}: typing in large files, over LSP\n\n`benchmarks/large_files.py`"
    setting = f"{args.rounds} x {KEYSTROKES} keystrokes, a server that answers at once"
    publish("\n".join([f"{head}, {setting}.\n", *rows, ""]), args.log)


if __name__ == "__main__":
    main()
