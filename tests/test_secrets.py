"""The secrets policy: names that are never read, redaction at a cursor, and the VS Code extension's table."""

import runpy
from dataclasses import replace
from pathlib import Path

import pytest
from serving import served
from tiny import KINDS, write_tiny_gguf

from codegemma import load
from codegemma.generate.request import Request
from codegemma.prompts import File
from codegemma.safety.secrets import find_secrets, is_secret_name, redact, redact_at_cursor, safe_files
from codegemma.serve.scheduler import Scheduler

ROOT = Path(__file__).parent.parent
AWS = "AKIAQYLPMN5HNM4CJX2B"
SECRET = [
    ".env",
    ".env.local",
    "prod.env",
    "id_rsa",
    "id_ed25519.pub",
    "server.PEM",
    "a.key",
    ".npmrc",
    ".netrc",
    ".envrc",
    ".git-credentials",
    "credentials",
    "credentials.json",
    "secrets.yaml",
    "terraform.tfvars",
    "prod.tfstate",
    "service-account-1.json",
    "kubeconfig",
    "C:\\project\\server.key",
    "/home/jo/.ssh/config",
    "secrets.sh",
    "secrets.properties",
    "a.gpg",
    ".aws/config",
    ".gnupg/gpg.conf",
    ".kube/config",
    "prod.env.local",
    "api.example.com.env",
    "example.key",
    "id_rsa.old",
    "AuthKey_1.p8",
    "client_secret_1.json",
    ".env~",
    "#.env#",
    ".env.swp",
    "..env.swo",
    ".env.production.bak",
    "id_rsa~",
    ".id_rsa.swp",
    "id_rsa.~2~",
    "secrets.yaml.orig",
    "known_hosts.old",
    "prod.tfstate.backup",
    "id_rsa_work",
    "deploy_rsa",
    "ssh_host_ed25519_key",
    ".docker/config.json",
    ".docker/config.json~",
    ".config/gh/hosts.yml",
    "passwords.txt",
    "PASSWORD.TXT",
    "token.json",
    "kubeconfig.yaml",
    "prod.kubeconfig",
    "app-secrets.json",
    "apikey.txt",
    ".secrets.toml",
]
READ = [
    "environment.py",
    "env.py",
    "keys.py",
    "secret_santa.py",
    "id_rsa_test/a.py",
    "monkey.py",
    "credentials.go",
    "secrets.py",
    "pkg/Credentials.java",
    "secret.ts",
    ".env_reader/a.py",
    "Secret.java",
    "Credentials.kt",
    "secret.rs",
    "id_rsa.go",
    "credentials.proto",
    "secrets.graphql",
    "secrets.tf",
    ".env.d.ts",
    "vite.env.mts",
    ".env.example",
    ".env.local.sample",
    "example.env",
    "secrets.example.yaml",
    "terraform.tfvars.dist",
    "tokenizer.json",
    "tokens.json",
    "password.py",
    "token.ts",
    "secrets.py~",
    "#password.py#",
    ".env.example~",
    "id_rsa_test.go",
    "kubeconfig.go",
    "app_secrets.rb",
    ".docker/nginx.conf",
    "config.json",
    "hosts.yml",
    "old.py",
    "backup.json.bak",
    "",
]


@pytest.mark.parametrize("path", SECRET)
def test_names_of_credentials_are_secret(path):
    assert is_secret_name(path)
    assert is_secret_name(f"folder/{path}", "plaintext") and is_secret_name(f"folder\\{path}", "shellscript")


@pytest.mark.parametrize("path", READ)
def test_other_names_are_not_and_source_code_is_never(path):
    assert not is_secret_name(path) and not is_secret_name(f"folder/{path}")


def test_the_editors_language_decides_where_a_name_may_be_code_and_only_there():
    assert is_secret_name("translation.key") and not is_secret_name("translation.key", "java")
    assert is_secret_name("server.pem", "java") and is_secret_name(".env", "python")
    for data in ("credentials.json", "prod.env", "credentials", "id_rsa", "secrets.yaml"):
        assert is_secret_name(data, "python")


@pytest.mark.parametrize("cursor", range(0, 60, 3))
def test_a_secret_is_replaced_wherever_the_cursor_stands(cursor):
    text = f"a = 1\nkey = '{AWS}'\nmail = 'jo@corp.org'\nend = 2\n"
    before, after = redact_at_cursor(text[:cursor], text[cursor:])
    assert AWS[4:] not in before + after and not find_secrets(before + after)
    assert "jo@corp.org" in before + after and len(before) == cursor
    assert (before + after).startswith("a = 1\nkey = '") and (before + after).endswith("end = 2\n")


def test_several_secrets_and_a_shorter_fake_leave_the_rest_to_the_letter():
    key = "-----BEGIN PRIVATE KEY-----\n" + "MIIEvQIBADANBgkqhkiG9w0B\n" * 4 + "-----END PRIVATE KEY-----"
    text = f"one {AWS} two {key} three {AWS} four"
    expected = redact(text)
    assert (
        expected.startswith("one AKIAEXAMPLE") and " two -----BEGIN PRIVATE KEY-----\nEXAMPLE\n" in expected
    )
    assert expected.endswith(" four") and "MIIE" not in expected and AWS not in expected
    for cursor in range(0, len(text) + 1, 7):
        assert "".join(redact_at_cursor(text[:cursor], text[cursor:])) == expected


def test_other_files_are_left_out_by_name_and_redacted_by_content():
    files = [File(".env", "A=1"), File("secrets.py", f"KEY = '{AWS}'\n"), File("", "x = 1\n")]
    code, unnamed = safe_files(files)
    assert code.path == "secrets.py" and AWS[4:] not in code.text and "EXAMPLE" in code.text
    assert unnamed == files[2]


def test_the_vs_code_extension_has_the_same_names():
    script = runpy.run_path(str(ROOT / "scripts" / "secret_names.py"))
    assert script["TARGET"].read_text() == script["document"](), "run scripts/secret_names.py"


# Over the server: each route that takes other files, and those whose text is never changed.
NAMED = [
    {"filename": ".env", "text": "TOKEN=1\n"},
    {"filename": "src/id_rsa", "text": "x\n"},
    {"filename": "secrets.py", "text": f"KEY = '{AWS}'\n"},
    {"filename": "", "text": f"key: {AWS}\n"},
    {"filename": "lib.py", "text": "lib = 1\n"},
]
AROUND = {"prompt": f"a = '{AWS}'\nx = ", "suffix": f"\nb = '{AWS}'\n"}
SNIPPETS = [{"filepath": file["filename"], "body": file["text"]} for file in NAMED]
ROUTES = {
    "llama.cpp": (
        "/infill",
        {"input_prefix": AROUND["prompt"], "input_suffix": AROUND["suffix"], "n_predict": 1},
    ),
    "OpenAI": ("/v1/completions", AROUND | {"model": "any", "max_tokens": 1}),
    "Mistral": ("/v1/fim/completions", AROUND | {"model": "any", "max_tokens": 1}),
    "Ollama": ("/api/generate", AROUND | {"model": "any", "options": {"num_predict": 1}}),
}
TABBY = {"prefix": AROUND["prompt"], "suffix": AROUND["suffix"], "declarations": SNIPPETS[:2]}
TABBY["relevant_snippets_from_changed_files"] = SNIPPETS[2:4]
TABBY["relevant_snippets_from_recently_opened_files"] = SNIPPETS[4:]


class RecordingScheduler(Scheduler):
    """A Scheduler that keeps the requests as the dialects submitted them."""

    requests: list[Request] = []

    async def submit(self, requests):
        self.requests += requests
        return await super().submit(requests)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = replace(KINDS["gemma-mqa"], context=2048)
    return load(write_tiny_gguf(tmp_path_factory.mktemp("model") / "tiny.gguf", config, "Q8_0"), threads=1)


def submitted(model, route, body, redact=True):
    """The request that a body becomes on a route."""

    async def open_service():
        return RecordingScheduler(model)

    RecordingScheduler.requests = []
    with served(open_service, redact=redact) as server:
        answer = server.post(route, json=body | {"stream": False} if "segments" not in body else body)
        assert answer.status_code == 200, answer.text
    (request,) = RecordingScheduler.requests
    return request


@pytest.mark.parametrize("dialect", [*ROUTES, "Tabby"])
def test_every_route_leaves_secret_files_out_redacts_the_others_and_keeps_the_buffer(model, dialect):
    route, body = ROUTES.get(dialect, ("/v1/completions", {"segments": TABBY}))
    if dialect != "Tabby":
        body = body | {"input_extra": NAMED}
    prompt = submitted(model, route, body).prompt
    files = {file.path: file.text for file in prompt.files}
    assert set(files) == {"secrets.py", "", "lib.py"} and files["lib.py"] == "lib = 1\n"
    assert AWS not in "".join(files.values()) and "EXAMPLE" in files["secrets.py"] and "EXAMPLE" in files[""]
    assert (prompt.prefix, prompt.suffix) == (AROUND["prompt"], AROUND["suffix"])

    prompt = submitted(model, route, body, redact=False).prompt
    assert {(file.path, file.text) for file in prompt.files} == {
        (file["filename"], file["text"]) for file in NAMED
    }


def test_a_stream_is_redacted_too(model):
    route, body = ROUTES["llama.cpp"]

    async def open_service():
        return RecordingScheduler(model)

    RecordingScheduler.requests = []
    with served(open_service) as server:
        answer = server.post(route, json=body | {"input_extra": NAMED, "stream": True, "n_cmpl": 2})
        assert answer.status_code == 200 and answer.text.startswith("data: ")
    assert len(RecordingScheduler.requests) == 2
    for request in RecordingScheduler.requests:
        assert (
            AWS not in "".join(file.text for file in request.prompt.files) and len(request.prompt.files) == 3
        )


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/completion", {"prompt": AROUND["prompt"], "n_predict": 1}),
        ("/v1/completions", {"model": "any", "prompt": AROUND["prompt"], "max_tokens": 1}),
        (
            "/v1/completions",
            {"model": "any", "prompt": AROUND["prompt"], "max_tokens": 0, "logprobs": 1, "echo": True},
        ),
        (
            "/api/generate",
            {"model": "any", "prompt": AROUND["prompt"], "raw": True, "options": {"num_predict": 1}},
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": AROUND["prompt"]}], "max_tokens": 1},
        ),
        ("/api/chat", {"model": "any", "messages": [{"role": "user", "content": AROUND["prompt"]}]}),
    ],
)
def test_prompts_scores_and_chats_are_never_changed(model, route, body):
    prompt = submitted(model, route, body).prompt
    text = prompt.messages[0].text if hasattr(prompt, "messages") else prompt.prompt
    assert text == AROUND["prompt"]
