"""The verbs on checkpoints: `convert`, `verify`, `inspect`, `export` and `card`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from codegemma.cli.output import Progress, note
from codegemma.config import ExportFormat, FloatType, Program

if TYPE_CHECKING:
    from codegemma.adapters.adapter import Adapter
    from codegemma.checkpoints import Checkpoint
    from codegemma.convert.convert import Merge


def convert(
    source: str,
    target: Path,
    to: ExportFormat | None = None,
    quantize: str | None = None,
    importance: Path | None = None,
    dtype: FloatType | None = None,
    adapter: list[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model in another format; DST appears only when it is complete."""
    from codegemma import hub
    from codegemma.adapters.load import named_adapter, packaged_adapter
    from codegemma.convert.convert import SUFFIXES
    from codegemma.convert.convert import convert as write
    from codegemma.convert.quantize import summary

    if quantize or dtype:
        merged_type: str | None = "F32"
    else:
        merged_type = None if (to or SUFFIXES.get(target.suffix)) == "gguf" else "BF16"
    checkpoint = _open(source)
    adapters = [named_adapter(name, checkpoint) for name in adapter or () if name != "none"]
    if not adapter and (packaged := packaged_adapter(checkpoint, hub.preset_of(checkpoint))):
        note(f"the base alone is written: --adapter auto merges {packaged[0]}, which fills in the middle")
    with Progress("bytes") as progress:
        result = write(
            source,
            target,
            to,
            quantize_to=quantize,
            dtype=dtype,
            importance=importance,
            overwrite=overwrite,
            merge=_merger(adapters, merged_type),
            progress=lambda done, total: progress(target.name, done, total),
        )
    for text in result.notes:
        note(text)
    print(*summary(result.costs), f"{result.path} ({result.format})", sep="\n")


def _open(source: str) -> Checkpoint:
    from codegemma import hub
    from codegemma.checkpoints import open_checkpoint

    return open_checkpoint(hub.resolve(source))


def _merger(adapters: list[Adapter], merged_type: str | None) -> Merge | None:
    """A function that merges adapters into a model; None if there are no adapters."""
    return (lambda checkpoint: _merge(checkpoint, adapters, merged_type)) if adapters else None


def _merge(checkpoint: Checkpoint, adapters: list[Adapter], merged_type: str | None) -> Checkpoint:
    """Merges adapters into the weights. Changed blocks become `merged_type`, or stay blocks if it is None."""
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
        note(f"{source}: these are decoded, changed, and {consequence}")
    return merge(checkpoint, *adapters, blocks_as=merged_type)


def verify(source: str, target: str) -> None:
    """Check that two checkpoints hold the same model.

    Exits with 1 if they differ by more than the precision of DST's types (floats, quantised blocks) explains.
    """
    from codegemma.convert import verify as comparisons

    comparison = comparisons.verify(source, target)
    print(*comparison.lines(), sep="\n")
    raise typer.Exit(1 if comparison.faults else 0)


def inspect(source: str, as_json: bool = False) -> None:
    """Describe a checkpoint or an adapter; exit 1 if it is damaged. No code in it is run."""
    from codegemma.adapters.load import is_adapter, load
    from codegemma.convert import inspect as inspections

    problems: list[str] = []
    if is_adapter(source):
        adapter = load(source)
        facts, lines = adapter.facts(), adapter.lines()
    else:
        inspection = inspections.inspect(source)
        facts, lines, problems = vars(inspection), inspection.lines(), inspection.problems
    print(*([json.dumps(facts, default=str)] if as_json else lines), sep="\n")
    raise typer.Exit(1 if problems else 0)


def export(
    program: Program, source: str, target: Path, quantize: str | None = None, adapter: str = "auto"
) -> None:
    """Write a model and all the files that another program needs to run it."""
    from codegemma import hub
    from codegemma.adapters.load import named_adapter, packaged_adapter
    from codegemma.convert import export as exports
    from codegemma.convert.quantize import QUANTISED

    checkpoint = _open(source)
    packaged = packaged_adapter(checkpoint, hub.preset_of(checkpoint)) if adapter == "auto" else None
    adapters = [packaged[1]] if packaged else []
    if packaged:
        note(f"{packaged[0]}, which fills in the middle, is merged: --adapter none leaves it out")
    elif adapter not in ("auto", "none"):
        adapters = [named_adapter(adapter, checkpoint)]
    has_blocks = any(tensor.type in QUANTISED for tensor in checkpoint.tensors.values())
    if adapters and has_blocks and not quantize and program in exports.GGUF_PROGRAMS:
        quantize = "q8_0"
        note("--quantize q8_0 is used: the source's own blocks could round the adapter away")
    merge = _merger(adapters, "F32" if quantize else "BF16")
    with Progress("bytes") as progress:
        paths = exports.export(
            program, source, target, quantize, lambda done, total: progress(target.name, done, total), merge
        )
    print(*paths, sep="\n")


def card(source: str, results: Path | None = None, manifest: Path | None = None, changes: str = "") -> None:
    """Print a model card in the Hub's form."""
    from codegemma.convert import card as cards

    print(cards.card(source, results, manifest, changes))
