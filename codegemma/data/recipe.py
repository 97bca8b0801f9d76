"""The recipe of a build: all that determines its rows, except the sources; and named recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from codegemma.data import dedup, fim, licences
from codegemma.data.clean import Quality
from codegemma.data.documents import CODE_LANGUAGES
from codegemma.data.holes import CODEGEMMA_HOLES, EDITOR_HOLES
from codegemma.prompts import Label

SHARD_CHARACTERS = 8_000_000  # of text in a shard of documents, and about that in a partition (see stages.py)
MIN_STRIDE = 100  # characters of code for one window, however rare a language is


@dataclass(frozen=True)
class BuildRecipe(fim.FimRecipe):
    """How documents are chosen and made into rows. Tuples are sorted; input files appear as their hashes.

    Raises ValueError for a value out of its range.
    """

    loss: tuple[Label, ...] = tuple(sorted(fim.PARTS))
    languages: tuple[str, ...] = ()  # empty: all of CODE_LANGUAGES
    licences: tuple[str, ...] | Literal["any", "permissive", "auto"] = "auto"  # see `quality`
    threshold: float = dedup.THRESHOLD
    mix: tuple[tuple[str, float], ...] = ()  # each kind's share of the tokens
    unsafe_rules: str = ""
    benchmarks: tuple[str, ...] = ()
    tokenizer: str = ""
    shard_bytes: int = SHARD_CHARACTERS  # counts characters; the name is that of recipe.json
    hold_out: float = 0.0  # share of the repositories kept for evaluation, as documents instead of rows
    even_languages: bool = (
        False  # each language has the same share of the windows, as far as its code reaches
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.languages) - CODE_LANGUAGES):
            known = ", ".join(sorted(CODE_LANGUAGES))
            raise ValueError(f"languages: {', '.join(unknown)} not known; known are {known}")
        fim.check_shares("mix", self.mix)
        if not 0 <= self.hold_out < 1:
            raise ValueError(f"hold-out must lie from 0 to below 1, got {self.hold_out}: rows need the rest")
        if self.even_languages and not self.window:
            raise ValueError("even-languages needs a window, such as 64:256: whole files cannot be repeated")
        if not 0.5 <= self.threshold <= 1:
            raise ValueError(
                f"threshold of near-duplicates must lie from 0.5 to 1, got {self.threshold}: below 0.5 "
                "the bands find fewer than a third of the pairs (0.28 at 0.5, 0.93 at 0.7)"
            )

    def quality(self, redistributed: bool) -> Quality:
        """The limits for documents of a source. "auto" is "permissive" for redistributed ones, else "any"."""
        names: frozenset[str] | None = None
        if not isinstance(self.licences, str):
            names = frozenset(self.licences)
        elif self.licences == "permissive" or (self.licences == "auto" and redistributed):
            names = licences.permissive()
        return Quality(frozenset(self.languages) or CODE_LANGUAGES, licences=names)


def even_strides(characters: Mapping[str, int], stride: int) -> dict[str, int]:
    """Characters for one window in each language, given how many characters of code it has.

    There are as many windows as with one `stride` for all, and each language has an equal share of them. A
    language of little code has fewer: one for each MIN_STRIDE characters. The others share the rest.
    """
    windows, least, strides = sum(characters.values()) / stride, min(MIN_STRIDE, stride), dict[str, int]()
    by_size = sorted(characters.items(), key=lambda item: (item[1], item[0]))
    for place, (language, size) in enumerate(by_size):
        share = windows / (len(by_size) - place)
        strides[language] = max(least, round(size / share))
        windows -= size / strides[language]
    return strides


RECIPES: dict[str, BuildRecipe] = {
    "default": BuildRecipe(),
    # 80 to 90 % FIM, half of it PSM and half SPM: the CodeGemma report and model card.
    "codegemma": BuildRecipe(fim_rate=0.8, spm_rate=0.5, kinds=tuple(sorted(CODEGEMMA_HOLES.items()))),
    # What an editor asks for, cut as arXiv 2207.14255, 2506.00204 and 2510.05788 found best.
    "editor": BuildRecipe(
        fim_rate=0.9,
        spm_rate=0.8,
        length=1024,
        window=(64, 256),
        stride=1000,
        path_rate=0.5,
        kinds=tuple(sorted(EDITOR_HOLES.items())),
        context_rate=1 / 3,
        even_languages=True,
    ),
}


def named_recipe(name: str) -> BuildRecipe:
    """One of RECIPES. Raises ValueError for another name."""
    if name not in RECIPES:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {name!r}")
    return RECIPES[name]
