"""The local statistics of suggestions: what is recorded (never text), the switch, the chart."""

import json
from pathlib import Path

import pytest

from codegemma.cli import main as cli
from codegemma.serve import stats
from codegemma.serve.stats import Shown, by_language, load, picture, record, summary

DAY = 1440


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "codegemma"


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main(["stats", *arguments])
    assert exit.value.code == 0
    return capsys.readouterr().out


def test_what_is_recorded_is_counts_and_times():
    record(Shown("python", 12.345, 30, 30))
    (line,) = stats.file().read_text().splitlines()
    assert set(json.loads(line)) == {"language", "latency_ms", "characters", "taken", "minute"}
    (row,) = load()
    assert (row.language, row.latency_ms, row.characters, row.taken) == ("python", 12.3, 30, 30)
    assert row.minute > 10**7


def test_figures_are_those_of_the_rows():
    rows = [Shown("python", 10.0 * n, 10, 5 if n % 2 else 0) for n in range(1, 21)]
    rows.append(Shown("", 1000, 20, 40))
    figures = summary(rows)
    assert (figures["shown"], figures["accepted"], figures["latency_ms_median"]) == (21, 11, 110)
    assert figures["characters_kept_share"] == (50 + 20) / 220 and figures["latency_ms_95"] == 200
    assert [*by_language(rows)] == ["python", "other"] and summary([])["accepted_share"] is None


def test_the_switch_and_the_bound(home, capsys):
    assert "recording is off" in run(capsys, "--off")
    record(Shown("python", 1, 1))
    assert not load() and "recording is on" in run(capsys, "--on")
    stats.file().parent.mkdir(exist_ok=True)
    row = json.dumps(vars(Shown("python", 1, 1, 0, 5)))
    stats.file().write_text(f"{row}\n" * (stats.MAX_BYTES // len(row)) + "damaged\n")
    record(Shown("go", 2, 2))
    assert stats.file().stat().st_size < stats.MAX_BYTES * 0.6 and load()[-1].language == "go"
    run(capsys, "--clear")
    assert not stats.file().exists() and not load()


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    record(Shown("python", 1, 1))
    assert load() == []


def test_the_picture_shows_each_day_and_each_latency():
    today = 20_000
    rows = [Shown("go", 30, 4, 4 if n < 2 else 0, today * DAY) for n in range(8)]
    rows.append(Shown("go", 3000, 4, 0, (today - 2) * DAY))
    shown, accepted, *bars = picture(rows, days=3, today=today).splitlines()
    assert shown.split("  ")[-2].strip() == "▁ █" and "up to 8 a day" in shown
    assert accepted.rstrip().endswith("▂")
    assert {line.split()[-1] for line in bars} == {"0", "1", "8"}
    assert bars[1].count("█") == 40 and bars[-1].count("█") == 5


def test_the_command_shows_a_table_a_picture_and_json(capsys):
    for taken in (0, 7):
        record(Shown("python", 20, 7, taken))
    text = run(capsys)
    assert "50%" in text and "20 ms" in text and "█" in text and str(stats.file()) in text.replace("\n", "")
    output = json.loads(run(capsys, "--json"))
    assert output["all"]["accepted_share"] == 0.5 and output["recording"]
    assert Path(output["file"]) == stats.file()
    with pytest.raises(SystemExit):
        cli.main(["stats", "--on", "--off"])
