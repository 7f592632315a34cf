"""Calling operations: those that bring their own backward pass, and those that have kernels."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

_HAS_NUMBA = find_spec("numba") is not None
_PLAIN = (Tensor, torch.nn.Parameter)
"""What has memory of its own: no subclass, which may have none."""


def call(operation: type[torch.autograd.Function], *inputs: Any) -> Tensor:
    """``operation.apply``, without autograd's bookkeeping where no gradient is wanted.

    Decoding is made of calls so short that the bookkeeping would take longer than the arithmetic.
    """
    if torch.is_grad_enabled():
        return operation.apply(*inputs)
    return operation.forward(_NothingKept(), *inputs)


class _NothingKept:
    """The context of a forward pass that has no backward."""

    needs_input_grad = ()

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass


def runs_kernel(*tensors: Tensor) -> bool:
    """Whether our Triton kernels take these: on CUDA, in BF16 or FP32."""
    if not tensors[0].is_cuda:  # first, because decoding on a CPU asks often
        return False
    return all(x.is_cuda and x.dtype in (torch.bfloat16, torch.float32) for x in tensors)


def runs_cpu_kernel(
    first: Tensor, *others: Tensor | None, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether our Numba kernels take these: in memory, of this type, with no gradient wanted.

    They read addresses, so whatever a kernel is given must have passed here or been made for it.
    None, an operand that is left out, passes.
    """
    if not first.is_cpu or not _HAS_NUMBA or torch.is_grad_enabled():
        return False
    for x in (first, *others):
        if x is None:
            continue
        in_memory = type(x) in _PLAIN and x.is_cpu and x.is_contiguous()
        if not in_memory or x.dtype != dtype:
            return False
    return True
