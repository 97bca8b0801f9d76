"""The laws of the JAX forward pass: golden logits, float64 twin, native engine, cache, packing, remat.

Bounds are those of `reference.tolerance`: the model's conditioning, at the unit roundoff of the arithmetic.
"""

import os
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from tiny import KINDS, dequantize, random_adapter, random_weights, tiny_config, tiny_tensors

from codegemma.adapters.merge import merge
from codegemma.checkpoints import Checkpoint
from codegemma.generate.engine import Engine
from codegemma.jax.compiler import FUSION_FLAG, configure_xla
from codegemma.jax.forward import (
    AttentionMask,
    Cache,
    LoraParams,
    attend,
    attend_at_once,
    forward,
    kernel_attend,
    params_of,
    unembed,
)
from codegemma.native import Native

configure_xla()  # before the first test computes

GOLDEN = ("gemma1-mqa", "gemma1-mha", "gemma2", "gemma3")
BFLOAT16 = 2.0**-8


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        yield


def tiny(kind, seed=0, **changes):
    config = tiny_config(kind, **changes)
    return config, {name: jnp.asarray(values) for name, values in random_weights(config, seed).items()}


def checkpoint(kind, type="F32", **changes):
    config = tiny_config(kind, **changes)
    return Checkpoint(Path("tiny"), config, tiny_tensors(config, type), {}, None)


def random_ids(count, seed=0, vocab=515):
    return np.concatenate([[2], np.random.default_rng(seed).integers(3, vocab, count - 1)]).astype(np.int32)


def logits(config, params, ids, lora=None, **options):
    def run(params, ids_BT, lora):
        return unembed(params, forward(params, ids_BT, config, lora, **options)[0], config, lora)[0]

    return np.asarray(jax.jit(run)(params, ids[None], lora))


# ------------------------------------------------------------------------------------------ what is computed
@pytest.mark.parametrize("kind", GOLDEN)
def test_logits_are_those_of_transformers_and_of_the_float64_twin(kind):
    config, params, ids, theirs = reference.golden(kind)
    ours = logits(config, {name: jnp.asarray(value) for name, value in params.items()}, ids)
    bound = reference.tolerance(config, params, ids)
    assert np.abs(ours - reference.logits(config, params, ids)).max() < bound
    assert np.abs(ours - theirs).max() < 2 * bound


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_native_engine(kind):
    """On the same float32 weights, past the windows of 8 and a page of 64; also with an adapter merged in."""
    model, ids = checkpoint(kind), random_ids(80)
    adapter = random_adapter(model.config, ranks=(4, 2), tokens=(69, 300))
    params = params_of(model)
    for changed, lora in ((model, None), (merge(model, adapter), LoraParams.of(adapter))):
        arrays = {name: tensor.float32() for name, tensor in changed.tensors.items()}
        bound = 2 * reference.tolerance(model.config, arrays, ids)
        theirs = Engine(Native(changed, 1)).logits(ids)
        assert np.abs(logits(model.config, params, ids, lora) - theirs).max() < bound


@pytest.mark.parametrize(
    ("version", "is_affected"),
    [((0, 9, 2), False), ((0, 10, 1), False), ((0, 10, 2), True), ((0, 10, 10), True), ((0, 11, 0), True)]
    + [((0, 12, 0), False), ((0, 100, 0), False), ((1, 0, 0), False)],
)
def test_the_wrong_fusion_is_off_in_the_versions_that_have_it(monkeypatch, version, is_affected):
    monkeypatch.setattr(jax, "__version__", ".".join(map(str, version)))
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    configure_xla()
    assert (FUSION_FLAG in os.environ["XLA_FLAGS"]) is is_affected


@pytest.mark.parametrize("type", ["F16", "BF16", "Q8_0", "Q4_0"])
def test_params_of_decodes_the_values_of_a_file(type):
    model = checkpoint("gemma3", type)
    params = params_of(model, jnp.float32)
    assert params.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        assert np.array_equal(np.asarray(params[name]), dequantize(tensor)), name
    stored = params_of(model)["layers.0.q"]
    assert stored.dtype == {"F16": jnp.float16}.get(type, jnp.bfloat16)
    assert np.array_equal(
        np.asarray(stored, np.float32), np.asarray(params["layers.0.q"].astype(stored.dtype), np.float32)
    )


@pytest.mark.parametrize("type", ["Q4_0", "BF16"])
def test_blocks_give_the_logits_of_their_values(type):
    """Weights that stay as the file holds them, through the engine's products, on the adapter's side too."""
    model, ids = checkpoint("gemma2", type, layers=2), random_ids(24)
    lora = LoraParams.of(random_adapter(model.config, tokens=(69, 300)))
    stored, decoded = (params_of(model, jnp.float32, matrices) for matrices in ("stored", "arrays"))
    values = {name: dequantize(tensor) for name, tensor in model.tensors.items()}
    bound = 2 * reference.tolerance(model.config, values, ids)
    assert (
        np.abs(logits(model.config, stored, ids) - reference.logits(model.config, values, ids)).max() < bound
    )
    assert (
        np.abs(logits(model.config, stored, ids, lora) - logits(model.config, decoded, ids, lora)).max()
        < 2 * bound
    )


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_bfloat16_activations_err_by_their_roundoff(kind):
    config, params = tiny(kind)
    ids = random_ids(40)
    exact = reference.logits(config, params, ids)
    error = np.abs(logits(config, params, ids, dtype=jnp.bfloat16) - exact)
    assert error.max() < reference.tolerance(config, params, ids, BFLOAT16)
    assert error.max() > reference.tolerance(config, params, ids)  # else they were not bfloat16


# -------------------------------------------------------------------------------------------- cache, packing
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_changes_nothing(kind):
    """Two sequences at different places, in chunks of several sizes, in a cache larger than they are."""
    config, params = tiny(kind)
    ids_BT = np.stack([random_ids(41, seed) for seed in (1, 2)])
    uncached = np.stack([logits(config, params, ids) for ids in ids_BT])
    step = jax.jit(
        lambda params, ids, positions, cache: forward(
            params, ids, config, positions_BT=positions, cache=cache
        )
    )
    empty = jnp.zeros((config.layers, 2, 48, config.kv_heads, config.head_width))
    cache, starts = Cache(empty, empty), np.array([0, 0])
    rows = [[], []]
    # the second sequence takes `lag` tokens fewer
    for size, lag in ((16, 3), (1, 0), (1, 0), (16, 5), (1, 0)):
        sizes = np.array([size, size - lag])
        positions_BT = starts[:, None] + np.arange(size)
        positions_BT = np.where(np.arange(size) < sizes[:, None], positions_BT, 48)  # no slot 48 exists
        chunk_BT = np.stack(
            [np.resize(ids[i : i + n], size) for ids, i, n in zip(ids_BT, starts, sizes, strict=True)]
        )
        hidden_BTD, cache = step(params, chunk_BT, positions_BT, cache)
        for b, n in enumerate(sizes):
            rows[b] += list(np.asarray(unembed(params, hidden_BTD[b, :n], config)))
        starts = starts + sizes
    bound = 2 * reference.tolerance(config, params, ids_BT[0])
    for b in range(2):
        assert np.abs(np.array(rows[b]) - uncached[b, : len(rows[b])]).max() < bound
    assert isinstance(cache, Cache) and len(rows[0]) == 35


def packed(parts, length):
    """(tokens, positions, segments) of a row."""
    rest = length - sum(map(len, parts))
    tokens = np.concatenate([*parts, np.zeros(rest, np.int32)])
    positions = np.concatenate([np.arange(len(part)) for part in (*parts, range(rest))]).astype(np.int32)
    segments = np.repeat([*range(1, len(parts) + 1), 0], [*map(len, parts), rest]).astype(np.int32)
    return tokens[None], positions[None], segments[None]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_segments_are_separate_texts(kind):
    """Their logits are those of the text alone; other segments change no bit of its loss and gradient."""
    config, params = tiny(kind)
    parts = [random_ids(n, seed=n) for n in (12, 19, 9)]

    def second_segment(params, tokens_BT, positions_BT, segments_BT):
        hidden, _ = forward(params, tokens_BT, config, positions_BT=positions_BT, segments_BT=segments_BT)
        rows = unembed(params, hidden, config)[0]
        positions = np.arange(12, 31)  # of the second segment
        logprobs = jax.nn.log_softmax(rows[positions[:-1]])
        return -jnp.take_along_axis(logprobs, tokens_BT[0, positions[1:], None], 1).sum(), rows

    step = jax.jit(jax.value_and_grad(second_segment, has_aux=True))
    (loss, rows), gradient = step(params, *packed(parts, 48))
    start = 0
    for part in parts:
        alone = logits(config, params, part)
        assert np.abs(rows[start : start + len(part)] - alone).max() < 2 * reference.tolerance(
            config, params, part
        )
        start += len(part)
    others = [random_ids(12, seed=99), parts[1], random_ids(9, seed=98)]
    (other, changed), moved = step(params, *packed(others, 48))
    assert float(other) == float(loss) and not np.array_equal(changed[:12], rows[:12])
    for name in params:
        assert np.array_equal(np.asarray(moved[name]), np.asarray(gradient[name])), name


@pytest.mark.parametrize(("window", "cap"), [(None, None), (1, None), (98, None), (98, 0.5)])
@pytest.mark.parametrize("T", [13, 700, 1500])
def test_attention_in_parts_and_by_kernels_is_attention(T, window, cap):
    """Result and gradients, of packed segments, beside all queries against all keys."""
    rng = np.random.default_rng(T)
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((2, T, heads, 8)), jnp.float32) for heads in (4, 2, 2, 4)
    )
    segments = np.sort(rng.integers(-1, 2, (2, T)), 1)
    positions = np.stack([np.arange(T) - np.searchsorted(row, row) for row in segments])
    mask = AttentionMask(jnp.asarray(positions), jnp.asarray(segments), False, window)

    def at_once(q, k, v):
        return attend_at_once(q, k, v, mask.mask_BTS(slice(0, T), slice(0, T)), cap)

    def parts(q, k, v):
        return attend(q, k, v, mask, cap)

    def kernels(q, k, v):
        return kernel_attend(q, k, v, mask, cap)

    def value_and_grad(attention):
        return jax.jit(jax.value_and_grad(lambda x: (attention(*x) * weights.reshape(2, T, -1)).sum()))(
            (q, k, v)
        )

    wanted = jax.tree.leaves(value_and_grad(at_once))
    for other in (value_and_grad(parts), value_and_grad(kernels)):
        for a, b in zip(wanted, jax.tree.leaves(other), strict=True):
            assert np.abs(a - b).max() <= 64 * reference.FLOAT32 * max(
                np.linalg.norm(a), np.linalg.norm(weights)
            )
    with jax.default_matmul_precision("bfloat16"):
        rounded = value_and_grad(kernels)
    for a, b in zip(wanted[1:], jax.tree.leaves(rounded)[1:], strict=True):
        assert np.linalg.norm(a - b) <= 2.0**-6 * np.linalg.norm(a)  # nothing where a token sees itself alone


@pytest.mark.parametrize("kind", ["gemma-mqa", "gemma3"])
def test_remat_changes_nothing(kind):
    """Neither hidden states nor gradients, beyond the roundoff that another order of fusions costs."""
    config, params = tiny(kind, layers=3)
    ids, lora = random_ids(24)[None], LoraParams.of(random_adapter(config, tokens=(69,)))

    def loss(trained, remat):
        hidden, _ = forward(trained[0], ids, config, trained[1], remat=remat)
        return (unembed(trained[0], hidden, config, trained[1]) ** 2).mean()

    plain = jax.jit(jax.grad(loss), static_argnums=1)((params, lora), "none")
    for remat in ("products", "layer"):
        again = jax.jit(jax.grad(loss), static_argnums=1)((params, lora), remat)
        for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
            assert np.abs(a - b).max() < 64 * reference.FLOAT32 * np.linalg.norm(a)
    residuals = {
        remat: _saved(lambda x, r=remat: loss((params, x), r), lora)
        for remat in ("none", "products", "layer")
    }
    assert residuals["layer"] < residuals["products"] < residuals["none"]


def _saved(function, *arguments):
    """Floats that the backward pass keeps."""
    _, back = jax.vjp(function, *arguments)
    return sum(leaf.size for leaf in jax.tree.leaves(back))


def test_remat_of_products_computes_no_product_of_the_base_twice():
    config, params = tiny("gemma3", layers=1, global_every=1, window=None)
    ids = random_ids(24)[None]

    def products(remat):
        loss = jax.grad(lambda x: (forward(params | {"embed": x}, ids, config, remat=remat)[0] ** 2).sum())
        return str(jax.make_jaxpr(loss)(params["embed"])).count("dot_general")

    assert products("products") - products("none") == 1  # the scores, which "mixed" does not give back
    assert products("layer") > products("products")


# ---------------------------------------------------------------------------------------------- the compiler
def test_the_compilers_sums_are_right():
    """jax-ml/jax#39103: without the flag that configure_xla sets, jaxlib 0.10.2 gets the last rows wrong."""
    x = jnp.stack([jnp.arange(32_769, dtype=jnp.float32), *[jnp.zeros(32_769)] * 2], 1)
    sums = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))(x)
    assert float(sums[-1]) == 32_768.0**2


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_jit_and_eager_gradients_agree_at_real_widths(kind):
    """A local and a global layer as wide as the models': a miscompiled fusion errs by half of a gradient."""
    config = replace(
        tiny_config(kind),
        layers=2,
        width=640,
        heads=4,
        kv_heads=1,
        head_width=256,
        ffn_width=2048,
        vocab=2048,
        window=64,
        global_every=2,
        query_scale=0.0,
    )
    params = {
        name: jnp.ones(shape)
        if name.endswith("norm")
        else jax.random.normal(jax.random.fold_in(jax.random.key(0), i), shape) * shape[-1] ** -0.5
        for i, (name, shape) in enumerate(reference.shapes(config).items())
    }
    ids = random_ids(128, vocab=2048)[None]

    def loss(params):
        logits_TV = unembed(params, forward(params, ids, config)[0], config)[0]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits_TV[:-1]), ids[0, 1:, None], 1).mean()

    jitted = jax.jit(jax.grad(loss))(params)
    with jax.disable_jit():
        plain = jax.grad(loss)(params)
    for name in params:  # roundoff grows by the depth of the sums; a fault by thousands
        assert np.linalg.norm(jitted[name] - plain[name]) < 1e-4 * np.linalg.norm(plain[name]), name
