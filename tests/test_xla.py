"""The native products of training against float64 NumPy and against their twins in JAX."""

import dataclasses
import os
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor, row_bytes
from codegemma.native import _native, xla

ROUNDOFF = 2.0**-24
SCALES = {
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "MXFP4": (),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "IQ4_XS": (0,),
}


def weight(type, rows, width, seed=0):
    """Any bytes are quants; scales are halves between 2^-9 and 2^-7 in size, floats are normal."""
    rng = np.random.default_rng(seed)
    if type not in SCALES:
        values = rng.standard_normal((rows, width), np.float32)
        if type == "BF16":
            values = (values.view(np.uint32) >> 16).astype(np.uint16)
        values = values.astype("<f2") if type == "F16" else values
        return ArrayTensor.view(type, (rows, width), values.view(np.uint8))
    blocks = rng.integers(0, 256, (rows, row_bytes(type, width)), np.uint8).reshape(rows, -1, BLOCKS[type][1])
    for offset in SCALES[type]:
        blocks[..., offset + 1] = blocks[..., offset + 1] & 0x83 | 0x1C
    if type == "MXFP4":
        blocks[..., 0] = blocks[..., 0] % 8 + 115
    return ArrayTensor.view(type, (rows, width), blocks)


def exact(tensor):
    """The weight in float64, by the engine's decoder (which test_quantize compares with ggml's)."""
    out = np.empty(tensor.shape, np.float32)
    _native.dequantise("plain", _native.Weight(tensor.type, tensor.data, *tensor.shape), out)
    return out.astype(np.float64)


def inputs(*shape, seed=1):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def close(values, a, b):
    """values = a b to the bound of a float32 sum of n terms in any order: n roundoffs of |a| |b|."""
    bound = (a.shape[-1] + 1) * ROUNDOFF * (np.abs(a) @ np.abs(b))
    np.testing.assert_array_less(np.abs(np.asarray(values, np.float64) - a @ b), bound + 1e-30)


@pytest.fixture(autouse=True)
def default_threads():
    yield
    xla.configure()


@pytest.mark.parametrize("type", BLOCKS)
def test_twin_decodes_as_the_engine(type):
    tensor = weight(type, 5, 768)
    ours = np.asarray(jax.jit(xla.StoredMatrix.float32)(xla.StoredMatrix.of(tensor)))
    np.testing.assert_allclose(ours, exact(tensor), rtol=0, atol=4 * ROUNDOFF * np.abs(ours).max())


def check(type, T, N, K):
    tensor = weight(type, N, K)
    x, dy, w = inputs(T, K), inputs(T, N, seed=2), exact(tensor)
    y, back = jax.vjp(lambda x: xla.product(x, xla.StoredMatrix.of(tensor)), jnp.asarray(x))
    close(y, x, w.T)
    close(back(jnp.asarray(dy))[0], dy, w)


def test_other_devices_take_the_products_of_jax(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(xla, "_call", None)
    check("Q8_0", 5, 7, 64)
    blocks, ids = xla.StoredMatrix.of(tensor := weight("Q8_0", 7, 64)), jnp.array([3, 0])
    np.testing.assert_array_equal(xla.decode_rows(blocks, ids), exact(tensor)[[3, 0]])
    a, b = jnp.asarray(inputs(2, 64)), jnp.asarray(inputs(7, 2))
    assert np.isfinite(xla.adapted(jnp.asarray(inputs(5, 64)), blocks, a, b)).all()


@pytest.mark.parametrize("type", BLOCKS)
def test_products_of_every_type(type):
    check(type, 131, 37, 1280 if BLOCKS[type][0] == 256 else 800 if BLOCKS[type][0] == 32 else 773)


@pytest.mark.parametrize("type", BLOCKS)
def test_products_of_every_type_without_simd(type):
    xla.configure(2, "plain")
    check(type, 5, 301, 512)


@pytest.mark.parametrize("T, N, K", [(1, 1, 32), (7, 300, 32), (320, 17, 544), (3, 4100, 64), (13, 9, 4128)])
def test_products_of_odd_shapes(T, N, K):
    check("Q8_0", T, N, K)


@contextmanager
def computed_by(code):
    """What is traced within is computed by the kernels ("native") or by JAX alone ("xla")."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla, "has_kernels", lambda: code == "native")
        yield


def adapted_case(type, T, N, K, rank):
    tensor = weight(type, N, K)
    return tensor, *map(
        jnp.asarray, (inputs(T, K), inputs(T, N, seed=2), inputs(rank, K, seed=3), inputs(N, rank, seed=4))
    )


@pytest.mark.parametrize("by", ["native", "xla"])
@pytest.mark.parametrize(
    "type, T, N, K, rank",
    [("Q4_0", 131, 37, 96, 8), ("Q6_K", 7, 300, 512, 32), ("F16", 1, 1, 33, 1), ("Q8_0", 300, 4100, 64, 5)],
)
def test_a_layer_with_an_adapter(type, T, N, K, rank, by):
    """Result and gradients of x, a and b against float64, within the error bound of their sums."""
    tensor, x, dy, a, b = adapted_case(type, T, N, K, rank)
    with computed_by(by):
        y, back = jax.vjp(jax.jit(lambda x, a, b: xla.adapted(x, xla.StoredMatrix.of(tensor), a, b)), x, a, b)
    w, (x, dy, a, b) = exact(tensor), (np.asarray(v, np.float64) for v in (x, dy, a, b))
    u, du = x @ a.T, dy @ b
    pairs = [(y, (x, w.T), (u, b.T), (x, a.T, b.T))]
    pairs += [
        (mine, *terms)
        for mine, terms in zip(
            back(jnp.asarray(dy, jnp.float32)),
            (
                ((dy, w), (du, a), (dy, b, a)),
                ((du.T, x), (np.zeros_like(du.T), x), (b.T, dy.T, x)),
                ((dy.T, u), (np.zeros_like(dy.T), u), (dy.T, x, a.T)),
            ),
            strict=True,
        )
    ]
    for mine, base, low_rank, inner in pairs:
        expected = base[0] @ base[1] + low_rank[0] @ low_rank[1]
        sizes = np.abs(base[0]) @ np.abs(base[1]) + np.linalg.multi_dot([np.abs(v) for v in inner])
        bound = (max(T, N, K) + K + N + rank + 2) * ROUNDOFF * sizes
        np.testing.assert_array_less(np.abs(np.asarray(mine, np.float64) - expected), bound + 1e-30)


@pytest.mark.parametrize("by", ["native", "xla"])
@pytest.mark.parametrize("T, N, K", [(1, 1, 33), (131, 37, 96), (300, 523, 64), (7, 300, 4128)])
def test_a_layer_whose_weight_is_trained(T, N, K, by):
    """Result and gradients of x and the weight against float64, within the error bound of their sums."""
    x, dy, w = inputs(T, K), inputs(T, N, seed=2), inputs(N, K, seed=3)
    with computed_by(by):
        y, back = jax.vjp(jax.jit(xla.dense), jnp.asarray(x), jnp.asarray(w))
    dx, dw = back(jnp.asarray(dy))
    x, dy, w = (np.float64(value) for value in (x, dy, w))
    close(y, x, w.T)
    close(dx, dy, w)
    close(dw, dy.T, x)
    with pytest.raises(ValueError, match=f"x has {K} columns, but the weight's shape demands {K + 1}"):
        xla.dense(jnp.zeros((T, K)), jnp.zeros((N, K + 1)))


PAIRS = _native.measure_products(os.environ.get("CODEGEMMA_SIMD", "auto"), _native.Pool(1), True) > 0


def rounded(x):
    """As the kernels see their factors: bfloat16 where the CPU multiplies it, in float64."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16) if PAIRS else x, np.float64)


@pytest.mark.parametrize(
    "type, T, N, K",
    [
        ("Q8_0", 1, 1, 32),
        ("F32", 7, 301, 33),
        ("Q4_0", 13, 9, 4128),
        ("Q6_K", 300, 523, 768),
        ("BF16", 3, 4100, 65),
    ],
)
def test_products_of_bfloat16_factors(type, T, N, K):
    tensor = weight(type, N, K)
    x, dy, w = inputs(T, K), inputs(T, N, seed=2), rounded(exact(tensor))
    with jax.default_matmul_precision("bfloat16"):
        y, back = jax.vjp(lambda x: xla.product(x, xla.StoredMatrix.of(tensor)), jnp.asarray(x))
    close(y, rounded(x), w.T)
    close(back(jnp.asarray(dy))[0], rounded(dy), w)  # as the product was, wherever it is traced


def test_a_trained_layer_of_bfloat16_factors():
    x, dy, w = inputs(131, 96), inputs(131, 37, seed=2), inputs(37, 96, seed=3)
    with jax.default_matmul_precision("bfloat16"):
        y, back = jax.vjp(xla.dense, jnp.asarray(x), jnp.asarray(w))
    dx, dw = back(jnp.asarray(dy))
    close(y, rounded(x), rounded(w).T)
    close(dx, rounded(dy), rounded(w))
    close(dw, rounded(dy).T, rounded(x))


@pytest.mark.parametrize("by", ["native", "xla"])
def test_a_layer_with_an_adapter_of_bfloat16_factors(by):
    """Each of at most two products in a row adds the rounding of its two factors to the float32 result."""
    tensor, x, dy, a, b = adapted_case("Q8_0", 131, 300, 544, 9)
    results = []
    for precision in ("float32", "bfloat16"):
        with jax.default_matmul_precision(precision), computed_by(by):
            y, back = jax.vjp(lambda x, a, b: xla.adapted(x, xla.StoredMatrix.of(tensor), a, b), x, a, b)
        results.append((y, *back(dy)))
    x, dy, a, b, w = (np.abs(np.asarray(v)) for v in (x, dy, a, b, exact(tensor)))
    u, du = x @ a.T, dy @ b
    for exactly, nearly, sizes in zip(
        *results, (x @ w.T + u @ b.T, dy @ w + du @ a, du.T @ x, dy.T @ u), strict=True
    ):
        off = np.abs(exactly - nearly)
        assert (off <= 4.01 * 2.0**-9 * sizes).all()
        assert (off > 0).any() == (PAIRS or by == "xla")


def test_an_adapter_that_does_not_fit_is_refused():
    tensor, x, _, a, b = adapted_case("Q8_0", 3, 40, 64, 4)
    for wrong in ((a[:, :32], b), (a, b[:30]), (a[:2], b)):
        with pytest.raises(Exception, match="an adapter must fit its layer|shape"):
            jax.block_until_ready(xla.adapted(x, xla.StoredMatrix.of(tensor), *wrong))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_equal_for_any_number_of_threads(precision):
    q8, x = (
        xla.StoredMatrix.of(weight("Q8_0", 523, 640)),
        jnp.asarray(inputs(300, 640) * 1e-19),
    )  # some products are denormal
    q8 = dataclasses.replace(
        q8, data=q8.data.at[::2].set(xla.StoredMatrix.of(weight("Q8_0", 523, 640, 5)).data[::2])
    )
    results = []
    for threads in (1, 2, 3, 7):
        xla.configure(threads)
        with jax.default_matmul_precision(precision):
            y, back = jax.vjp(lambda x: xla.product(x, q8), x)
            low, low_back = jax.vjp(
                lambda *args: xla.adapted(args[0], q8, *args[1:]), x, inputs(9, 640), inputs(523, 9)
            )
        parts = [y, back(y * 1e-19)[0], low, *low_back(y)]
        results.append(np.concatenate([np.asarray(part).ravel() for part in parts]).tobytes())
    assert len(set(results)) == 1


def test_a_row_does_not_depend_on_the_others():
    w, x = xla.StoredMatrix.of(weight("Q4_K", 300, 768)), jnp.asarray(inputs(300, 768))
    all_rows = np.asarray(xla.product(x, w))
    for rows in (slice(0, 1), slice(5, 64), slice(290, 300)):
        assert np.asarray(xla.product(x[rows], w)).tobytes() == all_rows[rows].tobytes()


def loss(x, weights, by):
    """A residual stack, as a model would call it: scanned over layers that share one array, checkpointed."""
    stacked, table = weights

    @jax.checkpoint
    def layer(x, i):
        return x + jnp.tanh(xla.product(x, stacked, i * 256, 256)), None

    with computed_by(by):
        x, _ = jax.lax.scan(layer, x, jnp.arange(3))
        chunks = jax.lax.map(lambda i: xla.product(x, table, i * 50, 50).max(), jnp.arange(4))
    return jnp.sum(chunks) + jnp.sum(x**2)


def test_jit_scan_checkpoint_and_chunks_equal_the_twin():
    weights = (
        xla.StoredMatrix.of(weight("Q4_K", 3 * 256, 256)),
        xla.StoredMatrix.of(weight("Q6_K", 200, 256, 9)),
    )
    x = jnp.asarray(inputs(2, 9, 256) / 50)
    step = jax.jit(jax.value_and_grad(loss), static_argnums=2)
    (ours, gradient), (twin, expected) = step(x, weights, "native"), step(x, weights, "xla")
    np.testing.assert_allclose(ours, twin, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_no_copy_of_the_blocks_inside_a_scan():
    weights = (
        xla.StoredMatrix.of(weight("Q4_K", 3 * 256, 256)),
        xla.StoredMatrix.of(weight("Q6_K", 200, 256, 9)),
    )
    compiled = (
        jax.jit(jax.grad(loss), static_argnums=2).lower(jnp.zeros((2, 9, 256)), weights, "native").compile()
    )
    copies = [
        line
        for line in compiled.as_text().splitlines()
        if "= u8[" in line and ("copy(" in line or "dynamic-slice(" in line)
    ]
    assert not copies


def test_sixteen_bit_inputs_keep_their_type_in_the_gradient():
    w = xla.StoredMatrix.of(weight("Q8_0", 40, 64))
    x = jnp.asarray(inputs(3, 64), jnp.bfloat16)
    y, back = jax.vjp(lambda x: xla.product(x, w), x)
    assert y.dtype == jnp.float32 and back(y)[0].dtype == jnp.bfloat16
    assert (y == xla.product(x.astype(jnp.float32), w)).all()


@pytest.mark.parametrize("type", BLOCKS)
def test_rows_by_id(type):
    tensor = weight(type, 40, 256)
    ids = jnp.array([[3, 39, 0], [7, 7, 20]])
    w = xla.StoredMatrix.of(tensor)
    np.testing.assert_array_equal(xla.decode_rows(w, ids), exact(tensor)[ids].astype(np.float32))
    with computed_by("xla"):
        ours = jax.jit(lambda w, ids: xla.decode_rows(w, ids))(w, ids)
    np.testing.assert_allclose(ours, exact(tensor)[ids], rtol=0, atol=4 * ROUNDOFF * np.abs(ours).max())


def test_products_of_a_part_of_the_rows():
    tensor = weight("Q8_0", 40, 64)
    x, dy, w = inputs(3, 64), inputs(3, 7, seed=2), xla.StoredMatrix.of(tensor)
    close(xla.product(jnp.asarray(x), w, 30, 7), x, exact(tensor)[30:37].T)
    close(xla.product_t(jnp.asarray(dy), w, 30, 7), dy, exact(tensor)[30:37])


def test_vmap():
    w, x = xla.StoredMatrix.of(weight("Q8_0", 40, 64)), jnp.asarray(inputs(2, 3, 64))
    assert (jax.vmap(lambda x: xla.product(x, w))(x) == xla.product(x, w)).all()


def test_what_does_not_fit_is_refused():
    w = xla.StoredMatrix.of(weight("Q8_0", 40, 64))
    with pytest.raises(ValueError, match="x has 32 columns, but the weight's shape demands 64"):
        xla.product(jnp.zeros((3, 32)), w)
    with pytest.raises(ValueError, match="dy has 30 columns, but the weight's shape demands 40"):
        xla.product_t(jnp.zeros((3, 30)), w)
    with pytest.raises(Exception, match="rows beyond the weight's"):
        xla.product(jnp.zeros((3, 64)), w, 30, 20).block_until_ready()
    with pytest.raises(Exception, match="rows beyond the weight's"):
        xla.decode_rows(w, jnp.array([40])).block_until_ready()
    with pytest.raises(ValueError, match="threads must be at least 1"):
        xla.configure(-1)


def attention_inputs(heads=(4, 2), T=150, H=24, seed=0):
    """q, k, v, positions and segments of two packed rows."""
    rng = np.random.default_rng(seed)
    q, k, v = (
        jnp.asarray(rng.standard_normal((2, T, n, H)), jnp.float32) for n in (heads[0], heads[1], heads[1])
    )
    segments = np.sort(rng.integers(0, 3, (2, T)), 1)
    positions = np.stack([np.arange(T) - np.searchsorted(row, row) for row in segments])
    return q, k, v, jnp.asarray(positions), jnp.asarray(segments)


def test_attention_is_the_same_for_any_threads():
    """Bit for bit, with its gradients."""
    results = []
    for threads in (1, 2, 5):
        xla.configure(threads)
        out, back = jax.vjp(
            lambda q, k, v: xla.attention(q, k, v, *attention_inputs()[3:], 40, 30.0), *attention_inputs()[:3]
        )
        results.append([np.asarray(x).tobytes() for x in (out, *back(jnp.cos(out)))])
    assert results[0] == results[1] == results[2]


def test_attention_keeps_segments_and_rows_apart():
    """The contents of one change no bit of another, although the blocks of keys then begin elsewhere."""
    q, k, v, positions, segments = attention_inputs(T=400)
    out = np.asarray(xla.attention(q, k, v, positions, segments, None, None))
    mine = np.asarray(segments) == 1
    other = [jnp.where(mine[..., None, None], x, x + 3.0) for x in (q, k, v)]
    changed = np.asarray(xla.attention(*other, positions, segments, None, None))
    assert np.array_equal(out[mine], changed[mine]) and not np.array_equal(out[~mine], changed[~mine])
    row = [x[1:] for x in (q, k, v, positions, segments)]
    assert np.array_equal(out[1:], xla.attention(*row, None, None))


def test_attention_refuses_heads_that_do_not_fit():
    q, k, v, *mask = attention_inputs()
    with pytest.raises(Exception, match="must be a multiple of that of key heads"):
        jax.block_until_ready(xla.attention(q[:, :, :3], k, v, *mask, None, None))
    with pytest.raises(Exception, match="differ in their shapes"):
        jax.block_until_ready(xla.attention(q, k, v[:, :20], *mask, None, None))
