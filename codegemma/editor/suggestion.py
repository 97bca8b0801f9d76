"""The place where text is wanted, the window of text around it, and what becomes of a suggestion there."""

from __future__ import annotations

from dataclasses import dataclass

from codegemma.editor.buffers import Buffer, normalize
from codegemma.serve import stats

MAX_PREFIX, MAX_SUFFIX = 49_152, 12_288  # characters around the cursor that a prompt is made of
WINDOW_STEP = 8_192  # the prefix starts at steps of so many characters, so that typing keeps the cache valid
REDACTION_MARGIN = 8_192  # characters beyond the window, where a secret that its edge cuts is found


@dataclass
class Suggestion:
    """What the editor was last given: `text`, to stand between `before` and `after` in the document `uri`."""

    uri: str
    before: str
    text: str
    after: str
    shown: stats.Shown
    inserted: int = 0  # characters of `text` that the document has by now

    def remaining(self, before: str, after: str) -> str:
        """The rest of it where the user has typed its beginning; "" where it does not fit at the cursor."""
        typed = before[len(self.before) :]
        fits = after == self.after and before == self.before + typed and self.text.startswith(typed)
        return self.text[len(typed) :] if fits else ""

    def follow_edit(self, document: str) -> bool:
        """Counts what an edit took over of it, and returns whether the suggestion still fits `document`.

        More than two characters at once, or the last two, were accepted; fewer were typed.
        """
        size = len(document) - len(self.before) - len(self.after)
        taken = document[len(self.before) : len(self.before) + size] if size > 0 else ""
        if size < 0 or document != self.before + taken + self.after or not self.text.startswith(taken):
            return False
        more, self.inserted = size - self.inserted, size
        if more > 2 or (more > 1 and taken == self.text):
            self.shown.taken += more
        return taken != self.text


@dataclass(frozen=True)
class CursorPosition:
    """Where text is wanted, as offsets in the buffer of `uri`.

    The text between `start` and `end` is replaced by `chosen`, the entry that is selected in the editor's
    pop-up. Without a pop-up both are the cursor. `automatic` is False where the user asked for a suggestion.
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
