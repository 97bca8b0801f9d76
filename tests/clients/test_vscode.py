"""The extension inside VS Code (code-server), where it starts `codegemma serve` itself.

Needs `make vscode` and scripts/install_code_server."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from browser import TIMEOUT_MS, Page, chromium, expect, picture

sys.path.insert(0, str(Path(__file__).parent.parent))

from serving import Process
from tiny import tiny_config, write_tiny_gguf

ROOT = Path(__file__).parents[2]
VSIX = ROOT / "codegemma/editor/codegemma.vsix"
CODE = ROOT / "build/code-server/node_modules/code-server/out/node/entry.js"
SHAPES = (
    '"""Areas of simple shapes."""\n\nfrom math import pi\n\n\n'
    "def circle_area(radius):\n    \n\n\nprint(circle_area(2))\n"
)
SETTINGS = {
    "workbench.startupEditor": "none",
    "security.workspace.trust.enabled": False,
    "extensions.autoUpdate": False,
    "extensions.autoCheckUpdates": False,
    "telemetry.telemetryLevel": "off",
    "workbench.colorTheme": "Default Dark Modern",
    "workbench.tips.enabled": False,
    "chat.commandCenter.enabled": False,
    "codegemma.maxTokens": 24,
    "codegemma.chatTokens": 200,
}

pytestmark = pytest.mark.skipif(
    not (CODE.exists() and VSIX.exists()), reason="make vscode; scripts/install_code_server"
)


@pytest.fixture(scope="module")
def workbench(tmp_path_factory):
    """VS Code in a browser, with the extension, on a folder with one file."""
    home = tmp_path_factory.mktemp("code")
    (home / "work").mkdir()
    (home / "work/shapes.py").write_text(SHAPES)
    (home / "work/.env").write_text("KEY=1\n")
    program = home / "codegemma"  # writes down for the test where its server listens
    program.write_text(
        f"#!/bin/bash\ncd {shlex.quote(str(ROOT))}\n"
        f'exec {shlex.quote(sys.executable)} -m codegemma.cli "$@" '
        '> >(while read -r line; do echo "$line" >> '
        f'{shlex.quote(str(home / "output"))}; echo "$line"; done)\n'
    )
    program.chmod(0o755)
    for place, values in (("User", SETTINGS), ("Machine", {"codegemma.command": str(program)})):
        folder = home / "data" / place
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text(json.dumps(values))
    command = [
        "node",
        str(CODE),
        "--user-data-dir",
        str(home / "data"),
        "--extensions-dir",
        str(home / "extensions"),
    ]
    environment = os.environ | {
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "EXTENSIONS_GALLERY": "{}",
    }
    subprocess.run(
        [*command, "--install-extension", str(VSIX)],
        env=environment,
        check=True,
        capture_output=True,
        timeout=300,
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with open(home / "log", "w") as log:
        code = subprocess.Popen(
            [
                *command,
                "--auth",
                "none",
                "--bind-addr",
                address,
                "--disable-telemetry",
                "--disable-update-check",
                "--disable-workspace-trust",
            ],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        with httpx.Client(transport=httpx.HTTPTransport(retries=10), timeout=120) as client:
            client.get(f"http://{address}/healthz")
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.set_default_timeout(TIMEOUT_MS)
            page.goto(f"http://{address}/?folder={home / 'work'}")
            page.get_by_role("treeitem", name="shapes.py").dblclick()
            page.locator(".editor-instance .view-line").first.wait_for()
            expect(status(page).locator(".codicon-sparkle")).to_be_visible(
                timeout=TIMEOUT_MS
            )  # the server is up
            yield page, home
    finally:
        code.terminate()
        code.wait(60)


def url(home: Path) -> str:
    return (home / "output").read_text().split("listening on ")[-1].split()[0]


def status(page: Page):
    return page.locator(".statusbar-item", has_text="CodeGemma")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT_MS / 1000
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def command(page: Page, name: str) -> None:
    page.keyboard.press("F1")
    page.locator(".quick-input-widget input").first.fill(f">CodeGemma: {name}")
    page.locator(".quick-input-list").get_by_text(f"CodeGemma: {name}", exact=True).first.wait_for()
    page.keyboard.press("Enter")


def to_line(page: Page, line: int) -> None:
    page.locator(".editor-instance .view-line").first.click()
    page.keyboard.press("Control+Home")
    for _ in range(line - 1):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("End")


def ghost(page: Page) -> str:
    return "".join(page.locator("[class*=ghost-text]").all_text_contents()).replace("\xa0", " ")


def wait_for_ghost(page: Page) -> str:
    page.locator("[class*=ghost-text]").first.wait_for()
    return ghost(page)


def test_ghost_text_is_the_servers_and_is_accepted_by_word_and_whole(workbench):
    page, home = workbench
    to_line(page, 7)
    page.keyboard.type("return pi * ")
    shown = wait_for_ghost(page)
    picture(page, "vscode-ghost")
    prefix, suffix = SHAPES.split("    \n")
    answer = httpx.post(
        f"{url(home)}/infill",
        timeout=180,
        json={
            "input_prefix": f"{prefix}    return pi * ",
            "input_suffix": f"\n{suffix}",
            "path": "shapes.py",
            "mode": "auto",
            "trim": "auto",
            "adapter": "auto",
            "n_predict": 24,
            "input_extra": [],
        },
    ).json()
    assert shown == answer["content"].replace("\n", "") != ""
    expect(status(page)).to_contain_text(" ms", timeout=TIMEOUT_MS)
    page.keyboard.press("Control+ArrowRight")
    word = page.locator(".view-line", has_text="return").inner_text().replace("\xa0", " ")
    assert word.strip().startswith("return pi * ")
    page.keyboard.press("Tab")
    page.wait_for_function(
        "text => [...document.querySelectorAll('.view-line')].some(line => "
        "line.textContent.replaceAll('\\u00a0', ' ').trim().startsWith(text))",
        arg=f"return pi * {answer['content'].splitlines()[0]}".strip(),
    )
    figures = home / "state/codegemma/suggestions.jsonl"
    wait_until(lambda: figures.exists() and '"language": "python"' in figures.read_text())
    row = json.loads(figures.read_text().splitlines()[-1])
    assert row["taken"] == row["characters"] == len(answer["content"])


def offered(page: Page, name: str) -> bool:
    """Whether the command palette has a command. It always has Menu, which shows that the list is there."""
    page.keyboard.press("F1")
    field = page.locator(".quick-input-widget input").first
    field.fill(">CodeGemma: Menu")
    page.locator(".quick-input-list").get_by_text("CodeGemma: Menu", exact=True).first.wait_for()
    field.fill(">CodeGemma:")
    page.locator(".quick-input-list").get_by_text("CodeGemma: Complete Here", exact=True).first.wait_for()
    field.fill(f">CodeGemma: {name}")
    page.wait_for_timeout(1000)
    count = page.locator(".quick-input-list").get_by_text(f"CodeGemma: {name}", exact=True).count()
    page.keyboard.press("Escape")
    return count > 0


def test_the_walkthrough_shows_the_first_steps(workbench):
    page, _ = workbench
    command(page, "Get Started")
    expect(page.get_by_text("Get started with CodeGemma").first).to_be_visible(timeout=TIMEOUT_MS)
    expect(page.get_by_text("Take a suggestion").first).to_be_visible()
    expect(page.get_by_text("Choose a model that can chat").first).to_be_visible()  # the default cannot
    expect(page.get_by_text("Ask about code").first).to_have_count(0)
    picture(page, "vscode-walkthrough")
    page.keyboard.press("Control+F4")
    page.locator(".tab", has_text="shapes.py").click()


def test_questions_are_offered_only_where_the_model_can_chat(workbench, tmp_path):
    page, home = workbench
    to_line(page, 7)
    assert (
        offered(page, "Complete Here") and not offered(page, "Explain") and not offered(page, "Write Tests")
    )
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3"))  # its vocabulary has turns, so it chats
    machine = home / "data/Machine/settings.json"
    settings = json.loads(machine.read_text())
    with Process("-m", str(tmp_path / "tiny.gguf")) as process:
        machine.write_text(json.dumps(settings | {"codegemma.url": process.url}))
        wait_until(lambda: offered(page, "Explain"))
        to_line(page, 7)
        command(page, "Explain")
        view = page.frame_locator("iframe.webview.ready").frame_locator("iframe")
        question = view.locator(".message.user .text")
        expect(question).to_contain_text("Explain what this code does", timeout=TIMEOUT_MS)
        expect(question).to_contain_text("def circle_area(radius):")
        expect(view.locator(".message.assistant .text")).not_to_be_empty(timeout=TIMEOUT_MS)
        stop = view.locator(".composer button")
        if stop.inner_text() == "Stop":
            stop.click()
        expect(stop).to_have_text("Send", timeout=TIMEOUT_MS)
        picture(page, "vscode-chat")
        page.keyboard.press("Control+Shift+E")
        page.get_by_role("treeitem", name=".env").dblclick()
        page.locator(".tab.active", has_text=".env").wait_for()
        command(page, "Explain")
        expect(page.get_by_text("it is not sent").first).to_be_visible(timeout=TIMEOUT_MS)
        page.locator(".tab", has_text="shapes.py").click()
        machine.write_text(json.dumps(settings))
        wait_until(lambda: not offered(page, "Explain"))


def test_off_for_a_language_and_on_again(workbench):
    page, home = workbench
    settings = home / "data/User/settings.json"
    to_line(page, 1)
    command(page, "Turn On or Off for This Language")
    expect(status(page).locator(".codicon-circle-slash")).to_be_visible(timeout=TIMEOUT_MS)
    assert json.loads(settings.read_text())["codegemma.enable"]["python"] is False
    command(page, "Turn On or Off for This Language")
    expect(status(page).locator(".codicon-circle-slash")).to_have_count(0, timeout=TIMEOUT_MS)


def test_the_server_stops_and_starts(workbench):
    page, home = workbench
    old = url(home)
    command(page, "Stop the Local Server")
    expect(status(page).locator(".codicon-debug-stop")).to_be_visible(timeout=TIMEOUT_MS)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{old}/health")
    command(page, "Start the Local Server")
    expect(status(page).locator(".codicon-sparkle")).to_be_visible(timeout=TIMEOUT_MS)
    assert httpx.get(f"{url(home)}/health").json() == {"status": "ok"}
