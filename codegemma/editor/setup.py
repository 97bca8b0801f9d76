"""How each editor is set up: the text that goes into which of its files, shown or merged into it.

docs/editors.md holds what `advice` says of each; a test compares them.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

URL = "http://127.0.0.1:8012"  # where `codegemma serve` listens
MARK = "codegemma: the lines from here were made by `codegemma setup`", "codegemma: the end of them"


@dataclass(frozen=True)
class Setup:
    """`own`: the file is ours alone; `block`: our lines stand between two marks, after `comment`; `json`: settings of ours
    are merged into a JSON file with comments."""

    title: str
    file: str
    kind: Literal["own", "block", "json"]
    language: str
    text: str
    first: str = ""  # what to do before
    then: str = ""  # and after
    comment: str = ""


def setup(editor: str, program: str = "codegemma") -> Setup:
    """What an editor needs; `program` is the command that it shall run. Raises ValueError on an unknown editor."""
    if editor not in SETUPS:
        raise ValueError(f"no set-up for {editor!r}: there are {', '.join(SETUPS)}")
    return SETUPS[editor](program)


def program() -> str:
    """`codegemma` where the shell finds it, else its path."""
    beside = Path(sys.executable).with_name("codegemma")
    return "codegemma" if shutil.which("codegemma") or not beside.exists() else str(beside)


def advice(editor: str, program: str = "codegemma") -> str:
    """Markdown: what to do, and what to paste where."""
    made = setup(editor, program)
    paste = f"Into `{made.file}`:\n\n```{made.language}\n{made.text}```"
    return "\n\n".join(part for part in (made.first, paste, made.then) if part)


def write(editor: str, program_: str | None = None) -> str:
    """Merges the set-up into the editor's file, keeping the old one beside it, and returns what was changed. A second
    call changes nothing. Raises ValueError where the file cannot be understood; then nothing is written."""
    made = setup(editor, program_ or program())
    file = place(made.file)
    old = file.read_text("utf-8") if file.exists() else ""
    new = {
        "own": lambda: made.text,
        "json": lambda: merged_json(old, json.loads(made.text), str(file)),
        "block": lambda: merged_block(old, made, str(file)),
    }[made.kind]()
    if new == old:
        return f"{file} is set up already."
    diff = "".join(difflib.unified_diff(old.splitlines(True), new.splitlines(True), str(file), str(file)))
    kept = ""
    if old:
        backup = file.with_name(f"{file.name}.before-codegemma")
        shutil.copy2(file, backup)
        kept = f"\nThe old one is {backup}."
    file.parent.mkdir(parents=True, exist_ok=True)
    fresh = file.resolve().with_name(f"{file.name}.codegemma-new")  # a link stays a link
    fresh.write_text(new, "utf-8")
    fresh.replace(file.resolve())
    return "\n".join(
        part for part in (made.first, diff.rstrip("\n"), f"{file} is written.{kept}", made.then) if part
    )


def place(shown: str) -> Path:
    """Where a file of the documentation is on this machine."""
    if shown.endswith("Code/User/settings.json"):
        there = {"darwin": "~/Library/Application Support", "win32": os.environ.get("APPDATA", "~")}.get(
            sys.platform
        )
        shown = shown.replace("~/.config", there) if there else shown
    if shown == "~/.emacs.d/init.el":  # Emacs takes the first of these that is there
        found = (
            one
            for one in ("~/.emacs", "~/.emacs.el", shown, "~/.config/emacs/init.el")
            if place_of(one).exists()
        )
        shown = next(found, shown)
    return place_of(shown)


def place_of(shown: str) -> Path:
    config = os.environ.get("XDG_CONFIG_HOME")
    return Path(shown.replace("~/.config", config, 1) if config else shown).expanduser()


# --------------------------------------------------------------------------------------------------- merging
def merged_block(old: str, made: Setup, name: str) -> str:
    """The file with our lines between their marks, at the end where they are new."""
    first, last = (f"{made.comment} {mark}\n" for mark in MARK)
    start, end = old.find(first), old.find(last)
    if (start < 0) != (end < 0) or end < start:
        raise ValueError(
            f"{name} has only one of the two marks of `codegemma setup`: delete it, and try again"
        )
    others = old[:start] + old[end + len(last) :] if start >= 0 else old
    text = _without_languages(made.text, others, name) if made.language == "toml" else made.text
    block = first + text + last
    if start >= 0:
        return old[:start] + block + old[end + len(last) :]
    return old + ("\n" if old.endswith("\n") or not old else "\n\n") * bool(old) + block


def _without_languages(text: str, others: str, name: str) -> str:
    """Helix's languages without those that the user has set up: the server must be added there by hand."""
    try:
        taken = {one.get("name") for one in tomllib.loads(others).get("language", [])}
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} is not valid TOML ({error}): mend it first") from error
    head, *tables = text.split("[[language]]\n")
    kept = head
    for table in tables:
        language = tomllib.loads(table)["name"]
        kept += (
            f'# add "codegemma" to the language-servers of {language} above\n'
            if language in taken
            else f"[[language]]\n{table}"
        )
    return kept


def merged_json(old: str, ours: Mapping[str, Any], name: str) -> str:
    """A JSON file with comments, with our settings in it; all else stays as it was, to the letter."""
    text = old if old.strip() else "{\n}\n"
    try:
        present = json.loads(_bare(text))
        spans, inside = _members(text)
    except (ValueError, StopIteration) as error:
        raise ValueError(f"{name} is not valid JSON ({error}): mend it first") from error
    if not isinstance(present, dict):
        raise ValueError(f"{name} must hold a JSON object, as settings do: mend it first")
    wanted = {key: _deep(present.get(key), value) for key, value in ours.items()}
    shown = {
        key: json.dumps(value, indent=2, ensure_ascii=False).replace("\n", "\n  ")
        for key, value in wanted.items()
    }
    fresh = [f"\n  {json.dumps(key)}: {value}" for key, value in shown.items() if key not in present]
    edits = [(inside, inside, ",".join(fresh) + "," * bool(fresh and present))]
    edits += [(*spans[key], shown[key]) for key in shown if key in present and wanted[key] != present[key]]
    for start, end, piece in sorted(edits, key=lambda edit: -edit[0]):
        text = text[:start] + piece + text[end:]
    return text


_TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|//[^\n]*|/\*.*?\*/|[{}\[\],:]|[^\s{}\[\],:"/]+', re.S)


def _tokens(text: str) -> list[re.Match[str]]:
    return [match for match in _TOKEN.finditer(text) if not match[0].startswith(("//", "/*"))]


def _bare(text: str) -> str:
    """Without comments and trailing commas."""
    found = [match[0] for match in _tokens(text)]
    return " ".join(
        one
        for one, after in zip(found, [*found[1:], ""], strict=True)
        if not (one == "," and after in ("}", "]"))
    )


def _members(text: str) -> tuple[dict[str, tuple[int, int]], int]:
    """Where the values of the outermost object stand, and where it opens."""
    spans: dict[str, tuple[int, int]] = {}
    key: str | None = None
    depth = start = before = 0
    found = _tokens(text)
    for at, match in enumerate(found):
        token = match[0]
        if depth == 1 and token in (",", "}") and key is not None:
            spans[key], key = (start, before), None
        if depth == 1 and token == ":" and key is None:
            key, start = json.loads(found[at - 1][0]), found[at + 1].start()
        depth += (token in "{[") - (token in "}]") if len(token) == 1 else 0
        before = match.end()
    return spans, found[0].end()


def _deep(present: Any, ours: Any) -> Any:
    if isinstance(present, dict) and isinstance(ours, Mapping):
        return present | {key: _deep(present.get(key), value) for key, value in ours.items()}
    return ours


# --------------------------------------------------------------------------------------------------- editors
def _vscode(program: str) -> Setup:
    settings: dict[str, Any] = {"editor.inlineSuggest.enabled": True}
    if program != "codegemma":
        settings["codegemma.command"] = program
    return Setup(
        "Visual Studio Code",
        "~/.config/Code/User/settings.json",
        "json",
        "json",
        _json(settings),
        "Install the extension: `make vscode` builds it, `code --install-extension editors/vscode/codegemma.vsix` "
        "installs it. It starts and stops the server by itself.",
    )


def _neovim(program: str) -> Setup:
    return Setup(
        "Neovim",
        "~/.config/nvim/plugin/codegemma.lua",
        "own",
        "lua",
        NEOVIM.replace("PROGRAM", _quoted(program)),
        "Neovim 0.12 shows ghost text, which `<Tab>` takes; Neovim 0.11 has the same suggestions in its pop-up "
        "(`<C-y>` takes one).",
    )


def _helix(program: str) -> Setup:
    text = f'[language-server.codegemma]\ncommand = {_quoted(program)}\nargs = ["lsp"]\n'
    for name, servers in HELIX.items():
        names = ", ".join(f'"{server}"' for server in (*servers, "codegemma"))
        text += f'\n[[language]]\nname = "{name}"\nlanguage-servers = [{names}]\n'
    return Setup(
        "Helix",
        "~/.config/helix/languages.toml",
        "block",
        "toml",
        text,
        "Helix shows suggestions in its pop-up, beside those of the language's own server. Any other language goes the "
        "same way: its servers are in `hx --health LANGUAGE`.",
        comment="#",
    )


def _emacs(program: str) -> Setup:
    return Setup(
        "Emacs",
        "~/.emacs.d/init.el",
        "block",
        "elisp",
        EMACS.replace("PROGRAM", _quoted(program)),
        "With lsp-mode, suggestions stand beside those of the language's own server, and `M-i` shows one as ghost text "
        "(lsp-mode 9.1). Eglot runs one server for a buffer, so there codegemma serves the languages that have no other.",
        comment=";;",
    )


def _continue(program: str) -> Setup:
    return Setup(
        "Continue",
        "~/.continue/models/codegemma.yaml",
        "own",
        "yaml",
        CONTINUE.replace("URL", URL),
        f"Start the server with `{program} serve`. Continue (VS Code, JetBrains) then asks it for completions.",
    )


def _zed(program: str) -> Setup:
    served = {
        "api_url": f"{URL}/v1/completions",
        "model": "codegemma",
        "prompt_format": "code_gemma",
        "max_output_tokens": 64,
    }
    settings = {"edit_predictions": {"provider": "open_ai_compatible_api", "open_ai_compatible_api": served}}
    return Setup(
        "Zed",
        "~/.config/zed/settings.json",
        "json",
        "json",
        _json(settings),
        f"Start the server with `{program} serve`. Zed then asks it for predictions while you type.",
    )


def _json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def _quoted(text: str) -> str:
    """A string of Lua, TOML and Emacs Lisp alike."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


SETUPS: dict[str, Callable[[str], Setup]] = {
    "vscode": _vscode,
    "neovim": _neovim,
    "helix": _helix,
    "emacs": _emacs,
    "continue": _continue,
    "zed": _zed,
}
HELIX = {
    "python": ("ty", "ruff", "jedi", "pylsp"),
    "javascript": ("typescript-language-server",),
    "jsx": ("typescript-language-server",),
    "typescript": ("typescript-language-server",),
    "tsx": ("typescript-language-server",),
    "go": ("gopls", "golangci-lint-lsp"),
    "rust": ("rust-analyzer",),
    "java": ("jdtls",),
    "kotlin": ("kotlin-language-server",),
    "c": ("clangd",),
    "cpp": ("clangd",),
}

NEOVIM = """\
-- Completions by codegemma. Settings go into init_options (docs/editors.md lists them).
vim.lsp.config("codegemma", { cmd = { PROGRAM, "lsp" }, root_markers = { ".git" }, init_options = {} })
vim.lsp.enable("codegemma")

vim.api.nvim_create_autocmd("LspAttach", {
  callback = function(event)
    local client = vim.lsp.get_client_by_id(event.data.client_id)
    if not client or client.name ~= "codegemma" then
      return
    end
    if vim.lsp.inline_completion then
      vim.lsp.inline_completion.enable(true, { bufnr = event.buf })
    else
      vim.lsp.completion.enable(true, client.id, event.buf, { autotrigger = true })
    end
    vim.api.nvim_create_autocmd({ "CursorHold", "InsertEnter" }, { -- the cursor rests: read ahead
      buffer = event.buf,
      callback = function()
        client:notify("codegemma/cursor", vim.lsp.util.make_position_params(0, client.offset_encoding))
      end,
    })
  end,
})

vim.keymap.set("i", "<Tab>", function()
  if not (vim.lsp.inline_completion and vim.lsp.inline_completion.get()) then
    return "<Tab>"
  end
end, { expr = true, desc = "Take codegemma's suggestion" })
"""

EMACS = """\
(with-eval-after-load 'lsp-mode
  (lsp-register-client
   (make-lsp-client :new-connection (lsp-stdio-connection '(PROGRAM "lsp"))
                    :activation-fn (lambda (&rest _) t)
                    :add-on? t
                    :server-id 'codegemma))
  (when (require 'lsp-inline-completion nil t)
    (define-key lsp-mode-map (kbd "M-i") #'lsp-inline-completion-display)))
(with-eval-after-load 'eglot
  (add-to-list 'eglot-server-programs '(prog-mode PROGRAM "lsp") t))
"""

CONTINUE = """\
name: CodeGemma
version: 0.0.1
schema: v1
models:
  - name: CodeGemma
    provider: mistral
    model: codegemma
    apiBase: URL/v1/
    apiKey: none
    roles:
      - autocomplete
"""
