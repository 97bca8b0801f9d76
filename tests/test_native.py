"""Each kernel against its slow twin, on every SIMD level that this CPU has.

Quantised products equal numerics v1 written in NumPy bit for bit, on every level and for any number of tokens
at once; those of level amx equal numerics v2. Float products lie within the error bound of a sum in any
order. Complete programs are compared with the float64 model by other tests.
"""

import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny import (
    SCALES,
    dequantize,
    encode,
    get_scales,
    put_scales,
    random_blocks,
    tiny_config,
    write_tiny_gguf,
)

from codegemma import native
from codegemma.checkpoints.tensors import BLOCKS, ArrayTensor
from codegemma.native import _native

QUANTISED = [type for type in _native.TYPES if BLOCKS[type][0] > 1]
F32 = np.float32
ROUNDOFF = 2.0**-24


def available(level):
    try:
        return bool(_native.level(level))
    except ValueError:
        return False


LEVELS = [
    level
    for level in ("plain", "avx2", "avxvnni", "avx512", "neon", "neondot", "neoni8mm")
    if available(level)
]
TILES = [level for level in ("amx", "amx-imitated") if available(level)]  # numerics v2 (test_tiles.py)
POOLS = {threads: _native.Pool(threads) for threads in (1, 2)}


def weight(tensor):
    return _native.Weight(tensor.type, tensor.data.reshape(-1), *tensor.shape)


def multiply(tensor, x_TK, level, threads=1):
    out_TR = np.full((len(x_TK), tensor.shape[0]), np.nan, F32)
    _native.multiply(level, POOLS[threads], weight(tensor), x_TK, out_TR)
    return out_TR


# ------------------------------------------------------------------------------------- numerics v1 in NumPy
def quantised(x_TK, block):
    """Integers int64 [T, blocks, block] and scales float32 [T, blocks]: half to even, maximum 127."""
    x = x_TK.reshape(len(x_TK), -1, block)
    top = np.abs(x).max(-1)
    inverse = np.divide(F32(127), top, out=np.zeros_like(top), where=top > 0)
    return np.rint(x * inverse[..., None]).astype(np.int64), top / F32(127)


def integers(tensor, *scales):
    """int64 [rows, blocks, block]: the values of a tensor with the scales of its blocks replaced."""
    blocks = tensor.data.reshape(-1, BLOCKS[tensor.type][1]).copy()
    for offset, scale in zip(SCALES[tensor.type][0], scales, strict=True):
        put_scales(tensor.type, blocks, offset, np.array([scale]))
    values = dequantize(ArrayTensor(tensor.type, tensor.shape, blocks))
    return values.astype(np.int64).reshape(len(values), -1, BLOCKS[tensor.type][0])


def folded(terms_TRB):
    """Eight chains by block index, each summed in ascending order, folded ((0+1)+(2+3))+((4+5)+(6+7))."""
    T, R, B = terms_TRB.shape
    chains = np.zeros((8, T, R), F32)
    for b in range(B):
        chains[b % 8] += terms_TRB[:, :, b]
    a, b, c, d, e, f, g, h = chains
    return ((a + b) + (c + d)) + ((e + f) + (g + h))


def twin(tensor, x_TK):
    """x W^T by numerics v1: a float term of each block's scale, and one of its minimum if the type has it."""
    size, bytes_ = BLOCKS[tensor.type]
    q_TBi, dx_TB = quantised(x_TK, size)
    blocks_RB, dx_T1B = tensor.data.reshape(tensor.shape[0], -1, bytes_), dx_TB[:, None]

    def term(offset, *unit):
        total_TRB = np.einsum("tbi,rbi->trb", q_TBi, integers(tensor, *unit))
        return total_TRB.astype(F32) * (get_scales(tensor.type, blocks_RB, offset) * dx_T1B)

    offsets = SCALES[tensor.type][0]
    return folded(term(*offsets, 1) if len(offsets) == 1 else term(offsets[0], 1, 0) + term(offsets[1], 0, 1))


# ------------------------------------------------------------------------------------------------ products
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", QUANTISED)
@pytest.mark.parametrize("rows, blocks", [(1, 1), (7, 9), (37, 5), (133, 17)])
def test_quantised_products_equal_numerics_v1(type, level, rows, blocks):
    size = BLOCKS[type][0]
    columns = blocks * size if size == 32 else min(blocks, 9) * size
    tensor = random_blocks(type, (rows, columns), 1.0, seed=rows)
    x_TK = np.random.default_rng(blocks).standard_normal((40, columns)).astype(F32) * 3
    x_TK[3] = 0  # a scale of zero
    x_TK[5, :size] = np.arange(size) - size / 2 + 0.5  # halves, which go to the even number
    expected = twin(tensor, x_TK)
    for T in (*range(1, 20), 31, 32, 33, 40):
        product = multiply(tensor, x_TK[:T], level, threads=1 + T % 2)
        assert product.tobytes() == expected[:T].tobytes(), f"{T} tokens"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", QUANTISED)
@pytest.mark.parametrize("byte", [0x00, 0x0F, 0x7F, 0x80, 0xAA, 0xFF])
def test_extreme_blocks_do_not_overflow(type, level, byte):
    """All quants, scales and activations are extreme at once: sums in int16 would be the first to wrap."""
    tensor = random_blocks(type, (8, 512), 1.0, seed=byte)
    blocks = tensor.data.reshape(-1, BLOCKS[type][1])
    keep = {offset: get_scales(type, blocks, offset) for offset in SCALES[type][0]}
    blocks[:] = byte
    for offset, scales in keep.items():
        put_scales(type, blocks, offset, scales)
    x_TK = np.ones((24, 512), F32) * np.array([1, -1, 1e30, -1e-30], F32).repeat(6)[:, None]
    x_TK[::3, ::2] *= -1
    expected = twin(tensor, x_TK)
    assert np.isfinite(expected).all()
    for T in (1, 2, 5, 6, 24):
        assert multiply(tensor, x_TK[:T], level).tobytes() == expected[:T].tobytes(), f"{T} tokens"


# ------------------------------------------------------------------------------------- numerics v2 in NumPy
def bfloat16(x):
    """float64, rounded to 8 bits of mantissa, half to even; denormals of float32 are zero."""
    mantissa, exponent = np.frexp(np.asarray(x, F32).astype(np.float64))
    return flushed(np.ldexp(np.rint(np.ldexp(mantissa, 8)), exponent - 8))


def flushed(x):
    return np.where(np.abs(x) < 2.0**-126, np.copysign(0.0, x), x)


def tile_twin(tensor, x_TK):
    """x W^T by 32 members of a sum at a time: even and odd ones are summed by fused multiply-adds, both sums
    are added, and the result is added to the sum so far. A product of two bfloat16 is exact in float64."""

    def rounded(total):
        return flushed(total.astype(F32).astype(np.float64))

    K = -(-x_TK.shape[1] // 32) * 32
    x_KT1, w_K1R = np.zeros((K, len(x_TK), 1)), np.zeros((K, 1, tensor.shape[0]))
    x_KT1[: x_TK.shape[1], :, 0], w_K1R[: x_TK.shape[1], 0] = bfloat16(x_TK).T, bfloat16(dequantize(tensor)).T
    total = 0.0
    for k in range(0, K, 32):
        even, odd = 0.0, 0.0
        for i in range(k, k + 32, 2):
            even, odd = rounded(even + x_KT1[i] * w_K1R[i]), rounded(odd + x_KT1[i + 1] * w_K1R[i + 1])
        total = rounded(total + rounded(even + odd))
    return total.astype(F32)


@pytest.mark.parametrize("level", TILES)
@pytest.mark.parametrize("type", [type for type in _native.TYPES if type != "F32"])
@pytest.mark.parametrize("rows, blocks", [(1, 1), (37, 5), (133, 27)])
def test_tile_products_equal_numerics_v2(type, level, rows, blocks):
    size = BLOCKS[type][0]
    columns = {1: 37 * blocks, 32: 32 * blocks, 256: 256 * min(blocks, 9)}[size]
    rng = np.random.default_rng(rows)
    tensor = (
        random_blocks(type, (rows, columns), 1.0, rows)
        if size > 1
        else encode(rng.standard_normal((rows, columns)), type)
    )
    x_TK = rng.standard_normal((75, columns)).astype(F32) * 3
    x_TK[3], x_TK[4], x_TK[5] = 0, x_TK[4] * F32(2.0**-122), x_TK[5] * F32(2.0**100)
    expected = tile_twin(tensor, x_TK)
    for T in (*range(1, 8), 15, 16, 17, 31, 32, 33, 48, 49, 75):
        product = multiply(tensor, x_TK[:T], level, threads=1 + T % 2)
        assert product.tobytes() == expected[:T].tobytes(), f"{T} tokens"


# ------------------------------------------------------------------------------------- products of floats
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rows, columns", [(1, 1), (5, 3), (33, 76), (64, 259), (131, 512)])
def test_float_products_within_the_bound_of_any_order(type, level, rows, columns):
    """A sum of K products in any order errs by at most K u / (1 - K u) * |x| . |w| (Higham, section 3.1)."""
    rng = np.random.default_rng(rows)
    tensor = encode(rng.standard_normal((rows, columns)), type)
    x_TK = rng.standard_normal((23, columns)).astype(F32)
    exact, sizes = (
        f(x_TK).astype(np.float64) @ f(tensor.float32()).astype(np.float64).T for f in (np.asarray, np.abs)
    )
    bound = columns * ROUNDOFF / (1 - columns * ROUNDOFF) * sizes
    all_tokens = multiply(tensor, x_TK, level)
    assert (np.abs(all_tokens - exact) <= bound).all()
    for T in range(1, 24):
        assert multiply(tensor, x_TK[:T], level, threads=1 + T % 2).tobytes() == all_tokens[:T].tobytes()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", _native.TYPES)
def test_dequantise_equals_the_plain_decoder(type, level):
    """Both round the exact value once: a half times the small integers of a block fits into float32."""
    columns = 768 if BLOCKS[type][0] > 1 else 77
    tensor = encode(np.random.default_rng(1).standard_normal((9, columns)), type, seed=2)
    out = np.full(tensor.shape, np.nan, F32)
    _native.dequantise(level, weight(tensor), out)
    assert np.array_equal(out, dequantize(tensor))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", QUANTISED)
def test_any_bytes_are_decoded_as_by_the_gguf_package(type, level):
    """Bit for bit, the signs of zeros too, with scales that are denormal, huge, infinite and no numbers."""
    weights, size = BLOCKS[type]
    raw = np.random.default_rng(2).integers(0, 256, (67, 9 * size), np.uint8)
    tensor, out = ArrayTensor(type, (67, 9 * weights), raw), np.empty((67, 9 * weights), F32)
    _native.dequantise(level, weight(tensor), out)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = dequantize(tensor)
    numbers = ~np.isnan(expected)
    assert out[numbers].tobytes() == expected[numbers].tobytes() and np.isnan(out[~numbers]).all()


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_is_read_exactly(level):
    """All finite float16 values, denormals too."""
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[np.isfinite(every.view("<f2"))]
    tensor = ArrayTensor("F16", (1, len(every)), every.view(np.uint8).reshape(1, -1))
    out = np.empty((1, len(every)), F32)
    _native.dequantise(level, weight(tensor), out)
    assert out.tobytes() == every.view("<f2").astype(F32).tobytes()


# ----------------------------------------------------------------------------------------- the Python binding
def test_limits_of_the_machine_are_plausible():
    bandwidth, operations = native.measure(1, "auto")
    assert 1e8 < bandwidth < 1e13 and 1e8 < operations < 1e15


@pytest.mark.parametrize(
    "type, columns, size, message",
    [
        ("Q4_0", 31, 18, "multiple of 32"),
        ("Q4_K", 32, 144, "multiple of 256"),
        ("Q4_0", 32, 17, "takes 18 bytes, got"),
        ("IQ2_XXS", 256, 66, "no kernel for weights of type IQ2_XXS"),
        ("F32", 0, 0, "multiple of 1"),
    ],
)
def test_weights_of_wrong_size_are_refused(type, columns, size, message):
    with pytest.raises(ValueError, match=message):
        _native.Weight(type, np.zeros(size, np.uint8), 1, columns)


def test_a_level_that_the_cpu_lacks_is_refused():
    with pytest.raises(ValueError, match=r"'sse9'.*has: .*plain.*CODEGEMMA_SIMD"):
        _native.level("sse9")
    assert _native.level("auto") == ("amx" if "amx" in TILES else LEVELS[-1])


@pytest.mark.skipif("amx" in TILES, reason="this process can use level amx")
def test_level_amx_is_refused_with_the_reason():
    assert native.why_no_amx()
    with pytest.raises(ValueError, match=rf"'amx'.* \({re.escape(native.why_no_amx())}\), which has: "):
        _native.level("amx")
    flags = Path("/proc/cpuinfo").read_text() if platform.system() == "Linux" else ""
    if platform.machine() == "x86_64" and flags and "amx_tile" not in flags:
        assert native.why_no_amx() == "this CPU has no AMX"


def test_a_process_waits_for_the_huge_pages_at_its_end(tmp_path):
    """A daemon thread that is inside native code when the interpreter ends aborts the process."""
    model, mark = tmp_path / "model.gguf", tmp_path / "mark"
    write_tiny_gguf(model, tiny_config("gemma-mqa"))
    program = f"""
import pathlib, time
import codegemma
from codegemma.native import HUGE_PAGES_AFTER, Native, Slice

Native.use_huge_pages = lambda self: (time.sleep(1), pathlib.Path({str(mark)!r}).write_text("done"))
backend = codegemma.load({str(model)!r}).backend
pages = [backend.new_page() for _ in range(-(-HUGE_PAGES_AFTER // 64))]
for i in range(HUGE_PAGES_AFTER):
    backend.run([Slice([2], i, pages, 1, None)])
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert mark.read_text() == "done"
