"""What an editor may set, and the check of what it sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

from codegemma.generate.completion import Mode


@dataclass(frozen=True)
class EditorSettings:
    """The settings of the language server; docs/editors.md explains them.

    An editor spells them in camelCase, in its initializationOptions or under "codegemma" in its
    configuration.
    """

    enabled: bool = True
    disabled_languages: tuple[str, ...] = ()
    trim: Literal["auto", "none", "line", "block"] = "auto"
    mode: Mode = "auto"
    context: Literal["imports", "open", "none"] = "imports"
    completion: Literal["auto", "always", "never"] = "auto"
    max_tokens: int = 64
    time_budget_ms: int = 300
    predict_ms: int = 2000
    rest_ms: int = 300
    adapter: str = "auto"
    stats: bool = True

    def updated(self, options: Any) -> tuple[EditorSettings, list[str]]:
        """The settings with an editor's `options`, and a complaint about each option that is wrong and not
        applied."""
        changes, complaints = dict[str, Any](), []
        hints = get_type_hints(EditorSettings)
        for key, value in options.items() if isinstance(options, Mapping) else ():
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower()
            if name not in hints:
                complaints.append(f"there is no setting codegemma.{key}")
            elif expected := _expected_if_wrong(value, hints[name]):
                complaints.append(f"codegemma.{key} must be {expected}, got {value!r}")
            else:
                changes[name] = tuple(value) if isinstance(value, list) else value
        return replace(self, **changes), complaints


def setting_names() -> list[str]:
    """The settings as an editor spells them."""
    return [re.sub(r"_(.)", lambda match: match[1].upper(), field.name) for field in fields(EditorSettings)]


def _expected_if_wrong(value: Any, hint: Any) -> str:
    """What a setting of type `hint` must be, in words; "" where `value` is of that type."""
    choices = [choice for choice in get_args(hint) if isinstance(choice, str)]
    if hint is bool:
        valid, expected = isinstance(value, bool), "true or false"
    elif hint is int:
        valid, expected = type(value) is int and value > 0, "a whole number above 0"
    elif hint is str:
        valid, expected = isinstance(value, str), "a string"
    elif choices:
        valid, expected = value in choices, f"one of {', '.join(choices)}"
    else:
        valid = isinstance(value, list) and all(isinstance(item, str) for item in value)
        expected = "a list of strings"
    return "" if valid else expected
