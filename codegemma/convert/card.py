"""Model cards in the Hugging Face Hub's form: `codegemma card`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from codegemma import hub
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.convert.inspect import inspect, title


def render(header: list[str], name: str, description: str, sections: Mapping[str, str], changes: str) -> str:
    """A card of header lines, title, description and sections; adds licence and statement of changes."""
    sections = {**sections, "Licence": hub.NOTICE.strip(), "Statement of changes": changes}
    parts = ["\n".join(["---", "license: gemma", *header, "---", f"# {name}"]), description]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return "\n\n".join(parts) + "\n"


def card(
    source: str | Path, results: Path | None = None, manifest: Path | None = None, changes: str = ""
) -> str:
    """The card of a model; `results` is a folder of `codegemma eval`, `manifest` JSON about its data.

    Raises ValueError where the folder of results holds no finished benchmark.
    """
    facts = inspect(source)
    checkpoint = open_checkpoint(facts.path)
    name = title(checkpoint)
    files = sorted(results.glob("*.json")) if results else []
    finished = [file for file in files if not file.name.endswith(".times.json")]
    scores = {file.stem: json.loads(file.read_text()) for file in finished}
    if results and not scores:
        raise ValueError(f"{results} holds no finished benchmark: pass the --out of `codegemma eval run`")
    header = ["library_name: codegemma", "pipeline_tag: text-generation", "tags: [code, gemma]"]
    sections = {}
    if scores:
        header.append(f"model-index: {json.dumps(_model_index(name, scores))}")
        sections["Evaluation"] = _score_table(scores)
    if manifest:
        sections["Data"] = f"```json\n{manifest.read_text().strip()}\n```"
    matrices = ", ".join(f"{count} matrices {type}" for type, count in facts.types.items())
    description = f"{facts.parameters:,} parameters, {facts.architecture}, {matrices}."
    return render(header, name, description, sections, changes or _changes(checkpoint, facts.format))


def _changes(checkpoint: Checkpoint, format: str) -> str:
    """What codegemma did to the weights, as far as the checkpoint says."""
    orders = checkpoint.fim_orders
    if orders is None:
        return f"The weights are in the format {format}; codegemma did not train them further."
    trained = f" It knows the FIM orders {', '.join(sorted(orders))}." if orders else ""
    return f"codegemma changed the weights: it trained them further, or merged an adapter into them.{trained}"


def _model_index(name: str, scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The scores in the Hub's form."""
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"type": task, "name": score["title"]},
            "metrics": [{"type": "score", "value": round(100 * score["score"], 2), "name": score["note"]}],
        }
        for task, score in scores.items()
    ]
    return [{"name": name, "results": results}]


def _score_table(scores: Mapping[str, Any]) -> str:
    rows = ["| benchmark | percent | 95 % | items | how |", "|---|---|---|---|---|"]
    for score in scores.values():
        mean, low, high = (f"{100 * score[key]:.1f}" for key in ("score", "low", "high"))
        rows.append(f"| {score['title']} | {mean} | {low} - {high} | {score['items']} | {score['note']} |")
    return "\n".join(rows)
