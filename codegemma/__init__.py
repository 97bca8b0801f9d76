"""codegemma: the CodeGemma system. `load()` gives a model that completes, generates and chats."""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, which the command line imports only once it heeds Ctrl-C
if TYPE_CHECKING:
    from codegemma.generate.engine import Completion
    from codegemma.generate.model import Model, load
    from codegemma.generate.sampling import Sampling
    from codegemma.prompts import File, Message

__version__ = "0.1.0"
__all__ = ["Completion", "File", "Message", "Model", "Sampling", "load"]

_HOME = {
    "Completion": "generate.engine",
    "Model": "generate.model",
    "load": "generate.model",
    "File": "prompts",
    "Message": "prompts",
    "Sampling": "generate.sampling",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        from importlib import import_module

        return getattr(import_module(f"codegemma.{_HOME[name]}"), name)
    raise AttributeError(f"module 'codegemma' has no attribute {name!r}")
