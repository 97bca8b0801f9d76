"""The engines that ours is compared with. Each runs in its own process, which speaks JSON lines.

    with Peer("llamacpp", "model.gguf", threads=2, context=4096) as peer:      # from any environment
        peer("prefill", ids=[...])                -> {"seconds"}
        peer("decode", ids=[...], count=32)       -> {"seconds", "tokens"}     the prompt is not timed
        peer("eval_prompt", ids=[...])            -> {"seconds", "token", "evaluated"}
        peer("logits", ids=[...], path="x.npy")   -> {"path"}                  float32 [T, V]
        peer("choose", rows=[...])                -> {"seconds", "right"}      rows: context, choices, label

The child runs in the bench environment (`make bench-env`), OpenVINO in one of its own, and only while the
parent waits for its answer. It measures the seconds around the engine's calls. The first call of a command
may compile: it is not to be counted. Greedy decoding never stops at an end token.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np

ROOT = Path(__file__).parent.parent
PYTHON = ROOT / ".venv-bench" / "bin" / "python"
OPENVINO = ROOT / ".venv-openvino" / "bin"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "codegemma")
BENCH = CACHE / "bench"  # models that only benchmarks read
BUILD_NOTE = PYTHON.parent.parent / "llama.cpp-build"  # how llama.cpp was compiled, if not by its defaults


def exported(model: str = "gemma-3-270m") -> Path:
    """A model as transformers reads it, converted once."""
    folder = BENCH / f"{Path(model).name}-hf"
    if not folder.exists():
        convert = ["convert", model, str(folder), "--to", "safetensors", "--dtype", "bf16"]
        subprocess.run([sys.executable, "-m", "codegemma.cli", *convert], check=True)
    return folder


def exported_for_openvino(weights: Literal["int8", "int4"], model: str = "gemma-3-270m") -> Path:
    """A model as OpenVINO reads it, converted once. Raises RuntimeError where the export fails."""
    folder = BENCH / f"{Path(model).name}-openvino-{weights}"
    if folder.exists():
        return folder
    _check_installed(OPENVINO / "optimum-cli")
    unfinished = folder.with_suffix(".new")
    export = ["export", "openvino", "--task", "text-generation-with-past", "--weight-format", weights]
    done = subprocess.run(
        [str(OPENVINO / "optimum-cli"), *export, "-m", str(exported(model)), str(unfinished)],
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"optimum-intel does not export it: {done.stderr.strip().splitlines()[-1:]}")
    return unfinished.rename(folder)


def _check_installed(program: Path) -> None:
    if not program.exists():
        raise RuntimeError(
            f"{program.parent.parent.name} is not installed: run make bench, which installs it"
        )


def single_file(model: Path) -> Path:
    """A GGUF that other programs can read: the packaged model's pieces are joined, once."""
    from codegemma.checkpoints import gguf  # not in the peers' environment, where this module runs too

    pieces = gguf.pieces(model)
    joined = BENCH / model.name.removesuffix(".part00")
    if len(pieces) == 1 or joined.exists():
        return model if len(pieces) == 1 else joined
    with open(joined.with_suffix(".new"), "wb") as file:
        for piece in pieces:
            file.write(piece.read_bytes())
    return joined.with_suffix(".new").rename(joined)


def check_llama_cpp(model: str | Path) -> str:
    """Makes sure that llama.cpp can read a prompt here; returns "" or a note on how it had to be compiled.

    llama.cpp's AMX kernels crash on some processors and hypervisors. If they do, it is compiled again without
    them, once: a file in its environment keeps the note. Raises RuntimeError where that does not help.
    """
    try:
        _read_a_prompt(model)
    except RuntimeError:
        if BUILD_NOTE.exists():
            raise
        print("llama.cpp crashed: compiling it again without its AMX kernels (some minutes)", file=sys.stderr)
        flags = " ".join(f"-D{flag}" for flag in _flags_without_amx(Path("/proc/cpuinfo").read_text()))
        subprocess.run(
            [
                str(PYTHON),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--force-reinstall",
                "--no-deps",
                "--no-cache-dir",
            ]
            + ["--no-binary", "llama-cpp-python", "llama-cpp-python>=0.3.36,<0.4"],
            env=os.environ | {"CMAKE_ARGS": flags},
            check=True,
        )
        _read_a_prompt(model)
        BUILD_NOTE.write_text("compiled without its AMX kernels, which crash on this machine")
    return BUILD_NOTE.read_text() if BUILD_NOTE.exists() else ""


def _read_a_prompt(model: str | Path) -> None:
    with Peer("llamacpp", model, threads=2, context=1024) as peer:
        peer("prefill", ids=[2, *range(1000, 1511)])
        peer("decode", ids=[2, *range(1000, 1031)], count=2)


def _flags_without_amx(cpuinfo: str) -> list[str]:
    """CMake options that make llama.cpp use all extensions of this processor but AMX."""
    supported = set(cpuinfo.partition("\nflags")[2].partition("\n")[0].split())
    options = {
        "GGML_AVX": "avx",
        "GGML_AVX2": "avx2",
        "GGML_FMA": "fma",
        "GGML_F16C": "f16c",
        "GGML_BMI2": "bmi2",
        "GGML_AVX_VNNI": "avx_vnni",
        "GGML_AVX512": "avx512f",
        "GGML_AVX512_VBMI": "avx512vbmi",
        "GGML_AVX512_VNNI": "avx512_vnni",
        "GGML_AVX512_BF16": "avx512_bf16",
    }
    return ["GGML_NATIVE=OFF"] + [
        f"{option}={'ON' if flag in supported else 'OFF'}" for option, flag in options.items()
    ]


class Peer:
    """A peer, run in a child process. Raises RuntimeError with the child's message if the child fails."""

    def __init__(self, engine: str, model: str | Path, **options: Any) -> None:
        """`options` are the keywords of the engine's class."""
        python = OPENVINO / "python" if engine == "openvino" else PYTHON
        _check_installed(python)
        command = [python, __file__, engine, model, json.dumps(options)]
        self._child = subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.about: dict[str, Any] = self._read()  # versions and settings

    def __call__(self, command: str, **arguments: Any) -> dict[str, Any]:
        assert self._child.stdin
        self._child.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        self._child.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the peer stopped with exit code {self._child.wait()}: its messages are above"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"the peer failed: {answer['error']}")
        return answer

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._child.communicate()  # closes its stdin, which ends it


class LlamaCpp:
    """llama.cpp through its C API, with its defaults (float16 cache, flash attention, repacked weights).

    Only the last token of a prompt gets logits, and the argmax reads them in place, so that Python costs
    nothing per layer and some 50 us per token. With `swa_full`, the cache of windowed layers keeps all tokens
    of the prompt; without it, llama.cpp cannot return to a prefix.
    """

    def __init__(self, model: str, threads: int, context: int, batch: int = 512, flash: str = "auto") -> None:
        import llama_cpp

        self.api = llama_cpp
        self.quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.quiet, None)
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            model.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"{model}: llama.cpp does not load it")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = context, batch, batch
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = {"auto": -1, "off": 0, "on": 1}[flash]
        settings.swa_full = True
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        if not self.context:
            raise ValueError(f"{model}: llama.cpp makes no context of {context} tokens")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.size, self.batch = batch, llama_cpp.llama_batch_init(batch, 0, 1)
        columns = self.batch.token, self.batch.pos, self.batch.logits, self.batch.n_seq_id
        self.tokens, self.positions, self.wanted, sequences = (
            np.ctypeslib.as_array(column, (batch,)) for column in columns
        )
        sequences[:] = 1
        for i in range(batch):
            self.batch.seq_id[i][0] = 0
        self.cached_ids: list[int] = []
        self.about = {
            "engine": "llama.cpp",
            "version": llama_cpp.__version__,
            "threads": threads,
            "context": context,
            "batch": batch,
            "flash_attention": flash,
            "system": llama_cpp.llama_print_system_info().decode().strip(),
        }

    def _rewind(self, length: int) -> None:
        """Keeps the first `length` tokens, or none if llama.cpp's memory cannot return to them."""
        if not self.api.llama_memory_seq_rm(self.memory, 0, length, -1):
            self.api.llama_memory_clear(self.memory, False)
            length = 0
        self.cached_ids = self.cached_ids[:length]

    def _run(self, ids: Sequence[int], all_logits: bool = False) -> np.ndarray:
        """Appends tokens. Logits [V] of the last one, valid until the next call, or [T, V] of all."""
        logits = []
        for start in range(0, len(ids), self.size):
            part = ids[start : start + self.size]
            count = self.batch.n_tokens = len(part)
            self.tokens[:count], self.wanted[:count] = part, all_logits
            self.positions[:count] = np.arange(len(self.cached_ids), len(self.cached_ids) + count)
            self.wanted[count - 1] = all_logits or start + count == len(ids)
            if status := self.api.llama_decode(self.context, self.batch):
                raise RuntimeError(f"llama_decode returned {status}")
            self.cached_ids += part
            if all_logits:
                logits.append(self._logits(count).copy())
        return np.concatenate(logits) if all_logits else self._logits(1)[0]

    def _logits(self, rows: int) -> np.ndarray:
        return np.ctypeslib.as_array(self.api.llama_get_logits(self.context), (rows, self.vocab))

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        self._rewind(0)
        start = time.perf_counter()
        token = int(self._run(ids).argmax())
        return {"seconds": time.perf_counter() - start, "token": token}

    def decode(self, ids: list[int], count: int) -> dict[str, Any]:
        """`count` tokens in `count` steps, of which the first reads the token after the prompt."""
        self._rewind(0)
        token, tokens = int(self._run(ids).argmax()), []
        start = time.perf_counter()
        for _ in range(count):
            tokens.append(token)
            token = int(self._run([token]).argmax())
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def eval_prompt(self, ids: list[int]) -> dict[str, Any]:
        """Seconds to the first token with llama.cpp's prompt cache, which keeps the longest common prefix."""
        start = time.perf_counter()
        common = sum(
            1
            for _ in takewhile(lambda pair: pair[0] == pair[1], zip(ids[:-1], self.cached_ids, strict=False))
        )
        self._rewind(common)
        evaluated = len(ids) - len(self.cached_ids)
        token = int(self._run(ids[len(self.cached_ids) :]).argmax())
        return {"seconds": time.perf_counter() - start, "token": token, "evaluated": evaluated}

    def logits(self, ids: list[int], path: str) -> dict[str, Any]:
        self._rewind(0)
        np.save(path, self._run(ids, all_logits=True))
        return {"path": path}


class Torch:
    """Hugging Face transformers on PyTorch. Loading dequantises the GGUF to bfloat16 or another type.

    `compiled`: the model is compiled for each shape, with keys and values in arrays of a fixed size, just
    large enough. The prompt before decoding, which is not timed, is not compiled.
    """

    def __init__(
        self, model: str, threads: int, context: int = 0, dtype: str = "bfloat16", compiled: bool = False
    ) -> None:
        os.environ["TQDM_DISABLE"] = "1"
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch, self.cache_utils = torch, transformers.cache_utils
        path = Path(model)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=getattr(torch, dtype)
        ).eval()
        self.compiled = torch.compile(self.model, dynamic=False) if compiled else None
        self.static_caches: dict[int, Any] = {}  # by their length: the compiled code belongs to a cache
        self.cache: Any = None
        self.about = {
            "engine": "transformers",
            "version": transformers.__version__,
            "torch": torch.__version__,
            "threads": threads,
            "dtype": dtype,
            "compiled": compiled,
            "attention": self.model.config._attn_implementation,
        }

    def _forget(self, length: int) -> None:
        """An empty cache for `length` tokens."""
        self.cache = None
        if self.compiled is None:
            return
        if length not in self.static_caches:
            # StaticCache counts the tokens of windowed layers in a Python number, for each of which the model
            # would be compiled again. Layers without a window give the same: the masks have the window.
            config, layer = self.model.config, self.cache_utils.StaticLayer
            cache = self.cache_utils.Cache([layer(length) for _ in range(config.num_hidden_layers)])
            shape = 1, config.num_key_value_heads, config.head_dim
            cache.early_initialization(*shape, self.model.dtype, self.model.device)
            self.static_caches[length] = cache
        self.cache = self.static_caches[length]
        self.cache.reset()

    def _run(self, ids: list[int], keep: int = 1, compiled: bool = True) -> Any:
        model = self.model if self.compiled is None or not compiled else self.compiled
        out = model(self.torch.tensor([ids]), cache=self.cache, use_cache=True, logits_to_keep=keep)
        self.cache = out.cache
        return out.logits[0]

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        self._forget(len(ids))
        start = time.perf_counter()
        token = int(self._run(ids)[-1].argmax())
        return {"seconds": time.perf_counter() - start, "token": token}

    def decode(self, ids: list[int], count: int) -> dict[str, Any]:
        self._forget(len(ids) + count)
        token, tokens = int(self._run(ids, compiled=False)[-1].argmax()), []
        start = time.perf_counter()
        for _ in range(count):
            tokens.append(token)
            token = int(self._run([token])[-1].argmax())
        return {"seconds": time.perf_counter() - start, "tokens": tokens}

    def logits(self, ids: list[int], path: str) -> dict[str, Any]:
        self._forget(len(ids))
        np.save(path, self._run(ids, keep=0).float().numpy())
        return {"path": path}


class OpenVino:
    """OpenVINO GenAI on a folder of `exported_for_openvino`, with its defaults but for two: its cache of
    prompts is off, since every round has the same prompt, and it reads a prompt in one piece."""

    def __init__(self, model: str, threads: int) -> None:
        os.environ["OPENVINO_TELEMETRY_OPT_OUT"] = "1"
        import openvino
        import openvino_genai

        self.tensor, self.api = openvino.Tensor, openvino_genai
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = False, 4096
        self.pipeline = openvino_genai.LLMPipeline(
            model, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=threads
        )
        self.about = {
            "engine": "OpenVINO GenAI",
            "version": openvino_genai.__version__,
            "threads": threads,
        }

    def _generate(self, ids: list[int], count: int) -> tuple[list[int], list[float]]:
        """`count` tokens after a prompt, and the seconds from the call to each of them."""
        config = self.api.GenerationConfig(max_new_tokens=count, ignore_eos=True, do_sample=False)
        ids_BT = np.array([ids], np.int64)
        inputs = self.api.TokenizedInputs(self.tensor(ids_BT), self.tensor(np.ones_like(ids_BT)))
        seconds: list[float] = []

        class Clock(self.api.StreamerBase):  # type: ignore[misc, name-defined]
            def write(clock, token: int | list[int]) -> Any:
                seconds.append(time.perf_counter() - start)
                return self.api.StreamingStatus.RUNNING

            def end(clock) -> None:
                pass

        start = time.perf_counter()
        tokens = self.pipeline.generate(inputs, config, Clock()).tokens[0]
        return tokens, seconds

    def prefill(self, ids: list[int]) -> dict[str, Any]:
        tokens, seconds = self._generate(ids, 1)
        return {"seconds": seconds[0], "token": tokens[0]}

    def decode(self, ids: list[int], count: int) -> dict[str, Any]:
        tokens, seconds = self._generate(ids, count + 1)  # the first belongs to the prompt
        return {"seconds": seconds[count] - seconds[0], "tokens": tokens[:count]}


class LmEval:
    """lm-eval with transformers in float32, its fastest type on a CPU without bfloat16."""

    TASK = """
task: ours
dataset_path: json
dataset_kwargs: {data_files: {validation: FOLDER/rows.jsonl}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: " "
metric_list: [{metric: acc_norm}]
"""

    def __init__(self, model: str, threads: int) -> None:
        self.folder = tempfile.TemporaryDirectory()
        os.environ |= {"HF_HOME": self.folder.name, "HF_DATASETS_OFFLINE": "1", "TQDM_DISABLE": "1"}
        import lm_eval
        import torch
        from lm_eval.models.huggingface import HFLM

        torch.set_num_threads(threads)
        self.model = HFLM(model, dtype="float32", device="cpu", batch_size=8, add_bos_token=True)
        self.about = {
            "engine": "lm-eval",
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "threads": threads,
        }

    def choose(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        Path(self.folder.name, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        Path(self.folder.name, "task.yaml").write_text(self.TASK.replace("FOLDER", self.folder.name))
        start = time.perf_counter()
        results = simple_evaluate(
            self.model,
            tasks=["ours"],
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=self.folder.name),
        )
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "right": results["results"]["ours"]["acc_norm,none"]}


ENGINES = {"llamacpp": LlamaCpp, "torch": Torch, "openvino": OpenVino, "lm-eval": LmEval}


def main() -> None:
    parser = argparse.ArgumentParser(
        description="An engine that answers JSON lines; see the top of this file."
    )
    parser.add_argument("engine", choices=ENGINES)
    parser.add_argument("model")
    parser.add_argument("options", type=json.loads, nargs="?", default={})
    args = parser.parse_args()

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints goes to stderr, not between the answers

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        engine = ENGINES[args.engine](args.model, **args.options)
    except Exception as error:
        answer({"error": repr(error)})
        return
    answer(engine.about)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer(getattr(engine, request.pop("command"))(**request))
        except Exception as error:
            answer({"error": repr(error)})


if __name__ == "__main__":
    main()
