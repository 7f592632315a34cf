"""Causal attention's gradients on Hopper's tensor cores for V3's widths, 192 and 128, in Gluon.

Five products, as cuDNN's backward pass has, but each sum has one owner and one order. A program
owns 128 keys and walks the queries that see them. The gradients of keys and values stay in its
registers; those of the scores go to device memory in BF16. Times the keys they are the queries'
gradients: a product of its own, of 128 queries a program. Device memory sees every score's two
bytes twice, which takes less time than the two products that would make them again.

Scores lie keys by queries in blocks of 128 x 128, those on and below the diagonal one after the
other; a block is four tiles of 64 x 64, 8 KiB that the copy engine moves in one piece. A head of
4096 tokens has 17 MiB of them. Heads are worked on in groups that stay within ``MEMORY``, which
one head alone fills at 36 thousand tokens: longer rows are not for these kernels.

Warps have three roles in both kernels: one **loads** 64 rows at a time (TMA, which takes any
strides and gives zeros beyond the last row) into a ring of stages, two warpgroups **multiply**, 64
keys or queries each. Of 240 registers of a thread 160 are sums of keys and values, 32 the weights
and 32 their gradients. So the weights are made before the product that their gradients come from
begins, and the gradients of the scores go to the tensor core through shared memory, from where the
copy engine stores them, too. While one warpgroup is between its products the other one multiplies.

Barriers: ``ready`` and ``empty`` of a stage. Use u is phase u, and a wait names the parity of the
phase that must be over; what comes before phase 0 counts as over.
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_global_to_shared as tma_load,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import (
    async_copy_shared_to_global as tma_store,
)
from triton.experimental.gluon.language.nvidia.hopper.tma import store_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whalefall.kernels.barriers import barriers

MEMORY = 5 * 2**28  # bytes of scores' gradients
HALF = gl.constexpr(64)  # rows of a warpgroup, and of a step
ROWS = gl.constexpr(128)  # of a program
WIDE, REST = gl.constexpr(128), gl.constexpr(64)  # parts of queries and keys
VALUES = gl.constexpr(128)
GRAD_KV_STAGES = gl.constexpr(3)  # of 40 KiB each, beside 80 of keys and values and 16 of scores
GRAD_Q_STAGES = gl.constexpr(4)  # of 40 KiB each, beside 48 of sums
HEADS_TOGETHER = gl.constexpr(8)  # with 4096 rows, 21 MB that their programs read again from L2
LOG2_E = tl.constexpr(1.4426950408889634)

STATS = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))
OF_KEYS = gl.constexpr(gl.SliceLayout(1, SCORES))
OF_QUERIES = gl.constexpr(gl.SliceLayout(0, SCORES))


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels here are for these widths and lengths: up to 36,000 tokens, or one
    head's scores would take more than ``MEMORY``."""
    (tokens, qk), values = q.shape[-2:], v.shape[-1]
    fits = _score_bytes(tokens) <= MEMORY and k.shape[-2] == tokens
    return fits and 0 < qk - WIDE.value <= REST.value and REST.value < values <= VALUES.value


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grads: tuple[Tensor, Tensor, Tensor],
    scale: float,
) -> None:
    """Writes the gradients of q, k and v.

    All [batch, heads, seq, dim] as TMA reads them; ``grads`` in the memory of [batch, seq, heads,
    dim], lse [batch, heads, seq, 1] FP32.
    """
    batch, heads, tokens, _ = q.shape
    blocks = triton.cdiv(tokens, ROWS.value)
    rows = batch * heads
    groups = triton.cdiv(rows, MEMORY // _score_bytes(tokens))
    together = triton.cdiv(rows, groups)
    stats = lse.new_empty(rows * blocks * 2 * ROWS.value)
    _stats_kernel[(rows, 2 * blocks)](
        out, *out.stride(), grad, *grad.stride(), lse, *lse.stride()[:3], stats,
        heads, tokens, v.shape[-1], HALF=HALF.value, VALUES=VALUES.value, num_warps=4,
    )  # fmt: skip
    scores = q.new_empty(together * _score_bytes(tokens) // 2).view(-1, HALF.value)
    scores_blocks = TensorDescriptor.from_tensor(scores, [HALF.value] * 2, _operand(2))
    stats_blocks = TensorDescriptor.from_tensor(stats, [2 * HALF.value], STATS)
    key_blocks = _parts(k)
    grad_q, grad_k, grad_v = grads
    for first in range(0, rows, together):
        count = min(together, rows - first)
        _grad_kv_kernel[(count * blocks,)](
            *_parts(q), *key_blocks, _blocks(v, VALUES), _blocks(grad, VALUES), stats_blocks,
            scores_blocks, *_parts(grad_k), _blocks(grad_v, VALUES),
            scale, first, count, heads, tokens, num_warps=4,
        )  # fmt: skip
        _grad_q_kernel[(count * blocks,)](
            scores_blocks, *key_blocks, *_parts(grad_q),
            scale, first, count, heads, tokens, num_warps=4,
        )  # fmt: skip


def _score_bytes(tokens: int) -> int:
    """Of one head: BF16 tiles of 64 x 64, four in each block of 128 x 128 that is not hidden."""
    blocks = triton.cdiv(tokens, ROWS.value)
    return 2 * blocks * (blocks + 1) * 2 * HALF.value**2


def _parts(x: Tensor) -> tuple[TensorDescriptor, TensorDescriptor]:
    return _blocks(x[..., : WIDE.value], WIDE), _blocks(x[..., WIDE.value :], REST)


def _blocks(x: Tensor, width: gl.constexpr) -> TensorDescriptor:
    """Steps of one head's rows, with zeros to the width."""
    return TensorDescriptor.from_tensor(x, [1, 1, HALF.value, width.value], _operand(4))


@gluon.constexpr_function
def _operand(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@triton.jit(do_not_specialize=["heads", "tokens"])
def _stats_kernel(
    out, out_batch, out_head, out_row, out_col, grad, grad_batch, grad_head, grad_row, grad_col,
    lse, lse_batch, lse_head, lse_row, stats, heads, tokens, width,
    HALF: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """What a step needs of its queries: minus the base-2 logarithms of their sums, then the drift.

    The drift is the gradient of the scores' sum: of probabilities times their gradients.
    """
    row = tl.program_id(0)
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    lane = tl.arange(0, HALF)
    query = (tl.program_id(1) * HALF + lane).to(tl.int64)
    col = tl.arange(0, VALUES)
    here = query < tokens
    inside = here[:, None] & (col < width)[None, :]
    out += batch * out_batch + head * out_head
    grad += batch * grad_batch + head * grad_head
    one = tl.load(out + query[:, None] * out_row + col[None, :] * out_col, inside, 0.0)
    other = tl.load(grad + query[:, None] * grad_row + col[None, :] * grad_col, inside, 0.0)
    drift = tl.sum(one.to(tl.float32) * other.to(tl.float32), 1)
    # Of the queries after the last, infinity makes all probabilities zero.
    lse += batch * lse_batch + head * lse_head
    bits = tl.load(lse + query * lse_row, here, float("inf")) * LOG2_E
    stats += (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * 2 * HALF
    tl.store(stats + lane, -bits)
    tl.store(stats + HALF + lane, drift)


@gluon.jit(do_not_specialize=["first", "rows", "heads", "tokens"])
def _grad_kv_kernel(
    q, q_rest, k, k_rest, v, grad, stats, scores, grad_k, grad_k_rest, grad_v,
    scale, first, rows, heads, tokens,
):  # fmt: skip
    """One program: 128 keys, those with most queries first."""
    blocks = gl.cdiv(tokens, ROWS)
    row, block = _place(rows, blocks)
    own_k = gl.allocate_shared_memory(k.dtype, [2, HALF, WIDE], _operand(2))
    own_k_rest = gl.allocate_shared_memory(k.dtype, [2, HALF, REST], _operand(2))
    own_v = gl.allocate_shared_memory(k.dtype, [2, HALF, VALUES], _operand(2))
    q_ring = gl.allocate_shared_memory(q.dtype, [GRAD_KV_STAGES, HALF, WIDE], _operand(2))
    q_rest_ring = gl.allocate_shared_memory(q.dtype, [GRAD_KV_STAGES, HALF, REST], _operand(2))
    grad_ring = gl.allocate_shared_memory(q.dtype, [GRAD_KV_STAGES, HALF, VALUES], _operand(2))
    stats_ring = gl.allocate_shared_memory(gl.float32, [GRAD_KV_STAGES, 2 * HALF], stats.layout)
    tiles = gl.allocate_shared_memory(q.dtype, [2, HALF, HALF], _operand(2))
    own_ready = barriers(1, 1).index(0)
    ready, empty = barriers(GRAD_KV_STAGES, 1), barriers(GRAD_KV_STAGES, 2)
    fence_async_shared()  # the copy engine must see the barriers, too

    own = (own_k, own_k_rest, own_v, own_ready)
    ring = (q_ring, q_rest_ring, grad_ring, stats_ring, ready, empty)
    place = (row, block, blocks, first, heads)
    to = (scores, tiles, grad_k, grad_k_rest, grad_v)
    gl.warp_specialize(
        [
            (_grad_kv, (own, ring, to, place, scale, 0)),
            (_grad_kv, (own, ring, to, place, scale, 1)),
            (_load_queries, (own, ring, (q, q_rest, k, k_rest, v, grad, stats), place)),
        ],
        worker_num_warps=[4, 1],
        # The first role has what these leave of 504, which is 240.
        worker_num_regs=[240, 24],
    )


@gluon.jit
def _load_queries(own, ring, sources, place):
    own_k, own_k_rest, own_v, own_ready = own
    q_ring, q_rest_ring, grad_ring, stats_ring, ready, empty = ring
    q, q_rest, k, k_rest, v, grad, stats = sources
    row, block, blocks, first, _ = place
    own_bytes: gl.constexpr = k.block_type.nbytes + k_rest.block_type.nbytes + v.block_type.nbytes
    mbarrier.expect(own_ready, 2 * own_bytes)
    for side in gl.static_range(2):
        key = block * ROWS + side * HALF
        _load(k, _at(place, key), own_ready, own_k.index(side))
        _load(k_rest, _at(place, key), own_ready, own_k_rest.index(side))
        _load(v, _at(place, key), own_ready, own_v.index(side))
    of_queries: gl.constexpr = q.block_type.nbytes + q_rest.block_type.nbytes
    step_bytes: gl.constexpr = of_queries + grad.block_type.nbytes + stats.block_type.nbytes
    for i in range(2 * (blocks - block)):
        stage = i % GRAD_KV_STAGES
        full = ready.index(stage)
        query = block * ROWS + i * HALF
        mbarrier.wait(empty.index(stage), (i // GRAD_KV_STAGES & 1) ^ 1)
        mbarrier.expect(full, step_bytes)
        _load(q, _at(place, query), full, q_ring.index(stage))
        _load(q_rest, _at(place, query), full, q_rest_ring.index(stage))
        _load(grad, _at(place, query), full, grad_ring.index(stage))
        at = ((first + row) * blocks * ROWS + query) * 2
        tma_load(stats, [at], full, stats_ring.index(stage))


@gluon.jit
def _grad_kv(own, ring, to, place, scale, side: gl.constexpr):
    q_ring, q_rest_ring, grad_ring, stats_ring, ready, empty = ring
    scores_out, tiles, grad_k, grad_k_rest, grad_v = to
    row, block, blocks, _, _ = place
    k, k_rest, v = own[0].index(side), own[1].index(side), own[2].index(side)
    tile = tiles.index(side)
    tile_row = (_first_tile(row, block, block, blocks) + side) * HALF
    k_sums = gl.zeros([HALF, WIDE], gl.float32, SUMS)
    k_rest_sums = gl.zeros([HALF, REST], gl.float32, SCORES)
    v_sums = gl.zeros([HALF, VALUES], gl.float32, SUMS)
    scores = gl.zeros([HALF, HALF], gl.float32, SCORES)
    grads = gl.zeros([HALF, HALF], gl.float32, SCORES)
    mbarrier.wait(own[3], 0)
    # Without a loop of its own for the diagonal ptxas would wait for every single product.
    for below in gl.static_range(2):
        for i in range(2 if below else 0, 2 * (blocks - block) if below else 2):
            stage = i % GRAD_KV_STAGES
            q, q_rest, grad = q_ring.index(stage), q_rest_ring.index(stage), grad_ring.index(stage)
            mbarrier.wait(ready.index(stage), i // GRAD_KV_STAGES & 1)
            scores = warpgroup_mma(k, q.permute((1, 0)), scores, use_acc=False, is_async=True)
            scores = warpgroup_mma(k_rest, q_rest.permute((1, 0)), scores, is_async=True)
            scores, k_sums, k_rest_sums = warpgroup_mma_wait(0, deps=[scores, k_sums, k_rest_sums])
            mbarrier.arrive(empty.index((i + GRAD_KV_STAGES - 1) % GRAD_KV_STAGES), pred=i > 0)
            of_queries = stats_ring.index(stage)
            shift = of_queries.slice(0, HALF).load(OF_QUERIES)
            weights = gl.exp2(gl.fma(scores, scale * LOG2_E, shift[None, :]))
            if not below:
                key = side * HALF + gl.arange(0, HALF, layout=OF_KEYS)
                query = i * HALF + gl.arange(0, HALF, layout=OF_QUERIES)
                weights = gl.where(query[None, :] >= key[:, None], weights, 0.0)
            grads = warpgroup_mma(v, grad.permute((1, 0)), grads, use_acc=False, is_async=True)
            grads, weights = warpgroup_mma_wait(0, deps=[grads, weights])
            drift = of_queries.slice(HALF, HALF).load(OF_QUERIES)
            grads = weights * (grads - drift[None, :])
            store_wait(0)  # the step before is out of shared memory
            tile.store(grads.to(gl.bfloat16))
            fence_async_shared()
            operand = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
            v_sums = warpgroup_mma(operand, grad, v_sums, is_async=True)
            k_sums = warpgroup_mma(tile, q, k_sums, is_async=True)
            k_rest_sums = warpgroup_mma(tile, q_rest, k_rest_sums, is_async=True)
            tma_store(scores_out, [tile_row + 2 * i * HALF, 0], tile)
            started = [v_sums, operand, k_sums, k_rest_sums]
            v_sums, operand, k_sums, k_rest_sums = warpgroup_mma_wait(2, deps=started)
    k_sums, k_rest_sums = warpgroup_mma_wait(0, deps=[k_sums, k_rest_sums])
    at = _at(place, block * ROWS + side * HALF)
    _store(grad_v, at, v_sums, v)
    _store(grad_k, at, k_sums * scale, k)
    _store(grad_k_rest, at, k_rest_sums * scale, k_rest)
    store_wait(0)


@gluon.jit(do_not_specialize=["first", "rows", "heads", "tokens"])
def _grad_q_kernel(scores, k, k_rest, grad_q, grad_q_rest, scale, first, rows, heads, tokens):
    """One program: 128 queries, those with most keys first."""
    blocks = gl.cdiv(tokens, ROWS)
    row, block = _place(rows, blocks)
    place = (row, blocks - 1 - block, blocks, first, heads)
    tiles = gl.allocate_shared_memory(k.dtype, [2 * GRAD_Q_STAGES, HALF, HALF], _operand(2))
    k_ring = gl.allocate_shared_memory(k.dtype, [GRAD_Q_STAGES, HALF, WIDE], _operand(2))
    k_rest_ring = gl.allocate_shared_memory(k.dtype, [GRAD_Q_STAGES, HALF, REST], _operand(2))
    own_q = gl.allocate_shared_memory(k.dtype, [2, HALF, WIDE], _operand(2))
    own_q_rest = gl.allocate_shared_memory(k.dtype, [2, HALF, REST], _operand(2))
    ready, empty = barriers(GRAD_Q_STAGES, 1), barriers(GRAD_Q_STAGES, 2)
    fence_async_shared()  # the copy engine must see the barriers, too

    ring = (tiles, k_ring, k_rest_ring, ready, empty)
    to = (grad_q, grad_q_rest, own_q, own_q_rest)
    gl.warp_specialize(
        [
            (_grad_q, (ring, to, place, scale, 0)),
            (_grad_q, (ring, to, place, scale, 1)),
            (_load_keys, (ring, (scores, k, k_rest), place)),
        ],
        worker_num_warps=[4, 1],
        worker_num_regs=[232, 40],
    )


@gluon.jit
def _load_keys(ring, sources, place):
    tiles, k_ring, k_rest_ring, ready, empty = ring
    scores, k, k_rest = sources
    row, block, blocks, _, _ = place
    of_keys: gl.constexpr = k.block_type.nbytes + k_rest.block_type.nbytes
    for i in range(2 * (block + 1)):
        stage = i % GRAD_Q_STAGES
        full = ready.index(stage)
        mbarrier.wait(empty.index(stage), (i // GRAD_Q_STAGES & 1) ^ 1)
        mbarrier.expect(full, of_keys + 2 * scores.block_type.nbytes)
        tile = _first_tile(row, i // 2, block, blocks) + i % 2
        for side in gl.static_range(2):
            at = (tile + 2 * side) * HALF
            tma_load(scores, [at, 0], full, tiles.index(2 * stage + side))
        _load(k, _at(place, i * HALF), full, k_ring.index(stage))
        _load(k_rest, _at(place, i * HALF), full, k_rest_ring.index(stage))


@gluon.jit
def _grad_q(ring, to, place, scale, side: gl.constexpr):
    tiles, k_ring, k_rest_ring, ready, empty = ring
    grad_q, grad_q_rest, own_q, own_q_rest = to
    block = place[1]
    sums = gl.zeros([HALF, WIDE], gl.float32, SUMS)
    rest_sums = gl.zeros([HALF, REST], gl.float32, SCORES)
    # The first step apart: sums that may still be zeros at the end make ptxas wait everywhere.
    for later in gl.static_range(2):
        for i in range(1 if later else 0, 2 * (block + 1) if later else 1):
            stage = i % GRAD_Q_STAGES
            mbarrier.wait(ready.index(stage), i // GRAD_Q_STAGES & 1)
            tile = tiles.index(2 * stage + side).permute((1, 0))
            sums = warpgroup_mma(tile, k_ring.index(stage), sums, is_async=True)
            rest_sums = warpgroup_mma(tile, k_rest_ring.index(stage), rest_sums, is_async=True)
            sums, rest_sums = warpgroup_mma_wait(2, deps=[sums, rest_sums])
            mbarrier.arrive(empty.index((i + GRAD_Q_STAGES - 1) % GRAD_Q_STAGES), pred=i > 0)
    sums, rest_sums = warpgroup_mma_wait(0, deps=[sums, rest_sums])
    at = _at(place, block * ROWS + side * HALF)
    _store(grad_q, at, sums * scale, own_q.index(side))
    _store(grad_q_rest, at, rest_sums * scale, own_q_rest.index(side))
    store_wait(0)


@gluon.jit
def _place(rows, blocks):
    """Row and block of this program: those of a few heads in turn, from the first block on."""
    group = gl.program_id(0) // (HEADS_TOGETHER * blocks)
    inside = gl.program_id(0) % (HEADS_TOGETHER * blocks)
    together = gl.minimum(HEADS_TOGETHER, rows - group * HEADS_TOGETHER)
    return group * HEADS_TOGETHER + inside % together, inside // together


@gluon.jit
def _first_tile(row, key_block, query_block, blocks):
    """Of a block's four: of the first 64 queries those with 64 and 64 keys, then of the others."""
    before = key_block * blocks - key_block * (key_block - 1) // 2
    return 4 * (row * (blocks * (blocks + 1) // 2) + before + query_block - key_block)


@gluon.jit
def _at(place, token):
    row, _, _, first, heads = place
    return (first + row) // heads, (first + row) % heads, token


@gluon.jit
def _load(source, at, full, to):
    tma_load(source, [at[0], at[1], at[2], 0], full, to.reshape(source.block_shape))


@gluon.jit
def _store(out, at, sums, through):
    through.store(sums.to(out.dtype))
    fence_async_shared()
    tma_store(out, [at[0], at[1], at[2], 0], through.reshape(out.block_shape))
