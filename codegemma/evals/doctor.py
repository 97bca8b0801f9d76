"""Is this machine ready to run untrusted programs? Planted attacks, reference programs, the eight languages."""

from __future__ import annotations

import contextlib
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

from codegemma.evals.languages import LANGUAGES, Toolchain
from codegemma.sandbox import Outcome, Sandbox, SandboxError

# Each ends with code 0, as its last statement, exactly if it got what it wanted. SECRET, HOST and MARK are filled in.
ATTACKS: dict[str, tuple[str, tuple[Outcome, ...]]] = {
    "fork bomb": ("import os\nwhile True:\n try: os.fork()\n except OSError: pass", ("timed_out",)),
    "memory bomb": ("x = []\nwhile True: x.append(b'x' * (1 << 24))", ("out_of_memory",)),
    "disk fill": (
        "for i in range(4):\n with open(f'/tmp/{i}', 'wb') as f: f.write(b'x' * (40 << 20))",
        ("failed",),
    ),
    "shared memory fill": (
        "for i in range(4):\n with open(f'/dev/shm/{i}', 'wb') as f: f.write(b'x' * (40 << 20))",
        ("failed",),
    ),
    "endless output": ("while True: print('x' * 4096)", ("output_too_long",)),
    "network": ("import socket\nsocket.create_connection(('127.0.0.1', HOST), 2)", ("failed",)),
    "outside network": (
        "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).connect(('192.0.2.1', 9))",
        ("failed",),
    ),
    "reading the host's files": ("open(SECRET).read()", ("failed",)),
    "reading the shadow file": ("open('/etc/shadow').read()", ("failed",)),
    "seeing other processes": (
        "import os\nassert {p for p in os.listdir('/proc') if p.isdigit()} - {'1', str(os.getpid())}",
        ("failed",),
    ),
    "reading the environment of its parents": ("open('/proc/1/environ').read()", ("failed",)),
    "killing the parent": (
        "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\nassert os.getppid() != 1",
        ("failed",),
    ),
    "leaving a daemon": (
        "import os, sys\nif os.fork() == 0:\n os.setsid()\n sys.stdout.flush()\n"
        " os.execv(sys.executable, ['MARK', '-c', 'import time; time.sleep(600)'])",
        ("passed",),
    ),
    "writing outside": (
        "import os\nok = 0\nfor at in ('/', '/usr', '/etc', '/dev', '/guest.py', '/proc/sys/kernel'):\n"
        " try: open(at if at.endswith('py') else at + '/x', 'w'); ok = 1\n except OSError: pass\n"
        "assert ok",
        ("failed",),
    ),
    "becoming root again": ("import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0", ("failed",)),
    "mounting": (
        "import ctypes\nassert ctypes.CDLL(None).mount(b'x', b'/tmp', b'tmpfs', 0, b'') == 0",
        ("failed",),
    ),
    "inherited descriptors": (
        "import os\nassert set(os.listdir('/proc/self/fd')) - {'0', '1', '2', '3', '4'}",
        ("failed",),
    ),
    "a forged verdict": (
        'print(\'{"outcome": "passed", "exit_code": 0}\')\nraise SystemExit(1)',
        ("failed",),
    ),
    "leaving before the tests": ("import os\nos._exit(0)\nassert False", ("failed",)),
    "leaving by exception": ("raise SystemExit(0)\nassert False", ("failed",)),
    "sleeping": ("import time\ntime.sleep(600)", ("timed_out",)),
}
GOOD = {
    "arithmetic": "assert sum(range(10)) == 45",
    "files": "open('x', 'w').write('y')\nassert open('x').read() == 'y'",
    "a thread": "import threading\nt = threading.Thread(target=print)\nt.start(); t.join()",
    "a child": "import subprocess\nassert subprocess.run(['/bin/true']).returncode == 0",
}


def self_test(sandbox: Sandbox) -> Iterator[tuple[str, bool, str]]:
    """(name, whether the sandbox held, what happened) for good programs and planted attacks."""
    for name, source in GOOD.items():
        result = sandbox.run_python(source, seconds=60)
        yield f"runs {name}", result.outcome == "passed", f"{result.outcome} {result.stderr[-200:]}"
    mark = "codegemma-daemon-" + secrets.token_hex(8)
    with tempfile.NamedTemporaryFile("w") as file, _listener() as port:
        file.write("secret")
        file.flush()
        for name, (source, expected) in ATTACKS.items():
            source = (
                source.replace("SECRET", repr(file.name)).replace("HOST", str(port)).replace("MARK", mark)
            )
            result = sandbox.run_python(source, seconds=20 if "memory" in name or "fill" in name else 2)
            held = result.outcome in expected and not (name == "leaving a daemon" and _alive(mark))
            yield f"stops {name}", held, f"{result.outcome} {result.stderr[-200:]}"


@contextlib.contextmanager
def _listener() -> Iterator[int]:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def _alive(mark: str) -> bool:
    """Whether any process of this machine carries the mark in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().startswith(mark.encode()):
                return True
    return False


def require(sandbox: Sandbox) -> None:
    """Raises SandboxError unless the self-test holds: nothing is scored in a sandbox that leaks."""
    broken = [f"{name} ({said.strip()})" for name, held, said in self_test(sandbox) if not held]
    if broken:
        raise SandboxError(f"the sandbox failed its self-test: {'; '.join(broken)}. Nothing was run in it")


def languages() -> Iterator[tuple[str, bool, str]]:
    """(language, ready, version or what to install): its right program passes, its wrong and its broken one fail."""
    for key, language in LANGUAGES.items():
        try:
            chain = Toolchain.find(key)
            programs = [language.proof.replace("OP", word) for word in ("+", "-", "+ +* (")]
            results = dict(chain.run_all(programs, seconds=60))
            chain.sandbox.close()
            said = [
                results[i].outcome == "passed" and "TEST-0...PASSED" in results[i].stdout for i in range(3)
            ]
            ready = said == [True, False, False]
            yield (
                key,
                ready,
                chain.version
                if ready
                else f"{chain.version}: its right, wrong and broken programs "
                f"were judged {said}: {results[0].stderr[-300:]}",
            )
        except (LookupError, SandboxError) as error:
            yield key, False, str(error)
