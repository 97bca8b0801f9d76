"""Finds personal data in a text: e-mail addresses, authors' names, IP addresses and telephone numbers.

Source code is full of what merely looks like these: `this@Tree.id`, `q@k.mT`, versions of four numbers,
arithmetic. So a match counts only with evidence around it; the more often other code looks the same, the more
evidence it needs.
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from codegemma.data.documents import RULES


@dataclass(frozen=True)
class Finding:
    """A secret or a personal datum at text[start:end], and the fake value that replaces it."""

    start: int
    end: int
    kind: str
    fake: str


PERSONAL_DATA = ("e-mail", "author", "ipv4", "ipv6", "phone")  # the kinds of Finding that are no secrets
CONTEXT = 120  # characters of its line that are looked at before and after a match


@cache
def rules() -> dict[str, Any]:
    """The lists of rules/personal.toml; those of words as sets."""
    lists = tomllib.loads((RULES / "personal.toml").read_text("utf-8"))
    return {name: value if name.startswith("fake") else frozenset(value) for name, value in lists.items()}


def find_personal(text: str) -> Iterator[Finding]:
    """All personal data of a text, in no order; findings may overlap."""
    yield from _emails(text)
    yield from _authors(text)
    yield from _ipv4(text)
    yield from _ipv6(text)
    yield from _world_phones(text)
    yield from _us_phones(text)


def _line_around(text: str, start: int, end: int) -> tuple[str, str]:
    """What stands before and after text[start:end] in its line."""
    before = text[max(0, start - CONTEXT) : start].rpartition("\n")[2]
    return before, text[end : end + CONTEXT].partition("\n")[0]


# ---------------------------------------------------------------------------------------------------- e-mail
EMAIL_START = re.compile(r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}$")
EMAIL_DOMAIN = re.compile(r"(?:[A-Za-z0-9-]{1,63}\.)+([A-Za-z]{2,24})(?![\w(\[]|:[/~.])")
NOT_BEFORE_EMAIL = re.compile(
    r"[$&\\/]$|://[^\s/@]*$"  # a variable, a macro, a path, the user of a URL
    r"|\b(?:ssh|scp|sftp|rsync|mosh|message-id|in-reply-to|references)\b.*$|\bselect\b.*\b(?:from|join)\s+$",
    re.I,
)
COMMENT = re.compile(r"(?:^|\s)(?:#|//|/?\*|--|;|%|<!--|\"\"\"|''')")
MAIL_WORD = re.compile(
    r"\b(?:(?:e-?)?mails?|mailto|contacts?|authors?|maintain\w*|owners?|by|reports? to|copyright|b?cc|from|to"
    r"|reply|sender|recipient|signed-off|reviewed)\b|email|\(c\)|\u00a9",
    re.I,
)
OPERATOR_BEFORE = re.compile(r"(?:[=+*/%&|^\[]|\w\(|\b(?:return|yield|await|in|not|and|or|if|else))\s*$")
OPERATOR_AFTER = re.compile(r"\s*(?:[+*/%&|^]|[=!<>]=|=(?!=))\s*[\w(]")
WORDS_BEFORE = re.compile(r"(?:\b(?!return|yield|await|not|and|assert|print|new)[A-Za-z]+[,:]? ){2}$")


def _emails(text: str) -> Iterator[Finding]:
    for sign in re.finditer("@", text):
        local = EMAIL_START.search(text[max(0, sign.start() - 64) : sign.start()])
        domain = EMAIL_DOMAIN.match(text, sign.end())
        if not local or not domain:
            continue
        start, address = sign.start() - len(local[0]), f"{local[0]}@{domain[0]}"
        before, after = _line_around(text, start, domain.end())
        if _is_email(local[0], domain[0], before, after):
            fake = f"user-{hash_of(address.lower()):016x}"[:13] + "@example.com"
            yield Finding(start, domain.end(), "e-mail", fake)


def _is_email(local: str, domain: str, before: str, after: str) -> bool:
    lists, labels, top = rules(), domain.lower().split("."), domain.rpartition(".")[2]
    is_known = top.lower() in lists["top_domains"] or top.lower() in lists["country_domains"]
    is_kept = any(
        domain.lower() == kept or domain.lower().endswith(f".{kept}") for kept in lists["domains_kept"]
    )
    if not is_known or is_kept or local.lower() in lists["not_users"] or NOT_BEFORE_EMAIL.search(before):
        return False
    # An attribute rather than a domain, such as `q@k.mT` or `this@Tree.id`:
    has_variable = labels[0] in lists["not_domains"] or any(len(label) == 1 for label in labels)
    is_mixed_case = domain != domain.lower() and domain != domain.upper()
    is_attribute = top.lower() in lists["attributes"]
    if (
        has_variable
        or is_mixed_case
        and (is_attribute or top != top.lower() or top not in lists["top_domains"])
    ):
        return False
    if before[-1:] + after[:1] in ("<>", '""', "''", "``"):
        return True
    is_announced = bool(MAIL_WORD.search(before))
    is_alone = not (before + after).strip() and len(local) > 1
    is_expression = bool(OPERATOR_BEFORE.search(before) or OPERATOR_AFTER.match(after))
    return is_announced or not is_expression and (not is_attribute or is_alone or _is_prose(before))


def _is_prose(before: str) -> bool:
    """Whether what follows in the line stands in a comment, a string or a sentence, judging by `before`."""
    quotes = [before.count(quote) - before.count("\\" + quote) for quote in ("'", '"')]
    is_quoted = any(count % 2 for count in quotes)
    return is_quoted or bool(COMMENT.search(before) or WORDS_BEFORE.search(before))


# ------------------------------------------------------------------------------------------------- addresses
IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)")
IPV4_CORE = re.compile(r"\.\d{1,3}\.\d{1,3}\.\d")  # quick to search; the whole address is around it
VERSION_BEFORE = re.compile(
    r"(?:version|release|firmware|driver|revision|build|update|upgrade|figure|table|chapter|clause|appendix|since"
    r"|(?<![a-z])(?:v|ver|vers|rel|rev|fw|oid|sec|sect|section|fig|jdk|sdk|patch|rfc|tag|requires?))s?[^a-z\n]{0,8}$"
    r"|(?:[=!<>~]=|~>|\^|~|\u00a7)\s*$|(?<!/)/$|[a-z]-$|\b(?:iso|iec|ansi|posix)\b[^;]*$|\bc\+\+\d*\s+$"
)
MAX_SECTION = 40  # no number of a section is as large, and few addresses have four numbers below it
HEADING_BEFORE, HEADING_AFTER = re.compile(r"[ \t#*/;%-]*$"), re.compile(r"\.?[ \t]+[A-Z][a-z]+")
COMMENT_START = re.compile(r"[ \t]*(?:#|//|/?\*|--|;|%)[ \t#*/;%!<-]*\[?")
# 2000::/3, from which all public addresses are assigned
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:])")
IPV6_CORE = re.compile(r":[0-9a-fA-F]{1,4}:[0-9a-fA-F]{0,4}:")


def _ipv4(text: str) -> Iterator[Finding]:
    for core in IPV4_CORE.finditer(text):
        match = IPV4.search(text, max(0, core.start() - 3), core.end() + 4)
        if not match or not _is_public(match[0]) or _is_version(text, match):
            continue
        number = hash_of(match[0])
        network = ("192.0.2", "198.51.100", "203.0.113")[number % 3]  # RFC 5737: documentation
        yield Finding(match.start(), match.end(), "ipv4", f"{network}.{number // 3 % 254 + 1}")


def _is_version(text: str, match: re.Match[str]) -> bool:
    """Whether four numbers with dots are a version, a section or an object identifier."""
    largest = max(map(int, match[0].split(".")))
    if largest < 20 or match[0].startswith(("2.5.4.", "2.5.29.")):
        return True
    before, after = _line_around(text, match.start(), match.end())
    is_heading = HEADING_BEFORE.fullmatch(before) and HEADING_AFTER.match(after)
    return bool(
        is_heading
        or VERSION_BEFORE.search(before.lower())
        or largest < MAX_SECTION
        and _is_section(before, after)
    )


def _is_section(before: str, after: str) -> bool:
    """Whether a comment begins with the number, or has it in brackets, without a port."""
    if re.match(r"\]?:\d", after):
        return False
    is_in_brackets = before.endswith("[") and after.startswith("]") and COMMENT.search(before)
    return bool(is_in_brackets or COMMENT_START.fullmatch(before))


def _ipv6(text: str) -> Iterator[Finding]:
    for core in IPV6_CORE.finditer(text):
        for match in IPV6.finditer(text, max(0, core.start() - 40), core.end() + 40):
            holds_core = match.start() <= core.start() and core.end() <= match.end()
            if holds_core and _is_public(match[0]):
                yield Finding(match.start(), match.end(), "ipv6", f"2001:db8::{hash_of(match[0]) & 0xFFFF:x}")


def _is_public(address: str) -> bool:
    """Whether an address is of a host on the internet, and not a well-known one that is kept."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    is_host = parsed.is_global and not parsed.is_multicast and not str(parsed).endswith(".0")
    return is_host and str(parsed) not in rules()["addresses_kept"]


# ------------------------------------------------------------------------------------------------ telephones
# Country codes of ITU-T E.164, then groups that one separator divides.
WORLD_PHONE = re.compile(
    r"\+(?P<country>1|7|2[07]|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|3[578]\d|42\d|5[09]\d"
    r"|6[7-9]\d|8[05-8]\d|9[67]\d|99[1-68])(?P<area>[ .-]?\(\d{1,4}\)[ .-]?|[ .-])"
    r"(?P<rest>\d{1,4}(?:(?P<sign>[ .-])\d{2,4}(?:(?P=sign)\d{2,4})*)?)(?![\w-]|[ .]\d)"
)
NORTH_AMERICAN = r"[2-9](?!11)\d\d[-. ][2-9](?!11)\d\d[-. ]\d{4}"
US_PHONE_START = re.compile(r"(?<![\w.+-])(?:\([2-9](?!11)\d\d\) ?|[2-9](?!11)\d\d[-.])[2-9](?!11)\d\d$")
US_PHONE_END = re.compile(r"[-.]\d{4}(?![\w-]|\.\w)")
PHONE_WORD = re.compile(
    r"phone|mobile|\b(?:tel|call|fax|cell|hotline|dial|sms|whats-?app|contact|reach|ring)\b", re.I
)
OTHER_NUMBER = re.compile(
    r"part|sku|serial|isbn|model|order|invoice|\bid\b|case|ticket|version|range|size|code|ref\b|batch|lot\b|item"
    r"|pattern|mask|date|account|catalog",
    re.I,
)


def _world_phones(text: str) -> Iterator[Finding]:
    for plus in re.finditer(r"\+[1-9]", text):
        match = WORLD_PHONE.match(text, plus.start())
        if not match or re.match(r"[\w)\].+]", text[max(0, plus.start() - 1) : plus.start()]):
            continue
        digits = "".join(filter(str.isdigit, match["area"] + match["rest"]))
        shape = re.fullmatch(
            NORTH_AMERICAN, re.sub(r"[().-]+ ?|^ ", "-", match["area"] + match["rest"]).strip("-")
        )
        is_possible = bool(shape) if match["country"] == "1" else 7 <= len(digits) <= 13
        if is_possible and "555-01" not in match[0]:
            yield Finding(match.start(), match.end(), "phone", f"+1-202-555-01{hash_of(match[0]) % 100:02d}")


def _us_phones(text: str) -> Iterator[Finding]:
    for last in US_PHONE_END.finditer(text):
        match = US_PHONE_START.search(text[max(0, last.start() - 10) : last.start()])
        if not match or text[last.start() - 3 : last.start() + 3] == "555-01":
            continue
        start = last.start() - len(match[0])
        if _is_us_phone(match[0] + last[0], *_line_around(text, start, last.end())):
            number = hash_of(text[start : last.end()]) % 100
            yield Finding(start, last.end(), "phone", f"202-555-01{number:02d}")


def _is_us_phone(number: str, before: str, after: str) -> bool:
    """Whether digits in the form of a US number are one: by a word before, parentheses, or quotes around."""
    if PHONE_WORD.search(before) or number.startswith("("):
        return True
    is_enclosed = before[-1:] + after[:1] in ('""', "''", "><")
    return is_enclosed and "." not in number and not OTHER_NUMBER.search(before)


# --------------------------------------------------------------------------------------------------- authors
AUTHOR_LABEL = re.compile(
    r"(?:@author|(?<!\w)(?:Authors?:|author:|AUTHOR:|__author__|author ?=|[Mm]aintainer:|maintainer=|Contact:"
    r"|[Ww]ritten by|[Cc]reated by))"
    r"""[:= \t"'\[(]*(?:by[: ]+)?"""
)
NAME_WORD = r"[A-Z][\w.\u2019-]*(?:'[A-Z]\w+)?"
AUTHOR_NAME = re.compile(rf"{NAME_WORD}(?: (?:(?:van|von|de|da|der|la) )*{NAME_WORD}){{1,3}}")
BETWEEN_AUTHORS = re.compile(r"""\s*(?:<[^<>\n]*>|\([^()\n]*\))?(?:,| and| &|;)+ *(?:and )?""")


def _authors(text: str) -> Iterator[Finding]:
    lists = rules()
    first, last = lists["fake_first_names"], lists["fake_last_names"]
    for label in AUTHOR_LABEL.finditer(text):
        line_end = text.find("\n", label.start())
        start = label.end()
        while match := AUTHOR_NAME.match(text, start, line_end if line_end >= 0 else len(text)):
            number, words = hash_of(match[0]), match[0].split(" ")
            is_fake = words[0] in first and words[-1] in last
            if not is_fake and not lists["not_names"] & {word.strip(".,").lower() for word in words}:
                fake = f"{first[number % len(first)]} {last[number // 97 % len(last)]}"
                yield Finding(match.start(), match.end(), "author", fake)
            gap = BETWEEN_AUTHORS.match(text, match.end())
            if not gap:
                break
            start = gap.end()


def hash_of(value: str) -> int:
    """64 bits that choose a fake value, the same wherever the value occurs."""
    data = value.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=b"codegemma").digest(), "big")
