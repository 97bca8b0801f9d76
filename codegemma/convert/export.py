"""Converts a model for one program, such as Ollama, and adds the files it needs: `codegemma export`."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from codegemma import hub, prompts
from codegemma.checkpoints import Checkpoint, open_checkpoint
from codegemma.config import Program
from codegemma.convert.convert import Merge, Progress, convert
from codegemma.convert.inspect import chat_template, title
from codegemma.files import atomic_write

GGUF_PROGRAMS = ("ollama", "lmstudio", "llamacpp")
LLAMACPP_README = """# llama.cpp

    llama-server -m {file} -c {context} --temp 0 --top-k 0 --repeat-penalty 1.0

`POST /infill` with `input_prefix` and `input_suffix` completes. The GGUF file tells llama.cpp the ids of \
the FIM tokens, and that a completion ends at the file separator.
A repeat penalty other than 1.0 damages Gemma's output.
"""


def export(
    program: Program,
    source: str | Path,
    target: Path,
    quantize_to: str | None = None,
    progress: Progress | None = None,
    merge: Merge | None = None,
) -> list[Path]:
    """Writes a model for a program into the folder `target`, and returns the files.

    `merge` is applied to the opened model, as in `convert`. Raises ValueError on an unknown program, where
    `quantize_to` is given for one that reads no GGUF, and as `convert` does.
    """
    if program not in get_args(Program):
        raise ValueError(f"no program {program!r}: choose {', '.join(get_args(Program))}")
    if quantize_to and program not in GGUF_PROGRAMS:
        rule = f"--quantize makes GGUF blocks, which {program} does not read"
        raise ValueError(f"{rule}: leave it out, or export for {', '.join(GGUF_PROGRAMS)}")
    checkpoint = open_checkpoint(hub.resolve(source))
    name = title(checkpoint).lower().replace(" ", "-").replace("/", "-")
    file = f"{name}.gguf"
    texts = {"NOTICE": hub.NOTICE}
    if program == "ollama":
        texts["Modelfile"] = modelfile(checkpoint, file)
    elif program == "llamacpp":
        texts["README.md"] = LLAMACPP_README.format(file=file, context=checkpoint.config.context)
    for other, text in texts.items():
        _expect_new(target / other, text.encode())
    if program == "transformers":
        convert(source, target, "safetensors", merge=merge, progress=progress)
    elif program == "nemo":
        convert(source, target / f"{name}.nemo", merge=merge, progress=progress)
    else:
        folder = target / "codegemma" / name if program == "lmstudio" else target
        convert(source, folder / file, quantize_to=quantize_to, merge=merge, progress=progress)
    for other, text in texts.items():
        _write_new(target / other, text.encode())
    return sorted(file for file in target.rglob("*") if file.is_file())


def _expect_new(file: Path, content: bytes) -> None:
    """Raises ValueError where a file is there with another content."""
    if file.exists() and file.read_bytes() != content:
        raise ValueError(f"{file} exists, and is kept: choose another folder")


def _write_new(file: Path, content: bytes) -> None:
    """Writes a file. Raises ValueError as `_expect_new` does."""
    try:
        with atomic_write(file, replace=False) as out:
            out.write(content)
    except FileExistsError:
        _expect_new(file, content)


def modelfile(checkpoint: Checkpoint, file: str) -> str:
    """Ollama's Modelfile: a template for FIM (`.Suffix`) and, where the model chats, for turns; and stops.

    Raises ValueError on a checkpoint without a tokenizer.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer is None:
        raise ValueError(f"{checkpoint.path} has no tokenizer, which Ollama needs: add tokenizer.model")
    control = tokenizer.control
    markers = control.fim_prefix, control.fim_suffix, control.fim_middle
    fim = ["" if token is None else tokenizer.piece(token) for token in markers] if control.fim else None
    template = prompts.ollama_template(bool(chat_template(checkpoint)), fim, with_response=True)
    stops = [tokenizer.piece(token) for token in sorted(prompts.fim_stops(tokenizer)) if token != control.eos]
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    lines += ["PARAMETER repeat_penalty 1", "PARAMETER temperature 0", f'LICENSE """{hub.NOTICE}"""', ""]
    return "\n".join(lines)
