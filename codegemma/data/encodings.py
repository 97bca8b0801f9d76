"""Decodes a file's bytes: by byte order mark, as UTF-8, by the encoding they declare, or by a safe detection.

A text decoded from the wrong encoding (mojibake) is worse than none: where nothing is certain, the file is
refused.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

# UTF-32's little-endian mark begins with that of UTF-16, and so comes first.
MARKS = (
    *((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16")),
)
# In one of the first two lines: a comment (PEP 263, Emacs, Vim, Ruby), or the form of XML or CSS.
DECLARATION = re.compile(
    rb"""[ \t\f]*(?:#|//|/?\*|--|;|%|"|<[!?]|@(?=charset))"""
    rb"""[^\n]*?(?:coding[:=]|charset[= ])[ \t]*["']?([-\w.]+)"""
)
META = re.compile(rb"""<meta[^>]+charset=["']?([-\w.]+)""", re.I)
# Codecs of Python that are no character sets, or use no bytes above 127: a declaration of them is ignored.
IGNORED_DECLARATIONS = frozenset(
    {"unicode_escape", "raw_unicode_escape", "utf_7", "idna", "punycode", "undefined"}
)
# A file that declares one of these sets is often written in its superset, as the WHATWG's labels assume.
SUPERSETS = {
    **{
        "iso8859-1": "cp1252",
        "ascii": "cp1252",
        "iso8859-9": "cp1254",
        "gb2312": "gb18030",
        "gbk": "gb18030",
    },
    **{"shift_jis": "cp932", "euc_kr": "cp949", "big5": "big5hkscs"},
}
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f-\x9f]")
DETECTION_BYTES = 50_000  # looked at, all from lines with bytes above 127
# The encodings that the detection may choose from.
DETECTABLE = [*(f"cp{number}" for number in range(1250, 1259)), "koi8_r", "koi8_u", "cp866", "iso8859_2"]
DETECTABLE += ["cp932", "euc_jp", "gb18030", "big5", "cp949"]
# Measures of charset-normalizer: how much the letters' frequencies are those of a language (coherence), and
# the share of implausible characters (chaos).
MIN_COHERENCE = 0.1
MAX_CHAOS = 0.1
# The characters above 127 of Western European text in cp1252.
WESTERN = frozenset("äöüßÄÖÜéèêëàâçîïôûùœæøåÅØÆñÑáíóúÁÉÍÓÚÀÈÊÇãõÃÕìòÿŒ“”‘’„‚–—…•©®™°±µ·«»§¿¡£€¥²³½¼×÷\xa0")
SIGN_IN_WORD = re.compile(r"[^\W\d_][©®°±µ·«»§¿¡£€¥²³½¼×÷„‚][^\W\d_]|[^\W\d_][ˇ˘˛˙˝]")
OTHER_SCRIPT = re.compile(r"[\u0370-\u052f\u0590-\u06ff]")  # Greek, Cyrillic, Hebrew, Arabic
MAX_MIXED_WORDS = 0.25  # of the words in another script, those that hold Latin letters too, such as "PDFы"
CYRILLIC_WORD = re.compile(r"[А-ЯЁ]?[а-яё]+|[А-ЯЁ]{2,}|[А-ЯЁ]")
# Among the commonest characters of Chinese comments, simplified and traditional.
COMMON_CHINESE = frozenset(
    "的一是不了在有我中大上下个個这這为為用时時数數字符返回文件函参參值类類取设設计計算结結果你好世界圆圓面积積"
)


def decode(data: bytes) -> tuple[str, str]:
    """The text of a file and its encoding.

    Raises ValueError("binary") or ValueError("unknown encoding").
    """
    marked = [(mark, name) for mark, name in MARKS if data.startswith(mark)]
    for mark, name in marked:
        if (text := _strict(data[len(mark) :] if name == "utf-8" else data, name)) is not None:
            return _without_nul(text), f"{name} with BOM"
    if marked:
        raise ValueError("unknown encoding")
    if b"\0" in data:
        return _without_mark(data)
    text, declared = _strict(data, "utf-8"), _declared(data)
    declared = declared or ("iso2022_jp" if b"\x1b$B" in data or b"\x1b$@" in data else "")
    is_escaped = declared.startswith(("iso2022", "hz")) and (b"\x1b" in data or b"~{" in data)
    if text is not None and not is_escaped and (text.isascii() or not _is_multibyte(declared)):
        return text, "utf-8"
    for name in (declared, SUPERSETS.get(declared, "")):
        by_name = _strict(data, name) if name else None
        if by_name is not None and not CONTROL.search(by_name):
            return by_name, name
    if text is not None:
        return text, "utf-8"
    if len(CONTROL.findall(data.decode("latin-1"))) > len(data) / 100 and not _detected(data):
        raise ValueError("binary")
    if name := _detected(data):
        return data.decode(name), name
    raise ValueError("unknown encoding")


def normal_lines(text: str) -> str:
    r"""The text with \n at the end of each line, as editors send it."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _strict(data: bytes, name: str) -> str | None:
    try:
        return data.decode(name)
    except (UnicodeError, LookupError):
        return None


def _without_nul(text: str) -> str:
    """The same text. Raises ValueError("binary") where it holds NUL."""
    if "\0" in text:
        raise ValueError("binary")
    return text


def _without_mark(data: bytes) -> tuple[str, str]:
    """The text of UTF-16 or UTF-32 without a mark, and the encoding.

    The text is mostly ASCII, as in code, without control characters; else raises ValueError("binary").
    """
    for name in ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be"):
        text = _strict(data, name)
        if text and not CONTROL.search(text) and sum(map(str.isascii, text)) > len(text) / 2:
            return text, name
    raise ValueError("binary")


def _declared(data: bytes) -> str:
    """Python's name of the encoding that a file declares; "" for none, an unknown one, or a kind of UTF."""
    lines = data[:2048].splitlines()[:2]
    match = next(filter(None, map(DECLARATION.match, lines)), None) or META.search(data[:1024])
    if match is None:
        return ""
    label = re.sub(r"-(unix|dos|mac)$", "", match[1].decode("ascii", "replace").lower())
    try:
        codec = codecs.lookup(label)
    except LookupError:
        return ""
    is_text = (
        getattr(codec, "_is_text_encoding", True) and codec.name.replace("-", "_") not in IGNORED_DECLARATIONS
    )
    return codec.name if is_text and not codec.name.startswith("utf") else ""


def _is_multibyte(name: str) -> bool:
    """Whether an encoding reads the two bytes of a UTF-8 character as fewer than two characters."""
    return bool(name) and len(b"\xc3\xa9".decode(name, "replace")) < 2


def _detected(data: bytes) -> str:
    """The encoding of bytes that are not UTF-8; "" where it is not certain."""
    sample = b"\n".join(line for line in data.splitlines() if not line.isascii())[:DETECTION_BYTES]
    for name in _candidates(sample):
        if (text := _strict(data, name)) is not None and not CONTROL.search(text):
            return name
    return ""


def _candidates(sample: bytes) -> Iterator[str]:
    """The encodings that a file may have, given its lines with bytes above 127; the first to fit counts."""
    from charset_normalizer import from_bytes

    likely = {
        str(match): match.encoding
        for match in reversed(list(from_bytes(sample, cp_isolation=DETECTABLE)))
        if match.coherence >= MIN_COHERENCE
        and match.chaos < MAX_CHAOS
        and not SIGN_IN_WORD.search(str(match))
        and not _is_mixed(str(match))
    }
    if len(likely) == 1:
        yield from likely.values()
    elif not likely and _is_western(sample):
        yield "cp1252"
    else:
        yield from (name for name in ("cp1251", "koi8_r", "cp866") if _is_cyrillic(sample, name))
        yield from _east_asian(sample)


def _is_mixed(text: str) -> bool:
    """Whether many words mix Latin letters with those of another script, as `dцndьrьr`, which is Turkish."""
    words = re.findall(r"[^\W\d_]+", re.sub(r"[\\%][a-zA-Z]", " ", text))  # without `\n` and `%s`
    others = [word for word in words if OTHER_SCRIPT.search(word)]
    mixed = [word for word in others if re.search(r"[a-zA-Z]", word)]
    return len(mixed) > MAX_MIXED_WORDS * len(others)


def _is_western(sample: bytes) -> bool:
    """Whether the bytes above 127, read as cp1252, are common Western European letters or typographic signs,
    with no three such letters in a row and no sign inside a word.
    """
    text = _strict(sample, "cp1252") or ""
    is_known = set(text) - WESTERN <= set(map(chr, range(128)))
    return (
        bool(text)
        and is_known
        and not SIGN_IN_WORD.search(text)
        and not re.search(r"[^\W\d_a-zA-Z]{3}", text)
    )


def _is_cyrillic(sample: bytes, name: str) -> bool:
    """Whether all words with bytes above 127 are Cyrillic, with vowels and capitals as words have them."""
    text = _strict(sample, name) or ""
    words = re.findall(r"[^\W\d_a-zA-Z]+", text)
    others = set(re.sub(r"[\x00-\x7f«»–—…№\xa0“”„]", "", text)) - set("".join(words))
    lower = sum(word.islower() or word[1:].islower() for word in words)
    has_vowels = all(re.search("[аеёиоуыэюя]", word.lower()) for word in words if len(word) > 3)
    is_shaped = all(map(CYRILLIC_WORD.fullmatch, words)) and lower >= len(words) / 2
    size, has_capital = sum(map(len, words)), any(not word.islower() for word in words)
    is_plain = not others and not _is_mixed(text)
    return size >= (6 if has_capital else 12) and is_plain and has_vowels and is_shaped


def _east_asian(sample: bytes) -> Iterator[str]:
    """Japanese by its kana, Korean by whole words of Hangul, Chinese by its commonest characters."""
    texts = {name: _strict(sample, name) for name in ("cp932", "euc_jp", "cp949", "gb18030", "big5")}
    characters = {
        name: re.sub(r"[\x00-\x7f\u3000-\u303f\uff01-\uff5e]", "", text)
        for name, text in texts.items()
        if text
    }
    for name in ("cp932", "euc_jp"):
        kana = len(re.findall(r"[\u3041-\u30ff]", characters.get(name, "")))
        if (
            kana >= 3
            and kana >= len(characters[name]) / 4
            and re.fullmatch(r"[\u3041-\u30ff\u4e00-\u9fff]*", characters[name])
        ):
            yield name
    common = {
        name: sum(map(COMMON_CHINESE.__contains__, characters.get(name, ""))) for name in ("gb18030", "big5")
    }
    likely = max(common, key=common.__getitem__)
    is_chinese = re.fullmatch(r"[\u4e00-\u9fff]*", characters.get(likely, " "))
    if is_chinese and common[likely] >= 2 and common[likely] > 2 * min(common.values()):
        yield likely
    elif len(characters.get("cp949", "")) >= 8 and re.fullmatch(r"[\uac00-\ud7a3]*", characters["cp949"]):
        yield "cp949"
