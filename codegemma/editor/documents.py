"""The open documents of an editor: a buffer for each, and which of them are cells of one notebook."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from lsprotocol import types
from pygls import uris

from codegemma.editor.buffers import Buffer, Chunk, Encoding
from codegemma.editor.context import HOLDS_CREDENTIALS
from codegemma.safety.secrets import is_secret_name

CELL_SEPARATOR = Buffer("\n\n")  # between the cells of a notebook
# A URI of one of these schemes with an absolute path names a file on this machine.
LOCAL_SCHEMES = ("file", "untitled", "vscode-notebook-cell")


@dataclass(frozen=True)
class Edit:
    """What the changes of one notification amount to: `before` and `after` differ from the offset `first` on,
    up to `tail` characters before their ends."""

    before: Buffer
    after: Buffer
    first: int
    tail: int

    @property
    def last(self) -> int:
        """The offset in `before` up to which it was replaced."""
        return len(self.before) - self.tail

    @property
    def text(self) -> str:
        """The text in `after` that replaced it."""
        return self.after.slice(self.first, len(self.after) - self.tail)


class Documents:
    """The buffers by URI, the most recently used last, and the URIs of each notebook's cells in order."""

    def __init__(self, log: Callable[[str], None]) -> None:
        self.log = log
        self.encoding: Encoding = "utf-16"
        self.buffers: dict[str, Buffer] = {}
        self.notebooks: dict[str, list[str]] = {}  # by the notebook's URI

    def open(self, item: types.TextDocumentItem) -> None:
        path, language = local_path(item.uri), item.language_id
        self.close(item.uri)
        if path is None and is_secret_name(uris.urlparse(item.uri)[2], language):
            self.log(f"{item.uri} gets no completions and enters no prompt: {HOLDS_CREDENTIALS}")
            return
        self.buffers[item.uri] = Buffer(item.text, self.encoding, path, language)

    def close(self, uri: str) -> None:
        self.buffers.pop(uri, None)

    def use(self, uri: str) -> Buffer | None:
        """The buffer of a document, which becomes the most recently used one."""
        if uri not in self.buffers:
            return None
        self.buffers[uri] = self.buffers.pop(uri)
        return self.buffers[uri]

    def change(self, uri: str, changes: Iterable[types.TextDocumentContentChangeEvent]) -> Edit | None:
        """Applies changes, one after the other; None if the document is unknown or there are none."""
        if (before := self.use(uri)) is None:
            return None
        after, first, tail = before, len(before), len(before)
        for change in changes:
            start, end = 0, len(after)
            if isinstance(change, types.TextDocumentContentChangePartial):
                edges = change.range.start, change.range.end
                start, end = sorted(after.offset(edge.line, edge.character) for edge in edges)
            first, tail = min(first, start), min(tail, len(after) - end)
            after = after.replaced(start, end, change.text)
        self.buffers[uri] = after
        return Edit(before, after, first, tail) if after is not before else None

    def change_cells(self, notebook: str, change: types.NotebookCellArrayChange) -> None:
        """Replaces cells in a notebook's order."""
        cells = self.notebooks.setdefault(notebook, [])
        new = [cell.document for cell in change.cells or ()]
        cells[change.start : change.start + change.delete_count] = new

    def whole(self, uri: str) -> tuple[Buffer, int]:
        """The text that a prompt is made of, and the offset in it at which the document begins.

        It is the document, or all the cells of its notebook that are in its language.
        """
        buffer, chunks, start = self.buffers[uri], list[Chunk](), 0
        cells = [cell for cell in self._cells(uri) if self.buffers[cell].language == buffer.language]
        if cells == [uri]:
            return buffer, 0
        for cell in cells:
            chunks += CELL_SEPARATOR.chunks if chunks else ()
            if cell == uri:
                start = sum(len(chunk.text) for chunk in chunks)
            chunks += self.buffers[cell].chunks
        return Buffer(chunks, buffer.encoding, buffer.path, buffer.language), start

    def others(self, uri: str) -> list[Buffer]:
        """The other open documents, the most recently used last. Each notebook is one text."""
        buffers: list[Buffer] = []
        listed = {*self._cells(uri)}
        for other in reversed(self.buffers):
            if other not in listed:
                listed.update(self._cells(other))
                buffers.append(self.whole(other)[0])
        return buffers[::-1]

    def _cells(self, uri: str) -> list[str]:
        """The open cells of a document's notebook, in order; the document alone if it is no cell."""
        for cells in self.notebooks.values():
            if uri in cells:
                return [cell for cell in cells if cell in self.buffers]
        # Editors that do not report notebooks give a cell its notebook's URI with "#" and a numbered name.
        notebook, mark, _ = uri.partition("#")
        if not mark:
            return [uri]
        return sorted((each for each in self.buffers if each.startswith(notebook + mark)), key=_by_number)


def local_path(uri: str) -> Path | None:
    """The path of a document on this machine; None if it has none, as `untitled:Untitled-1`."""
    scheme, _, rest = uri.partition(":")
    if scheme not in LOCAL_SCHEMES or not rest.startswith("/"):
        return None
    path = uris.to_fs_path(f"file:{rest}")
    return Path(path) if path else None


def _by_number(uri: str) -> list[tuple[int, str]]:
    """A key that sorts texts by the numbers in them: "cell2" stands before "cell10"."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", uri)]
