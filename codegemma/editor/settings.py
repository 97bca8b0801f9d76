"""The settings of the language server, and the check of those that an editor sends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from pydantic.alias_generators import to_camel

from codegemma.config import Mode, Trim


class EditorSettings(BaseModel):
    """The settings of the language server; docs/editors.md explains them.

    An editor sends them in camelCase, in its initializationOptions or under "codegemma" in its configuration.
    """

    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True, strict=True)

    enabled: bool = True
    disabled_languages: list[str] = []
    ignored_files: bool = False
    trim: Trim = "auto"
    mode: Mode = "auto"
    context: Literal["auto", "imports", "open", "none"] = "auto"
    completion: Literal["auto", "always", "never"] = "auto"
    max_tokens: PositiveInt = 64
    time_budget_ms: PositiveInt = 300
    predict_ms: PositiveInt = 2000
    rest_ms: PositiveInt = 300
    min_confidence: float = Field(default=0.5, ge=0, le=1)
    adapter: str = "auto"
    stats: bool = True

    def updated(self, options: Any) -> tuple[EditorSettings, list[str]]:
        """These settings with an editor's `options` applied, and a complaint about each invalid option."""
        options = dict(options) if isinstance(options, Mapping) else {}
        try:
            return EditorSettings.model_validate(self.model_dump(by_alias=True) | options), []
        except ValidationError as error:
            invalid = {problem["loc"][0]: problem for problem in error.errors()}
        complaints = [
            f"there is no setting codegemma.{key}"
            if problem["type"] == "extra_forbidden"
            else f"codegemma.{key}: {problem['msg']}, got {options[key]!r}"
            for key, problem in invalid.items()
        ]
        valid = {key: value for key, value in options.items() if key not in invalid}
        return self.updated(valid)[0], complaints
