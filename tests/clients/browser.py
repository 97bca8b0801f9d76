"""A headless Chromium, its screenshots, and a list of the faults of its pages."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api")
Page, expect = playwright.Page, playwright.expect

PICTURES = Path(__file__).parents[2] / "build/pictures"
QUIET = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 180_000  # ms: the machine may be busy


@contextlib.contextmanager
def chromium() -> Iterator:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=shutil.which("chromium"), args=QUIET, chromium_sandbox=False
        )
        yield browser
        browser.close()


def picture(page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def watched(context, origin: str) -> list[str]:
    """A growing list of the faults of the context's pages: errors, and requests to anywhere but `origin`."""
    faults: list[str] = []
    context.set_default_timeout(TIMEOUT_MS)
    context.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((origin, "data:", "blob:"))
            else faults.append(f"requested {request.url}")
        ),
    )
    return faults
