"""What an editor may set, and the check of what it sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError
from pydantic.alias_generators import to_camel

from codegemma.config import Mode


class EditorSettings(BaseModel):
    """The settings of the language server; docs/editors.md explains them.

    An editor spells them in camelCase, in its initializationOptions or under "codegemma" in its
    configuration.
    """

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    disabled_languages: list[str] = []
    trim: Literal["auto", "none", "line", "block"] = "auto"
    mode: Mode = "auto"
    context: Literal["imports", "open", "none"] = "imports"
    completion: Literal["auto", "always", "never"] = "auto"
    max_tokens: PositiveInt = 64
    time_budget_ms: PositiveInt = 300
    predict_ms: PositiveInt = 2000
    rest_ms: PositiveInt = 300
    adapter: str = "auto"
    stats: bool = True

    def updated(self, options: Any) -> tuple[EditorSettings, list[str]]:
        """The settings with an editor's `options`, and a complaint about each one that is wrong."""
        options = dict(options) if isinstance(options, Mapping) else {}
        try:
            return EditorSettings.model_validate(self.model_dump(by_alias=True) | options), []
        except ValidationError as error:
            wrong = {problem["loc"][0]: problem for problem in error.errors()}
        complaints = [
            f"there is no setting codegemma.{key}"
            if problem["type"] == "extra_forbidden"
            else f"codegemma.{key}: {problem['msg']}, got {options[key]!r}"
            for key, problem in wrong.items()
        ]
        valid = {key: value for key, value in options.items() if key not in wrong}
        return self.updated(valid)[0], complaints
