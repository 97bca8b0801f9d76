"""Where each benchmark's records come from: a folder with the official files, else the Hugging Face Hub.

Nothing is stored in this repository. A record is the official file's own line as a dict.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """`files`: names without suffix, the first that exists is read. `hub`: repository and its config/split folders."""

    files: tuple[str, ...]
    hub: str
    splits: tuple[str, ...]


_MATHS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)
SOURCES: dict[str, Source] = {
    "humaneval": Source(("HumanEval",), "openai/openai_humaneval", ("openai_humaneval/test",)),
    "mbpp": Source(
        ("mbpp",),
        "google-research-datasets/mbpp",
        tuple(f"full/{split}" for split in ("prompt", "test", "validation", "train")),
    ),
    **{
        f"infill-{short}": Source(
            (f"HumanEval-{name}Infilling",),
            "loubnabnl/humaneval_infilling",
            (f"HumanEval-{name}Infilling/test",),
        )
        for short, name in (("single", "SingleLine"), ("multi", "MultiLine"), ("span", "RandomSpan"))
    },
    "babelcode-humaneval": Source(
        ("bc_humaneval_8langs", "bc-humaneval"), "gabeorlanski/bc-humaneval", ("default/test",)
    ),
    "babelcode-mbpp": Source(
        ("bc_mbpp_8langs", "bc-mbpp"), "gabeorlanski/bc-mbpp", ("default/prompt", "default/train")
    ),
    "gsm8k-test": Source(("gsm8k/test",), "openai/gsm8k", ("main/test",)),
    "gsm8k-train": Source(("gsm8k/train",), "openai/gsm8k", ("main/train",)),
    "math-test": Source(
        ("math/test", "MATH/test"), "EleutherAI/hendrycks_math", tuple(f"{m}/test" for m in _MATHS)
    ),
    "math-train": Source(
        ("math/train", "MATH/train"), "EleutherAI/hendrycks_math", tuple(f"{m}/train" for m in _MATHS)
    ),
    "mmlu-test": Source(("mmlu/test",), "cais/mmlu", ("all/test",)),
    "mmlu-dev": Source(("mmlu/dev",), "cais/mmlu", ("all/dev",)),
    **{
        f"arc-{c}-{split}": Source(
            (f"arc/{name}_{split}", f"ARC-{name.title()}-{split.title()}", f"arc/{name}_{split}_query_form"),
            "allenai/ai2_arc",
            (f"ARC-{name.title()}/{split}",),
        )
        for c, name in (("c", "challenge"), ("e", "easy"))
        for split in ("test", "validation", "train")
    },
    "hellaswag": Source(
        ("hellaswag/validation", "hellaswag_val"), "Rowan/hellaswag", ("default/validation",)
    ),
    "hellaswag-train": Source(("hellaswag/train", "hellaswag_train"), "Rowan/hellaswag", ("default/train",)),
    "boolq": Source(("boolq/validation", "boolq/dev"), "google/boolq", ("default/validation",)),
    "piqa": Source(("piqa/valid",), "baber/piqa", ("default/validation",)),
    "winogrande": Source(
        ("winogrande/validation", "winogrande/dev"), "allenai/winogrande", ("winogrande_xl/validation",)
    ),
    "winogrande-train": Source(
        ("winogrande/train", "winogrande/train_xl"), "allenai/winogrande", ("winogrande_xl/train",)
    ),
    "triviaqa": Source(
        ("rc.wikipedia.nocontext_validation", "triviaqa/validation"),
        "mandarjoshi/trivia_qa",
        ("rc.wikipedia.nocontext/validation",),
    ),
    "triviaqa-train": Source(
        ("rc.wikipedia.nocontext_train", "triviaqa/train"),
        "mandarjoshi/trivia_qa",
        ("rc.wikipedia.nocontext/train",),
    ),
}


@dataclass
class Records:
    """Benchmark records from `folder`, and where it lacks them from the Hub (unless `offline`)."""

    folder: Path | None = None
    offline: bool = False
    _seen: dict[str, list[Record]] = field(default_factory=dict, repr=False)

    def __call__(self, name: str) -> list[Record]:
        """Raises LookupError that says where to get them."""
        if name not in self._seen:
            found = self._find(SOURCES[name])
            self._seen[name] = _read(found) if found else self._fetch(name)
        return self._seen[name]

    def maybe(self, name: str) -> list[Record]:
        """The records where they are at hand in the folder or on the Hub, else none."""
        try:
            return self(name)
        except LookupError:
            return []

    def _find(self, source: Source) -> Path | None:
        """`NAME.jsonl`, `.json` or `.parquet`, also gzipped, in the folder or one folder below."""
        if not self.folder:
            return None
        for name in source.files:
            for suffix in (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet"):
                for path in (self.folder / (name + suffix), *sorted(self.folder.glob(f"*/{name}{suffix}"))):
                    if path.is_file():
                        return path
        return None

    def _fetch(self, name: str) -> list[Record]:
        source = SOURCES[name]
        said = (
            f"{source.files[0]}.jsonl[.gz] is not in {self.folder}"
            if self.folder
            else "no --data folder was given"
        )
        remedy = (
            f"{name}: {said}, and {{}}. Get it from https://huggingface.co/datasets/{source.hub} and pass "
            "--data DIR, or install huggingface_hub and go online"
        )
        if self.offline:
            raise LookupError(remedy.format("the Hub is switched off"))
        try:
            from huggingface_hub import hf_hub_download

            paths = [
                hf_hub_download(
                    source.hub, f"{split}/0000.parquet", repo_type="dataset", revision="refs/convert/parquet"
                )
                for split in source.splits
            ]
        except (
            Exception
        ) as error:  # the client raises many kinds; each means that the records are not to be had
            raise LookupError(remedy.format(f"the Hub said: {type(error).__name__}: {error}")) from error
        return [record for path in paths for record in _read(Path(path))]


def _read(path: Path) -> list[Record]:
    if path.suffix == ".parquet":
        import pyarrow.parquet

        records = pyarrow.parquet.read_table(path).to_pylist()
    else:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
        records = json.loads(text) if text[:1] == "[" else list(_lines(text, path))
    labels = path.parent / f"{path.name.split('.')[0]}-labels.lst"  # PIQA keeps its labels apart
    if labels.is_file():
        values = labels.read_text().split()
        records = [record | {"label": int(value)} for record, value in zip(records, values, strict=True)]
    return [record | (record.get("question_info") or {}) for record in records]


def _lines(text: str, path: Path) -> Iterator[Record]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}, line {number} is not JSON ({error}): download the file again"
                ) from error
