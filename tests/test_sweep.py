"""The judges of the sweep (tests/sweep): each passes what is right, and sees a planted violation."""

import random
import signal
import subprocess
import sys

import pytest
from sweep import judges, storage
from sweep.__main__ import Row, disturb
from sweep.clients import REQUESTS, answer
from sweep.jobs import Job, Reference, make_case, untouched

JOB = Job("job", ("complete",), ("work/out",), volatile=(".log",))


def test_the_same_files_and_only_they_are_equal(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_text("a")
    (tmp_path / "link").symlink_to("folder")
    before = judges.contents(tmp_path)
    assert before["folder"] == "folder" and before["link"] == "link to folder"
    assert judges.equal(before, judges.contents(tmp_path), "x") == []
    (tmp_path / "folder" / "file").write_text("b")
    assert judges.equal(before, judges.contents(tmp_path), "x") == ["x: folder/file has other bytes"]
    (tmp_path / "folder" / "file").rename(tmp_path / "new")
    after = judges.contents(tmp_path)
    expected = ["x: folder/file is missing", "x: new should not be there"]
    assert judges.equal(before, after, "x") == expected and judges.complete(before, after, "x") == []


@pytest.mark.parametrize("name", [".out.gguf.71-ab.part", "3.orbax-checkpoint-tmp-9", "deep/x.incomplete"])
def test_a_leftover_is_seen_and_the_users_own_file_is_not_one(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    (tmp_path / "partner").write_text("")
    assert judges.no_leftovers(tmp_path) == [f"a leftover: {name}"]
    assert judges.no_leftovers(tmp_path, [name]) == []


GOOD_ERROR = "step 1\nerror: {0}/out: No space left on device: free some space there\n"


def test_an_error_names_its_path_and_a_remedy(tmp_path):
    assert judges.error_text(GOOD_ERROR.format(tmp_path), tmp_path) == []
    assert len(judges.error_text(GOOD_ERROR.format("/elsewhere"), tmp_path)) == 1
    assert "no remedy" in judges.error_text(f"error: {tmp_path}: No space left on device", tmp_path)[0]
    assert "no line" in judges.error_text("[Errno 28] No space left on device", tmp_path)[0]
    assert judges.error_text("Traceback:\n" + GOOD_ERROR.format(tmp_path), tmp_path) == ["a traceback"]


def test_answers_that_differ_or_never_came_are_seen():
    alone = {"hole": ["a + b", "finish_reason stop"]}
    assert judges.answers(alone, [("hole", ["a + b", "finish_reason stop"])]) == []
    assert len(judges.answers(alone, [("hole", ["a + c", "finish_reason stop"])])) == 1
    assert len(judges.answers(alone, [("hole", (500, "broken"))])) == 1
    assert judges.answers(alone, []) == ["no good client got an answer"]


def test_streams_are_joined_and_names_and_times_left_out():
    whole = '{"id": "a", "created": 1, "choices": [{"text": "x = 1", "finish_reason": "stop"}]}'
    stream = (
        ': ping\n\ndata: {"choices": [{"text": "x ", "finish_reason": null}]}\n\n'
        'data: {"choices": [{"text": "= 1", "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
    )
    assert answer(whole) == answer(stream) == ["x = 1", "finish_reason stop"]
    assert answer(whole.replace("= 1", "= 2")) != answer(whole)
    assert answer(stream.replace("stop", "length")) != answer(stream)
    broken = stream + 'data: {"error": {"message": "the server failed"}}\n\n'
    assert answer(broken) != answer(stream)
    scores = '{"choices": [{"text": "x", "logprobs": {"token_logprobs": [-1.5]}}]}'
    assert answer(scores) != answer(scores.replace("1.5", "1.6"))
    assert len(REQUESTS) > 5


def test_a_late_health_and_a_long_pause_are_seen():
    alone = [0.01, 0.02] * 50
    assert judges.health(alone, [0.05, 0.11] * 50) == []
    assert len(judges.health(alone, [0.01, 0.2] * 50)) == 1
    assert len(judges.health(alone, [0.01] * 99 + [1.5])) == 1
    assert len(judges.health(alone, [0.01] * 99 + [float("inf")])) == 1
    assert len(judges.health(alone, [float("inf")] * 9)) == 2
    assert judges.health([], alone) and judges.health(alone, [])


def test_memory_that_rises_or_peaks_is_seen():
    mb = judges.MB
    assert judges.memory(100 * mb, [100 * mb, 150 * mb, 151 * mb, 152 * mb] * 5) == []
    assert "rises" in judges.memory(100 * mb, [(100 + 8 * i) * mb for i in range(40)])[0]
    assert "peaks" in judges.memory(100 * mb, [100 * mb] * 9 + [900 * mb] + [100 * mb] * 30)[0]
    assert judges.memory(100 * mb, [100 * mb] * 3) == ["memory was not measured"]


def test_a_log_with_a_traceback_or_colours_is_seen():
    assert judges.log(["GET /%1b[31m 404\n", "größer\n"]) == []
    assert judges.log(["Traceback (most recent call last):\n"]) == ["a traceback in the server's log"]
    assert judges.log(["GET /\x1b[31m"]) == ["the server's log has '\\x1b'"]


def test_a_users_file_that_was_touched_is_seen(tmp_path):
    case = make_case(tmp_path / "case")
    assert untouched(case) == []
    (case / "work" / "notes.txt").write_text("ours")
    (case / "home" / ".cache" / "x.part").unlink()
    assert len(untouched(case)) == 2


def test_a_hindered_run_must_fail_in_words_or_be_right(tmp_path):
    case = make_case(tmp_path / "case")
    out = case / "work" / "out"
    out.write_text("result")
    reference = Reference(JOB.contents(case), ("answer", ""), 1, 1, 1)

    def judge(code, answer, errors):
        return storage.failed_well(JOB, reference, case, code, answer, errors)

    assert judge(0, "answer", "") == [] and judge(2, "", GOOD_ERROR.format(case)) == []
    assert len(judge(0, "other", "")) == 1 and len(judge(2, "", "error: no")) == 2
    assert "signal" in judge(-signal.SIGXFSZ, "", GOOD_ERROR.format(case))[0]
    out.write_text("half a result")
    assert judge(2, "", GOOD_ERROR.format(case)) == ["after a failure: work/out has other bytes"]
    assert judge(0, "answer", "") == ["exit 0 without the result or a note"]
    assert judge(0, "answer", GOOD_ERROR.format(case).replace("error", "note")) == []


# Programs in place of codegemma: what a careless one does is seen by the cases themselves.
CAREFUL = """
import os, sys, pathlib
part = pathlib.Path(sys.argv[1], "work", f".out.{os.getpid()}-a.part")
for old in part.parent.glob(".out.*.part"): old.unlink(missing_ok=True)
try:
    with open(part, "w") as file:
        for _ in range(60):
            file.write("x" * 8192)
            file.flush()
            __import__("time").sleep(0.002)
    os.replace(part, part.with_name("out"))
except OSError as error:
    part.unlink()
    sys.exit(f"error: {part.with_name('out')}: {error.strerror}: free some space there")
print("answer")
"""
IN_PLACE = CAREFUL.replace('f".out.{os.getpid()}-a.part"', '"out"').replace("part.unlink()", "pass")
UNTIDY = CAREFUL.replace("old.unlink(missing_ok=True)", "pass").replace("part.unlink()", "pass")
GREEDY = CAREFUL.replace('print("answer")', '(part.parent / "notes.txt").write_text("x")\nprint("answer")')
SILENT = CAREFUL.replace(": free some space there", "")


def broken(fault, source, tmp_path, monkeypatch, runs=3):
    """The violations of a fault's law by a program, over several runs."""

    def start(arguments, inputs, case, prefix=(), file_bytes=0):
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({file_bytes},) * 2)\n"
        command = [*prefix, sys.executable, "-c", (limit if file_bytes else "") + source, case]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)

    for module in ("storage", "jobs"):
        monkeypatch.setattr(f"sweep.{module}.start", start)
    case = tmp_path / "case"
    make_case(case)
    process = start((), tmp_path, case)
    assert process.communicate()[0] == "answer\n"
    reference = Reference(JOB.contents(case), ("answer\n", ""), 0.25, 0.05, 60 * 8192)
    subprocess.run(["rm", "-r", case], check=True)
    row = disturb(fault, JOB, reference, tmp_path, case, runs, seed=1)
    return row.violations


@pytest.mark.parametrize(
    "fault, source, violation",
    [
        (storage.killed, CAREFUL, None),
        (storage.killed, IN_PLACE, "has other bytes"),
        (storage.killed, UNTIDY, "a leftover"),
        (storage.killed, GREEDY, "notes.txt was touched"),
        (storage.full_disk, CAREFUL, None),
        (storage.full_disk, IN_PLACE, "has other bytes"),
        (storage.full_disk, UNTIDY, "a leftover"),
        (storage.full_disk, SILENT, "no remedy"),
        (storage.two, GREEDY, "notes.txt was touched"),
    ],
)
def test_a_careless_program_is_seen(fault, source, violation, tmp_path, monkeypatch):
    case = next(each for each in storage.FAULTS if each.run is fault)
    violations = broken(case, source, tmp_path, monkeypatch)
    assert any(violation in each for each in violations) if violation else violations == (), violations


def test_a_row_says_what_broke_and_what_was_skipped():
    assert str(Row("a", 2, "law")) == "| a | 2 | law | held |"
    assert str(Row("a", 2, "law", ("x | y", "z"))) == "| a | 2 | law | BROKE: x / y (and 1 more) |"

    def skip(*_):
        raise storage.Skipped("no root")

    fault = storage.Fault("full", "law", skip)
    reference = Reference({}, ("", ""), 1, 1, 1)
    row = disturb(fault, JOB, reference, None, storage.Path("/nonexistent"), 3, random.randrange(9))
    assert str(row) == "| full: job | 0 | law | skipped; no root |"
