"""Tests whether this machine can run untrusted programs: with attacks, good programs and eight languages."""

from __future__ import annotations

import contextlib
import secrets
import socket
import tempfile
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from codegemma.evals.languages import LANGUAGES, Toolchain
from codegemma.sandbox import Sandbox, SandboxError


@dataclass(frozen=True)
class Attack:
    """A program that tries to do harm, and the outcomes that show that it could not; see attacks.toml."""

    program: str
    expected: tuple[str, ...]


_PROGRAMS = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text("utf-8"))
GOOD: dict[str, str] = _PROGRAMS["good"]
ATTACKS = {name: Attack(a["program"], tuple(a["expected"])) for name, a in _PROGRAMS["attacks"].items()}


def self_test(sandbox: Sandbox) -> Iterator[tuple[str, bool, str]]:
    """Yields (name, whether the sandbox held, what happened) for each good program and each attack."""
    for name, program in GOOD.items():
        result = sandbox.run_python(program, seconds=60)
        yield f"runs {name}", result.outcome == "passed", f"{result.outcome} {result.stderr[-200:]}"
    mark = "codegemma-daemon-" + secrets.token_hex(8)
    with tempfile.NamedTemporaryFile("w") as file, _listener() as port:
        file.write("secret")
        file.flush()
        for name, attack in ATTACKS.items():
            program = attack.program.replace("SECRET", repr(file.name))
            program = program.replace("PORT", str(port)).replace("MARK", mark)
            seconds = 20 if "memory" in name or "fill" in name else 2
            result = sandbox.run_python(program, seconds=seconds)
            held = result.outcome in attack.expected and not (name == "leaving a daemon" and _alive(mark))
            yield f"stops {name}", held, f"{result.outcome} {result.stderr[-200:]}"


@contextlib.contextmanager
def _listener() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _alive(mark: str) -> bool:
    """Whether a process of this machine has a command line that starts with `mark`."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(mark.encode()):
                return True
    return False


def require_safe(sandbox: Sandbox) -> None:
    """Raises SandboxError unless the self-test passes, so that nothing is scored in a sandbox that leaks."""
    broken = [f"{name} ({message.strip()})" for name, held, message in self_test(sandbox) if not held]
    if broken:
        fault = f"the sandbox failed its self-test: {'; '.join(broken)}. No answer was run in it"
        raise SandboxError(f"{fault}: mend it until codegemma eval doctor passes, or use another machine")


def languages() -> Iterator[tuple[str, bool, str]]:
    """Yields (language, whether it is ready, version or what to do) for each language.

    A language is ready if a right program passes, and a wrong one and one that does not compile fail.
    """
    for key in LANGUAGES:
        try:
            toolchain = Toolchain.find_working(key)
        except (LookupError, SandboxError) as error:
            yield key, False, str(error)
        else:
            toolchain.sandbox.close()
            yield key, True, toolchain.version
