"""The secrets policy: names that are never read, redaction at a cursor, and the VS Code extension's table."""

import runpy
from pathlib import Path

import pytest

from codegemma.prompts import File
from codegemma.safety.secrets import find_secrets, is_secret_name, redact, redact_at_cursor, safe_files

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
