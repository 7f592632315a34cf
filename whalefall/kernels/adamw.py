"""AdamW, and the norm of its gradients, each in one pass over memory.

The update of one number reads its weight, gradient and two moments and writes all but the gradient:
14 bytes where all are BF16; 18 where the BF16 weight is half of an FP32 master and the other half
lies beside it (``ops.halves``). Of the 6.56 B numbers of bench-6b an H200 moves these in 22 ms and
28 ms. The norm reads, once, gradients that come without sums of their squares (``ops.squares``).

Every tensor is a launch of its own: with stacked experts there are few, and the host runs ahead.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

SQUARES = 2**13
"""Numbers whose squares one program sums: few, so that a tensor of some millions fills the GPU."""


def adamw_(
    weight: Tensor,
    remainder: Tensor | None,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    divisor: Tensor,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    corrections: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update one weight in place, in FP32 if a BF16 one has a ``remainder``; all of one shape.

    All but the gradient are contiguous. That is divided by ``divisor``, a scalar on the device; if
    it is not finite, nothing is written. ``corrections`` are 1 - beta ** step.
    """
    assert all(x.is_contiguous() for x in (weight, exp_avg, exp_avg_sq))
    assert remainder is None or (weight.dtype == torch.bfloat16 and remainder.is_contiguous())
    numel, block = weight.numel(), 1024  # 8 numbers a thread: 16 bytes of BF16
    if numel:
        _adamw[triton.cdiv(numel, block),](
            weight, remainder, gradient.contiguous(), exp_avg, exp_avg_sq, divisor, numel,
            learning_rate, 1 - betas[0], 1 - betas[1], *corrections, eps, weight_decay, block,
        )  # fmt: skip


def sums_of_squares(x: Tensor) -> Tensor:
    """What the squares of x add up to: FP32 [parts], a part for every program."""
    sums = x.new_empty(triton.cdiv(x.numel(), SQUARES), dtype=torch.float32)
    if len(sums):
        _sum_of_squares[len(sums),](x.contiguous(), sums, x.numel(), SQUARES, num_warps=8)
    return sums


@triton.jit
def _adamw(
    weight_ptr, remainder_ptr, gradient_ptr, exp_avg_ptr, exp_avg_sq_ptr, divisor_ptr, numel,
    learning_rate, rate1, rate2, correction1, correction2, eps, weight_decay,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    divisor = tl.load(divisor_ptr)
    weight = tl.load(weight_ptr + at, inside)
    if remainder_ptr is not None:
        weight = _join(weight, tl.load(remainder_ptr + at, inside))
    weight = weight.to(tl.float32)
    gradient = tl.load(gradient_ptr + at, inside).to(tl.float32) / divisor
    exp_avg = tl.load(exp_avg_ptr + at, inside).to(tl.float32)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + at, inside).to(tl.float32)

    # The rates are 1 - beta, taken in double precision: of 0.999 FP32 would keep three digits less.
    exp_avg += rate1 * (gradient - exp_avg)
    exp_avg_sq += rate2 * (gradient * gradient - exp_avg_sq)
    direction = exp_avg / correction1 / (tl.sqrt(exp_avg_sq / correction2) + eps)
    # 1 - learning_rate * weight_decay would lose the decay of a small rate to rounding.
    weight -= learning_rate * (direction + weight_decay * weight)

    # The stores are masked, not branched around, so that no load waits for the divisor.
    taken = inside & (tl.abs(divisor) < float("inf"))
    if remainder_ptr is not None:
        weight, remainder = _split(weight)
        tl.store(remainder_ptr + at, remainder, taken)
    tl.store(weight_ptr + at, weight.to(weight_ptr.dtype.element_ty), taken)
    tl.store(exp_avg_ptr + at, exp_avg.to(exp_avg_ptr.dtype.element_ty), taken)
    tl.store(exp_avg_sq_ptr + at, exp_avg_sq.to(exp_avg_sq_ptr.dtype.element_ty), taken)


@triton.jit
def _join(rounded, remainder):
    """The FP32 number of both halves: ``ops.halves.join``."""
    upper = rounded.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (upper + remainder.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _split(wide):
    """Both halves of an FP32 number: ``ops.halves.split``."""
    bits = tl.where(wide == wide, wide.to(tl.int32, bitcast=True), 0x7FC00000)
    rounded = ((bits + 0x8000) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return rounded, bits.to(tl.int16)


@triton.jit
def _sum_of_squares(x_ptr, sums_ptr, numel, BLOCK: tl.constexpr):
    """One program: BLOCK numbers."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, at < numel, 0.0).to(tl.float32)
    tl.store(sums_ptr + tl.program_id(0), tl.sum(x * x, 0))
