"""The prefix cache: keys and values of every prompt lately seen, in a tree over token ids, shared by all
requests.

`find` gives the pages of the longest known prefix, `put` remembers a sequence, each under the adapter that
they depend on ("": none); the least recently used goes first when the bound in bytes is reached. Saved files
carry a key (model, numerics, SIMD level): any other key, or a damaged file, is ignored with a warning. The
law: a token computed behind cached pages is the token computed without.
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
from pathlib import Path

import numpy as np

from codegemma.files import atomic_write
from codegemma.native import PAGE, Page

_MAGIC = b"codegemma prefix cache 2\n"


class _Node:
    """One page of tokens; a leaf may be partly filled."""

    __slots__ = ("ids", "page", "parent", "children")

    def __init__(self, ids: tuple[int, ...], page: Page | None, parent: _Node | None) -> None:
        self.ids, self.page, self.parent = ids, page, parent
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
    """Safe to share between threads."""

    def __init__(self, key: str, page_bytes: int, max_bytes: int) -> None:
        self.key, self.page_bytes, self.max_bytes = key, page_bytes, max_bytes
        self._lock = threading.RLock()
        self._roots: dict[str, _Node] = {}  # by adapter
        self._recent: OrderedDict[_Node, None] = (
            OrderedDict()
        )  # least recently used first; a parent after its children

    @property
    def nbytes(self) -> int:
        return len(self._recent) * self.page_bytes

    def find(self, ids: Sequence[int], adapter: str = "") -> tuple[list[Page], int]:
        """Pages of the longest known prefix of `ids`, and its length; the last page may hold more than it."""
        with self._lock:
            return self._find(ids, self._root(adapter))

    def _root(self, adapter: str) -> _Node:
        return self._roots.setdefault(adapter, _Node((), None, None))

    def _find(self, ids: Sequence[int], node: _Node) -> tuple[list[Page], int]:
        length = 0
        pages: list[Page] = []
        while True:
            rest = tuple(ids[length : length + PAGE])
            child = node.children.get(rest) if len(rest) == PAGE else None
            if child is None:
                child, common = max(
                    ((one, common_prefix(one.ids, rest)) for one in node.children.values()),
                    key=lambda found: found[1],
                    default=(None, 0),
                )
                if child is not None and common and child.page is not None:
                    self._touch(child)
                    return [*pages, child.page], length + common
                self._touch(node)
                return pages, length
            assert child.page is not None
            pages.append(child.page)
            node, length = child, length + PAGE

    def put(self, ids: Sequence[int], pages: Sequence[Page], adapter: str = "") -> None:
        """Remembers that `pages` hold `ids`; pages already known stay the shared ones."""
        with self._lock:
            self._put(ids, pages, self._root(adapter))

    def _put(self, ids: Sequence[int], pages: Sequence[Page], node: _Node) -> None:
        for index, page in enumerate(pages):
            part = tuple(ids[index * PAGE : (index + 1) * PAGE])
            child = node.children.get(part)
            if child is None:
                if len(part) < PAGE and any(one.ids[: len(part)] == part for one in node.children.values()):
                    break  # a longer one is known
                child = node.children[part] = _Node(part, page, node)
                self._recent[child] = None
                for shorter in [
                    one
                    for one in node.children.values()
                    if len(one.ids) < len(part) and part[: len(one.ids)] == one.ids
                ]:
                    self._forget(shorter)
            node = child
        self._touch(node)
        while self.nbytes > self.max_bytes and self._recent:
            self._forget(next(iter(self._recent)))

    def forget_all(self) -> None:
        with self._lock:
            self._roots.clear()
            self._recent.clear()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all pages, atomically."""
        with self._lock:
            nodes = [node for root in self._roots.values() for node in self._nodes(root)]
            index: dict[_Node | None, int | str] = {node: at for at, node in enumerate(nodes)}
            index |= {root: adapter for adapter, root in self._roots.items()}
        tree = json.dumps([[index[node.parent], list(node.ids)] for node in nodes]).encode()
        digest = hashlib.sha256()
        with atomic_write(Path(path)) as out:

            def write(data: bytes) -> None:
                digest.update(data)
                out.write(data)

            key = self.key.encode()
            write(_MAGIC + struct.pack("<QQQ", len(key), len(tree), self.page_bytes) + key + tree)
            for node in nodes:
                assert node.page is not None
                write(node.page.data.tobytes())
            out.write(digest.digest())

    def load(self, path: str | os.PathLike[str]) -> bool:
        """Adds the pages of a saved cache. False, with a warning, on a file that is damaged or of another
        model."""
        try:
            data = Path(path).read_bytes()
            nodes, roots = self._parse(data)
        except FileNotFoundError:
            return False
        except (ValueError, TypeError, RecursionError, struct.error, OSError) as error:
            warnings.warn(f"{path}: the saved prefix cache is ignored: {error}", stacklevel=2)
            return False
        for node in nodes:
            if node.parent is not None and not node.children:
                chain = [node]
                while (parent := chain[-1].parent) is not None and parent.page is not None:
                    chain.append(parent)
                chain.reverse()
                self.put(
                    [token for one in chain for token in one.ids],
                    [one.page for one in chain if one.page],
                    roots[parent],
                )
        return True

    def _parse(self, data: bytes) -> tuple[list[_Node], dict[_Node | None, str]]:
        """The nodes of a saved tree, and the adapter of each of its roots."""
        head = len(_MAGIC) + 24
        if not data.startswith(_MAGIC) or hashlib.sha256(data[:-32]).digest() != data[-32:]:
            raise ValueError("it is damaged or no cache file")
        key_length, tree_length, page_bytes = struct.unpack_from("<QQQ", data, len(_MAGIC))
        key = data[head : head + key_length].decode("utf-8", "replace")
        if key != self.key or page_bytes != self.page_bytes:
            raise ValueError(f"it belongs to another model, adapter, engine version or SIMD level ({key!r})")
        tree = json.loads(data[head + key_length : head + key_length + tree_length])
        at = head + key_length + tree_length
        nodes: list[_Node] = []
        roots: dict[str, _Node] = {}
        for parent, ids in tree:
            whole = isinstance(parent, str) or (0 <= parent < len(nodes) and len(nodes[parent].ids) == PAGE)
            if not whole or not 1 <= len(ids) <= PAGE:
                raise ValueError("its tree is damaged")
            above = (
                roots.setdefault(parent, _Node((), None, None)) if isinstance(parent, str) else nodes[parent]
            )
            page = Page(np.frombuffer(data, np.uint8, page_bytes, at).copy(), len(ids))
            node = above.children[tuple(ids)] = _Node(tuple(ids), page, above)
            nodes.append(node)
            at += page_bytes
        return nodes, {root: adapter for adapter, root in roots.items()}

    def _nodes(self, node: _Node) -> Iterator[_Node]:
        for child in node.children.values():
            yield child
            yield from self._nodes(child)

    def _touch(self, node: _Node) -> None:
        """Makes a node and all above it the most recently used, parents last so that leaves go first."""
        while node.parent is not None:
            self._recent.move_to_end(node)
            node = node.parent

    def _forget(self, node: _Node) -> None:
        for child in list(node.children.values()):
            self._forget(child)
        assert node.parent is not None
        del node.parent.children[node.ids], self._recent[node]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids two sequences have in common at their starts."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
