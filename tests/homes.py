"""The user's folders, as a test sees them."""

from pathlib import Path

import pytest


def set_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `folder` the home, with our cache in it and no other program's models."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / ".cache"))
