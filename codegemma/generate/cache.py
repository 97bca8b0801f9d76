"""The prefix cache: keys and values of the latest prompts, in a tree over token ids, shared by all requests.

`find` returns the pages of the longest cached prefix and `put` adds a sequence. Each adapter has its own tree
("" is the base), since keys and values depend on it. Beyond the limit in bytes, the least recently used pages
are removed. Saved files carry a key (model, numerics, SIMD level): a file with another key, or a damaged one,
is ignored with a warning, and a file of another program is never written over. One law holds: what is
computed after cached pages is the same as without the cache.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.files import atomic_write, expect_replaceable
from codegemma.native import PAGE, Page

_MAGIC = b"codegemma prefix cache "  # what saved files of every version begin with
_VERSION = b"2\n"
_DIGEST_BYTES = 32


class _Node:
    """A page and its token ids, up to PAGE of them. An adapter's root has no ids, no page and no parent."""

    __slots__ = ("ids", "page", "parent", "children")

    def __init__(self, ids: tuple[int, ...] = (), page: Any = None, parent: Any = None) -> None:
        self.ids, self.page, self.parent = ids, page, parent
        self.children: dict[tuple[int, ...], _Node] = {}

    def descendants(self) -> Iterator[_Node]:
        for child in self.children.values():
            yield child
            yield from child.descendants()


class PrefixCache:
    """The cached pages, at most `max_bytes` of them. Safe to share between threads."""

    def __init__(self, key: str, page_bytes: int, max_bytes: int) -> None:
        self.key, self.page_bytes, self.max_bytes = key, page_bytes, max_bytes
        self._lock = threading.RLock()
        self._roots: dict[str, _Node] = {}  # by adapter
        # All nodes, the least recently used first, and each before its parent.
        self._recent: OrderedDict[_Node, None] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """The size of all pages."""
        return len(self._recent) * self.page_bytes

    def find(self, ids: Sequence[int], adapter: str = "") -> tuple[list[Page], int]:
        """The pages of the longest cached prefix of `ids`, and its length. The last may hold more tokens."""
        with self._lock:
            node, length = self._root(adapter), 0
            pages: list[Page] = []
            while True:
                rest = tuple(ids[length : length + PAGE])
                child = node.children.get(rest) if len(rest) == PAGE else None
                if child is None:
                    break
                pages.append(child.page)
                node, length = child, length + PAGE
            matches = ((common_prefix_length(child.ids, rest), child) for child in node.children.values())
            common, closest = max(matches, key=lambda match: match[0], default=(0, node))
            if common:
                pages.append(closest.page)
                node, length = closest, length + common
            self._touch(node)
            return pages, length

    def put(self, ids: Sequence[int], pages: Sequence[Page], adapter: str = "") -> None:
        """Adds the pages of `ids`. Where the same tokens are cached already, the old page stays."""
        with self._lock:
            node = self._root(adapter)
            for index, page in enumerate(pages):
                part = tuple(ids[index * PAGE : (index + 1) * PAGE])
                child = node.children.get(part)
                if child is None:
                    if len(part) < PAGE and any(ids[: len(part)] == part for ids in node.children):
                        break  # a cached page begins with the same tokens
                    child = _Node(part, page, node)
                    for other_ids, other in list(node.children.items()):
                        if part[: len(other_ids)] == other_ids:
                            self._forget(other)
                    node.children[part] = child
                    self._recent[child] = None
                node = child
            self._touch(node)
            while self.nbytes > self.max_bytes and self._recent:
                self._forget(next(iter(self._recent)))

    def forget_all(self) -> None:
        """Empties the cache."""
        with self._lock:
            self._roots.clear()
            self._recent.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all pages, atomically: a header, the tree as JSON, the page of each node, and a SHA-256.

        Raises ValueError where `expect_cache_file` refuses the path, OSError where writing fails.
        """
        with self._lock:
            nodes = [node for root in self._roots.values() for node in root.descendants()]
            index: dict[_Node | None, int | str] = {node: number for number, node in enumerate(nodes)}
            index |= {root: adapter for adapter, root in self._roots.items()}
        key = self.key.encode()
        tree = json.dumps([[index[node.parent], list(node.ids)] for node in nodes]).encode()
        header = _MAGIC + _VERSION + struct.pack("<QQQ", len(key), len(tree), self.page_bytes) + key + tree
        digest = hashlib.sha256()
        with atomic_write(Path(path), _MAGIC) as out:
            for data in chain([header], (node.page.data.tobytes() for node in nodes)):
                digest.update(data)
                out.write(data)
            out.write(digest.digest())

    def load(self, path: str | os.PathLike[str]) -> bool:
        """Adds the pages of a saved cache. Returns False where there is no file and, with a warning, where it
        is damaged or another model's."""
        try:
            expect_cache_file(Path(path))  # first: it may be a pipe, or some other large file
            roots = self._parse(Path(path).read_bytes())
        except FileNotFoundError:
            return False
        except (ValueError, TypeError, RecursionError, struct.error, OSError) as error:
            warnings.warn(f"{path}: the saved prefix cache is ignored: {error}", stacklevel=2)
            return False
        for adapter, root in roots.items():
            for leaf in root.descendants():
                if not leaf.children:
                    branch = [leaf, *_ancestors(leaf)][::-1]
                    ids = [token for node in branch for token in node.ids]
                    self.put(ids, [node.page for node in branch], adapter)
        return True

    def _parse(self, data: bytes) -> dict[str, _Node]:
        """The roots of a saved tree, by adapter. Raises ValueError where it is damaged or another model's."""
        magic = _MAGIC + _VERSION
        start, content = len(magic) + 24, data[:-_DIGEST_BYTES]
        if not data.startswith(magic) or hashlib.sha256(content).digest() != data[-_DIGEST_BYTES:]:
            raise ValueError("it is damaged or no cache file")
        key_length, tree_length, page_bytes = struct.unpack_from("<QQQ", data, len(magic))
        key = data[start : start + key_length].decode("utf-8", "replace")
        if key != self.key or page_bytes != self.page_bytes:
            raise ValueError(f"it belongs to another model, engine version or SIMD level ({key!r})")
        offset = start + key_length + tree_length
        nodes: list[_Node] = []
        roots: dict[str, _Node] = {}
        for parent, ids in json.loads(data[start + key_length : offset]):
            is_root = isinstance(parent, str)
            is_valid = is_root or (0 <= parent < len(nodes) and len(nodes[parent].ids) == PAGE)
            if not is_valid or not 1 <= len(ids) <= PAGE:
                raise ValueError("its tree is damaged")
            above = roots.setdefault(parent, _Node()) if is_root else nodes[parent]
            page = Page(np.frombuffer(data, np.uint8, page_bytes, offset).copy(), len(ids))
            above.children[tuple(ids)] = _Node(tuple(ids), page, above)
            nodes.append(above.children[tuple(ids)])
            offset += page_bytes
        return roots

    def _root(self, adapter: str) -> _Node:
        return self._roots.setdefault(adapter, _Node())

    def _touch(self, node: _Node) -> None:
        """Makes a node and its ancestors the most recently used, parents last: leaves are removed first."""
        for used in (node, *_ancestors(node)):
            if used.parent is not None:
                self._recent.move_to_end(used)

    def _forget(self, node: _Node) -> None:
        for child in list(node.children.values()):
            self._forget(child)
        del node.parent.children[node.ids], self._recent[node]


def expect_cache_file(path: Path) -> None:
    """Raises ValueError unless a cache may be saved at `path`: as a new file, or over an empty file or an
    older cache."""
    expect_replaceable(path, _MAGIC)


def _ancestors(node: _Node) -> Iterator[_Node]:
    """The nodes above a node, without the root."""
    while node.parent is not None and node.parent.parent is not None:
        node = node.parent
        yield node


def common_prefix_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the longest common prefix of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
