"""One self-contained page about a build: what was kept and why not, how it was split and packed, and what rows look
like."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.data.build import summary
from codegemma.data.pack import Rows
from codegemma.data.show import WHY, parts, tokenizer_of

COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1", "#edc948", "#9c755f")
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{margin-top:2.2rem;border-bottom:1px solid #ddd;font-size:1.2rem}.note{color:#666}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem}.tile{background:#f4f6f9;border-radius:.5rem;padding:.6rem 1rem}
.tile b{display:block;font-size:1.35rem}.two{display:flex;flex-wrap:wrap;gap:2rem}
.two>figure{flex:1 1 30rem;min-width:0;margin:0}figcaption{font-weight:600;margin:.8rem 0 .3rem}
svg{max-width:100%;height:auto;font:12px system-ui,sans-serif}pre{background:#f7f7f7;padding:.7rem;max-height:22rem;
overflow:auto;font-size:12px;white-space:pre-wrap;overflow-wrap:anywhere}.prefix{color:#1b6d85}.suffix{color:#8e3b8e}
.middle{background:#ffe27a}table{border-collapse:collapse}td{padding:.2rem .8rem .2rem 0}"""


def bars(title: str, counts: Mapping[str, float], most: int = 14, unit: str = "") -> str:
    """Horizontal bars, largest first; the rest in one."""
    items = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if len(items) > most:
        items = [
            *items[: most - 1],
            (f"{len(items) - most + 1} others", sum(value for _, value in items[most - 1 :])),
        ]
    largest = max((value for _, value in items), default=0) or 1
    rows = "".join(
        f'<text x="190" y="{22 * i + 15}" text-anchor="end">{escape(_short(name))}</text>'
        f'<rect x="198" y="{22 * i + 3}" width="{max(1, 250 * value / largest):.1f}" height="16" '
        f'fill="{COLOURS[0]}" rx="2"/>'
        f'<text x="{204 + 250 * value / largest:.1f}" y="{22 * i + 15}">{value:,.0f}{unit}</text>'
        for i, (name, value) in enumerate(items)
    )
    return _figure(
        title,
        f'<svg viewBox="0 0 540 {22 * len(items) + 4}" role="img">{rows}</svg>' if items else "<p>none</p>",
    )


def histogram(
    title: str, values: Sequence[float] | np.ndarray, log: bool = False, bins: int = 24, note: str = ""
) -> str:
    """Columns of counts, on a log scale of the value where asked."""
    array = np.asarray(values, float)
    if not len(array):
        return _figure(title, "<p>none</p>")
    scaled = np.log2(np.maximum(array, 1)) if log else array
    low, high = (
        (float(scaled.min()), float(scaled.max()))
        if log
        else (min(0.0, float(scaled.min())), max(1.0, float(scaled.max())))
    )
    counts, edges = np.histogram(scaled, bins, (low, high if high > low else low + 1))
    width, tall = 500 / bins, max(int(counts.max()), 1)
    columns = "".join(
        f'<rect x="{20 + i * width:.1f}" y="{150 - 140 * n / tall:.1f}" width="{width - 1:.1f}" '
        f'height="{140 * n / tall:.1f}" fill="{COLOURS[0]}"><title>{n:,}</title></rect>'
        for i, n in enumerate(counts)
    )
    marks = "".join(
        f'<text x="{20 + 500 * share:.0f}" y="168" '
        f'text-anchor="middle">{_number(2**at if log else at)}</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
        for at in [edges[0] + (edges[-1] - edges[0]) * share]
    )
    axis = '<line x1="20" y1="150" x2="520" y2="150" stroke="#999"/>'
    return _figure(
        title,
        f'<svg viewBox="0 0 570 175" role="img">{axis}{columns}{marks}</svg><p '
        f'class="note">{escape(note)}</p>',
    )


def arcs(repository: str, paths: Sequence[str], edges: Iterable[tuple[str, str]]) -> str:
    """A repository's files in their packed order from top to bottom; an arc joins a file with one that it imports."""
    place = {path: at for at, path in enumerate(paths)}
    lines = []
    for source, target in sorted(edges):
        if source in place and target in place:
            first, last = sorted((14 * place[source] + 10, 14 * place[target] + 10))
            bend = min(190.0, 12 + (last - first) * 0.55)
            colour = COLOURS[0] if place[target] < place[source] else COLOURS[3]
            lines.append(
                f'<path d="M210 {first} C{210 - bend:.0f} {first} {210 - bend:.0f} {last} 210 {last}" '
                f'fill="none" '
                f'stroke="{colour}" stroke-opacity=".45"/>'
            )
    dots = "".join(
        f'<circle cx="210" cy="{14 * at + 10}" r="3.2" fill="#333"/><text x="220" y="{14 * at + 14}">'
        f"{escape(_short(path, 60))}</text>"
        for at, path in enumerate(paths)
    )
    return _figure(
        repository, f'<svg viewBox="0 0 640 {14 * len(paths) + 8}" role="img">{"".join(lines)}{dots}</svg>'
    )


def _figure(title: str, body: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{body}</figure>"


def _short(name: str, most: int = 30) -> str:
    return name if len(name) <= most else f"{name[: most // 3]}…{name[-(most - most // 3 - 1) :]}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:.2f}"


def _ledger(folder: Path) -> dict[str, Any]:
    """Counts over the ledger, read in batches: by outcome and reason, language, licence; sizes of a sample of
    200,000."""
    import pyarrow.parquet as pq

    found: dict[str, Any] = {
        name: Counter() for name in ("reasons", "languages", "licences", "copies", "outcomes")
    }
    sizes: list[int] = []
    with pq.ParquetFile(folder / "ledger.parquet") as file:
        for batch in file.iter_batches(65_536):
            for row in batch.to_pylist():
                found["outcomes"][row["outcome"]] += 1
                if row["outcome"] == "kept":
                    found["languages"][row["language"]] += 1
                    found["licences"][row["licence"] or "none found"] += 1
                    if len(sizes) < 200_000:
                        sizes.append(row["size"])
                else:
                    found["reasons"][row["reason"]] += 1
                if row["outcome"] == "duplicate":
                    found["copies"][row["detail"]] += 1
    return {**found, "sizes": sizes}


def _graphs(folder: Path, rows: Rows, most: int = 4) -> str:
    """Pictures of the repositories with the most edges, among those of the first parts, at most 70 files each."""
    import pyarrow.parquet as pq

    pictures = []
    for part in sorted({int(part) for part in rows.index_N2[:, 0]})[:8] if len(rows) else []:
        edges = pq.read_table(folder / "graph" / f"part-{part:05d}.parquet").to_pylist()
        sizes = Counter(edge["repository"] for edge in edges)
        for repository, count in sizes.most_common(most):
            pictures.append(
                (
                    -count,
                    repository,
                    part,
                    [(e["source"], e["target"]) for e in edges if e["repository"] == repository],
                )
            )
    drawn = []
    for _, repository, part, found in sorted(pictures)[:most]:
        records = pq.read_table(
            rows.stem(part).with_suffix(".examples.parquet"),
            columns=["repository", "path", "via", "order"],
            filters=[("repository", "=", repository), ("via", "=", "graph")],
        ).to_pylist()
        order = list(
            dict.fromkeys(record["path"] for record in sorted(records, key=lambda record: record["order"]))
        )
        drawn.append(
            arcs(
                f"{repository}: the first {min(70, len(order))} of {len(order)} connected files",
                order[:70],
                found,
            )
        )
    return "".join(drawn) or "<p>No file imports another.</p>"


def _sample(rows: Rows, number: int) -> str:
    body = []
    for record, texts in parts(rows, number, tokenizer_of(rows.folder)):
        shown = {
            "prefix": texts["prefix"][-1500:],
            "middle": texts["middle"][:1500],
            "suffix": texts["suffix"][:1500],
        }
        spans = "".join(
            f'<span class="{name if record["layout"] != "prefix" else ""}">{escape(text)}</span>'
            for name, text in shown.items()
        )
        body.append(
            f"<p><b>{escape(record['repository'])}</b> {escape(record['path'])} <span class=note>segment "
            f"{record['segment']}, "
            f"{escape(record['licence'] or 'no licence found')}, {record['layout'].upper()}: "
            f"{WHY[record['boundary']]}</span></p>"
            f"<pre>{spans}</pre>"
        )
        if len(body) == 4:
            break
    return f"<h3>Row {number:,}</h3>{''.join(body)}"


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page (by default report.html in the folder) and returns its path. Raises ValueError: no finished
    rows."""
    rows = Rows(folder)
    folder, done = rows.folder, summary(folder)
    ledger, manifests = _ledger(folder), done.manifests
    counts = manifests["rows"]["counts"]
    made = {
        what: {name.removeprefix(f"{what} "): n for name, n in counts.items() if name.startswith(what)}
        for what in ("layout", "boundary")
    }
    filled = [
        float((rows[at]["segments"] > 0).mean()) for at in range(0, len(rows), max(1, len(rows) // 2000))
    ]
    tiles = {
        "documents read": done.documents,
        "kept": done.kept,
        "rows": done.rows,
        "tokens": done.tokens,
        "examples": manifests["rows"]["examples"],
        "padding": f"{manifests['rows']['padding']:.1%}",
        "cropped": "0 %",
    }
    timing = json.loads((folder / "timing.json").read_text()) if (folder / "timing.json").exists() else {}
    sections = {
        "Documents": [
            bars("Kept, dropped, duplicates", ledger["outcomes"]),
            bars("Why not kept", ledger["reasons"]),
            bars("Languages of what was kept", ledger["languages"]),
            bars("Licences of what was kept", ledger["licences"]),
            histogram("Bytes of a document", ledger["sizes"], log=True, note="log scale"),
            bars("Secrets and personal data replaced", manifests["clean"]["redacted"]),
        ],
        "Duplicates": [
            bars("By how they are alike", manifests["dedup"]["counts"]),
            bars("Most copied", dict(ledger["copies"].most_common(10))),
        ],
        "Fill in the middle": [bars("Layouts", made["layout"]), bars("Where splits fell", made["boundary"])],
        "Packing": [
            histogram("How full the rows are", filled, note="share of a row's tokens that are not padding"),
            bars("Files by the rule that placed them", manifests["order"]["files"]),
            bars(
                "Tokens by kind",
                {kind: value["tokens_in_index"] for kind, value in manifests["rows"]["mix"].items()},
            ),
            bars(
                "Seconds of each stage",
                {stage: value["seconds"] for stage, value in timing.items()},
                unit=" s",
            ),
        ],
    }
    body = "".join(
        f"<h2>{title}</h2><div class=two>{''.join(figures)}</div>" for title, figures in sections.items()
    )
    samples = sorted({round(at * (len(rows) - 1) / 2) for at in range(3)}) if len(rows) else []
    shown = "".join(_sample(rows, number) for number in samples)
    tiles_html = "".join(
        f"<div class=tile><b>{value if isinstance(value, str) else f'{value:,}'}</b>{name}</div>"
        for name, value in tiles.items()
    )
    recipe = "".join(
        f"<tr><td>{name}</td><td>{escape(json.dumps(value))}</td></tr>"
        for name, value in manifests["rows"]["recipe"].items()
    )
    page = (
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport "
        f"content='width=device-width'><title>Training rows</title>"
        f"<style>{STYLE}</style><h1>Training rows: {escape(folder.name)}</h1><div "
        f"class=tiles>{tiles_html}</div>{body}"
        "<h2>Files in their packed order</h2><p class=note>From top to bottom; an arc joins a file with one that "
        "it imports. Blue: "
        f"the imported file stands first. Red: it stands later.</p><div class=two>{_graphs(folder, rows)}</div>"
        f"<h2>Rows</h2><p><span class=prefix>prefix</span> <span class=middle>middle</span> <span "
        f"class=suffix>suffix</span></p>{shown}"
        f"<h2>Recipe</h2><table>{recipe}</table></html>"
    )
    path = Path(out) if out else folder / "report.html"
    path.write_text(page, encoding="utf-8")
    return path
