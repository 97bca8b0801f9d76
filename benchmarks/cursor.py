"""Completions at random cursors of files that training never saw, as an editor would show them.

    PYTHONPATH=. .venv/bin/python benchmarks/cursor.py OUT.json [--holes 600] [-m MODEL] [--against OLD.json]
                                                       [--path] [--context 2] [--seed 0] [--trim auto]

A third of the cursors are inside words, a third inside lines, a third at the starts of lines, in even shares
of ten languages. What was taken out is the rest of the line, or from one to four whole lines; half of the
cursors inside a line keep the closing brackets and marks at the line's end, as an editor's auto-close writes
them. Of each answer: is it exactly what stood there, does the file parse as before, does it repeat the
suffix, is anything shown?
"""

from __future__ import annotations

import json
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from logbook import parser
from peers import BENCH

import codegemma
from codegemma.config import Trim
from codegemma.data.syntax import error_share, parse
from codegemma.evals.task import interval
from tools.adapter_data import from_npm, from_pypi

PACKAGES = Path(__file__).with_name("cursor_packages.txt")
ENDINGS = {
    "python": "py", "javascript": "js", "typescript": "ts", "java": "java", "kotlin": "kt", "go": "go",
    "rust": "rs", "c": "c", "cpp": "cpp", "csharp": "cs",
}  # fmt: skip
KINDS = ("word", "line", "lines")
CONTEXT = 2000  # characters of a file beside the hole's
WINDOW = 1500, 500  # characters before and after the cursor that a prompt is made of
FILE_BYTES = 2_000, 60_000
MAX_TOKENS = 64


@dataclass(frozen=True)
class Hole:
    """A file's part that was taken out at a cursor."""

    language: str
    kind: str
    path: str
    prefix: str
    middle: str
    suffix: str
    neighbours: tuple[tuple[str, str], ...]  # path and text of up to four files beside it in its package


def from_debian(name: str, version: str, folder: Path) -> Path:
    """The package as Debian has it."""
    subprocess.run(
        ["apt-get", "download", "-q", f"{name}={version}"], cwd=folder, check=True, capture_output=True
    )
    return next(folder.glob("*.deb"))


DOWNLOADS = {"pypi": from_pypi, "npm": from_npm, "debian": from_debian}


def fetch(folder: Path) -> None:
    """Downloads and unpacks the packages of the list that are not there yet."""
    for line in PACKAGES.read_text().splitlines():
        if line.startswith("#"):
            continue
        language, registry, name, version = line.split()
        target = folder / language / name.replace("/", "-")
        if target.exists():
            continue
        with tempfile.TemporaryDirectory() as temporary:
            archive = DOWNLOADS[registry](name, version, Path(temporary))
            unpacked = Path(temporary) / "unpacked"
            if registry == "debian":
                subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            else:
                shutil.unpack_archive(archive, unpacked, "gztar", filter="data")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(unpacked, target)


def files(folder: Path, language: str) -> list[tuple[str, str]]:
    """(path, text) of the files of a language that parse, in order of their paths."""
    chosen = []
    for path in sorted(folder.joinpath(language).rglob(f"*.{ENDINGS[language]}")):
        if (
            path.is_file()
            and FILE_BYTES[0] <= path.stat().st_size <= FILE_BYTES[1]
            and ".min." not in path.name
        ):
            text = path.read_text("utf-8", "replace").replace("\r\n", "\n")
            if errors(text, language) < 0.01 and max(map(len, text.split("\n"))) < 300:
                chosen.append((path.name, text))
    return chosen


def errors(text: str, language: str) -> float:
    """Share of a text that the language's grammar does not understand."""
    tree = parse(text, language)
    assert tree is not None
    return error_share(tree)


def holes(folder: Path, count: int, seed: int) -> list[Hole]:
    """`count` holes, as many of each kind and language as of the others, from files drawn at random."""
    drawn = []
    for language in ENDINGS:
        sources = files(folder, language)
        rng = random.Random(f"{seed} {language}")
        for kind in KINDS:
            wanted = len(drawn) + count // len(ENDINGS) // len(KINDS)
            while len(drawn) < wanted:
                number = rng.randrange(len(sources))
                name, text = sources[number]
                beside = tuple(
                    sources[i]
                    for i in (number + 1, number - 1, number + 2, number - 2)
                    if 0 <= i < len(sources)
                )
                if hole := cut(text, language, kind, name, rng, beside):
                    drawn.append(hole)
    return drawn


def cut(
    text: str, language: str, kind: str, name: str, rng: random.Random, beside: tuple[tuple[str, str], ...]
) -> Hole | None:
    """A hole of a kind at a random character of a text; None where the place is not of that kind."""
    start = rng.randrange(len(text))
    line_start, line_end = text.rfind("\n", 0, start) + 1, text.find("\n", start)
    line = text[line_start:line_end]
    if line_end < 0 or not re.search(r"\w", line) or re.match(r"\s*(#|//|/?\*)", line):
        return None
    if kind == "lines":
        start, end = line_start + (len(line) - len(line.lstrip())) * rng.randrange(2), line_end
        for _ in range(rng.randrange(4)):
            end = text.find("\n", end + 1) if text.find("\n", end + 1) > 0 else end
    else:
        in_word = bool(re.match(r"\w", text[start - 1 : start]) and re.match(r"\w", text[start : start + 1]))
        if in_word != (kind == "word") or start == line_start or not line[: start - line_start].strip():
            return None
        end = line_end
        if rng.randrange(2):  # as where an editor closed the brackets already
            end -= len(re.search(r"[)\]};:,'\"\s]*$", text[start:line_end])[0])  # type: ignore[index]
    if not text[start:end].strip():
        return None
    return Hole(language, kind, name, text[:start], text[start:end], text[end:], beside)


def judge(hole: Hole, answer: str) -> dict[str, bool]:
    """What there is to say of an answer without running it."""
    before, after = errors(hole.prefix + hole.middle + hole.suffix, hole.language), ""
    shown = hole.prefix + answer + hole.suffix
    lines = [line.strip() for line in answer.split("\n") if line.strip()]
    after = next((line.strip() for line in hole.suffix.split("\n") if line.strip()), "")
    return {
        "exact": answer.rstrip() == hole.middle.rstrip(),
        "first line": answer.split("\n")[0].rstrip() == hole.middle.split("\n")[0].rstrip(),
        "parses": errors(shown, hole.language) <= before,
        "repeats": bool(lines) and len(after) > 3 and lines[-1].endswith(after),
        "hidden": not answer.strip(),
    }


def measure(
    model: codegemma.Model, drawn: Sequence[Hole], trim: Trim | None, with_path: bool, context: int
) -> list[dict[str, Any]]:
    """Each hole with the text that is shown, the time that it took and its judgement.

    `with_path`: the prompt names the file. If `context` is not 0, it does too, and has the head of that many
    files beside it.
    """
    rows = []
    for number, hole in enumerate(drawn):
        started = time.perf_counter()
        # An old version has no trim "auto"; the language server chose this.
        chosen = trim or ("line" if re.match(r"[^\n]*\w", hole.suffix) else "block")
        prefix = hole.prefix[hole.prefix.find("\n", max(0, len(hole.prefix) - WINDOW[0])) + 1 :]
        suffix = hole.suffix[: WINDOW[1]]
        beside: dict[str, Any] = {"path": hole.path} if with_path or context else {}
        if context:
            beside["context"] = [(name, text[:CONTEXT]) for name, text in hole.neighbours[:context]]
        answer = model.complete(prefix, suffix, trim=chosen, max_tokens=MAX_TOKENS, **beside)
        text = answer.text
        confidence = getattr(answer, "confidence", None)
        row = {name: value for name, value in asdict(hole).items() if name != "neighbours"}
        rows.append(row | judge(hole, text) | {"answer": text, "confidence": confidence,
                    "seconds": time.perf_counter() - started})  # fmt: skip
        print(f"\r{number + 1} of {len(drawn)}", end="", file=sys.stderr)
    return rows


def table(rows: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]] | None) -> str:
    """Shares in percent by kind, then by language, with those of an older run in brackets."""
    names = ("exact", "first line", "parses", "repeats", "hidden")
    lines = [f"| | holes | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
    groups: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        for group in ("all", row["kind"], row["language"]):
            groups[group].append(i)
    for group, members in groups.items():
        cells = []
        for name in names:
            cell = f"{100 * sum(rows[i][name] for i in members) / len(members):.1f}"
            cells.append(
                cell + (f" ({100 * sum(old[i][name] for i in members) / len(members):.1f})" if old else "")
            )
        lines.append(f"| {group} | {len(members)} | {' | '.join(cells)} |")
    if old:
        for name in names:
            differences = [
                float(row[name]) - float(before[name]) for row, before in zip(rows, old, strict=True)
            ]
            low, high = interval(differences)
            mean = sum(differences) / len(differences)
            lines.append(
                f"\n{name}: {100 * mean:+.1f} points (95 % {100 * low:+.1f} to {100 * high:+.1f}), paired"
            )
    return "\n".join(lines)


def thresholds(rows: Sequence[dict[str, Any]]) -> str:
    """What hiding below a confidence costs: how much is shown, how much of it begins with the right line, and
    how many of the right first lines are kept."""
    lines = ["| hidden below | shown | right first line | right ones kept |", "|---|---|---|---|"]
    right = sum(row["first line"] for row in rows)
    for threshold in (0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8):
        shown = [row for row in rows if not row["hidden"] and row["confidence"] >= threshold]
        good = sum(row["first line"] for row in shown)
        shares = (len(shown) / len(rows), good / max(1, len(shown)), good / max(1, right))
        lines.append(f"| {threshold} | {' | '.join(f'{100 * share:.1f}' for share in shares)} |")
    return "\n".join(lines)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("out", type=Path)
    arguments.add_argument("-m", "--model", default="gemma-3-270m")
    arguments.add_argument("--holes", type=int, default=600)
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--trim", choices=("auto", "none", "line", "block"))
    arguments.add_argument("--path", action="store_true", help="name the file in the prompt")
    arguments.add_argument(
        "--context", type=int, default=0, help="files beside the hole's that are read, up to 4"
    )
    arguments.add_argument("--against", type=Path, help="the OUT of an older run on the same holes")
    options = arguments.parse_args()
    fetch(BENCH / "cursor")
    drawn = holes(BENCH / "cursor", options.holes, options.seed)
    rows = measure(codegemma.load(options.model), drawn, options.trim, options.path, options.context)
    options.out.write_text(json.dumps(rows, indent=1))
    print(table(rows, json.loads(options.against.read_text()) if options.against else None), "")
    if rows[0]["confidence"] is not None:
        print(thresholds(rows))


if __name__ == "__main__":
    main()
