"""The cursor, the window of text around it, and how far the user has accepted a suggestion there."""

from __future__ import annotations

from dataclasses import dataclass

from codegemma.editor.buffers import Buffer, normalize
from codegemma.serve import stats

MAX_PREFIX, MAX_SUFFIX = 49_152, 12_288  # characters around the cursor that a prompt is made of
WINDOW_STEP = 8_192  # the prefix starts at steps of so many characters, so that typing keeps the cache valid
REDACTION_MARGIN = 8_192  # characters beyond the window, where a secret that its edge cuts is found


@dataclass
class Suggestion:
    """The last suggestion that the editor got: `text`, between `before` and `after` in the document `uri`."""

    uri: str
    before: str
    text: str
    after: str
    shown: stats.Shown
    inserted: int = 0  # characters of `text` that are in the document by now

    def remaining(self, before: str, after: str) -> str:
        """The part of `text` that the user has not typed yet; "" if the suggestion does not fit here."""
        typed = before[len(self.before) :]
        fits = after == self.after and before == self.before + typed and self.text.startswith(typed)
        return self.text[len(typed) :] if fits else ""

    def follow_edit(self, document: str) -> bool:
        """Counts the accepted characters after an edit. Returns whether more of the suggestion can follow.

        An edit that inserted more than two of its characters, or its last two, accepted them; else they were
        typed.
        """
        size = len(document) - len(self.before) - len(self.after)
        inserted = document[len(self.before) : len(self.before) + size] if size > 0 else ""
        if size < 0 or document != self.before + inserted + self.after or not self.text.startswith(inserted):
            return False
        more, self.inserted = size - self.inserted, size
        if more > 2 or (more > 1 and inserted == self.text):
            self.shown.taken += more
        return inserted != self.text


@dataclass(frozen=True)
class CursorPosition:
    """Where text is wanted, as offsets in the buffer of `uri`.

    While a pop-up is open, its selected entry `chosen` replaces the text from `start` to `end`; else both are
    the cursor. `automatic` is False if the user asked for a suggestion.
    """

    uri: str
    start: int
    end: int
    chosen: str = ""
    automatic: bool = True

    def sides(self, buffer: Buffer) -> tuple[str, str]:
        """The text before and after the cursor, as a model reads it."""
        text = buffer.text
        return normalize(text[: self.start]) + normalize(self.chosen), normalize(text[self.end :])


def window(prefix: str, suffix: str, margin: int = 0) -> tuple[str, str]:
    """Whole lines nearest to the cursor, at most MAX_PREFIX and MAX_SUFFIX characters, and `margin` more."""
    excess = max(0, len(prefix) - MAX_PREFIX - margin)
    if drop := -(-excess // WINDOW_STEP) * WINDOW_STEP:
        prefix = prefix[prefix.find("\n", drop, len(prefix) - WINDOW_STEP) + 1 or drop :]
    size = MAX_SUFFIX + margin
    if len(suffix) > size:
        suffix = suffix[: suffix.rfind("\n", 0, size) + 1 or size]
    return prefix, suffix
