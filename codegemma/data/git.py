"""What git knows of a checkout: where its own files are, its repository and commit, and the user's settings.

Only `git_settings` runs git, and that reads configuration alone: no hook, filter or file monitor is started.
"""

from __future__ import annotations

import os
import re
import subprocess
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SETTINGS_SECONDS = 60  # how long git's answer is used, unless a common settings file changes sooner
# While one of these is set, as in a git hook, git answers for that repository, not for the folder's.
REPOSITORY_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_COMMON_DIR", "GIT_INDEX_FILE", "GIT_PREFIX")
NO_FILE = Path(os.devnull)  # stands for a file or home that is not there


@dataclass(frozen=True)
class GitFolders:
    """git's directories of a checkout, as git calls them: GIT_DIR (.git, or that of a linked worktree or
    submodule), and GIT_COMMON_DIR, which the worktrees of a repository share.
    """

    git_dir: Path
    common_dir: Path


@dataclass(frozen=True)
class GitSettings:
    """Git's settings: the user's files of ignore rules and attributes, and whether rules ignore case."""

    ignore_file: Path  # core.excludesFile; neither file need exist
    attributes_file: Path  # core.attributesFile
    ignore_case: bool = False


def git_folders(root: Path) -> GitFolders | None:
    """The git folders of a checkout; None where `root` is no checkout.

    In a linked worktree or a submodule, `.git` is a file that names the git directory. In that of a linked
    worktree, the file `commondir` names the shared one.
    """
    folder = root / ".git"
    try:
        if folder.is_file():
            folder = root / _path_in(folder).removeprefix("gitdir:").strip()
        if not folder.is_dir():
            return None
        shared = folder / "commondir"
        return GitFolders(folder, folder / _path_in(shared) if shared.is_file() else folder)
    except (OSError, ValueError):
        return None


def _path_in(file: Path) -> str:
    return os.fsdecode(file.read_bytes()[:4096]).strip()


def git_state(root: Path) -> tuple[str, str]:
    """(repository as host/owner/name, commit) of a checkout, from its files; "" for what is not there."""
    folders = git_folders(root)
    if folders is None:
        return "", ""
    origin = re.search(r'^\s*\[remote "origin"\]([^\[]*)', _read(folders.common_dir / "config"), re.M)
    url = re.search(r"^\s*url\s*=\s*(\S+)", origin[1], re.M) if origin else None
    address = re.sub(r"^([\w+.-]+://)?([^@/]*@)?", "", url[1].strip('"')) if url else ""
    if address.startswith(("/", ".", "~")):  # a folder of this machine names no repository
        address = ""
    return address.replace(":", "/").removesuffix(".git"), _commit(folders)


def _commit(folders: GitFolders) -> str:
    head = _read(folders.git_dir / "HEAD").strip()
    branch = head.removeprefix("ref: ")
    if branch == head or ".." in branch or not branch.startswith("refs/"):
        stated = [head]
    else:
        packed_refs = _read(folders.common_dir / "packed-refs")
        packed = re.search(rf"^(\w+) {re.escape(branch)}$", packed_refs, re.M)
        files = (folders.git_dir / branch, folders.common_dir / branch)
        stated = [*(_read(file).strip() for file in files), packed[1] if packed else ""]
    return next((commit for commit in stated if re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", commit)), "")


def _read(file: Path) -> str:
    try:
        return file.read_text("utf-8", "replace")
    except OSError:
        return ""


def git_settings(root: Path) -> GitSettings:
    """The user's settings for a repository, from all of git's files: system, user, repository, worktree,
    and what those include. Without git installed they are git's defaults.
    """
    folders, home = git_folders(root), _expand("~")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "git"
    files = [home / ".gitconfig", config / "config"]
    if folders:
        files += [folders.common_dir / "config", folders.git_dir / "config.worktree"]
    changed = tuple(file.stat().st_mtime_ns if file.is_file() else 0 for file in files)
    return _settings(root, config, (home, changed, time.monotonic() // SETTINGS_SECONDS))


def _expand(path: str) -> Path:
    """A path with ~ expanded; NO_FILE for a user without a home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return NO_FILE


@lru_cache(256)
def _settings(root: Path, config: Path, _state: tuple[object, ...]) -> GitSettings:
    """`_state` is only a part of the cache's key: git is asked again when it changes."""
    command = ["git", "config", "-z", "--get-regexp", r"^core\.(excludesfile|attributesfile|ignorecase)$"]
    kept = {name: value for name, value in os.environ.items() if name not in REPOSITORY_VARIABLES}
    try:
        answer = subprocess.run(command, cwd=root, env=kept, capture_output=True, timeout=10, check=False)
        entries = [entry.partition("\n")[::2] for entry in os.fsdecode(answer.stdout).split("\0")]
    except (OSError, subprocess.TimeoutExpired):
        entries = []
    values = dict(entries)  # of several, the last counts

    def path(name: str, default: Path) -> Path:
        return root / _expand(values[name]) if values.get(name) else default

    ignore_case = values.get("core.ignorecase", "false").lower() not in ("false", "no", "off", "0")
    ignore_file, attributes_file = config / "ignore", config / "attributes"
    return GitSettings(
        path("core.excludesfile", ignore_file), path("core.attributesfile", attributes_file), ignore_case
    )
