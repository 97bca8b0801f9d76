"""The data pipeline beside its peers, in one run on the same text: MB/s of one core, and ratios.

    python benchmarks/data.py [--megabytes 200] [--peers .venv-bench-data/bin/python] [--skip-memory]

The text is the source of installed packages. Peers run one after the other in an environment of their own
(requirements-data.txt), on a sample that takes them some seconds. Times are CPU times of one process, but for
the complete build, which is wall time.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

MB = 1_000_000


def corpus(folder: Path, megabytes: float, copies: int = 1) -> list[str]:
    """Writes the source of installed packages to a folder, up to a size. A copy differs in a comment only."""
    roots = [Path(sysconfig.get_paths()["purelib"]), Path(sysconfig.get_paths()["stdlib"])]
    endings = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".js", ".ts", ".go", ".rs", ".java"}
    files = sorted(
        {
            file
            for root in roots
            for file in root.rglob("*.*")
            if file.suffix in endings
            and file.is_file()
            and "node_modules" not in file.parts
            and file.stat().st_size < MB
        }
    )
    random.Random(0).shuffle(files)
    size, used = 0, set()
    for file in files:
        root = next(root for root in roots if file.is_relative_to(root))
        if file in used or size > megabytes * MB:
            continue
        used.add(file)
        text = file.read_bytes().decode("utf-8", "replace")
        size += len(text.encode())
        for copy in range(copies):
            path = file.relative_to(root)
            repository = folder / f"{path.parts[0].removesuffix(file.suffix)}-{copy}"
            target = repository / path
            target.parent.mkdir(parents=True, exist_ok=True)
            mark = (
                f" marker_{copy}_of_the_text" if copy else ""
            )  # keeps copies from being dropped as duplicates
            target.write_text(text.replace(":\n", f":  #{mark}\n") if mark else text)
            (repository / "Makefile").touch()
    return [str(folder)]


def texts(folder: Path, megabytes: float) -> list[tuple[str, str]]:
    """(path, text) of the files in a folder, up to a size."""
    texts_read, size = [], 0
    for file in sorted(path for path in folder.rglob("*.*") if path.is_file()):
        text = file.read_text("utf-8", "replace")
        texts_read.append((str(file.relative_to(folder)), text))
        size += len(text.encode())
        if size > megabytes * MB:
            break
    return texts_read


def timed(call, items) -> float:
    """CPU seconds of a call for each item."""
    start = time.process_time()
    for item in items:
        call(item)
    return time.process_time() - start


# ------------------------------------------------------------------------------ peers, in their environment
def peer(name: str, items: list[tuple[str, str]]) -> float:
    """Seconds of CPU that a peer takes for the texts."""
    import logging

    logging.disable(logging.CRITICAL)
    if name == "datatrove minhash":
        from datatrove.pipeline.dedup import MinhashDedupSignature
        from datatrove.pipeline.dedup.minhash import MinhashConfig

        step = MinhashDedupSignature(
            tempfile.mkdtemp(), MinhashConfig(n_grams=5, num_buckets=21, hashes_per_bucket=6)
        )
        step.get_signature(step.get_shingles("warm up the tokenizer of this thing"))
        return timed(
            lambda item: step.get_signature(step.get_shingles(item[1])) if len(item[1]) > 200 else None, items
        )
    if name == "datasketch":
        import re

        from datasketch import MinHash

        def sketch(item):
            words = re.findall(r"\w+", item[1].lower())
            grams = {" ".join(words[i : i + 5]).encode() for i in range(max(1, len(words) - 4))}
            MinHash(num_perm=126).update_batch(grams)

        return timed(sketch, items)
    if name == "datatrove pii":
        from datatrove.pipeline.formatters import PIIFormatter

        return timed(PIIFormatter().format, [text for _, text in items])
    if name == "detect-secrets":
        from detect_secrets import SecretsCollection
        from detect_secrets.settings import default_settings

        folder, files = Path(tempfile.mkdtemp()), []
        for number, (path, text) in enumerate(items):
            files.append(folder / f"{number}{Path(path).suffix}")
            files[-1].write_text(text)
        with default_settings():
            return timed(lambda file: SecretsCollection().scan_file(str(file)), files)
    if name == "data-prep-toolkit order":
        import pandas
        from dpk_repo_level_order.internal.sorting.semantic_ordering import sort_sem

        names = {".py": "Python", ".c": "C", ".h": "C", ".cpp": "C++", ".js": "JavaScript", ".go": "Go"}
        rows = [
            {
                "title": path,
                "new_title": path,
                "contents": text,
                "language": names[Path(path).suffix],
                "ext": Path(path).suffix,
                "repo_name": "r/r",
            }
            for path, text in items
            if Path(path).suffix in names
        ]
        frame = pandas.DataFrame(rows)
        return timed(lambda frame: sort_sem(frame, logging.getLogger("quiet")), [frame])
    raise ValueError(name)


# ------------------------------------------------------------------------------------------------------- ours
def ours(name: str, items: list[tuple[str, str]]) -> float:
    """CPU seconds of one of our steps for the texts."""
    import numpy as np

    from codegemma.data import dedup, graph, redact
    from codegemma.data.documents import Document, language_of

    if name == "minhash":
        return timed(lambda item: dedup.signatures([np.unique(dedup.ngrams(dedup.words(item[1]), 5))]), items)
    if name == "secrets and personal data":
        return timed(redact.Redactor(), [text for _, text in items])
    documents = [Document("r", path, text, language_of(path, text)) for path, text in sorted(items)]
    return timed(lambda docs: graph.order("r", docs), [documents])


def compare(folder: Path, python: str) -> None:
    """Each of our steps and its peer, one after the other, on a sample that takes the peer some seconds."""
    pairs = [
        ("minhash", "datatrove minhash", 4),
        ("minhash", "datasketch", 8),
        ("secrets and personal data", "detect-secrets", 1),
        ("secrets and personal data", "datatrove pii", 8),
        ("repository order", "data-prep-toolkit order", 2),
    ]
    for step, name, share in pairs:
        items = texts(folder, share)
        size = sum(len(text.encode()) for _, text in items) / MB
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(items, file)
            file.flush()
            run = subprocess.run(
                [python, __file__, "--peer", name, file.name], capture_output=True, text=True
            )
        theirs = size / float(run.stdout.split()[-1]) if run.returncode == 0 else float("nan")
        if run.returncode:
            print(f"{name} did not run: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        ours(step, items[:20])  # loads grammars, rules and tables
        speed = size / ours(step, items)
        print(
            f"{step:28} {speed:8.2f} MB/s   {name:24} {theirs:8.3f} MB/s   ratio {speed / theirs:8.1f}",
            flush=True,
        )


def full_build(sources: list[str], out: Path, workers: int, threshold: float = 0.8) -> dict:
    """A complete build: its wall time, and the times of its stages."""
    from codegemma.cli.data import load_tokenizer
    from codegemma.data.build import build
    from codegemma.data.recipe import BuildRecipe

    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    build(sources, out, load_tokenizer("gemma-3-270m"), BuildRecipe(threshold=threshold), workers=workers)
    return {**json.loads((out / "timing.json").read_text()), "wall": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=float, default=200)
    parser.add_argument("--peers", default=".venv-bench-data/bin/python")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--peer", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        print(peer(options.peer[0], json.loads(Path(options.peer[1]).read_text())))
        return
    sys.path.insert(0, str(Path(__file__).parent.parent))
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "corpus", Path(scratch) / "out"
        sources = corpus(folder, options.megabytes)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / MB
        print(f"{size:.0f} MB of source in {sum(file.is_file() for file in folder.rglob('*.*')):,} files")
        compare(folder, options.peers)
        single, double = (full_build(sources, out, workers) for workers in (1, 2))
        print(
            f"whole pipeline: {size / single['wall']:.2f} MB/s with one worker, "
            f"{size / double['wall']:.2f} with two, {single['wall'] / double['wall']:.2f} times"
        )
        for stage in ("documents", "clean", "minhash", "link", "order", "rows"):
            seconds = single[stage]["seconds"]
            print(
                f"  {stage:10} {seconds:8.1f} s  {seconds / single['wall']:6.1%}  "
                f"{size / max(seconds, 1e-9):8.1f} MB/s"
            )
        if not options.skip_memory:
            shutil.rmtree(folder)
            large = full_build(corpus(folder, options.megabytes, copies=5), out, 2, threshold=1.0)
            peak = [
                max(stage.get("peak_bytes", 0) for stage in run.values() if isinstance(stage, dict)) / MB
                for run in (double, large)
            ]
            print(f"peak memory of a worker: {peak[0]:.0f} MB, with five times the input {peak[1]:.0f} MB")


if __name__ == "__main__":
    main()
