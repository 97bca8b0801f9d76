"""What `codegemma setup` shows and writes, and that the documentation says the same."""

import difflib
import hashlib
import json
import re
import shlex
import tomllib
import zipfile
from pathlib import Path
from typing import get_args
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegemma.cli import main as cli
from codegemma.config import Trim
from codegemma.editor import setup as editors
from codegemma.editor.settings import EditorSettings
from codegemma.editor.setup import SETUPS, advice, merged_block, merged_json, setup, write

ROOT = Path(__file__).parent.parent
DOCS = (ROOT / "docs" / "editors.md").read_text()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


@pytest.mark.parametrize("editor", SETUPS)
def test_the_documentation_has_what_the_command_prints(editor, capsys, monkeypatch):
    monkeypatch.setattr(editors, "program", lambda: "codegemma")
    monkeypatch.setattr(editors, "extension", lambda: "codegemma/editor/codegemma.vsix")
    with pytest.raises(SystemExit) as end:
        cli.main(["setup", editor])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    assert f"## {setup(editor).title}\n\n{printed}" in DOCS and printed == advice(editor) + "\n"


def test_the_documentation_has_every_setting_with_its_default():
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", DOCS, re.M))
    defaults = EditorSettings().model_dump(by_alias=True)
    assert rows == {name: json.dumps(value) for name, value in defaults.items()}


@pytest.mark.parametrize("editor", SETUPS)
def test_writing_twice_changes_nothing_and_the_old_file_is_kept(editor, home):
    steps = setup(editor, "/opt/x y/codegemma")
    file = editors.location(steps.file)
    assert home in file.parents
    first = write(editor, "/opt/x y/codegemma")
    assert "is written" in first and f"+{steps.text.splitlines()[0]}" in first
    assert "set up already" in write(editor, "/opt/x y/codegemma")
    assert not list(file.parent.glob("*before*"))
    old = file.read_text()
    if "/opt/x y" in steps.text:
        assert "The old one is" in write(editor, "/opt/moved/codegemma")
        assert file.with_name(f"{file.name}.before-codegemma").read_text() == old
        assert "/opt/moved/codegemma" in file.read_text() and "/opt/x y" not in file.read_text()
        write(editor, "/opt/again/codegemma")  # the user's own text stays in the first copy
        assert file.with_name(f"{file.name}.before-codegemma").read_text() == old
        assert "/opt/moved" in file.with_name(f"{file.name}.before-codegemma-2").read_text()


def test_blocks_stand_beside_what_is_the_users(home):
    file = home / ".config/helix/languages.toml"
    file.parent.mkdir(parents=True)
    mine = '[[language]]\nname = "python"\nlanguage-servers = ["pyright"]\n\n[[language]]\nname = "zig"'
    file.write_text(mine)
    write("helix", "codegemma")
    text = file.read_text()
    parsed = tomllib.loads(text)
    assert text.startswith(mine) and parsed["language-server"]["codegemma"]["args"] == ["lsp"]
    servers = {table["name"]: table.get("language-servers") for table in parsed["language"]}
    assert servers["python"] == ["pyright"] and servers["rust"] == ["rust-analyzer", "codegemma"]
    assert len(servers) == len(parsed["language"]) and "language-servers of python above" in text
    file.write_text(text + '\n[[language]]\nname = "go"\n')
    write("helix", "codegemma")
    again = tomllib.loads(file.read_text())
    assert sum(table["name"] == "go" for table in again["language"]) == 1
    file.write_text("[broken")
    with pytest.raises(ValueError, match="is not valid TOML"):
        write("helix", "codegemma")
    assert file.read_text() == "[broken"
    with pytest.raises(ValueError, match="does not have the two marks"):
        merged_block(f";; {editors.MARKS[0]}\n", setup("emacs"), "init.el")
    with pytest.raises(ValueError, match="in their order"):
        merged_block("".join(f";; {mark}\n" for mark in editors.MARKS[::-1]), setup("emacs"), "init.el")


def test_a_link_stays_a_link_and_emacs_finds_the_file_it_reads(home):
    (home / "dotfiles").mkdir()
    (home / "dotfiles" / "emacs").write_text("(setq x 1)\n")
    (home / ".emacs").symlink_to(home / "dotfiles" / "emacs")
    write("emacs", "codegemma")
    assert (home / ".emacs").is_symlink() and "(setq x 1)" in (home / "dotfiles" / "emacs").read_text()
    assert "lsp-stdio-connection" in (home / ".emacs").read_text() and not (home / ".emacs.d").exists()


SETTINGS = """// my settings
{
  "a": [1, 2, {"edit_predictions": 3}], // "b": no
  /* "edit_predictions": {} */
  "edit_predictions": {"mode": "subtle", "provider": "zed"},
  "url": "http://x/{",
}
"""


def test_comments_and_all_else_stay_where_settings_are_merged():
    ours = json.loads(setup("zed").text)
    new = merged_json(SETTINGS, ours, "settings.json")
    changed = [line for line in difflib.ndiff(SETTINGS.splitlines(), new.splitlines()) if line[0] == "-"]
    assert changed == ['-   "edit_predictions": {"mode": "subtle", "provider": "zed"},']
    kept = json.loads(editors.without_comments(new))
    assert (
        kept["edit_predictions"] == {"mode": "subtle"} | ours["edit_predictions"]
        and kept["url"] == "http://x/{"
    )
    assert merged_json(new, ours, "settings.json") == new
    for broken in ("[1]", '{"a": ', "nonsense", '"text"'):
        with pytest.raises(ValueError, match="mend it first"):
            merged_json(broken, ours, "settings.json")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)
OBJECTS = st.dictionaries(st.text(max_size=3), VALUES, max_size=4)
OURS = st.dictionaries(
    st.text(max_size=3), st.integers() | st.dictionaries(st.text(max_size=3), st.integers()), max_size=3
)


@settings(max_examples=100, deadline=None)
@given(OBJECTS, OURS, st.sampled_from([None, 1, 4]), st.booleans())
def test_merging_is_a_deep_union_for_any_json(old, ours, indent, comments):
    def union(a, b):
        if not (isinstance(a, dict) and isinstance(b, dict)):
            return b
        return {key: union(a.get(key), b[key]) if key in b else a[key] for key in {**a, **b}}

    text = json.dumps(old, indent=indent, ensure_ascii=False)
    if comments:
        text = "/* { */ " + text + " // }"
    new = merged_json(text, ours, "x.json")
    assert (
        json.loads(editors.without_comments(new)) == union(old, ours)
        and merged_json(new, ours, "x.json") == new
    )


def test_the_extension_comes_with_the_package_and_is_built_from_its_sources():
    archive = Path(editors.extension())
    assert f"code --install-extension {shlex.quote(str(archive))}`" in advice("vscode")
    with zipfile.ZipFile(archive) as extension:
        manifest = json.loads(extension.read("extension/dist/manifest.json"))
        package = json.loads(extension.read("extension/package.json"))
        names = set(extension.namelist())
    sources = manifest["sources"]
    sums = {path: hashlib.sha256((ROOT / path).read_bytes()).hexdigest() for path in sources}
    assert sums == sources, "the extension is older than its sources: make vscode"
    present = {str(path.relative_to(ROOT)) for path in (ROOT / "editors/vscode/src").iterdir()}
    assert present - set(sources) <= {"editors/vscode/src/messages.ts"}  # types alone
    assert package == json.loads((ROOT / "editors/vscode/package.json").read_text())
    assert {"extension/dist/extension.js", "extension/dist/webview.js"} <= names


def test_the_walkthrough_and_the_menus_name_what_is_there():
    folder = ROOT / "editors/vscode"
    contributes = json.loads((folder / "package.json").read_text())["contributes"]
    commands = {command["command"] for command in contributes["commands"]}
    settings = contributes["configuration"]["properties"]
    (walkthrough,) = contributes["walkthroughs"]
    assert len(walkthrough["steps"]) > 3
    for step in walkthrough["steps"]:
        assert (folder / step["media"]["markdown"]).is_file()
        links = re.findall(r"\(command:([\w.]+)(?:\?([^)]*))?\)", step["description"])
        for command, argument in links:
            assert command in {*commands, "codegemma.chat.focus", "workbench.action.openSettings"}
            assert not argument or json.loads(unquote(argument))[0] in settings
        for event in step.get("completionEvents", ()):
            kind, _, name = event.partition(":")
            assert kind != "onSettingChanged" or name in settings
            assert kind != "onCommand" or name in {*commands, "codegemma.accepted"}
    chat_commands = {"codegemma.explain", "codegemma.fix", "codegemma.tests"}
    for menu in ("codegemma.editor", "commandPalette"):
        offered = {entry["command"]: entry.get("when") for entry in contributes["menus"][menu]}
        assert {name: offered[name] for name in chat_commands} == dict.fromkeys(
            chat_commands, "codegemma.chats"
        )
    trim = settings["codegemma.trim"]
    assert trim["default"] == "auto" and set(trim["enum"]) == set(get_args(Trim))


def test_lisp_is_balanced_and_unknown_editors_are_named():
    text = re.sub(r'"[^"]*"', "", setup("emacs").text)
    assert text.count("(") == text.count(")")
    with pytest.raises(ValueError, match="no set-up for 'ed': there are vscode"):
        setup("ed")
