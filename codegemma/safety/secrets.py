"""Keeps secrets out of prompts: which files never enter, and what is replaced in others (data/redact.py).

The language server and the server's fill-in-the-middle routes use it. scripts/secret_names.py writes the
tables of names into the VS Code extension. What counts as a secret in a text is in
codegemma/data/rules/secrets.toml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING

from codegemma.prompts import File

if TYPE_CHECKING:
    from codegemma.data.personal import Finding

# Patterns are in lower case and match the whole name; * stands for any characters. Names are compared without
# case.
SECRET_FOLDERS = (".ssh", ".gnupg", ".aws", ".kube", ".password-store")
SECRET_PATHS = (  # the last folder and the name
    *(".docker/config.json", "gh/hosts.yml", ".azure/accesstokens.json", ".azure/msal_token_cache.*"),
)
SECRET_FILES = (
    *(".env", ".envrc", "id_rsa", "id_dsa", "id_ecdsa", "id_ed25519", "credentials", "passwords", "passwd"),
    *("*_rsa", "*_dsa", "*_ecdsa", "*_ed25519", "ssh_host_*_key", "token.json", "token.txt", "wallet.dat"),
    *("*.pem", "*.p8", "*.p12", "*.pfx", "*.jks", "*.keystore", "*.kdb", "*.kdbx", "*.ppk", "*.asc", "*.gpg"),
    *("*.tfstate", "kubeconfig", "*.kubeconfig", "known_hosts", "authorized_keys", "*.ovpn"),
    *(".netrc", "_netrc", ".npmrc", ".pypirc", ".pgpass", ".my.cnf", ".htpasswd", ".git-credentials"),
    *(".dockercfg", ".s3cfg", ".boto", ".vault_pass", "service-account*.json", "service_account*.json"),
    *("client_secret*.json", "*firebase-adminsdk*.json", "local.settings.json"),
)
# These names may belong to source code as well (`secrets.py`, `.env.d.ts`) or to a template that is published
# without its values (`.env.example`). Such files are read, with the secrets in them replaced.
SECRET_FILES_UNLESS_CODE = (
    *("*.env", "*.env.*", "*.tfvars", "*.tfvars.*", "credentials.*", "secret.*", "secrets.*"),
    *("*.key", "id_rsa.*", "id_dsa.*", "id_ecdsa.*", "id_ed25519.*"),
    *("id_rsa_*", "id_dsa_*", "id_ecdsa_*", "id_ed25519_*", "password.*", "passwords.*", "kubeconfig.*"),
    *("*-secret.*", "*-secrets.*", "*_secret.*", "*_secrets.*"),
    *("api_key.*", "api_keys.*", "apikey.*", "apikeys.*", "api-key.*", "api-keys.*"),
)
# What editors and people add to the name of a file that they keep as a copy: `.env~`, `#.env#`,
# `.id_rsa.swp`, `id_rsa.old`. Such a file is as its original. TypeScript reads the pattern too.
BACKUP_MARKS = r"^\.?#|(#|~|\.~\d+~|\.(sw[a-p]|bak|backup|old|orig|save|tmp))+$"
TEMPLATE_WORDS = ("example", "sample", "template", "dist")  # among the last two parts of a name, between dots
# Source code by extension. Shell is missing on purpose: a `secrets.sh` is mostly a list of passwords.
CODE_EXTENSIONS = (
    *("c", "cc", "cpp", "cs", "cu", "cxx", "h", "hh", "hpp", "hxx", "m", "mm", "d", "go", "rs", "swift"),
    *("zig", "nim", "py", "pyi", "rb", "php", "pl", "pm", "lua", "r", "jl", "js", "jsx", "mjs", "cjs"),
    *("ts", "tsx", "mts", "cts", "java", "kt", "kts", "scala", "groovy", "clj", "cljs", "cljc", "dart"),
    *("ex", "exs", "erl", "hs", "elm", "ml", "mli", "fs", "vb", "pas", "f90", "el", "lisp", "scm"),
    *("rkt", "sol", "v", "sv", "vhd", "proto", "thrift", "graphql", "gql", "tf", "nix", "vue", "svelte"),
    *("astro", "html", "css", "scss", "less", "erb", "cshtml", "ipynb"),
)
# Languages as editors name them. They decide for `*.key` alone, which is code in some projects. For other
# names they say little: an editor may show a `.env` file or a `credentials.json` in any language.
CODE_LANGUAGES = (
    *("c", "cpp", "csharp", "cs", "objective-c", "objc", "objective-cpp", "d", "go", "rust", "swift", "zig"),
    *("nim", "python", "ruby", "php", "perl", "lua", "r", "julia", "javascript", "javascriptreact"),
    *("typescript", "typescriptreact", "java", "kotlin", "scala", "groovy", "clojure", "dart", "elixir"),
    *("erlang", "haskell", "ocaml", "fsharp", "vb", "vue", "svelte"),
)
MAX_CACHED_CHARACTERS = 100_000  # longer texts are searched again each time


def is_secret_name(path: str, language: str = "") -> bool:
    """Whether a file must never be read into a prompt, by its path alone.

    `path` may have either kind of slash. `language` is the editor's name for the document's language, where
    it is known: it decides for `*.key`.
    """
    *folders, name = re.split(r"[/\\]", path.lower())
    name = re.sub(BACKUP_MARKS, "", name)
    if any(folder in SECRET_FOLDERS for folder in folders) or _matches(name, SECRET_FILES):
        return True
    if _matches("/".join([*folders[-1:], name]), SECRET_PATHS):
        return True
    extension = name.rpartition(".")[2]
    if extension == "key":
        is_read = language in CODE_LANGUAGES
    else:
        is_read = extension in CODE_EXTENSIONS or any(part in TEMPLATE_WORDS for part in name.split(".")[-2:])
    return not is_read and _matches(name, SECRET_FILES_UNLESS_CODE)


def find_secrets(text: str) -> list[Finding]:
    """The credentials in a text, in order and without overlap. Personal data is not among them."""
    from codegemma.data.personal import PERSONAL_DATA
    from codegemma.data.redact import default_redactor

    return [finding for finding in default_redactor().find(text) if finding.kind not in PERSONAL_DATA]


def redact(text: str) -> str:
    """The text with every secret replaced by a fake value."""
    return _cached_redact(text) if len(text) <= MAX_CACHED_CHARACTERS else "".join(redact_at_cursor(text, ""))


@lru_cache(64)  # editors send the same files with every keystroke
def _cached_redact(text: str) -> str:
    return "".join(redact_at_cursor(text, ""))


def redact_at_cursor(prefix: str, suffix: str) -> tuple[str, str]:
    """The text before and after a cursor with every secret replaced, also one that has the cursor inside."""
    text, cursor, end = prefix + suffix, len(prefix), 0
    before, after = "", ""
    for finding in find_secrets(text):
        before += text[end : min(finding.start, cursor)]
        after += text[max(end, cursor) : finding.start]
        # A secret with the cursor inside: its fake value is split at the same number of characters.
        in_before = len(finding.fake) if finding.end <= cursor else max(0, cursor - finding.start)
        before += finding.fake[:in_before]
        after += finding.fake[in_before:]
        end = finding.end
    return before + text[end:cursor], after + text[max(end, cursor) :]


def safe_files(files: Sequence[File]) -> tuple[File, ...]:
    """Other files for a prompt: those with a secret name are left out, the others redacted."""
    return tuple(replace(file, text=redact(file.text)) for file in files if not is_secret_name(file.path))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a name matches a pattern, as it is or without its leading dot."""
    return any(fnmatchcase(form, pattern) for pattern in patterns for form in (name, name.removeprefix(".")))
