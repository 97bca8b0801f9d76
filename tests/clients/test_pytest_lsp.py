"""`codegemma lsp` as a process, driven by pytest-lsp with the recorded capabilities of real editors."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

pytest_lsp = pytest.importorskip("pytest_lsp")
pytest_asyncio = pytest.importorskip("pytest_asyncio")
from lsprotocol import types  # noqa: E402
from tiny import tiny_config, write_tiny_gguf  # noqa: E402

import codegemma  # noqa: E402

PREFIX, SUFFIX = "# 😋\r\ndef re(th):\r\n    x = '𝔊'; retu", "\r\n\r\nreturn 1\r\n"
URI = "untitled:a"
INLINE = types.TextDocumentClientCapabilities(inline_completion=types.InlineCompletionClientCapabilities())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_gguf(
        tmp_path_factory.mktemp("model") / "tiny.gguf", tiny_config("gemma3", context=2048), "Q8_0"
    )


@pytest.fixture(scope="module")
def expected(model):
    prefix, suffix = PREFIX.replace("\r", ""), SUFFIX.replace("\r", "")
    answer = codegemma.load(model, threads=1).complete(prefix, suffix, trim="block", max_tokens=64)
    assert answer.text.strip()
    return answer.text.replace("\n", "\r\n")


@pytest_asyncio.fixture(
    params=["visual_studio_code@1.65.2", "neovim@0.7.0", "neovim@0.11.0", "emacs@29.1", "of 3.18"]
)
async def client(request, model, tmp_path):
    command = [sys.executable, "-m", "codegemma.cli", "lsp", "-m", str(model), "-t", "1"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "XDG_STATE_HOME": str(tmp_path)}
    started = await pytest_lsp.ClientServerConfig(command, server_env=environment).start()
    started.feature(types.CLIENT_REGISTER_CAPABILITY)(lambda params: None)
    recorded = request.param != "of 3.18"
    capabilities = (
        pytest_lsp.client_capabilities(request.param)
        if recorded
        else types.ClientCapabilities(text_document=INLINE)
    )
    result = await started.initialize_session(
        types.InitializeParams(
            capabilities=capabilities,
            root_uri=tmp_path.as_uri(),
            initialization_options={"timeBudgetMs": 10**6},
        )
    )
    started.encoding = str(result.capabilities.position_encoding)
    yield started
    await started.shutdown_session()


@pytest.mark.asyncio
async def test_every_editor_gets_the_models_suggestion(client, expected):
    client.text_document_did_open(
        types.DidOpenTextDocumentParams(types.TextDocumentItem(URI, "python", 1, PREFIX + SUFFIX))
    )
    document, line = types.TextDocumentIdentifier(URI), PREFIX.rpartition("\n")[2]
    codec, width = {"utf-8": ("utf-8", 1), "utf-16": ("utf-16-le", 2), "utf-32": ("utf-32-le", 4)}[
        client.encoding
    ]
    position = types.Position(2, len(line.encode(codec)) // width)
    if client.capabilities.text_document.inline_completion:
        context = types.InlineCompletionContext(types.InlineCompletionTriggerKind.Invoked)
        answer = await client.text_document_inline_completion_async(
            types.InlineCompletionParams(context, document, position)
        )
        (item,) = answer.items
        assert item.insert_text == expected and item.range == types.Range(position, position)
    else:
        answer = await client.text_document_completion_async(types.CompletionParams(document, position))
        (item,) = answer.items
        assert item.text_edit.new_text == "retu" + expected and item.text_edit.range.end == position
    assert any("ready after" in note.message for note in client.log_messages)
    assert not [note for note in client.messages if note.type == types.MessageType.Error]
