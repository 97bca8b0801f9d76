"""Shell commands that destroy what they name: suggested only where the user asked."""

from __future__ import annotations

import re

SHELL_LANGUAGES = frozenset(
    {"shell", "shellscript", "sh", "bash", "zsh", "fish", "makefile", "dockerfile", "powershell"}
)
MAX_LINE = 500  # the last characters of a line are searched: the time grows with the square of their number

_DESTRUCTIVE = re.compile(
    r"""
    \brm\s+(?:-\S+\s+)*-(?:\w*[rRf]\w*|-recursive|-force)\b   # rm -rf, rm -r, rm --force
    | \bfind\b[^\n|;]*\s-delete\b | \bfind\b[^\n;]*-exec\s+rm\b | \bxargs\b[^\n;|]*\brm\b
    | \b(?:mkfs(?:\.\w+)?|wipefs|shred|fdisk|parted|sgdisk|blkdiscard)\b
    | \bdd\b[^\n]*\bof=
    | >\s*/dev/(?!null\b|stdout\b|stderr\b|tty\b|fd/)\w
    | \bch(?:mod|own)\s+(?:-\S+\s+)*-\w*R\w*\s+\S+\s+/(?:\s|$|\*)
    | \bgit\s+(?:push\b[^\n]*(?:\s--force\b(?!-with-lease)|\s-f\b)|reset\s+--hard\b|clean\s+-\w*f)
    | \b(?:shutdown|reboot|halt|poweroff)\b
    | \b(?:kill|pkill|killall)\s+-(?:9|KILL|SIGKILL)\b
    | \bdocker\s+(?:system|volume|image)\s+prune\b | \bkubectl\s+delete\b | \bterraform\s+destroy\b
    | \b(?:DROP|TRUNCATE)\s+(?:TABLE|DATABASE|SCHEMA)\b
    | \btruncate\s+(?:-s|--size[= ])\s*0\b
    | \buserdel\b | \bcrontab\s+-r\b | \biptables\s+-F\b
    | :\(\)\s*\{\s*:\s*\|\s*:                                   # a fork bomb
    | \b(?:curl|wget)\b[^\n|]*\|\s*(?:sudo\s+)?(?:ba|z|da)?sh\b # runs what a server sends
    | \bRemove-Item\b[^\n]*-(?:Recurse|Force)\b | \bFormat-Volume\b
    """,
    re.VERBOSE | re.IGNORECASE,
)


def is_destructive(text: str, language: str) -> bool:
    """Whether code in a shell language (as an editor or `data.documents.language_of` names it) has a command
    that deletes, overwrites or ends things without asking."""
    if language.lower() not in SHELL_LANGUAGES:
        return False
    return any(_DESTRUCTIVE.search(line[-MAX_LINE:]) for line in text.split("\n"))
