"""A headless Chromium that reports what a page must not do."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright

PICTURES = Path(__file__).parents[2] / "build/pictures"
QUIET = ["--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync"]
PATIENCE = 180_000                       # ms: the machine may be busy


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=QUIET, chromium_sandbox=False)
        yield browser
        browser.close()


def picture(page: Page, name: str) -> None:
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=PICTURES / f"{name}.png")


def watched(context: BrowserContext, own: str) -> list[str]:
    """Faults of the context's pages, as they come: errors, broken policy, requests to anywhere but `own`."""
    faults: list[str] = []
    context.set_default_timeout(PATIENCE)
    context.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    context.on("weberror", lambda error: faults.append(str(error.error)))
    context.on("request", lambda request: faults.append(f"asked {request.url}") if not request.url.startswith((own, "data:", "blob:"))
               else None)
    return faults
