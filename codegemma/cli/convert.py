"""The verbs on checkpoints: `convert`, `verify`, `inspect`, `export` and `card`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from codegemma.cli.output import Progress
from codegemma.config import ExportFormat, FloatType, Program

if TYPE_CHECKING:
    from codegemma.adapters.adapter import Adapter
    from codegemma.checkpoints import Checkpoint


def convert(
    source: str,
    target: Path,
    to: ExportFormat | None = None,
    quantize: str | None = None,
    importance: Path | None = None,
    dtype: FloatType | None = None,
    adapter: list[Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in another format; DST appears only when it is complete."""
    from codegemma.adapters.load import load
    from codegemma.convert.convert import SUFFIXES
    from codegemma.convert.convert import convert as write
    from codegemma.convert.quantize import summary

    adapters = [load(path) for path in adapter or ()]
    if quantize or dtype:
        merged_type: str | None = "F32"
    else:
        merged_type = None if (to or SUFFIXES.get(target.suffix)) == "gguf" else "BF16"
    with Progress("bytes") as progress:
        result = write(
            source,
            target,
            to,
            quantize_to=quantize,
            dtype=dtype,
            importance=importance,
            overwrite=overwrite,
            merge=(lambda checkpoint: _merge(checkpoint, adapters, merged_type)) if adapters else None,
            progress=lambda done, total: progress(target.name, done, total),
        )
    print(*summary(result.costs), f"{result.path} ({result.format})", sep="\n")


def _merge(checkpoint: Checkpoint, adapters: list[Adapter], merged_type: str | None) -> Checkpoint:
    """Merges adapters into the weights. Changed blocks become `merged_type`; if None, blocks again."""
    from codegemma.adapters.merge import merge
    from codegemma.convert.quantize import QUANTISED

    changed = {
        checkpoint.tensors[name].type
        for adapter in adapters
        for name in adapter.a
        if name in checkpoint.tensors
    }
    if blocks := sorted(changed & set(QUANTISED)):
        consequence = (
            "rounded to blocks a second time; merging into the unquantised model is more exact"
            if merged_type is None
            else "written as floats"
        )
        source = f"{checkpoint.path} holds {', '.join(blocks)}"
        print(f"note: {source}: these are decoded, changed, and {consequence}", file=sys.stderr)
    return merge(checkpoint, *adapters, blocks_as=merged_type)


def verify(source: str, target: str) -> None:
    """Prove that two checkpoints are one model; exit 1 if they differ by more than DST's types explain."""
    from codegemma.convert import verify as proofs

    proof = proofs.verify(source, target)
    print(*proof.lines(), sep="\n")
    raise typer.Exit(1 if proof.faults else 0)


def inspect(source: str, as_json: bool = False) -> None:
    """Describe a checkpoint or an adapter, and list its problems. No code in it is run."""
    from codegemma.adapters.load import is_adapter, load
    from codegemma.convert import inspect as inspections

    if is_adapter(source):
        adapter = load(source)
        facts, lines = adapter.facts(), adapter.lines()
    else:
        inspection = inspections.inspect(source)
        facts, lines = vars(inspection), inspection.lines()
    print(*([json.dumps(facts, default=str)] if as_json else lines), sep="\n")


def export(program: Program, source: str, target: Path, quantize: str | None = None) -> None:
    """Write a model and all the files that another program needs to run it."""
    from codegemma.convert import export as exports

    with Progress("bytes") as progress:
        paths = exports.export(
            program, source, target, quantize, lambda done, total: progress(target.name, done, total)
        )
    print(*paths, sep="\n")


def card(source: str, results: Path | None = None, manifest: Path | None = None, changes: str = "") -> None:
    """Print a model card in the Hub's form."""
    from codegemma.convert import card as cards

    print(cards.card(source, results, manifest, changes))
