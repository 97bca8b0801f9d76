"""The benchmark files, if installed (they may not be stored here), and an evaluated model without weights."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from codegemma.evals.records import Records
from codegemma.evals.task import ModelOutput, Score

FOLDER = Path(os.environ.get("CODEGEMMA_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


def records(name):
    files = Records(FOLDER if FOLDER.is_dir() else None, offline=True)
    if not files.maybe(name):
        pytest.skip(f"no {name} files in CODEGEMMA_DATA or ../shared/data")
    return files


def output_of(text, reason="token"):
    return ModelOutput(text, list(text.encode()), reason, 0.5)


class Letters:
    """A tokenizer with one id per byte; the control ids follow."""

    control = SimpleNamespace(
        bos=256,
        eos=257,
        end_of_turn=258,
        start_of_turn=None,
        pad=None,
        unk=None,
        fim="named",
        fim_prefix=259,
        fim_middle=260,
        fim_suffix=261,
        file_separator=262,
    )
    end_ids = frozenset()

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Fixed:
    """An EvaluatedModel that answers `answer(prompt, number)`, where each token of a continuation has the
    log-probability `logprob(context, continuation)`.

    After `interrupted_after` answers it raises KeyboardInterrupt. `prompts` are those that it has answered.
    """

    name, tokenizer = "fixed", Letters()

    def __init__(self, answer=None, logprob=None, interrupted_after=None):
        self.answer, self.logprob, self.remaining, self.prompts = answer, logprob, interrupted_after, []

    def sample(self, prompts, decoding):
        for i in reversed(range(len(prompts))):
            self.prompts.append(prompts[i])
            for number in range(decoding.samples):
                if self.remaining == 0:
                    raise KeyboardInterrupt
                self.remaining = self.remaining and self.remaining - 1
                yield i, number, output_of(self.answer(self.tokenizer.decode(prompts[i]), number))

    def score(self, pairs):
        decode = self.tokenizer.decode
        return [
            Score([self.logprob(decode(context), decode(ids))] * len(ids), False) for context, ids in pairs
        ]
