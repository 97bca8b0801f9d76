"""Vocabularies as model folders hold them: tokens that side files add, and the ends that files state."""

import json
import pickle

import numpy as np
import pytest
from tiny import tiny_config, tiny_pieces, tiny_tensors, tokenizer_metadata, write_tiny_gguf, write_tiny_hf

from codegemma import prompts
from codegemma.checkpoints import gguf, gguf_model, open_checkpoint, table
from codegemma.checkpoints.huggingface_tokenizer import builder, tokenizer_json
from codegemma.cli.data import load_tokenizer
from codegemma.convert.convert import convert
from codegemma.tokenizer import Tokenizer

FORMATS = {"gguf": ".gguf", "safetensors": "", "orbax": "", "keras": "", "nemo": ".nemo", "gemma_pytorch": ""}


def _tokenizer(config):
    pieces, scores, types = tiny_pieces(config)
    return Tokenizer.from_pieces(pieces, scores, types)


def _folder(path, rows=517, kind="gemma-mqa", model=True, **files):
    """A Hugging Face directory whose embedding has `rows` rows and whose tokenizer.model has 515 pieces."""
    config = tiny_config(kind)
    write_tiny_hf(path, tiny_config(kind, vocab=rows))
    if model:
        (path / "tokenizer.model").write_bytes(_tokenizer(config).model)
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


IM = {"<|im_start|>": 515, "<|im_end|>": 516}
ADDED = {
    "added_tokens": {"added_tokens": IM},
    "decoder": {
        "tokenizer_config": {
            "added_tokens_decoder": {str(id): {"content": name, "special": True} for name, id in IM.items()}
        }
    },
    "json": {
        "tokenizer": {
            "added_tokens": [{"id": id, "content": name, "special": True} for name, id in IM.items()],
        }
    },
}


@pytest.mark.parametrize("source", ADDED)
@pytest.mark.parametrize("to", FORMATS)
def test_an_added_token_is_one_control_id_in_every_format(tmp_path, source, to):
    folder = _folder(tmp_path / "m", **ADDED[source])
    path = convert(folder, tmp_path / f"out{FORMATS[to]}", to).path
    for tokenizer in (open_checkpoint(folder).tokenizer, open_checkpoint(path).tokenizer):
        assert tokenizer.token_id("<|im_start|>") == 515 and tokenizer.is_control(516)
        assert tokenizer.encode("<|im_start|>a", control=True)[0] == 515
        assert 515 not in tokenizer.encode("<|im_start|>a") and tokenizer.decode([515, 516]) == ""
        assert tokenizer.vocab_size == 517


def test_side_files_that_add_nothing_change_nothing(tmp_path):
    tokenizer = _tokenizer(tiny_config("gemma-mqa"))
    folder = _folder(tmp_path / "m", tokenizer=tokenizer_json(tokenizer), added_tokens={"<bos>": 2})
    assert open_checkpoint(folder).tokenizer.fingerprint == tokenizer.fingerprint
    (folder / "tokenizer.model").unlink()
    assert open_checkpoint(folder).tokenizer.fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_training_rows_are_encoded_with_the_added_tokens(tmp_path, name):
    folder = _folder(tmp_path / "m", **ADDED["added_tokens"])
    assert load_tokenizer(str(folder / name)).fingerprint == open_checkpoint(folder).tokenizer.fingerprint


def test_a_placeholder_gets_the_name_of_the_side_file_and_text_pieces_keep_theirs(tmp_path):
    """CodeGemma's own tokenizer.model spells the FIM ids <unusedN>; its side files name them."""
    names = {
        "67": "<|fim_prefix|>",
        "68": "<|fim_middle|>",
        "69": "<|fim_suffix|>",
        "70": "<|file_separator|>",
    }
    decoder = {id: {"content": name, "special": False} for id, name in names.items()}
    decoder["400"] = {"content": "<other>", "special": True}  # a letter of the vocabulary
    config = tiny_config("gemma3")  # whose pieces 67 to 70 are <unusedN>
    plain = _folder(tmp_path / "plain", 515, "gemma3")
    named = _folder(tmp_path / "named", 515, "gemma3", tokenizer_config={"added_tokens_decoder": decoder})
    assert open_checkpoint(plain).tokenizer.control.fim == "convention"
    tokenizer = open_checkpoint(named).tokenizer
    assert tokenizer.control.fim == "named" and tokenizer.control.fim_suffix == 69
    assert tokenizer.piece(400) == _tokenizer(config).piece(400)


def test_an_added_token_that_is_not_special_is_matched_in_text_unless_it_is_spelled_as_control(tmp_path):
    added = [
        {"id": 515, "content": "TODO", "special": False},
        {"id": 516, "content": "<|tool|>", "special": False},
    ]
    tokenizer = open_checkpoint(_folder(tmp_path / "m", tokenizer={"added_tokens": added})).tokenizer
    assert 515 in tokenizer.encode("a TODO b") and tokenizer.decode([515]) == "TODO"
    assert 516 not in tokenizer.encode("<|tool|>") and tokenizer.is_control(516)


@pytest.mark.parametrize("source", ["tokenizer", "tokenizer_config", "added_tokens"])
def test_added_tokens_behind_the_rows_are_left_out(tmp_path, source):
    """The text models of Gemma 3 have <image_soft_token> as id 262,144 of 262,144 rows."""
    name, tokenizer = "<image_soft_token>", _tokenizer(tiny_config("gemma3"))
    document = tokenizer_json(tokenizer)
    files = {
        "tokenizer": {**document, "added_tokens": [*document["added_tokens"], {"id": 515, "content": name}]},
        "tokenizer_config": {"added_tokens_decoder": {"515": {"content": name, "special": True}}},
        "added_tokens": {name: 515},
    }
    folder = _folder(
        tmp_path / "m", 515, "gemma3", **{"tokenizer": document, source: files[source]}, model=False
    )
    assert open_checkpoint(folder).tokenizer.fingerprint == tokenizer.fingerprint
    path = convert(folder, tmp_path / "m.gguf").path
    assert open_checkpoint(path).tokenizer.fingerprint == tokenizer.fingerprint
    assert len(open_checkpoint(path).metadata["tokenizer.ggml.tokens"]) == 515


def test_a_gguf_with_control_tokens_behind_the_rows_opens_without_them(tmp_path):
    config = tiny_config("gemma3")
    pieces, scores, types = tiny_pieces(config)
    header = gguf_model.config_metadata(config) | tokenizer_metadata(config)
    header |= {
        "tokenizer.ggml.tokens": [*pieces, "<image_soft_token>"],
        "tokenizer.ggml.scores": np.array([*scores, 0], "<f4"),
        "tokenizer.ggml.token_type": np.array([*types, 3], "<i4"),
    }
    gguf.write(tmp_path / "m.gguf", header, table.to_format("gguf", config, tiny_tensors(config)))
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer.fingerprint == _tokenizer(config).fingerprint
    header["tokenizer.ggml.token_type"] = np.array([*types, 1], "<i4")  # text: another model's vocabulary
    gguf.write(tmp_path / "n.gguf", header, table.to_format("gguf", config, tiny_tensors(config)))
    with pytest.raises(ValueError, match="must be at most 515"):
        open_checkpoint(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"added_tokens": {"<x>": 900_000}}, "has the id 900,000, but at most 65,536 can follow"),
        ({"added_tokens": {"<x>": -1}}, "has the id -1, but ids begin at 0"),
        ({"added_tokens": {"<x>": -1, "<y>": 5}}, "has the id -1, but ids begin at 0"),
        ({"added_tokens": {"<x>": "515"}}, r"added_tokens.json: an added token has the id '515'"),
        ({"tokenizer_config": {"added_tokens_decoder": {"a": {}}}}, "tokenizer_config.json: does not list"),
        ({"tokenizer": {"added_tokens": [7]}}, "tokenizer.json: does not list its added tokens"),
        ({"tokenizer": {"added_tokens": [{"id": 515, "content": 3}]}}, "the text 3"),
    ],
)
def test_a_damaged_side_file_is_named(tmp_path, files, message):
    checkpoint = open_checkpoint(_folder(tmp_path / "m", **files))
    with pytest.raises(ValueError, match=message):
        assert checkpoint.tokenizer


# ------------------------------------------------------------------------------------------- stated ends
def _ending_gguf(path, entries):
    """A GGUF whose last piece, <|im_end|>, is an end that only `entries` state."""
    config = tiny_config("gemma-mqa", vocab=516)
    pieces, _, types = tiny_pieces(config)
    header = gguf_model.config_metadata(config) | tokenizer_metadata(config)
    header |= {"tokenizer.ggml.tokens": [*pieces[:515], "<|im_end|>"]}
    header |= {"tokenizer.ggml.token_type": np.array([*types[:515], 3], "<i4")}
    header |= {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    gguf.write(path, header, table.to_format("gguf", config, tiny_tensors(config)))
    return path


def _ending_folder(path, fields=None, generation=None, **files):
    folder = _folder(path, 516, added_tokens={"<|im_end|>": 515}, **files)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | (fields or {})))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


GGUF_ENDS = {
    "eos": {"eos_token_id": 515},
    "eot": {"eot_token_id": 515},
    "eom": {"eom_token_id": 515},
    "eos_ids": {"eos_token_ids": np.array([1, 515], "<i4")},
}
FOLDER_ENDS = {
    "config": ({"eos_token_id": 515}, None),
    "config list": ({"eos_token_id": [1, 515]}, None),
    "text part": ({"text_config": {"eos_token_id": 515}}, None),
    "generation": (None, {"eos_token_id": [1, 107, 515]}),
    "null beside": ({"eos_token_id": None}, {"eos_token_id": 515}),
}


@pytest.mark.parametrize("to", [None, *FORMATS])
@pytest.mark.parametrize("stated", [*GGUF_ENDS, *FOLDER_ENDS])
def test_a_stated_end_ends_fim_text_and_chat_in_every_format(tmp_path, stated, to):
    if stated in GGUF_ENDS:
        path = _ending_gguf(tmp_path / "m.gguf", GGUF_ENDS[stated])
    else:
        path = _ending_folder(tmp_path / "m", *FOLDER_ENDS[stated])
    path = convert(path, tmp_path / f"out{FORMATS[to]}", to).path if to else path
    tokenizer = pickle.loads(pickle.dumps(open_checkpoint(path).tokenizer))
    turns = [prompts.Message("user", "hi")]
    for prompt in (
        prompts.fim(tokenizer, "a", "b"),
        prompts.plain(tokenizer, "a"),
        prompts.chat(tokenizer, turns),
    ):
        assert {1, 107, 515} <= prompt.stops
    assert tokenizer.fingerprint == open_checkpoint(path).build_tokenizer().fingerprint


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
@pytest.mark.parametrize("to", [None, "gguf", "keras"])
def test_the_end_that_tokenizer_config_names_is_one(tmp_path, eos, to):
    path = _ending_folder(tmp_path / "m", tokenizer_config={"eos_token": eos})
    path = convert(path, tmp_path / f"out{FORMATS[to]}", to).path if to else path
    assert 515 in prompts.chat_stops(open_checkpoint(path).tokenizer)


@pytest.mark.parametrize("eos", [None, 7, "<nowhere>", ["x"]])
def test_an_end_that_tokenizer_config_does_not_name_is_none(tmp_path, eos):
    folder = _ending_folder(tmp_path / "m", tokenizer_config={"eos_token": eos})
    assert 515 not in prompts.chat_stops(open_checkpoint(folder).tokenizer)


def test_an_end_that_the_vocabulary_lacks_is_none(tmp_path):
    path = _ending_gguf(tmp_path / "m.gguf", {"eos_token_id": 2**32 - 1})
    assert open_checkpoint(path).tokenizer.end_ids == set()


@pytest.mark.parametrize("value", ["1", [1, None], 1.5, True])
def test_an_end_that_is_no_id_is_refused(tmp_path, value):
    folder = _ending_folder(tmp_path / "m", generation={"eos_token_id": value})
    with pytest.raises(ValueError, match=r"generation_config.json: eos_token_id must be a token id"):
        open_checkpoint(folder)


def test_a_vocabulary_is_built_from_its_folder_alone(tmp_path):
    assert builder(tmp_path) is None
    write_tiny_gguf(tmp_path / "m.gguf", tiny_config("gemma-mqa"), tokenizer=False)
    assert open_checkpoint(tmp_path / "m.gguf").tokenizer is None
