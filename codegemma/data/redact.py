"""Finds secrets and personal data in a text, and the fake values to put in their place.

A fake secret is as long as the original (private keys excepted, and at least 7 characters), and is never
taken for a secret again; fake personal data are valid values of their kind. Either is the same wherever the
original occurs. A build replaces both kinds (clean.py), a prompt only secrets (safety/secrets.py). The rules
are in rules/secrets.toml; personal.py has the patterns of personal data.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from codegemma.data.documents import RULES
from codegemma.data.personal import Finding, find_personal

Finder = Callable[[str, int], Iterable[Finding]]  # given a text and the offset of a literal in it


class Redactor:
    """Applies the rules in one Aho-Corasick pass over a text. Immutable; make one per process."""

    def __init__(self, path: Path = RULES / "secrets.toml"):
        import ahocorasick_rs

        document = tomllib.loads(path.read_text("utf-8"))
        self.placeholders = tuple(document["placeholders"]["words"])
        finders: list[tuple[str, Finder]] = []
        for rule in document["rule"]:
            finders += [(literal, self._secret(rule)) for literal in rule["literals"]]
        self._finders = [finder for _, finder in finders]
        self._automaton = ahocorasick_rs.AhoCorasick([literal for literal, _ in finders])

    def __call__(self, text: str) -> tuple[str, Counter[str]]:
        """The text with every finding replaced, and how many there were of each kind."""
        return replace_findings(text, self.find(text))

    def find(self, text: str) -> list[Finding]:
        """Findings in order, without overlap: of two that overlap the earlier, then the longer, is taken."""
        findings: list[Finding] = []
        for which, start, _ in self._automaton.find_matches_as_indexes(text, overlapping=True):
            findings += self._finders[which](text, start)
        findings += find_personal(text)
        separate: list[Finding] = []
        for finding in sorted(findings, key=lambda f: (f.start, -f.end, f.kind)):
            if not separate or finding.start >= separate[-1].end:
                separate.append(finding)
        return separate

    def _secret(self, rule: dict[str, Any]) -> Finder:
        kind, pattern = rule["name"], re.compile(rule["pattern"])
        # A token such as ghp_... begins a word; a name such as `password` may be the end of a longer one.
        begins_word = rule["literals"][0][0].isalpha() and kind not in ("password", "key or token")
        before = re.compile(rule["before"]) if "before" in rule else None
        group = "value" if "value" in pattern.groupindex else 0

        def find(text: str, start: int) -> Iterator[Finding]:
            match = pattern.match(text, start)
            if not match or (begins_word and re.match(r"\w", text[max(0, start - 1) : start])):
                return
            if before and not before.fullmatch(_line_before(text, start)):
                return
            value = match[group]
            is_secret = "EXAMPLE" not in value and entropy(value) >= rule.get("entropy", 0.0)
            if is_secret and self._passes(rule.get("check", ""), value):
                yield Finding(match.start(group), match.end(group), kind, _fake_secret(value, kind))

        return find

    def _passes(self, check: str, value: str) -> bool:
        """Whether a value passes the test that its rule names."""
        if check == "crc32":
            return checksum(value[:-6]) == value[-6:]
        if check == "jwt":
            return _is_jwt(value)
        if check in ("not a placeholder", "mixed", "random"):
            is_plain = any(word in value.lower() for word in self.placeholders) or len(set(value)) < 5
            classes = sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", r"\d", r"[^\w]"))
            has_digit = check == "not a placeholder" or bool(re.search(r"\d", value))
            return not is_plain and classes >= 2 and has_digit and (check != "random" or _is_random(value))
        return True


def replace_findings(text: str, findings: Iterable[Finding]) -> tuple[str, Counter[str]]:
    """The text with findings (in order, without overlap) replaced, and how many there were of each kind."""
    parts, end, kinds = [], 0, Counter[str]()
    for finding in findings:
        parts += [text[end : finding.start], finding.fake]
        end = finding.end
        kinds[finding.kind] += 1
    return "".join([*parts, text[end:]]), kinds


def _fake_secret(value: str, kind: str) -> str:
    """A value marked with EXAMPLE, so that it is never taken for a secret again.

    It is as long as the original, but at least 7 characters; that of a private key is one line.
    """
    if kind == "private key":
        return "\nEXAMPLE\n"
    stream = hashlib.shake_128(value.encode("utf-8", "surrogatepass")).digest(len(value))
    fake = "EXAMPLE" + "".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"[byte % 32] for byte in stream)
    return fake[: max(len(value), 7)]


def entropy(value: str) -> float:
    """Shannon entropy in bits per character."""
    return -sum(n / len(value) * math.log2(n / len(value)) for n in Counter(value).values()) if value else 0.0


def checksum(payload: str) -> str:
    """The six base-62 digits of the CRC-32 that end GitHub's and npm's tokens."""
    digits = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    number, text = binascii.crc32(payload.encode()), ""
    while number:
        number, digit = divmod(number, 62)
        text = digits[digit] + text
    return text.rjust(6, "0")


def _line_before(text: str, start: int) -> str:
    """The text of a line before an offset, at most its last 100 characters."""
    first = max(0, start - 100)
    return text[max(first, text.rfind("\n", first, start) + 1) : start]


def _is_random(value: str) -> bool:
    """Whether a value without quotes looks drawn at random, and not like a name, a version or a UUID.

    A name has long runs of letters of one case, `Sha256Digest`; what was drawn at random has short ones.
    """
    if re.fullmatch(r"[0-9a-f]{32,}", value):
        return True
    if re.fullmatch(
        r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}|\d{4}-\d\d-\d\d.*|v?\d+\.\d+.*", value
    ):
        return False
    limit = 3.0
    if re.fullmatch(r"[A-Za-z_][\w.-]*", value):
        if not all(re.search(kind, value) for kind in ("[a-z]", "[A-Z]", r"\d")):
            return False
        limit = 2.0 if len(value) < 20 else 3.0
    runs = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+|[^\w.-]", value)
    return len("".join(runs)) < limit * len(runs)


def _is_jwt(value: str) -> bool:
    head = value.split(".")[0]
    try:
        return "alg" in json.loads(base64.urlsafe_b64decode(head + "=" * (-len(head) % 4)))
    except (ValueError, TypeError):
        return False


@cache
def default_redactor() -> Redactor:
    """The redactor of this package's rules."""
    return Redactor()
