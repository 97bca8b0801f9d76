"""Where parameters lie on a mesh of devices: rules on names, one code for one device, one host and many.

Axes: "data" repeats everything and divides the batch, "fsdp" divides the batch and each parameter, "tensor" divides
heads, the feed-forward width and the vocabulary.
"""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from codegemma.jax.forward import BATCH_AXES

AXES = (*BATCH_AXES, "tensor")
RULES = (  # the first that matches the last part of a name; an axis that does not divide a shape is left out
    (r"embed", ("tensor", "fsdp")),
    (r"q|k|v|gate|up", ("tensor", "fsdp")),
    (r"o|down", ("fsdp", "tensor")),
    (r"a|rows", (None, "fsdp")),
    (r"b", ("tensor", None)),
    (r".*", ()),
)


def parse(text: str | None) -> Mesh | None:
    """A mesh from "fsdp=8,tensor=4": its product must be the number of devices. None for none.

    Raises ValueError naming the rule that the text breaks.
    """
    if text is None:
        if jax.process_count() > 1:
            raise ValueError(
                f"{jax.process_count()} processes train together on a mesh: pass --mesh, such as "
                f"fsdp={jax.device_count()}"
            )
        return None
    found = re.findall(r"(?:^|,)(\w+)=(\d+)(?=,|$)", text)
    sizes = dict.fromkeys(AXES, 1) | {name: int(size) for name, size in found}
    whole = ",".join(f"{name}={size}" for name, size in found) == text and len(dict(found)) == len(found)
    if set(sizes) != set(AXES) or not whole or 0 in sizes.values():
        raise ValueError(
            f"mesh must look like fsdp=8,tensor=4 with axes of {', '.join(AXES)}, each once, got {text!r}"
        )
    if math.prod(sizes.values()) != jax.device_count():
        raise ValueError(
            f"mesh {text} has {math.prod(sizes.values())} places, but there are {jax.device_count()} devices: "
            "make the product equal"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def use(mesh: Mesh | None) -> Any:
    """A context in which `model.forward` divides its activations over the mesh."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def batch_parts(mesh: Mesh | None) -> int:
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES) if mesh else 1


def sharding(mesh: Mesh, name: str, shape: tuple[int, ...]) -> NamedSharding:
    """Where a parameter (or its gradient, or its moments) lies."""
    spec = next(spec for pattern, spec in RULES if re.fullmatch(pattern, name.split(".")[-1]))
    kept = [
        axis if axis and size % mesh.shape[axis] == 0 else None
        for axis, size in zip(spec, shape, strict=False)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))


def place(mesh: Mesh | None, tree: Any) -> Any:
    """Puts every leaf where its name says; leaves without a name (counters) lie everywhere."""
    if mesh is None:
        return tree

    def put(path: tuple[Any, ...], leaf: Any) -> Any:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return _put(leaf, sharding(mesh, names[-1] if names else "", jax.numpy.shape(leaf)))

    return jax.tree_util.tree_map_with_path(put, tree)


def place_batch(mesh: Mesh | None, batch: Any) -> Any:
    """Divides arrays by their first axis; every process holds the whole batch and puts its share."""
    if mesh is None:
        return batch
    return jax.tree.map(lambda array: _put(array, NamedSharding(mesh, PartitionSpec(BATCH_AXES))), batch)


def _put(array: Any, where: NamedSharding) -> jax.Array:
    if jax.process_count() == 1 or isinstance(array, jax.Array) and not array.is_fully_addressable:
        return jax.device_put(array, where)
    whole = np.asarray(array)  # of this process alone: a slice of a jax.Array would be made on the whole mesh
    return jax.make_array_from_callback(whole.shape, where, lambda index: whole[index])
