"""Finds secrets and personal data in a text, and the fake values to put in their place.

A fake value has the shape of the original, is the same wherever the original occurs, and is never taken for
a secret again. A build replaces both kinds (clean.py), a prompt only secrets (safety/secrets.py). The rules
are in rules/secrets.toml.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import ipaddress
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from codegemma.data.documents import RULES

EMAIL_START = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}$")
EMAIL_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.)+([A-Za-z]{2,24})(?![\w(])")
AUTHOR_LABEL = re.compile(r"""\W?\w+\W?[:= \t"'\[(]*(?:by[: ]+)?""")
NAME_WORD = r"[A-Z][\w.’-]*(?:'[A-Z]\w+)?"
AUTHOR_NAME = re.compile(rf"{NAME_WORD}(?: (?:(?:van|von|de|da|der|la) )*{NAME_WORD}){{1,3}}")
BETWEEN_AUTHORS = re.compile(r"""\s*(?:<[^<>\n]*>|\([^()\n]*\))?(?:,| and| &|;)+ *(?:and )?""")
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w.]*\d|-)")
IPV4_CORE = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d")  # quick to search; the whole address is around it
VERSION_BEFORE = re.compile(r"(version|ver|v|==|>=|<=|~=|release|oid|section|§)\W*$")
IPV6 = re.compile(r"(?<![\w:.])[0-9a-fA-F]{1,4}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
IPV6_CORE = re.compile(r":[0-9a-fA-F]{1,4}:[0-9a-fA-F]{0,4}:")
WORLD_PHONE = re.compile(r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]\d{2,4}){2,4}(?![\w.-]*\d)")
US_PHONE_START = re.compile(r"(?<![\w.+-])(?:\(\d{3}\) ?|[2-9]\d\d[-.])[2-9]\d\d$")
US_PHONE_END = re.compile(r"[-.]\d{4}(?![\w.-])")


@dataclass(frozen=True)
class Finding:
    """A secret or a personal datum at text[start:end], and the fake value that replaces it."""

    start: int
    end: int
    kind: str
    fake: str


Finder = Callable[[str, int], Iterable[Finding]]  # given a text and the offset of a literal in it


class Redactor:
    """Applies the rules in one Aho-Corasick pass over a text. Immutable; make one per process."""

    def __init__(self, path: Path = RULES / "secrets.toml"):
        import ahocorasick_rs

        document = tomllib.loads(path.read_text("utf-8"))
        self.placeholders = tuple(document["placeholders"]["words"])
        self.personal: dict[str, Any] = document["personal"]
        finders: list[tuple[str, Finder]] = [("@", self._email)]
        finders += [(literal, self._author) for literal in self.personal["author_literals"]]
        for rule in document["rule"]:
            finders += [(literal, self._secret(rule)) for literal in rule["literals"]]
        self._finders = [finder for _, finder in finders]
        self._automaton = ahocorasick_rs.AhoCorasick([literal for literal, _ in finders])

    def __call__(self, text: str) -> tuple[str, Counter[str]]:
        """The text with every finding replaced, and how many there were of each kind."""
        parts, end, kinds = [], 0, Counter[str]()
        for finding in self.find(text):
            parts += [text[end : finding.start], finding.fake]
            end = finding.end
            kinds[finding.kind] += 1
        return "".join([*parts, text[end:]]), kinds

    def find(self, text: str) -> list[Finding]:
        """Findings in order, without overlap: of two that overlap the earlier, then the longer, is taken."""
        findings: list[Finding] = []
        for which, start, _ in self._automaton.find_matches_as_indexes(text, overlapping=True):
            findings += self._finders[which](text, start)
        findings += [*self._ipv4(text), *_ipv6(text), *_phones(text)]
        separate: list[Finding] = []
        for finding in sorted(findings, key=lambda f: (f.start, -f.end, f.kind)):
            if not separate or finding.start >= separate[-1].end:
                separate.append(finding)
        return separate

    def _secret(self, rule: dict[str, Any]) -> Finder:
        kind, pattern = rule["name"], re.compile(rule["pattern"])
        # A token such as ghp_... begins a word; a name such as `password` may be the end of a longer one.
        begins_word = rule["literals"][0][0].isalpha() and kind not in ("password", "key or token")
        group = "value" if "value" in pattern.groupindex else 0

        def find(text: str, start: int) -> Iterator[Finding]:
            match = pattern.match(text, start)
            if not match or (begins_word and re.match(r"\w", text[max(0, start - 1) : start])):
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
        if check in ("not a placeholder", "mixed"):
            is_plain = any(word in value.lower() for word in self.placeholders) or len(set(value)) < 5
            classes = sum(bool(re.search(kind, value)) for kind in ("[a-z]", "[A-Z]", r"\d", r"[^\w]"))
            return not is_plain and classes >= 2 and (check != "mixed" or bool(re.search(r"\d", value)))
        return True

    def _email(self, text: str, offset: int) -> Iterator[Finding]:
        local = EMAIL_START.search(text[max(0, offset - 64) : offset])
        domain = EMAIL_DOMAIN.match(text, offset + 1)
        if not local or not domain:
            return
        top, address = domain[1].lower(), f"{local[0]}@{domain[0]}".lower()
        is_public = len(top) == 2 or top in self.personal["top_domains"]
        is_kept = domain[0].lower().endswith(tuple(self.personal["domains_kept"]))
        if is_public and not is_kept and not address.startswith(("git@", "noreply@")):
            fake = f"user-{_hash(address):016x}"[:13] + "@example.com"
            yield Finding(offset - len(local[0]), domain.end(), "e-mail", fake)

    def _author(self, text: str, offset: int) -> Iterator[Finding]:
        label = AUTHOR_LABEL.match(text, offset)
        if label is None or (text[offset].isalpha() and offset and text[offset - 1].isalnum()):
            return
        line_end = text.find("\n", offset)
        first, last = self.personal["first_names"], self.personal["last_names"]
        start = label.end()
        while match := AUTHOR_NAME.match(text, start, line_end if line_end >= 0 else len(text)):
            number, words = _hash(match[0]), match[0].split(" ")
            if words[0] not in first or words[-1] not in last:  # else it is one of our fake names
                fake = f"{first[number % len(first)]} {last[number // 97 % len(last)]}"
                yield Finding(match.start(), match.end(), "author", fake)
            gap = BETWEEN_AUTHORS.match(text, match.end())
            if not gap:
                return
            start = gap.end()

    def _ipv4(self, text: str) -> Iterator[Finding]:
        for core in IPV4_CORE.finditer(text):
            start = max(0, core.start() - 3)
            match = IPV4.search(text, start, core.end() + 4)
            if not match or VERSION_BEFORE.search(text[max(0, start - 12) : match.start()].lower()):
                continue
            is_version = max(map(int, match[0].split("."))) < 20
            if not is_version and match[0] not in self.personal["addresses_kept"] and _is_global(match[0]):
                number = _hash(match[0])
                network = ("192.0.2", "198.51.100", "203.0.113")[number % 3]  # RFC 5737: documentation
                yield Finding(match.start(), match.end(), "ipv4", f"{network}.{number // 3 % 254 + 1}")


def _ipv6(text: str) -> Iterator[Finding]:
    for core in IPV6_CORE.finditer(text):
        for match in IPV6.finditer(text, max(0, core.start() - 40), core.end() + 40):
            holds_core = match.start() <= core.start() and core.end() <= match.end()
            if holds_core and _is_global(match[0]):
                yield Finding(match.start(), match.end(), "ipv6", f"2001:db8::{_hash(match[0]) & 0xFFFF:x}")


def _phones(text: str) -> Iterator[Finding]:
    for plus in re.finditer(r"\+\d", text):
        start = plus.start()
        match = WORLD_PHONE.match(text, start)
        if not match or text[max(0, start - 1) : start].isalnum() or "555-01" in match[0]:
            continue
        if 9 <= sum(map(str.isdigit, match[0])) <= 15:
            yield Finding(start, match.end(), "phone", f"+1-202-555-01{_hash(match[0]) % 100:02d}")
    for end in US_PHONE_END.finditer(text):
        match = US_PHONE_START.search(text[max(0, end.start() - 10) : end.start()])
        if match and text[end.start() - 3 : end.start() + 3] != "555-01":
            start = end.start() - len(match[0])
            number = _hash(text[start : end.end()]) % 100
            yield Finding(start, end.end(), "phone", f"202-555-01{number:02d}")


def _is_global(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return parsed.is_global and not parsed.is_multicast and not str(parsed).endswith(".0")


def _hash(value: str) -> int:
    data = value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=b"codegemma").digest(), "big")


def _fake_secret(value: str, kind: str) -> str:
    """As long as the original, and marked with EXAMPLE so that it is never taken for a secret again."""
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
