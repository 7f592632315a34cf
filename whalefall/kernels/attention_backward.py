"""Gradients of attention with the same bits in every run (FlashAttention-2's, in two kernels).

cuDNN's backward pass adds the queries' gradients with atomics, in an order that varies. Here one
kernel walks the keys of a block of queries and another the queries of a block of keys, so that
every sum has one owner and one order. Both make the scores again, from the logarithms that the
forward pass kept: seven products where five would do.

Sums stay in FP32 registers until they are whole. 128 keys with 192 + 128 of them take 160 registers
a thread of eight warps, and a step of 64 queries 32 for the scores and 32 for their gradients. From
there both go to the tensor core as they are, keys by queries in one kernel and queries by keys in
the other. A step's products come before its softmax and its sums after it, so the tensor core adds
while the next step begins. TMA loads two steps ahead, with any strides, and gives zeros beyond the
last row or number. Queries and keys come in two parts as wide as powers of 2: 192 is 128 and 64.

Causal rows of V3's widths, which are what training has, go to ``attention_backward_hopper``, with
five products; here are masks and other widths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from whalefall.kernels import attention_backward_hopper
from whalefall.kernels.device import is_hopper

LOG2_E = tl.constexpr(1.4426950408889634)
HEADS_TOGETHER = tl.constexpr(8)  # with 4096 rows, 21 MB that their programs read again from L2


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether both passes are for these: cuDNN's forward needs two keys, the backward Hopper."""
    return (
        is_hopper(q.device)
        and all(x.dtype == torch.bfloat16 for x in (q, k, v))
        and q.shape[-1] in range(32, 257, 16)
        and v.shape[-1] in range(16, 257, 16)
        and q.numel() > 0
        and k.shape[2] > 1
    )


def is_fastest(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether this pass takes less time than cuDNN's: 1.55 and 1.98 ms at 4 x 16 heads x 4096."""
    return mask is None and attention_backward_hopper.takes(q, k, v)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, each in memory laid out as [batch, seq, heads, dim].

    q and k [batch, heads, seq, qk]; v, out and grad [batch, heads, seq, v], all BF16. lse [batch,
    heads, queries, 1] FP32: the logarithm of each query's sum of exponentials. mask bool [batch, 1,
    queries, keys], or None for causal.
    """
    (batch, heads, queries, qk), keys = q.shape, k.shape[2]
    q, k, v, out, grad = map(_aligned, (q, k, v, out, grad))
    grad_q, grad_k, grad_v = (
        x.new_empty(batch, x.shape[2], heads, x.shape[3]).transpose(1, 2) for x in (q, k, v)
    )
    if is_fastest(q, k, v, mask):
        grads = (grad_q, grad_k, grad_v)
        attention_backward_hopper.backward(grad, q, k, v, out, lse, grads, scale)
        return grads
    mask = None if mask is None else mask.expand(batch, -1, -1, -1)
    wide = triton.next_power_of_2(qk) // 2
    parts = (wide, triton.next_power_of_2(qk - wide))
    values = triton.next_power_of_2(v.shape[-1])
    own, step = _tile(sum(parts) + values, mask is not None)
    stats = lse.new_empty(2, batch * heads, triton.cdiv(queries, own) * own)
    shared = {
        "mask": None if mask is None else (mask, mask.stride(0), *mask.stride()[2:]),
        "scale": scale, "rows": batch * heads, "heads": heads, "queries": queries, "keys": keys,
        "num_warps": 8, "num_stages": 3,
    }  # fmt: skip
    _grad_q_kernel[(batch * heads * triton.cdiv(queries, own),)](
        *_blocks(q, own, *parts), *_blocks(k, step, *parts), *_blocks(v, step, values),
        *_blocks(out, own, values), *_blocks(grad, own, values), *_blocks(grad_q, own, *parts),
        (lse, *lse.stride()[:3]), TensorDescriptor.from_tensor(stats, [1, 1, own]),
        QUERIES=own, KEYS=step, **shared,
    )  # fmt: skip
    _grad_kv_kernel[(batch * heads * triton.cdiv(keys, own),)](
        *_blocks(q, step, *parts), *_blocks(k, own, *parts), *_blocks(v, own, values),
        *_blocks(grad, step, values), *_blocks(grad_k, own, *parts), *_blocks(grad_v, own, values),
        TensorDescriptor.from_tensor(stats, [1, 1, step]),
        QUERIES=step, KEYS=own, **shared,
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def _tile(lanes: int, masked: bool) -> tuple[int, int]:
    """Rows that a program owns, and those of a step: what 255 registers and 227 KiB hold."""
    if lanes > 320:
        return 64, 32
    return 128, 32 if masked else 64


def _aligned(x: Tensor) -> Tensor:
    """x as TMA reads it: copied only if its numbers or rows lie otherwise than in 16 bytes."""
    steps = all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:-1])
    if steps and x.stride(-1) == 1 and x.data_ptr() % 16 == 0:
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _blocks(x: Tensor, rows: int, *lanes: int) -> list[TensorDescriptor]:
    """Blocks of one head's rows, the columns in parts of so many lanes or fewer."""
    parts = zip(x.split(lanes[0], -1), lanes, strict=True)
    return [TensorDescriptor.from_tensor(part, [1, 1, rows, width]) for part, width in parts]


@triton.jit(do_not_specialize=["rows", "heads", "queries", "keys"])
def _grad_q_kernel(
    q, q_rest, k, k_rest, v, out, grad, grad_q, grad_q_rest, lse, stats, mask,
    scale, rows, heads, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: a block of queries. Leaves for the other kernel what is known of each query."""
    blocks = tl.cdiv(queries, QUERIES)
    row, block = _place(rows, blocks)
    batch, head = row // heads, row % heads
    first = (blocks - 1 - block) * QUERIES  # the longest first
    query = first + tl.arange(0, QUERIES)
    lse_at = lse[0] + batch.to(tl.int64) * lse[1] + head * lse[2] + query.to(tl.int64) * lse[3]
    # Of the queries after the last, infinity makes all probabilities zero.
    bits = tl.load(lse_at, query < queries, float("inf")) * LOG2_E
    grad_block, out_block = _load(grad, batch, head, first), _load(out, batch, head, first)
    # The gradient of the scores' sum: of probabilities times their gradients.
    drift = tl.sum(grad_block.to(tl.float32) * out_block.to(tl.float32), 1)
    stats.store([0, row, first], tl.reshape(bits, stats.block_shape))
    stats.store([1, row, first], tl.reshape(drift, stats.block_shape))

    q_block, q_rest_block = _load(q, batch, head, first), _load(q_rest, batch, head, first)
    sums = tl.zeros(q_block.shape, tl.float32)
    rest_sums = tl.zeros(q_rest_block.shape, tl.float32)
    end = keys if mask is not None else tl.minimum(first + QUERIES, keys)
    for at in range(0, end, KEYS):
        k_block, k_rest_block = _load(k, batch, head, at), _load(k_rest, batch, head, at)
        v_block = _load(v, batch, head, at)
        scores = tl.dot(q_rest_block, k_rest_block.T, tl.dot(q_block, k_block.T))
        grads = tl.dot(grad_block, v_block.T)
        weights = tl.exp2(scores * (scale * LOG2_E) - bits[:, None])
        if mask is not None or at + KEYS > first:
            key = at + tl.arange(0, KEYS)[None, :]
            seen = _visible(mask, batch, query[:, None], key, queries, keys)
            weights = tl.where(seen, weights, 0.0)
        grads = (weights * (grads - drift[:, None])).to(k_block.dtype)
        sums = tl.dot(grads, k_block, sums)
        rest_sums = tl.dot(grads, k_rest_block, rest_sums)
    _store(grad_q, batch, head, first, sums * scale)
    _store(grad_q_rest, batch, head, first, rest_sums * scale)


@triton.jit(do_not_specialize=["rows", "heads", "queries", "keys"])
def _grad_kv_kernel(
    q, q_rest, k, k_rest, v, grad, grad_k, grad_k_rest, grad_v, stats, mask,
    scale, rows, heads, queries, keys, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """One program: a block of keys, the one with most queries first."""
    row, block = _place(rows, tl.cdiv(keys, KEYS))
    batch, head = row // heads, row % heads
    first = block * KEYS
    key = first + tl.arange(0, KEYS)
    k_block, k_rest_block = _load(k, batch, head, first), _load(k_rest, batch, head, first)
    v_block = _load(v, batch, head, first)
    k_sums = tl.zeros(k_block.shape, tl.float32)
    k_rest_sums = tl.zeros(k_rest_block.shape, tl.float32)
    v_sums = tl.zeros(v_block.shape, tl.float32)
    begin = 0 if mask is not None else first // QUERIES * QUERIES
    for at in range(begin, queries, QUERIES):
        q_block, q_rest_block = _load(q, batch, head, at), _load(q_rest, batch, head, at)
        grad_block = _load(grad, batch, head, at)
        # In this order 255 registers are enough; else the compiler would wait for every product.
        grads = tl.dot(v_block, grad_block.T)
        scores = tl.dot(k_rest_block, q_rest_block.T, tl.dot(k_block, q_block.T))
        bits = tl.reshape(stats.load([0, row, at]), [1, QUERIES])
        weights = tl.exp2(scores * (scale * LOG2_E) - bits)
        if mask is not None or at < first + KEYS:
            query = at + tl.arange(0, QUERIES)[None, :]
            seen = _visible(mask, batch, query, key[:, None], queries, keys)
            weights = tl.where(seen, weights, 0.0)
        drift = tl.reshape(stats.load([1, row, at]), [1, QUERIES])
        grads = (weights * (grads - drift)).to(q_block.dtype)
        v_sums = tl.dot(weights.to(grad_block.dtype), grad_block, v_sums)
        k_sums = tl.dot(grads, q_block, k_sums)
        k_rest_sums = tl.dot(grads, q_rest_block, k_rest_sums)
    _store(grad_k, batch, head, first, k_sums * scale)
    _store(grad_k_rest, batch, head, first, k_rest_sums * scale)
    _store(grad_v, batch, head, first, v_sums)


@triton.jit
def _place(rows, blocks):
    """Row and block of this program: those of a few heads in turn, from the first block on."""
    group = tl.program_id(0) // (HEADS_TOGETHER * blocks)
    inside = tl.program_id(0) % (HEADS_TOGETHER * blocks)
    together = tl.minimum(HEADS_TOGETHER, rows - group * HEADS_TOGETHER)
    return group * HEADS_TOGETHER + inside % together, inside // together


@triton.jit
def _load(x, batch, head, row):
    """A block of one head's rows; zeros where there are none."""
    block = x.load([batch, head, row, 0])
    return tl.reshape(block, [x.block_shape[2], x.block_shape[3]])


@triton.jit
def _store(x, batch, head, row, sums):
    x.store([batch, head, row, 0], tl.reshape(sums.to(x.dtype), x.block_shape))


@triton.jit
def _visible(mask, batch, query, key, queries, keys):
    """Which queries see which keys: one of them is a row, the other a column."""
    if mask is None:
        seen = query >= key
    else:
        at = batch.to(tl.int64) * mask[1] + query.to(tl.int64) * mask[2] + key * mask[3]
        seen = tl.load(mask[0] + at, (query < queries) & (key < keys), 0) != 0
    return seen
