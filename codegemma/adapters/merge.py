"""Merging adapters into a model's weights."""

from __future__ import annotations

from functools import partial

import numpy as np

from codegemma.adapters.adapter import ORDERS, Adapter
from codegemma.checkpoints import Checkpoint
from codegemma.checkpoints.tensors import ArrayTensor, LazyTensor, Tensor, from_float32
from codegemma.convert.quantize import QUANTISED, quantize_matrix
from codegemma.native import dequantize


def merge(checkpoint: Checkpoint, *adapters: Adapter, blocks_as: str | None = None) -> Checkpoint:
    """The model with adapters merged into its weights; each tensor is computed when it is read.

    Float tensors keep their type. Quantised matrices that an adapter changes are decoded, changed and
    quantised again, which rounds them a second time; with `blocks_as` ("F32", "BF16", "F16"), they are stored
    in that type instead. Raises ValueError where an adapter does not fit the model.
    """
    for adapter in adapters:
        adapter.check(checkpoint.config)
    tensors = dict(checkpoint.tensors)
    for name, tensor in checkpoint.tensors.items():
        type = blocks_as if blocks_as and tensor.type in QUANTISED else tensor.type
        compute = _merged_embedding if name == "embed" else partial(_merged_matrix, name)
        changes = [
            adapter for adapter in adapters if (adapter.rows if name == "embed" else name in adapter.a)
        ]
        if changes:
            tensors[name] = LazyTensor.computed(type, tensor.shape, partial(compute, tensor, changes, type))
    orders = {order for adapter in adapters for order in ORDERS if adapter.trained_for(order)}
    return checkpoint.with_weights(tensors, orders | (checkpoint.fim_orders or set()))


def _merged_matrix(name: str, tensor: Tensor, adapters: list[Adapter], type: str) -> np.ndarray:
    """The stored bytes of a matrix to which the adapters' changes are added."""
    values = dequantize(tensor)
    for adapter in adapters:
        values += adapter.delta(name)
    return _encoded(values, type)


def _merged_embedding(tensor: Tensor, adapters: list[Adapter], type: str) -> np.ndarray:
    """The stored bytes of the embedding with replaced rows. Where the stored type stays the same, the other
    rows' bytes are unchanged.
    """
    data = np.array(tensor.data) if tensor.type == type else _encoded(dequantize(tensor), type)
    for adapter in adapters:
        for token, row in adapter.rows.items():
            data.reshape(tensor.shape[0], -1)[token] = _encoded(row[None], type).reshape(-1)
    return data


def _encoded(values: np.ndarray, type: str) -> np.ndarray:
    """float32 [rows, columns] as the bytes of a type."""
    if type in QUANTISED:
        return quantize_matrix(ArrayTensor.of(values), type)[0]
    return np.ascontiguousarray(from_float32(type, values)).view(np.uint8)
