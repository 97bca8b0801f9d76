"""Limits a box's memory and processes by a control group (v1, or delegated v2), where one can be made."""

from __future__ import annotations

import os
import time
from itertools import count
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
BOX_PROCESSES = 4  # bubblewrap, supervisor, monitor and init


class Cgroup:
    """A new control group for one box. Raises OSError where this user may not create one."""

    _number = count()

    def __init__(self) -> None:
        name = f"codegemma-{os.getpid()}-{next(self._number)}"
        self._memory, self._pids = (parent / name for parent in _parents())
        self._is_v2 = self._memory == self._pids
        self._folders = {self._memory, self._pids}
        for folder in self._folders:
            folder.mkdir()

    def joining(self, command: list[str]) -> list[str]:
        """A command that joins the group and then becomes `command`, whose children are born in the group."""
        # The shell writes its own process id to each file in front of ":", then becomes the command.
        files = [str(folder / "cgroup.procs") for folder in self._folders]
        script = 'while [ "$1" != : ]; do echo $$ > "$1" || exit; shift; done; shift; exec "$@"'
        return ["/bin/sh", "-c", script, "sh", *files, ":", *command]

    def limit(self, memory: int, processes: int) -> None:
        """Limits the next program to `memory` bytes, without swap, and to a number of processes."""
        file = self._memory / ("memory.max" if self._is_v2 else "memory.limit_in_bytes")
        file.write_text(str(memory))
        for swap in (self._memory / "memory.swap.max", self._memory / "memory.swappiness"):
            if swap.exists():
                swap.write_text("0")
        (self._pids / "pids.max").write_text(str(processes + BOX_PROCESSES))

    def kills(self) -> int:
        """How many of the group's processes the kernel has killed so far for want of memory."""
        text = (self._memory / ("memory.events" if self._is_v2 else "memory.oom_control")).read_text()
        return int(dict(line.split() for line in text.splitlines()).get("oom_kill", 0))

    def close(self) -> None:
        """Removes the group, once its last processes have ended (waits for up to a second)."""
        for folder in self._folders:
            for _ in range(200):
                try:
                    folder.rmdir()
                    break
                except OSError:
                    time.sleep(0.005)


def _parents() -> tuple[Path, Path]:
    """The folders in which to make groups that limit memory, and groups that limit the number of processes.

    In version 2 it is the same folder. Raises OSError if there are none.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    paths = {kind: path for _, kind, path in (line.split(":", 2) for line in lines)}  # kind "" is version 2
    if "" in paths:
        current = Path(f"{ROOT}{paths['']}")
        for folder in (current, *current.parents):
            control = folder / "cgroup.subtree_control"
            delegated = control.is_file() and {"memory", "pids"} <= set(control.read_text().split())
            if delegated and os.access(folder / "cgroup.procs", os.W_OK) and os.access(folder, os.W_OK):
                return folder, folder
    parents = [ROOT / kind / paths[kind].lstrip("/") for kind in ("memory", "pids") if kind in paths]
    if len(parents) < 2 or not all(folder.is_dir() and os.access(folder, os.W_OK) for folder in parents):
        raise PermissionError("this user may not create a control group for memory and processes")
    return parents[0], parents[1]
