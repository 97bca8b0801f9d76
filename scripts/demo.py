"""`make demo`: completes the hole in a real file and shows it. `--svg FILE` also draws what was shown."""

from __future__ import annotations

import argparse
import re
import time
import warnings
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.panel import Panel
from rich.syntax import Syntax
from rich.text import Text

import codegemma
from codegemma.cli.complete import split_mark

SAMPLE = Path(__file__).parent.parent / "examples" / "ledger.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", default="gemma-3-270m")
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    console = Console(record=True, width=100 if options.svg else None)
    prefix, suffix = split_mark(SAMPLE.read_text(), "<CURSOR>", SAMPLE.name)
    warnings.simplefilter("ignore")  # about a base model; the note at the end tells the same
    model = codegemma.load(options.model)
    started = time.perf_counter()
    steps = model.complete(prefix, suffix, path=SAMPLE.name, trim="line", max_tokens=64)  # as an editor asks
    first = next(steps)
    read = time.perf_counter()
    text = "".join(step.text for step in [first, *steps.steps[1:]])
    rate = (len(steps.ids) - 1) / (time.perf_counter() - read)
    console.print(Panel(_shown(prefix, text, suffix), title=f"examples/{SAMPLE.name}", title_align="left"))
    title = model.preset.title if model.preset else model.path.name
    console.print(
        f"[b]{1000 * (read - started):,.0f} ms[/] to the first token, [b]{rate:,.0f} tokens/s[/]: "
        f"{title} on {model.backend.threads} threads of this CPU"
    )
    if not model.fim_trained:
        console.print(
            "[dim]It was not trained to fill in the middle: it continues what stands before the cursor.[/]"
        )
    if options.svg:
        template = re.sub(r"@font-face {{.*?}}", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)  # no web fonts
        console.save_svg(str(options.svg), title="make demo", code_format=template)


def _shown(prefix: str, text: str, suffix: str) -> Text:
    """The file in colours, with the completion highlighted."""
    shown = Syntax("", "python", theme="ansi_dark").highlight((prefix + text + suffix).rstrip())
    shown.stylize("bold black on bright_yellow", len(prefix), len(prefix) + len(text))
    return shown


if __name__ == "__main__":
    main()
