"""PyTorch archives (.ckpt, .bin, .pt) without PyTorch: read by memory map, written tensor by tensor.

An archive is a zip file of uncompressed members: a pickle that describes the object, and a member with the
bytes of each storage. The pickle may use the names of a closed list, each of which is replaced by a value of
ours; nothing that it names is imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from codegemma.checkpoints import huggingface, table
from codegemma.checkpoints.checkpoint import Checkpoint
from codegemma.checkpoints.tensors import BLOCKS, DTYPES, ELEMENTS, ArrayTensor, LazyTensor, Tensor
from codegemma.checkpoints.untrusted import damaged, refusing
from codegemma.files import atomic_write, map_file

STORAGES = {"BFloat16Storage": "BF16", "FloatStorage": "F32", "HalfStorage": "F16"}
_OTHER_NUMBERS = ("Byte", "Char", "Short", "Int", "Long", "Bool", "Double", "ComplexFloat", "ComplexDouble")
# Recognised, but their numbers are not read.
OTHER_STORAGES = tuple(f"{kind}Storage" for kind in _OTHER_NUMBERS)
MAX_PICKLE = 1 << 24  # bytes; a 7B's is under 100 kB
MAX_MEMBERS = 65_536


class Record:
    """Replaces an object of a class that a pickle may name; holds its arguments and fields."""

    def __init__(self, *args: Any, **_: Any) -> None:
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """A field of the object. Raises ValueError where it has none of this name."""
        state = getattr(self, "state", None)
        if not isinstance(state, dict) or name not in state:
            raise damaged(f"a record of the checkpoint lacks {name}")
        return state[name]


class _Dict(dict[Any, Any]):
    def __setstate__(self, state: Any) -> None:
        pass  # drops the _metadata of a state dict


# The classes that become Records: dataclasses, enums and dtypes in the metadata of distributed checkpoints.
_CHECKPOINT = "torch.distributed.checkpoint"
_RECORDS = {
    f"{_CHECKPOINT}.metadata": (
        *("Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    ),
    f"{_CHECKPOINT}.filesystem": ("_StorageInfo", "_StoragePrefix"),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size", "device"),
    "pathlib": ("PosixPath", "WindowsPath", "_local"),
}
_TORCH_NAMES = {*STORAGES, *OTHER_STORAGES, *DTYPES.values(), "uint8", "int64", "int32", "bool", "float64"}
_SETS_AND_OBJECTS = pickle.EMPTY_SET + pickle.FROZENSET + pickle.ADDITEMS + pickle.INST + pickle.OBJ
_REFUSED_OPCODES = _SETS_AND_OBJECTS + pickle.EXT1 + pickle.EXT2 + pickle.EXT4 + pickle.NEXT_BUFFER

_Unpickler: Any = pickle._Unpickler  # type: ignore[attr-defined]  # written in Python: it can be restricted


class _Reader(_Unpickler):  # type: ignore[misc]
    dispatch: dict[int, Any] = {
        code: load for code, load in _Unpickler.dispatch.items() if code not in _REFUSED_OPCODES
    }

    def __init__(self, raw: bytes, storage: Callable[[str, str, int], Any]) -> None:
        super().__init__(io.BytesIO(raw))
        self._storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _TORCH_NAMES:
            return name
        if name in _RECORDS.get(module, ()):
            return Record
        values = {
            ("collections", "OrderedDict"): _Dict,
            ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
        }
        if (module, name) not in values:
            rule = "which no checkpoint needs: it may be an attack"
            raise pickle.UnpicklingError(f"it names {module}.{name}, {rule}")
        return values[module, name]

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
            if not isinstance(key, (str, int, Record)):  # hashing hostile nested tuples never ends
                raise pickle.UnpicklingError("a key of a dictionary is neither text nor a number")
            self.stack[-1][key] = value

    dispatch[pickle.SETITEMS[0]], dispatch[pickle.SETITEM[0]] = load_setitems, load_setitem


def unpickle(name: str, raw: bytes, storage: Callable[[str, str, int], Any] | None = None) -> Any:
    """The object in a pickle: dictionaries, lists, texts, numbers, tensors and Records.

    `storage(kind, key, count)` returns the numbers that a tensor refers to. Raises ValueError with `name`.
    """
    if len(raw) > MAX_PICKLE:
        raise damaged(f"{name}: its pickle of {len(raw):,} bytes is larger than {MAX_PICKLE:,}")
    remedy = "download it again, from a source you trust"
    # a damaged pickle can fail in any way
    with refusing(f"{name}: cannot be read as a checkpoint", Exception, remedy=remedy):
        return _Reader(raw, storage or (lambda *_: None)).load()


def rebuild_tensor(storage: tuple[str, np.ndarray], offset: int, shape: Any, strides: Any, *_: Any) -> Any:
    """A tensor over a storage (type, elements), as torch._utils._rebuild_tensor_v2 makes it.

    A storage of a type that is not in BLOCKS is returned as it is. Raises ValueError on a tensor that reaches
    beyond its storage.
    """
    type, elements = storage
    shape, strides = tuple(shape), tuple(strides)
    if type not in BLOCKS:
        return storage
    valid = all(isinstance(number, int) and 0 <= number < 1 << 40 for number in (offset, *shape, *strides))
    if not valid or not shape or len(shape) != len(strides):
        raise ValueError(f"a tensor has the impossible shape {shape}")
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape or last >= len(elements) or math.prod(shape) > len(elements):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its {len(elements):,} stored numbers")
    if strides == _strides(shape):
        return ArrayTensor.view(type, shape, elements[offset : last + 1].view(np.uint8))
    byte_strides = [stride * elements.itemsize for stride in strides]
    view = np.lib.stride_tricks.as_strided(elements[offset:], shape, byte_strides, writeable=False)
    return LazyTensor(type, shape, lambda start, stop: view[start:stop].copy())


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous array, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def read(name: str, data: Any) -> Any:
    """The object in an archive. `data` is the archive's buffer, of which tensors are views.

    Raises ValueError with `name` and the broken rule.
    """
    members = _members(name, data)
    pickles = [member for member in members if member.endswith("data.pkl")]
    if len(pickles) != 1:
        raise damaged(f"{name}: holds {len(pickles)} data.pkl, but a PyTorch archive has one")
    root = pickles[0].removesuffix("data.pkl")
    if bytes(members.get(root + "byteorder", b"little")) != b"little":
        raise damaged(f"{name}: was written on a big-endian machine")

    def storage(kind: str, key: str, count: int) -> tuple[str, np.ndarray]:
        member = members.get(f"{root}data/{key}")
        if member is None:
            raise ValueError(f"the storage {key} is missing")
        type = STORAGES.get(kind, kind)
        if type in OTHER_STORAGES:
            return type, member
        size = count * BLOCKS[type][1]
        if not 0 <= size <= member.size:
            raise ValueError(f"the storage {key} is shorter than the {size:,} bytes of its {count:,} numbers")
        raw = member[:size]
        aligned = raw.ctypes.data % BLOCKS[type][1] == 0
        return type, (raw if aligned else raw.copy()).view(ELEMENTS[type])

    return unpickle(name, bytes(members[pickles[0]]), storage)


def _members(name: str, data: Any) -> dict[str, np.ndarray]:
    """The bytes of each member. Raises ValueError where members are compressed, overlap or are cut off."""
    raw = np.frombuffer(data, np.uint8)
    errors = (zipfile.BadZipFile, ValueError, OSError, struct.error, NotImplementedError)
    remedy = "download it again; files older than PyTorch 1.6 must be saved again"
    with (
        refusing(f"{name}: is no readable PyTorch archive", *errors, remedy=remedy),
        zipfile.ZipFile(BufferFile(data)) as archive,
    ):
        infos = archive.infolist()
    if len(infos) > MAX_MEMBERS:
        raise damaged(f"{name}: holds {len(infos):,} members, but a model has at most {MAX_MEMBERS:,}")
    members: dict[str, np.ndarray] = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        offset = info.header_offset
        compressed = info.compress_type or info.file_size != info.compress_size
        overlaps = offset < end or offset + 30 > raw.size
        if compressed or overlaps or info.filename in members:
            raise damaged(f"{name}: its member {info.filename} is compressed, repeated or overlaps another")
        name_length, extra_length = raw[offset + 26 : offset + 30].view("<u2").tolist()
        start = offset + 30 + name_length + extra_length
        end = start + info.file_size
        if end > raw.size:
            raise damaged(f"{name}: its member {info.filename} reaches beyond the end")
        members[info.filename] = raw[start:end]
    return members


class BufferFile(io.RawIOBase):
    """A buffer as a file, without a copy."""

    def __init__(self, data: Any) -> None:
        self._data, self._offset = memoryview(data), 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._offset = offset + (0, self._offset, len(self._data))[whence]
        if self._offset < 0:
            raise OSError("before the start of the file")
        return self._offset

    def tell(self) -> int:
        return self._offset

    def read(self, size: int | None = -1) -> bytes:
        end = len(self._data) if size is None or size < 0 else self._offset + size
        part = bytes(self._data[self._offset : end])
        self._offset += len(part)
        return part


def state_dict(name: str, value: Any, format: table.Format = "pytorch") -> dict[str, Tensor]:
    """The tensors of a state dict, which may be the value of "model_state_dict", "state_dict" or "model".

    Raises ValueError where there is none, or where a tensor that the format needs has an unsupported type.
    """
    for key in ("model_state_dict", "state_dict", "model"):
        if isinstance(value, dict) and isinstance(value.get(key), dict):
            value = value[key]
    if not isinstance(value, dict):
        raise ValueError(f"{name}: holds no state dict: save the model's state_dict")
    tensors: dict[str, Tensor] = {}
    for key, tensor in value.items():
        if isinstance(tensor, (ArrayTensor, LazyTensor)):
            tensors[str(key)] = tensor
        elif isinstance(tensor, tuple) and not table.is_ignored(format, str(key)):
            kind = f"{tensor[0].removesuffix('Storage')}, but weights are float32, float16 or bfloat16"
            raise ValueError(f"{name}: tensor {key} is {kind}: use the unquantised model")
    return tensors


def load(path: Path) -> Checkpoint:
    """Opens a .ckpt of gemma_pytorch, or the pytorch_model*.bin of a Hugging Face directory."""
    home = path if path.is_dir() else path.parent
    files = sorted([*home.glob("pytorch_model*.bin"), *home.glob("*.ckpt")]) if path.is_dir() else [path]
    stored: dict[str, Tensor] = {}
    for file in files:
        stored |= state_dict(str(file), read(str(file), map_file(file)))
    format: table.Format = "pytorch" if "embedder.weight" in stored else "hf"
    return huggingface.checkpoint_of(path, [home], format, stored)


def save(path: Path, checkpoint: Checkpoint) -> None:
    """Writes `model.ckpt` as gemma_pytorch reads it, with config.json and tokenizer beside it."""
    stored = table.to_format("pytorch", checkpoint.config, checkpoint.tensors)
    with atomic_write(path / "model.ckpt") as file:
        write(file, {"model_state_dict": stored})
    huggingface.write_companions(path, checkpoint)


def write(file: Any, value: Mapping[str, Any] | None) -> None:
    """Writes an archive for torch.load(weights_only=True): dictionaries of tensors, texts, numbers, None."""
    tensors: list[Tensor] = []
    pickled = b"\x80\x02" + _pickled(value, tensors) + b"."
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, raw in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), raw)
        for index, tensor in enumerate(tensors):
            info = zipfile.ZipInfo(f"archive/data/{index}")
            with archive.open(info, "w", force_zip64=tensor.nbytes > 1 << 30) as member:
                tensor.write_to(member)


def _pickled(value: Any, tensors: list[Tensor]) -> bytes:
    """A value as opcodes of pickle protocol 2; the tensors in it are appended to `tensors`."""
    if isinstance(value, (ArrayTensor, LazyTensor)):
        kind = next(name for name, type in STORAGES.items() if type == value.type)
        tensors.append(value)
        storage = _pickled("storage", []) + b"ctorch\n" + kind.encode() + b"\n"
        storage += b"".join(
            _pickled(part, []) for part in (str(len(tensors) - 1), "cpu", math.prod(value.shape))
        )
        layout = b"".join(_pickled(part, []) for part in (0, value.shape, _strides(value.shape)))
        no_hooks = b"\x89ccollections\nOrderedDict\n)R"
        return b"ctorch._utils\n_rebuild_tensor_v2\n((" + storage + b"tQ" + layout + no_hooks + b"tR"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_pickled(part, tensors) for item in value.items() for part in item) + b"u"
    if isinstance(value, tuple):
        return b"(" + b"".join(_pickled(part, tensors) for part in value) + b"t"
    return pickle.dumps(value, 2)[2:-1]  # text, number, bool, None
