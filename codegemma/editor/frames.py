"""Reads LSP's messages from a pipe, and skips everything else, where pygls would end or wait for ever."""

from __future__ import annotations

import io
import re
import sys
from typing import BinaryIO

MAX_HEADER_BYTES = 1 << 12
MAX_MESSAGE_BYTES = 1 << 28  # many times the largest file that an editor opens
# Only the end of a line counts: before it may stand the rest of a message that was skipped.
_LENGTH = re.compile(rb"Content-Length:[ \t]*(\d{1,30})\s*$", re.IGNORECASE)


class FrameReader:
    """An editor's stream in the form that pygls reads: only whole messages, each with one header."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self._frame = stream, io.BytesIO()

    def readline(self) -> bytes:
        """The next line of a header; b"" once the editor has closed the stream."""
        line = self._frame.readline()
        if not line:
            self._frame = io.BytesIO(self._next())
            line = self._frame.readline()
        return line

    def read(self, size: int) -> bytes:
        """The text of the message whose header was read."""
        return self._frame.read(size)

    def _next(self) -> bytes:
        length = 0
        while line := self._stream.readline(MAX_HEADER_BYTES):
            if match := _LENGTH.search(line):
                length = int(match[1])
            if match or line.strip() or not length:
                continue  # another header, or no message
            if length > MAX_MESSAGE_BYTES:
                rule = f"has {length:,} bytes, but at most {MAX_MESSAGE_BYTES:,} are read"
                print(f"codegemma lsp: a message {rule}: it is skipped", file=sys.stderr, flush=True)
                length = 0
                continue
            body = self._stream.read(length)
            return b"Content-Length: %d\r\n\r\n%s" % (length, body) if len(body) == length else b""
        return b""
