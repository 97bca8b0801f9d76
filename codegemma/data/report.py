"""An HTML page about a build: documents kept and dropped, splits, packing, and sample rows."""

from __future__ import annotations

import io
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from codegemma.data.build import summary
from codegemma.data.folder import BuildFolder
from codegemma.data.pack import Rows
from codegemma.data.show import WHY, parts
from codegemma.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, RED = "#4e79a7", "#e15759"
MARK = b"<!doctype html>\n<!-- codegemma data report -->"  # the template's first lines
MAX_BARS = 14
MAX_SIZES = 200_000  # documents in the histogram of sizes
MAX_GRAPHS, MAX_GRAPH_FILES = 4, 70
MAX_EXAMPLES, MAX_EXAMPLE_CHARACTERS = 4, 1500  # of a sample row
MAX_SAMPLED_ROWS = 200  # whose holes are measured


# ----------------------------------------------------------------------------------------------------- plots
def plot(draw: Callable[[Axes], None], height: float) -> str:
    """An SVG element, 6 inches wide, that needs nothing from outside the page."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text stays text; ids are hashes of their content, so that plots of one page may share them.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "codegemma", "font.size": 9}):
        figure = Figure((6, height), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # not needed inside HTML


def bars(counts: Mapping[str, float], unit: str = "") -> str:
    """Horizontal bars, largest first; the last adds up all beyond MAX_BARS. "" where there are no counts."""
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(items) > MAX_BARS:
        rest = items[MAX_BARS - 1 :]
        items = [*items[: MAX_BARS - 1], (f"{len(rest)} others", sum(value for _, value in rest))]

    def draw(axes: Axes) -> None:
        places, values = range(len(items)), [value for _, value in items]
        container = axes.barh(places, values, color=BLUE)
        axes.bar_label(container, [f"{value:,.0f}{unit}" for value in values], padding=4)
        axes.set_yticks(places, [_shorten(name) for name, _ in items], parse_math=False)
        axes.tick_params(left=False)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.margins(x=0.15)
        axes.invert_yaxis()

    return plot(draw, 0.3 + 0.24 * len(items)) if items else ""


def histogram(values: Sequence[float], label: str, is_log: bool = False) -> str:
    """A histogram of values, on a log scale, or on a linear one from 0 to at least 1. "" without values."""
    array = np.maximum(np.asarray(values, float), 1 if is_log else -np.inf)
    if not len(array):
        return ""
    low, high = float(array.min()), float(array.max())
    low, high = (low, max(high, low * 2)) if is_log else (min(0.0, low), max(1.0, high))
    edges = np.geomspace(low, high, 25) if is_log else np.linspace(low, high, 25)

    def draw(axes: Axes) -> None:
        axes.hist(array, edges.tolist(), color=BLUE, rwidth=0.95)
        axes.set_xscale("log" if is_log else "linear")
        axes.set_xlabel(label)

    return plot(draw, 2.2)


def arcs(paths: Sequence[str], edges: Iterable[tuple[str, str]]) -> str:
    """Files in their packed order from top to bottom; an arc joins a file with one that it imports."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path as Curve

    place = {path: number for number, path in enumerate(paths)}
    codes = [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4]

    def draw(axes: Axes) -> None:
        for source, target in sorted(edges):
            if source in place and target in place:
                start, end = place[source], place[target]
                bend = -min(13.0, 0.9 + 0.55 * abs(end - start))
                curve = Curve([(0, start), (bend, start), (bend, end), (0, end)], codes)
                colour = BLUE if end < start else RED
                axes.add_patch(PathPatch(curve, fill=False, edgecolor=colour, alpha=0.45))
        axes.plot([0] * len(paths), range(len(paths)), "o", color="#333", markersize=3.5)
        for path, number in place.items():
            axes.text(0.7, number, _shorten(path, 60), va="center", parse_math=False)
        axes.set(xlim=(-10.5, 24), ylim=(len(paths) - 0.5, -0.5))
        axes.set_axis_off()

    return plot(draw, 0.3 + 0.18 * len(paths))


def _shorten(name: str, limit: int = 30) -> str:
    return name if len(name) <= limit else f"{name[: limit // 3]}…{name[-(limit - limit // 3 - 1) :]}"


# ------------------------------------------------------------------------------------------------------ data
def _read_ledger(folder: BuildFolder) -> tuple[dict[str, Counter[str]], list[float]]:
    """The documents counted by outcome, reason, language, licence and copied document; some sizes."""
    import pyarrow.parquet as pq

    names = ("reasons", "languages", "licences", "copies", "outcomes")
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    sizes: list[float] = []
    with pq.ParquetFile(folder.ledger) as file:
        for row in (row for batch in file.iter_batches(65_536) for row in batch.to_pylist()):
            counts["outcomes"][row["outcome"]] += 1
            if row["outcome"] == "kept":
                counts["languages"][row["language"]] += 1
                counts["licences"][row["licence"] or "none found"] += 1
                sizes += [row["size"]] if len(sizes) < MAX_SIZES else []
            else:
                counts["reasons"][row["reason"]] += 1
            if row["outcome"] == "duplicate":
                counts["copies"][row["detail"]] += 1
    return counts, sizes


def _graphs(rows: Rows) -> Iterator[tuple[str, str]]:
    """(title, SVG) of the repositories with the most edges in the first eight parts."""
    import pyarrow.parquet as pq

    graphs = []
    for part in np.unique(rows.index_R2[:, 0]).tolist()[:8]:
        edges = pq.read_table(rows.files.graph(part)).to_pylist()
        for repository, count in Counter(edge["repository"] for edge in edges).most_common(MAX_GRAPHS):
            pairs = [(e["source"], e["target"]) for e in edges if e["repository"] == repository]
            graphs.append((-count, repository, part, pairs))
    for _, repository, part, pairs in sorted(graphs)[:MAX_GRAPHS]:
        filters = [("repository", "=", repository), ("via", "=", "graph")]
        records = pq.read_table(
            rows.files.rows(part, "examples.parquet"), columns=["path", "order"], filters=filters
        )
        in_order = sorted(records.to_pylist(), key=lambda record: record["order"])
        paths = list(dict.fromkeys(record["path"] for record in in_order))
        shown = paths[:MAX_GRAPH_FILES]
        yield f"{repository}: the first {len(shown)} of {len(paths)} connected files", arcs(shown, pairs)


def _sample(rows: Rows, number: int, start: int = 0) -> dict[str, Any]:
    """The examples of a row from a token on, the first MAX_EXAMPLES, with texts cut to
    MAX_EXAMPLE_CHARACTERS."""
    examples = []
    from_start = [pair for pair in parts(rows, number) if pair[0]["start"] >= start]
    for record, texts in from_start[:MAX_EXAMPLES]:
        cut = {name: text[:MAX_EXAMPLE_CHARACTERS] for name, text in texts.items()}
        cut["prefix"] = texts["prefix"][-MAX_EXAMPLE_CHARACTERS:]
        context = record.get("context") or []
        examples.append(record | {"texts": cut, "why": WHY[record["boundary"]], "context": context})
    return {"number": number, "examples": examples}


def _kinds(rows: Rows) -> list[dict[str, Any]]:
    """For each kind of hole in the sampled rows: a histogram of the middles' sizes, and an example."""
    sizes: dict[str, list[float]] = defaultdict(list)
    examples: dict[str, dict[str, Any]] = {}
    for number in range(0, len(rows), max(1, len(rows) // MAX_SAMPLED_ROWS)):
        for record in rows.examples(number):
            kind = record["boundary"]
            sizes[kind].append(record["split_end"] - record["split_start"])
            if kind not in examples:
                sample = _sample(rows, number, record["start"])
                examples |= {each["boundary"]: each for each in sample["examples"]}
    return [
        {
            "kind": kind,
            "why": WHY[kind],
            "sizes": histogram(sizes[kind], "characters of a middle, log scale", is_log=True),
            "example": examples[kind],
        }
        for kind in sorted(sizes)
    ]


def _sections(rows: Rows, manifests: dict[str, Any]) -> dict[str, dict[str, str]]:
    """The figures: {title of a section: {title of a figure: SVG}}."""
    ledger, sizes = _read_ledger(rows.files)
    counts: dict[str, dict[str, int]] = defaultdict(dict)
    for label, count in manifests["rows"]["counts"].items():
        name, _, value = label.partition(" ")
        counts[name][value] = count
    sampled = range(0, len(rows), max(1, len(rows) // 2000))
    filled = [float((rows[number]["segments"] > 0).mean()) for number in sampled]
    timing = rows.files.timing
    seconds = json.loads(timing.read_text()) if timing.exists() else {}
    mix = manifests["rows"]["mix"]
    return {
        "Documents": {
            "Kept, dropped, duplicates": bars(ledger["outcomes"]),
            "Why not kept": bars(ledger["reasons"]),
            "Languages of what was kept": bars(ledger["languages"]),
            "Licences of what was kept": bars(ledger["licences"]),
            "Bytes of a document": histogram(sizes, "bytes, log scale", is_log=True),
            "Secrets and personal data replaced": bars(manifests["clean"]["redacted"]),
        },
        "Duplicates and benchmark problems": {
            "Why they were left out": bars(manifests["dedup"]["counts"]),
            "Most copied": bars(dict(ledger["copies"].most_common(10))),
        },
        "Fill in the middle": {
            "Layouts": bars(counts["layout"]),
            "Kinds of holes": bars(counts["boundary"]),
            "What holes begin with": bars(counts["begins"]),
            "Where holes end": bars(counts["ends"]),
            "Languages of the examples": bars(counts["language"]),
            "Examples by the number of files in front": bars(counts["context"]),
        },
        "Packing": {
            "How full the rows are": histogram(filled, "share of a row's tokens that are not padding"),
            "Files by the rule that placed them": bars(manifests["order"]["files"]),
            "Tokens by kind": bars({kind: value["tokens_in_index"] for kind, value in mix.items()}),
            "Seconds of each stage": bars({name: t["seconds"] for name, t in seconds.items()}, " s"),
        },
    }


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page (by default report.html in the folder) and returns its path.

    Raises ValueError where the folder holds no finished rows.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    rows = Rows(folder)
    build = summary(folder)
    of_rows = build.manifests["rows"]
    tiles = {
        "documents read": f"{build.documents:,}",
        "kept": f"{build.kept:,}",
        "rows": f"{build.rows:,}",
        "tokens": f"{build.tokens:,}",
        "examples": f"{of_rows['examples']:,}",
        "padding": f"{of_rows['padding']:.1%}",
    }
    samples = sorted({round(third * (len(rows) - 1) / 2) for third in range(3)}) if len(rows) else []
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(autoescape=True, loader=loader, undefined=StrictUndefined, trim_blocks=True)
    page = environment.get_template("report.html.j2").render(
        name=rows.folder.name,
        tiles=tiles,
        sections=_sections(rows, build.manifests),
        graphs=list(_graphs(rows)),
        kinds=_kinds(rows),
        samples=[_sample(rows, number) for number in samples],
        recipe={name: json.dumps(value) for name, value in of_rows["recipe"].items()},
    )
    path = Path(out) if out else rows.folder / "report.html"
    with atomic_write(path, MARK if out else None) as file:
        file.write(page.encode())
    return path
