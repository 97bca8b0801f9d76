"""The cursor, the window of text around it, and how far the user has accepted a suggestion there."""

from __future__ import annotations

from dataclasses import dataclass

from codegemma.editor.buffers import Buffer, normalize
from codegemma.editor.documents import Edit
from codegemma.serve import stats

MAX_PREFIX, MAX_SUFFIX = 49_152, 12_288  # characters around the cursor that a prompt is made of
# The prefix's start moves by so many characters at once, so that most keystrokes keep the cache valid.
WINDOW_STEP = 8_192
REDACTION_MARGIN = 8_192  # characters read beyond the window, to recognise a secret that its edge cuts


@dataclass
class Suggestion:
    """The last suggestion that the editor got, and how much of it is in the document `uri` by now.

    `text`: the suggestion; its first `entry` characters are the pop-up's entry that it continues, if any;
    `start`: the offset in the document where `text` belongs; `present`: the part that the document has there.
    """

    uri: str
    start: int
    text: str
    shown: stats.Shown
    entry: int = 0
    present: str = ""

    def remaining(self, offset: int) -> str:
        """The part of `text` that is not in the document yet; "" if it does not fit at this cursor."""
        size = len(normalize(self.present))
        fits = size >= self.entry and offset == self.start + len(self.present)
        return self.text[size:] if fits else ""

    def follow_edit(self, edit: Edit) -> bool:
        """Counts the accepted characters after an edit. Returns whether more of the suggestion can follow.

        Characters count as accepted if an edit inserted more than two of them, or the last two; else the user
        typed them.
        """
        end, text, old = self.start + len(self.present), edit.text, edit.before
        head = max(0, self.start - edit.first)  # characters that the edit replaced before the suggestion
        tail = max(0, edit.last - end)  # and after it
        if edit.first > end or edit.last < self.start or head + tail > len(text):
            return False
        inside = len(text) - tail
        if (text[:head], text[inside:]) != (old.slice(edit.first, self.start), old.slice(end, edit.last)):
            return False
        known = max(self.entry, len(normalize(self.present)))
        kept = self.present[: max(0, edit.first - self.start)]
        self.present = kept + text[head:inside] + self.present[max(0, edit.last - self.start) :]
        present = normalize(self.present)
        if not self.text.startswith(present):
            return False
        more = len(present) - known
        if more > 2 or (more > 1 and present == self.text):
            self.shown.taken += more
        return present != self.text


@dataclass(frozen=True)
class CursorPosition:
    """Where text is wanted, as offsets in the buffer of `uri`.

    `end` is the cursor. While a pop-up is open, its selected entry `chosen` replaces the text from `start` to
    `end`; else the suggestion does, if blanks that begin the line stand there. `automatic` is False if the
    user asked for a suggestion.
    """

    uri: str
    start: int
    end: int
    chosen: str = ""
    automatic: bool = True

    def text_to_redact(self, buffer: Buffer) -> tuple[str, str]:
        """The text before and after the cursor, as a model reads it: the window, and REDACTION_MARGIN more on
        each side."""
        chosen = normalize(self.chosen)
        length = buffer.normalized_length(self.start) + len(chosen)
        dropped = buffer.offset_of_normalized(_dropped(length, REDACTION_MARGIN))
        prefix = normalize(buffer.slice(dropped, self.start)) + chosen
        size = MAX_SUFFIX + REDACTION_MARGIN + 1
        suffix = normalize(buffer.slice(self.end, self.end + 2 * size))  # twice, as each line may end in \r\n
        return _whole_lines(prefix) if dropped else prefix, _cut_suffix(suffix, REDACTION_MARGIN)


def window(prefix: str, suffix: str) -> tuple[str, str]:
    """Whole lines nearest to the cursor, at most MAX_PREFIX and MAX_SUFFIX characters."""
    if dropped := _dropped(len(prefix)):
        prefix = _whole_lines(prefix[dropped:])
    return prefix, _cut_suffix(suffix)


def _dropped(length: int, margin: int = 0) -> int:
    """How many characters of a prefix lie before its window."""
    excess = max(0, length - MAX_PREFIX - margin)
    return -(-excess // WINDOW_STEP) * WINDOW_STEP  # rounded up to whole steps


def _whole_lines(prefix: str) -> str:
    """A prefix from its first whole line; unchanged if that would leave less than WINDOW_STEP characters."""
    return prefix[prefix.find("\n", 0, max(0, len(prefix) - WINDOW_STEP)) + 1 :]


def _cut_suffix(suffix: str, margin: int = 0) -> str:
    size = MAX_SUFFIX + margin
    return suffix if len(suffix) <= size else suffix[: suffix.rfind("\n", 0, size) + 1 or size]
