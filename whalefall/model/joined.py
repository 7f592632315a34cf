"""Weights that lie one behind another in memory, so that several are one without a copy.

The parameters stay what they are, under their names, and are views of one piece of memory. Whether
they are is seen from where they lie, so that nothing goes wrong when they move apart
(``Module.to``, a deep copy); then each is multiplied by itself again.
"""

import torch
from torch import Tensor

from whalefall.ops.few_rows import Weight


@torch.no_grad()
def lay_together(*weights: Weight) -> Weight | None:
    """Move weights into one piece of memory, in this order; scales into another.

    Nothing happens where they lie so already. Returns ``as_one`` of them.
    """
    if (whole := as_one(*weights)) is not None:
        return whole
    for tensors in zip(*weights, strict=True):
        if tensors[0] is None:
            continue
        sizes = [tensor.numel() for tensor in tensors]
        memory = torch.empty(sum(sizes), dtype=tensors[0].dtype, device=tensors[0].device)
        for tensor, part in zip(tensors, memory.split(sizes), strict=True):
            tensor.data = part.view(tensor.shape).copy_(tensor)
    return as_one(*weights)


def if_together(whole: Weight | None, *parts: Tensor) -> Weight | None:
    """What ``as_one`` gave for weights with these values, if they still lie so."""
    if whole is None:
        return None
    at = whole.values.data_ptr()
    for part in parts:
        if part.data_ptr() != at:
            return None
        at += part.nbytes
    return whole


def as_one(*weights: Weight) -> Weight | None:
    """The weights as one, stacked along their first dimension; None where they lie apart."""
    values = _as_one(*(weight.values for weight in weights))
    if values is None or weights[0].scales is None:
        return None if values is None else Weight(values)
    scales = _as_one(*(weight.scales for weight in weights if weight.scales is not None))
    return None if scales is None else Weight(values, scales)


def _as_one(*tensors: Tensor) -> Tensor | None:
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    row = first.stride(0)
    rows = (end - first.data_ptr()) // (row * first.itemsize)
    if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
        return None  # neighbours by chance
    return first.detach().as_strided((rows, *first.shape[1:]), first.stride())
