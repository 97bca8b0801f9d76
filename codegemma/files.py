"""Files on disk: memory maps, writes that appear only when complete, locks, and the user's folders."""

from __future__ import annotations

import ctypes
import errno
import glob
import hashlib
import mmap
import os
import re
import secrets
import shutil
import stat
import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO

PLACEHOLDER_BYTES = 1024  # how much of a file's start `refuse_placeholder` needs
MAP_FIXED = 0x10  # of mmap: at this very address; the same number on Linux, macOS and the BSDs
_MAPS: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()  # the open maps, for `drop_mapped_pages`
_PART = re.compile(r"\..+\.(\d+)(?:-[0-9a-f]+)?\.part")  # name of an unfinished file; the number: its process
# The folders in which this process writes. Before its first write there, it removes leftovers.
_WRITTEN: set[Path] = set()

_ROOM = "free some space there, or name another folder"
_ACCESS = "name a file or folder that you may use, or change its permissions"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: "this file system cannot hold a file this large: name a folder on another one",
    errno.EIO: "the disk may be failing: name a folder on another",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: _ACCESS,
    errno.EPERM: _ACCESS,
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a part of the path is a file: check the path",
    errno.EISDIR: "it is a folder: name a file",
    errno.EEXIST: "name another, or remove that one",
    errno.ENOTEMPTY: "name another, or an empty one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "its links lead in a circle: name another",
    errno.EMFILE: "too many files are open: raise the limit with `ulimit -n`",
}

# Errors that another folder would avoid.
_FOLDER_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM}


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/codegemma`, by default ~/.cache/codegemma. It may not exist yet."""
    return _user_dir("XDG_CACHE_HOME", ".cache")


def state_dir() -> Path:
    """`$XDG_STATE_HOME/codegemma`, by default ~/.local/state/codegemma. It may not exist yet."""
    return _user_dir("XDG_STATE_HOME", ".local/state")


def _user_dir(variable: str, folder: str) -> Path:
    """`codegemma` in the folder that the variable names, else in `folder` of the home directory.

    Raises OSError where the variable is not set and the user has no home directory.
    """
    if base := os.environ.get(variable):
        return Path(base, "codegemma")
    try:
        return Path.home() / folder / "codegemma"
    except RuntimeError:
        raise OSError(f"this user has no home directory: set HOME, or {variable}") from None


def map_file(path: Path) -> mmap.mmap:
    """A read-only memory map of a file. Raises ValueError where it is empty or a placeholder (see
    `refuse_placeholder`), OSError as `open` does."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            raise ValueError(f"{path}: the file is empty: download it again")
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    refuse_placeholder(path, data[:PLACEHOLDER_BYTES])
    _MAPS.add(data)
    return data


def map_files(paths: Sequence[Path]) -> mmap.mmap:
    """One map of several files, laid end to end as if they were one file.

    If every file but the last is a whole number of memory pages, the map is read-only and nothing is copied.
    Otherwise, and on Windows, all files are read into memory. Raises ValueError where a file is empty or the
    first one is a placeholder (see `refuse_placeholder`), OSError as `open` does.
    """
    if len(paths) == 1:
        return map_file(paths[0])
    sizes = [path.stat().st_size for path in paths]
    if 0 in sizes:
        raise ValueError(f"{paths[sizes.index(0)]}: the file is empty: download it again")
    if not hasattr(mmap, "PROT_READ") or any(size % mmap.PAGESIZE for size in sizes[:-1]):
        data = mmap.mmap(-1, sum(sizes))
        for path in paths:
            data.write(path.read_bytes())
        refuse_placeholder(paths[0], data[:PLACEHOLDER_BYTES])
        return data
    import numpy as np  # here, since not every command needs it

    data = mmap.mmap(-1, sum(sizes), prot=mmap.PROT_READ)  # the addresses, in which the files then lie
    address = np.frombuffer(data, np.uint8).ctypes.data
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype, number = ctypes.c_void_p, ctypes.c_int
    system.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, number, number, number, ctypes.c_long]
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "rb") as file:
            flags = mmap.MAP_PRIVATE | MAP_FIXED
            if system.mmap(address, size, mmap.PROT_READ, flags, file.fileno(), 0) != address:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(path))
        address += size
    refuse_placeholder(paths[0], data[:PLACEHOLDER_BYTES])
    _MAPS.add(data)
    return data


def refuse_placeholder(path: Path, start: bytes) -> None:
    """Raises ValueError where a file's first bytes are a Git LFS or git-annex pointer, or a web page."""
    if start.startswith(b"version https://git-lfs"):
        size = re.search(rb"\nsize (\d+)", start)
        large = f" of {int(size[1]):,} bytes" if size else ""
        remedy = "run `git lfs pull` in its folder, or download the file itself"
        raise ValueError(f"{path}: is a Git LFS pointer to a file{large}, not the file: {remedy}")
    if start.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex")):
        raise ValueError(f"{path}: is a git-annex pointer, not the file: run `git annex get` on it")
    if start.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        remedy = "download it again, with the token that its site asks for"
        raise ValueError(f"{path}: is a web page, such as a site sends for a refusal: {remedy}")


def drop_mapped_pages() -> None:
    """Lets the system drop the pages of mapped files from memory. The maps stay valid: a page that is used
    again is read from disk again."""
    if hasattr(mmap, "MADV_DONTNEED"):
        for data in _MAPS:
            data.madvise(mmap.MADV_DONTNEED)


def read_text(path: Path) -> str:
    """The text of a file, in UTF-8 with or without a byte order mark. Raises ValueError on other bytes."""
    return decode_text(path.read_bytes(), str(path)).removeprefix("\ufeff")


def expect_only(folder: Path, names: Collection[str], what: str) -> None:
    """Raises ValueError where a folder that is about to be cleared holds more than `names`.

    Unfinished files of ours may be there too. `what` says in the message what the folder should hold.
    """
    others = [path.name for path in folder.iterdir() if path.name not in names and not _is_part(path)]
    if others:
        raise ValueError(f"{folder} holds {min(others)}, which is not of {what}: name another folder")


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".part")


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8. Raises ValueError on other bytes; `name` tells in its message what was read."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        byte = f"byte {error.start:,} is 0x{data[error.start]:02x}"
        raise ValueError(f"{name} is not UTF-8 text ({byte}): convert it first") from error


def explain(error: OSError) -> str:
    """An OSError as a message: the file, what went wrong, and what to do about it."""
    if error.errno is None or error.strerror is None:
        return str(error)
    path = "" if error.filename is None else os.fsdecode(error.filename)
    remedy = _REMEDIES.get(error.errno, "")
    for variable, folder in (("XDG_CACHE_HOME", cache_dir), ("XDG_STATE_HOME", state_dir)):
        with suppress(OSError):  # no home directory
            # The variable helps if the path lies in our folder, or is a parent of it that cannot be made.
            errors = {*_FOLDER_ERRORS, errno.ENOTDIR}
            is_inside = Path(path).is_relative_to(folder()) and error.errno in errors
            is_parent = path and folder().is_relative_to(path) and error.errno in {*errors, errno.ENOENT}
            if is_inside or is_parent:
                remedy = f"set {variable} to a folder with room that you may write"
    return f"{path}{': ' if path else ''}{error.strerror}{': ' if remedy else ''}{remedy}"


def expect_replaceable(path: Path, magic: bytes | None = None) -> None:
    """Raises ValueError unless we may create or replace the file `path` (links are followed).

    `magic` are the bytes that all our files of this kind begin with: a file that begins otherwise is somebody
    else's and is refused, unless it is empty. Without `magic`, any regular file may be replaced. Devices,
    pipes and folders are always refused. A path where nothing exists yet is fine.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise ValueError(f"{path} is {kind}, and is not written over: name a file")
    if magic is not None and status.st_size:
        with open(path, "rb") as file:
            if file.read(len(magic)) != magic:
                rule = "was not written by codegemma, and is kept"
                raise ValueError(f"{path} {rule}: name another file, or remove that one")


@contextmanager
def atomic_write(path: Path, magic: bytes | None = None, replace: bool = True) -> Iterator[BinaryIO]:
    """A file to write, renamed to `path` when the block succeeds and removed when it raises.

    A link is followed, and a file that is replaced keeps its permissions. Raises ValueError where `path` may
    not be replaced (see `expect_replaceable`), FileExistsError where it is taken by the end of the block and
    `replace` is False, and OSError, which names `path`, where the disk refuses.
    """
    path = Path(os.path.realpath(path))
    expect_replaceable(path, magic)
    part = _part(path, _unique_mark())
    with _naming(path, part), _created(part) as file:
        try:
            yield file
            file.flush()
            if path.exists():
                part.chmod(stat.S_IMODE(path.stat().st_mode))
            os.fsync(file.fileno())
            expect_replaceable(path, magic)  # again: another program may have written it meanwhile
            _rename(part, path, replace)
        finally:
            part.unlink(missing_ok=True)


@contextmanager
def resumable_write(path: Path, stamp: str, replace: bool = True) -> Iterator[BinaryIO]:
    """As `atomic_write`, but an interrupted file is kept, for the next call with the same `stamp`.

    `stamp` is a text that names all that the content depends on. The file that the next call yields has the
    old content and is positioned at its start: the caller decides where to go on. The unfinished file is
    removed where the block raises ValueError, since the same content would raise it again, where `path` is
    taken, and by a later call with another stamp. After the machine has restarted, a call begins with an
    empty file, since some writes may not have reached the disk. Raises ValueError while another process
    writes the same file.
    """
    path = Path(os.path.realpath(path))
    expect_replaceable(path)
    boot = Path("/proc/sys/kernel/random/boot_id")
    stamp += boot.read_text() if boot.exists() else ""
    part = _part(path, f"at-{hashlib.sha256(stamp.encode()).hexdigest()[:16]}")
    for other in path.parent.glob(f".{glob.escape(path.name)}.at-*.part"):
        if other != part:
            with suppress(OSError), open_locked(other, path):  # removed by now, or another user's
                other.unlink()
    with _naming(path, part), open_locked(part, path, os.O_CREAT) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            _rename(part, path, replace)
        except (ValueError, FileExistsError):
            part.unlink()
            raise


def _rename(part: Path, path: Path, replace: bool) -> None:
    """Renames a complete file to `path`. Unless `replace`, raises FileExistsError where anything is there."""
    if not replace:
        try:
            os.link(part, path)  # fails where the name is taken; on most systems, a rename would not
        except FileExistsError:
            raise
        except OSError:  # a file system without links: an empty file takes the name first
            os.close(os.open(path, os.O_CREAT | os.O_EXCL))
            os.replace(part, path)
        else:
            part.unlink()
        return
    os.replace(part, path)


@contextmanager
def open_locked(part: Path, path: Path, flags: int = 0) -> Iterator[BinaryIO]:
    """The unfinished file `part` of `path`, to read and write. Raises ValueError while another process writes
    or removes it."""
    flags |= os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(part, flags, 0o666), "r+b") as file:
        is_ours = True
        try:
            lock(file, wait=False)
        except BlockingIOError:
            is_ours = False
        if not is_ours or not part.exists():  # it may have been removed before it was locked
            raise ValueError(f"{path}: is being written by another process: wait for it")
        yield file


def lock(file: IO[Any] | int, wait: bool = True) -> None:
    """Locks a file against other processes until it is closed. Does nothing on systems without flock.

    Raises BlockingIOError where another process has the lock and `wait` is False.
    """
    try:
        import fcntl
    except ImportError:
        return
    fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def atomic_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A directory to fill, renamed to `path` when the block succeeds and removed when it raises.

    A link is followed, and an empty directory at `path` is replaced; with `replace`, whatever is there is.
    Without `replace`, raises FileExistsError if anything else is there by the end of the block."""
    path = Path(os.path.realpath(path))
    part = _part(path, _unique_mark())
    with _naming(path, part):
        held = _make_and_lock(part)
        try:
            yield part
            if replace and path.exists():
                _swap(part, path)
            else:
                _rename_directory(part, path)
        finally:
            os.close(held)
            _remove(part)


def _rename_directory(part: Path, path: Path) -> None:
    """Renames a directory. Raises FileExistsError where `path` is anything but an empty directory."""
    try:
        if path.exists():
            path.rmdir()
        os.rename(part, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error
        raise


def _swap(part: Path, path: Path) -> None:
    """Gives a new directory the name of an old one, or of a file, and the old one that of the new one."""
    old = part.with_suffix(".old")  # not the name of a leftover: whoever kills us now loses neither
    os.rename(path, old)
    try:
        os.rename(part, path)
    except OSError:
        os.rename(old, path)
        raise
    os.rename(old, part)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Makes a folder, and keeps other processes that ask for the same from writing there meanwhile.

    Check what the folder holds inside the block: before it, another process may be writing. If the block
    raises, a folder that was made here and is empty is removed. Raises ValueError while another process
    writes there.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    held = _make_and_lock(folder, wait=False)
    try:
        yield
    except BaseException:
        if is_new:
            with suppress(OSError):  # it is not empty
                folder.rmdir()
        raise
    finally:
        os.close(held)


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files and directories that killed processes left in a folder, except those that
    `resumable_write` continues."""
    for part in folder.glob(".*.part"):
        if match := _PART.fullmatch(part.name):
            with suppress(OSError), _unused(part, int(match[1])):  # in use, or another user's
                _remove(part)


def discard_unfinished() -> None:
    """Removes what this process has begun to write, except what `resumable_write` continues.

    For a process that exits without running the `finally` blocks that would do it.
    """
    for folder in list(_WRITTEN):
        for part in folder.glob(f".*.{os.getpid()}-*.part"):
            _remove(part)


def _remove(path: Path) -> None:
    """Removes a file or a directory, as far as the system lets us."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _part(path: Path, mark: str) -> Path:
    """The path that a file or directory has until it is complete; `mark` tells its writers apart."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Only once in a process, since a build writes thousands of files into one folder.
    if path.parent not in _WRITTEN:
        _WRITTEN.add(path.parent)
        remove_leftovers(path.parent)
    return path.with_name(f".{path.name}.{mark}.part")


def _unique_mark() -> str:
    """A mark that no file had before: `remove_leftovers` may still be removing an older file."""
    return f"{os.getpid()}-{secrets.token_hex(6)}"


@contextmanager
def _created(part: Path) -> Iterator[BinaryIO]:
    """A new file, locked while it is open, so that no other process takes it for a leftover."""
    while True:
        with open(part, "xb") as file:
            with suppress(OSError):  # a file system without locks
                lock(file)  # waits while another process, in `remove_leftovers`, has it locked
            if part.exists():  # else it was removed as a leftover before it was locked: make it again
                yield file
                return


def _make_and_lock(folder: Path, wait: bool = True) -> int:
    """Makes a folder, and returns a descriptor whose lock says that it is in use; see `_created`.

    Raises ValueError where another process has the lock and `wait` is False.
    """
    while True:
        folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError):  # removed before it was opened
            held = os.open(folder, os.O_RDONLY)
            try:
                lock(held, wait)
            except BlockingIOError:
                os.close(held)
                raise ValueError(f"{folder}: is being written by another process: wait for it") from None
            except OSError:  # a file system without locks
                pass
            with suppress(FileNotFoundError):  # removed before it was locked
                if os.path.samestat(os.fstat(held), os.stat(folder)):
                    return held
            os.close(held)


@contextmanager
def _unused(part: Path, process: int) -> Iterator[None]:
    """Holds the lock of an unfinished file or directory. Raises BlockingIOError where a process may still be
    writing it.

    That is so where the file is locked, or where the process with the number `process` is alive. One
    exception: where locks work and `process` is our own number, the file is a leftover of an earlier process
    with the same number, as in containers, where numbers begin anew.
    """
    held = os.open(part, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    try:
        has_locks = True
        try:
            lock(held, wait=False)
        except BlockingIOError:
            raise
        except OSError:
            has_locks = False
        if _alive(process) and not (has_locks and process == os.getpid()):
            raise BlockingIOError(f"{part} is being written")
        yield
    finally:
        os.close(held)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is another user's, so it is alive
    return True


@contextmanager
def _naming(path: Path, part: Path) -> Iterator[None]:
    """Makes OSErrors name `path`, which the caller asked for, instead of the unfinished `part` or no file."""
    try:
        yield
    except OSError as error:
        is_ours = error.filename is not None and os.fsdecode(error.filename).startswith(str(part))
        if is_ours or (error.filename is None and error.errno in _FOLDER_ERRORS):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
