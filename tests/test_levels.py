"""Kernels of SIMD levels that this CPU may lack, against the plain ones.

AVX-512 and AVX-VNNI are translated to AVX2 by SIMDe, NEON runs on an emulated processor. Quantised products must be equal
bit for bit, all else within its rounding (levels.cpp).

    apt-get install libsimde-dev                            # AVX-512, AVX-VNNI
    apt-get install g++-aarch64-linux-gnu qemu-user         # NEON
"""

import platform
import subprocess
from pathlib import Path

import pytest
from programs import needs_compiler

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


def compare(level, directory, compiler, options, runner=()):
    """Compiles the kernels as `level` and as plain, links levels.cpp to both, and runs it."""

    def kernels(name, *more):
        flags = [*FLAGS, f"-DCG_LEVEL={name}", f'-DCG_LEVEL_NAME="{name}"', *more]
        return [
            [compiler, *flags, "-c", SOURCES / f"{source}.cpp", "-o", directory / f"{name}_{source}.o"]
            for source in ("kernels", "matrix")
        ]

    program = directory / level
    run(
        *kernels("plain"),
        *kernels(level, *options),
        [compiler, *FLAGS, "-c", TESTS / "levels.cpp", f"-DOTHER={level}", "-o", directory / "main.o"],
    )
    run([compiler, "-static", *directory.glob("*.o"), "-o", program])
    return run([*runner, program])[0]


@needs_compiler("g++")
@pytest.mark.skipif(
    not SIMDE.exists() or platform.machine() != "x86_64",
    reason="needs an x86-64 processor and SIMDe (apt-get install libsimde-dev)",
)
@pytest.mark.parametrize("level, defined", [("avxvnni", ["-DCG_AVX2", "-DCG_AVXVNNI"]), ("avx512", ["-DCG_AVX512"])])
def test_levels_of_x86_equal_plain(level, defined, tmp_path):
    options = [*defined, "-mavx2", "-mfma", "-mf16c", "-include", TESTS / "simde_avx512.h"]
    assert f"{level}: " in compare(level, tmp_path, "g++", options)


@needs_compiler("aarch64-linux-gnu-g++", "qemu-aarch64")  # apt-get install g++-aarch64-linux-gnu qemu-user
def test_neon_equals_plain(tmp_path):
    options = ["-DCG_NEON", "-march=armv8.2-a+dotprod+fp16"]
    assert "neon: " in compare("neon", tmp_path, "aarch64-linux-gnu-g++", options, ["qemu-aarch64"])
