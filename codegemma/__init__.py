"""codegemma: the CodeGemma system. `load()` gives a model that completes, generates and chats."""

from __future__ import annotations

# Type checkers read any TYPE_CHECKING as true. Importing `typing` for it would delay the command line, which
# should answer Ctrl-C as early as possible.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from codegemma.generate.engine import Completion
    from codegemma.generate.model import Model, load
    from codegemma.generate.sampling import Sampling
    from codegemma.prompts import File, Message

__version__ = "0.1.0"
__all__ = ["Completion", "File", "Message", "Model", "Sampling", "load"]

# Public name -> the module that defines it, imported when the name is first used.
_MODULES = {
    "Completion": "generate.engine",
    "Model": "generate.model",
    "load": "generate.model",
    "File": "prompts",
    "Message": "prompts",
    "Sampling": "generate.sampling",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        from importlib import import_module

        return getattr(import_module(f"codegemma.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'codegemma' has no attribute {name!r}")
