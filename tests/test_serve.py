"""The server on a tiny model, over real sockets: every dialect's answers are the model's; scheduling and
cancelling; hostile clients."""

import asyncio
import contextlib
import gzip
import json
import math
import re
import socket
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import httpx
import numpy as np
import pytest
from serving import served
from tiny import KINDS, random_adapter, write_tiny_gguf

from codegemma import File, Message, Sampling, load
from codegemma.checkpoints import open_checkpoint
from codegemma.generate.completion import Trimmer
from codegemma.generate.request import Chat, Infill, Request, TextPrompt
from codegemma.generate.resolve import resolve
from codegemma.generate.running import Step
from codegemma.native import Cancel
from codegemma.serve import guard, protocol, remote, scheduler
from codegemma.serve.guard import Rules
from codegemma.serve.remote import RemoteService
from codegemma.serve.requests import Busy, Job
from codegemma.serve.scheduler import Scheduler
from codegemma.serve.wire import Answer

HOLE = {"prefix": "def add(a, b):\n    return ", "suffix": "\n\nprint(add(1, 2))\n"}
COMPLETION = {"prompt": HOLE["prefix"], "suffix": HOLE["suffix"]}  # the bodies of OpenAI, Mistral and Ollama
INFILL = {"input_prefix": HOLE["prefix"], "input_suffix": HOLE["suffix"]}  # llama.cpp's body
LONG = replace(KINDS["gemma-mqa"], context=8192)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny_gguf(tmp_path_factory.mktemp("served") / "tiny.gguf", LONG, "Q8_0", seed=35)


@pytest.fixture(scope="module")
def model(path):
    return load(path, threads=1)


@pytest.fixture(scope="module")
def server(path):
    with served(scheduler_of(load(path, threads=1)), terms="the terms") as server:
        yield server


def scheduler_of(model, **options):
    """What `served` opens: a Scheduler of the model."""

    async def open_scheduler():
        return Scheduler(model, **options)

    return open_scheduler


def events(answer):
    """The data of server-sent events, without the comments of a slow stream."""
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    return [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line.strip(":")]


def good(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()


# Every dialect's answers are the model's.


def test_every_dialect_fills_in_the_middle_as_the_model_does(server, model):
    expected = model.complete(**HOLE, max_tokens=12).text
    assert expected
    ids = {"temperature": 0}
    openai = good(
        server.post("/v1/completions", json={"model": "any", **COMPLETION, "max_tokens": 12, **ids})
    )
    assert openai["choices"][0]["text"] == expected and openai["object"] == "text_completion"
    infill = good(
        server.post(
            "/infill",
            json={
                "input_prefix": HOLE["prefix"][:15],
                "prompt": HOLE["prefix"][15:],
                "input_suffix": HOLE["suffix"],
                "n_predict": 12,
            },
        )
    )
    assert infill["content"] == expected
    ollama = good(
        server.post(
            "/api/generate",
            json={"model": "any", **COMPLETION, "stream": False, "options": {"num_predict": 12}},
        )
    )
    assert ollama["response"] == expected and ollama["done"] is True
    mistral = good(server.post("/v1/fim/completions", json={"model": "any", **COMPLETION, "max_tokens": 12}))
    assert mistral["choices"][0]["message"] == {"role": "assistant", "content": expected, "tool_calls": None}
    tabby = good(server.post("/v1/completions", json={"language": "python", "segments": HOLE}))
    assert tabby["choices"][0]["text"] == model.complete(**HOLE, max_tokens=64).text


def test_the_confidence_of_a_suggestion_is_the_geometric_mean_of_its_probabilities(server):
    whole = {"trim": "none", "temperature": 0}
    limit, hole, llama = (
        {"model": "any", "max_tokens": 6},
        COMPLETION | whole,
        INFILL | whole | {"n_predict": 6},
    )
    probabilities = good(server.post("/infill", json={**llama, "n_probs": 1}))
    logprobs = [entry["logprob"] for entry in probabilities["completion_probabilities"]]
    expected = pytest.approx(math.exp(sum(logprobs) / len(logprobs)), rel=1e-5)

    def last(value):  # the value of the field, which is the last one
        assert list(value)[-1] == "confidence"
        return value["confidence"]

    assert last(probabilities) == expected and 0 < last(probabilities) < 1
    ollama = {**hole, "model": "any", "options": {"num_predict": 6}}
    choice = good(server.post("/v1/completions", json=hole | limit))["choices"][0]
    fim = good(server.post("/v1/fim/completions", json=hole | limit))["choices"][0]
    generated = good(server.post("/api/generate", json=ollama | {"stream": False}))
    assert last(choice) == last(fim) == last(generated) == expected
    segments = {"language": "python", "segments": HOLE}
    assert 0 < last(good(server.post("/v1/completions", json=segments))["choices"][0]) < 1

    streams = {
        "/infill": [
            json.loads(part) for part in events(server.post("/infill", json={**llama, "stream": True}))
        ],
        "ollama": [json.loads(line) for line in server.post("/api/generate", json=ollama).text.splitlines()],
    }
    for route in ("/v1/completions", "/v1/fim/completions"):
        parts = events(server.post(route, json=hole | limit | {"stream": True}))[:-1]
        streams[route] = [json.loads(part)["choices"][0] for part in parts]
    for route, parts in streams.items():
        assert last(parts[-1]) == expected, route
        assert not any("confidence" in part for part in parts[:-1]), route
    assert len(streams["/infill"]) > 2

    several = good(server.post("/infill", json={**llama, "n_cmpl": 3, "temperature": 1, "seed": 5}))
    assert last(several[0]) == expected and len({last(answer) for answer in several}) > 1
    picked = {"response_fields": ["content", "confidence"]}
    assert good(server.post("/infill", json={**llama, **picked}))["confidence"] == expected
    assert good(server.post("/infill", json={**llama, "n_predict": 0}))["confidence"] is None  # no token


@pytest.mark.parametrize(
    ("prefix", "text", "place", "expected"),
    [
        ("# remove old logs\n", "rm -rf /var/log/*", {"path": "clean.sh"}, 0),
        ("rm ", "-rf build\n", {"language": "shellscript"}, 0),
        ("# remove old logs\n", "rm -rf /var/log/*", {"path": "clean.py"}, 0.5),
        ("", "a = 1\n" * 3, {}, 0),
        ("", "a = 1\nb = 2\n", {}, 0.5),
        ("", "", {}, 0.5),
    ],
)
def test_what_nobody_should_see_unasked_has_confidence_0(prefix, text, place, expected):
    infill = Infill(prefix, "", **place)
    job = types.SimpleNamespace(request=Request(infill))
    answer = Answer(0, job, [Step(1, text, -0.7, None, (), 0.5), Step(None, "", 0.0, "cancelled")])
    assert answer.confidence() == {"confidence": expected}


def test_text_and_chats_have_no_confidence(server):
    text = good(server.post("/v1/completions", json={"prompt": "a = ", "max_tokens": 3}))["choices"][0]
    turn = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    chat = good(server.post("/v1/chat/completions", json=turn))["choices"][0]
    plain = good(server.post("/completion", json={"prompt": "a = ", "n_predict": 3}))
    generate = {"model": "any", "prompt": "a = ", "stream": False, "options": {"num_predict": 3}}
    for answer in (text, chat, plain, good(server.post("/api/generate", json=generate))):
        assert "confidence" not in answer


def test_streams_join_to_the_answer(server, model):
    expected = model.complete(**HOLE, max_tokens=12).text
    body = {"model": "any", **COMPLETION, "max_tokens": 12, "stream": True}
    *parts, last = events(
        server.post("/v1/completions", json=body | {"stream_options": {"include_usage": True}})
    )
    chunks = [json.loads(part) for part in parts]
    assert (
        last == "[DONE]"
        and "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == expected
    )
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1) and chunks[-1][
        "choices"
    ] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(model.complete(**HOLE, max_tokens=12).ids)
    assert chunks[-2]["choices"][0]["finish_reason"] and chunks[-2]["timings"]["mode"] == "psm"
    *parts, last = events(server.post("/v1/fim/completions", json=body))
    deltas = [
        json.loads(part)["choices"][0]["delta"]["content"] for part in parts
    ]  # Tabby needs a string in every chunk
    assert "".join(deltas) == expected and last == "[DONE]"
    parts = events(server.post("/infill", json={**INFILL, "n_predict": 12, "stream": True}))
    assert "".join(json.loads(part)["content"] for part in parts) == expected
    assert [json.loads(part)["stop"] for part in parts] == [False] * (len(parts) - 1) + [True]
    answer = server.post("/api/generate", json=body | {"options": {"num_predict": 12}})
    rows = [json.loads(line) for line in answer.text.splitlines()]
    assert (
        answer.headers["content-type"] == "application/x-ndjson"
        and "".join(row["response"] for row in rows) == expected
    )
    assert [row["done"] for row in rows] == [False] * (len(rows) - 1) + [True] and rows[-1][
        "eval_duration"
    ] > 0


def test_chats_in_both_dialects(server, model):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    expected = model.chat(messages, max_tokens=9).text
    body = {"model": "m", "messages": messages, "max_tokens": 9, "temperature": 0}
    assert (
        good(server.post("/v1/chat/completions", json=body))["choices"][0]["message"]["content"] == expected
    )
    parts = [
        json.loads(part)
        for part in events(server.post("/v1/chat/completions", json=body | {"stream": True}))[:-1]
    ]
    assert parts[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(part["choices"][0]["delta"].get("content", "") for part in parts) == expected
    ollama_body = {
        "model": "m",
        "messages": messages,
        "stream": False,
        "options": {"num_predict": 9, "temperature": 0},
    }
    assert good(server.post("/api/chat", json=ollama_body))["message"] == {
        "role": "assistant",
        "content": expected,
    }
    parts = messages[:1] + [
        {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}
    ]
    assert (
        good(server.post("/v1/chat/completions", json=body | {"messages": parts}))["choices"][0]["message"][
            "content"
        ]
        == expected
    )


def test_token_ids_text_and_raw_prompts(server, model):
    marked = "<|fim_prefix|>def f(<|fim_suffix|>)<|fim_middle|>"
    ids = model.tokenizer.encode(marked, bos=True, control=True)
    assert model.tokenizer.control.fim_prefix in ids
    expected = model.generate(ids, max_tokens=7).text
    body = {"model": "m", "max_tokens": 7, "temperature": 0}
    answer = good(server.post("/v1/completions", json=body | {"prompt": [ids, ids[:3]]}))
    assert [choice["text"] for choice in answer["choices"]] == [
        expected,
        model.generate(ids[:3], max_tokens=7).text,
    ]
    assert (
        good(server.post("/v1/completions", json=body | {"prompt": marked}))["choices"][0]["text"] == expected
    )  # as Continue sends it
    assert (
        good(server.post("/completion", json={"prompt": marked, "n_predict": 7, "temperature": 0}))["content"]
        == expected
    )
    assert (
        good(server.post("/completion", json={"prompt": ids, "n_predict": 7, "temperature": 0}))["content"]
        == expected
    )
    mixed = {"prompt": [marked[:14], *ids[2:]], "n_predict": 7, "temperature": 0}
    assert good(server.post("/completion", json=mixed))["content"] == expected
    debug = {"raw_prompt": marked, "return_prompt": True}
    tabby = good(server.post("/v1/completions", json={"debug_options": debug}))
    assert tabby["choices"][0]["text"] == model.generate(ids, max_tokens=64).text
    assert tabby["debug_data"]["prompt"] == "<bos>" + marked
    streamed = {
        "prompt": ids,
        "n_predict": 7,
        "temperature": 0,
        "stream": True,
        "return_tokens": True,
        "n_probs": 1,
    }
    *parts, last = (json.loads(part) for part in events(server.post("/completion", json=streamed)))
    complete = good(server.post("/completion", json=streamed | {"stream": False}))
    for key in ("tokens", "completion_probabilities"):
        assert [entry for part in parts for entry in part[key]] == complete[key] and not last.get(key)
    ollama = {
        "model": "m",
        "prompt": marked,
        "raw": True,
        "stream": False,
        "options": {"num_predict": 7, "temperature": 0},
    }
    assert good(server.post("/api/generate", json=ollama))["response"] == expected
    assert (
        good(server.post("/api/generate", json=ollama | {"raw": False, "template": "{{ .Prompt }}"}))[
            "response"
        ]
        == expected
    )
    suffixed = {
        **body,
        "prompt": marked,
        "suffix": "<|file_separator|>",
    }  # with a suffix, control tokens in the text are plain text
    plain = model.complete(marked, "<|file_separator|>", max_tokens=7)
    answer = good(server.post("/v1/completions", json=suffixed))
    assert (
        answer["choices"][0]["text"] == plain.text and answer["usage"]["prompt_tokens"] == plain.prompt_tokens
    )


def test_context_of_several_files(server, model):
    files = [File("a.py", "def one(): return 1\n"), File("b.py", "def two(): return 2\n")]
    expected = model.complete(**HOLE, path="c.py", context=files, max_tokens=6)
    extra = [{"filename": file.path, "text": file.text, "time": [1, 2]} for file in files]
    infill = good(
        server.post("/infill", json={**INFILL, "input_extra": extra, "path": "c.py", "n_predict": 6})
    )
    assert (infill["content"], infill["tokens_evaluated"]) == (expected.text, expected.prompt_tokens)
    assert "<|file_separator|>" in infill["prompt"] and infill["prompt"].startswith("<bos>a.py\ndef one")
    segments = HOLE | {
        "filepath": "c.py",
        "declarations": [{"filepath": "b.py", "body": files[1].text}],
        "relevant_snippets_from_changed_files": [{"filepath": "a.py", "body": files[0].text, "score": 1.0}],
    }
    tabby = good(
        server.post("/v1/completions", json={"segments": segments, "debug_options": {"return_prompt": True}})
    )
    assert tabby["debug_data"]["prompt"] == infill["prompt"]


def test_what_llama_vim_needs(server):
    body = {
        "id_slot": 0,
        "input_prefix": "def f():\n",
        "input_suffix": "\n",
        "prompt": "    ret",
        "n_predict": 4,
        "top_k": 40,
        "input_extra": [{"text": "x", "time": [1, 2], "filename": "a.vim"}],
        "samplers": ["top_k", "infill"],
        "cache_prompt": True,
        "t_max_prompt_ms": 500,
        "t_max_predict_ms": 1000,
        "n_indent": 4,
        "stop": [],
        "stream": False,
        "response_fields": [
            "content",
            "timings/prompt_n",
            "timings/predicted_ms",
            "truncated",
            "tokens_cached",
            "no_such",
        ],
    }
    raw = server.post("/infill", json=body)
    assert re.match(r"^\s*{", raw.text) and re.search(
        r'"content"\s*:"', raw.text
    )  # else llama.vim drops the reply without a message
    assert set(raw.json()) == {
        "content",
        "timings/prompt_n",
        "timings/predicted_ms",
        "truncated",
        "tokens_cached",
    }
    warm = body | {
        "input_prefix": "",
        "input_suffix": "",
        "prompt": "",
        "n_predict": 0,
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1,
        "response_fields": [""],
        "samplers": [],
        "temperature": 0.0,
    }
    assert good(server.post("/infill", json=warm))["content"] == ""
    for extra, wrong in (({"filename": "a"}, "text"), ({"text": "x", "filename": 1}, "filename")):
        refused = server.post("/infill", json=body | {"input_extra": [extra]})
        assert refused.status_code == 400 and wrong in refused.json()["error"]["message"]
    *_, last = map(json.loads, events(server.post("/infill", json=body | {"stream": True})))
    assert set(last) == set(raw.json()) and last["content"] == ""  # its text was sent before
    unnamed = body | {
        "input_extra": [{"text": "one\n"}, {"text": "two\n", "filename": ""}],
        "response_fields": ["prompt"],
    }
    prompt = good(server.post("/infill", json=unnamed))["prompt"]
    assert prompt.startswith("<bos>one\n<|file_separator|>two\n<|file_separator|><|fim_")
    refused = server.post("/infill", json=body | {"n_cmpl": 5})
    assert refused.json()["error"]["message"] == "Field 'n_cmpl': Value must be between 1 <= value <= 4"
    several = good(server.post("/infill", json=body | {"n_cmpl": 3, "response_fields": None}))
    assert [choice["index"] for choice in several] == [0, 1, 2]


def test_log_probabilities_of_prompt_and_answer(server, model):
    ids = model.tokenizer.encode("def f(x): return", bos=True)
    answer = good(
        server.post(
            "/v1/completions",
            json={"prompt": [ids], "max_tokens": 3, "echo": True, "logprobs": 2, "temperature": 0},
        )
    )
    lists = answer["choices"][0]["logprobs"]
    all_ids = ids + model.generate(ids, max_tokens=3).ids
    logits = model.logits(all_ids).astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = [logprobs[i - 1, all_ids[i]] for i in range(1, len(all_ids))]
    assert lists["token_logprobs"][0] is None and np.allclose(
        lists["token_logprobs"][1:], expected, atol=1e-4
    )
    best = [sorted(logprobs[i - 1])[-1] for i in range(1, len(all_ids))]
    assert lists["top_logprobs"][0] is None and np.allclose(
        [max(top.values()) for top in lists["top_logprobs"][1:]], best, atol=1e-4
    )
    text = answer["choices"][0]["text"]
    assert text == model.tokenizer.decode(all_ids) and len(lists["text_offset"]) == len(all_ids)
    assert all(
        text.startswith(token, i)
        for token, i in zip(lists["tokens"][1:], lists["text_offset"][1:], strict=True)
        if not token.startswith("bytes:")
    )
    echo = good(
        server.post("/v1/completions", json={"prompt": [ids], "max_tokens": 0, "echo": True, "logprobs": 1})
    )["choices"][0]
    assert len(echo["logprobs"]["tokens"]) == len(ids) and echo["finish_reason"] == "length"
    alone = good(
        server.post("/v1/completions", json={"prompt": "", "max_tokens": 1, "echo": True, "logprobs": 1})
    )["choices"][0]
    assert (
        alone["logprobs"]["token_logprobs"][0] is None and len(alone["logprobs"]["tokens"]) == 2
    )  # <bos> has nothing before it


def test_choices_seeds_and_the_best_of_several(server, model):
    body = {"prompt": "def f", "max_tokens": 8, "temperature": 1.5, "seed": 7, "n": 3}
    first, again = (good(server.post("/v1/completions", json=body))["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again] and len(
        {choice["text"] for choice in first}
    ) > 1
    assert first[0]["text"] == model.generate("def f", max_tokens=8, sampling=Sampling(1.5, seed=7)).text
    scored = good(server.post("/v1/completions", json=body | {"logprobs": 0, "best_of": 6, "n": 6}))[
        "choices"
    ]
    means = [np.mean(choice["logprobs"]["token_logprobs"]) for choice in scored]
    best = good(server.post("/v1/completions", json=body | {"best_of": 6, "n": 2}))
    assert [choice["text"] for choice in best["choices"]] == [
        scored[i]["text"] for i in np.argsort(means)[::-1][:2]
    ]
    assert (
        best["usage"]["completion_tokens"] == 48
        and best["usage"]["prompt_tokens"] == len(model.tokenizer.encode("def f")) + 1
    )
    parts = [
        json.loads(part) for part in events(server.post("/v1/completions", json=body | {"stream": True}))[:-1]
    ]
    streamed = [
        "".join(part["choices"][0]["text"] for part in parts if part["choices"][0]["index"] == i)
        for i in range(3)
    ]
    assert streamed == [choice["text"] for choice in first]


def test_stop_texts_and_finish_reasons(server, model):
    full_text = model.generate("def f", max_tokens=12, sampling=Sampling(1.5, seed=5)).text
    stop = full_text[8:10]
    drawn = {"prompt": "def f", "max_tokens": 12, "temperature": 1.5, "seed": 5}
    (choice,) = good(server.post("/v1/completions", json=drawn | {"stop": ["", stop]}))["choices"]
    assert choice == {
        "text": full_text[: full_text.index(stop)],
        "index": 0,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": stop,
    }
    assert choice["text"]
    drawn |= {"n_predict": 12, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    answer = good(server.post("/completion", json=drawn | {"stop": ["~~~", stop]}))
    assert (answer["content"], answer["stop_type"], answer["stopping_word"]) == (choice["text"], "word", stop)
    assert good(server.post("/completion", json=drawn | {"n_predict": 2}))["stop_type"] == "limit"
    token = model.generate("def f", max_tokens=3, sampling=Sampling(1.5, seed=5)).ids[2]
    answer = good(server.post("/v1/completions", json=drawn | {"stop_token_ids": [token]}))
    assert answer["choices"][0]["stop_reason"] == token and answer["usage"]["completion_tokens"] <= 3


def test_tokens_templates_and_server_descriptions(server, model):
    text = "def f(): <bos>"
    assert good(server.post("/tokenize", json={"content": text}))["tokens"] == model.tokenizer.encode(
        text, control=True
    )
    pieces = good(server.post("/tokenize", json={"content": "é", "with_pieces": True}))["tokens"]
    assert [piece["piece"] for piece in pieces] == [[0xC3], [0xA9]]
    vllm = good(server.post("/tokenize", json={"prompt": "def"}))
    assert vllm["tokens"] == model.tokenizer.encode("def", bos=True) and vllm["count"] == len(vllm["tokens"])
    assert good(server.post("/detokenize", json={"tokens": model.tokenizer.encode(text)}))["content"] == text
    template = good(server.post("/apply-template", json={"messages": [{"role": "user", "content": "hi"}]}))
    assert template["prompt"] == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    info = good(server.get("/tokenizer_info"))
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<bos>", "<eos>", "<pad>")
    assert (
        good(server.get("/health")) == {"status": "ok"} and good(server.get("/v1/health"))["model"] == "tiny"
    )
    assert [entry["id"] for entry in good(server.get("/v1/models"))["data"]] == ["tiny"]
    assert (
        ".Suffix" in good(server.post("/api/show", json={"model": "tiny"}))["template"]
    )  # how Continue knows of FIM
    assert "insert" in good(server.post("/api/show", json={"model": "tiny"}))["capabilities"]
    assert (
        good(server.get("/api/tags"))["models"][0]["name"] == "tiny:latest"
        and good(server.get("/api/version"))["version"]
    )
    assert good(server.get("/api/ps"))["models"] and len(good(server.get("/slots"))) == scheduler.SLOTS
    assert (
        good(server.get("/props"))["codegemma"]["mode"] == "psm" and server.get("/terms").text == "the terms"
    )
    assert good(server.get("/v1beta/server_setting")) == {"disable_client_side_telemetry": True}
    assert good(server.post("/api/generate", json={"model": "m", "prompt": ""}))["done_reason"] == "load"
    assert (
        server.client.head("/").status_code == 200
        and server.post("/v1/embeddings", json={}).status_code == 501
    )
    assert good(server.post("/v1/completions", json={"prompt": "x", "max_tokens": 2}))
    metrics = dict(
        line.rsplit(" ", 1) for line in server.get("/metrics").text.splitlines() if not line.startswith("#")
    )
    assert (
        float(metrics["llamacpp:tokens_predicted_total"]) > 0
        and float(metrics["codegemma_requests_total"]) > 0
    )
    assert "/v1/fim/completions" in good(server.get("/openapi.json"))["paths"]


def test_events_of_tabby_become_local_statistics(server, monkeypatch, tmp_path):
    from codegemma.serve import stats

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    answer = good(server.post("/v1/completions", json={"language": "python", "segments": HOLE}))
    event = {"type": "view", "completion_id": answer["id"], "choice_index": 0}
    assert server.post("/v1/events", json=event).status_code == 200 and stats.load() == []
    assert server.post("/v1/events", json=event | {"type": "select"}).status_code == 200
    (row,) = stats.load()
    assert row.taken == row.characters == len(answer["choices"][0]["text"]) and row.language == "python"
    assert (
        server.post("/v1/events", json=event | {"type": "select"}).status_code == 200
        and len(stats.load()) == 1
    )
    body = {**INFILL, "n_predict": 5, "language": "go"}
    for outcome, number in (("dismiss", 1), ("select", 2)):
        *parts, last = (
            json.loads(part) for part in events(server.post("/infill", json=body | {"stream": True}))
        )
        assert "id" not in parts[0]
        assert (
            server.post("/v1/events", json=event | {"type": outcome, "completion_id": last["id"]}).status_code
            == 200
        )
        row = stats.load()[number]
        assert row.language == "go" and row.characters == sum(len(part["content"]) for part in [*parts, last])
        assert row.taken == (row.characters if outcome == "select" else 0)
    assert "id" not in good(server.post("/infill", json=body | {"n_predict": 0}))


@pytest.mark.parametrize(
    ("route", "body", "status", "words"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": -2}, 400, ["error", "message", "max_tokens"]),
        ("/v1/completions", {"prompt": [1, 999_999]}, 400, ["error", "message", "999999"]),
        ("/v1/completions", {"prompt": [2] * 9000}, 400, ["error", "message", "9,000 tokens"]),
        ("/v1/completions", {"prompt": "x", "temperature": -1}, 400, ["error", "message", "temperature"]),
        ("/v1/completions", {"prompt": "x", "adapter": "no-such"}, 400, ["error", "message", "--adapter"]),
        ("/v1/completions", {"prompt": ["x"] * 200, "n": 16}, 400, ["error", "message", "choices"]),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "assistant", "content": "x"}]},
            400,
            ["error", "message", "user"],
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "tools": [{}]},
            400,
            ["error", "message", "tools"],
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}},
            400,
            ["error", "message", "response_format"],
        ),
        ("/infill", {"input_prefix": 3, "input_suffix": ""}, 400, ["error", "message", "input_prefix"]),
        (
            "/infill",
            {"input_prefix": "", "input_suffix": "", "grammar": "root ::= x"},
            400,
            ["error", "message", "grammar"],
        ),
        ("/completion", {"prompt": []}, 400, ["error", "message", "at least 1"]),
        ("/completion", {"prompt": ["x"] * 600}, 400, ["error", "message", "choices"]),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"999999": 1}}, 400, ["error", "message", "bias"]),
        (
            "/v1/completions",
            {"prompt": "x", "presence_penalty": 3},
            400,
            ["error", "message", "presence_penalty"],
        ),
        ("/api/generate", {"prompt": "x", "model": "m", "format": "json"}, 400, ["error", "format"]),
        (
            "/api/chat",
            {"model": "m", "messages": [{"role": "user", "content": "x", "images": ["aa"]}]},
            400,
            ["error", "images"],
        ),
        ("/v1/fim/completions", {"suffix": "x"}, 422, ["detail", 0, "loc", "prompt"]),
        ("/v1/fim/completions", {"prompt": "x", "temperature": -3}, 400, ["message", "temperature"]),
        ("/v1/no-such", {}, 404, ["error", "message", "Not Found"]),
        (
            "/v1/completions",
            {"prompt": "x", "path": "a\nb", "suffix": ""},
            400,
            ["error", "message", "one line"],
        ),
    ],
)
def test_bad_input_is_refused_in_the_dialects_own_form(server, route, body, status, words):
    answer = server.client.post(route, content=json.dumps(body))
    assert answer.status_code == status, answer.text
    value = answer.json()
    for key in words[:-1]:
        value = value[key]
    assert words[-1] in str(value)


def test_tabbys_errors_are_plain_text(server):
    for body, word in (
        ({"segments": {"suffix": ""}}, "prefix"),
        ({"segments": HOLE, "mode": "next_edit_suggestion"}, "mode"),
        ({"debug_options": {"return_prompt": True}}, "raw_prompt"),
    ):
        answer = server.post("/v1/completions", json=body)
        assert (
            answer.status_code == 422
            and answer.headers["content-type"].startswith("text/plain")
            and word in answer.text
        )


def test_values_that_switch_a_field_off(server, model):
    """0, null and empty values mean what the protocol says of them."""
    expected = model.complete(**HOLE, max_tokens=6).text
    infill = {**INFILL, "n_predict": 6}
    for off in (
        {"t_max_prompt_ms": 0, "t_max_predict_ms": 0},
        {"t_max_prompt_ms": -1, "t_max_predict_ms": -1},
        {"grammar": ""},
    ):
        assert good(server.post("/infill", json=infill | off))["content"] == expected
    openai = {**COMPLETION, "max_tokens": 6}
    for off in (
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"logit_bias": None, "presence_penalty": None},
        {"logit_bias": {"5": 0}},
        {"n": None, "best_of": None, "stop": None, "stream_options": {"include_usage": None}},
    ):
        assert good(server.post("/v1/completions", json=openai | off))["choices"][0]["text"] == expected
    tabby = good(
        server.post("/v1/completions", json={"segments": HOLE, "mode": "standard"})
    )  # its mode, not ours
    assert tabby["choices"][0]["text"] == model.complete(**HOLE, max_tokens=64).text


def test_penalties_and_biases_reach_the_model(server, model):
    plain = model.generate("def f", max_tokens=8)
    body = {"prompt": "def f", "max_tokens": 8, "temperature": 0}
    for fields, sampling in (
        (
            {"presence_penalty": 2, "frequency_penalty": 1.5},
            Sampling(presence_penalty=2, frequency_penalty=1.5),
        ),
        ({"logit_bias": {str(plain.ids[0]): -100}}, Sampling(bias=((plain.ids[0], -100),))),
    ):
        text = good(server.post("/v1/completions", json=body | fields))["choices"][0]["text"]
        assert text == model.generate("def f", max_tokens=8, sampling=sampling).text != plain.text


def test_methods_slashes_and_encodings(server):
    for path in ("/api/tags", "/api/version", "/health", "/v1/models"):  # Ollama's clients ask with HEAD
        answer = server.client.head(path)
        assert answer.status_code == 200 and not answer.content and int(answer.headers["content-length"]) > 0
    body = {"prompt": "x", "max_tokens": 1}
    assert (
        good(server.post("/v1/completions/", json=body))["choices"]
        and len(good(server.get("/v1/models/"))["data"]) == 1
    )
    refused = server.get("/v1/completions")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST") and refused.json()["error"][
        "message"
    ]
    assert (
        server.post("/api/tags", json={}).status_code == 405 and server.post("/", json={}).status_code == 404
    )
    packed = server.client.post(
        "/infill", content=gzip.compress(json.dumps(body).encode()), headers={"Content-Encoding": "gzip"}
    )
    assert packed.status_code == 415 and "compressed" in packed.json()["error"]["message"]


def test_adapters_by_field_by_model_name_and_lora(path):
    loaded = load(path, threads=1)
    loaded.add_adapter("ours", replace(random_adapter(LONG, seed=3), card={"fim": {"spm": True}}))
    loaded.add_adapter("second", random_adapter(LONG, seed=4))
    fills = {
        name: loaded.complete(**HOLE, max_tokens=6, adapter=name, sampling=Sampling(1.0, seed=9))
        for name in ("none", "ours", "second")
    }
    expected = {name: fill.text for name, fill in fills.items()}
    assert len(set(expected.values())) == 3

    body = {**COMPLETION, "max_tokens": 6, "temperature": 1.0, "seed": 9}
    with served(scheduler_of(loaded)) as server, ThreadPoolExecutor(6) as pool:
        cases = [
            ({}, None),
            ({"adapter": "none"}, None),
            ({"adapter": "ours"}, "ours"),
            ({"model": "second"}, "second"),
            ({"model": "tiny:ours"}, "ours"),
            ({"model": "unheard-of"}, None),
        ]
        answers = list(
            pool.map(lambda case: good(server.post("/v1/completions", json=body | case[0])), cases)
        )
        for answer, (_, name) in zip(answers, cases, strict=True):
            assert answer["choices"][0]["text"] == expected[name or "none"]
            assert answer["timings"]["adapter"] == name
        assert answers[2]["timings"]["mode"] == "spm"  # as its card says
        lora = {
            **INFILL,
            "n_predict": 6,
            "temperature": 1.0,
            "seed": 9,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "lora": [{"id": 1, "scale": 0.5}, {"id": 0, "scale": 0.0}],
        }
        assert good(server.post("/infill", json=lora))["content"] == expected["second"]
        assert [entry["id"] for entry in good(server.get("/v1/models"))["data"]] == ["tiny", "ours", "second"]
        assert server.post("/infill", json=lora | {"lora": [{"id": 2}]}).status_code == 400
        text = good(
            server.post(
                "/completion", json={"prompt": "def f", "n_predict": 5, "temperature": 0, "adapter": "ours"}
            )
        )
        assert text["content"] == loaded.generate("def f", max_tokens=5, adapter="ours").text


# The scheduler: fairness, cancellation, deadlines, faults.


def test_requests_do_not_change_each_others_answers(server, model):
    rng = np.random.default_rng(0)
    bodies = [
        {
            "prompt": [[2, *rng.integers(110, 515, int(size)).tolist()]],
            "max_tokens": 10,
            "temperature": 0.7,
            "seed": i,
        }
        for i, size in enumerate(rng.integers(1, 300, 8))
    ]
    alone = [
        model.generate(body["prompt"][0], max_tokens=10, sampling=Sampling(0.7, seed=body["seed"])).text
        for body in bodies
    ]
    for together in (1, 2, 3, 8):
        order = rng.permutation(8)
        with ThreadPoolExecutor(together) as pool:
            answers = list(
                pool.map(
                    lambda i: good(server.post("/v1/completions", json=bodies[i]))["choices"][0]["text"],
                    order,
                )
            )
        assert answers == [alone[i] for i in order]


class BlockedBackend:
    """A compute backend whose `run` blocks until it is released or cancelled; `entered` counts runs."""

    def __init__(self, inner):
        self.inner, self.entered, self.released, self.cancelled_runs = (
            inner,
            threading.Semaphore(0),
            threading.Event(),
            0,
        )
        self.sizes = []

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def run(self, slices, cancel: Cancel | None = None):
        self.sizes.append([len(part.ids) for part in slices])
        self.entered.release()
        while not self.released.wait(0.002):
            if cancel is not None and cancel.is_set():
                self.cancelled_runs += 1
                return None
        return self.inner.run(slices, cancel)


@pytest.fixture
def blocked(path):
    """A server whose engine is blocked, and the engine's BlockedBackend."""
    loaded = load(path, threads=1)
    loaded.engine.backend = BlockedBackend(loaded.engine.backend)
    loaded.engine.prefill_rate = 100.0  # a prompt of 500 tokens should take 5 s

    with served(scheduler_of(loaded, slots=2, queue=4)) as server:
        yield server, loaded.engine.backend
        loaded.engine.backend.released.set()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def send(server, path, body, headers=""):
    """Sends a request on a new socket; its answer is not read."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(server.address)
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}Content-Length: {len(data)}\r\n\r\n".encode()
        + data
    )
    return connection


def test_a_disconnect_cancels_a_prompt_half_way(blocked):
    server, engine = blocked
    bodies = [{"prompt": [2] * 500} | more for more in ({}, {"stream": True}, {"echo": True, "logprobs": 1})]
    for body in bodies:
        connection = send(server, "/v1/completions", body)
        assert engine.entered.acquire(timeout=60)
        connection.close()
        wait_until(lambda: server.service.metrics.running == 0)
    assert engine.cancelled_runs == 3 and server.service.metrics.counts["cancelled"] == 3


def test_the_newest_completion_of_an_editor_cancels_its_older_ones(blocked):
    server, engine = blocked
    fill = {"input_prefix": "x" * 2000, "input_suffix": "", "session": "vim"}
    with ThreadPoolExecutor(2) as pool:
        other = send(server, "/infill", fill | {"session": "emacs"})
        assert engine.entered.acquire(timeout=60)
        first = pool.submit(server.post, "/infill", json=fill)
        wait_until(lambda: len(server.service._jobs) == 2)
        second = pool.submit(
            server.post,
            "/infill",
            json={k: v for k, v in fill.items() if k != "session"},
            headers={"X-Session-Id": "vim"},
        )
        wait_until(lambda: any(job.cancelled.is_set() for job in server.service._jobs.values()))
        engine.released.set()
        old = good(first.result(60))
        assert (old["timings"]["stop"], old["content"]) == ("cancelled", "")
        assert good(second.result(60))["timings"]["stop"] in ("end", "length")
    other.close()


def test_too_many_requests_get_429_and_retry_after(blocked):
    server, engine = blocked
    small = {"prompt": [2, 3], "max_tokens": 1}
    waiting = [send(server, "/v1/completions", small)]
    assert engine.entered.acquire(timeout=60)
    waiting += [send(server, "/v1/completions", small) for _ in range(4)]
    wait_until(lambda: len(server.service._waiting) == 4)
    for path in ("/v1/completions", "/api/generate"):
        refused = server.post(path, json={"prompt": "x", "model": "m"})
        assert (
            refused.status_code == 429
            and int(refused.headers["retry-after"]) >= 1
            and "error" in refused.json()
        )
    engine.released.set()
    for connection in waiting:
        assert b" 200 OK" in connection.recv(100)
        connection.close()
    assert server.service.metrics.counts["rejected"] == 2
    wait_until(lambda: good(server.post("/v1/completions", json={"prompt": "x", "max_tokens": 1})))


def test_a_long_prompt_delays_other_requests_by_little(blocked):
    server, engine = blocked
    service = server.service
    engine.released.set()
    with server.client.stream(
        "POST",
        "/v1/completions",
        json={
            "prompt": "def f",
            "max_tokens": 3000,
            "temperature": 1.0,
            "stream": True,
            "stop_token_ids": [],
            "seed": 3,
        },
    ) as typing:
        lines = typing.iter_lines()
        next(lines)
        engine.sizes.clear()
        service.engine.prefill_rate = 300.0
        service.engine.update_prefill_rate = lambda tokens, seconds: None
        long = [2, *np.random.default_rng(0).integers(110, 515, 700).tolist()]
        assert (
            good(server.post("/v1/completions", json={"prompt": [long], "max_tokens": 1}))["usage"][
                "prompt_tokens"
            ]
            == 701
        )
        shared = [sizes for sizes in engine.sizes if len(sizes) == 2]
        assert len(shared) >= 20 and all(
            min(sizes) <= 2 and max(sizes) <= int(scheduler.MAX_PAUSE_S * 300) for sizes in shared
        )
        engine.sizes.clear()
        scored = {"prompt": [long[:200]], "max_tokens": 0, "echo": True, "logprobs": 1}
        assert (
            len(good(server.post("/v1/completions", json=scored))["choices"][0]["logprobs"]["tokens"]) == 200
        )
        assert max(size for sizes in engine.sizes for size in sizes) == scheduler.MIN_CHUNK


def test_the_client_with_the_least_work_goes_first(blocked):
    server, engine = blocked
    rng = np.random.default_rng(0)
    order = []

    def post(name, size):
        body = {"prompt": [[2, *rng.integers(110, 515, size).tolist()]], "max_tokens": 1, "session": name}
        good(server.post("/v1/completions", json=body))
        order.append(name)

    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(post, "greedy", 600)]
        assert engine.entered.acquire(timeout=60)
        jobs += [pool.submit(post, "greedy", 600) for _ in range(2)]
        wait_until(lambda: len(server.service._jobs) + len(server.service._waiting) == 3)
        jobs.append(pool.submit(post, "modest", 20))
        wait_until(lambda: len(server.service._jobs) + len(server.service._waiting) == 4)
        engine.released.set()
        for job in jobs:
            job.result(60)
    assert order.index("modest") < 2 and order[-1] == "greedy"


def test_deadlines(model):
    """A prompt has a deadline, which also limits its size. So has an answer, from its first line on."""

    async def run():
        service = Scheduler(model)
        text = "".join(f"line_{i} = {i}\n" for i in range(400))
        (short,) = await service.submit(
            [Request(Infill(text), prompt_seconds=30 / model.engine.prefill_rate, max_tokens=1)]
        )
        (unlimited,) = await service.submit([Request(Infill(text), max_tokens=1)])
        assert short.prompt_tokens < unlimited.prompt_tokens / 4
        job = Job(Request(TextPrompt("x"), prompt_seconds=1.0, predict_seconds=1.0), Request([2]))
        job.started = 100.0
        assert not job.overdue(101.9) and job.overdue(102.1)
        job.first = 102.0
        assert not job.overdue(110.0)
        job.has_line = True
        assert job.overdue(103.1) and not job.overdue(102.9)
        (soon,) = await service.submit([Request(TextPrompt("def f"), max_tokens=4000, predict_seconds=1e-9)])
        soon.has_line = True
        steps = [step async for step in soon.steps()]
        assert steps[-1].stop == "length" and len(steps) < 1000
        await service.close()

    asyncio.run(run())


def test_a_fault_of_the_engine_fails_only_its_requests(path, caplog):
    loaded = load(path, threads=1)
    sound = loaded.engine.backend.run

    with served(scheduler_of(loaded)) as server:

        def broken(*_):
            raise MemoryError("no pages")

        loaded.engine.backend.run = broken
        for body in ({"prompt": "x"}, {"prompt": "x", "echo": True, "logprobs": 1}):
            answer = server.post("/v1/completions", json=body)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "no pages" in events(server.post("/v1/completions", json={"prompt": "x", "stream": True}))[0]
        loaded.engine.backend.run = sound
        assert good(server.post("/v1/completions", json={"prompt": "x"}))["choices"]
    assert "no pages" in caplog.text


def test_the_prompt_cache_survives_a_restart(path, tmp_path):
    body = {"prompt": "def f(x):\n" * 30, "max_tokens": 2, "temperature": 0}

    def complete_once():
        with served(scheduler_of(load(path, threads=1), cache=tmp_path / "kept")) as server:
            wait_until(
                lambda: (
                    not any(thread.name == "cache" and thread.is_alive() for thread in threading.enumerate())
                )
            )
            return good(server.post("/v1/completions", json=body))

    first, second = complete_once(), complete_once()
    assert (
        first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        and first["choices"] == second["choices"]
    )
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"] - 1
    (file,) = (tmp_path / "kept").iterdir()
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="damaged"):
        assert complete_once()["choices"] == first["choices"]


# RemoteService: another instance of this server generates.


def test_a_server_in_front_of_a_server_gives_the_same_answers(server, path, model):
    async def opened():
        return await RemoteService.open(server.url + "/v1/", open_checkpoint(path))

    with served(opened) as front:
        infill = {**INFILL, "n_predict": 12, "trim": "line", "n_probs": 2}
        ours, theirs = (good(instance.post("/infill", json=infill)) for instance in (server, front))
        assert ours["content"] == theirs["content"] == model.complete(**HOLE, max_tokens=12, trim="line").text
        assert ours["confidence"] == pytest.approx(theirs["confidence"], rel=1e-5)
        scored = {
            "prompt": "def f(x)",
            "echo": True,
            "logprobs": 2,
            "max_tokens": 3,
            "temperature": 0,
            "stop": ["~"],
        }
        ours, theirs = (
            good(instance.post("/v1/completions", json=scored))["choices"][0] for instance in (server, front)
        )
        assert (
            ours["logprobs"]["token_logprobs"] == theirs["logprobs"]["token_logprobs"]
            and ours["text"] == theirs["text"]
        )
        chat = {
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 6,
            "temperature": 1.0,
            "seed": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        ours, theirs = (
            [json.loads(part) for part in events(instance.post("/v1/chat/completions", json=chat))[:-1]]
            for instance in (server, front)
        )
        texts = [
            "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"])
            for chunks in (ours, theirs)
        ]
        assert (
            texts[0] == texts[1]
            and ours[-1]["usage"]["completion_tokens"] == theirs[-1]["usage"]["completion_tokens"]
        )
        assert front.post("/v1/completions", json={"prompt": [1, 999_999]}).status_code == 400
        assert (
            good(front.get("/props"))["codegemma"]["mode"] == "psm" and good(front.get("/api/tags"))["models"]
        )
        warm = good(front.post("/infill", json=infill | {"n_predict": 0}))
        assert warm["content"] == "" and warm["timings"]["stop"] == "length"


def test_a_failing_remote_server_is_reported(path, model):
    async def opened():
        return await RemoteService.open(engine.url, open_checkpoint(path))

    async def behind():
        return Scheduler(model)

    with served(behind) as engine, served(opened) as front:
        front.service.client.base_url = "http://127.0.0.1:9/v1"
        answer = front.post("/v1/completions", json={"prompt": "x"})
        assert (
            answer.status_code == 502
            and "the remote server, http://127.0.0.1:9" in answer.json()["error"]["message"]
        )
    with pytest.raises(ValueError, match="does not tell what is served"):
        asyncio.run(RemoteService.open("http://127.0.0.1:9", open_checkpoint(path)))


def test_all_choices_of_a_body_count_towards_the_remote_limit(model, path, monkeypatch):
    monkeypatch.setattr(remote, "MAX_REQUESTS", 3)

    async def opened():
        return await RemoteService.open(engine.url, open_checkpoint(path))

    async def behind():
        return Scheduler(model)

    with served(behind) as engine, served(opened) as front:
        jobs = front.service._jobs
        jobs[object()] = None
        body = {"prompt": "x", "max_tokens": 2, "temperature": 1.0}
        assert front.post("/v1/completions", json=body | {"n": 3}).status_code == 429
        assert good(front.post("/v1/completions", json=body | {"n": 2}))["choices"]
        jobs.clear()
        too_many = front.post("/v1/completions", json=body | {"n": 4})
        assert too_many.status_code == 400
        assert "may have 3 choices, this one has 4: split it" in too_many.json()["error"]["message"]


def test_a_remote_request_ends_when_its_client_disconnects(blocked, path):
    engine_server, engine = blocked

    async def opened():
        return await RemoteService.open(engine_server.url, open_checkpoint(path))

    with served(opened) as front:
        connection = send(front, "/infill", {"input_prefix": "x" * 500, "input_suffix": ""})
        assert engine.entered.acquire(timeout=60)
        connection.close()
        wait_until(lambda: front.service.metrics.running == 0 and engine_server.service.metrics.running == 0)
        assert engine_server.service.metrics.counts["cancelled"] == 1


# Hostile clients.


def test_pages_of_other_origins_and_rebound_names_are_refused(server):
    body = {"prompt": "x", "max_tokens": 1}
    host = server.url.removeprefix("http://")
    assert server.post("/v1/completions", json=body, headers={"Origin": server.url}).status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://[",
        f"https://{host}.evil.example",
        "http://127.0.0.1:1",
    ):
        assert server.post("/v1/completions", json=body, headers={"Origin": origin}).status_code == 403
        answer = server.client.options(
            "/v1/completions", headers={"Origin": origin, "Access-Control-Request-Method": "POST"}
        )
        assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers
    for name in ("evil.example", "evil.example:8012", "127.0.0.1.evil.example", ""):
        assert server.get("/v1/models", headers={"Host": name}).status_code == 403
    assert server.get("/v1/models", headers={"Host": "LOCALHOST:1"}).status_code == 200


def test_an_allowed_origin_and_keys(model):
    keys = guard.read_keys(["# ours", "0123456789abcdef", "fedcba9876543210", ""])
    with served(scheduler_of(model), Rules(None, frozenset({"https://editor.example"}), keys)) as server:
        for headers in (
            {},
            {"Authorization": "Bearer 0123456789abcdeg"},
            {"x-api-key": "ü".encode()},
            {"Authorization": "Basic 0123456789abcdef"},
        ):
            answer = server.get("/v1/models", headers=headers)
            assert (
                answer.status_code == 401
                and answer.headers["www-authenticate"] == "Bearer"
                and "key" in answer.text
            )
        assert server.get("/api/tags").json()["error"] and server.get("/metrics").status_code == 401
        assert server.get("/openapi.json").status_code == 401 and server.post("/api/none").status_code == 401
        for headers in (
            {"Authorization": "Bearer 0123456789abcdef"},
            {"Authorization": "bearer fedcba9876543210"},
            {"x-api-key": "fedcba9876543210"},
        ):
            answer = server.get("/v1/models", headers=headers | {"Origin": "https://editor.example"})
            assert (
                answer.status_code == 200
                and answer.headers["access-control-allow-origin"] == "https://editor.example"
            )
        wanted = {
            "Origin": "https://editor.example",
            "Access-Control-Request-Headers": "authorization,x-stainless-lang",
        }
        preflight = server.client.options("/v1/completions", headers=wanted)
        assert (
            preflight.status_code == 204
            and "x-stainless-lang" in preflight.headers["access-control-allow-headers"]
        )
        assert (
            server.get("/health").status_code
            == server.get("/terms").status_code
            == server.get("/").status_code
            == 200
        )
    with pytest.raises(ValueError, match="needs 16"):
        guard.read_keys(["short"])
    with pytest.raises(ValueError, match="has no key"):
        guard.read_keys(["# none", "  # this is no key either"])


def test_only_the_pages_files_are_served(model, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "web" / "app.js").write_text("1")
    (tmp_path / "web" / "link").symlink_to(tmp_path / "secret")
    with served(scheduler_of(model), web_folder=tmp_path / "web") as server:
        assert "was not built" in server.get("/").text
        (tmp_path / "web" / "index.html").write_text("<p>page</p>")
        answer = server.get("/")
        assert (
            answer.text == "<p>page</p>" and "default-src 'self'" in answer.headers["content-security-policy"]
        )
        assert answer.headers["x-content-type-options"] == "nosniff" and server.get("/app.js").text == "1"
        for path in (
            "/../secret",
            "/%2e%2e/secret",
            "/..%2fsecret",
            "/link",
            "/a/../../secret",
            "//etc/passwd",
            "/%00",
            "/" + "a" * 5000,
            "/..%5csecret",
        ):
            connection = socket.create_connection(server.address)
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b"".join(iter(lambda connection=connection: connection.recv(65536), b""))
            connection.close()
            assert (
                answer.split()[1] in (b"404", b"400") and b"secret" not in answer.split(b"\r\n\r\n", 1)[1]
            ), (path, answer)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (b"{", 400),
        (b"", 400),
        (b"\xff\xfe{}", 400),
        (b'{"prompt":"\xc3"}', 400),
        (b"[" * 200_000, 400),
        (b'{"a":' * 50_000, 400),
        (b'{"prompt":"x","max_tokens":' + b"9" * 5000 + b"}", 400),
        (b'{"prompt":"x","temperature":NaN}', 400),
        (b'{"prompt":"x","seed":1e999}', 400),
        (b'"x"', 400),
        (b"null", 400),
        (b'{"prompt":"x","max_tokens":1,"unknown":{}}', 200),
    ],
)
def test_malformed_bodies_get_400(server, content, status):
    for kind in ("application/json", "application/x-www-form-urlencoded"):  # `curl -d` says the latter
        answer = server.client.post("/v1/completions", content=content, headers={"Content-Type": kind})
        assert answer.status_code == status, answer.text
        assert status == 200 or answer.json()["error"]["message"]


def test_large_slow_and_half_sent_bodies(model, monkeypatch, caplog):
    monkeypatch.setattr(protocol, "CLIENT_TIMEOUT_S", 0.5)
    with served(scheduler_of(model), Rules(max_body_bytes=1 << 20, timeout_s=0.5)) as server:
        answer = server.client.post("/infill", content=b"x" * (1 << 20 | 1))
        assert answer.status_code == 413 and answer.json()["error"]["code"] == 413

        def chunks():
            for _ in range(64):
                yield b"x" * (1 << 16)

        with contextlib.suppress(httpx.WriteError):  # it may close the connection while we write
            assert server.client.post("/infill", content=chunks()).status_code == 413
        for begun, expected in (
            (b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{", b"408"),
            (b"POST /infill HTTP/1.1\r\nHo", b""),
            (b"", b""),
        ):
            connection = socket.create_connection(server.address)
            connection.sendall(begun)
            connection.settimeout(30)
            assert connection.recv(1000)[9:12] == expected
            connection.close()
        assert "sends no request" in caplog.text and good(server.get("/health"))
        trickle = socket.create_connection(server.address)  # a byte now and then keeps nothing open
        trickle.sendall(b"POST /infill HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10000\r\n\r\n")
        trickle.settimeout(0.1)
        answer = b""
        for _ in range(300):
            with contextlib.suppress(TimeoutError):
                answer = trickle.recv(1000)
                break
            trickle.sendall(b" ")
        trickle.close()
        assert answer[9:12] == b"408"


def test_a_client_that_does_not_read_is_disconnected(model, monkeypatch):
    monkeypatch.setattr(protocol, "CLIENT_TIMEOUT_S", 0.2)
    with served(scheduler_of(model)) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.address)
        data = json.dumps(
            {
                "prompt": [[2]] * 16,
                "n": 4,
                "max_tokens": 4000,
                "stream": True,
                "logprobs": 20,
                "temperature": 2,
            }
        ).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        wait_until(lambda: server.service.metrics.running > 0)
        wait_until(lambda: server.service.metrics.running == 0)
        assert server.service.metrics.counts["cancelled"] > 0
        connection.close()


def test_the_server_answers_beside_many_idle_connections(model, monkeypatch):
    monkeypatch.setattr(protocol, "MAX_CONNECTIONS", 300)
    with served(scheduler_of(model)) as server:
        idle = [socket.create_connection(server.address) for _ in range(250)]
        assert good(server.get("/health"))
        more = [socket.create_connection(server.address) for _ in range(100)]
        for connection in idle + more:
            connection.close()
        wait_until(lambda: server.get("/health").status_code == 200)


# Single functions.


def test_requests_are_resolved_to_token_ids(model):
    tokenizer = model.tokenizer
    plain = resolve(model.engine, Request(TextPrompt("<bos>")), {"psm"})
    assert (
        plain.prompt
        == tokenizer.encode("<bos>", bos=True)
        != resolve(model.engine, Request(TextPrompt("<bos>", raw=True)), {"psm"}).prompt
    )
    long = tuple(range(110, 400)) * 100
    cut = resolve(model.engine, Request(TextPrompt(long, truncate=True), max_tokens=100), {"psm"})
    assert len(cut.prompt) == LONG.context - 100 and cut.prompt[1:] == list(long[-len(cut.prompt) + 1 :])
    assert resolve(model.engine, Request(Infill("x", "y", mode="spm")), {"psm"}).layout == "spm"
    assert resolve(model.engine, Request(Infill("x")), ()).layout == "prefix"
    assert resolve(model.engine, Request(Chat((Message("user", "x"),))), {"psm"}).layout is None
    with pytest.raises(ValueError, match="time budget"):
        Request(TextPrompt("x"), prompt_seconds=float("nan"))


def test_lines_indented_less_end_a_suggestion():
    for min_indent, answer, expected in (
        (4, "a\n    b\n\n    c\n  d", "a\n    b\n\n    c"),
        (2, "a\n  b", "a\n  b"),
        (4, "x\ny", "x"),
        (4, "x\n", "x\n"),
        (1, "\n\tz\n", "\n\tz\n"),
    ):
        for size in (1, 2, 50):
            trimmer = Trimmer(Request(Infill("", min_indent=min_indent)), "psm")
            text, parts = "", [answer[start : start + size] for start in range(0, len(answer), size)]
            for number, part in enumerate(parts):
                step = trimmer.push(Step(5, part, 0.0, "length" if number == len(parts) - 1 else None))
                text += step.text
                if step.stop:
                    break
            assert text == expected and (step.stop == "length" if expected == answer else step.stop)


def test_a_stopping_server_is_busy(model):
    async def run():
        service = Scheduler(model)
        await service.close()
        with pytest.raises(Busy, match="stopping"):
            await service.submit([Request(TextPrompt("x"))])

    asyncio.run(run())
