"""The command line's verbs on model files: convert, verify, inspect, export, card, pull, install."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from typer import Argument, Option

if TYPE_CHECKING:
    from codegemma.checkpoints import Checkpoint

Source = Annotated[str, Argument(metavar="SRC", help="A model's name, file or directory.")]
To = Literal["gguf", "safetensors", "orbax", "keras", "nemo", "gemma_pytorch"]
Program = Literal["ollama", "lmstudio", "llamacpp", "transformers", "nemo"]
Blocks = Annotated[
    str | None, Option("--quantize", metavar="TYPE", help="Blocks for a GGUF: q8_0, q4_0, q4_k_m, ...")
]


def convert(
    source: Source,
    target: Annotated[Path, Argument(metavar="DST", help="The file or directory to write.")],
    to: Annotated[To | None, Option(help="The format, where DST does not say it.")] = None,
    quantize: Blocks = None,
    importance: Annotated[
        Path | None,
        Option(
            metavar="PATH",
            help="Weigh columns by what llama-imatrix measured, or by what "
            "the model does on this text or folder of code.",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bf16", "f16", "f32"] | None, Option(help="Type of the floats; the source's where left out.")
    ] = None,
    adapter: Annotated[
        list[Path] | None, Option(metavar="PATH", help="An adapter to merge into the weights. Repeatable.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace DST.")] = False,
) -> None:
    """Write a model in another format; nothing stands under DST until it is complete."""
    from codegemma.adapters import adapter as lora
    from codegemma.convert import convert as formats
    from codegemma.convert.quantize import QUANTISED, summary

    found = [lora.load(path) for path in adapter or ()]
    floats = (
        "F32"
        if quantize or dtype
        else None
        if (to or formats.SUFFIXES.get(target.suffix)) == "gguf"
        else "BF16"
    )

    def merge(checkpoint: Checkpoint) -> Checkpoint:
        changed = {
            checkpoint.tensors[name].type for one in found for name in one.a if name in checkpoint.tensors
        }
        if blocks := sorted(changed & set(QUANTISED)):
            print(
                f"note: {source} holds {', '.join(blocks)}: these are decoded, changed, and "
                + (
                    "rounded to blocks a second time; merging into the unquantised model is more exact"
                    if floats is None
                    else "written as floats"
                ),
                file=sys.stderr,
            )
        return lora.merge(checkpoint, *found, blocks_as=floats)

    done = formats.convert(
        source,
        target,
        to,
        quantize_to=quantize,
        dtype=dtype,
        importance=importance,
        overwrite=overwrite,
        merge=merge if found else None,
        progress=_shown,
    )
    for line in (*summary(done.costs), f"{done.path} ({done.format})"):
        print(line)


def verify(
    source: Source, target: Annotated[str, Argument(metavar="DST", help="The model to compare with it.")]
) -> None:
    """Prove that two checkpoints are one model; exit 1 beyond what the target's types allow."""
    from codegemma.convert import convert as formats

    proof = formats.verify(source, target)
    print(*proof.lines(), sep="\n")
    raise typer.Exit(1 if proof.faults else 0)


def inspect(
    source: Source, as_json: Annotated[bool, Option("--json", help="Print one JSON object.")] = False
) -> None:
    """What a checkpoint or an adapter is, and its problems. No code in it is run."""
    from codegemma.adapters import adapter as lora
    from codegemma.convert import convert as formats

    if lora.is_adapter(source):
        adapter = lora.load(source)
        print(*([json.dumps(adapter.described())] if as_json else adapter.lines()), sep="\n")
        return
    found = formats.inspect(source)
    print(*([json.dumps(vars(found), default=str)] if as_json else found.lines()), sep="\n")


def export(
    program: Annotated[Program, Argument(help="Who is to read it.")],
    source: Source,
    target: Annotated[Path, Argument(metavar="DIR", help="The directory to write.")],
    quantize: Blocks = None,
) -> None:
    """Write a model with all that another program needs beside it."""
    from codegemma.convert import convert as formats

    for path in formats.export(program, source, target, quantize, _shown):
        print(path)


def card(
    source: Source,
    results: Annotated[
        Path | None, Option(metavar="DIR", help="Scores: the --out of `codegemma eval`.")
    ] = None,
    manifest: Annotated[
        Path | None, Option(metavar="FILE", help="The data manifest of `codegemma data build`.")
    ] = None,
    changes: Annotated[str, Option(metavar="TEXT", help="What was changed (Gemma terms, 3.1).")] = "",
) -> None:
    """Print a model card in the Hub's form."""
    from codegemma.convert import convert as formats

    print(formats.card(source, results, manifest, changes))


def pull(
    name: Annotated[str, Argument(help="A member of the family, a repository, a URL or a path.")],
    source: Annotated[Literal["hf", "kaggle", "ngc", "url", "path"], Option(help="Where from.")] = "hf",
    sha256: Annotated[str | None, Option(metavar="HEX", help="What a file from a URL must hash to.")] = None,
    accept_terms: Annotated[bool, Option("--accept-terms", help="You accept the Gemma terms.")] = False,
    pack: Annotated[
        Path | None, Option(metavar="FILE", help="Pack it into a file for a machine without network.")
    ] = None,
) -> None:
    """Get a model, once you have accepted the Gemma terms."""
    from codegemma.hub import pull as hub_pull

    path = hub_pull.pull(
        name,
        source,
        ask=lambda text: accept_terms or typer.confirm(f"{text}\nDo you accept them?"),
        sha256=sha256,
        progress=lambda file, done, size: _shown(done, size or done),
    )
    print(hub_pull.pack(path, pack, name) if pack else path)


def install(file: Annotated[Path, Argument(help="A pack that `codegemma pull --pack` made.")]) -> None:
    """Install a packed model."""
    from codegemma.hub import pull as hub_pull

    print(hub_pull.install(file))


VERBS = (convert, verify, inspect, export, card, pull, install)


def _shown(done: int, size: int) -> None:
    """A line that is written over, on a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done >= size else ""
        print(
            f"\r{done / 1e9:.2f} of {size / 1e9:.2f} GB ({done / max(size, 1):.0%})", end=end, file=sys.stderr
        )
