"""Small quantisations of a model as people have them, written by the gguf package with random blocks.

The geometry is that of Gemma 3 270M: rows of 640 weights are no multiple of 256, so that a quantiser takes
IQ4_NL for them where other rows get IQ4_XS or a K type. Each file is also split, with a first part that holds
no tensors.
"""

import json
import re

import gguf
import numpy as np
import pytest
import reference
from homes import set_home
from tiny import random_adapter, random_blocks, random_weights, tiny_config, tokenizer_metadata
from typer.testing import CliRunner

from codegemma import load
from codegemma.adapters.peft import save as save_adapter
from codegemma.checkpoints import gguf_model, open_checkpoint
from codegemma.checkpoints.table import tensor_locations
from codegemma.cli.main import app

SIZES = {"layers": 2, "width": 640, "heads": 4, "kv_heads": 1, "head_width": 256, "ffn_width": 1024}
CONFIG = tiny_config("gemma3", **SIZES, global_every=2)
MIXES = {  # the types of rows of 640 and of longer ones
    "IQ4_XS": ("IQ4_NL", "IQ4_XS"),
    "Q3_K_M": ("IQ4_NL", "Q3_K"),
    "Q2_K": ("IQ4_NL", "Q2_K"),
    "MXFP4": ("MXFP4", "MXFP4"),
}
IDS = [2, *np.random.default_rng(5).integers(3, CONFIG.vocab, 20).tolist()]
EIGHT_BITS = 3.5 / (127 * 12**0.5 * 32**0.5)  # the roundoff of activations whose largest is 3.5 deviations


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty cache, and no other program's models."""
    set_home(tmp_path, monkeypatch)
    return tmp_path


def write(folder, mix, **split):
    """A file, or with `split` (arguments of GGUFWriter) its parts; returns the first."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(
        folder / f"m-{mix}.gguf", CONFIG.architecture, small_first_shard=bool(split), **split
    )
    for key, value in (gguf_model.config_metadata(CONFIG) | tokenizer_metadata(CONFIG)).items():
        if key != "general.architecture":  # it is written already
            value = value.tolist() if isinstance(value, np.ndarray) else value
            writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    short, long = MIXES[mix]
    weights = random_weights(CONFIG)
    for number, location in enumerate(tensor_locations(CONFIG, "gguf")):
        values = weights[location.name]
        if location.is_norm:
            writer.add_tensor(location.stored, values)
            continue
        type = "Q8_0" if location.name == "embed" else short if values.shape[1] == 640 else long
        blocks = random_blocks(type, values.shape, float(values.std()), number).data
        writer.add_tensor(location.stored, blocks, raw_dtype=gguf.GGMLQuantizationType[type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return min(folder.glob(f"m-{mix}*.gguf"))


def run(*arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def decoded(path):
    """The weights of an unsplit file as the gguf package reads and decodes them, under our names."""
    names = {location.stored: location.name for location in tensor_locations(CONFIG, "gguf")}
    return {
        names[tensor.name]: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("mix", MIXES)
def test_logits_are_those_of_the_float64_twin(home, mix):
    path = write(home / "m", mix)
    weights = decoded(path)
    twin = reference.logits(CONFIG, weights, IDS)
    bound = reference.tolerance(CONFIG, weights, IDS, EIGHT_BITS, draws=1)
    model = load(path, threads=2)
    assert np.abs(model.logits(IDS) - twin).max() < bound < np.abs(twin).max()
    parts = write(home / "parts", mix, split_max_tensors=9)
    assert load(parts, threads=1).logits(IDS).tobytes() == model.logits(IDS).tobytes()
    run("convert", parts, home / "f32.gguf", "--dtype", "f32")
    exact = load(home / "f32.gguf", threads=2).logits(IDS)
    assert np.abs(exact - twin).max() < reference.tolerance(CONFIG, weights, IDS, draws=1)


@pytest.mark.parametrize("mix", MIXES)
def test_a_split_file_is_listed_completed_with_inspected_and_converted(home, mix):
    """As LM Studio keeps it; joined by a conversion, it is the same model."""
    folder = home / ".lmstudio" / "models" / "o" / "m-GGUF"
    path = write(folder, mix, split_max_tensors=9)
    assert path.name == f"m-{mix}-00001-of-00005.gguf" and not gguf.GGUFReader(path).tensors
    (row,) = (row for row in json.loads(run("models", "--json")) if row.get("store") == "lmstudio")
    assert row["path"] == str(path) and row["bytes"] == sum(file.stat().st_size for file in folder.iterdir())
    (home / "f.py").write_text("def f(x):\n    y = (x<CURSOR>\n")
    asked = ("-m", f"o/m-GGUF:{mix}", home / "f.py", "-n", 8, "--json")
    answer = json.loads(run("complete", *asked))
    assert answer["model"] == str(path) and answer["tokens"] and answer["text"].strip()
    described = run("inspect", path)
    assert all(re.search(rf"\d+ {type}\b", described) for type in MIXES[mix]) and "PROBLEM" not in described
    run("convert", path, home / "one.gguf")
    one, split = open_checkpoint(home / "one.gguf"), open_checkpoint(path)
    assert one.identity == split.identity and "split.count" not in one.metadata
    assert "identical" in run("verify", path, home / "one.gguf")
    asked = ("-m", home / "one.gguf", *asked[2:])
    assert json.loads(run("complete", *asked))["text"] == answer["text"]
    run("convert", path, home / "folder", "--to", "safetensors")
    run("verify", path, home / "folder")


def test_what_cannot_be_written_is_refused(home):
    path = write(home / "m", "Q2_K")
    adapter = home / "adapter"
    save_adapter(random_adapter(CONFIG), adapter)
    for arguments, message in (
        (("--quantize", "q3_k"), "'q3_k', which is read but not written: choose q4_0, .*iq4_nl"),
        (("--adapter", adapter), r"layers\.0\.o is Q2_K, which is read but not written, .*--quantize q4_k_m"),
    ):
        with pytest.raises(ValueError, match=message):
            CliRunner().invoke(
                app, list(map(str, ("convert", path, home / "x.gguf", *arguments))), catch_exceptions=False
            )
    run("convert", path, home / "x.gguf", "--adapter", adapter, "--quantize", "iq4_nl")


def test_a_scale_that_is_no_number_is_damage(home):
    path = write(home / "m", "MXFP4")
    tensor = next(
        tensor for tensor in gguf.GGUFReader(path, "r+").tensors if tensor.name == "blk.0.ffn_up.weight"
    )
    tensor.data[3, 17 * 5] = 255
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1 and "tensor layers.0.up holds NaN" in result.output
