"""Messages -> Steps: the instruction-tuned members answer in Gemma's turns."""

from __future__ import annotations

from collections.abc import Sequence

from codegemma import prompts
from codegemma.generate.engine import Completion, Engine, Request
from codegemma.generate.sampling import Sampling
from codegemma.native import Cancel
from codegemma.prompts import Message


def chat(
    engine: Engine,
    messages: Sequence[Message],
    max_tokens: int = 1024,
    sampling: Sampling = Sampling(),
    stop: Sequence[str] = (),
    cancel: Cancel | None = None,
    speculate: bool = True,
    top: int = 0,
    adapter: str | None = None,
) -> Completion:
    """The model's next turn. Each turn's prompt begins with the one before it, so the cache holds all but the new text.

    Raises ValueError where the roles do not alternate, the model has no turns, or the conversation is too long.
    """
    if engine.tokenizer is None:
        raise ValueError("this model came without a tokenizer: it cannot chat")
    prompt = prompts.chat(engine.tokenizer, messages)
    return engine.generate(
        Request(prompt.ids, max_tokens, sampling, prompt.stops, stop, top, speculate, adapter), cancel
    )
