"""The engine over JAX against the native one: prefix cache, batches, speculation, cancelling, saving."""

from pathlib import Path

import numpy as np
import pytest
import reference
from tiny import KINDS, random_adapter, tiny_config, tiny_tensors, write_tiny_gguf

import codegemma
from codegemma.checkpoints import Checkpoint
from codegemma.generate.engine import Batch, Engine
from codegemma.generate.request import Request
from codegemma.generate.sampling import Sampling
from codegemma.jax.backend import Jax
from codegemma.native import PAGE, Cancel, Native


def model(kind):
    config = tiny_config(kind, layers=3, **({"global_every": 3} if kind == "gemma3" else {}))
    return Checkpoint(Path("tiny"), config, tiny_tensors(config), {}, None)


def random_ids(count, seed=0):
    return [2, *np.random.default_rng(seed).integers(3, 515, count - 1).tolist()]


def bound(checkpoint, ids):
    arrays = {name: tensor.float32() for name, tensor in checkpoint.tensors.items()}
    return 2 * reference.tolerance(checkpoint.config, arrays, np.array(ids))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_is_the_native_engines(kind):
    """Tokens, log-probabilities and counts of cached tokens are the same.

    A prompt over two pages; one that continues from the middle of a cached page; three in one batch, one of
    which repeats itself, so that its tokens are speculated.
    """
    checkpoint = model(kind)
    ours, theirs = Engine(Jax(checkpoint)), Engine(Native(checkpoint, 1))
    ids = random_ids(PAGE + 9)
    tolerance = bound(checkpoint, ids)
    again = ids[: PAGE - 4] + random_ids(20, seed=1)
    for prompt in (ids, again, random_ids(6, seed=2) * 4):
        request = Request(prompt, max_tokens=6, sampling=Sampling(temperature=0.8, seed=3))
        a, b = ours.generate(request), theirs.generate(request)
        assert a.ids == b.ids and a.cached_tokens == b.cached_tokens
        assert (
            np.abs(np.array([step.logprob for step in a.steps]) - [step.logprob for step in b.steps]).max()
            < 2 * tolerance
        )
    assert a.prompt_tokens == 24 and b.cached_tokens == 1 < PAGE - 4
    results = []
    for engine in (ours, theirs):
        batch = Batch(engine, chunk=32)
        running = [
            batch.add(Request(prompt, max_tokens=5))
            for prompt in (random_ids(40, 5), random_ids(3, 6), again)
        ]
        while batch.running:
            batch.step()
        results.append([request.ids for request in running])
    assert results[0] == results[1]


def test_adapters_run_beside_the_base():
    """Adapters give the native engine's logits; in one batch, each request has its own adapter's."""
    checkpoint, results = model("gemma-mqa"), []
    adapter = random_adapter(checkpoint.config, ranks=(4, 2), tokens=(69, 300))
    ids = [2, 69, *random_ids(20)[1:]]
    for backend in (Jax(checkpoint), Native(checkpoint, 1)):
        engine = Engine(backend)
        engine.add_adapter("mine", adapter)
        batch = Batch(engine)
        running = [batch.add(Request(ids, max_tokens=4, adapter=name)) for name in ("mine", "none")]
        while batch.running:
            batch.step()
        results.append(
            (
                [request.ids for request in running],
                *(engine.logits(ids, adapter=name) for name in ("mine", "none")),
            )
        )
    (tokens, mine, base), (their_tokens, their_mine, their_base) = results
    tolerance = bound(checkpoint, ids)
    assert tokens == their_tokens
    assert (
        np.abs(base - their_base).max() < tolerance
        and np.abs(mine - their_mine).max() < 2 * tolerance < np.abs(mine - base).max()
    )


def test_logits_after_cached_pages_are_those_of_the_complete_text():
    checkpoint = model("gemma2")
    engine, ids = Engine(Jax(checkpoint)), random_ids(2 * PAGE + 5)
    before = engine.logits(ids)
    assert np.abs(before - Engine(Native(checkpoint, 1)).logits(ids)).max() < bound(checkpoint, ids)
    for start in (1, PAGE, PAGE + 7):  # a page, its edge, the middle of the next
        other = [*ids[:start], *random_ids(30, seed=start)[1:]]
        first = engine.generate(Request(other, max_tokens=1, top_logprobs=3)).steps[0]
        fresh = Engine(Jax(checkpoint)).generate(Request(other, max_tokens=1, top_logprobs=3)).steps[0]
        assert first.token == fresh.token
        assert max(abs(a[1] - b[1]) for a, b in zip(first.top, fresh.top, strict=True)) < bound(
            checkpoint, other
        )
    # no run has written into a shared page
    assert np.abs(engine.logits(ids) - before).max() < bound(checkpoint, ids)


def test_a_cancelled_run_leaves_the_cache_usable(tmp_path):
    checkpoint = model("gemma3")
    engine, ids = Engine(Jax(checkpoint)), random_ids(PAGE + 3)
    cancel = Cancel()
    cancel.set()
    assert engine.backend.run([engine.claim(engine.start(Request(ids)), ids, 1)], cancel) is None
    expected = engine.generate(Request(ids, max_tokens=4)).ids
    engine.cache.save(tmp_path / "cache")
    loaded = Engine(Jax(checkpoint))
    assert loaded.cache.load(tmp_path / "cache")
    result = loaded.generate(Request(ids, max_tokens=4))
    assert result.ids == expected and result.cached_tokens == len(ids) - 1
    with pytest.warns(UserWarning, match="another model"):
        assert not Engine(Native(checkpoint, 1)).cache.load(tmp_path / "cache")


def test_load_gives_the_backend(tmp_path):
    file = write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma-mqa"))
    ours = codegemma.load(file, backend="jax")
    assert isinstance(ours.backend, Jax)
    assert (
        ours.generate("def", max_tokens=3).text
        == codegemma.load(file, threads=1).generate("def", max_tokens=3).text
    )
    with pytest.raises(ValueError, match="backend must be native or jax"):
        codegemma.load(file, backend="torch")
