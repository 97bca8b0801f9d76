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


# Lines, and the secret in each.
PASSWORD, TOKEN = "xK9mQ2vL7pR4", "s7Q5WQb5f7f2ayrDrYYxOV2EXvyDZhEw"
LINES = {
    f"export AWS_SECRET_ACCESS_KEY={TOKEN}x1bAbQp2": f"{TOKEN}x1bAbQp2",
    f"DB_PASSWORD={PASSWORD}": PASSWORD,
    f"docker run -e DB_PASSWORD={PASSWORD} image": PASSWORD,
    f"  password: {PASSWORD}": PASSWORD,
    f"  - api-key: {TOKEN}  # the key": TOKEN,
    f"spring.datasource.password = {PASSWORD}\r": PASSWORD,
    f'#define API_KEY "{TOKEN}"': TOKEN,
    f'#define WIFI_PASSWORD "{PASSWORD}"': PASSWORD,
    f'os.getenv("API_KEY", "{TOKEN}")': TOKEN,
    f"os.environ.get('DB_PASSWORD', '{PASSWORD}')": PASSWORD,
    f"env('APP_SECRET', '{TOKEN}')": TOKEN,
    f'const apiKey = process.env.API_KEY || "{TOKEN}";': TOKEN,
    f'api_key: str = "{TOKEN}"': TOKEN,
    f'let token: &str = "{TOKEN}";': TOKEN,
    'password = "xK9#mQ2$vL7!"': "xK9#mQ2$vL7!",
    'password = "a%9xK!q2$7"': "a%9xK!q2$7",
    f"<password>{PASSWORD}</password>": PASSWORD,
    f"<ns:apiKey>{TOKEN}</ns:apiKey>": TOKEN,
    f'<add key="Password" value="{PASSWORD}"/>': PASSWORD,
    f"Server=db;User Id=sa;Password={PASSWORD};": PASSWORD,
    'url = "jdbc:postgresql://db/a?user=bob&password=Hunter2xyz!"': "Hunter2xyz!",
    "redis://:aV3ryS3cr7@cache:6379": "aV3ryS3cr7",
    f"Authorization: Bearer {TOKEN}": TOKEN,
    f"curl -H 'authorization: bearer {TOKEN}'": TOKEN,
    "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": "JxkSSVDMf2h5M9GKyljqBn8KUWYd",
    "dop_v1_061fea83537c7fec5779ec6e8af362100fac96c5400c41c842e90114183d260f": "061fea83537c7fec5779ec",
    "dapi486eca887715bd1bd6d282853416d112": "486eca887715bd1bd6d282853416d112",
    "bot = '833541185:AADGJVdktPVT0JrwNVozJzlEYq3NvToq9NT'": "AADGJVdktPVT0JrwNVozJzlEYq3NvToq9NT",
    "AGE-SECRET-KEY-1FXXMRAFH53EQCLUNNC5JTXLTUFAX855L45A5LED20V0R5R46PKHH6DJW5E": "FXXMRAFH53EQCLUNNC5J",
    "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": "KbdSwLiLiiqrzKzlNfoFalHuGPCROUopuF",
}


@pytest.mark.parametrize(("line", "secret"), LINES.items())
def test_credentials_of_every_notation_are_replaced(line, secret):
    text = f"a = 1\n{line}\nb = 2\n"
    once = redact(text)
    assert secret in line and secret not in once and "EXAMPLE" in once and redact(once) == once
    assert once.startswith("a = 1\n") and once.endswith("\nb = 2\n") and once.count("\n") == 3


@pytest.mark.parametrize("end", ["", "\n", "\n\ndef f(x):\n    return x\n", '"\nkey = load(a)\n'])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\n    ", "\\n"])
def test_a_private_key_is_replaced_also_without_its_end(end, newline):
    lines = [f"{TOKEN}{TOKEN}"[number:] for number in range(6)] + ["CLGElG3wmBZernoWjiXnbkFx=="]
    text = newline.join(["a = 1\n-----BEGIN PRIVATE KEY-----", *lines])
    once = redact(text + end)
    assert TOKEN[8:] not in once and "CLGE" not in once and once.endswith(end) and redact(once) == once


FALSE_FRIENDS = r"""
password = input("Password: ")
password: str
password: SecretStr
password=password
  password=self.password2Fa,
password = os.environ["DB_PASSWORD"]
DB_PASSWORD=${DB_PASSWORD}
DB_PASSWORD=$(cat /run/secrets/db)
DB_PASSWORD=$DB_PASSWORD_V2
DB_PASSWORD=changeme123
DB_PASSWORD: ${{ secrets.DB_PASSWORD }}
password: {{ vault_password_1 }}
password: !vault |
password: *base64Ref1
password: Base64EncodedString
token: Sha256TokenV2
token = tokens[i]
token = token_at_1
token = Lexer2.nextToken
token: 2024-01-02T10:00:00Z
token: 550e8400-e29b-41d4-a716-446655440000
token_type = "Bearer"
tokenizer = "gemma-tokenizer-v2"
tokenizer: Gemma2Tokenizer3B4x
tokenization = "WordPiece-v2-uncased-30522"
secretary = "Room-B12-Floor-3-East"
secretName: my-app-db2-tls-v1
secret: k8s-v1-db2-tls
secret_key = load_key_2
SECRET_KEY_BASE_LENGTH = 64
PASSWORD_FIELD = "password"
PWD=/home/jo/p1/B2/c3D4
API_KEY = settings.API_KEY
API_KEY=YOUR_API_KEY_1
#define TOKEN_NAME "identifier"
#define PASSWORD_MAX 128
#define TOKEN_KIND_2 "L_PAREN"
os.getenv("API_KEY", "")
os.getenv("API_KEY_NAME", "default-key")
os.environ.get("TOKEN", "none")
api_key = config.get("api_key")
<password>changeme</password>
<password>${db.password}</password>
<token>IDENTIFIER</token>
<input type="password" name="password">
<string name="password">Passwort</string>
Server=db;User Id=sa;Password={0};
Server=db;Password=<your password>;
"?password=" + encodeURIComponent(p1)
redis://:${REDIS_PASSWORD}@cache:6379
redis://:password@cache:6379
http://localhost:8080/a@b
Authorization: Bearer <token>
Authorization: Bearer $TOKEN
Authorization: Bearer YOUR_ACCESS_TOKEN_HERE_1
// the Bearer authentication-scheme of RFC 6750
commit = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
integrity="sha384-oqVuAfXRKap7fdgcCY5uykM6+R9GqQ8K/uxy9rx7HNQlGYl1kPzQho1wx4JwY8wC"
id = "550e8400-e29b-41d4-a716-446655440000"
dapi_request_id_of_the_client
ratio = 12345678:AA
hf_hub_download_with_a_long_name_x
def dop_v1_handler(request):
-----BEGIN PRIVATE KEY-----
passwordHash = hashPassword(password)
auth_token_url = "https://x.io/oauth/token"
password = "{{ password_1 }}"
password = "%s-%s-Pw1"
if password === confirmPassword2:
if (token == null) token = T2x;
print(f"password={user.password1}")
let token: Token2 = lexer.next();
token := p.next2()
password := r.FormValue("password1")
""".strip().split("\n")


@pytest.mark.parametrize("line", FALSE_FRIENDS)
def test_what_only_looks_like_a_credential_stays(line):
    assert redact(f"a = 1\n{line}\nb = 2\n") == f"a = 1\n{line}\nb = 2\n"


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
