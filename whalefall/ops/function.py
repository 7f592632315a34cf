"""Calling operations that bring their own backward pass."""

from typing import Any

import torch
from torch import Tensor


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
