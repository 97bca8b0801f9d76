"""What clients send, on every route: roles, fields, limits and text as they come; and what streams and errors
say in return."""

import json

import numpy as np
import pytest
import vocabularies as vocab
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import served
from test_serve import HOLE, INFILL, LONG, BlockedBackend, events, good, scheduler_of
from tiny import write_tiny_gguf

from codegemma import load
from codegemma.config import PRESETS
from codegemma.serve import bodies, wire
from codegemma.serve.logprobs import LogprobLists, joined
from codegemma.serve.requests import model_id

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
# The body of each route that generates, and how it limits the answer to `n` tokens.
ROUTES = {
    "/v1/completions": ({"prompt": "x"}, lambda n: {"max_tokens": n}),
    "/v1/chat/completions": (CHAT, lambda n: {"max_tokens": n}),
    "/infill": (INFILL, lambda n: {"n_predict": n}),
    "/completion": ({"prompt": "x"}, lambda n: {"n_predict": n}),
    "/api/generate": ({"model": "m", "prompt": "x"}, lambda n: {"options": {"num_predict": n}}),
    "/api/chat": ({"model": "m", **CHAT}, lambda n: {"options": {"num_predict": n}}),
    "/v1/fim/completions": ({"prompt": "x"}, lambda n: {"max_tokens": n}),
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("bodies") / "tiny.gguf", LONG, "Q8_0", seed=35)


@pytest.fixture(scope="module")
def model(path):
    return load(path, threads=1)


@pytest.fixture(scope="module")
def server(path):
    with served(scheduler_of(load(path, threads=1))) as server:
        yield server


def send(server, route, body):
    """Posts JSON with any text escaped, lone surrogates too."""
    return server.client.post(route, content=json.dumps(body))


def error_text(answer):
    assert answer.status_code == 400, answer.text
    return answer.text


# Roles.


@pytest.mark.parametrize(
    "messages, turns",
    [
        ([("system", "s"), ("user", "one"), ("user", "two")], [("user", "s\n\none\n\ntwo")]),
        ([("assistant", "hello"), ("user", "one")], [("assistant", "hello"), ("user", "one")]),
        ([("user", "one"), ("developer", "s"), ("user", "two")], [("user", "one\n\ns\n\ntwo")]),
        ([("user", "one"), ("system", "s")], [("user", "one\n\ns")]),
        ([("developer", "s"), ("system", "t"), ("user", "u")], [("user", "s\n\nt\n\nu")]),
        (
            [("user", "a"), ("assistant", "b"), ("assistant", "c"), ("user", "d")],
            [("user", "a"), ("assistant", "b\n\nc"), ("user", "d")],
        ),
        ([("user", "a"), ("tool", "5")], [("user", "a\n\n5")]),
    ],
)
def test_every_chat_route_takes_roles_in_any_order(server, model, messages, turns):
    expected = model.chat(turns, max_tokens=5)
    sent = {"messages": [{"role": role, "content": text} for role, text in messages]}
    openai = good(send(server, "/v1/chat/completions", {**sent, "max_tokens": 5, "temperature": 0}))
    assert openai["choices"][0]["message"]["content"] == expected.text
    assert openai["usage"]["prompt_tokens"] == expected.prompt_tokens
    options = {"num_predict": 5, "temperature": 0}
    ollama = good(send(server, "/api/chat", {"model": "m", **sent, "stream": False, "options": options}))
    assert (ollama["message"]["content"], ollama["prompt_eval_count"]) == (
        expected.text,
        expected.prompt_tokens,
    )
    prompt = "<bos>" + "".join(
        f"<start_of_turn>{'user' if role == 'user' else 'model'}\n{text}<end_of_turn>\n"
        for role, text in turns
    )
    assert good(send(server, "/apply-template", sent))["prompt"] == prompt + "<start_of_turn>model\n"


def test_calls_of_tools_are_read_as_text(server):
    call = {"id": "0", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    openai = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "0", "content": [{"type": "text", "text": "5"}]},
    ]
    prompt = good(send(server, "/apply-template", {"messages": openai}))["prompt"]
    assert '<start_of_turn>model\nf({"a": 1})<end_of_turn>\n<start_of_turn>user\n5<end_of_turn>' in prompt
    assert good(send(server, "/v1/chat/completions", {"max_tokens": 3, "messages": openai}))["choices"]
    legacy = [
        openai[0],
        {"role": "assistant", "content": "I call", "function_call": call["function"]},
        {"role": "function", "name": "f", "content": "5"},
    ]
    prompt = good(send(server, "/apply-template", {"messages": legacy}))["prompt"]
    assert 'model\nI call\nf({"a": 1})<end_of_turn>' in prompt
    called = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
    }
    ollama = [openai[0], called, {"role": "tool", "tool_name": "f", "content": "5"}]
    body = {"model": "m", "messages": ollama, "stream": False, "options": {"num_predict": 2}}
    assert good(send(server, "/api/chat", body))["prompt_eval_count"] > 10
    assert "robot" in error_text(send(server, "/api/chat", {"model": "m", "messages": [{"role": "robot"}]}))
    refused = error_text(send(server, "/v1/chat/completions", {"messages": [{"role": "robot"}]}))
    assert "messages.0.role" in refused and "'tool'" in refused


# Fields.

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("route", ROUTES)
def test_fields_that_are_not_supported_are_refused_unless_they_are_off(server, route):
    body, limit = ROUTES[route]
    body = {**body, **limit(1), "stream": False}
    for fields in (
        {"tools": TOOLS},
        {"functions": TOOLS, "function_call": "auto"},
        {"tool_choice": "required"},
    ):
        assert "does not support tools" in error_text(send(server, route, body | fields))
    for fields in (
        {"response_format": {"type": "json_object"}},
        {"format": {"type": "object"}},
        {"grammar": "root ::= x"},
        {"json_schema": {"type": "object"}},
        {"guided_json": {"type": "object"}},
        {"guided_choice": ["a", "b"]},
        {"structured_outputs": {"regex": "a+"}},
        {"min_tokens": 3},
        {"ignore_eos": True},
    ):
        (name,) = fields
        assert f"{name} is not supported" in error_text(send(server, route, body | fields))
    for fields in (
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": TOOLS, "function_call": "none"},
        {"tools": [], "tool_choice": "auto"},
        {"tools": None, "functions": None, "parallel_tool_calls": True},
        {"response_format": {"type": "text"}, "modalities": ["text"], "guided_json": None},
        {"format": "", "grammar": "", "json_schema": {}, "min_tokens": 0, "ignore_eos": False},
        {"user": "u", "store": True, "metadata": {"a": "b"}, "service_tier": "auto", "n_keep": 3},
    ):
        assert good(send(server, route, body | fields))


@pytest.mark.parametrize("route", ROUTES)
def test_limits_below_zero_mean_no_limit(server, monkeypatch, route):
    for module in (bodies,):
        monkeypatch.setattr(module, "DEFAULT_TOKENS", 150)
    body, limit = ROUTES[route]
    answer = good(send(server, route, {**body, **limit(-1), "stream": False, "temperature": 0, "seed": 1}))
    assert answer["timings"]["predicted_n"] in range(17, 151) or answer["timings"]["stop"] == "end"


def test_a_suggestion_has_128_tokens_by_default(server):
    hole = {"model": "m", "prompt": "x", "suffix": "", "stream": False}
    for route, body in (
        ("/v1/completions", hole),
        ("/v1/fim/completions", hole),
        ("/api/generate", hole),
        ("/infill", INFILL),
    ):
        ban = {"logit_bias": {"1": -100, "67": -100, "68": -100, "69": -100, "70": -100, "107": -100}}
        sent = {**body, "options": ban} if route == "/api/generate" else {**body, **ban}
        assert good(send(server, route, sent))["timings"]["predicted_n"] == bodies.INFILL_TOKENS == 128
    text = good(send(server, "/v1/completions", {"prompt": "x", "logit_bias": {"1": -100}}))
    assert text["usage"]["completion_tokens"] <= 16


def test_penalties_and_biases_work_on_every_route(server, model):
    first = model.generate("def f", max_tokens=1).ids[0]
    expected = good(
        send(
            server,
            "/v1/completions",
            {"prompt": "def f", "max_tokens": 6, "temperature": 0}
            | {"logit_bias": {str(first): -100}, "presence_penalty": 1.5},
        )
    )["choices"][0]["text"]
    more = {"temperature": 0, "presence_penalty": 1.5}
    for bias in ({str(first): -100}, [[first, -100]], [[first, False]], {str(first): False}):
        fields = {**more, "logit_bias": bias}
        answer = good(send(server, "/completion", {"prompt": "def f", "n_predict": 6, **fields}))
        assert answer["content"] == expected
    refused = error_text(send(server, "/completion", {"prompt": "x", "logit_bias": [["def", -1]]}))
    assert "each pair must be [token id, bias]" in refused and "Value error" not in refused
    options = {**more, "num_predict": 6, "logit_bias": [[first, False]]}
    ollama = {"model": "m", "prompt": "def f", "raw": True, "stream": False, "options": options}
    assert good(send(server, "/api/generate", ollama))["response"] == expected


def test_several_answers_of_llama_cpps_completion(server):
    body = {"prompt": ["x", "y"], "n_predict": 4, "temperature": 1.5, "seed": 3}
    several = good(send(server, "/completion", body | {"n_cmpl": 2}))
    assert [choice["index"] for choice in several] == [0, 1, 2, 3]
    single = good(send(server, "/completion", body))
    assert [several[0]["content"], several[2]["content"]] == [choice["content"] for choice in single]
    assert several[0]["content"] != several[1]["content"]


def test_an_empty_suffix_of_ollama_fills_in_the_middle(server, model):
    expected = model.complete(HOLE["prefix"], "", max_tokens=6)
    body = {"model": "m", "prompt": HOLE["prefix"], "stream": False, "options": {"num_predict": 6}}
    answer = good(send(server, "/api/generate", body | {"suffix": ""}))
    assert (answer["response"], answer["prompt_eval_count"]) == (expected.text, expected.prompt_tokens)
    assert answer["timings"]["mode"] == "psm" and "context" not in answer
    empty = good(send(server, "/api/generate", body | {"prompt": "", "suffix": ""}))  # an empty file
    assert empty["prompt_eval_count"] == model.complete("", "", max_tokens=1).prompt_tokens
    in_go = {"suffix": "", "system": "", "template": ""}
    for absent in ({}, {"suffix": None}, in_go, {"suffix": "", "raw": True}):
        assert good(send(server, "/api/generate", body | absent))["timings"]["mode"] is None
    assert good(send(server, "/api/generate", {"model": "m", "prompt": ""}))["done_reason"] == "load"


def test_another_template_of_ollama_is_refused(server):
    body = {"model": "m", "prompt": "x", "stream": False, "options": {"num_predict": 1}}
    shown = good(send(server, "/api/show", {"model": "m"}))["template"]
    for template in ("", "{{ .Prompt }}", "{{.Prompt}}\n", shown):
        assert good(send(server, "/api/generate", body | {"template": template}))
    refused = send(server, "/api/generate", body | {"template": "[INST] {{ .Prompt }} [/INST]"})
    assert "template is not supported" in error_text(refused)


# Text.

HALF = "\ud83d"
BYTES = vocab.small_tokenizer().encode("é漢🙂é")  # byte pieces


@pytest.mark.parametrize(
    "route, body",
    [
        ("/v1/completions", {"prompt": f"{HALF} x"}),
        ("/v1/completions", {"prompt": [f"x {HALF}", "y"], "stop": [f"{HALF}!"]}),
        ("/v1/completions", {"prompt": "x", "suffix": f"\n{HALF}", "path": f"{HALF}.py"}),
        (
            "/v1/completions",
            {
                "segments": {
                    "prefix": f"{HALF}",
                    "suffix": HALF,
                    "declarations": [{"filepath": f"{HALF}.py", "body": f"x = '{HALF}'"}],
                }
            },
        ),
        ("/v1/completions", {"prompt": "x", "metadata": {HALF: [{"deep": HALF}]}, "user": HALF}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        ),
        ("/chat/completions", {**CHAT, "tools": [{HALF: HALF}], "tool_choice": "none"}),
        ("/infill", {"input_prefix": f"{HALF} x = ", "input_suffix": f"\udc00{HALF}"}),
        ("/infill", {**INFILL, "input_extra": [{"filename": f"a{HALF}.py", "text": HALF}], "prompt": HALF}),
        ("/completion", {"prompt": ["a", 5, HALF], "session": HALF}),
        ("/api/generate", {"model": f"m{HALF}", "prompt": HALF, "system": HALF, "stream": False}),
        ("/api/generate", {"model": "m", "prompt": HALF, "suffix": HALF, "options": {"stop": [HALF]}}),
        ("/api/chat", {"model": "m", "messages": [{"role": "user", "content": HALF}], "stream": False}),
        ("/api/show", {"model": HALF}),
        ("/v1/fim/completions", {"prompt": HALF, "suffix": HALF}),
        ("/tokenize", {"content": HALF}),
        ("/tokenize", {"prompt": HALF}),
        ("/apply-template", {"messages": [{"role": "user", "content": HALF}]}),
        ("/v1/events", {"type": "view", "completion_id": HALF, "choice_index": 0}),
    ],
)
def test_half_an_emoji_becomes_a_replacement_character(server, route, body):
    limits = {"max_tokens": 3, "n_predict": 3, "temperature": 0, "seed": 1}
    answers = [send(server, route, limits | body)]
    answers.append(server.client.post(route, content=json.dumps(limits | body).replace("\\ud83d", "\\ufffd")))
    assert [answer.status_code for answer in answers] == [200, 200], answers[0].text
    if route in ("/infill", "/tokenize", "/apply-template"):
        first, second = (answer.json() for answer in answers)
        for key in {"content", "prompt", "tokens"} & set(first):
            assert first[key] == second[key]


def test_surrogates_that_are_written_apart_meet():
    for value, expected in (
        ("a\ud83d", "a\ufffd"),
        ("\ude00a", "\ufffda"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ({"\ud83d": ["\ud83d", 1, None, {"a": "\udfff"}]}, {"\ufffd": ["\ufffd", 1, None, {"a": "\ufffd"}]}),
    ):
        assert bodies.well_formed(value) == expected


@pytest.mark.parametrize("body", [b'{"prompt":', b"prompt=x", b'{"prompt": "x",}', b"", b"\xff"])
@pytest.mark.parametrize("route", ["/v1/completions", "/infill", "/api/generate", "/v1/chat/completions"])
def test_a_body_that_is_no_json_is_called_that(server, route, body):
    answer = server.client.post(route, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert "JSON" in answer.text or not body, answer.text
    assert "decode error" not in answer.text


def test_surrogates_in_bytes_are_replaced_too(server):
    body = b'{"content": "\xed\xa0\xbd\xed\xb8\x80 \xed\xa0\xbd"}'  # as some editors write UTF-8
    assert good(server.client.post("/tokenize", content=body)) == good(
        server.client.post("/tokenize", json={"content": "😀 \ufffd"})
    )


# Log-probabilities.


def spans(tokenizer, ids, text, prompt=""):
    """The offsets of ids by the definition: the character that holds the token's first byte."""
    lists = LogprobLists(tokenizer)
    return joined([lists.entry(token, 0.0, None, prompt) for token in ids])["text_offset"], lists.position


def test_offsets_of_tokens_that_spell_what_stands_before_the_cursor(server):
    """The prompt ends within a word, which the answer's first tokens spell again: its text is the rest."""
    body = {"prompt": "x = 1\nretu", "suffix": "\ny", "max_tokens": 12, "logprobs": 1, "trim": "none"}
    choice = send(server, "/v1/completions", body).json()["choices"][0]
    lists, text = choice["logprobs"], choice["text"]
    spelled = "".join(lists["tokens"])
    assert spelled.startswith("retu") and spelled.removeprefix("retu").startswith(text)
    position = -len("retu")
    for token, offset in zip(lists["tokens"], lists["text_offset"], strict=True):
        assert offset == min(max(position, 0), len(text))
        position += len(token)


def test_text_offsets_point_into_the_text():
    tokenizer = vocab.small_tokenizer()
    for text in ("é", "aé漢b", "x 🙂 y", "def f(): 日本"):
        ids = tokenizer.encode(text, bos=True)
        starts, position = spans(tokenizer, ids, text)
        offset, expected = 0, []
        for token in ids:
            expected.append(len(text.encode()[:offset].decode("utf-8", "ignore")))
            offset += len(tokenizer.decode_bytes([token]))
        assert starts == expected and position == len(text)
    spelled = "<bos>é<|fim_prefix|>x<|fim_suffix|><|fim_middle|>y"
    ids = tokenizer.encode(spelled, control=True)
    starts, position = spans(tokenizer, ids, spelled, spelled)
    assert position == len(spelled)
    control = [start for token, start in zip(ids, starts, strict=True) if tokenizer.is_control(token)]
    assert control == [0, 6, 21, 35]
    unspelled, position = spans(tokenizer, ids, tokenizer.decode(ids))
    assert position == len("éxy") and unspelled[-1] == 2
    broken = [*tokenizer.encode("é")[:1], *tokenizer.encode("a")]  # half of é, then a
    assert spans(tokenizer, broken, "\ufffda") == ([0, 1], 2)


def character_starts(data):
    """Where each character of a decoded text begins in its bytes; U+FFFD stands for up to three bytes."""
    starts, offset = [], 0
    while offset < len(data):
        starts.append(offset)
        try:
            offset += len(data[offset:].decode()[0].encode())
        except UnicodeDecodeError as error:
            offset += len(data[offset : offset + error.start].decode()[:1].encode()) or error.end
    return starts


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(BYTES) | st.integers(110, 400), max_size=12))
def test_a_token_has_the_offset_of_the_character_that_holds_its_first_byte(ids):
    tokenizer = vocab.small_tokenizer()
    ends = np.cumsum([0, *(len(tokenizer.decode_bytes([token])) for token in ids)])
    starts = character_starts(tokenizer.decode_bytes(ids))
    expected = [int(np.searchsorted(starts, end, "right")) - 1 for end in ends[:-1]]
    assert spans(tokenizer, ids, "")[0] == expected


def test_echoed_offsets_of_spelled_control_tokens_and_byte_pieces(server):
    for prompt in ("<|fim_prefix|>é<|fim_suffix|>x<|fim_middle|>", "naïve = '漢字'"):
        body = {"prompt": prompt, "max_tokens": 4, "echo": True, "logprobs": 3, "temperature": 0}
        choice = good(send(server, "/v1/completions", body))["choices"][0]
        lists, text = choice["logprobs"], choice["text"]
        for token, offset in zip(lists["tokens"][1:], lists["text_offset"][1:], strict=True):
            if not token.startswith("bytes:") and token not in ("<eos>",):
                assert text.startswith(token, offset) or offset >= len(prompt)
        assert lists["text_offset"] == sorted(lists["text_offset"])
        assert lists["text_offset"][-1] <= len(text)
        body = {**body, "stream": True}
        parts = [
            json.loads(part)["choices"][0] for part in events(send(server, "/v1/completions", body))[:-1]
        ]
        streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"]["text_offset"]]
        assert streamed == lists["text_offset"]
    stopped = {"prompt": "def f", "max_tokens": 12, "temperature": 1.5, "seed": 5, "logprobs": 1}
    full = good(send(server, "/v1/completions", stopped))["choices"][0]["text"]
    cut = good(send(server, "/v1/completions", {**stopped, "stop": full[4:6]}))["choices"][0]
    assert all(offset <= len(cut["text"]) for offset in cut["logprobs"]["text_offset"])


def test_alternatives_with_one_text_keep_the_better_value():
    tokenizer = vocab.small_tokenizer()
    letter = tokenizer.token_id("a")
    byte = tokenizer.token_id("<0x61>")  # the same text as a byte piece
    assert letter is not None and byte is not None
    for top in (((letter, -0.5), (byte, -3.0)), ((byte, -0.5), (letter, -3.0))):
        for chosen, logprob in top:
            lists = LogprobLists(tokenizer).entry(chosen, logprob, top)
            assert lists["top_logprobs"] == [{"a": -0.5}] and lists["token_logprobs"] == [logprob]
    below = LogprobLists(tokenizer).entry(byte, -9.0, ((tokenizer.token_id("b"), -0.1),))
    assert below["top_logprobs"] == [{"b": -0.1, "a": -9.0}]  # the token itself is always among them


# Streams.


@pytest.mark.parametrize("route", ROUTES)
def test_a_stream_is_never_silent_for_long(path, monkeypatch, route):
    monkeypatch.setattr(wire, "PING_S", 0.05)
    loaded = load(path, threads=1)
    loaded.engine.backend = BlockedBackend(loaded.engine.backend)
    body, limit = ROUTES[route]
    with served(scheduler_of(loaded)) as server:
        with server.client.stream("POST", route, json={**body, **limit(3), "stream": True}) as answer:
            parts = answer.iter_raw()
            received = b""
            while received.count(b"\n") < 8:  # while the prompt is read
                received += next(parts)
            loaded.engine.backend.released.set()
            received += b"".join(parts)
        if route.startswith("/api/"):
            rows = [json.loads(line) for line in received.splitlines()]
            texts = [row["response"] if "response" in row else row["message"]["content"] for row in rows]
            assert (
                rows[-1]["done"] and texts[:-1].count("") >= 7 and not any(row["done"] for row in rows[:-1])
            )
            return
        lines = [line for line in received.decode().split("\n\n") if line]
        assert lines.count(":") >= 3
        values = [line.removeprefix("data: ") for line in lines if line != ":"]
        assert all(value == "[DONE]" or json.loads(value) for value in values)


def test_a_stream_that_waits_in_the_queue_is_not_silent(path, monkeypatch):
    monkeypatch.setattr(wire, "PING_S", 0.05)
    loaded = load(path, threads=1)
    loaded.engine.backend = BlockedBackend(loaded.engine.backend)
    body = {"prompt": "x", "max_tokens": 1, "stream": True}
    with (
        served(scheduler_of(loaded, slots=1)) as server,
        server.client.stream("POST", "/v1/completions", json=body) as first,
        server.client.stream("POST", "/v1/completions", json=body) as second,
    ):
        parts = second.iter_raw()
        assert next(parts) == b":\n\n"
        loaded.engine.backend.released.set()
        for answer in (b"".join(first.iter_raw()), b"".join(parts)):
            assert answer.endswith(b"data: [DONE]\n\n")


@pytest.mark.parametrize("route", ROUTES)
def test_ids_that_the_models_files_state_as_ends_end_every_answer(path, route):
    body, limit = ROUTES[route]
    sent = {**body, **limit(5), "stream": False, "temperature": 0}
    loaded = load(path, threads=1)
    loaded.engine.tokenizer = loaded.engine.tokenizer.with_end_ids(range(loaded.engine.tokenizer.vocab_size))
    with served(scheduler_of(loaded)) as server:
        timings = good(send(server, route, sent))["timings"]
        assert (timings["predicted_n"], timings["stop"]) == (1, "end")


# Names and messages.


def test_models_have_their_published_names(tmp_path):
    for short, name in (
        ("2b", "codegemma-2b"),
        ("1.1-7b-it", "codegemma-1.1-7b-it"),
        ("gemma-3-270m", "gemma-3-270m"),
    ):
        assert model_id(PRESETS[short], tmp_path) == (name, [] if name == short else [short])
    folder = tmp_path / "ours-1.5"
    folder.mkdir()
    (folder / "model.gguf").touch()
    assert model_id(None, folder / "model.gguf") == ("ours-1.5", ["model"])
    assert model_id(None, folder) == ("ours-1.5", ["ours-1"])
    assert model_id(None, tmp_path / "tiny.Q4_0.gguf") == ("tiny.Q4_0", [])


def test_the_list_of_models_has_the_aliases(path, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.gguf").write_bytes(path.read_bytes())
    with served(scheduler_of(load(folder / "model.gguf", threads=1))) as server:
        (entry,) = good(server.get("/v1/models"))["data"]
        assert (entry["id"], entry["aliases"]) == ("mine", ["model"])
        for name in ("mine", "model"):
            assert good(server.get(f"/v1/models/{name}"))["id"] == name
            body = {"model": name, "prompt": "x", "max_tokens": 1}
            assert good(send(server, "/v1/completions", body))["model"] == name
        assert good(server.get("/api/tags"))["models"][0]["name"] == "mine:latest"


@pytest.mark.parametrize(
    "route, body, word",
    [
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 1 for i in range(600)}}, "got 515"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {str(i): 200 for i in range(500)}}, "token 0"),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"k" * 9000: 1}}, "logit_bias"),
        ("/v1/completions", {"prompt": [3.5] * 9000}, "prompt"),
        ("/infill", {**INFILL, "input_extra": [{"filename": 5}] * 9000}, "input_extra.0"),
        ("/v1/fim/completions", {"prompt": "x", "input_extra": [{}] * 9000}, "input_extra"),
        ("/v1/completions", {"prompt": "x", "suffix": "", "path": "long\n" * 9000}, "one line"),
        ("/v1/completions", {"prompt": "x", "adapter": "a" * 9000}, "adapter"),
        ("/v1/completions", {"prompt": "x", "mode": "m" * 9000}, "mode"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "t" * 9000}]}]}, "type"),
        ("/v1/chat/completions", {**CHAT, "model": "m" * 9000, "tools": TOOLS}, "tools"),
        ("/api/chat", {"model": "m", "messages": [{"role": "r" * 9000, "content": ""}]}, "role"),
        ("/v1/completions", {"segments": {"prefix": 3, "declarations": [{}] * 9000}}, "declarations"),
    ],
)
def test_an_error_does_not_repeat_the_request(server, route, body, word):
    answer = send(server, route, body)
    assert answer.status_code in (400, 422) and word in answer.text
    assert len(answer.text) < 1500


@pytest.mark.parametrize("field", ["seed", "random_seed"])
def test_a_seed_holds_under_either_name(server, field):
    body = {"prompt": "x = ", "suffix": "\n", "max_tokens": 8, "temperature": 2.0, field: 5}
    answers = [send(server, "/v1/fim/completions", body).json()["choices"][0] for _ in range(2)]
    assert answers[0] == answers[1]
    others = [send(server, "/v1/fim/completions", body | {field: seed}).json() for seed in (6, 7)]
    assert any(other["choices"][0] != answers[0] for other in others)
