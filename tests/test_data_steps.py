"""Each step alone: archives that attack, encodings, licences, secrets on a planted corpus, copies, splits."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import string
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tree_sitter")

from vocabularies import small

from codegemma import prompts
from codegemma.data import clean, dedup, documents, fim, licences, pack, redact, splits, syntax
from codegemma.data.archives import ReadLimits
from codegemma.data.documents import Document, Outcome, language_of
from codegemma.data.draw import Draw
from codegemma.data.encodings import decode
from codegemma.data.sources import Source, expand, read
from codegemma.prompts import parse_fim
from codegemma.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_sentencepiece(small())


# ---------------------------------------------------------------------------------------------- documents
def read_source(source, limits=None):
    """The documents by path, and the reasons of the other inputs by path."""
    results = list(read(source, limits))
    return (
        {each.path: each for each in results if isinstance(each, Document)},
        {each.path: each.reason for each in results if isinstance(each, Outcome)},
    )


def test_checkout_without_links_ignored_and_vendored_files(tmp_path):
    root = tmp_path / "work"
    for name, text in {
        ".gitignore": "*.log.py\nbuild/\n!keep.log.py\n",
        "a.py": "x = 1\n",
        "b.log.py": "x\n",
        "keep.log.py": "k\n",
        "build/c.py": "x\n",
        "sub/.gitignore": "/d.py\n",
        "sub/d.py": "x\n",
        "sub/e/d.py": "x\n",
        "node_modules/m.js": "x\n",
        "tool": "#!/usr/bin/env python3\nprint()\n",
        "GNUmakefile": "all:\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (tmp_path / "outside.py").write_text("secret\n")
    os.symlink(tmp_path / "outside.py", root / "link.py")
    os.symlink(root, root / "loop")
    git = root / ".git"
    (git / "refs/heads").mkdir(parents=True)
    (git / "HEAD").write_text("ref: refs/heads/main\n")
    (git / "refs/heads/main").write_text("a" * 40 + "\n")
    (git / "config").write_text('[remote "origin"]\n\turl = git@example.org:me/proj.git\n')
    kept, reasons = read_source(expand(str(root))[0])
    assert sorted(kept) == [
        ".gitignore",
        "GNUmakefile",
        "a.py",
        "keep.log.py",
        "sub/.gitignore",
        "sub/e/d.py",
        "tool",
    ]
    assert reasons == {
        "b.log.py": "ignored by git",
        "build/": "ignored by git",
        "sub/d.py": "ignored by git",
        "node_modules/": "vendored",
        "link.py": "symbolic link",
        "loop": "symbolic link",
    }
    assert kept["a.py"].repository == "example.org/me/proj" and kept["a.py"].commit == "a" * 40
    assert (kept["tool"].language, kept["GNUmakefile"].language) == ("python", "makefile")


def tar_of(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for info, data in members:
            info = tarfile.TarInfo(info) if isinstance(info, str) else info
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return Source(path, "tar")


def test_tar_that_attacks(tmp_path):
    link = tarfile.TarInfo("p/link.py")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    pipe = tarfile.TarInfo("p/pipe")
    pipe.type = tarfile.FIFOTYPE
    source = tar_of(
        tmp_path / "x.tar.gz",
        [
            ("p/a.py", b"a\n"),
            ("../up.py", b"u\n"),
            ("/abs.py", b"r\n"),
            (link, b""),
            (pipe, b""),
            ("p/../../q.py", b"q\n"),
            ("p/big.py", b"x" * 2000),
        ],
    )
    kept, reasons = read_source(source, ReadLimits(file_bytes=1000))
    assert sorted(kept) == ["p/a.py"]
    assert reasons == {
        "../up.py": "path leaves its root",
        "/abs.py": "path leaves its root",
        "p/link.py": "symbolic link",
        "p/pipe": "not a regular file",
        "p/../../q.py": "path leaves its root",
        "p/big.py": "too large",
    }


def test_bombs_stop_early(tmp_path):
    tar = tar_of(tmp_path / "bomb.tar.gz", [("a.py", b"x = 1\n"), ("zeros", bytes(64_000_000))])
    kept, reasons = read_source(tar, ReadLimits(ratio=50))
    assert reasons[""] == "unreadable"
    many = tar_of(tmp_path / "many.tar.gz", [(f"{at}.py", b"x\n") for at in range(50)])
    assert "members" in next(
        each.detail
        for each in read(many, ReadLimits(members=20))
        if isinstance(each, Outcome) and not each.path
    )
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.py", bytes(64_000_000))
    assert read_source(Source(tmp_path / "bomb.zip", "zip"), ReadLimits(ratio=50, file_bytes=10**9))[1] == {
        "": "unreadable"
    }
    header = tarfile.TarInfo("huge.py")
    header.size = 10**12  # a header that lies, with nothing behind it
    (tmp_path / "lies.tar").write_bytes(header.tobuf() + bytes(1024))
    assert read_source(Source(tmp_path / "lies.tar", "tar"))[1][""] == "unreadable"


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["tar", "zip", "parquet", "lines"]))
def test_damaged_files_never_raise(tmp_path_factory, data, form):
    path = tmp_path_factory.mktemp("damaged") / f"x.{form}"
    path.write_bytes({"zip": b"PK\3\4", "parquet": b"PAR1"}.get(form, b"") + data)
    for each in read(Source(path, form)):
        assert isinstance(each, Document | Outcome)


@pytest.mark.parametrize(
    ("data", "text", "encoding"),
    [
        ("äh\n".encode(), "äh\n", "utf-8"),
        (b"\xef\xbb\xbfa", "a", "utf-8 with BOM"),
        ("hé".encode("utf-16"), "hé", "utf-16 with BOM"),
        (b"caf\xe9 au lait", "café au lait", "cp1252"),
        (b"a\r\nb", "a\r\nb", "utf-8"),
    ],
)
def test_encodings(data, text, encoding):
    assert decode(data) == (text, encoding)


@pytest.mark.parametrize("data", [b"\0\1", b"\x89PNG\r\n\x1a\n\0", bytes(range(128, 160)) * 4])
def test_binary(data):
    with pytest.raises(ValueError, match="binary"):
        decode(data)


@pytest.mark.parametrize(
    ("path", "language"),
    [
        ("a.py", "python"),
        ("a.pyi", "python"),
        ("a.tsx", "tsx"),
        ("a.d.ts", "typescript"),
        ("A.java", "java"),
        ("a.kt", "kotlin"),
        ("a.cs", "csharp"),
        ("a.cc", "cpp"),
        ("a.h", "c"),
        ("Makefile", "makefile"),
        ("a.json", "json"),
        ("x.unknown", ""),
    ],
)
def test_languages(path, language):
    assert language_of(path) == language


def test_licences_of_a_repository_and_its_parts(tmp_path):
    mit = (
        b"Permission is hereby granted, free of charge, to any person. The above copyright notice and this "
        b"permission "
        b"notice shall be included in all copies"
    )
    source = tar_of(
        tmp_path / "p-1.tar.gz",
        [
            ("p-1/src/a.py", b"x = 1\n"),
            ("p-1/src/b.py", b"# SPDX-License-Identifier: BSD-2-Clause\nx = 1\n"),
            ("p-1/LICENSE", mit),
            ("p-1/part/COPYING", b"GNU GENERAL PUBLIC LICENSE Version 3"),
            ("p-1/part/deep/c.py", b"x = 1\n"),
        ],
    )
    kept, _ = read_source(source)
    assert {path: kept[path].licence for path in ("src/a.py", "src/b.py", "part/deep/c.py")} == {
        "src/a.py": "MIT",
        "src/b.py": "BSD-2-Clause",
        "part/deep/c.py": "GPL-3.0-only",
    }
    with zipfile.ZipFile(tmp_path / "q.whl", "w") as archive:
        archive.writestr("q/a.py", "x = 1\n")
        archive.writestr("q-1.dist-info/METADATA", "Name: q\nLicense-Expression: Apache-2.0 OR MIT\n")
    assert read_source(Source(tmp_path / "q.whl", "zip"))[0]["q/a.py"].licence == "Apache-2.0 OR MIT"


BSD = "Redistributions of source code must retain it. Redistributions in binary form must reproduce it. "


@pytest.mark.parametrize(
    "clause",
    [
        "Neither the name of Acme nor the names of its contributors may be used to promote products",
        "The name of the author may not be used to endorse or promote products derived from this software",
    ],
)
def test_each_wording_of_a_licence_has_the_same_name(clause):
    assert licences.stated_in("LICENSE", (BSD + clause).encode()) == (
        "",
        (licences.BY_TEXT, "BSD-3-Clause"),
    )
    assert licences.match_text(BSD) == "BSD-2-Clause"
    names = {rule["id"] for rule in licences.rules()["texts"]}
    assert all(name == name.strip() for name in names)


def test_text_that_utf8_cannot_encode(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "a\\u0000b"}\n{"text": "fine"}\n[1]\n')
    kept, reasons = read_source(Source(tmp_path / "x.jsonl", "lines", "text"))
    assert sorted(kept) == ["2"] and reasons == {"0": "unreadable", "1": "binary", "3": "unreadable"}
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "two\nlines.py").write_text("x = 1\n")
    assert read_source(Source(tmp_path / "tree", "folder"))[1] == {
        "two\\nlines.py": "path is not one line of text"
    }


@pytest.mark.parametrize(
    ("expression", "is_allowed"),
    [
        ("MIT", True),
        ("GPL-3.0-only", False),
        ("MIT OR GPL-3.0-only", True),
        ("MIT AND GPL-3.0-only", False),
        ("", False),
        ("Apache-2.0 WITH LLVM-exception", True),
        ("(MIT OR GPL-2.0-only) AND GPL-3.0-only", False),
    ],
)
def test_permitted_expressions(expression, is_allowed):
    assert licences.allowed(expression, licences.permissive()) is is_allowed and licences.allowed(
        expression, None
    )


# ------------------------------------------------------------------------------------------------- clean
CODE = "def area(width, height):\n    '''The area of a rectangle.'''\n    return width * height\n\n\n"


@pytest.mark.parametrize(
    ("reason", "path", "text"),
    [
        ("empty", "a.py", " \n"),
        ("generated", "a.py", "# Code generated by protoc. DO NOT EDIT.\n" + CODE),
        ("minified", "a.min.js", "var a=1;" * 9),
        ("line too long", "a.py", CODE + "x = '" + "word " * 300 + "'\n"),
        ("lines too long on average", "a.py", ("value = " + "other + " * 18 + "1\n") * 5),
        ("few letters and digits", "a.py", "+-*/()[]{}\n" * 30),
        ("data in code", "a.py", ("x = [" + "123, 456, " * 8 + "]\n") * 9),
        (
            "data in code",
            "a.py",
            "x = (\n"
            + ("  'QUJDREVGR0hJSktMTU5PUFFSU1RVVldYWVphYmNkZWZnaGlqa2xtbm9wcXJzdHV2'\n") * 20
            + ")\n",
        ),
        ("unparsable", "a.py", "@@ def )( class [ ~~~\n<<< fn >>> :: ??\n" * 9),
        ("language not wanted", "a.json", '{"a": 1}\n'),
        ("", "a.py", CODE + "# \u2581\n"),
        (
            "unsafe content",
            "a.py",
            CODE + "note = 'your files have been encrypted, send bitcoin to this wallet'\n",
        ),
        ("", "a.py", CODE),
    ],
)
def test_reasons(reason, path, text):
    document = Document("r", path, text, language_of(path, text))
    result = clean.Cleaner().clean(document)
    assert (result.reason if isinstance(result, Outcome) else "") == reason
    if not reason:
        assert result.text == text


def test_rules_can_be_replaced(tmp_path):
    (tmp_path / "rules.toml").write_text('[[rule]]\ncategory = "ours"\nphrases = ["banana bread"]\n')
    unsafe = clean.Unsafe(tmp_path / "rules.toml")
    assert unsafe("A Banana Bread recipe") == "ours" and unsafe("bananabread") == ""


@pytest.mark.parametrize(
    "rules",
    [
        *("rule = 3", "rule = [3]", "[[rule]]\nwords = 1", "[rule]\ncategory = 'a'", "rules = []"),
        *(
            f"[[rule]]\ncategory = 'a'\nphrases = {value}"
            for value in ("3", "[3]", "['']", "['a']\nnear = 3", "['a']\nnear = [3]", "['a']\nleast = 'b'")
        ),
        "[[rule]]\ncategory = 3\nphrases = ['a']",
        "[[rule]]\ncategory = 'a'\nphrases = ['a']\nwithin = 'b'",
    ],
)
def test_a_rules_file_of_another_form_is_refused(tmp_path, rules):
    (tmp_path / "bad.toml").write_text(rules)
    with pytest.raises(ValueError, match=r"rules .*bad\.toml: each \[\[rule\]\] needs category and phrases"):
        clean.Unsafe(tmp_path / "bad.toml")


@pytest.mark.parametrize("data", [b"rule = ", b"\xff", None])
def test_a_rules_file_that_cannot_be_read_is_named(tmp_path, data):
    if data is not None:
        (tmp_path / "bad.toml").write_bytes(data)
    with pytest.raises(ValueError, match=r"rules .*bad\.toml: .*: name a file like rules/unsafe\.toml"):
        clean.Unsafe(tmp_path / "bad.toml")


def test_a_list_of_malware_names_is_kept_and_the_malware_is_not():
    unsafe = clean.Unsafe()
    assert unsafe('SIGNATURES = ["c99shell", "r57shell", "b374k shell"]\n') == ""
    assert unsafe("<?php // c99shell\n$act = $_GET['act']; passthru($act);") == "malware"


def planted(count=40, seed=5):
    """(text, {kind: values}) with secrets and personal data of every kind among ordinary code, and decoys."""
    draw = random.Random(seed)
    letters, lower = string.ascii_letters + string.digits, string.ascii_lowercase

    def run(alphabet, size):
        return "".join(draw.choice(alphabet) for _ in range(size))

    def checked(size):
        payload = run(letters, size)
        return payload + redact.checksum(payload)

    makers = {
        "github token": lambda: ("token = '{}'", "ghp_" + checked(30)),
        "npm token": lambda: ("//registry/:_authToken={}", "npm_" + checked(30)),
        "aws access key": lambda: ("aws_id: {}", "AKIA" + run("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", 16)),
        "google api key": lambda: ("key={}&q=1", "AIza" + run(letters + "_-", 35)),
        "stripe key": lambda: ("charge('{}')", "sk_live_" + run(letters, 24)),
        "slack token": lambda: (
            "bot {}",
            f"xoxb-{run(string.digits, 11)}-{run(string.digits, 11)}-{run(letters, 24)}",
        ),
        "password": lambda: (
            'password = "{}"',
            run(lower, 4) + run(string.digits, 3) + run("!#&*", 1) + run(string.ascii_uppercase, 4),
        ),
        "password in url": lambda: (
            "postgres://admin:{}@db.internal/main",
            run(lower, 5) + run(string.digits, 4) + run(letters, 3),
        ),
        "key or token": lambda: ("client_secret: '{}'", run(letters, 28) + run(string.digits, 4)),
        "private key": lambda: (
            "{}",
            "-----BEGIN RSA PRIVATE KEY-----\n"
            + "\n".join(run(letters + "+/", 64) for _ in range(6))
            + "\n-----END RSA PRIVATE KEY-----",
        ),
        "e-mail": lambda: (
            "mail {} now",
            f"{run(lower, 6)}.{run(lower, 5)}@{run(lower, 7)}.{draw.choice(['com', 'org', 'de', 'io'])}",
        ),
        "ipv4": lambda: (
            "host = '{}'",
            f"{draw.choice([23, 52, 81, 93, 104])}.{draw.randrange(20, 250)}.{draw.randrange(250)}."
            f"{draw.randrange(1, 250)}",
        ),
        "ipv6": lambda: ("[{}]:80", "2a00:1450:" + ":".join(run("0123456789abcdef", 4) for _ in range(6))),
        "phone": lambda: (
            "call {} today",
            draw.choice(
                ["+44 20 7946 {:04d}", "+1-415-867-{:04d}", "(415) 867-{:04d}", "415-867-{:04d}"]
            ).format(draw.randrange(1000, 9999)),
        ),
        "author": lambda: ("# Author: {}", f"{run(lower, 6).title()} {run(lower, 8).title()}"),
    }
    decoys = [
        "version = '10.4.0.12'",
        "ip = '127.0.0.1'",
        "ip = '192.168.1.20'",
        "dns = '8.8.8.8'",
        "mail = 'user@example.com'",
        "git clone git@github.com:a/b.git",
        "password = 'changeme'",
        "password = os.environ['PASSWORD']",
        "token = '<your token>'",
        "secret = 'xxxxxxxxxxxxxxxxxxxx'",
        "@pytest.mark.parametrize",
        "sha = '9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd1'",
        "uuid = '123e4567-e89b-12d3-a456-426614174000'",
        "std::vector<std::string>::iterator",
        "ghp_thisIsNotATokenBecauseItHasNoChecksum",
        "date = '2024-01-02 12:34:56'",
        "x = a @ b.T",
        "number = 415.867",
        "range(1000-2000)",
        "# Author: the team",
        "password: str",
        "key = lambda item: item.name",
        "api_key = settings.API_KEY",
        "AKIAIOSFODNN7EXAMPLE",
        "section 4.2.3.2 of the text",
    ]
    truth, lines = Counter(), []
    values = []
    for _ in range(count):
        for kind, make in makers.items():
            template, value = make()
            values.append((kind, value))
            truth[kind] += 1
            lines += [
                "def compute(value):",
                "    return value + 1",
                template.format(value),
                draw.choice(decoys),
                "",
            ]
    return "\n".join(lines + decoys), values, truth


def test_precision_and_recall_on_a_planted_corpus(capsys):
    text, values, truth = planted()
    redactor = redact.Redactor()
    findings = redactor.find(text)
    right: Counter[str] = Counter()
    wrong = []
    for finding in findings:
        piece = text[finding.start : finding.end]
        match = next(
            (kind for kind, value in values if piece in value and len(piece) >= 8 or piece == value), None
        )
        if match:
            right[match] += 1
        else:
            wrong.append((finding.kind, piece))
    redacted, _ = redactor(text)
    missed = [(kind, value) for kind, value in values if value in redacted]
    recall = {kind: 1 - sum(k == kind for k, _ in missed) / count for kind, count in truth.items()}
    precision = sum(right.values()) / len(findings)
    with capsys.disabled():
        print(
            f"\nplanted corpus: precision {precision:.3f}, recall {1 - len(missed) / len(values):.3f}, "
            f"least recall {min(recall.items(), key=lambda item: item[1])}, wrong {wrong[:5]}"
        )
    assert precision >= 0.98, wrong
    assert min(recall.values()) >= 0.95, missed
    assert redactor(redacted)[0] == redacted  # fake values are not replaced again
    assert redactor(text)[0] == redacted


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.text(max_size=20),
            st.sampled_from(
                [
                    "@",
                    "a@b.com",
                    "password='",
                    "+1 415",
                    "-----BEGIN RSA PRIVATE KEY-----",
                    "eyJ",
                    "1.2.3.4",
                    "::",
                    "Author: ",
                    "ghp_",
                ]
            ),
        ),
        max_size=12,
    )
)
def test_redaction_never_raises_and_reports_each_change(parts):
    redactor, text = redact.default_redactor(), "".join(parts)
    once, kinds = redactor(text)
    assert (once == text) == (not kinds) or "example.com" in once


# -------------------------------------------------------------------------------------------------- dedup
def exact_jaccard(a, b):
    return len(np.intersect1d(a, b)) / len(np.union1d(a, b))


def mutated(words, share, draw):
    return [draw.choice(string.ascii_lowercase) * 3 if draw.random() < share else word for word in words]


def test_signatures_estimate_jaccard_as_datasketch_does():
    datasketch = pytest.importorskip("datasketch")
    draw = random.Random(3)
    base = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(600)]
    texts = [" ".join(mutated(base, share, draw)) for share in (0, 0.01, 0.02, 0.05, 0.1, 0.2)] + [
        "other words entirely " * 50
    ]
    grams = [np.unique(dedup.ngrams(dedup.words(text), dedup.SHINGLE)) for text in texts]
    ours = dedup.signatures(grams)
    theirs = []
    for each in grams:
        sketch = datasketch.MinHash(num_perm=dedup.PERMUTATIONS)
        sketch.update_batch([int(gram).to_bytes(8, "little") for gram in each])
        theirs.append(sketch)
    bound = 4 * (0.25 / dedup.PERMUTATIONS) ** 0.5  # four standard errors of the estimate
    for at in range(len(texts)):
        truth = exact_jaccard(grams[0], grams[at])
        estimate = (ours[0] == ours[at]).mean()
        assert abs(estimate - truth) < bound and abs(estimate - theirs[0].jaccard(theirs[at])) < 2 * bound


def test_shingles_equal_a_slow_twin():
    import re

    text = "def Foo_1(x): return x+1 # Grüße \u4e16\u754c\n" * 3 + "last_word"
    plain = [m.group().lower() for m in re.finditer(rb"(?:[A-Za-z0-9_]|[\x80-\xff])+", text.encode())]
    hashes = dedup.words(text)
    assert len(hashes) == len(plain)
    by_word: dict[bytes, int] = {}
    for word, value in zip(plain, hashes.tolist(), strict=True):
        assert by_word.setdefault(word, value) == value
    assert len(set(by_word.values())) == len(by_word)
    long = "word_a word_b " * 20_000
    assert len(set(dedup.words(long).tolist())) == 2 and len(dedup.words(long)) == 40_000
    assert len(dedup.words("a" * 200_000)) == 4  # a word of more than 65,536 bytes is cut


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.tuples(st.integers(0, 12), st.integers(0, 12)).filter(lambda p: p[0] < p[1]), max_size=30),
    st.randoms(),
)
def test_whatever_is_dropped_is_like_one_that_is_kept(pairs, draw):
    edges = [(a, b, 0.9) for a, b in pairs]
    result = dedup.choose_kept(edges, lambda node: node)
    draw.shuffle(edges)
    assert dedup.choose_kept([(b, a, s) for a, b, s in edges], lambda node: node) == result
    nodes = {node for pair in pairs for node in pair}
    kept = nodes - result.keys()
    assert all(tuple(sorted((node, other))) in pairs and other in kept for node, (other, _) in result.items())
    assert not any((a, b) in pairs for a in kept for b in kept)


@pytest.mark.parametrize("name", ["humaneval/HumanEval.jsonl.gz", "mbpp/mbpp.jsonl.gz"])
def test_benchmark_problems_are_found(name):
    """The benchmark files stand beside the repository, never in it."""
    import gzip

    file = Path(__file__).parents[2] / "shared" / "data" / name
    if not file.exists():
        pytest.skip("benchmark files are not on this machine")
    benchmarks = dedup.Benchmarks([file])
    missed = total = 0
    for line in gzip.decompress(file.read_bytes()).decode().splitlines():
        record = json.loads(line)
        text = (
            record.get("prompt", "") + record.get("canonical_solution", "")
            or record["text"] + "\n" + record["code"]
        )
        planted_file = "import os\n\n" + CODE * 5 + text + "\n\n" + CODE * 5
        total += 1
        missed += not benchmarks(dedup.words(planted_file))
    assert missed <= 0.02 * total, (missed, total)
    ours = [path.read_text() for path in Path(documents.__file__).parent.glob("*.py")]
    assert not any(benchmarks(dedup.words(text)) for text in ours)


# ----------------------------------------------------------------------------------------------------- fim
SPELLINGS = [
    "<|fim_prefix|>",
    "<|fim_suffix|>",
    "<|fim_middle|>",
    "<|file_separator|>",
    "<eos>",
    "<bos>",
    "<start_of_turn>",
    "\r\n",
    "\n\n",
    "é",
    "世界",
    "🎉",
    "def f(x):\n    return x\n",
    "    ",
    "if a:\n",
    "\t",
    "(",
    "}",
]


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(SPELLINGS),
            st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
        ),
        min_size=1,
        max_size=40,
    ),
    st.integers(0, 10**6),
    st.sampled_from(["python", "java", "go", "cpp", "text"]),
)
def test_parts_make_the_text_and_no_control_id_comes_from_it(tokenizer, parts, seed, language):
    text = "".join(parts) or "x"
    recipe = fim.FimRecipe(1.0, 0.5, 64, seed=seed)
    examples = list(fim.fim([Document("r", "p.py", text, language)], tokenizer, recipe))
    control = [
        getattr(tokenizer.control, name)
        for name in ("fim_prefix", "fim_suffix", "fim_middle", "file_separator", "bos", "eos")
    ]
    whole = ""
    for example in examples:
        ids = example.ids_T.tolist()
        assert len(ids) < 64 and [ids.count(token) for token in control] == [1, 1, 1, 1, 0, 0]
        parsed = parse_fim(tokenizer, ids)
        assert (parsed.prefix + parsed.middle + parsed.suffix, parsed.layout, parsed.path) == (
            text[example.offset : example.offset + example.size],
            example.layout,
            "p.py",
        )
        whole += parsed.prefix + parsed.middle + parsed.suffix
        learned = [token for token, yes in zip(ids, example.loss_T, strict=True) if yes]
        assert learned[-1] == tokenizer.control.file_separator and tokenizer.control.fim_middle not in learned
    assert whole == text


SAMPLE = (
    "import os\n\n\ndef first(a, b):\n    '''Säy \u4e16.'''\n"
    "    if a > b:\n        return a\n    total = a + b\n    return total * 2\n\n\n"
    "class Thing:\n    size = 3\n\n    def grow(self, by=1):\n        self.size += by\n        return self\n"
)


def test_syntax_splits_are_nodes_and_suffixes_begin_at_line_breaks():
    tree = syntax.parse(SAMPLE, "python")
    nodes, stack = set(), [tree.root_node]
    while stack:
        node = stack.pop()
        stack += node.children
        nodes.add(splits.to_characters(SAMPLE, node.start_byte, node.end_byte))
    ends = {end for _, end in nodes}
    starts = {start for start, _ in nodes}
    kinds: Counter[str] = Counter()
    for seed in range(600):
        place = splits.split(SAMPLE, "python", Draw(seed))
        kinds[place.kind] += 1
        middle = SAMPLE[place.start : place.end]
        if place.kind == "node":
            assert (place.start, place.end) in nodes
        if place.kind == "siblings":
            assert place.start in starts and place.end in ends
        if place.kind in ("lines", "rest of line"):
            assert SAMPLE[place.end : place.end + 1] in ("\n", "") and middle.strip()
        if place.kind != "characters":
            assert middle and not middle.endswith("\n")
    assert set(kinds) == set(splits.KINDS) and 30 < kinds["characters"] < 90


@pytest.mark.parametrize(
    "language, text",
    [
        ("c", "void f() {\n  if (b) {\n    x();\n}\n"),
        ("java", "class A {\n  void f() {\n    x();\n  }\n"),
        ("javascript", "f(() => {\n  x();\n}\n"),
    ],
)
def test_what_a_grammar_misses_is_an_error(language, text):
    assert 0 < syntax.error_share(syntax.parse(text, language)) <= 1


def test_nodes_are_drawn_in_proportion_to_their_size():
    tree = syntax.parse(SAMPLE, "python")
    sizes, stack = {}, [tree.root_node]
    while stack:
        node = stack.pop()
        stack += node.children
        if node.is_named and node.parent:
            sizes[node.start_byte, node.end_byte] = (
                sizes.get((node.start_byte, node.end_byte), 0) + node.end_byte - node.start_byte
            )
    drawn = Counter(
        splits.draw_node(tree, Draw("n", at), 0, tree.root_node.end_byte, 10**9) for at in range(4000)
    )
    whole = sum(sizes.values())
    assert set(drawn) <= set(sizes)
    for node, size in sizes.items():
        share = size / whole
        assert abs(drawn[node] - 4000 * share) < 5 * (4000 * share * (1 - share)) ** 0.5 + 1


CODE_TEXT = "import os\n\n\n" + "".join(
    f"def f{at}(a, b):\n    '''Säy \u4e16 {at}.'''\n    if a > b:\n        return a\n    total = a + {at}\n"
    "    return total * 2\n\n\n"
    for at in range(40)
)


@pytest.mark.parametrize(
    ("text", "language"), [(CODE_TEXT, "python"), ("世🎉\r\n<eos> é\t(\n" * 300, "text")]
)
@pytest.mark.parametrize("limit", [None, 6])
def test_windows_are_prompts_of_inference_with_their_answer(tokenizer, text, language, limit):
    recipe = fim.FimRecipe(
        0.9,
        0.5,
        160,
        window=(64, 159),
        stride=150,
        suffix_limit=limit,
        path_rate=0.5,
        loss=frozenset({"middle", "terminator"}),
    )
    examples = list(fim.fim([Document("r", "a/p.py", text, language)], tokenizer, recipe))
    assert len(examples) > 0.7 * len(text) / 150
    layouts, paths = Counter(), Counter()
    for example in examples:
        shown, place = text[example.offset : example.offset + example.size], example.split
        ids, learned = example.ids_T.tolist(), example.ids_T[example.loss_T].tolist()
        layouts[example.layout] += 1
        assert len(ids) <= 159
        if example.layout == "prefix":
            paths[ids == tokenizer.encode("a/p.py\n") + tokenizer.encode(shown) + ids[-1:]] += 1
            ended = example.offset + example.size == len(text)
            assert learned == tokenizer.encode(shown) + [tokenizer.control.file_separator] * ended
            continue
        prefix, middle, suffix = shown[: place.start], shown[place.start : place.end], shown[place.end :]
        path = None if ids[0] in (tokenizer.control.fim_prefix, tokenizer.control.fim_suffix) else "a/p.py"
        answer = tokenizer.encode(middle) + [tokenizer.control.file_separator]
        assert ids == prompts.fim(tokenizer, prefix, suffix, path, layout=example.layout).ids[1:] + answer
        assert (
            learned == answer and middle.strip() and (limit is None or len(tokenizer.encode(suffix)) <= limit)
        )
        paths[path] += 1
    assert set(layouts) == {"psm", "spm", "prefix"} and min(paths["a/p.py"], paths[None]) > len(examples) / 5


def test_windows_have_the_holes_of_humaneval_infilling(tokenizer):
    recipe = fim.FimRecipe(1.0, 0.5, 160, window=(100, 159), stride=40)
    examples = list(fim.fim([Document("r", "p.py", CODE_TEXT, "python")], tokenizer, recipe))
    kinds = Counter(example.split.kind for example in examples)
    assert set(kinds) == set(splits.WINDOW_KINDS)
    for example in examples:
        start, end = example.offset + example.split.start, example.offset + example.split.end
        if example.split.kind in ("line", "whole lines", "function end"):
            assert CODE_TEXT[start - 1] == "\n" and CODE_TEXT[end - 1] == "\n"
            assert example.split.kind != "line" or CODE_TEXT[start:end].count("\n") == 1
        if example.split.kind == "function end":
            assert example.split.end == example.size and CODE_TEXT[end : end + 2] == "\n\n"
    alone = [
        e
        for e in examples
        if CODE_TEXT[e.offset :].startswith("def f")
        and CODE_TEXT[e.offset + e.size - 10 : e.offset + e.size] == "total * 2\n"
    ]
    assert len(alone) > len(examples) / 20  # whole functions by themselves


# ---------------------------------------------------------------------------------------------------- pack
@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=60))
def test_rows_hold_everything_once_and_nothing_overflows(sizes):
    rows = pack.fit(sizes, 100)
    assert sorted(item for row in rows for item in row) == list(range(len(sizes)))
    assert all(sum(sizes[item] for item in row) <= 100 for row in rows)
    assert len(rows) <= max(1, 2 * -(-sum(sizes) // 100))  # any two rows of a best fit overflow one
    with pytest.raises(ValueError, match="cut it before packing"):
        pack.fit([101], 100)


def test_groups_stay_whole_where_they_fit(tokenizer):
    examples = list(
        fim.fim(
            [Document("r", f"{at}.py", "x = 1\n" * 3, "python") for at in range(8)],
            tokenizer,
            fim.FimRecipe(length=128),
        )
    )
    group = pack.ExampleGroup(examples[:3], "graph")
    assert [len(part.examples) for part in pack.segments([group, pack.ExampleGroup(examples, "graph")], 128)][
        0
    ] == 3
    packed = pack.pack([[group, pack.ExampleGroup(examples[3:5], "graph")]], 256, tokenizer.control.bos, 0)
    assert [record["segment"] for record in packed.examples] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no JSON"])
def test_a_damaged_benchmark_file_is_named(tmp_path, damage):
    lines = b'{"task_id": "a", "prompt": "def f"}\n' * 200
    data = bytearray(gzip.compress(lines if damage != "no JSON" else b"x = 1\n"))
    if damage == "flipped":
        data[len(data) // 2] ^= 0xFF
    file = tmp_path / "tasks.jsonl.gz"
    file.write_bytes(data[: len(data) // 2] if damage == "cut" else data)
    with pytest.raises(ValueError, match="benchmark file .*tasks.jsonl.gz is neither"):
        dedup.Benchmarks([file])
