"""The laws of the engine, bit for bit, on tiny models of all architectures; generation on a scripted backend.

A token's logits depend only on the tokens before it: not on how the prompt was split, what ran beside it, the
number of threads, or whether its prefix came from the cache. Speculation and batching change no token.
"""

import threading
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import KINDS, random_blocks, tiny_config, tiny_pieces, tiny_tensors

from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.table import tensor_locations
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor
from codegemma.generate import sampling
from codegemma.generate.engine import Batch, Engine
from codegemma.generate.request import Request
from codegemma.generate.running import (
    DRAFT_PER_MATCH,
    MAX_DRAFT,
    MAX_MATCH,
    MIN_MATCH,
    Drafter,
    Step,
    StopText,
)
from codegemma.generate.sampling import Sampling
from codegemma.native import PAGE, Cancel, Logits, Native, Page, Slice, _native
from codegemma.tokenizer import Tokenizer

TYPES = tuple(type for type in BLOCKS if type != "F16")
WIDE = {"width": 256, "head_width": 64, "ffn_width": 512}  # what K-quants fill
TINY_TOKENIZER = Tokenizer.from_pieces(*tiny_pieces(KINDS["gemma-mqa"]))


def native(kind, type="F32", threads=1, level=None, seed=0, **changes):
    config = tiny_config(kind, **(WIDE if BLOCKS[type][0] == 256 else {}) | changes)
    return Native(
        Checkpoint(Path("tiny"), config, tiny_tensors(config, type, seed), {}, None), threads, level
    )


def random_ids(count, seed=0, vocab=515):
    return [2, *np.random.default_rng(seed).integers(3, vocab, count - 1).tolist()]


def logits_in_chunks(backend, ids, chunks, wanted=None):
    """Logits of all tokens (or of the last ones of each chunk) as bytes."""
    pages = [backend.new_page() for _ in range(-(-len(ids) // PAGE))]
    parts, start = [], 0
    for size in chunks:
        part = ids[start : start + size]
        result = backend.run([Slice(part, start, pages, len(part) if wanted is None else wanted)])
        parts += [
            (result.values[i].tobytes(), int(result.argmax[i]), float(result.normaliser[i]))
            for i in range(len(result.argmax))
        ]
        start += len(part)
        if start >= len(ids):
            break
    return parts


def repeated(size):
    while True:
        yield size


# ---------------------------------------------------------------------------------------- laws of the backend
@pytest.mark.parametrize(
    "kind, type",
    [
        *((kind, "F32") for kind in KINDS),
        *((kind, "Q8_0") for kind in KINDS),
        *(("gemma3", type) for type in TYPES if type not in ("F32", "Q8_0")),
        ("gemma2", "Q4_K"),
    ],
)
def test_chunks_change_nothing(kind, type):
    """Across pages (64), attention segments (256) and sliding windows (8)."""
    backend, ids = native(kind, type), random_ids(300)
    expected = logits_in_chunks(backend, ids, [300])
    for chunk in (1, 5, 6, 17, 64, 255):
        assert logits_in_chunks(backend, ids, repeated(chunk)) == expected, f"chunks of {chunk}"
    assert logits_in_chunks(backend, ids, [13, 1, 200, 2, 84]) == expected
    assert logits_in_chunks(backend, ids, [300], wanted=1) == expected[-1:]
    assert logits_in_chunks(backend, ids, [299, 1], wanted=1) == [expected[298], expected[299]]


@pytest.mark.parametrize(
    "kind, type", [("gemma-mqa", "F32"), ("gemma-mha", "Q4_0"), ("gemma2", "Q5_K"), ("gemma3", "IQ4_NL")]
)
def test_threads_change_nothing(kind, type):
    ids = random_ids(300)
    expected = logits_in_chunks(native(kind, type, threads=1), ids, [260, 3, *[1] * 37])
    for threads in (2, 3):
        assert logits_in_chunks(native(kind, type, threads), ids, [260, 3, *[1] * 37]) == expected


@pytest.mark.parametrize(
    "kind, type", [("gemma-mqa", "Q4_0"), ("gemma-mha", "F32"), ("gemma2", "Q6_K"), ("gemma3", "IQ4_XS")]
)
def test_neighbours_change_nothing(kind, type):
    """Nine sequences of different lengths in one run, prompts and single tokens mixed, in any order."""
    backend = native(kind, type, threads=2)
    texts = [random_ids(length, seed=length) for length in (1, 2, 5, 7, 63, 64, 65, 130, 290)]
    alone = [logits_in_chunks(backend, ids, [len(ids)])[-1] for ids in texts]
    rng = np.random.default_rng(0)
    for _ in range(4):
        order = rng.permutation(len(texts))
        heads = {i: int(rng.integers(0, len(texts[i]))) for i in order}  # tokens that an earlier run read
        pages = {i: [backend.new_page() for _ in range(-(-len(texts[i]) // PAGE))] for i in order}
        backend.run([Slice(texts[i][: heads[i]], 0, pages[i], 0) for i in order if heads[i]])
        result = backend.run([Slice(texts[i][heads[i] :], heads[i], pages[i], 1) for i in order])
        for row, i in enumerate(order):
            assert result.values[row].tobytes() == alone[i][0]
            assert (int(result.argmax[row]), float(result.normaliser[row])) == alone[i][1:]


@pytest.mark.parametrize("kind", KINDS)
def test_levels_agree_on_the_model(kind):
    """Products are equal; norms, softmax and GELU round differently, so activations may differ by a step."""
    levels = [
        level
        for level in ("plain", "avx2", "avxvnni", "avx512", "neon", "neondot", "neoni8mm")
        if _has(level)
    ]
    results = []
    for level in levels:
        backend = native(kind, "Q8_0", level=level)
        rows = logits_in_chunks(backend, random_ids(80), [80])
        results.append(np.array([np.frombuffer(values, np.float32) for values, *_ in rows]))
    for rows, others in pairwise(results):
        assert np.abs(rows - others).max() < 0.02 * np.abs(rows).max()  # 1 of 127 steps, in a few activations
    assert all(native(kind, level=level).key.split()[1] == level for level in levels)


def _has(level):
    try:
        return bool(_native.level(level))
    except ValueError:
        return False


def test_argmax_takes_the_lowest_of_equals_and_normaliser_is_log_sum_exp():
    backend, ids = native("gemma2", "Q8_0"), random_ids(40)
    for values, argmax, normaliser in logits_in_chunks(backend, ids, [40]):
        row = np.frombuffer(values, np.float32).astype(np.float64)
        assert argmax == int(row.argmax())
        assert abs(normaliser - np.log(np.exp(row - row.max()).sum()) - row.max()) < 1e-5
    config = tiny_config("gemma-mqa", vocab=9000)  # two partial sums
    tensors = tiny_tensors(config) | {"embed": ArrayTensor.of(np.ones((9000, config.width), np.float32))}
    flat = Native(Checkpoint(Path("tiny"), config, tensors, {}, None), 2)
    ((values, argmax, normaliser),) = logits_in_chunks(flat, [2], [1])
    first = np.frombuffer(values, np.float32)[0]
    assert argmax == 0 and abs(normaliser - first - np.log(9000)) < 1e-5


# ---------------------------------------------------------------------------------------- laws of the engine
class Counting:
    """A backend that counts the runs and tokens that go through it, and the pages that are copied."""

    def __init__(self, backend):
        self.backend, self.tokens, self.runs, self.copies = backend, 0, 0, 0

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def copy_page(self, page, used):
        self.copies += 1
        return self.backend.copy_page(page, used)

    def run(self, slices, cancel=None):
        self.tokens += sum(len(part.ids) for part in slices)
        self.runs += 1
        return self.backend.run(slices, cancel)


def run_all(engine, requests, order=None):
    """Steps of each request, in a batch that they join one after another."""
    batch, owners, steps = Batch(engine), {}, {index: [] for index in range(len(requests))}
    waiting = list(order or range(len(requests)))
    while waiting or batch.running:
        if waiting:
            index = waiting.pop(0)
            owners[id(batch.add(requests[index]))] = index
        for running, step in batch.step():
            steps[owners[id(running)]].append(step)
    return [steps[index] for index in range(len(requests))]


@pytest.mark.parametrize(
    "kind, type", [*((kind, "Q4_0") for kind in KINDS), ("gemma3", "Q4_K"), ("gemma2", "F32")]
)
def test_cache_batches_and_speculation_change_no_step(kind, type):
    backend = Counting(native(kind, type, threads=2))
    base = random_ids(100)
    prompts = [
        base,
        base[:70] + random_ids(30, 1),
        base[:64],
        base + random_ids(150, 2),
        random_ids(9, 3),
        base[:20] + [7, 8, 9, 10] * 20,
        base,
    ]
    draws = [
        Sampling(),
        Sampling(temperature=0.3, seed=5),
        Sampling(temperature=1, top_k=40, top_p=0.9, seed=6),
    ]
    requests = [Request(prompt, 12, draws[i % 3], top_logprobs=2) for i, prompt in enumerate(prompts)]
    fresh = [
        list(Engine(backend, cache_bytes=0).generate(replace(request, speculate=False)))
        for request in requests
    ]
    shared = Engine(backend)
    for _ in range(2):  # the second time all is cached
        assert [list(shared.generate(request)) for request in requests] == fresh
    assert run_all(Engine(backend), requests) == fresh
    assert run_all(Engine(backend), requests, order=[4, 2, 6, 0, 5, 3, 1]) == fresh
    assert run_all(shared, requests, order=[3, 5, 0, 1, 6, 4, 2]) == fresh


def test_cached_prefix_is_not_computed_again():
    backend = Counting(native("gemma3", "Q8_0"))
    engine, ids = Engine(backend), random_ids(200)
    first = list(engine.generate(Request(ids, 1)))
    assert backend.tokens == 200
    assert list(engine.generate(Request(ids, 1))) == first and backend.tokens == 201
    running = engine.start(Request(ids[:150] + [9] * 20, 1))
    assert running.cached == 150  # in the middle of a page


def test_shared_prefix_of_a_batch_is_computed_once():
    """Samples of a prompt, and prompts with a common start, that begin together with an empty cache."""
    backend = Counting(native("gemma3", "Q8_0"))
    prompt = random_ids(300)
    requests = [Request(prompt, 4, Sampling(temperature=1, seed=seed)) for seed in range(5)]
    requests += [Request(prompt[:100] + random_ids(20, seed), 4) for seed in range(3)]
    alone = [list(Engine(backend, cache_bytes=0).generate(request)) for request in requests]
    backend.tokens = 0
    batch = Batch(Engine(backend, cache_bytes=0))
    owners = {id(batch.add(request)): index for index, request in enumerate(requests)}
    steps = [[] for _ in requests]
    while batch.running:
        for running, step in batch.step():
            steps[owners[id(running)]].append(step)
    assert steps == alone
    assert backend.tokens <= 300 + 3 * 20 + 8 * 4 + 4


def test_followers_continue_when_their_leader_is_removed():
    engine = Engine(native("gemma3", "Q8_0"), cache_bytes=0)
    prompt = random_ids(300)
    expected = list(engine.generate(Request(prompt, 3)))
    batch = Batch(engine, chunk=100)
    leader, follower = batch.add(Request(prompt, 3)), batch.add(Request(prompt, 3))
    assert batch.step() == [] and leader.done == 100 and follower.done == 0
    batch.remove(leader)
    steps = []
    while batch.running:
        steps += [step for _, step in batch.step()]
    assert steps == expected and follower.cached == 100


def test_a_shared_page_is_copied_before_it_is_written():
    """Two requests that continue a partly filled page in turns, and then both once more from the cache."""
    backend = native("gemma2", "Q4_0")
    engine, base = Engine(backend), random_ids(70)
    list(engine.generate(Request(base, 1)))
    requests = [Request(base + [token], 20, speculate=False) for token in (5, 6)]
    alone = [list(Engine(backend).generate(request)) for request in requests]
    a, b = (engine.generate(request) for request in requests)
    turns = [[], []]
    for _ in range(20):
        turns[0].append(next(a))
        turns[1].append(next(b))
    assert turns == alone
    assert [list(engine.generate(request)) for request in requests] == alone


def test_speculation_saves_runs_and_changes_no_token():
    """Most tokens of a script that repeats itself come from drafts, so that it needs far fewer runs."""
    script = random_ids(6) + [11, 12, 13, 14, 15, 16, 17, 18] * 30
    script[150] = 99  # a draft that fails
    backend = Counting(Scripted(script))
    plain = list(Engine(backend).generate(Request(script[:30], 200, speculate=False)))
    assert backend.runs == 200
    backend.runs = 0
    assert list(Engine(backend).generate(Request(script[:30], 200))) == plain
    assert backend.runs < 60 and backend.copies == 0  # rows of refused drafts are given back
    assert [step.token for step in plain] == script[30:230]


@pytest.mark.parametrize("alphabet", [1, 2, 5, 30])
def test_a_draft_follows_the_last_of_the_longest_matches(alphabet):
    """The drafter, whose text grows by a few tokens, against a search of the whole text for each length."""

    def slow(ids):
        for size in range(min(MAX_MATCH, len(ids) - 1), MIN_MATCH - 1, -1):
            for end in range(len(ids) - 1, size - 1, -1):
                if ids[end - size : end] == ids[-size:]:
                    return ids[end : end + min(DRAFT_PER_MATCH * size, MAX_DRAFT)]
        return []

    rng = np.random.default_rng(alphabet)
    ids, drafter = rng.integers(0, alphabet, 20).tolist(), Drafter()
    while len(ids) < 200:
        assert drafter.propose(ids, 100) == slow(ids)
        ids += rng.integers(0, alphabet, int(rng.integers(1, 5))).tolist()
    assert drafter.propose(ids, 1) == slow(ids)[:1] and drafter.propose(ids, 0) == []


@pytest.mark.parametrize("text", [[7] * 20_000, list(range(20_000)), [1, 2, 3] * 7000])
def test_the_drafter_s_memory_is_proportional_to_the_text(text):
    drafter = Drafter()
    for end in range(1, len(text), 997):
        drafter.propose(text[:end], 8)
    assert len(drafter._earlier_end) + len(drafter._last_end) <= 2 * len(text)


def test_engine_logits_are_those_of_the_backend():
    backend, ids = native("gemma3", "Q8_0"), random_ids(150)
    rows = np.array(
        [np.frombuffer(values, np.float32) for values, *_ in logits_in_chunks(backend, ids, [150])]
    )
    engine = Engine(backend)
    for length in (150, 1, 64, 100, 149, 150):  # the last with everything cached
        assert engine.logits(ids[:length]).tobytes() == rows[:length].tobytes()


def test_seed_decides_the_text_whatever_runs_beside_it():
    ids, tokens_of_seed = random_ids(30), {}
    for threads in (1, 2):
        engine = Engine(native("gemma3", "Q4_0", threads))
        for seed in (1, 2, 3):
            request = Request(ids, 20, Sampling(temperature=1.0, seed=seed))
            tokens = [step.token for step in engine.generate(request)]
            assert tokens_of_seed.setdefault(seed, tokens) == tokens
    assert len({tuple(tokens) for tokens in tokens_of_seed.values()}) == 3


def test_two_threads_share_an_engine():
    engine = Engine(native("gemma2", "Q4_0", threads=2))
    requests = [Request(random_ids(90, seed % 3) + [seed], 15) for seed in range(8)]
    alone = [list(Engine(engine.backend).generate(request)) for request in requests]
    results = [None] * len(requests)

    def work(first):
        for index in range(first, len(requests), 2):
            results[index] = list(engine.generate(requests[index]))
            engine.logits(requests[index].prompt)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == alone


# ---------------------------------------------------------------------------------------- generation
class Scripted:
    """A backend whose likeliest token at position p is script[p + 1], by 5 nats over all others."""

    invariant, key, page_bytes = True, "scripted", 8

    def __init__(self, script, context=512):
        self.script, self.config = script, tiny_config("gemma-mqa", context=context)

    def new_page(self):
        return Page(np.zeros(8, np.uint8))

    def copy_page(self, page, used):
        return Page(page.data.copy(), used)

    def run(self, slices, cancel=None):
        if cancel is not None and cancel.is_set():
            return None
        rows = [s.start + len(s.ids) - s.wanted + i + 1 for s in slices for i in range(s.wanted)]
        values = np.zeros((len(rows), self.config.vocab), np.float32)
        chosen = np.array([self.script[min(position, len(self.script) - 1)] for position in rows], np.int32)
        values[np.arange(len(rows)), chosen] = 5.0
        return Logits(values, chosen, np.log(np.exp(values).sum(-1)))


def answer_steps(text, prompt="x", **options):
    """The Steps of a model that answers `text` and then <eos>."""
    script = [2, *TINY_TOKENIZER.encode(prompt), *TINY_TOKENIZER.encode(text), 1]
    size = 1 + len(TINY_TOKENIZER.encode(prompt))
    return list(
        Engine(Scripted(script), TINY_TOKENIZER).generate(Request(script[:size], stop_ids={1}, **options))
    )


def test_steps_have_token_text_and_logprob():
    steps = answer_steps("def")
    assert [(step.text, step.stop) for step in steps] == [("def", None), ("", "end")]
    logprob = 5 - np.log(np.exp(5) + 514)
    assert [step.token for step in steps] == [*TINY_TOKENIZER.encode("def"), 1]
    assert all(abs(step.logprob - logprob) < 1e-6 and step.top == () for step in steps)
    top = answer_steps("def", top_logprobs=3)[0].top
    assert top[0] == (TINY_TOKENIZER.encode("def")[0], pytest.approx(logprob)) and [
        token for token, _ in top[1:]
    ] == [0, 1]


def test_text_never_holds_half_a_character():
    text = "né 😀 漢字"  # bytes, in this vocabulary
    steps = answer_steps(text)
    assert "".join(step.text for step in steps) == text and not any("\ufffd" in step.text for step in steps)
    cut = answer_steps(text, max_tokens=2)  # in the middle of é
    assert [step.text for step in cut] == ["n", "\ufffd"] and cut[-1].stop == "length"


@settings(deadline=None)
@given(st.text("ab\n 😀", max_size=30), st.lists(st.text("ab\n 😀", min_size=1, max_size=6), max_size=3))
def test_stop_texts_end_the_text_before_the_first(text, stops):
    steps = answer_steps(text, stop=stops)
    expected, ended = text, "end"
    for size in range(len(text) + 1):  # the first prefix that has a complete stop text
        matches = [start for start in (text[:size].find(stop) for stop in stops) if start >= 0]
        if matches:
            expected, ended = text[: min(matches)], "stop_text"
            break
    assert "".join(step.text for step in steps) == expected
    assert steps[-1].stop == ended and all(step.stop is None for step in steps[:-1])


@given(st.text("ab", min_size=1, max_size=8), st.lists(st.text("abc", max_size=4), max_size=10))
def test_no_more_text_is_held_back_than_may_begin_a_stop_text(stop, pieces):
    matcher, text = StopText(stop), ""
    for piece in pieces:
        text += piece
        assert matcher.push(piece) == max(n for n in range(len(stop) + 1) if text.endswith(stop[:n]))


@pytest.mark.parametrize("stop", ["x" * 300_000, "xy" * 150_000, "x" * 299_999 + "y"])
def test_a_long_stop_text_costs_no_time(stop):
    start = time.perf_counter()
    steps = answer_steps("xxxyxyx", stop=[stop])
    assert "".join(step.text for step in steps) == "xxxyxyx" and steps[-1].stop == "end"
    assert time.perf_counter() - start < 2  # tried at each of its lengths, it would take a minute


def test_text_held_back_for_a_stop_text_is_released_at_the_end():
    assert [(step.text, step.stop) for step in answer_steps("a<b", stop=["<bc"])] == [
        ("a", None),
        ("", None),
        ("", None),
        ("<b", "end"),
    ]
    assert answer_steps("a<b", stop=["<bc"], max_tokens=3)[-1] == replace(
        answer_steps("a<b", max_tokens=3)[-1], text="<b"
    )


def test_length_and_context_limit_the_answer():
    script = random_ids(200)
    engine = Engine(Scripted(script, context=100))
    assert [step.stop for step in engine.generate(Request(script[:10], 3))] == [None, None, "length"]
    steps = list(engine.generate(Request(script[:90], 50)))
    assert len(steps) == 10 and steps[-1].stop == "length"
    with pytest.raises(ValueError, match=r'has 100 tokens but the model reads 100: .*truncate="left"'):
        engine.generate(Request(script[:100], 1))
    assert list(engine.generate(Request(script[:100], 0))) == [Step(None, "", 0.0, "length")]  # only read
    assert engine.cache.find(script[:100])[1] == 100


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([]), "the prompt is empty"),
        (Request([2, 515]), "token id 515, but the vocabulary has 515 ids"),
        (Request([2, -1]), "token id -1"),
    ],
)
def test_bad_requests_are_refused_at_once(request_, message):
    with pytest.raises(ValueError, match=message):
        Engine(Scripted([2]), TINY_TOKENIZER).generate(request_)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_tokens": -1}, "max_tokens and top must be at least 0, got -1"),
        ({"top_logprobs": -1}, "at least 0"),
        ({"stop": "ab"}, "a list of texts"),
        ({"stop": ["a", ""]}, "none of them empty"),
        ({"adapter": None}, 'adapter must be "auto", "none" .*got None'),
        ({"adapter": ""}, "adapter must be"),
        ({"prompt_seconds": 0}, "time budget must be above 0"),
        ({"predict_seconds": float("inf")}, "predict_seconds must be above 0"),
    ],
)
def test_a_request_is_checked_when_it_is_made(options, message):
    with pytest.raises(ValueError, match=message):
        Request([2], **options)


def test_stop_texts_need_a_tokenizer():
    with pytest.raises(ValueError, match="need a tokenizer.*stop_ids"):
        Engine(Scripted([2])).generate(Request([2], stop=["a"]))


def test_long_prompts_do_not_hold_up_the_others():
    """A step reads at most `chunk` prompt tokens: a request that writes gets a token in every step."""
    script = random_ids(400)
    batch = Batch(Engine(Scripted(script)), chunk=32)
    writer = batch.add(Request(script[:8], 100, speculate=False))
    batch.step()
    reader = batch.add(Request(random_ids(300, 5), 5))
    for _ in range(9):
        assert [running for running, _ in batch.step()] == [writer]
    assert reader.done == 288


# ---------------------------------------------------------------------------------------- stopping
@pytest.fixture(scope="module")
def heavy():
    """A model that takes seconds for a prompt of 4,000 tokens."""
    config = tiny_config(
        "gemma-mqa", layers=6, width=1024, heads=8, head_width=128, ffn_width=4096, context=8192
    )
    tensors = {
        location.name: ArrayTensor.of(np.ones(location.shape, np.float32))
        if location.is_norm
        else random_blocks("Q4_0", location.shape, location.shape[-1] ** -0.5)
        for location in tensor_locations(config, "gguf")
    }
    return Native(Checkpoint(Path("heavy"), config, tensors, {}, None), 2)


def test_cancel_stops_a_long_prompt_within_50_ms(heavy):
    """The fastest of several attempts, since a busy machine delays single ones."""
    engine, ids, waits = Engine(heavy, cache_bytes=0), random_ids(4000), []
    started = time.perf_counter()
    heavy.run([Slice(ids[:512], 0, [heavy.new_page() for _ in range(8)], 0)])
    chunk_seconds = time.perf_counter() - started
    for _ in range(8):
        cancel, called = Cancel(), []

        def stop(cancel=cancel, called=called):
            called.append(time.perf_counter())
            cancel.set()

        timer = threading.Timer(chunk_seconds / 3, stop)
        timer.start()
        steps = list(engine.generate(Request(ids, 10), cancel))
        waits.append(time.perf_counter() - called[0])
        assert [(step.token, step.stop) for step in steps] == [(None, "cancelled")]
        if waits[-1] < 0.05:
            break
    assert min(waits) < 0.05 < chunk_seconds


def test_a_cancelled_request_leaves_nothing_behind(heavy):
    engine, ids = Engine(heavy), random_ids(500, 1)
    expected = list(Engine(heavy).generate(Request(ids, 3)))
    list(engine.generate(Request(ids[:100], 1)))
    for delay in (0.002, 0.01, 0.03, 0.06):
        cancel = Cancel()
        timer = threading.Timer(delay, cancel.set)
        timer.start()
        list(engine.generate(Request(ids, 2), cancel))
        timer.join()
    assert list(engine.generate(Request(ids, 3))) == expected


def test_cancel_before_and_between_steps():
    script = random_ids(60)
    cancel = Cancel()
    steps = Engine(Scripted(script)).generate(Request(script[:10], 40), cancel)
    first = next(steps)
    assert first.stop is None and first.confidence < 0.999
    cancel.set()
    assert [step.stop for step in steps] == ["cancelled"]
    assert steps.confidence == first.confidence


def test_a_request_that_waits_for_another_can_be_cancelled():
    engine, cancel = Engine(Scripted(random_ids(60))), Cancel()
    with engine.lock:  # held by another request's step
        steps = engine.generate(Request([2], 4), cancel)
        threading.Timer(0.05, cancel.set).start()
        assert [step.stop for step in steps] == ["cancelled"]


def test_closing_the_iterator_stops_the_work_and_caches_it():
    backend = Counting(Scripted(random_ids(300)))
    engine = Engine(backend)
    steps = engine.generate(Request(backend.script[:100], 100, speculate=False))
    for _ in range(5):
        next(steps)
    steps.close()
    assert backend.runs == 5 and list(steps) == []
    assert engine.cache.find(backend.script[:200])[1] == 104


# ---------------------------------------------------------------------------------------- sampling
def probabilities(s, logits_V, context=()):
    """The distribution after the filters, straight from their definitions."""
    x = logits_V.astype(np.float64).copy()
    for token in set(context):
        x[token] = x[token] / s.repeat_penalty if x[token] > 0 else x[token] * s.repeat_penalty
    p = np.exp(x / s.temperature - (x / s.temperature).max())
    ranked = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if s.top_k:
        ranked = ranked[: s.top_k]
    total, nucleus, mass = sum(p[i] for i in ranked), [], 0.0
    for i in ranked:
        if nucleus and (mass / total >= s.top_p or p[i] / p[ranked[0]] < s.min_p):
            break
        nucleus.append(i)
        mass += p[i]
    q = np.zeros(len(p))
    q[nucleus] = p[nucleus] / p[nucleus].sum()
    return q


@pytest.mark.parametrize(
    "s",
    [
        Sampling(1.0),
        Sampling(0.5),
        Sampling(2.0, top_k=5),
        Sampling(1.0, top_p=0.7),
        Sampling(1.0, min_p=0.2),
        Sampling(1.3, top_k=8, top_p=0.9, min_p=0.05),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_p=0.0),
        Sampling(0.8, repeat_penalty=1.5),
    ],
)
def test_draws_follow_the_distribution(s):
    """Pearson's chi-square of 4,000 draws lies below its 1 - 1e-4 quantile (Wilson and Hilferty)."""
    logits_V = np.random.default_rng(3).normal(0, 1.5, 12).astype(np.float32)
    context = [0, 3, 3, 7]
    expected = probabilities(s, logits_V, context) * 4000
    draws = [
        sampling.choose(replace(s, seed=9), logits_V, int(logits_V.argmax()), context, i) for i in range(4000)
    ]
    counts = np.bincount(draws, minlength=12)
    assert counts[expected == 0].sum() == 0
    possible = expected > 0
    degrees = possible.sum() - 1
    if degrees:
        limit = degrees * (1 - 2 / (9 * degrees) + 3.72 * np.sqrt(2 / (9 * degrees))) ** 3
        assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < limit
    assert [sampling.choose(replace(s, seed=9), logits_V, 0, context, i) for i in range(50)] == draws[:50]


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.95},
        {"top_p": 0.3},
        {"top_p": 0.0},
        {"min_p": 0.05},
        {"top_p": 0.9, "min_p": 1e-3},
        {"top_k": 7},
        {"top_k": 40, "top_p": 0.8},
    ],
)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
def test_a_draw_equals_one_from_the_whole_sorted_vocabulary(options, scale):
    """Where the filters leave a small part of many tokens, and ties go to the lowest id."""
    rng, s = np.random.default_rng(3), Sampling(1.0, **options)
    for size in (5, 300, 5000):
        logits_V = rng.normal(0, scale, size)
        logits_V[rng.integers(0, size, 3)] = logits_V.max()
        q = probabilities(s, logits_V)
        ranked = np.lexsort((np.arange(size), -q))[: np.count_nonzero(q)]
        cumulative = np.cumsum(q[ranked])
        for i in range(40):
            uniform = sampling._uniform(s.seed, i)
            assert (
                sampling.choose(s, logits_V, 0, [], i)
                == ranked[int(np.searchsorted(cumulative, uniform, "right"))]
            )


def test_greedy_takes_the_argmax_and_penalties_move_it():
    logits_V = np.array([1.0, 3.0, 2.9, -1.0], np.float32)
    assert sampling.choose(Sampling(), logits_V, 1, [], 0) == 1
    assert sampling.choose(Sampling(repeat_penalty=1.1), logits_V, 1, [1], 0) == 2
    assert sampling.choose(Sampling(repeat_penalty=1.1), logits_V, 1, [1, 2], 0) == 1
    assert sampling.choose(Sampling(repeat_penalty=0.5), -logits_V, 3, [0], 0) == 3
    assert logits_V.tolist() == [1.0, 3.0, np.float32(2.9), -1.0]
    ties = np.zeros(300, np.float32)
    assert sampling.choose(Sampling(repeat_penalty=2.0), ties, 0, [0], 0) == 0


def test_openai_penalties_count_generated_tokens_only():
    """logit - frequency * count - presence * (count > 0) + bias; counts are of generated tokens only."""
    logits_V, context = np.array([1.0, 3.0, 2.9, -1.0], np.float32), [1, 1, 2, 2, 0]
    for presence, frequency, bias, index in (
        (0.2, 0, (), 3),
        (0.0, 0.04, (), 3),
        (0.0, 0.06, (), 3),
        (0.5, 1.0, (), 0),
        (0.0, 0.0, ((3, 4.1), (1, -100)), 2),
        (-2.0, -0.5, (), 3),
        (2, 2, ((0, 1.5),), 5),
    ):
        penalised = sampling.Sampling(presence_penalty=presence, frequency_penalty=frequency, bias=bias)
        expected = logits_V.astype(np.float64)
        for token in range(4):
            count = context[5 - index :].count(token)
            expected[token] += dict(bias).get(token, 0) - frequency * count - presence * (count > 0)
        assert sampling.choose(penalised, logits_V, 1, context, index) == expected.argmax()


def test_top_orders_by_value_then_id():
    values = np.array([1, 5, 5, 2, 5], np.float32)
    assert [sampling.top(values, k).tolist() for k in (1, 2, 4, 9)] == [
        [1],
        [1, 2],
        [1, 2, 4, 3],
        [1, 2, 4, 3, 0],
    ]


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 1.1),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_penalty", float("inf")),
        ("presence_penalty", 2.1),
        ("frequency_penalty", float("nan")),
        ("bias", ((0, float("nan")),)),
    ],
)
def test_sampling_refuses_invalid_values(field, value):
    with pytest.raises(ValueError, match=f"sampling: {field} must be"):
        Sampling(**{field: value})
