"""The whole pipeline: laws of the rows, the same bytes for any engine, and counts that add up."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import string
import subprocess
import sys
import tarfile
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("pyarrow")
pytest.importorskip("tree_sitter")

import pyarrow as pa
import pyarrow.parquet as pq
from vocabularies import gemma3_tokenizer, small

from codegemma.data import build, dedup, engines, fim, pack, report, show, splits, stages
from codegemma.data.clean import Cleaner
from codegemma.data.documents import Document
from codegemma.data.recipe import BuildRecipe, named_recipe
from codegemma.data.sources import expand, read
from codegemma.prompts import parse_fim
from codegemma.tokenizer import Tokenizer

RECIPE = BuildRecipe(length=512, shard_bytes=20_000)  # several shards and partitions from a small corpus


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_sentencepiece(small())


def python_file(draw, number, others):
    imports = (
        "".join(f"from pkg.m{draw.choice(others)} import thing{draw.randrange(5)}\n" for _ in range(2))
        if others
        else ""
    )
    words = ["alpha", "beta", "gamma", "delta", "value", "index", "result", "total", "items", "node"]
    body = "".join(
        f"def thing{at}({draw.choice(words)}, {draw.choice(words)}_{number}):\n    "
        f"{draw.choice(words)}_{at} = {draw.randrange(10**6)} + {draw.choice(words)}({at})\n    return "
        f"{draw.choice(words)}\n\n\n"
        for at in range(draw.randrange(4, 20))
    )
    return (
        imports + "\n\n" + body + "# <|fim_prefix|> <eos> <start_of_turn> <|file_separator|> \u00e4\u4e16\n"
    )


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Checkouts, a copied repository, an archive, a Parquet table, plain text, and unreadable files."""
    root, draw = tmp_path_factory.mktemp("corpus"), random.Random(7)
    for name in ("one", "two", "fork"):
        folder = root / "checkouts" / name
        (folder / "pkg").mkdir(parents=True)
        (folder / "pyproject.toml").write_text("[project]\nlicense = 'MIT'\n")
        if name == "fork":  # `two` again, one file changed
            for file in (root / "checkouts" / "two" / "pkg").iterdir():
                (folder / "pkg" / file.name).write_text(file.read_text())
            (folder / "pkg" / "m0.py").write_text(python_file(draw, 99, [1]))
            continue
        for at in range(14):
            (folder / "pkg" / f"m{at}.py").write_text(python_file(draw, at, range(at)))
        (folder / "test_m3.py").write_text("import unittest\n\n" + python_file(draw, 77, []))
    (root / "checkouts" / "one" / "blob.py").write_bytes(b"\0\1\2")
    (root / "checkouts" / "one" / "secret.py").write_text(
        "address = 'jane.doe@gmail.com'\nvalue = compute(address)\n" * 3
    )
    problem = {
        "task_id": "Toy/7",
        "prompt": "def longest_run_of_equal_items_in(sequence, minimum, key):\n    '''Return the start and "
        "length of the longest run of equal items that is at least minimum long, or None.'''\n",
    }
    (root / "toy.jsonl").write_text(json.dumps(problem) + "\n")
    (root / "checkouts" / "one" / "leak.py").write_text(
        "import os\n\n" + problem["prompt"] + "    return None\n"
    )
    with tarfile.open(root / "thing-1.0.tar.gz", "w:gz") as archive:
        for name, text in {
            "thing-1.0/LICENSE": "Permission is hereby granted, free of charge, to any person. The above "
            "copyright "
            "notice "
            "and this permission notice shall be included in all copies",
            "thing-1.0/a.py": python_file(draw, 1, []),
            "../evil.py": "print()\n",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            archive.addfile(info, io.BytesIO(text.encode()))
    rows = [
        {
            "max_stars_repo_name": f"org/r{at % 5}",
            "max_stars_repo_path": f"src/f{at}.py",
            "content": python_file(draw, at, []),
            "max_stars_repo_licenses": ["MIT"] if at % 4 else ["GPL-3.0-only"],
        }
        for at in range(30)
    ]
    pq.write_table(pa.Table.from_pylist(rows), root / "stack.parquet")
    (root / "notes.jsonl").write_text(
        "".join(
            json.dumps({"text": f"Note {at}. " + "Some words about a subject. " * 12 * at}) + "\n"
            for at in range(20)
        )
        + "not json\n"
    )
    (root / "broken.zip").write_bytes(b"PK\3\4 damaged")
    return root


def sources_of(root):
    return [
        str(root / "checkouts"),
        str(root / "thing-1.0.tar.gz"),
        str(root / "stack.parquet"),
        str(root / "broken.zip"),
        f"text={root / 'notes.jsonl'}",
    ]


def digest(folder):
    """Hash of every file of a finished build, but for timing.json."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(Path(folder).rglob("*"))
        if file.is_file() and file.name not in ("timing.json", "report.html")
    }


@pytest.fixture(scope="module")
def built(corpus, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("built") / "rows"
    build.build(sources_of(corpus), out, tokenizer, RECIPE, benchmarks=[corpus / "toy.jsonl"])
    return out


def test_rows_give_the_texts_back(built, corpus, tokenizer):
    rows = pack.Rows(built)
    pieces: dict[tuple[str, str], dict[int, str]] = {}
    control = {
        tokenizer.control.fim_prefix,
        tokenizer.control.fim_middle,
        tokenizer.control.fim_suffix,
        tokenizer.control.file_separator,
        tokenizer.control.eos,
    }
    for number in range(len(rows)):
        row = rows[number]
        assert row["tokens"].dtype == np.int32 and len(row["tokens"]) == RECIPE.length
        assert (row["tokens"][row["segments"] == 0] == tokenizer.control.pad).all() and not row["loss"][
            row["segments"] == 0
        ].any()
        for segment in range(1, row["segments"].max() + 1):
            inside = row["segments"] == segment
            assert row["tokens"][inside][0] == tokenizer.control.bos
            assert row["positions"][inside].tolist() == list(range(inside.sum()))
        repositories = {}
        for record in rows.examples(number):
            repositories.setdefault(record["segment"], set()).add(record["repository"])
            ids = row["tokens"][record["start"] : record["end"]].tolist()
            assert len(control & set(ids)) == (1 if record["layout"] == "prefix" else 4)
            assert sum(token in control for token in ids) == (
                1 if record["layout"] == "prefix" else 4
            )  # none from content
            parsed = parse_fim(tokenizer, ids)
            assert parsed.layout == record["layout"]
            text = parsed.prefix + parsed.middle + parsed.suffix
            if record["layout"] == "prefix" and record["kind"] == "code":
                text = text.removeprefix(record["path"] + "\n")
            else:
                assert record["kind"] != "code" or parsed.path == record["path"]
            assert len(text) == record["size"]
            pieces.setdefault((record["repository"], record["path"]), {})[record["offset"]] = text
        assert all(len(names) == 1 for names in repositories.values())
    originals = {
        (each.repository, each.path): each.text
        for source in sources_of(corpus)
        for expanded in expand(source)
        for each in read(expanded)
        if isinstance(each, Document)
    }
    assert len(pieces) > 60
    for name, parts in pieces.items():
        whole = "".join(text for _, text in sorted(parts.items()))
        if name != ("one", "secret.py"):
            assert whole == originals[name]
        else:
            assert "jane.doe" not in whole and whole.count("@example.com") == 3


def test_counts_add_up(built, corpus):
    ledger = pq.read_table(built / "ledger.parquet").to_pylist()
    names = Counter((row["repository"], row["path"]) for row in ledger)
    assert max(names.values()) == 1
    given = [each for text in sources_of(corpus) for source in expand(text) for each in read(source)]
    assert {(each.repository, each.path) for each in given} == set(names)
    kept = {f"{row['repository']}:{row['path']}" for row in ledger if row["outcome"] == "kept"}
    for row in ledger:
        assert row["outcome"] in ("kept", "dropped", "duplicate") and bool(row["reason"]) == (
            row["outcome"] != "kept"
        )
    by_reason = Counter(row["reason"] for row in ledger)
    assert (
        by_reason["copy of a repository"] >= 14
        and by_reason["benchmark"] == 1
        and by_reason["unreadable"] == 2
    )
    assert (
        by_reason["licence not allowed"] == 8
        and by_reason["path leaves its root"] == 1
        and by_reason["binary"] == 1
    )
    near = [row for row in ledger if row["reason"] in ("near copy", "exact copy")]
    assert all(row["detail"] in kept for row in near)
    assert next(row for row in ledger if row["reason"] == "benchmark")["detail"] == "Toy/7"
    assert (
        next(row for row in ledger if row["path"] == "pkg/m3.py" and row["repository"] == "fork")["detail"]
        == "two"
    )


def kept_in_memory(documents, benchmarks, threshold):
    """A slow twin of the stages sign and link: the names of the documents that stay, without shards."""
    hashes = [dedup.words(document.text) for document in documents]
    alive = [at for at, words in enumerate(hashes) if not benchmarks(words)]
    grams = {at: np.unique(dedup.ngrams(hashes[at], dedup.SHINGLE)) for at in alive}

    def similar(shingles):
        names = list(shingles)
        pairs = dedup.similar(dedup.signatures([shingles[name] for name in names]), threshold)
        return [(names[left], names[right], similarity) for left, right, similarity in pairs]

    def place(at):
        return documents[at].repository, documents[at].path

    members = defaultdict(list)
    for at in alive:
        if documents[at].kind == "code":
            members[documents[at].repository].append(at)
    merged = {name: np.unique(np.concatenate([grams[at] for at in ats])) for name, ats in members.items()}
    copies = dedup.choose_kept(similar(merged), lambda name: (-len(members[name]), name))
    alive = [at for at in alive if documents[at].kind != "code" or documents[at].repository not in copies]
    first = {}
    for at in sorted(alive, key=place):
        first.setdefault(documents[at].digest, at)
    near = dedup.choose_kept(similar({at: grams[at] for at in first.values()}), place)
    return {documents[at].name for at in first.values() if at not in near}


@pytest.mark.parametrize(
    ("changes", "golden"),
    [
        ({}, "2098ac699dee4c91"),
        ({"length": 160, "window": (64, 159), "stride": 300, "path_rate": 0.5}, "4a0e60eb09026d80"),
    ],
)
def test_recipes_without_kinds_keep_their_rows(changes, golden, corpus, tmp_path):
    """The rows of the version that had no named recipes: tokens, loss, segments and splits. The vocabulary is
    Gemma 3's: the small one is learned from modules of Python, and so depends on its version."""
    build.build(sources_of(corpus), tmp_path / "out", gemma3_tokenizer(), replace(RECIPE, **changes))
    rows, hashed = pack.Rows(tmp_path / "out"), hashlib.sha256()
    for number in range(len(rows)):
        for array in rows[number].values():
            hashed.update(array.tobytes())
        for record in rows.examples(number):
            hashed.update(json.dumps(record | {"source": "", "commit": ""}, sort_keys=True).encode())
    assert hashed.hexdigest()[:16] == golden


def test_shards_agree_with_a_twin_in_memory(built, corpus):
    documents = [
        cleaned
        for text in sources_of(corpus)
        for source in expand(text)
        for document in read(source)
        if isinstance(document, Document)
        for cleaned in [Cleaner(RECIPE.quality(source.redistributed)).clean(document)]
        if isinstance(cleaned, Document)
    ]
    kept = kept_in_memory(documents, dedup.Benchmarks([corpus / "toy.jsonl"]), RECIPE.threshold)
    ledger = pq.read_table(built / "ledger.parquet").to_pylist()
    assert kept == {f"{row['repository']}:{row['path']}" for row in ledger if row["outcome"] == "kept"}


def test_planted_copies_in_any_order(tokenizer, tmp_path):
    draw = random.Random(11)

    def text_of(words):
        return "\n".join(" ".join(words[at : at + 10]) for at in range(0, len(words), 10)) + "\n"

    texts = [["".join(draw.choices(string.ascii_lowercase, k=5)) for _ in range(300)] for _ in range(20)]
    near = [[draw.choice("abc") * 3 if draw.random() < 0.01 else word for word in text] for text in texts[:8]]
    rows = [(f"a{at}", "x.sh", text) for at, text in enumerate(texts)]
    rows += [(f"b{at}", "x.sh", text) for at, text in enumerate(near)]
    rows += [(f"c{at}", "y.sh", texts[at]) for at in (2, 9)]
    for seed in range(3):
        random.Random(seed).shuffle(rows)
        table = [{"repository": name, "path": path, "content": text_of(text)} for name, path, text in rows]
        pq.write_table(pa.Table.from_pylist(table), tmp_path / "rows.parquet")
        out = tmp_path / f"out{seed}"
        recipe = BuildRecipe(length=512, shard_bytes=9_000, licences="any")
        build.build([str(tmp_path / "rows.parquet")], out, tokenizer, recipe)
        ledger = pq.read_table(out / "ledger.parquet").to_pylist()
        kept = {row["repository"] for row in ledger if row["outcome"] == "kept"}
        assert kept == {f"a{at}" for at in range(20)} and len(ledger) == 30
        assert all(row["outcome"] == "duplicate" and row["detail"] for row in ledger if row["reason"])


def test_same_bytes_for_two_workers_and_another_order(built, corpus, tokenizer, tmp_path):
    build.build(
        sources_of(corpus)[::-1],
        tmp_path / "out",
        tokenizer,
        RECIPE,
        benchmarks=[corpus / "toy.jsonl"],
        workers=2,
    )
    assert digest(tmp_path / "out") == digest(built)
    assert json.loads((tmp_path / "out" / "timing.json").read_text())["rows"]["workers"] == 2


def test_same_bytes_for_any_order_of_the_rows_in_a_parquet_file(tokenizer, tmp_path):
    """Also where near and exact copies, and several versions of one path, fall into other shards."""
    draw, outs = random.Random(3), []
    texts = [python_file(draw, at, []) for at in range(20)]
    rows = [
        {"repository": f"org/r{at % 4}", "path": f"f{at // 4}.py", "content": text}
        for at, text in enumerate(texts[10:])
    ]
    rows += [
        {"repository": "org/copies", "path": f"c{at}.py", "content": text}
        for at, text in enumerate(texts[10:14])
    ]
    rows += [
        {"repository": f"org/r{at % 4}", "path": f"v{at // 4}.py", "content": text + f"# {version}\n"}
        for at, text in enumerate(texts[:10])
        for version in range(3)
    ]  # versions of a path that differ in a line
    for order in (1, 2, 3):
        random.Random(order).shuffle(rows)
        (folder := tmp_path / f"in{order}").mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=7)
        outs.append(tmp_path / f"out{order}")
        build.build(
            [str(folder / "rows.parquet")],
            outs[-1],
            tokenizer,
            BuildRecipe(length=512, shard_bytes=4_000, licences="any"),
        )
    assert json.loads((outs[0] / "manifests" / "dedup.json").read_text())["counts"]["near copy"] > 5
    assert digest(outs[0]) == digest(outs[1]) == digest(outs[2])


def test_same_bytes_after_kill_and_resume(built, corpus, tokenizer, tmp_path):
    """kill -9 at several moments, then resume."""
    out, script = tmp_path / "out", tmp_path / "run.py"
    (tmp_path / "tokenizer.model").write_bytes(small())
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from codegemma.data import build
from codegemma.data.recipe import BuildRecipe
from codegemma.tokenizer import Tokenizer
if __name__ == "__main__":
    tokenizer = Tokenizer.from_sentencepiece(open({str(tmp_path / "tokenizer.model")!r}, "rb").read())
    build.build({sources_of(corpus)!r}, {str(out)!r}, tokenizer, BuildRecipe(length=512, shard_bytes=20_000),
                benchmarks=[{str(corpus / "toy.jsonl")!r}], resume=True,
                progress=lambda *_: print("task", flush=True))
""")
    killed = 0
    for after in (1, 3, 9, 14, 2, 10**6):  # tasks done before the kill
        process = subprocess.Popen(
            [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        for count, _ in enumerate(process.stdout, 1):
            if count == after:
                time.sleep(random.Random(after).random() * 0.02)  # somewhere inside the next task
                os.killpg(process.pid, signal.SIGKILL)
                killed += 1
                break
        process.stdout.close()
        process.wait()
    assert process.returncode == 0 and killed >= 4
    assert digest(out) == digest(built)
    with pytest.raises(ValueError, match="not empty"):
        build.build(sources_of(corpus), out, tokenizer, RECIPE)
    with pytest.raises(ValueError, match="another recipe: length"):
        build.build(
            sources_of(corpus),
            out,
            tokenizer,
            BuildRecipe(length=256, shard_bytes=20_000),
            benchmarks=[corpus / "toy.jsonl"],
            resume=True,
        )


@pytest.mark.parametrize("resume", [True, False])
def test_a_second_build_into_a_folder_is_refused_while_the_first_runs(
    built, corpus, tokenizer, tmp_path, resume
):
    refusals = []

    def second(stage, done, total):
        with pytest.raises(ValueError, match="rows: is being written by another process: wait for it"):
            build.build(sources_of(corpus), tmp_path / "rows", tokenizer, RECIPE, resume=resume)
        refusals.append(stage)

    benchmarks = [corpus / "toy.jsonl"]
    build.build(
        sources_of(corpus), tmp_path / "rows", tokenizer, RECIPE, benchmarks=benchmarks, progress=second
    )
    assert refusals and digest(tmp_path / "rows") == digest(built)


def test_a_machine_without_shared_memory_is_told_what_to_do(monkeypatch):
    def read_only(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", read_only)
    rule = r"/dev/shm \(Read-only file system\): make it writable, or pass --workers 1"
    with pytest.raises(ValueError, match=rule), engines.local(2):
        pass
    with engines.local(1):
        pass


def test_a_folder_that_holds_no_build_is_not_resumed(corpus, tokenizer, tmp_path):
    (tmp_path / "rows").mkdir()
    (tmp_path / ".mine.part").write_text("mine")
    with pytest.raises(ValueError, match="holds rows, which is not of a build: name another folder"):
        build.build(sources_of(corpus), tmp_path, tokenizer, RECIPE, resume=True)
    assert (tmp_path / ".mine.part").read_text() == "mine" and len([*tmp_path.iterdir()]) == 2


def test_a_report_replaces_reports_alone(built, tmp_path):
    page = tmp_path / "page.html"
    report.report(built, page)
    report.report(built, page)
    page.write_text("<!doctype html>\n<p>mine")
    with pytest.raises(ValueError, match=r"page\.html was not written by codegemma, and is kept"):
        report.report(built, page)
    assert page.read_text() == "<!doctype html>\n<p>mine"


@pytest.mark.filterwarnings("ignore")
def test_same_bytes_on_a_ray_cluster(built, corpus, tokenizer, tmp_path):
    ray = pytest.importorskip("ray")
    root = str(Path(__file__).parent.parent)
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": root}},
        object_store_memory=100_000_000,
    )
    try:
        build.build(
            sources_of(corpus),
            tmp_path / "out",
            tokenizer,
            RECIPE,
            benchmarks=[corpus / "toy.jsonl"],
            engine="ray",
            workers=2,
        )
    finally:
        ray.shutdown()
    assert digest(tmp_path / "out") == digest(built)


def test_windows_and_what_is_held_out(corpus, tokenizer, tmp_path):
    recipe = BuildRecipe(length=160, shard_bytes=20_000, window=(64, 159), stride=300, hold_out=0.3, seed=5)
    result = build.build(sources_of(corpus), tmp_path / "a", tokenizer, recipe)
    build.build(sources_of(corpus)[::-1], tmp_path / "b", tokenizer, recipe, workers=2)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    rows, held = pack.Rows(tmp_path / "a"), pq.read_table(tmp_path / "a" / "held-out").to_pylist()
    trained = {record["repository"] for at in range(len(rows)) for record in rows.examples(at)}
    kept_out = {row["repository"] for row in held if row["kind"] == "code"}
    assert len(trained) > 2 and kept_out and not trained & kept_out
    assert result.manifests["order"]["counts"]["kept: held out"] == len(held)
    for at in range(len(rows)):  # each window of code is a segment of its own
        segments = [record["segment"] for record in rows.examples(at) if record["kind"] == "code"]
        assert len(segments) == len(set(segments))


EDITOR = replace(
    named_recipe("editor"),
    length=512,
    shard_bytes=20_000,
    window=(64, 159),
    stride=80,
    context_rate=0.5,
    context_tokens=200,
)


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """A checkout with Python, a tenth as much Java, and a test beside what it tests."""
    root, draw = tmp_path_factory.mktemp("languages") / "app", random.Random(3)
    (root / "pkg").mkdir(parents=True)
    for at in range(12):
        (root / "pkg" / f"m{at}.py").write_text(python_file(draw, at, range(at)))
    words = ["get", "grow", "leaf", "root", "sum", "size", "left", "right", "depth", "count"]
    for name in ("Tree", "TreeTest"):
        body = "".join(
            f"  int {word}{at}(int {word}) {{\n    return {word} + {draw.choice(words)}({at});\n  }}\n"
            for at, word in enumerate(draw.choices(words, k=110))
        )
        (root / f"{name}.java").write_text(f"class {name} {{\n{body}}}\n")
    return root


@pytest.fixture(scope="module")
def editor_rows(languages, tokenizer, tmp_path_factory):
    out = tmp_path_factory.mktemp("editor") / "rows"
    build.build([str(languages)], out, tokenizer, EDITOR)
    return out


def test_the_editors_rows_have_files_in_front_and_even_languages(editor_rows, languages, tokenizer):
    rows, seen = pack.Rows(editor_rows), Counter()
    for number in range(len(rows)):
        tokens_T = rows[number]["tokens"]
        for record, texts in show.parts(rows, number):
            seen[record["language"]] += 1
            seen["with files"] += bool(record["context"])
            whole = (languages / record["path"]).read_text()
            assert "".join(texts[name] for name in ("prefix", "middle", "suffix")) in whole
            ids = tokens_T[record["start"] : record["end"]].tolist()
            for path in record["context"]:
                end = ids.index(tokenizer.control.file_separator)
                head, _, text = tokenizer.decode(ids[:end]).partition("\n")
                assert head == path and (languages / path).read_text().startswith(text)
                ids = ids[end + 1 :]
            assert ids.count(tokenizer.control.file_separator) == 1
            if record["path"] == "TreeTest.java":
                assert record["context"] in ([], ["Tree.java"])
            if record["path"] == "pkg/m1.py":  # which imports m0.py
                seen["import"] += "pkg/m0.py" in record["context"]
                assert "pkg/m0.py" not in record["context"][:-1]
    total = seen["python"] + seen["java"]
    assert total > 100 and seen["import"] and abs(seen["java"] / total - 0.5) < 0.1
    assert abs(seen["with files"] / total - 0.5) < 0.12
    counts = json.loads((editor_rows / "manifests" / "rows.json").read_text())["counts"]
    assert counts["language java"] == seen["java"]
    assert sum(n for label, n in counts.items() if label.startswith("context ")) == total
    fim_examples = counts["layout psm"] + counts["layout spm"]
    for name in ("begins ", "ends "):
        assert sum(n for label, n in counts.items() if label.startswith(name)) == fim_examples


def test_the_editors_rows_have_the_same_bytes_for_workers_and_after_a_stop(
    editor_rows, languages, tokenizer, tmp_path
):
    build.build([str(languages)], tmp_path / "two", tokenizer, EDITOR, workers=2)
    assert digest(tmp_path / "two") == digest(editor_rows)

    def stop(stage, done, total):
        if stage == "rows":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build.build([str(languages)], tmp_path / "stopped", tokenizer, EDITOR, progress=stop)
    build.build([str(languages)], tmp_path / "stopped", tokenizer, EDITOR, resume=True)
    assert digest(tmp_path / "stopped") == digest(editor_rows)


def test_the_report_has_each_kind_of_hole(editor_rows):
    page = report.report(editor_rows).read_text()
    (editor_rows / "report.html").unlink()
    rows = pack.Rows(editor_rows)
    kinds = {record["boundary"] for number in range(len(rows)) for record in rows.examples(number)}
    assert len(kinds) > 10
    titles = re.findall("<h3>(.*?)</h3>", page.partition("<h2>An example of each kind of hole")[2])
    assert titles == sorted(kinds)
    for title in ("What holes begin with", "Where holes end", "Languages of the examples"):
        assert re.search(f"<figcaption>{title}</figcaption><svg", page)
    assert "blanks in an indentation" in page and "; behind " in page


def test_a_folder_of_an_older_version_is_complete(built, corpus, tokenizer, tmp_path):
    """Its recipe lacks the fields that are newer than it, which had the defaults of today."""
    out = tmp_path / "old"
    shutil.copytree(built, out)
    recipe = json.loads((out / "recipe.json").read_text())
    for name in ("kinds", "context_rate", "context_tokens", "even_languages"):
        del recipe[name]
    (out / "recipe.json").write_text(json.dumps(recipe))
    benchmarks = [corpus / "toy.jsonl"]
    assert build.build(sources_of(corpus), out, tokenizer, RECIPE, benchmarks=benchmarks, resume=True).rows
    with pytest.raises(ValueError, match="built with another recipe: kinds"):
        changed = replace(RECIPE, kinds=(("node", 1.0),))
        build.build(sources_of(corpus), out, tokenizer, changed, benchmarks=benchmarks, resume=True)


def test_mix_gives_the_shares_of_tokens(corpus, tokenizer, tmp_path):
    recipe = BuildRecipe(length=512, shard_bytes=20_000, mix=(("code", 0.8), ("text", 0.2)))
    build.build(sources_of(corpus), tmp_path / "out", tokenizer, recipe)
    rows = pack.Rows(tmp_path / "out")
    tokens: Counter[str] = Counter()
    for number in range(len(rows)):
        kinds = {record["kind"] for record in rows.examples(number)}
        assert len(kinds) == 1
        tokens[kinds.pop()] += int((rows[number]["segments"] > 0).sum())
    assert abs(tokens["text"] - 0.2 * sum(tokens.values())) <= 512
    with pytest.raises(ValueError, match="mix names code, maths but the sources are code, text"):
        build.build(
            sources_of(corpus), tmp_path / "no", tokenizer, BuildRecipe(mix=(("code", 0.5), ("maths", 0.5)))
        )


def test_rates_lie_within_binomial_bounds(tokenizer):
    documents = [
        Document("r", f"m{at}.py", f"def f{at}(x):\n    y = x + {at}\n    return y\n", "python")
        for at in range(3000)
    ]
    recipe = fim.FimRecipe(0.8, 0.5, 512, seed=3)
    examples = list(fim.fim(documents, tokenizer, recipe))
    counts = Counter(example.layout for example in examples)
    fim_examples = counts["psm"] + counts["spm"]
    assert len(examples) == 3000 and abs(fim_examples - 2400) < 4 * (3000 * 0.8 * 0.2) ** 0.5
    assert abs(counts["spm"] - fim_examples / 2) < 4 * (fim_examples / 4) ** 0.5
    kinds = Counter(example.split.kind for example in examples if example.layout != "prefix")
    for kind, share in splits.KINDS.items():
        assert abs(kinds[kind] - fim_examples * share) < 4 * (fim_examples * share * (1 - share)) ** 0.5 + 1
    again = {e.document.path: e.ids_T.tolist() for e in fim.fim(documents[::-1], tokenizer, recipe)}
    assert all(again[e.document.path] == e.ids_T.tolist() for e in examples)


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_the_peak_of_memory_is_in_bytes_on_each_system(monkeypatch, platform, unit):
    monkeypatch.setattr(stages.sys, "platform", platform)
    monkeypatch.setattr(stages.resource, "getrusage", lambda _: SimpleNamespace(ru_maxrss=5_000_000))
    assert stages.peak_bytes() == 5_000_000 * unit


def test_show_and_report(built, capsys):
    from rich.console import Console

    console = Console(width=100, record=True, file=io.StringIO())
    row = next(
        at
        for at in range(len(pack.Rows(built)))
        if any(r["layout"] != "prefix" for r in pack.Rows(built).examples(at))
    )
    show.show(built, row, console)
    text = console.export_text()
    assert (
        "tokens of 512" in text and any(why[:40] in text for why in show.WHY.values()) and "licence" in text
    )
    with pytest.raises(ValueError, match="it has rows 0 to"):
        show.show(built, 10**6)
    page = report.report(built).read_text()
    assert (
        page.count("<svg") >= 12
        and "http" not in page.split("<h2>Rows")[0]
        and "src=" not in page.split("<h2>Rows")[0]
    )
    assert "copy of a repository" in page and "pkg/m3.py" in page
    tiles = {label: value for value, label in re.findall(r'"tile"><b>(.*?)</b>(.*?)</div>', page)}
    rows = json.loads((built / "manifests" / "rows.json").read_text())
    names = {"rows": "rows_in_index", "tokens": "tokens", "examples": "examples"}
    measured = {label: f"{rows[name]:,}" for label, name in names.items()}
    measured |= {"padding": f"{rows['padding']:.1%}"}
    assert {label: tiles.pop(label) for label in measured} == measured
    assert tiles.keys() == {"documents read", "kept"}
    (built / "report.html").unlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fim_rate": 1.5}, "fim-rate must lie from 0 to 1, got 1.5"),
        ({"length": 5}, "length must be at least 64"),
        ({"languages": ("klingon",)}, "klingon not known"),
        ({"mix": (("code", 0.5),)}, "add up to 1"),
        ({"threshold": 0.1}, "0.5 to 1"),
        (
            {"window": (64, 9000)},
            "window must be MIN:MAX tokens, from 32 to below the row's 8192, got 64:9000",
        ),
        ({"hold_out": 1.0}, "hold-out must lie from 0 to below 1"),
    ],
)
def test_recipes_that_contradict_themselves(arguments, message):
    with pytest.raises(ValueError, match=message):
        BuildRecipe(**arguments)


def test_a_source_that_is_not_there(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="does not exist: give a checkout"):
        build.build([str(tmp_path / "none")], tmp_path / "out", tokenizer)
