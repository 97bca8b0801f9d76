"""Hostile clients and hard times of the server: origins, bodies that would stop all others, lines of the log,
signals, disks."""

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
import time
from dataclasses import replace

import httpx
import pytest
from programs import signals_act
from serving import Process, served
from tiny import KINDS, write_tiny_gguf

from codegemma import load
from codegemma.serve import guard, run
from codegemma.serve.bounds import MAX_FILES, bounded, max_characters
from codegemma.serve.guard import MAX_CONTAINERS, MAX_VALUES, Rules
from codegemma.serve.scheduler import Scheduler

EDITOR = "https://editor.example"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    config = replace(KINDS["gemma-mqa"], context=1024)
    return write_tiny_gguf(tmp_path_factory.mktemp("hostile") / "tiny.gguf", config, "Q8_0", seed=9)


@pytest.fixture(scope="module")
def model(path):
    return load(path, threads=1)


@pytest.fixture(scope="module")
def server(model):
    async def opened():
        return Scheduler(model)

    with served(opened, Rules(origins=frozenset({EDITOR}))) as server:
        yield server


# Origins.


@pytest.mark.parametrize("scheme", ["evil", "https", "HTTP", "file", "chrome-extension", ""])
def test_an_origin_is_scheme_host_and_port(server, scheme):
    host = server.url.removeprefix("http://")
    for origin in (
        f"{scheme}://{host}",
        f"http://user@{host}",
        f"http://{host}/",
        f"http://{host}, {EDITOR}",
    ):
        assert server.get("/v1/models", headers={"Origin": origin}).status_code == 403, origin
    assert server.get("/v1/models", headers={"Origin": f"http://{host}"}).status_code == 200
    # behind a proxy that speaks TLS
    proxied = {"Origin": f"https://{host}", "X-Forwarded-Proto": "https"}
    assert server.get("/v1/models", headers=proxied).status_code == 200
    for scheme in ("evil", "chrome-extension", "", "https, evil", "HTTPS://x"):
        forged = {"Origin": f"{scheme}://{host}".lower(), "X-Forwarded-Proto": scheme}
        assert server.get("/v1/models", headers=forged).status_code == 403, scheme


@pytest.mark.parametrize("origins", [[EDITOR, EDITOR], [EDITOR, "http://evil.example"], ["", ""]])
def test_more_than_one_origin_is_refused(server, origins):
    headers = [("Origin", origin) for origin in origins]
    answer = server.get("/v1/models", headers=headers)
    assert answer.status_code == 403 and "one Origin, but this one has 2" in answer.text
    answer = server.client.options("/v1/models", headers=headers)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_a_page_of_an_allowed_origin_may_call_into_a_private_network(server):
    asked = {"Origin": EDITOR, "Access-Control-Request-Method": "POST"}
    private = asked | {"Access-Control-Request-Private-Network": "true"}
    for path in ("/v1/completions", "/infill", "/api/chat", "/v1/fim/completions", "/no/such"):
        answer = server.client.options(path, headers=private)
        assert answer.status_code == 204 and answer.headers["access-control-allow-origin"] == EDITOR
        assert answer.headers["access-control-allow-private-network"] == "true"
    assert "access-control-allow-private-network" not in server.client.options("/", headers=asked).headers
    for origin in ("http://evil.example", "null"):
        answer = server.client.options("/infill", headers=private | {"Origin": origin})
        assert answer.status_code == 403
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_an_allowed_page_reads_errors_too(server, monkeypatch):
    monkeypatch.setattr(server.service, "submit", lambda _: 1 / 0)
    answer = server.post("/v1/completions", json={"prompt": "x"}, headers={"Origin": EDITOR})
    assert answer.status_code == 500 and "ZeroDivisionError; its log says more" in answer.text
    assert answer.headers["access-control-allow-origin"] == EDITOR and "nosniff" in str(answer.headers)
    assert "retry-after" in answer.headers["access-control-expose-headers"].lower()
    with socket.create_connection(server.address) as connection:  # and the connection goes on
        for body in (b'{"prompt":"x"}', b"{"):
            head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(body) + body)
            received = b""
            while not received.endswith(b"}"):
                received += connection.recv(1 << 16)
            assert received.startswith(b"HTTP/1.1 %s" % (b"400" if body == b"{" else b"500"))


# Bodies.

MEGABYTES = 14 << 20
CODE = "def f(x, y):\n    return [x, y, {'a': 1}]\n"
HOSTILE_BODIES = {
    "lists of a number": ("/v1/completions", b'{"prompt":[' + b"[1]," * (MEGABYTES // 4) + b"[1]]}"),
    "numbers": ("/v1/completions", b'{"prompt":[' + b"1," * (MEGABYTES // 2) + b"1]}"),
    "objects": ("/v1/chat/completions", b'{"messages":[' + b"{}," * (MEGABYTES // 3) + b"{}]}"),
    "lists within lists": ("/infill", b"[" * MEGABYTES),
    "quotes": ("/api/chat", b'"' * MEGABYTES),
    "wrong messages": ("/v1/chat/completions", b'{"messages":[' + b"1," * 200_000 + b"1]}"),
    "numbers and texts": ("/completion", b'{"prompt":[' + b'1,"a",' * 100_000 + b"1]}"),
    "a long text": ("/v1/completions", json.dumps({"prompt": CODE * (MEGABYTES // 48)}).encode()),
    "a long line": ("/v1/fim/completions", json.dumps({"prompt": "x" * MEGABYTES}).encode()),
    "a long chat": (
        "/api/chat",
        json.dumps({"messages": [{"role": "user", "content": "é" * 2_000_000}]}).encode(),
    ),
    "text to count": ("/tokenize", json.dumps({"content": "ab" * (MEGABYTES // 2)}).encode()),
    "half pairs": ("/v1/completions", b'{"prompt":"' + b"\\ud83d" * (MEGABYTES // 6) + b'"}'),
}


@pytest.mark.parametrize("name", HOSTILE_BODIES)
def test_no_body_holds_up_the_other_clients(server, name):
    """The answer of /health never waits for long; a busy machine is given ten times the 100 ms.

    A body that holds up the server does so each time, a pause of the machine does not: the best of four
    counts.
    """
    path, body = HOSTILE_BODIES[name]
    longest = []
    while not longest or (min(longest) >= 1.0 and len(longest) < 4):
        longest.append(_longest_wait(server, path, body))
    assert min(longest) < 1.0, longest


def _longest_wait(server, path, body):
    """Seconds that /health took at most while the server read and refused or answered `body`."""
    waits, done = [0.0], threading.Event()

    def beat():
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as client:
            while not done.is_set():
                started = time.perf_counter()
                assert client.get("/health").status_code == 200
                waits.append(time.perf_counter() - started)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        answer = server.post(path, content=body)
    finally:
        done.set()
        thread.join()
    assert answer.status_code in (200, 400, 413, 422) and len(answer.content) < 2000, answer.text[:200]
    return max(waits)


def test_what_is_counted_are_values_and_not_commas_in_texts():
    limit = MAX_VALUES - 8
    for body in (
        json.dumps({"prompt": [1] * limit}),
        json.dumps({"prompt": ",[{" * limit}),
        json.dumps({"prompt": '\\",[' * limit}),
        json.dumps({"a\\": '"', "b": ["\\\\", ",{[" * limit]}),
        json.dumps({"prompt": [[1]] * (MAX_CONTAINERS - 8)}),
    ):
        guard._check_values(body.encode())
    for body, what in (
        (json.dumps({"prompt": [1] * (limit + 20)}), "262,15. values, but at most 262,144"),
        (json.dumps({"prompt": ["\\"] * (limit + 20)}), "values"),
        (json.dumps({"prompt": [[]] * (MAX_CONTAINERS + 1)}), "16,38. lists and objects, but at most 16,384"),
    ):
        with pytest.raises(guard.HTTPException) as caught:
            guard._check_values(body.encode())
        assert caught.value.status_code == 400 and re.search(what, caught.value.detail)


def test_an_answer_to_a_very_long_file_is_that_of_what_can_be_read(model):
    """What lies beyond the bound is beyond every window, and the files that remain are those that fit."""
    from codegemma.generate.request import Chat, Infill, Request, TextPrompt
    from codegemma.prompts import File, Message

    tokenizer, context = model.tokenizer, model.engine.context
    room = max_characters(tokenizer, context)
    assert room >= context * max(len(tokenizer.piece(token)) for token in range(tokenizer.vocab_size))
    hole = Infill(CODE * 9000, "\n" + CODE * 9000, "a.py")
    cut = bounded(Request(hole), tokenizer, context).prompt
    assert len(cut.prefix) < 1.2 * room and len(cut.suffix) == room
    assert hole.prefix.endswith(cut.prefix) and hole.suffix.startswith(cut.suffix)
    files = [File("a.py", "a" * room), File("b.py", "b" * 10), File("c.py", "c" * (room - 10))]
    kept = bounded(Request(replace(hole, files=files)), tokenizer, context).prompt.files
    assert [file.path for file in kept] == ["b.py", "c.py"]
    many = Infill("x", files=[File(f"{number}.py", "") for number in range(MAX_FILES + 5)])
    assert bounded(Request(many), tokenizer, context).prompt.files[0].path == "5.py"
    small = Request(Infill("a", "b", files=[File("a.py", "x")]))
    assert bounded(small, tokenizer, context) == small
    for prompt in (
        TextPrompt("x" * (room + 1)),
        Chat([Message("user", "x" * room), Message("assistant", "xy")]),
    ):
        with pytest.raises(ValueError, match=r"at least 1,02\d tokens, but 1,024 are read: shorten it"):
            bounded(Request(prompt), tokenizer, context)


def test_a_steady_start_while_somebody_types_far_behind_it(model):
    from codegemma.generate.request import Infill, Request

    tokenizer, context = model.tokenizer, model.engine.context
    text = CODE * 9000
    starts = {
        len(text)
        + typed
        - len(bounded(Request(Infill(text + "x" * typed)), tokenizer, context).prompt.prefix)
        for typed in range(40)
    }
    assert len(starts) <= 2


# The log.


@pytest.mark.parametrize("target", ["/%0d%0aFAKE%1b[31m", "/%E2%80%AE/%7f", "/a%00b", "/%0a" * 300])
def test_a_request_cannot_forge_a_line_of_the_log(server, caplog, target):
    with socket.create_connection(server.address) as connection:
        connection.sendall(f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        while connection.recv(4096):
            pass
    (record,) = [record for record in caplog.records if ": 404" in record.getMessage()]
    assert re.fullmatch(r"GET [!-~]+: 404", record.getMessage())


def test_every_record_is_lines_that_a_terminal_shows_as_they_are():
    formatter = run.LogFormatter("%(message)s")
    record = logging.LogRecord("x", 30, "f", 1, "%s", ("a\r\nFAKE\x1b[31m\u202eb\x9b é 😀",), None)
    assert formatter.format(record) == r"a\r\nFAKE\x1b[31m\u202eb\x9b é 😀"
    try:
        raise ValueError("one\x1b[2J")
    except ValueError as error:
        record = logging.LogRecord("x", 40, "f", 1, "failed", (), (ValueError, error, error.__traceback__))
    lines = formatter.format(record).splitlines()
    assert lines[0] == "failed" and lines[-1] == r"ValueError: one\x1b[2J"


# Addresses.


def test_localhost_is_both_loopback_addresses():
    sockets = run.open_sockets("localhost", 0)
    try:
        port = sockets[0].getsockname()[1]
        assert [each.getsockname()[:2] for each in sockets] == [("127.0.0.1", port), ("::1", port)]
        with pytest.raises(
            ValueError, match=f"cannot listen on 127.0.0.1 port {port}: Address already in use"
        ):
            run.open_sockets("localhost", port)
        sockets.pop(0).close()
        with pytest.raises(ValueError, match=f"cannot listen on ::1 port {port}: Address already in use"):
            run.open_sockets("localhost", port)  # a client might meet the other program
    finally:
        for each in sockets:
            each.close()
    for host in ("127.0.0.1", "::1"):
        (only,) = run.open_sockets(host, 0)
        assert only.getsockname()[0] == host
        only.close()


def test_localhost_without_ipv6(monkeypatch):
    create = socket.create_server

    def without_ipv6(address, **options):
        if options.get("family") == socket.AF_INET6:
            raise OSError(97, "Address family not supported by protocol")
        return create(address, **options)

    monkeypatch.setattr(socket, "create_server", without_ipv6)
    (only,) = run.open_sockets("localhost", 0)
    assert only.getsockname()[0] == "127.0.0.1"
    only.close()


def test_all_addresses_of_ipv6_are_those_of_ipv4_too():
    (listener,) = run.open_sockets("::", 0)
    with listener, socket.create_connection(("127.0.0.1", listener.getsockname()[1]), 10):
        pass


# Signals.


@pytest.mark.parametrize(
    ("number", "code", "client"),
    [
        (signal.SIGTERM, -signal.SIGTERM, "half a body"),
        (signal.SIGTERM, -signal.SIGTERM, "a stream"),
        (signal.SIGHUP, 0, "none"),
        (signal.SIGHUP, 0, "half a body"),
    ],
)
def test_a_signal_ends_the_server_in_a_line_and_keeps_the_cache(path, tmp_path, number, code, client):
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with signals_act(number):
        process = Process("-m", str(path), environment=environment)
    url = httpx.URL(process.url)
    with contextlib.ExitStack() as stack:
        for host in ("127.0.0.1", "[::1]"):
            body = {"prompt": "def f(x):\n" * 30, "max_tokens": 2}
            answer = httpx.post(f"http://{host}:{url.port}/v1/completions", json=body, trust_env=False)
            assert answer.status_code == 200
        if client != "none":
            body = b'{"prompt":"x","max_tokens":900,"stream":true}' + b" " * 100
            connection = stack.enter_context(socket.create_connection((url.host, url.port)))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + (body[:20] if client == "half a body" else body))
            if client == "a stream":
                assert connection.recv(100)
        process.child.send_signal(number)
        assert process.child.wait(60) == code
    with process:
        pass
    lines = [line for line in process.log if re.match(r"\d{4}-|Traceback| ", line) and "  " not in line[:2]]
    assert len(lines) <= 1 and not any("Traceback" in line for line in process.log), process.log
    (kept,) = (tmp_path / "codegemma" / "prefixes").iterdir()
    assert kept.stat().st_size > 10_000


# Disks.


def test_a_cache_that_cannot_be_saved_is_named_with_a_remedy(path, tmp_path, monkeypatch, caplog):
    model, folder = load(path, threads=1), tmp_path / "full"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    async def opened():
        return Scheduler(model, cache=folder)

    for error in (
        OSError(28, "No space left on device", str(folder / "x")),
        ValueError("is kept: name another"),
    ):
        with served(opened) as server:
            assert server.post("/v1/completions", json={"prompt": "x"}).status_code == 200
            model.engine.cache.save = lambda _, error=error: (_ for _ in ()).throw(error)
    lines = [record.getMessage() for record in caplog.records if "not saved" in record.getMessage()]
    remedy = f"{folder}/x: No space left on device: free some space there, or name another folder"
    assert lines == [f"the prompt cache is not saved: {words}" for words in (remedy, "is kept: name another")]
