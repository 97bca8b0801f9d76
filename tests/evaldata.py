"""The benchmark files, where this machine has them; they may not be stored here. And a model that needs no weights."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from codegemma.evals.records import Records
from codegemma.evals.task import Completion, Score

FOLDER = Path(os.environ.get("CODEGEMMA_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))


def records(name):
    found = Records(FOLDER if FOLDER.is_dir() else None, offline=True)
    if not found.maybe(name):
        pytest.skip(f"no {name} files in CODEGEMMA_DATA or ../shared/data")
    return found


def said(text, reason="token"):
    return Completion(text, list(text.encode()), reason, 0.5)


class Letters:
    """One id per byte; the control ids follow."""

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

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class Fixed:
    """Answers from a function of the prompt's text; likelihoods from a function of the continuation's."""

    name, tokenizer = "fixed", Letters()

    def __init__(self, answer=None, logprob=None, broken_after=None):
        self.answer, self.logprob, self.left, self.asked = answer, logprob, broken_after, []

    def sample(self, prompts, *, max_tokens, stop_ids, stop, temperature, top_p, seed, n):
        for at in reversed(range(len(prompts))):
            self.asked.append(prompts[at])
            for number in range(n):
                if self.left == 0:
                    raise KeyboardInterrupt
                self.left = self.left and self.left - 1
                yield at, number, said(self.answer(self.tokenizer.decode(prompts[at]), number))

    def score(self, pairs):
        return [
            Score(
                [self.logprob(self.tokenizer.decode(context), self.tokenizer.decode(rest))] * len(rest), False
            )
            for context, rest in pairs
        ]
