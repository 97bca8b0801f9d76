"""What weighing columns by their importance saves: KL divergence to the float model on held-out code, with and without.

    PYTHONPATH=. .venv/bin/python benchmarks/importance.py [MODEL]

Measured on every second module of Python's standard library, tested on the others.
"""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path

import logbook

from codegemma import hub
from codegemma.checkpoints import open_checkpoint
from codegemma.convert import convert
from codegemma.convert.quantize import importance_of

FILES, CHARACTERS = 6, 800  # tested: from the middle of each, where no licence stands


def main() -> None:
    parser = logbook.parser(__doc__)
    parser.add_argument("model", nargs="?", default=hub.DEFAULT)
    parser.add_argument("--types", default="q4_0,q4_1,q4_k_m,q5_0")
    args = parser.parse_args()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.name)
    texts = tuple(
        text[len(text) // 2 :][:CHARACTERS]
        for file in modules[1::2]
        if len(text := file.read_text()) > 4 * CHARACTERS
    )[:FILES]
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured")
        measured.mkdir()
        for file in modules[::2]:
            shutil.copy(file, measured)
        source = convert.convert(args.model, Path(folder, "float.gguf"), dtype="f32").path
        measured_on_code, rows = importance_of(measured, open_checkpoint(hub.resolve(args.model))), []
        for type in args.types.split(","):
            plain, weighed = (
                convert.verify(
                    source,
                    convert.convert(
                        source,
                        Path(folder, "q.gguf"),
                        quantize_to=type,
                        importance=importance,
                        overwrite=True,
                    ).path,
                    texts,
                )
                for importance in (None, measured_on_code)
            )
            rows.append(
                f"| {type} | {plain.kl:.5f} | {weighed.kl:.5f} | {weighed.kl / plain.kl - 1:+.1%} | "
                f"{plain.agreement:.2%} | {weighed.agreement:.2%} |"
            )
            print(rows[-1], flush=True)
    head = [
        f"\n## Importance-weighted blocks\n\n`benchmarks/importance.py`: {args.model} on {len(texts)} pieces of held-out code, "
        "nats per token to the float model.\n",
        "| blocks | KL plain | KL weighed | change | same top token | weighed |",
        "|---|---|---|---|---|---|",
    ]
    logbook.publish("\n".join([*head, *rows, ""]), args.log)


if __name__ == "__main__":
    main()
