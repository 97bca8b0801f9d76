"""The card and the learning curve of the default model's adapter, from a small corpus and written reports."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tree_sitter")
sys.path.append(str(Path(__file__).parents[1] / "tools"))

import adapter_card
import adapter_data
import adapter_eval
from vocabularies import small

from codegemma.adapters.adapter import Adapter
from codegemma.data.build import build
from codegemma.data.pack import Rows
from codegemma.data.recipe import BuildRecipe
from codegemma.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    root = tmp_path_factory.mktemp("cache")
    for name in ("one", "two", "three"):
        (root / "src" / name).mkdir(parents=True)
        (root / "src" / name / "pyproject.toml").write_text("[project]\nlicense = 'MIT'\n")
        for number in range(8):
            body = "".join(
                f"def {name}_{number}_{i}(a, b):\n"
                f"    return {(len(name) * 101 + number * 13 + i) * 7919} + a\n\n"
                for i in range(12)
            )
            (root / "src" / name / f"m{number}.py").write_text(body)
    recipe = BuildRecipe(length=160, window=(64, 159), stride=300, loss=("middle", "terminator"))
    build([str(root / "src")], root / "rows" / "a1", Tokenizer.from_sentencepiece(small()), recipe)
    return root


def report(label, tokens, share, nats):
    layout = {
        "all": {name: {"mean": share} for name in ("exact", "stopped", "ended", "gain")},
        "random": {"exact": {"mean": 0.25}},
    }
    return {
        "label": label,
        "tokens": tokens,
        "held_out": {"psm": layout, "spm": layout, "left_to_right": nats},
        "infilling": {
            "infill-single-spm": {"score": share, "items": 4},
            "infill-single-l2r": {"score": 0.25, "items": 4},
        },
    }


def test_the_card_says_what_the_manifests_say(cache, tmp_path):
    rows = Rows(cache / "rows" / "a1")
    manifest = json.loads((cache / "rows" / "a1" / "manifests" / "rows.json").read_text())
    adapter = Adapter(
        "fim",
        2,
        4.0,
        {"layers.0.q": np.ones((2, 8), np.float32)},
        {"layers.0.q": np.ones((8, 2), np.float32)},
        {67: np.ones(8, np.float32)},
        {"base": "google/gemma-3-270m", "learning_rate": 1e-3},
    )
    metrics = tmp_path / "a1" / "metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(
        "".join(json.dumps({"step": step, "tokens": 1000, "seconds": 1800.0}) + "\n" for step in (1, 2, 2, 3))
    )
    (cache / "evals").mkdir()
    (cache / "evals" / "final.json").write_text(
        json.dumps(
            report("final", 3000, 0.5, [1.0])
            | {
                "compared": {
                    "infill-single-spm - base left to right": {
                        "difference": 0.25,
                        "low": 0.1,
                        "high": 0.4,
                        "items": 4,
                    }
                }
            }
        )
    )
    before = "| phase | tokens | steps | hours |\n| --- | --- | --- | --- |\n"
    before += "| A1 | 9 | 1 | 0.2 |\n| A0 | 7 | 1 | 0.1 |\n\n| A9 |\n"
    text = adapter_card.card(adapter, cache, [metrics], "final", before)
    learned = sum(int(rows[number]["loss"].sum()) for number in range(len(rows)))
    examples = sum(len(rows.examples(number)) for number in range(len(rows)))
    assert f"| {examples:,} | {manifest['tokens']:,} | {learned:,} |" in text and "24 files were kept" in text
    assert (
        "| A0 | 7 | 1 | 0.1 |\n| A1 | 3,000 | 3 | 1.5 |\n\n" in text and '"learning_rate": 0.001' in text
    )  # A0's run is gone
    assert (
        "+0.2500 | +0.1000 to +0.4000 | 4" in text
        and "Gemma Terms of Use" in text
        and "Statement of changes" in text
    )


def test_differences_are_paired_with_the_base_models_own_answers(tmp_path):
    for label, passed in (("base", (1, 0, 0, 0)), ("new", (1, 1, 0, 1))):
        (tmp_path / label).mkdir()
        task = "infill-single-l2r" if label == "base" else "infill-single-spm"
        (tmp_path / label / f"{task}.jsonl").write_text(
            "".join(json.dumps({"id": str(i), "passed": bool(p)}) + "\n" for i, p in enumerate(passed))
        )
    base, new = report("base", 0, 0.25, [1.0, 2.0]), report("new", 10**6, 0.75, [1.25, 2.25])
    del base["infilling"]["infill-single-spm"], new["infilling"]["infill-single-l2r"]
    differences = adapter_eval.compared(new, base, tmp_path / "new", tmp_path / "base")
    assert differences["infill-single-spm - base left to right"]["difference"] == 0.5
    assert differences["nats a token left to right"] == {
        "items": 2,
        "difference": 0.25,
        "low": 0.25,
        "high": 0.25,
    }
    for results in (new, base):
        (tmp_path / f"{results['label']}.json").write_text(json.dumps(results))
    lines = adapter_eval.table(tmp_path).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| base", "| new"] and {
        line.count("|") for line in lines
    } == {len(adapter_eval.HEAD) + 1}


def test_an_archive_that_is_not_the_pinned_one_is_refused(tmp_path):
    package = adapter_data.packages()[0]
    (tmp_path / package.file).write_bytes(b"something else")
    with pytest.raises(ValueError, match="the list says"):
        adapter_data.fetch(package, tmp_path)
    assert not (tmp_path / package.file).exists()
    assert all(
        len(package.sha256) == 64 and package.registry in adapter_data.REGISTRIES
        for package in adapter_data.packages()
    )


def test_a_choice_keeps_whole_segments_of_one_layout(cache, monkeypatch):
    """Each segment that fits is in the chosen rows once, with its loss, and no other is."""
    monkeypatch.setitem(
        adapter_data.CHOICES, "s", adapter_data.Choice({"a1": 1.0}, {"spm": 1.0, "prefix": 1.0}, 120)
    )

    def segments(folder):
        rows = Rows(folder)
        for number in range(len(rows)):
            row = rows[number]
            for segment in range(1, row["segments"].max() + 1):
                in_segment = row["segments"] == segment
                layouts = {
                    example["layout"] for example in rows.examples(number) if example["segment"] == segment
                }
                data = row["tokens"][in_segment].tobytes() + row["loss"][in_segment].tobytes()
                yield data, layouts, int(in_segment.sum())

    assert adapter_data.choose("s", cache) == len(Rows(cache / "rows" / "s"))
    wanted = sorted(
        data
        for data, layouts, size in segments(cache / "rows" / "a1")
        if size <= 120 and layouts in ({"spm"}, {"prefix"})
    )
    assert wanted and sorted(data for data, _, _ in segments(cache / "rows" / "s")) == wanted
    assert {layout for _, layouts, _ in segments(cache / "rows" / "s") for layout in layouts} == {
        "spm",
        "prefix",
    }
    assert "| S | a sample: all of A1; at most 120 tokens | 100% |" in adapter_card.data(cache, [], "")


def test_packages_of_the_second_edition_are_its_own_and_in_no_measurement():
    from codegemma.data import licences

    first, more, second = (
        {tuple(line.split()[:2]) for line in part.splitlines() if line and line[0] != "#"}
        for part in re.split("^# for .*$", adapter_data.LIST.read_text(), flags=re.M)
    )
    assert not second & (first | more) and len(second) >= 60

    def names(phase):
        return {(package.registry, package.name) for package in adapter_data.packages_of(phase)}

    assert (names("f"), names("k"), names("second")) == (first, more, first | more | second)
    measured = Path(__file__).parents[1] / "benchmarks" / "cursor_packages.txt"
    lines = [line.split() for line in measured.read_text().splitlines() if line[0] != "#"]
    assert not {(registry, name) for _, registry, name, _ in lines} & second
    for package in adapter_data.packages():
        if (package.registry, package.name) in second:
            licence = package.licence.strip("_").replace("_", " ")
            assert licences.allowed(licence, licences.permissive()), package.name
    held_out = {
        (adapter_data.PHASES[phase].seed, adapter_data.PHASES[phase].hold_out) for phase in ("f", "second")
    }
    assert len(held_out) == 1  # the same repositories


def test_the_licence_of_a_debian_package_is_that_of_its_own_files():
    text = (
        "Format: https://example.org\nUpstream-Name: x\n\nFiles: *\nCopyright: 2020 A\nLicense: Expat\n\n"
        "Files: debian/*\nCopyright: 2021 B\nLicense: GPL-2+\n\nLicense: GPL-2+\n This is free software.\n\n"
        "License: Expat\n Permission is hereby granted\n .\n free of charge\n"
    )
    assert (
        " ".join(adapter_data.debian_licence(text).split()) == "Permission is hereby granted . free of charge"
    )
    inline = "Files: *\nCopyright: A\nLicense: Zlib\n Take it.\n\nLicense: GPL-2+\n No.\n"
    assert adapter_data.debian_licence(inline) == " Take it."
    with pytest.raises(ValueError, match="no licence of"):
        adapter_data.debian_licence("This package was debianized by somebody.\n")
