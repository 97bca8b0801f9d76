"""Kernels of SIMD levels that this CPU may lack, against the plain ones.

AVX-512 is translated to AVX2 by SIMDe, NEON runs on an emulated processor, the tile unit of AMX is imitated
(tiles.h). Quantised products must be equal bit for bit, those of tiles equal to their definition, all else
within its rounding (levels.cpp).

    apt-get install libsimde-dev                            # AVX-512
    apt-get install g++-aarch64-linux-gnu qemu-user         # NEON
"""

import platform
import subprocess
from pathlib import Path

import pytest
from programs import needs_compiler

from codegemma.native import _native


def available(level):
    try:
        return bool(_native.level(level))
    except ValueError:
        return False


TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "codegemma" / "native" / "src"
FLAGS = [
    "-std=c++20",
    "-O1",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wno-psabi",
    f"-I{SOURCES}",
    f"-isystem{TESTS}",
]
SIMDE = Path("/usr/include/simde/x86/avx512.h")
BY_SIMDE = ["-DCG_AVX512", "-mavx2", "-mfma", "-mf16c", "-include", TESTS / "simde_avx512.h"]
BY_CPU = ["-DCG_AVX512", *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni")), *BY_SIMDE[1:4]]
needs_simde = pytest.mark.skipif(
    not SIMDE.exists() or platform.machine() != "x86_64",
    reason="needs an x86-64 processor and SIMDe (apt-get install libsimde-dev)",
)
needs_avx512 = pytest.mark.skipif(not available("avx512"), reason="needs a processor with AVX-512")


def run(*commands):
    """Runs commands in parallel and returns their outputs; fails with the output of the first that fails."""
    started = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for command in commands
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output
    return outputs


def compare(level, directory, compiler, options, runner=(), sources=("kernels", "matrix")):
    """Compiles the kernels as `level` and as plain, links levels.cpp to both, and runs it."""

    def kernels(name, *more, sources=("kernels", "matrix")):
        flags = [*FLAGS, f"-DCG_LEVEL={name}", f'-DCG_LEVEL_NAME="{name}"', *more]
        return [
            [compiler, *flags, "-c", SOURCES / f"{source}.cpp", "-o", directory / f"{name}_{source}.o"]
            for source in sources
        ]

    program = directory / level
    run(
        *kernels("plain"),
        *kernels(level, *options, sources=sources),
        [compiler, *FLAGS, "-c", TESTS / "levels.cpp", f"-DOTHER={level}", "-o", directory / "main.o"],
    )
    run([compiler, "-static", *directory.glob("*.o"), "-o", program])
    return run([*runner, program])[0]


@needs_compiler("g++")
@needs_simde
def test_avx512_equals_plain(tmp_path):
    assert "avx512: " in compare("avx512", tmp_path, "g++", BY_SIMDE)


@needs_compiler("g++")
@pytest.mark.parametrize(
    "options", [pytest.param(BY_CPU, marks=needs_avx512), pytest.param(BY_SIMDE, marks=needs_simde)]
)
def test_amx_equals_its_definition(options, tmp_path):
    imitated = [*options, "-DCG_AMX", "-DCG_IMITATE_TILES"]
    sources = ("kernels", "matrix", "tile_product")
    assert "amx_imitated: " in compare("amx_imitated", tmp_path, "g++", imitated, sources=sources)


@needs_compiler("aarch64-linux-gnu-g++", "qemu-aarch64")  # apt-get install g++-aarch64-linux-gnu qemu-user
def test_neon_equals_plain(tmp_path):
    options = ["-DCG_NEON", "-march=armv8.2-a+dotprod+fp16"]
    assert "neon: " in compare("neon", tmp_path, "aarch64-linux-gnu-g++", options, ["qemu-aarch64"])
