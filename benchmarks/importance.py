"""What importance weights gain in quantisation: KL divergence to the float model, with and without them.

    PYTHONPATH=. .venv/bin/python benchmarks/importance.py [MODEL]

Importance is measured on every second module of Python's standard library, and tested on the others.
"""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
from pathlib import Path

import logbook

from codegemma import hub
from codegemma.checkpoints import open_checkpoint
from codegemma.convert.convert import convert
from codegemma.convert.importance import importance_of
from codegemma.convert.verify import verify

FILES, CHARACTERS = 6, 800  # of the tested texts, from the middle of each file: licences stand at the top


def main() -> None:
    parser = logbook.parser(__doc__)
    parser.add_argument("model", nargs="?", default=hub.DEFAULT)
    parser.add_argument("--types", default="q4_0,q4_1,q4_k_m,q5_0")
    args = parser.parse_args()
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"), key=lambda file: file.name)
    texts = [text for file in modules[1::2] if len(text := file.read_text()) > 4 * CHARACTERS]
    pieces = tuple(text[len(text) // 2 :][:CHARACTERS] for text in texts[:FILES])
    with tempfile.TemporaryDirectory() as folder:
        measured = Path(folder, "measured")
        measured.mkdir()
        for file in modules[::2]:
            shutil.copy(file, measured)
        source = convert(args.model, Path(folder, "float.gguf"), dtype="f32").path
        importance, rows = importance_of(measured, open_checkpoint(hub.resolve(args.model))), []
        for type in args.types.split(","):
            results = []
            for weights in (None, importance):
                target = Path(folder, "q.gguf")
                convert(source, target, quantize_to=type, importance=weights, overwrite=True)
                results.append(verify(source, target, pieces))
            plain, weighed = results
            rows.append(
                f"| {type} | {plain.kl:.5f} | {weighed.kl:.5f} | {weighed.kl / plain.kl - 1:+.1%} | "
                f"{plain.agreement:.2%} | {weighed.agreement:.2%} |"
            )
            print(rows[-1], flush=True)
    head = [
        "\n## Importance-weighted blocks\n\n"
        f"`benchmarks/importance.py`: {args.model} on {len(pieces)} held-out texts, nats per token to "
        "the float model.\n",
        "| blocks | KL plain | KL weighed | change | same top token | weighed |",
        "|---|---|---|---|---|---|",
    ]
    logbook.publish("\n".join([*head, *rows, ""]), args.log)


if __name__ == "__main__":
    main()
