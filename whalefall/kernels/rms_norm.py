"""RMSNorm in one pass over its rows, with the additions before it and those of its gradients.

A program holds whole rows, so the mean, the scaling and, in the block's form, the addition of what
is new in the residual stream happen on one reading. In the same way backward adds the gradients of
all who read the normed rows, and the residual stream's own. Each number is read or written once:
forward moves 2 an element (3 and the deltas with an addition), backward 2 and the gradients. Both
are bound by memory. Sums are in FP32 and rounded once.

The weight's gradient is a sum over all rows: each of a fixed number of programs sums its share in
FP32 registers and writes one partial row, and a second kernel adds the partial rows in order, so
that no run differs from another. The last program to finish could add them without a launch, but
not as fast: it would read 2 MB by itself, for which a multiprocessor needs 20 us.
"""

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 2 * 132
"""Of a backward pass: two for each multiprocessor of an H100 or H200, so that one computes while
the other waits; more would only leave more partial rows to add."""
STAGED_BYTES = 200 * 2**10
"""Of shared memory that one may fill with rows on their way; a multiprocessor has 227 KiB."""


@triton.jit
def _rms_norm_kernel(
    x_ptr, delta_ptrs, sum_ptr, weight_ptr, out_ptr, rstd_ptr,
    rows, x_stride, delta_strides, eps,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program: ROWS whole rows. Without deltas there is no sum, without a weight no norm."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    in_rows, in_columns = row < rows, column < DIM
    inside = in_rows[:, None] & in_columns[None, :]
    dense = row[:, None] * DIM + column[None, :]

    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=inside, other=0)
    x = x.to(tl.float32)
    for i in tl.static_range(len(delta_ptrs)):
        delta_at = delta_ptrs[i] + row[:, None] * delta_strides[i] + column[None, :]
        x += tl.load(delta_at, mask=inside, other=0).to(tl.float32)
    if weight_ptr is not None:  # on its way together with the rows
        weight = tl.load(weight_ptr + column, mask=in_columns, other=0).to(tl.float32)
    if len(delta_ptrs) > 0:
        # What is normed is the sum as it is stored: backward sees no other.
        total = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + dense, total, mask=inside)
        x = total.to(tl.float32)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(x * x, 1) / DIM + eps)
        out = x * rstd[:, None] * weight[None, :]
        tl.store(out_ptr + dense, out.to(out_ptr.dtype.element_ty), mask=inside)
        tl.store(rstd_ptr + row, rstd, mask=in_rows)


@triton.jit
def _rms_norm_backward_kernel(
    grad_ptrs, grad_sum_ptr, x_ptr, weight_ptr, rstd_ptr, grad_x_ptr, partial_ptr,
    rows, grad_strides, grad_sum_stride, x_stride,
    DIM: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program: every n-th ROWS rows."""
    program = tl.program_id(0)
    column = tl.arange(0, COLUMNS)
    in_columns = column < DIM
    # Laid out as the rows are: moved between threads, it would hold up the first rows' loads.
    repeated = tl.zeros([ROWS, 1], tl.int32) + column[None, :]
    weight = tl.load(weight_ptr + repeated, mask=repeated < DIM, other=0).to(tl.float32)
    grad_weight = tl.zeros([ROWS, COLUMNS], tl.float32)
    # The stages keep the next rows on their way while these are reduced.
    for tile in tl.range(program, tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < rows)[:, None] & in_columns[None, :]
        x_at = x_ptr + row[:, None] * x_stride + column[None, :]
        normed = tl.load(x_at, mask=inside, other=0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0)[:, None]
        grad_at = grad_ptrs[0] + row[:, None] * grad_strides[0] + column[None, :]
        grad = tl.load(grad_at, mask=inside, other=0).to(tl.float32)
        for i in tl.static_range(1, len(grad_ptrs)):
            grad_at = grad_ptrs[i] + row[:, None] * grad_strides[i] + column[None, :]
            grad += tl.load(grad_at, mask=inside, other=0).to(tl.float32)
        normed *= rstd
        grad_weight += grad * normed
        grad *= weight
        along = tl.sum(grad * normed, 1)[:, None] / DIM
        grad_x = (grad - normed * along) * rstd
        if grad_sum_ptr is not None:
            grad_sum_at = grad_sum_ptr + row[:, None] * grad_sum_stride + column[None, :]
            grad_x += tl.load(grad_sum_at, mask=inside, other=0).to(tl.float32)
        dense = row[:, None] * DIM + column[None, :]
        tl.store(grad_x_ptr + dense, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * DIM + column, tl.sum(grad_weight, 0), mask=in_columns)


@triton.jit
def _add_partial_rows_kernel(
    partial_ptr, out_ptr, partial_rows, dim, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One program: COLUMNS columns of the sum. All its loads are on their way at once."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < partial_rows) & (column < dim)[None, :]
    partial = tl.load(partial_ptr + row * dim + column[None, :], mask=inside, other=0)
    total = tl.sum(partial, 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + column, total, mask=column < dim)


def forward(
    x: Tensor, deltas: Sequence[Tensor], weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """x + deltas [..., dim] in the type of x, it normed, and 1 / rms of every row [rows] in FP32.

    Without deltas the sum is x itself.
    """
    rows = x.numel() // x.shape[-1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    total = torch.empty_like(out) if deltas else x
    _launch(x, deltas, total, weight, out, rstd, eps)
    return total, out, rstd


def add(x: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """x + deltas [..., dim] in the type of x: the bits of ``forward``'s sum."""
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, deltas, total, None, None, None, 0.0)
    return total


def _launch(
    x: Tensor,
    deltas: Sequence[Tensor],
    total: Tensor,
    weight: Tensor | None,
    out: Tensor | None,
    rstd: Tensor | None,
    eps: float,
) -> None:
    assert all(delta.numel() == x.numel() for delta in deltas)
    if not x.numel():
        return
    dim = x.shape[-1]
    rows = x.numel() // dim
    x, x_stride = _rows(x)
    deltas, delta_strides = _all_rows(deltas)
    tile, columns, warps = _tile(dim, 4)
    _rms_norm_kernel[(triton.cdiv(rows, tile),)](
        x, deltas, total, weight, out, rstd, rows, x_stride, delta_strides, eps,
        dim, tile, columns, num_warps=warps,
    )  # fmt: skip


def backward(
    grads: Sequence[Tensor], grad_sum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed, x [..., dim], plus ``grad_sum``; and of the weight.

    The gradient of the norm is the sum of ``grads``, at least one.
    """
    rows, dim = len(rstd), len(weight)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not rows:
        return grad_x, torch.zeros_like(weight)
    x, x_stride = _rows(x)
    grads, grad_strides = _all_rows(grads)
    grad_sum, grad_sum_stride = (None, 0) if grad_sum is None else _rows(grad_sum)
    tile, columns, warps = _tile(dim, 8)
    programs = min(PROGRAMS, triton.cdiv(rows, tile))
    partial = torch.empty(programs, dim, dtype=torch.float32, device=x.device)
    inputs = [x, *grads] if grad_sum is None else [x, *grads, grad_sum]
    # Three stages have two tiles of each input on their way, two have one.
    stage = tile * columns * sum(tensor.itemsize for tensor in inputs)
    stages = min(3, 1 + STAGED_BYTES // stage)
    _rms_norm_backward_kernel[(programs,)](
        grads, grad_sum, x, weight, rstd, grad_x, partial,
        rows, grad_strides, grad_sum_stride, x_stride,
        dim, tile, columns, stages, num_warps=warps,
    )  # fmt: skip
    grad_weight = torch.empty_like(weight)
    height, width = triton.next_power_of_2(PROGRAMS), 16
    _add_partial_rows_kernel[(triton.cdiv(dim, width),)](
        partial, grad_weight, programs, dim, height, width, num_warps=8
    )
    return grad_x, grad_weight


def _all_rows(tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    laid = [_rows(tensor) for tensor in tensors]
    return tuple(tensor for tensor, _ in laid), tuple(stride for _, stride in laid)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x as contiguous rows and the numbers from one to the next; a copy only where it must be."""
    if not x.is_contiguous():
        x = x.reshape(-1, x.shape[-1])
        x = x if x.stride(1) == 1 else x.contiguous()
        return x, x.stride(0)
    return x, x.shape[-1]  # whatever its shape: a kernel sees no more than where it begins


@cache
def _tile(dim: int, warps: int) -> tuple[int, int, int]:
    """A program's rows, columns and warps: so many for 4096 numbers, more for longer rows."""
    columns = triton.next_power_of_2(dim)
    return max(1, 4096 // columns), columns, min(16, warps * max(1, columns // 4096))
