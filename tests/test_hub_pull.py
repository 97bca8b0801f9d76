"""Downloads against a server on this machine that behaves as badly as the real ones; packs; the terms."""

import errno
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import tiny_config, write_tiny_gguf, write_tiny_hf

from codegemma import hub
from codegemma.checkpoints import open_checkpoint
from codegemma.convert.convert import convert
from codegemma.hub import pull as hub_pull

BODY = bytes(range(256)) * 20_000
SHA = hashlib.sha256(BODY).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers with the next entry of `script`, after the last as a good server; `requests` records all."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.body, self.etag, self.files = [], [], BODY, '"first"', {}
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        planned = server.script.pop(0) if server.script else None
        if self.path in server.files:
            return self._send(200, json.dumps(server.files[self.path]).encode())
        if isinstance(planned, int):
            return self._send(
                planned,
                b"no",
                {"Retry-After": "0", **({"X-Error-Code": "GatedRepo"} if planned == 403 else {})},
            )
        if isinstance(planned, str):
            return self._send(302, b"", {"Location": planned})
        body, start = server.body, 0
        if "Range" in self.headers and self.headers.get("If-Range") == server.etag:
            start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.send_response(206 if start else 200)
        for key, value in (("ETag", server.etag), ("Content-Length", str(len(body) - start))):
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[start:][: planned["cut"]] if isinstance(planned, dict) else body[start:])
        if isinstance(planned, dict):
            self.close_connection = True
        return None

    def _send(self, code, body, headers=None):
        self.send_response(code)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_interrupted_download_is_continued(server, tmp_path):
    server.script = [{"cut": 1_000_000}, 503, {"cut": 2_000_000}, 429]
    reports = []
    file = hub_pull.fetch(
        f"{server.url}/m.gguf", tmp_path / "m.gguf", sha256=SHA, progress=lambda *a: reports.append(a)
    )
    assert file.read_bytes() == BODY and [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    starts = [int(headers["Range"][6:-1]) for _, headers in server.requests if "Range" in headers]
    assert starts[0] == 1_000_000 and starts[-1] == 3_000_000
    assert reports[-1] == ("m.gguf", len(BODY), len(BODY))
    count = len(server.requests)
    assert hub_pull.fetch(f"{server.url}/m.gguf", file, sha256=SHA) == file and len(server.requests) == count


def test_a_file_that_changed_meanwhile_is_downloaded_again(server, tmp_path):
    server.script = [{"cut": 1_000_000}] + [{"cut": 10}] * 4
    with pytest.raises(ValueError, match="was cut 5 times.*the received part is kept"):
        hub_pull.fetch(f"{server.url}/m.gguf", tmp_path / "m.gguf")
    server.body, server.etag = BODY[::-1], '"second"'
    assert hub_pull.fetch(f"{server.url}/m.gguf", tmp_path / "m.gguf").read_bytes() == BODY[::-1]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([401], "answered 401: a token is needed"),
        ([403], "answered 403: accept the model's terms"),
        ([404], "answered 404: check the address"),
        ([500] * 5, "answered 500 5 times: try again later"),
    ],
)
def test_refusals_are_explained(server, tmp_path, script, message):
    server.script = script
    with pytest.raises(ValueError, match=message):
        hub_pull.fetch(f"{server.url}/m.gguf", tmp_path / "m.gguf")


def test_a_wrong_hash_leaves_nothing(server, tmp_path):
    with pytest.raises(ValueError, match="has the SHA-256 .* but 00 was expected"):
        hub_pull.fetch(f"{server.url}/m.gguf", tmp_path / "d" / "m.gguf", sha256="00")
    assert not list((tmp_path / "d").glob("*.gguf*"))
    with pytest.raises(ValueError, match="only http and https"):
        hub_pull.fetch("file:///etc/passwd", tmp_path / "x")


def test_a_token_is_not_sent_to_another_host(server, tmp_path):
    other = f"{server.url.replace('127.0.0.1', 'localhost')}/elsewhere"
    server.script = [other]
    hub_pull.fetch(f"{server.url}/m.gguf", tmp_path / "m.gguf", token="secret")
    assert (
        server.requests[0][1]["Authorization"] == "Bearer secret"
        and "Authorization" not in server.requests[1][1]
    )


def test_the_terms_are_asked_once_and_nothing_is_downloaded_without_them(server, tmp_path):
    asked = []
    with pytest.raises(ValueError, match="terms were not accepted"):
        hub_pull.pull(f"{server.url}/m.gguf", "url", ask=lambda text: asked.append(text))
    assert "ai.google.dev/gemma/terms" in asked[0] and not server.requests
    for _ in range(2):
        hub_pull.pull(f"{server.url}/m.gguf", "url", ask=lambda text: bool(asked.append(text) or True))
    assert len(asked) == 2 and (hub.cache_dir() / "gemma-terms.json").exists()


def test_ngc_lists_then_downloads(server, monkeypatch):
    monkeypatch.setenv("CODEGEMMA_NGC", server.url)
    monkeypatch.setenv("NGC_API_KEY", "key")
    server.files["/codegemma_2b_base/versions/1.0/files"] = {"modelFiles": [{"path": "codegemma.nemo"}]}
    path = hub_pull.pull("2b", "ngc", ask=lambda _: True)
    assert path == hub.cache_dir() / "models" / "2b" / "codegemma.nemo" and path.read_bytes() == BODY
    assert all(headers["Authorization"] == "Bearer key" for _, headers in server.requests)
    with pytest.raises(ValueError, match="NGC has only 2b, 7b"):
        hub_pull.pull("7b-it", "ngc", ask=lambda _: True)
    with pytest.raises(ValueError, match="no model 'nosuch' on kaggle"):
        hub_pull.pull("nosuch", "kaggle", ask=lambda _: True)


def test_a_pack_carries_a_model_to_a_machine_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here"))
    write_tiny_hf(hub.cache_dir() / "models" / "2b", tiny_config("gemma-mqa"))
    pack = hub_pull.pack(hub.resolve("2b"), tmp_path / "2b.pack", "codegemma-2b")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match="notes was not written by codegemma, and is kept"):
        hub_pull.pack(hub.resolve("2b"), tmp_path / "notes", "codegemma-2b")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "there"))
    path = hub_pull.install(pack)
    assert hub.resolve("2b") == path == hub.cache_dir() / "models" / "2b"
    assert (path / "model.safetensors").read_bytes() == (
        tmp_path / "here/codegemma/models/2b/model.safetensors"
    ).read_bytes()
    assert hub_pull.install(pack) == path
    (path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="another model of this name: run `codegemma models --remove 2b`"):
        hub_pull.install(pack)
    assert (path / "config.json").read_text() == "{}"
    raw = bytearray(pack.read_bytes())
    raw[-20_000] ^= 1
    (tmp_path / "bad.pack").write_bytes(raw)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "elsewhere"))
    with pytest.raises(ValueError, match="has another SHA-256 than the pack states: copy it again"):
        hub_pull.install(tmp_path / "bad.pack")
    assert not (hub.cache_dir() / "models" / "2b").exists()


def test_kaggle_is_asked_for_the_published_variants_and_its_refusal_is_explained(tmp_path, monkeypatch):
    kagglehub = pytest.importorskip("kagglehub")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = []
    monkeypatch.setattr(kagglehub, "model_download", lambda handle: asked.append(handle) or str(tmp_path))
    for name in ("2b", "codegemma-1.1-2b", "7b", "7b-it", "google/codegemma-1.1-7b-it"):
        assert hub_pull.pull(name, "kaggle", ask=lambda _: True) == tmp_path
    assert [handle.removeprefix("google/codegemma/flax/") for handle in asked] == [
        "2b-pt",
        "1.1-2b-pt",
        "7b-pt",
        "7b-it",
        "1.1-7b-it",
    ]

    def refuse(handle):
        raise RuntimeError("403 Client Error: you need to consent")

    monkeypatch.setattr(kagglehub, "model_download", refuse)
    with pytest.raises(
        ValueError, match="Kaggle refused CodeGemma 2B .403 Client.*KAGGLE_USERNAME and KAGGLE_KEY"
    ):
        hub_pull.pull("2b", "kaggle", ask=lambda _: True)
    with pytest.raises(ValueError, match="is not on Kaggle: use --source hf"):
        hub_pull.pull("gemma-3-270m", "kaggle", ask=lambda _: True)


def test_a_full_disk_is_explained(server, tmp_path, monkeypatch):
    def full(*_, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hub_pull, "fetch", full)
    with pytest.raises(ValueError, match="is full: make room, or set XDG_CACHE_HOME"):
        hub_pull.pull(f"{server.url}/m.gguf", "url", ask=lambda _: True)


def test_a_full_disk_is_explained_when_a_pack_is_installed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack = hub_pull.pack(write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa")), tmp_path / "m.pack")
    with monkeypatch.context() as patch:
        patch.setattr(hub_pull.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(ValueError, match=r"m\.pack: takes .* GB, more than .*models has free: make room"):
            hub_pull.install(pack)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hub_pull.shutil, "copyfileobj", full)
        with pytest.raises(ValueError, match=r"is full: make room, or set XDG_CACHE_HOME .* disk$"):
            hub_pull.install(pack)
    assert not list((hub.cache_dir() / "models").iterdir())
    assert hub_pull.install(pack).read_bytes() == (tmp_path / "m.gguf").read_bytes()


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        *((raw, "is no readable pack .*: copy it again") for raw in (b"[]", b"{}", b"3", b"\xff", b"{")),
        (b'{"name": "m", "files": [["m", "0"]]}', "is no readable pack .*: copy it again"),
        *(
            (b'{"name": "%s", "files": {}}' % name, "is no name of a model: rename the model that was packed")
            for name in (b"../x", b"", b".x", b"a/b", b"local", b"urls")
        ),
    ],
)
def test_a_pack_with_a_wrong_manifest_is_named(tmp_path, monkeypatch, manifest, message):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pack = tmp_path / "p.pack"
    with tarfile.open(pack, "w") as archive:
        info = tarfile.TarInfo("codegemma-pack.json")
        info.size = len(manifest)
        archive.addfile(info, io.BytesIO(manifest))
    with pytest.raises(ValueError, match=rf"p\.pack: .*{message}"):
        hub_pull.install(pack)
    assert not (hub.cache_dir() / "models").exists()


@pytest.mark.parametrize("source", ["hf", "kaggle", "ngc", "path"])
def test_a_hash_is_only_for_urls(tmp_path, source):
    with pytest.raises(
        ValueError, match=f"the hash of a URL's file, but the source is {source}: leave it out"
    ):
        hub_pull.pull("2b", source, ask=lambda _: pytest.fail("asked"), sha256=SHA)


def test_a_packed_orbax_checkpoint_is_found_where_it_was_installed(tmp_path, monkeypatch):
    """What `pull --source kaggle` downloads."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa"), "BF16")
    path = convert(source, tmp_path / "kagglehub" / "2", "orbax").path
    hub_pull.install(hub_pull.pack(path, tmp_path / "7b.pack", "7b"))
    assert hub.resolve("7b") == hub.cache_dir() / "models" / "7b"
    assert open_checkpoint(hub.resolve("7b")).tensors.keys() == open_checkpoint(source).tensors.keys()


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil-pack", "a/../../evil"])
def test_a_pack_cannot_write_outside_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with tarfile.open(tmp_path / "p", "w") as archive:
        for member, data in (
            ("codegemma-pack.json", json.dumps({"name": "m", "files": {name: SHA}}).encode()),
            (name, b"x"),
        ):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    with pytest.raises(ValueError, match="may be an attack"):
        hub_pull.install(tmp_path / "p")
    assert not list(tmp_path.rglob("evil*"))
    (tmp_path / "q").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match="no readable pack"):
        hub_pull.install(tmp_path / "q")


def test_a_path_is_copied_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa"))
    path = hub_pull.pull(str(source), "path", ask=lambda _: True)
    assert path.read_bytes() == source.read_bytes() and hub.cache_dir() in path.parents
    assert hub_pull.pull(str(source), "path", ask=lambda _: True) == path
    write_tiny_gguf(source, tiny_config("gemma-mqa"), seed=5)
    with pytest.raises(
        ValueError, match="another model of this name: run `codegemma models --remove m.gguf`"
    ):
        hub_pull.pull(str(source), "path", ask=lambda _: True)
    assert path.read_bytes() != source.read_bytes()
    with pytest.raises(FileNotFoundError):
        hub_pull.pull(str(tmp_path / "none"), "path", ask=lambda _: True)


def test_a_folder_is_copied_once_and_another_of_its_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source, deep = tmp_path / "model", tmp_path / "model" / "weights" / "0"
    deep.parent.mkdir(parents=True)
    deep.write_bytes(b"weights")
    path = hub_pull.pull(str(source), "path", ask=lambda _: True)
    assert path == hub_pull.pull(str(source), "path", ask=lambda _: True)
    assert (path / "weights" / "0").read_bytes() == b"weights"
    deep.write_bytes(b"changed")
    with pytest.raises(
        ValueError, match="holds another model of this name: run `codegemma models --remove model`"
    ):
        hub_pull.pull(str(source), "path", ask=lambda _: True)
    assert (path / "weights" / "0").read_bytes() == b"weights"
    hub.remove("model")
    assert (
        hub_pull.pull(str(source), "path", ask=lambda _: True) / "weights" / "0"
    ).read_bytes() == b"changed"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_fills_while_a_folder_is_copied_is_one_error_with_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_bytes(b"weights")

    def full(path, out):
        with open("/dev/full", "wb", buffering=0) as device:
            device.write(path.read_bytes())

    monkeypatch.setattr(hub_pull, "_copy", full)
    with pytest.raises(ValueError, match="the disk of .*codegemma is full: make room, or set [^;]*$"):
        hub_pull.pull(str(tmp_path / "model"), "path", ask=lambda _: True)
    assert [*(tmp_path / "cache" / "codegemma" / "models" / "local").iterdir()] == []


# ---------------------------------------------------------------------- the Hugging Face Hub's interface
REPO, COMMIT = "google/codegemma-2b", "c" * 40
FILES = {"config.json": b"{}", "model.safetensors": BODY[:100_000], "tokenizer.model": b"t"}
CODE = (
    "from codegemma.hub import pull as hub_pull\n"
    "import sys\n"
    "try: print(hub_pull.pull(sys.argv[1], ask=lambda _: True))\n"
    "except ValueError as error: print('refused:', error)"
)


class HubHandler(Handler):
    """model_info, then each file: HEAD with the Hub's headers, a redirect for large files, GET by ranges."""

    def do_GET(self):
        server = self.server
        server.requests.append((self.path, dict(self.headers)))
        if server.script:
            code, error = server.script[0]
            return self._send(
                code, b'{"error":"no"}', {"X-Error-Code": error, "Retry-After": "0"} if error else {}
            )
        if "/tree/" in self.path:
            return self._send(
                200,
                json.dumps(
                    [
                        {
                            "type": "file",
                            "path": name,
                            "size": len(body),
                            "oid": hashlib.sha256(body).hexdigest()[:40],
                            **(
                                {
                                    "lfs": {
                                        "oid": hashlib.sha256(body).hexdigest(),
                                        "size": len(body),
                                        "pointerSize": 100,
                                    }
                                }
                                if name.endswith("safetensors")
                                else {}
                            ),
                        }
                        for name, body in FILES.items()
                    ]
                ).encode(),
            )
        if self.path.startswith("/api/"):
            siblings = [{"rfilename": name} for name in FILES]
            answer = {
                "id": REPO,
                "modelId": REPO,
                "sha": COMMIT,
                "siblings": siblings,
                "tags": [],
                "private": False,
            }
            return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        name = next(name for name in FILES if self.path.endswith(f"/{name}"))
        body, large = FILES[name], name.endswith("safetensors")
        sha = hashlib.sha256(body).hexdigest()
        headers = {
            "X-Repo-Commit": COMMIT,
            "ETag": f'"{sha if large else sha[:40]}"',
            "Content-Length": str(len(body)),
        }
        if large and not self.path.startswith("/cdn"):
            headers |= {
                "X-Linked-ETag": headers["ETag"],
                "X-Linked-Size": str(len(body)),
                "Content-Length": "0",
            }
            return self._send(302, b"", {**headers, "Location": f"{server.url}/cdn/{name}"})
        if server.body is not BODY and large:  # another content of the same size
            body = body[::-1]
        return self._send(200, b"" if self.command == "HEAD" else body, headers)


def _pull(server, tmp_path, name="2b", **env):
    environment = {
        **os.environ,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **env,
    }
    run = subprocess.run(
        [sys.executable, "-c", CODE, name], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip().splitlines()[-1]


@pytest.fixture
def hugging_face(server):
    pytest.importorskip("huggingface_hub")
    server.RequestHandlerClass = HubHandler
    return server


def test_the_hub_sends_files_once(hugging_face, tmp_path):
    path = Path(_pull(hugging_face, tmp_path))
    assert {file.name: file.read_bytes() for file in path.iterdir()} == FILES and COMMIT in str(path)
    downloads = len([path for path, _ in hugging_face.requests if "/cdn/" in path])
    assert _pull(hugging_face, tmp_path) == str(path)
    assert len([path for path, _ in hugging_face.requests if "/cdn/" in path]) == downloads
    assert _pull(hugging_face, tmp_path, HF_HUB_OFFLINE="1") == str(path)


def test_a_file_with_a_wrong_hash_is_removed(hugging_face, tmp_path):
    hugging_face.body = b"other"
    assert "wrong SHA-256" in _pull(hugging_face, tmp_path)
    hugging_face.body = BODY
    assert Path(_pull(hugging_face, tmp_path), "model.safetensors").read_bytes() == FILES["model.safetensors"]


QUANTISATIONS = {
    **dict.fromkeys(("config.json", "g-Q4_K_M.gguf", "g-Q8_0.gguf", "mmproj-F16.gguf"), b"{}"),
    **dict.fromkeys((f"BF16/g-{part}-of-00002.gguf" for part in ("00001", "00002")), b"part"),
}


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("o/g-GGUF", ["g-Q4_K_M.gguf"]),
        ("o/g-GGUF:q8_0", ["g-Q8_0.gguf"]),
        ("o/g-GGUF:BF16", ["g-00001-of-00002.gguf", "g-00002-of-00002.gguf"]),
        ("2b:Q8_0", ["g-Q8_0.gguf"]),
    ],
)
def test_of_several_quantisations_one_is_fetched(hugging_face, tmp_path, monkeypatch, name, files):
    monkeypatch.setattr(sys.modules[__name__], "FILES", QUANTISATIONS)
    path = Path(_pull(hugging_face, tmp_path, name))
    assert path.name == files[0]
    fetched = {file.name for file in (tmp_path / "hf").rglob("*.gguf")}
    assert fetched == set(files) and not any("mmproj" in path for path, _ in hugging_face.requests)
    repository = "google/codegemma-2b-GGUF" if name.startswith("2b") else "o/g-GGUF"
    assert any(f"/{repository}/" in path for path, _ in hugging_face.requests)
    assert _pull(hugging_face, tmp_path, name, HF_HUB_OFFLINE="1") == str(path)


def test_a_missing_quantisation_is_named_and_nothing_is_fetched(hugging_face, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "FILES", QUANTISATIONS)
    assert "no quantisation 'Q6_K': there is BF16, Q4_K_M, Q8_0" in _pull(hugging_face, tmp_path, "o/g:Q6_K")
    assert not list((tmp_path / "hf").rglob("*.gguf"))


def test_beside_safetensors_a_gguf_is_fetched_only_by_name(hugging_face, tmp_path, monkeypatch):
    """As in google/codegemma-2b, whose GGUF file is a second copy in float32."""
    monkeypatch.setattr(sys.modules[__name__], "FILES", FILES | {"codegemma-2b.gguf": b"x"})
    assert Path(_pull(hugging_face, tmp_path)).is_dir()
    assert not list((tmp_path / "hf").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, "GatedRepo"), "is gated: accept the terms at https://huggingface.co/google/codegemma-2b"),
        ((401, "RepoNotFound"), "does not exist or your token may not see it"),
        ((404, "RepoNotFound"), "does not exist"),
        ((403, None), "the Hub answered 403: ask for access"),
        ((429, None), "answered 429: too many requests"),
        ((500, None), "answered 500: try again later"),
    ],
)
def test_the_hubs_refusals_are_explained(hugging_face, tmp_path, answer, message):
    hugging_face.script = [answer]
    assert message in _pull(hugging_face, tmp_path)


def test_without_a_network_the_remedy_is_named(hugging_face, tmp_path):
    assert "unset HF_HUB_OFFLINE" in _pull(hugging_face, tmp_path, HF_HUB_OFFLINE="1")
