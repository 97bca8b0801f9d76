"""PyTorch archives (.ckpt, .bin, .pt) without PyTorch: read by memory map, written tensor by tensor.

An archive is a zip file of uncompressed members: a pickle that describes the object, and one member for the bytes of
each storage. The pickle is interpreted with a closed list of names, each standing for a value of ours; nothing that it
names is ever imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface as safetensors
from codegemma.checkpoints import table as weights
from codegemma.checkpoints.table import BLOCKS, Deferred, Tensor
from codegemma.config import ModelConfig
from codegemma.files import mapped, replacing
from codegemma.tokenizer import Tokenizer

STORAGES = {"BFloat16Storage": "BF16", "FloatStorage": "F32", "HalfStorage": "F16"}
FOREIGN = (
    "ByteStorage",
    "CharStorage",
    "ShortStorage",
    "IntStorage",
    "LongStorage",
    "BoolStorage",
    "DoubleStorage",
    "ComplexFloatStorage",
    "ComplexDoubleStorage",
)
MOST_PICKLE = 1 << 24  # bytes; a 7B's is under 100 kB
MOST_MEMBERS = 65_536


class Record:
    """Stands for an object of a known class: its arguments, or its fields."""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise ValueError(f"a record of the checkpoint lacks {name}")
        return state[name]


class _Dict(dict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        pass  # _metadata of a state dict


class _Path:
    def __init__(self, *parts: str) -> None:
        pass


# What a pickle may name. A distributed checkpoint's metadata are dataclasses, enums and dtypes of these modules.
_RECORDS = {
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
        "StorageMeta",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.distributed.checkpoint._fsspec_filesystem": (),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "torch.distributed.checkpoint.planner": (),
}
_DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "float16": "F16",
    "uint8": "U8",
    "int64": "I64",
    "int32": "I32",
    "bool": "BOOL",
    "float64": "F64",
}


_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # the one in Python: it can be narrowed


class _Reader(_Unpickler):  # type: ignore[misc]
    dispatch: dict[int, Any] = {
        code: load
        for code, load in _Unpickler.dispatch.items()
        if bytes([code])
        not in (
            pickle.EMPTY_SET,
            pickle.FROZENSET,
            pickle.ADDITEMS,
            pickle.INST,
            pickle.OBJ,
            pickle.EXT1,
            pickle.EXT2,
            pickle.EXT4,
            pickle.NEXT_BUFFER,
        )
    }

    def __init__(self, raw: bytes, storage: Callable[[str, str, int], Any]) -> None:
        super().__init__(io.BytesIO(raw))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in (*STORAGES, *FOREIGN):
            return name
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        found = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
            ("pathlib", "PosixPath"): _Path,
            ("pathlib", "_local"): _Path,
            ("pathlib", "WindowsPath"): _Path,
        }.get((module, name))
        if found is None and name in _RECORDS.get(module, ()):
            found = Record
        if found is None:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which no checkpoint needs: it may be an attack"
            )
        return found

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", str(kind), str(key), str(), int(count)):
                return self._storage(kind, key, count)
        raise pickle.UnpicklingError(f"an unknown reference {str(pid)[:80]}")

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self._set(list(zip(items[::2], items[1::2], strict=True)))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([(key, value)])

    def _set(self, items: list[tuple[Any, Any]]) -> None:
        for key, value in items:
            if not isinstance(key, (str, int, Record)):  # hashing nested tuples can take for ever
                raise pickle.UnpicklingError("a key of a dictionary is neither text nor a number")
            self.stack[-1][key] = value

    dispatch[pickle.SETITEMS[0]], dispatch[pickle.SETITEM[0]] = load_setitems, load_setitem


def unpickle(name: str, raw: bytes, storage: Callable[[str, str, int], Any] | None = None) -> Any:
    """The object that a pickle describes, of dictionaries, lists, texts, numbers, tensors and Records."""
    if len(raw) > MOST_PICKLE:
        raise ValueError(
            f"{name}: its pickle of {len(raw):,} bytes is larger than {MOST_PICKLE:,}: not a checkpoint"
        )
    try:
        return _Reader(raw, storage or (lambda *_: None)).load()
    except Exception as error:  # noqa: BLE001  a damaged pickle can fail in any way
        raise ValueError(
            f"{name}: cannot be read as a checkpoint ({error or type(error).__name__}): download it "
            "again, from a source you trust"
        ) from None


def _tensor(storage: Any, offset: int, shape: Any, strides: Any, *_: Any) -> Any:
    type, elements = storage
    shape, strides = tuple(shape), tuple(strides)
    if type not in BLOCKS:
        return storage
    numbers = (offset, *shape, *strides)
    if (
        len(shape) != len(strides)
        or not all(isinstance(n, int) and 0 <= n < 1 << 40 for n in numbers)
        or not shape
    ):
        raise ValueError(f"a tensor has the impossible shape {shape}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape or last >= len(elements) or math.prod(shape) > len(elements):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its {len(elements):,} stored numbers")
    if strides == tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape))):
        return Tensor.view(type, shape, elements[offset : last + 1].view(np.uint8))
    step = elements.itemsize
    return Deferred(
        type,
        shape,
        lambda: np.lib.stride_tricks.as_strided(
            elements[offset:], shape, [stride * step for stride in strides], writeable=False
        ).copy(),
    )


def read(name: str, data: Any) -> Any:
    """The object in an archive given as bytes or a map of them; its tensors are views. ValueError names the rule."""
    raw = np.frombuffer(data, np.uint8)
    members = _members(name, data, raw)
    pickles = [member for member in members if member.endswith("data.pkl")]
    if len(pickles) != 1:
        raise ValueError(
            f"{name}: holds {len(pickles)} data.pkl, but a PyTorch archive has one: convert it again"
        )
    root = pickles[0].removesuffix("data.pkl")
    if bytes(members.get(root + "byteorder", b"little")) != b"little":
        raise ValueError(f"{name}: was written on a big-endian machine: convert it again")

    def storage(kind: str, key: str, count: int) -> tuple[str, np.ndarray]:
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise ValueError(f"the storage {key} is missing")
        type = STORAGES.get(kind, kind)
        if type in FOREIGN:
            return type, member
        if not 0 <= count * BLOCKS[type][1] <= member.size:
            raise ValueError(f"the storage {key} is shorter than it says")
        dtype = weights.ELEMENTS[type]
        part = member[: count * BLOCKS[type][1]]
        return type, part.view(dtype) if part.ctypes.data % part.dtype.itemsize == 0 else part.copy().view(
            dtype
        )

    return unpickle(name, bytes(members[pickles[0]]), storage)


def _members(name: str, data: Any, raw: np.ndarray) -> dict[str, np.ndarray]:
    """The bytes of each member; a zip that compresses, overlaps or reaches beyond the file is refused."""
    try:
        with zipfile.ZipFile(_File(data)) as archive:
            infos = archive.infolist()
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        struct.error,
        NotImplementedError,
        UnicodeError,
    ) as error:
        raise ValueError(
            f"{name}: is no readable PyTorch archive ({error}): download it again; files older than "
            "PyTorch 1.6 must be saved again"
        ) from None
    found: dict[str, np.ndarray] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        at = info.header_offset
        if (
            info.compress_type
            or info.file_size != info.compress_size
            or info.filename in found
            or at < end
            or len(infos) > MOST_MEMBERS
            or at + 30 > raw.size
        ):
            raise ValueError(
                f"{name}: its member {info.filename} is compressed, repeated or overlaps another, which "
                "PyTorch never writes: download it again"
            )
        start = (
            at + 30 + int(raw[at + 26 : at + 28].view("<u2")[0]) + int(raw[at + 28 : at + 30].view("<u2")[0])
        )
        end = start + info.file_size
        if end > raw.size:
            raise ValueError(f"{name}: its member {info.filename} reaches beyond the end: download it again")
        found[info.filename] = raw[start:end]
    return found


class _File(io.RawIOBase):
    """A buffer as a file, without a copy."""

    def __init__(self, data: Any) -> None:
        self._data, self._at = memoryview(data), 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, len(self._data))[whence]
        if self._at < 0:
            raise OSError("before the start of the file")
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._at + size
        part = bytes(self._data[self._at : end])
        self._at += len(part)
        return part


def state(name: str, value: Any, ignored: str = "") -> dict[str, Tensor]:
    """The tensors of a state dict, which may lie under "model_state_dict", "state_dict" or "model"."""
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds no state dict: save the model's state_dict")
    kept = {}
    for key, tensor in value.items():
        if isinstance(tensor, Tensor):
            kept[str(key)] = tensor
        elif isinstance(tensor, tuple) and not re.fullmatch(ignored, str(key)):
            raise ValueError(
                f"{name}: tensor {key} is {tensor[0].removesuffix('Storage')}, but weights are float32, "
                "float16 or bfloat16: use the unquantised model"
            )
    return kept


def load(path: Path) -> tuple[ModelConfig, dict[str, Tensor], dict[str, Any], Callable[[], Tokenizer] | None]:
    """Config, our tensors, config.json, and what builds the tokenizer, from a .ckpt of gemma_pytorch or the
    pytorch_model*.bin of a Hugging Face directory."""
    home = path if path.is_dir() else path.parent
    files = sorted([*home.glob("pytorch_model*.bin"), *home.glob("*.ckpt")]) if path.is_dir() else [path]
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= state(str(file), read(str(file), mapped(file)), weights.IGNORED["pytorch"])
    format: weights.Format = "pytorch" if "embedder.weight" in stored else "hf"
    model, fields = safetensors.described(home, format, stored)
    return model, weights.read(format, path, model, stored), fields, safetensors.tokenizer(home)


def save(path: Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Writes `model.ckpt` as gemma_pytorch reads it."""
    write(path / "model.ckpt", {"model_state_dict": weights.write("pytorch", config, tensors)})


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an archive that torch.load(weights_only=True) reads; `path` appears only when complete."""
    with replacing(path) as file:
        archive(file, value)


def archive(file: Any, value: Mapping[str, Any] | None) -> None:
    """The archive of nested dictionaries of tensors, texts, numbers and None, into a file."""
    tensors: list[Tensor] = []
    described = b"\x80\x02" + _pickled(value, tensors) + b"."
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as out:
        for name, raw in (("data.pkl", described), ("byteorder", b"little"), ("version", b"3\n")):
            out.writestr(zipfile.ZipInfo(f"archive/{name}"), raw)
        for index, tensor in enumerate(tensors):
            with out.open(
                zipfile.ZipInfo(f"archive/data/{index}"), "w", force_zip64=tensor.nbytes > 1 << 30
            ) as member:
                for piece in tensor.pieces():
                    member.write(np.ascontiguousarray(piece.data).reshape(-1).data)


def _pickled(value: Any, tensors: list[Tensor]) -> bytes:
    """Opcodes of pickle protocol 2; tensors are numbered as they come."""
    if isinstance(value, Tensor):
        strides = tuple(math.prod(value.shape[axis + 1 :]) for axis in range(len(value.shape)))
        kind = next(name for name, type in STORAGES.items() if type == value.type)
        tensors.append(value)
        reference = (
            b"("
            + _pickled("storage", [])
            + b"ctorch\n"
            + kind.encode()
            + b"\n"
            + b"".join(_pickled(part, []) for part in (str(len(tensors) - 1), "cpu", math.prod(value.shape)))
            + b"tQ"
        )
        return (
            b"ctorch._utils\n_rebuild_tensor_v2\n("
            + reference
            + _pickled(0, [])
            + _pickled(value.shape, [])
            + _pickled(strides, [])
            + b"\x89ccollections\nOrderedDict\n)RtR"
        )
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_pickled(one, tensors) for item in value.items() for one in item) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(one, tensors) for one in value) + b"t"
    return pickle.dumps(value, 2)[2:-1]  # text, number, bool, None
