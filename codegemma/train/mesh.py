"""How parameters and batches are sharded over a mesh of devices, of one host or several.

Axes: "data" replicates all parameters and divides the batch, "fsdp" divides the batch and each parameter,
"tensor" divides heads, the feed-forward width and the vocabulary.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codegemma.jax.forward import BATCH_AXES

AXES = (*BATCH_AXES, "tensor")
# The mesh axis that divides each dimension of a parameter, by the first pattern that matches the last part of
# its name. A dimension that is no multiple of the axis's size is not divided.
RULES = (
    (r"embed", ("tensor", "fsdp")),
    (r"q|k|v|gate|up", ("tensor", "fsdp")),
    (r"o|down", ("fsdp", "tensor")),
    (r"a|rows", (None, "fsdp")),
    (r"b", ("tensor", None)),
    (r".*", ()),
)


def parse_axes(text: str | None) -> dict[str, int]:
    """The size of each axis from "fsdp=8,tensor=4"; {} for None. Raises ValueError on other text."""
    if text is None:
        return {}
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in pairs if re.fullmatch(r"0*[1-9]\d*", size)}
    if len(sizes) != len(pairs) or not set(sizes) <= set(AXES):
        rule = f"mesh must look like fsdp=8,tensor=4 with axes of {', '.join(AXES)}, each at most once"
        raise ValueError(f"{rule}, got {text!r}")
    return dict.fromkeys(AXES, 1) | sizes


def make(text: str | None) -> Mesh | None:
    """The mesh of all devices with the axes of `text` (see `parse_axes`); None for None.

    Raises ValueError where the product of the axes is not the number of devices, and on None where several
    processes train together.
    """
    axes = parse_axes(text)
    if not axes:
        if (processes := jax.process_count()) > 1:
            example = f"pass --mesh, such as fsdp={jax.device_count()}"
            raise ValueError(f"{processes} processes train together on a mesh: {example}")
        return None
    if (places := math.prod(axes.values())) != (devices := jax.device_count()):
        raise ValueError(
            f"mesh {text} has {places} places, but there are {devices} devices: make the product equal that"
        )
    return jax.make_mesh(tuple(axes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use(mesh: Mesh | None) -> Any:
    """A context in which `forward` divides its activations over the mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_parts(axes: Mapping[str, int]) -> int:
    """The number of parts into which a mesh with these axes divides the batch."""
    return math.prod(axes.get(axis, 1) for axis in BATCH_AXES)


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """The sharding of a parameter, which its gradient and moments have too."""
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name.split(".")[-1]))
    axes = zip(spec, shape, strict=False)
    divided = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in axes]
    return NamedSharding(mesh, PartitionSpec(*divided))


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Shards every leaf by its name; leaves without a name (counters) are replicated."""
    if mesh is None:
        return tree

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return _put(leaf, sharding(mesh, names[-1] if names else "", jax.numpy.shape(leaf)))

    return jax.tree_util.tree_map_with_path(put, tree)


def place_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Divides arrays by their first axis; every process has the complete batch and places its share."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda array: _put(array, NamedSharding(mesh, PartitionSpec(BATCH_AXES))), batch)


def gather(array: jax.Array) -> np.ndarray:
    """All values of an array; where each process holds a share, every process must call this."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def _put(array: Any, target: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, target)
    values = np.asarray(array)  # in this process: slicing a jax.Array would run on the complete mesh
    return jax.make_array_from_callback(values.shape, target, lambda index: values[index])
