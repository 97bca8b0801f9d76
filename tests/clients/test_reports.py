"""The pages of `data report` and `eval` in headless Chromium: they fit the screen of a phone."""

import json

import pytest
from browser import chromium, picture

from codegemma.cli import main as cli
from codegemma.data import report as rows_report
from codegemma.evals import report as scores_report

LONG = "a_name_without_any_place_to_break_it_" * 8


def rows_page(folder):
    (folder / "source").mkdir()
    for number in range(6):
        text = f"import m{number - 1}\n\n\ndef {LONG}{number}(value):\n    return value\n"
        (folder / f"source/m{number}.py").write_text(text * 3)
    with pytest.raises(SystemExit) as end:
        cli.main(["data", "build", str(folder / "source"), "--out", str(folder / "rows")])
    assert end.value.code == 0
    return rows_report.report(folder / "rows")


def scores_page(folder):
    for number, name in enumerate(scores_report.PUBLISHED["scores"]):
        score = {"title": name, "model": LONG, "score": 0.5, "low": 0.4, "high": 0.6, "items": 9}
        score |= {"more": {"strict": 0.4}, "note": f"as published {LONG if number == 0 else ''}"}
        times = {"seconds": 12345.6, "tokens": 10**6, "samples": 9, "stops": {"end": 8, "length": 1}}
        sample = {"id": f"{name}/{LONG}", "outcome": LONG, "passed": True, "prompt": LONG, "completion": LONG}
        (folder / f"{name}.json").write_text(json.dumps(score))
        (folder / f"{name}.times.json").write_text(json.dumps(times))
        (folder / f"{name}.jsonl").write_text(json.dumps(sample) + "\n")
    return scores_report.write(folder)


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("write", [rows_page, scores_page])
def test_a_report_fits_the_screen(tmp_path, write, width):
    path = write(tmp_path)
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto(path.as_uri())
        page.wait_for_load_state()
        if write is scores_page:
            page.locator("#sample h4").first.wait_for()
        picture(page, f"{write.__name__}-{width}")
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out"
        assert page.locator("svg").count() > 1
