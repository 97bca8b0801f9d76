"""Kernels of SIMD levels that this CPU may lack, against the plain ones.

AVX-512 and AVX-VNNI are translated to AVX2 by SIMDe, the levels of ARM run on emulated processors. Quantised
products must be equal bit for bit, all else within its rounding (levels.cpp).

    apt-get install libsimde-dev                            # AVX-512, AVX-VNNI
    apt-get install g++-aarch64-linux-gnu qemu-user         # ARM
"""

import platform
import re
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


def compile_kernels(level, directory, compiler, options=()):
    """The commands that compile the kernels as one level."""
    flags = [*FLAGS, f"-DCG_LEVEL={level}", f'-DCG_LEVEL_NAME="{level}"', *options]
    return [
        [compiler, *flags, "-c", SOURCES / f"{source}.cpp", "-o", directory / f"{level}_{source}.o"]
        for source in ("kernels", "matrix")
    ]


def compare(level, directory, compiler, options):
    """Compiles the kernels as `level` and as plain, links levels.cpp to both, and runs it."""
    program = directory / level
    run(
        *compile_kernels("plain", directory, compiler),
        *compile_kernels(level, directory, compiler, options),
        [compiler, *FLAGS, "-c", TESTS / "levels.cpp", f"-DOTHER={level}", "-o", directory / "main.o"],
    )
    run([compiler, "-static", *directory.glob("*.o"), "-o", program])
    return run([program])[0]


@needs_compiler("g++")
@pytest.mark.skipif(
    not SIMDE.exists() or platform.machine() != "x86_64",
    reason="needs an x86-64 processor and SIMDe (apt-get install libsimde-dev)",
)
@pytest.mark.parametrize(
    "level, defined", [("avxvnni", ["-DCG_AVX2", "-DCG_AVXVNNI"]), ("avx512", ["-DCG_AVX512"])]
)
def test_levels_of_x86_equal_plain(level, defined, tmp_path):
    options = [*defined, "-mavx2", "-mfma", "-mf16c", "-include", TESTS / "simde_avx512.h"]
    assert f"{level}: " in compare(level, tmp_path, "g++", options)


@pytest.fixture(scope="module")
def program_for_arm(tmp_path_factory):
    """levels.cpp with all levels of ARM, each compiled with its own flags as in a build."""
    directory, compiler = tmp_path_factory.mktemp("arm"), "aarch64-linux-gnu-g++"
    levels = re.findall(r"add_level\((neon\w*) (.+)\)", (TESTS.parent / "CMakeLists.txt").read_text())
    sources = [TESTS / "levels.cpp", SOURCES / "program.cpp", SOURCES / "pool.cpp"]
    commands = compile_kernels("plain", directory, compiler)
    for level, options in levels:
        commands += compile_kernels(level, directory, compiler, options.split())
    commands += [[compiler, *FLAGS, "-c", path, "-o", directory / f"{path.stem}.o"] for path in sources]
    for i in range(0, len(commands), 2):
        run(*commands[i : i + 2])
    run([compiler, "-static", *directory.glob("*.o"), "-o", directory / "levels"])
    return directory / "levels"


@needs_compiler("aarch64-linux-gnu-g++", "qemu-aarch64")  # apt-get install g++-aarch64-linux-gnu qemu-user
@pytest.mark.parametrize(
    "processor, level",
    [("cortex-a53", "neon"), ("cortex-a72", "neon"), ("cortex-a76", "neondot"), ("max", "neoni8mm")],
)
def test_levels_of_arm_are_chosen_and_equal_plain(processor, level, program_for_arm):
    """A processor that meets an instruction it lacks ends the program."""
    assert run(["qemu-aarch64", "-cpu", processor, program_for_arm])[0].startswith(f"{level}: ")
