"""The page in headless Chromium, against `codegemma serve` with the default model."""

import json
import os
import re
import sys
from pathlib import Path

import httpx
import pytest
from browser import Page, chromium, expect, picture, watched

sys.path.insert(0, str(Path(__file__).parent.parent))

from serving import Process
from tiny import tiny_config, write_tiny_gguf

HOSTILE = """Look: <script>window.bad = 1</script><img src=x onerror="window.bad = 2"> \
<style>body { display: none }</style>

[click](javascript:window.bad=3) [data](data:text/html,<script>1</script>) \
![picture](https://example.org/spy.png) [ok](https://example.org/)

```python" onmouseover="window.bad=4
print("<b>not bold</b>")
```

```html
<script>window.bad = 5</script>
```
<form action="https://example.org"><input name="key"><button>Send</button></form>
<svg onload="window.bad=6"><iframe srcdoc="x"></iframe>
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Process(
        environment=os.environ | {"XDG_STATE_HOME": str(tmp_path_factory.mktemp("state"))}
    ) as process:
        yield process


@pytest.fixture(scope="module")
def browser():
    with chromium() as driver:
        yield driver


@pytest.fixture
def open_page(browser):
    """Opens the page, and checks at the end that nothing went wrong in it."""
    opened = []

    def opener(url: str, **options) -> Page:
        context = browser.new_context(**options)
        opened.append((context, watched(context, url.partition("#")[0])))
        page = context.new_page()
        page.goto(url)
        expect(page.locator("#state")).not_to_have_text("loading", timeout=60_000)
        return page

    yield opener
    for context, faults in opened:
        context.close()
        assert not faults


def code(page: Page) -> str:
    """The editor's text as it shows it, without ghost text."""
    lines = page.evaluate("""() => [...document.querySelectorAll(".view-lines .view-line")]
        .map(line => [line.offsetTop, [...line.querySelectorAll(":scope > span > span")]
            .filter(part => !/ghost/.test(part.className)).map(part => part.textContent).join("")])
        .sort((a, b) => a[0] - b[0]).map(pair => pair[1]).join("\\n")""")
    return lines.replace("\xa0", " ")


def ghost(page: Page) -> str:
    return "".join(page.locator("#editor [class*=ghost-text]").all_text_contents()).replace("\xa0", " ")


def settled(page: Page) -> str:
    """Waits until a suggestion is complete, and returns its first line."""
    page.wait_for_function(
        "() => /^ready: (Tab accepts|Accept takes it)$/.test(document.querySelector('#state').textContent) "
        "&& document.querySelector('#editor [class*=ghost-text]')"
    )
    return ghost(page)


def request_bodies(page: Page, path: str) -> list[dict]:
    """A growing list of the bodies of the requests to `path`."""
    bodies: list[dict] = []
    page.on(
        "request",
        lambda request: bodies.append(json.loads(request.post_data)) if request.url.endswith(path) else None,
    )
    return bodies


def type_in_the_hole(page: Page, text: str) -> None:
    page.locator("#editor .view-line").first.click()
    page.keyboard.press("Control+Home")
    for _ in range(12):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    page.keyboard.type(text)


def test_ghost_text_is_what_the_server_writes_and_tab_takes_it(server, open_page):
    page = open_page(server.url)
    bodies, events = request_bodies(page, "/infill"), request_bodies(page, "/v1/events")
    type_in_the_hole(page, "counts")
    shown = settled(page)
    body = next(body for body in bodies if body["input_prefix"].endswith("        counts"))
    assert body["input_suffix"].startswith("\n    return counts") and body["path"] == "words.py"
    assert body["trim"] == "auto"
    answer = httpx.post(
        f"{server.url}/infill", json={**body, "stream": False, "session": "another"}, timeout=180
    ).json()
    assert shown and shown == answer["content"].replace("\n", "")
    picture(page, "page-light-wide")
    numbers = page.locator("#numbers").inner_text()
    assert re.search(r"Prompt: \d+ tokens, \d+% from the cache", numbers) and "tokens a second" in numbers
    page.keyboard.press("Tab")
    page.wait_for_function("() => !document.querySelector('#state').textContent.startsWith('writing')")
    assert f"        counts{answer['content'].split(chr(10))[0]}" in code(page)
    (accepted,) = {event["completion_id"] for event in events if event["type"] == "select"}
    assert body["language"] == "python" and accepted in {
        event["completion_id"] for event in events if event["type"] == "view"
    }


def test_typing_what_is_shown_asks_nothing_and_typing_another_thing_asks_anew(server, open_page):
    page = open_page(server.url)
    type_in_the_hole(page, "coun")  # no bracket, which the editor would close
    shown = settled(page)
    bodies = request_bodies(page, "/infill")
    page.keyboard.type(shown[0])
    page.wait_for_function(
        "text => [...document.querySelectorAll('#editor [class*=ghost-text]')].map(e => e.textContent)"
        ".join('').replaceAll('\\u00a0', ' ') === text",
        arg=shown[1:],
    )
    assert not any(body["input_prefix"].endswith("coun" + shown[0]) for body in bodies)
    page.keyboard.press("Escape")
    assert ghost(page) == ""
    page.keyboard.type("_x = 1 +")
    page.wait_for_function(
        "() => /^(ready|unsure|nothing)/.test(document.querySelector('#state').textContent)"
    )
    assert any(body["input_prefix"].endswith("= 1 +") for body in bodies)


def test_switches_reach_the_model(server, open_page):
    page = open_page(server.url)
    for order in ("psm", "spm"):
        page.select_option("#mode", order)
        page.fill("#max_tokens", "6")
        bodies = request_bodies(page, "/infill")
        page.locator("#editor .view-line").first.click()
        page.keyboard.press("Alt+\\")
        expect(page.locator("#numbers dd", has_text=order.upper())).to_be_visible(timeout=180_000)
        assert {key: bodies[0][key] for key in ("mode", "n_predict", "n_cmpl", "time_budget_ms")} == {
            "mode": order,
            "n_predict": 6,
            "n_cmpl": 3,
            "time_budget_ms": 500,
        }
    page.fill("#max_tokens", "")  # an emptied number is the default
    page.fill("#time_budget_ms", "0")
    page.locator("#time_budget_ms").blur()
    assert [page.input_value(f"#{name}") for name in ("max_tokens", "time_budget_ms")] == ["96", "10"]
    page.reload()
    assert page.input_value("#mode") == "spm" and page.input_value("#max_tokens") == "96"


def test_the_example_is_completed_right_and_a_reload_keeps_the_text(server, open_page):
    page = open_page(server.url, viewport={"width": 390, "height": 844}, has_touch=True)
    page.get_by_role("button", name="Suggest").tap()
    assert settled(page) == "counts[word] = counts.get(word, 0) + 1"
    page.get_by_role("button", name="Word").tap()
    page.get_by_role("button", name="Accept").tap()
    line = "counts[word]=counts.get(word,0)+1"  # which a narrow screen wraps
    expect(page.locator(".view-line", has_text="+ 1")).to_be_visible()
    assert line in re.sub(r"\s", "", code(page))
    page.fill("#path", "tally.py")
    page.locator("#path").blur()
    page.reload()
    expect(page.locator(".view-line", has_text="+ 1")).to_be_visible()
    assert line in re.sub(r"\s", "", code(page)) and page.input_value("#path") == "tally.py"
    page.get_by_role("button", name="Show the example").tap()
    expect(page.locator(".view-line", has_text="+ 1")).to_have_count(0)
    assert line not in re.sub(r"\s", "", code(page))


def test_an_unsure_suggestion_is_shown_only_to_who_asks(server, open_page):
    page = open_page(server.url)
    stream = [
        {"content": "unlikely", "index": 0},
        {"content": "", "index": 0, "stop": True, "confidence": 0.2},
    ]
    body = "".join(f"data: {json.dumps(part)}\n\n" for part in stream)
    page.route("**/infill", lambda route: route.fulfill(content_type="text/event-stream", body=body))
    type_in_the_hole(page, "x")
    expect(page.locator("#state")).to_have_text("unsure, so hidden: Alt+\\ shows it")
    assert ghost(page) == ""
    page.keyboard.press("Alt+\\")
    expect(page.locator("#editor [class*=ghost-text]").first).to_have_text("unlikely")
    page.keyboard.press("Escape")
    page.fill("#minConfidence", "0.2")
    page.locator("#minConfidence").blur()
    type_in_the_hole(page, "y")
    expect(page.locator("#editor [class*=ghost-text]").first).to_have_text("unlikely")


def test_chat_by_keyboard_alone(server, open_page):
    page = open_page(f"{server.url}/#/chat")
    turns = request_bodies(page, "/v1/chat/completions")
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("Count to three")
    page.keyboard.press("Enter")
    answer = page.locator(".message.assistant .text")
    expect(answer).not_to_be_empty(timeout=180_000)
    page.keyboard.press("Escape")
    expect(page.locator(".note")).to_have_text("Stopped.", timeout=180_000)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    rows = httpx.get(f"{server.url}/metrics").text
    assert "llamacpp:requests_processing 0" in rows and re.search(r"codegemma_cancelled_total [1-9]", rows)
    kept = answer.inner_text()
    page.reload()
    assert answer.inner_text() == kept, "the history outlives the page"
    page.keyboard.press("ArrowUp")  # edits the last question
    page.keyboard.type(" and four")
    page.keyboard.press("Enter")
    expect(page.locator(".message.user .text")).to_have_text("Count to three and four")
    expect(page.locator(".composer button")).to_have_text("Stop")
    page.keyboard.press("Escape")
    expect(page.locator(".composer button")).to_have_text("Send", timeout=180_000)
    assert [turn["messages"][-1]["content"] for turn in turns] == [
        "Count to three",
        "Count to three and four",
    ]
    assert len(turns[1]["messages"]) == 1, "an edited question drops what followed it"


def test_after_stop_by_mouse_the_next_key_writes_and_a_reload_keeps_the_question(server, open_page):
    page = open_page(f"{server.url}/#/chat")
    ask(page, "Count to a hundred")
    expect(page.locator(".composer button")).to_have_text("Stop")
    page.locator(".composer button").click()
    expect(page.locator(".note")).to_have_text("Stopped.", timeout=180_000)
    expect(page.get_by_label("Message", exact=True)).to_be_focused()
    page.keyboard.type("an unsent question")
    page.reload()
    expect(page.get_by_label("Message", exact=True)).to_have_value("an unsent question")


def test_regenerate_and_conversations(open_page, server):
    page = open_page(f"{server.url}/#/chat")
    answers(page, "first *answer*", "second", "third")
    ask(page, "one")
    expect(page.locator(".message.assistant em")).to_have_text("answer")
    page.locator(".message.assistant").hover()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(".message.assistant .text")).to_have_text("second")
    page.get_by_role("button", name="New chat").click()
    ask(page, "two")
    expect(page.locator(".message.assistant .text")).to_have_text("third")
    page.locator(".conversations").get_by_role("button", name="one", exact=True).click()
    expect(page.locator(".message.assistant .text")).to_have_text("second")
    page.get_by_role("button", name="Delete one").click()
    expect(page.locator(".conversations li")).to_have_count(1)


def answers(page: Page, *texts: str) -> None:
    """Makes the chat route give these answers, since no real model can be made to."""
    remaining = iter(texts)

    def stream(text: str) -> str:
        parts = [{"choices": [{"delta": {"content": part}}]} for part in (text[:7], text[7:])]
        return "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"

    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=stream(next(remaining))),
    )


def ask(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


@pytest.mark.parametrize(
    ("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)]
)
def test_what_a_model_says_cannot_do_anything(open_page, server, scheme, width):
    page = open_page(f"{server.url}/#/chat", color_scheme=scheme, viewport={"width": width, "height": 800})
    answers(page, HOSTILE)
    ask(page, "Attack!\n<b>me</b>")
    expect(page.locator(".composer button")).to_have_text("Send")
    answer = page.locator(".message.assistant .text")
    expect(answer).to_contain_text("<script>window.bad = 1</script>")
    assert page.evaluate("window.bad") is None
    assert (
        answer.locator(
            "script, img, style, form, input, svg, iframe, [onerror], [onload], [onmouseover], [style]"
        ).count()
        == 0
    )
    links = answer.locator("a[href]").evaluate_all(
        "links => links.map(link => [link.href, link.target, link.rel])"
    )
    assert links == [["https://example.org/", "_blank", "noopener noreferrer"]]
    assert answer.locator("pre").first.inner_text() == 'print("<b>not bold</b>")\n'
    assert page.locator(".message.user .text").inner_text() == "Attack!\n<b>me</b>"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
    picture(page, f"chat-{scheme}-{width}")


def test_code_can_be_copied(open_page, server):
    page = open_page(f"{server.url}/#/chat", permissions=["clipboard-read", "clipboard-write"])
    answers(page, "```python\nx = 1\n```")
    ask(page, "code")
    page.locator("figure").get_by_role("button", name="Copy").click()
    expect(page.locator("figure").get_by_role("button", name="Copied")).to_be_visible()
    assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n"
    assert page.locator("figure .hljs-number").inner_text() == "1"


@pytest.mark.parametrize(("scheme", "width"), [("light", 400), ("dark", 1280), ("dark", 400)])
def test_the_editor_fits_every_screen(open_page, server, scheme, width):
    page = open_page(server.url, color_scheme=scheme, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    dark = scheme == "dark"
    assert (
        sum(
            map(int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3])
        )
        < 200
    ) == dark
    page.locator("#editor .view-line").first.click()
    page.keyboard.press("Control+Home")
    page.keyboard.press("Alt+\\")
    page.wait_for_function("() => document.querySelector('#numbers dl')")
    picture(page, f"page-{scheme}-{width}")


def test_a_key_is_asked_for_and_kept(open_page, tmp_path, browser):
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3"))
    (tmp_path / "keys").write_text("correct horse battery\n")
    with Process("-m", str(tmp_path / "tiny.gguf"), "--api-key-file", str(tmp_path / "keys")) as process:
        context = browser.new_context()
        page = context.new_page()
        page.goto(process.url)
        expect(page.locator("#state")).to_have_text("this server needs a key")
        page.get_by_label("Key").fill("correct horse battery")
        page.keyboard.press("Enter")
        expect(page.locator("#state")).to_contain_text("ready")
        page.reload()
        expect(page.locator("#state")).to_contain_text("ready")
        context.close()


def test_a_server_that_is_gone_is_told(open_page, browser, tmp_path):
    write_tiny_gguf(tmp_path / "tiny.gguf", tiny_config("gemma3"))
    context = browser.new_context()
    with Process("-m", str(tmp_path / "tiny.gguf")) as process:
        page = context.new_page()
        page.goto(process.url)
        expect(page.locator("#state")).to_contain_text("ready")
    type_in_the_hole(page, "x")
    expect(page.locator("#state")).to_have_text("the server does not answer")
    page.click("#to-chat")
    ask(page, "hello?")
    expect(page.locator(".failure")).to_contain_text("the server does not answer")
    context.close()
