"""Starts boxes (bubblewrap) and sends them jobs. `Limits` states a job's limits, `Result` how it ended.

How a program ended is a value (`Result.outcome`); a sandbox that fails raises SandboxError, and no program is
ever run outside it. Boxes are kept warm: each is one bubblewrap with an interpreter (guest.py) that forks a
jailed process per job, so a Python program starts in a few milliseconds.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import platform
import queue
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

from codegemma.sandbox.cgroup import Cgroup

Outcome = Literal["passed", "failed", "timed_out", "out_of_memory", "output_too_long"]
GUEST = Path(__file__).with_name("guest.py")
GRACE_SECONDS = 300.0  # a box that has not answered this long after its job's time limit is broken
# After so many broken boxes EMPTY_JOB runs: if it breaks too, the sandbox is at fault, else the job.
TRIES = 3
EMPTY_JOB = {"source": "", "command": [], "must_finish": True, "collect": [], "files": {}, "env": {}}
# Folders and files of the host that each box can read, besides /usr and those that it is given.
SYSTEM = "/bin /sbin /lib /lib32 /lib64 /libx32 /etc/alternatives /etc/ld.so.cache /etc/mono /etc/localtime"
ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/tmp", "TMPDIR": "/tmp", "LANG": "C.UTF-8"}
# The guest needs capabilities to mount a job's folder; it drops them before it runs the program.
ISOLATION = """--unshare-all --unshare-user --uid 1000 --gid 1000 --hostname sandbox --new-session
    --cap-add ALL --clearenv --setenv PYTHONHASHSEED 0 --setenv LANG C.UTF-8"""
# Mounted after all else; nothing but the private folders can be written then.
FOLDERS = """--symlink /proc/self/fd /dev/fd --dir /dev/shm --tmpfs /tmp --remount-ro /dev --remount-ro /"""
DEVICES = ("null", "zero", "full", "random", "urandom")
NO_MEMORY = ("MemoryError", "std::bad_alloc", "OutOfMemory", "out of memory", "cannot allocate")  # in stderr
INSTALL = "install it (Debian, Ubuntu: apt-get install bubblewrap; Fedora: dnf install bubblewrap)"


class SandboxError(RuntimeError):
    """The sandbox itself failed, so nothing is known of the program, which must not be scored."""


@dataclass(frozen=True)
class Limits:
    """Limits of one job, in bytes and seconds. `seconds` is wall time; `cpu_seconds` 0 means twice it."""

    seconds: float = 10.0
    cpu_seconds: int = 0
    memory: int = 512 << 20
    disk: int = 64 << 20  # for the private folder, for one file, and for all that is collected
    processes: int = 64  # and threads
    open_files: int = 256
    output: int = 1 << 20  # stdout and stderr together

    def __post_init__(self) -> None:
        smallest = {"cpu_seconds": 0, "seconds": 1e-6}
        if wrong := {name: value for name, value in asdict(self).items() if value < smallest.get(name, 1)}:
            raise ValueError(f"sandbox limits must be positive, got {wrong}")


@dataclass(frozen=True)
class Result:
    """How a program ended. `exit_code` is the program's, or minus the number of the signal that ended it, or
    None if the sandbox killed it."""

    outcome: Outcome
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float
    files: dict[str, bytes] = field(default_factory=dict, repr=False)


class Box:
    """One warm bubblewrap: jobs go in as JSON lines, replies come out."""

    def __init__(self, readonly: Sequence[Path], use_cgroups: bool) -> None:
        command = _bubblewrap(readonly)
        self.cgroup = _cgroup(use_cgroups)
        with tempfile.TemporaryFile() as errors:
            self.process = subprocess.Popen(
                self.cgroup.joining(command) if self.cgroup else command,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            assert self.process.stdin and self.process.stdout
            self._jobs, self._replies = self.process.stdin, self.process.stdout
            try:
                self._read(GRACE_SECONDS)
            except SandboxError as error:
                self.close()
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip() or str(error)
                raise SandboxError(
                    f"bubblewrap cannot make a sandbox here: {reason}\nIt needs user namespaces: on Ubuntu "
                    "24.04 allow bwrap in AppArmor or set kernel.apparmor_restrict_unprivileged_userns=0; in "
                    "a container, start it with --security-opt seccomp=unconfined"
                ) from error

    def run(self, job: dict[str, Any], limits: Limits) -> Result:
        """Runs a job. Raises SandboxError where the box itself failed; it must then be closed."""
        kills_before = 0
        cpu_seconds = limits.cpu_seconds or int(2 * limits.seconds) + 1
        bounds = asdict(limits) | {"cpu_seconds": cpu_seconds, "guest_memory": limits.memory}
        if self.cgroup:
            self.cgroup.limit(limits.memory, limits.processes)
            kills_before = self.cgroup.kills()
            bounds |= {"guest_memory": None, "processes": None}
        try:
            self._jobs.write(json.dumps(job | {"limits": bounds}).encode() + b"\n")
            self._jobs.flush()
        except OSError as error:
            raise SandboxError(f"the sandbox has ended: {error}") from error
        reply, content = self._read(limits.seconds + GRACE_SECONDS)
        if "error" in reply:
            raise SandboxError(f"the sandbox failed inside: {reply['error']}")
        outcome = reply["outcome"]
        killed = self.cgroup.kills() > kills_before if self.cgroup else reply["peak"] > 0.9 * limits.memory
        if outcome == "failed" and (killed or any(text in reply["stderr"][-2000:] for text in NO_MEMORY)):
            outcome = "out_of_memory"
        ends = accumulate(reply["files"].values())
        sizes = zip(reply["files"].items(), ends, strict=True)
        files = {name: content[end - size : end] for (name, size), end in sizes}
        return Result(outcome, reply["exit_code"], reply["stdout"], reply["stderr"], reply["seconds"], files)

    def _read(self, seconds: float) -> tuple[dict[str, Any], bytes]:
        """The next reply and the bytes of its files. Raises SandboxError where none comes in time."""
        deadline, data = time.monotonic() + seconds, bytearray()
        reply: dict[str, Any] | None = None
        while True:
            if reply is None and (end := data.find(b"\n")) >= 0:
                try:
                    reply = json.loads(data[:end])
                except ValueError as error:
                    raise SandboxError(f"the sandbox's answer is not JSON: {error}") from error
                del data[: end + 1]
            if reply is not None and len(data) >= sum(reply.get("files", {}).values()):
                return reply, bytes(data)
            if not select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise SandboxError(f"the sandbox did not answer within {seconds:.0f} s")
            chunk = os.read(self._replies.fileno(), 1 << 20)
            if not chunk:
                raise SandboxError("the sandbox ended without an answer")
            data += chunk

    def close(self) -> None:
        self.process.kill()
        with contextlib.suppress(OSError), self.process:  # closes the pipes and waits for the end
            pass
        if self.cgroup:
            self.cgroup.close()


def _cgroup(use_cgroups: bool) -> Cgroup | None:
    with contextlib.suppress(OSError):
        if use_cgroups:
            return Cgroup()
    if os.geteuid() == 0:  # the kernel never counts root's processes against RLIMIT_NPROC
        raise SandboxError(
            "a sandbox of root cannot limit the number of processes, because no control group can be created "
            "here: run as an ordinary user"
        )
    return None


def _bubblewrap(readonly: Sequence[Path]) -> list[str]:
    """The command of a box, which sees the system's folders and the `readonly` ones."""
    if platform.system() != "Linux":
        raise SandboxError(
            f"untrusted code is run in bubblewrap, which needs Linux, not {platform.system()}: use a Linux "
            "machine, virtual machine or container"
        )
    if not (bwrap := shutil.which("bwrap")):
        raise SandboxError(
            f"bubblewrap (bwrap) is not on PATH, and nothing untrusted is run without it: {INSTALL}"
        )
    command = [bwrap, *ISOLATION.split(), "--ro-bind", "/usr", "/usr"]
    for path in (*map(Path, SYSTEM.split()), *Path("/etc").glob("java*")):
        if path.is_symlink() and path.parent == Path("/"):
            command += ["--symlink", os.readlink(path), str(path)]
        elif path.exists():
            command += ["--ro-bind", str(path), str(path)]
    for path in (Path(sys.base_prefix).resolve(), *readonly):
        if not path.is_relative_to("/usr"):
            command += ["--ro-bind", str(path), str(path)]
    command += ["--ro-bind", str(GUEST), "/guest.py", "--proc", "/proc", "--tmpfs", "/dev"]
    for device in DEVICES:
        command += ["--dev-bind", f"/dev/{device}", f"/dev/{device}"]
    python = Path(sys._base_executable).resolve()  # type: ignore[attr-defined]
    return [*command, *FOLDERS.split(), "--", str(python), "-S", "-P", "/guest.py"]


class Sandbox:
    """A pool of at most `workers` warm boxes, one for each job at a time. Safe to share between threads.

    Programs can read the system's folders and the `readonly` ones.
    """

    def __init__(
        self, readonly: Sequence[Path | str] = (), workers: int | None = None, *, use_cgroups: bool = True
    ) -> None:
        self.readonly = [Path(path).absolute() for path in readonly]
        self.workers = workers or os.cpu_count() or 1
        self.use_cgroups = use_cgroups
        self._idle: queue.SimpleQueue[Box] = queue.SimpleQueue()
        self._slots = threading.Semaphore(self.workers)
        self._at_exit = weakref.finalize(self, _close_all, self._idle)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        _close_all(self._idle)

    def run_python(
        self,
        source: str,
        *,
        files: Mapping[str, str | bytes] | None = None,
        must_finish: bool = True,
        limits: Limits | None = None,
        **bounds: Any,
    ) -> Result:
        """Run `source` as __main__, with this interpreter and its standard library.

        Installed packages cannot be imported.

        `passed` means exit code 0 and, with `must_finish`, that the last statement was reached: a program
        that leaves early with code 0 has `failed`. `bounds` are fields of Limits.
        """
        job = {"source": source, "command": [], "must_finish": must_finish, "collect": [], "env": {}}
        return self._run(job, files or {}, limits or Limits(**bounds))

    def run(
        self,
        command: Sequence[str],
        files: Mapping[str, str | bytes] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        collect: Sequence[str] = (),
        limits: Limits | None = None,
        **bounds: Any,
    ) -> Result:
        """Run `command` in a private folder that holds `files`; `passed` means exit code 0.

        `collect` names files or folders to hand back in `Result.files`. `bounds` are fields of Limits.
        """
        if not command:
            raise ValueError("sandbox: command is empty: give the program's name and arguments")
        job: dict[str, Any] = {"source": None, "command": list(command), "must_finish": False}
        job |= {"collect": list(collect), "env": dict(env or {})}
        return self._run(job, files or {}, limits or Limits(**bounds))

    def _run(self, job: dict[str, Any], files: Mapping[str, str | bytes], limits: Limits) -> Result:
        for name in [*files, *job["collect"]]:
            parts = Path(name).parts
            if Path(name).is_absolute() or ".." in parts or "\0" in name or (name in files and not parts):
                raise ValueError(f"sandbox: file names must stay inside the private folder, got {name!r}")
        contents = {
            name: content.encode(errors="replace") if isinstance(content, str) else content
            for name, content in files.items()
        }
        encoded = {name: base64.b64encode(content).decode() for name, content in contents.items()}
        job |= {"files": encoded, "env": ENVIRONMENT | job["env"]}
        with self._slots:
            started = time.monotonic()
            for _ in range(TRIES):
                try:
                    return self._try(job, limits)
                except SandboxError as error:
                    fault = error
            self._try(EMPTY_JOB, Limits())  # raises where the sandbox fails whatever it runs
            stderr = f"The sandbox ended {TRIES} times while it ran this program, but runs others: {fault}"
            return Result("failed", None, "", stderr, time.monotonic() - started)

    def _try(self, job: dict[str, Any], limits: Limits) -> Result:
        """Runs a job in an idle box or a new one, which is closed where it fails."""
        try:
            box = self._idle.get_nowait()
        except queue.Empty:
            box = Box(self.readonly, self.use_cgroups)
        try:
            result = box.run(job, limits)
        except BaseException:
            box.close()
            raise
        self._idle.put(box)
        return result


def _close_all(idle: queue.SimpleQueue[Box]) -> None:
    while not idle.empty():
        idle.get().close()


@cache
def default() -> Sandbox:
    """The process-wide sandbox of `run_python` and `run`, created at first use."""
    return Sandbox()


def run_python(source: str, **options: Any) -> Result:
    """`Sandbox.run_python` on the default sandbox."""
    return default().run_python(source, **options)


def run(command: Sequence[str], files: Mapping[str, str | bytes] | None = None, **options: Any) -> Result:
    """`Sandbox.run` on the default sandbox."""
    return default().run(command, files, **options)
