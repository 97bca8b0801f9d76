"""Finds the tools of BabelCode's eight languages, and builds and runs programs with them in the sandbox."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from codegemma.files import atomic_directory, cache_dir
from codegemma.sandbox import Limits, Result, Sandbox

INSTALLED = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "codegemma/languages"
BUILD = Limits(seconds=60, memory=2 << 30, disk=256 << 20, processes=256, open_files=1024)
RUN = Limits(seconds=10, memory=1 << 30, processes=256)
BATCH = 24  # programs that one Java virtual machine builds
VERSION_SECONDS = 120.0  # a compiler that has not printed its version by then is broken


@dataclass(frozen=True)
class Language:
    """One entry of languages.toml, which explains the fields."""

    name: str
    source: str
    tools: tuple[str, ...]
    run: tuple[str, ...]
    smoke_test: str
    stop: tuple[str, ...]
    install: str
    closing: str = ""
    build: tuple[str, ...] = ()
    batch: bool = False


def _languages() -> dict[str, Language]:
    text = Path(__file__).with_name("languages.toml").read_text("utf-8")
    table: dict[str, dict[str, Any]] = tomllib.loads(text)
    for entry in table.values():
        entry |= {name: tuple(entry.get(name, ())) for name in ("tools", "run", "build", "stop")}
    return {key: Language(**entry) for key, entry in table.items()}


LANGUAGES = _languages()


@dataclass
class Toolchain:
    """The tools of a language on this machine, with a sandbox that sees their folders."""

    language: Language
    version: str
    paths: dict[str, str]  # by the tool's name
    env: dict[str, str]
    sandbox: Sandbox = field(repr=False)

    @classmethod
    def find_working(cls, key: str, workers: int | None = None) -> Toolchain:
        """The tools of a language, found and tested. Raises LookupError where that fails.

        They must pass a right program, and fail a wrong one and one that does not compile: with a compiler
        that prints its version but cannot link, every answer would be wrong.
        """
        toolchain = cls.find(key, workers)
        programs = [toolchain.language.smoke_test.replace("OP", word) for word in ("+", "-", "+ +* (")]
        results = dict(toolchain.run_all(programs, seconds=60))
        passed = [results[i].outcome == "passed" and "TEST-0...PASSED" in results[i].stdout for i in range(3)]
        if passed != [True, False, False]:
            toolchain.sandbox.close()
            reason = (results[0].stderr.strip() or results[0].stdout.strip() or results[0].outcome)[-300:]
            raise LookupError(
                f"{toolchain.language.name}: {toolchain.version} is there but broken (a right, a wrong and a "
                f"broken program were judged {passed}: {reason}): repair it, or {toolchain.language.install}"
            )
        return toolchain

    @classmethod
    def find(cls, key: str, workers: int | None = None) -> Toolchain:
        """The tools of a language. Raises LookupError, with the remedy, where one is missing or broken."""
        language = LANGUAGES[key]
        paths = {tool: _path(language, tool) for tool in language.tools}
        env: dict[str, str] = {}
        go_cache = None
        if key == "rust":
            home = Path(_output(language, [paths["rustc"], "--print", "sysroot"]))
            paths["rustc"] = str(home / "bin/rustc")
            readonly = [home]
        elif key == "go":
            home = Path(_output(language, [paths["go"], "env", "GOROOT"]))
            go_cache = cache_dir() / "go-build" / (home / "VERSION").read_text().split()[0]
            readonly = [home]
            env = {"GOROOT": str(home), "GOCACHE": str(go_cache)}
            env |= {"GO111MODULE": "off", "CGO_ENABLED": "0", "GOTELEMETRY": "off"}
        else:
            # A sandbox sees the tool's home folder, but no link to it that lies elsewhere.
            resolved = {tool: Path(path).resolve() for tool, path in paths.items()}
            readonly = [path.parent.parent for path in resolved.values()]
            paths |= {tool: str(path) for tool, path in resolved.items() if not _is_in_usr(paths[tool])}
            if "kotlinc" in paths:
                paths["kotlinc"] = str(resolved["kotlinc"].parent.parent)  # its home folder
        readonly = [home for home in readonly if not _is_in_usr(home)]
        toolchain = cls(language, _version(key, paths), paths, env, Sandbox(readonly, workers))
        if go_cache:
            if not go_cache.exists():
                toolchain._fill_cache(go_cache)
            toolchain.sandbox.close()
            toolchain.sandbox = Sandbox([*readonly, go_cache], workers)
        return toolchain

    def command(self, words: Sequence[str]) -> list[str]:
        """The command with each tool's name in braces replaced by its path."""
        for tool, path in self.paths.items():
            words = [word.replace("{" + tool + "}", path) for word in words]
        return list(words)

    def _fill_cache(self, folder: Path) -> None:
        """Compiles Go's standard library once, into a cache that later builds read but cannot write."""
        env = self.env | {"GOCACHE": "/tmp/cache"}
        limits = replace(BUILD, seconds=300)
        files = {self.language.source: self.language.smoke_test.replace("OP", "+")}
        command = self.command(self.language.build)
        result = self.sandbox.run(command, files, env=env, collect=["cache"], limits=limits)
        if result.outcome != "passed":
            fault = f"Go: {self.paths['go']} is there but broken ({result.outcome}: {result.stderr[-500:]})"
            raise LookupError(f"{fault}: repair it, or {self.language.install}")
        try:
            with atomic_directory(folder) as unfinished:
                # Go wants all of these folders, and cannot make them in a cache that is read-only.
                for byte in range(256):
                    (unfinished / f"{byte:02x}").mkdir()
                for name, content in result.files.items():
                    (unfinished / Path(name).relative_to("cache")).write_bytes(content)
        except OSError:
            if not folder.exists():  # else another process has filled it meanwhile
                raise

    def run_all(self, programs: Sequence[str], seconds: float = RUN.seconds) -> Iterator[tuple[int, Result]]:
        """Yields (index, result) as programs, or batches of them, end. One that does not build has failed."""
        limits = replace(RUN, seconds=seconds)
        size = BATCH if self.language.batch else 1
        batches = [range(i, min(i + size, len(programs))) for i in range(0, len(programs), size)]

        def build_and_run(batch: range) -> dict[int, Result]:
            built = self._build({i: programs[i] for i in batch})
            passed = {i: result.files for i, result in built.items() if result.outcome == "passed"}
            return built | {i: self._run(files, limits) for i, files in passed.items()}

        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            for job in as_completed([pool.submit(build_and_run, batch) for batch in batches]):
                yield from job.result().items()

    def _run(self, files: dict[str, bytes], limits: Limits) -> Result:
        if self.language.name == "Python":
            source = files[self.language.source].decode()
            return self.sandbox.run_python(source, must_finish=False, limits=limits)
        return self.sandbox.run(self.command(self.language.run), files, env=self.env, limits=limits)

    def _build(self, programs: dict[int, str]) -> dict[int, Result]:
        """The build of each program by index; the `files` of a build that passed are what the run needs."""
        command, source = self.command(self.language.build), self.language.source
        if not self.language.batch:
            [(i, text)] = programs.items()
            files = {source: text.encode(errors="replace")}
            if not command:
                return {i: Result("passed", 0, "", "", 0.0, files)}
            return {i: self.sandbox.run(command, files, env=self.env, collect=["main.exe"], limits=BUILD)}
        driver = _driver(self.sandbox, self.paths["javac"])
        batch = {f"in/{i}/{source}": text.encode(errors="replace") for i, text in programs.items()} | driver
        limits = replace(BUILD, seconds=60 + 10 * len(programs))
        result = self.sandbox.run(command, batch, env=self.env, collect=["out"], limits=limits)
        if result.outcome != "passed" and len(programs) > 1:  # one of them crashed the compiler: find it
            items, half = list(programs.items()), len(programs) // 2
            return self._build(dict(items[:half])) | self._build(dict(items[half:]))
        if result.outcome != "passed":
            return dict.fromkeys(programs, result)
        return {i: _from_batch(result, i, driver) for i in programs}


def _from_batch(result: Result, i: int, driver: dict[str, bytes]) -> Result:
    """The build of program `i`, from that of its whole batch."""
    start = f"out/{i}/"
    built = {name: content for name, content in result.files.items() if name.startswith(start)}
    files = {"out/" + name.removeprefix(start): content for name, content in built.items()}
    if errors := files.get("out/errors"):
        stderr = errors.decode(errors="replace")
        return replace(result, outcome="failed", exit_code=1, stderr=stderr, files={})
    return replace(result, files=files | driver)


@cache
def _driver(sandbox: Sandbox, javac: str) -> dict[str, bytes]:
    """Batch.java, compiled."""
    files = {"Batch.java": Path(__file__).with_name("Batch.java").read_bytes()}
    result = sandbox.run([javac, "Batch.java"], files, collect=["Batch.class"], limits=BUILD)
    if result.outcome != "passed":
        raise LookupError(
            f"Java: {javac} is there but broken, it cannot build Batch.java ({result.outcome}: "
            f"{result.stderr[-500:]}): repair it, or {LANGUAGES['java'].install}"
        )
    return result.files


def _is_in_usr(path: Path | str) -> bool:
    """Whether every sandbox sees the path."""
    return Path(path).is_relative_to("/usr")


def _path(language: Language, tool: str) -> str:
    folders = f"{INSTALLED / 'go/bin'}:{INSTALLED / 'kotlin/bin'}"
    if path := shutil.which(tool) or shutil.which(tool, path=folders):
        return path
    raise LookupError(f"{language.name}: {tool} not found: {language.install}")


def _output(language: Language, command: Sequence[str]) -> str:
    """What a tool prints. Raises LookupError where it fails (rustup's proxy does, without a toolchain)."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=VERSION_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        fault = f"{language.name}: {command[0]} does not run ({error})"
        raise LookupError(f"{fault}: {language.install}") from error
    if result.returncode != 0 or not result.stdout.strip():
        reason = (result.stderr.strip() or "it prints nothing").splitlines()[0]
        raise LookupError(
            f"{language.name}: {command[0]} is there but broken (exit code {result.returncode}: {reason}): "
            f"repair it, or {language.install}"
        )
    return result.stdout.strip()


def python_version() -> str:
    """The version of the interpreter that runs Python programs."""
    return "Python " + ".".join(map(str, sys.version_info[:3]))


def _version(key: str, paths: dict[str, str]) -> str:
    """The version of a language's compiler or interpreter: what its first tool prints; for Kotlin, what
    kotlinc's build.txt says. Raises LookupError where one of its tools does not run."""
    if key == "python":
        return python_version()
    programs = [path for tool, path in paths.items() if tool != "kotlinc"]
    flag = "version" if key == "go" else "--version"
    versions = [_output(LANGUAGES[key], [program, flag]) for program in programs]
    if key == "kotlin":
        return "Kotlin " + (Path(paths["kotlinc"]) / "build.txt").read_text().strip()
    return versions[0].splitlines()[0]
