"""codegemma: the CodeGemma system. `load()` gives a model that completes, generates and chats; the rest is in modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from codegemma.engine import Completion
    from codegemma.local import Model, load
    from codegemma.prompts import File, Message
    from codegemma.sampling import Sampling

__version__ = "0.1.0"
__all__ = ["Completion", "File", "Message", "Model", "Sampling", "load"]

_HOME = {
    "Completion": "engine",
    "Model": "local",
    "load": "local",
    "File": "prompts",
    "Message": "prompts",
    "Sampling": "sampling",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"codegemma.{_HOME[name]}"), name)
    raise AttributeError(f"module 'codegemma' has no attribute {name!r}")
