"""Latent decoding on Hopper's tensor cores for V3's widths, 512 + 64 numbers a token, in Gluon.

A program has 64 queries of a row and walks the pages that ``latent_schedule`` gives its part. Its
warps have four roles:

* one warp **loads**: the copy engine (TMA) brings queries, and pages into a ring of two stages;
* a warpgroup **scores**: the 64 x 64 products of queries and keys, and from them the weights;
* two warpgroups **mix**: one the left, the other the right half of the values. 64 x 512 FP32 sums
  are 256 registers a thread of one warpgroup, and 128 of two.

While the mixers work on a page, the scorer works on the next. Queries and two pages take 216 of
227 KiB, so the weights have no room of their own: once a page is scored, nobody needs its rotated
keys, which are as large as the weights and are overwritten by them.

With few heads most of the 64 rows are empty. That costs nothing: then the bound is memory, and
moving a page takes longer than multiplying it with 64 queries.

Barriers, of which use u is phase u (a wait names the parity of a phase; what comes before phase 0
counts as over): ``ready``, of a stage's left values, right values and rotated keys, completes when
their bytes have come; ``weighed`` when weights and factors of a stage are written; ``empty`` when
both mixers have read the stage. Once a piece: ``q_ready`` and ``q_empty`` guard the queries,
``summed`` and ``sums_empty`` what the mix is divided by.
"""

import torch
import triton
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whalefall.kernels.barriers import barriers
from whalefall.kernels.device import is_hopper

PAGE = gl.constexpr(64)
QUERIES = gl.constexpr(64)  # rows of one instruction of the tensor core
HALF = gl.constexpr(256)  # values of a mixer
ROPE = gl.constexpr(64)
VALUES = gl.constexpr(512)
LATENT = gl.constexpr(576)
STAGES = gl.constexpr(2)
UNCUT = gl.constexpr(2**24)  # pages, more than any row has

OPERANDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
VECTOR = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 64, 16]))
# Not 256 columns: an instruction must fit into the 128 registers that a thread starts with.
MIX = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 128, 16]))
OF_QUERIES = gl.constexpr(gl.SliceLayout(1, SCORES))
OF_KEYS = gl.constexpr(gl.SliceLayout(0, SCORES))


def takes(store: Tensor, latent: int, value_dim: int) -> bool:
    """Whether these pages can be: BF16 of V3's widths, on a Hopper GPU."""
    return (
        store.dtype == torch.bfloat16
        and (latent, value_dim) == (LATENT.value, VALUES.value)
        and is_hopper(store.device)
    )


def attend(
    q: Tensor,
    store: Tensor,
    where: tuple[Tensor, Tensor, Tensor],
    found: tuple[Tensor, Tensor, Tensor],
    heads: int,
    scale: float,
    split: int,
) -> None:
    """As ``latent_attention._attend``."""
    rows, queries, _ = q.shape
    pages, lengths, plan = where
    grid = ((len(plan) - 1 - rows) * triton.cdiv(queries, QUERIES.value),)
    q, store = q.flatten(0, 1), store.flatten(0, 1)
    _latent_attention_kernel[grid](
        TensorDescriptor.from_tensor(q, [QUERIES.value, HALF.value], OPERANDS),
        TensorDescriptor.from_tensor(q, [QUERIES.value, ROPE.value], OPERANDS),
        TensorDescriptor.from_tensor(store, [PAGE.value, HALF.value], OPERANDS),
        TensorDescriptor.from_tensor(store, [PAGE.value, ROPE.value], OPERANDS),
        pages, lengths, plan, *found,
        scale, queries, heads, queries // heads, pages.shape[1], split,
        num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["queries", "width", "max_pages", "split"])
def _latent_attention_kernel(
    q_values, q_rope, store_values, store_rope, pages, lengths, plan, out, partial, lse,
    scale, queries, heads, width, max_pages, split,
):  # fmt: skip
    # The queries' halves; the halves of stage s are at 2 s and 2 s + 1.
    q_halves = gl.allocate_shared_memory(gl.bfloat16, [2, QUERIES, HALF], q_values.layout)
    q_rotated = gl.allocate_shared_memory(gl.bfloat16, [QUERIES, ROPE], q_rope.layout)
    halves = gl.allocate_shared_memory(gl.bfloat16, [2 * STAGES, PAGE, HALF], store_values.layout)
    rotated = gl.allocate_shared_memory(gl.bfloat16, [STAGES, PAGE, ROPE], store_rope.layout)
    factors = gl.allocate_shared_memory(gl.float32, [STAGES, QUERIES], VECTOR)
    sums = gl.allocate_shared_memory(gl.float32, [QUERIES], VECTOR)

    ready, weighed, empty = barriers(3 * STAGES, 1), barriers(STAGES, 1), barriers(STAGES, 2)
    q_ready, q_empty = barriers(1, 1).index(0), barriers(1, 1).index(0)
    summed, sums_empty = barriers(1, 1).index(0), barriers(1, 2).index(0)
    fence_async_shared()  # the copy engine must see the barriers, too

    problem = (lengths, plan, queries, width, max_pages, split)
    ring = (halves, rotated, ready, empty)
    own_q = (q_halves, q_rotated, q_ready, q_empty)
    weights = (factors, weighed, sums, summed, sums_empty)
    gl.warp_specialize(
        [
            (_score, (ring, own_q, weights, lse, scale, heads, problem)),
            (_mix, (ring, weights, 0, out, partial, problem)),
            (_mix, (ring, weights, 1, out, partial, problem)),
            (_load, (ring, own_q, (q_values, q_rope, store_values, store_rope), pages, problem)),
        ],
        worker_num_warps=[4, 4, 1],
        # The scorer has what these leave of 512, which is 120.
        worker_num_regs=[176, 176, 40],
    )


@gluon.jit
def _load(ring, own_q, sources, pages, problem):
    _walk(_load_piece, (ring, own_q, sources, pages), problem)


@gluon.jit
def _score(ring, own_q, weights, lse, scale, heads, problem):
    _walk(_score_piece, (ring, own_q, weights, lse, scale, heads), problem)


@gluon.jit
def _mix(ring, weights, side, out, partial, problem):
    _walk(_mix_piece, (ring, weights, side, out, partial), problem)


@gluon.jit
def _walk(role: gl.constexpr, means, problem):
    """Plays a role in the pieces of this program's part. All roles walk alike."""
    lengths, plan, queries, width, max_pages, split = problem
    tiles = gl.cdiv(queries, QUERIES)
    part = gl.program_id(0) // tiles
    query = gl.program_id(0) % tiles * QUERIES
    first_row, first_page = gl.load(plan + 2 * part), gl.load(plan + 2 * part + 1)
    last_row, last_page = gl.load(plan + 2 * part + 2), gl.load(plan + 2 * part + 3)
    step = gl.where(split > 0, split, UNCUT)
    done = 0  # pages of the pieces before
    piece = 0
    for row in range(first_row, last_row + (last_page > 0).to(gl.int32)):
        length = gl.load(lengths + row)
        row_pages = gl.cdiv(length + width, PAGE)
        begin = gl.where(row == first_row, first_page, 0)
        end = gl.where(row == last_row, last_page, row_pages)
        for start in range(begin, end, step):
            stop = gl.minimum(start + step, end)
            # Where the row is in pieces: the slot of this one.
            slot = gl.where(split > 0, row * gl.cdiv(max_pages, step) + start // step, row + part)
            slot = gl.where((start > 0) | (stop < row_pages), slot, -1)
            role(means, (row, query, length, start, stop, slot), (done, piece), problem)
            done += stop - start
            piece += 1


@gluon.jit
def _load_piece(means, place, count, problem):
    ring, own_q, sources, pages = means
    halves, rotated, ready, empty = ring
    q_halves, q_rotated, q_ready, q_empty = own_q
    q_values, q_rope, store_values, store_rope = sources
    row, query, _, start, stop, _ = place
    done, piece = count
    _, _, queries, _, max_pages, _ = problem
    row_pages = pages + row.to(gl.int64) * max_pages
    for index in range(start, stop):
        use = done + index - start
        stage = use % STAGES
        token = gl.load(row_pages + index) * PAGE
        mbarrier.wait(empty.index(stage), (use // STAGES & 1) ^ 1)
        for side in gl.static_range(2):
            full = ready.index(3 * stage + side)
            mbarrier.expect(full, store_values.block_type.nbytes)
            tma_load(store_values, [token, side * HALF], full, halves.index(2 * stage + side))
        full = ready.index(3 * stage + 2)
        mbarrier.expect(full, store_rope.block_type.nbytes)
        tma_load(store_rope, [token, VALUES], full, rotated.index(stage))
        if index == start:
            mbarrier.wait(q_empty, (piece & 1) ^ 1)
            mbarrier.expect(q_ready, 2 * q_values.block_type.nbytes + q_rope.block_type.nbytes)
            first = row * queries + query
            for side in gl.static_range(2):
                tma_load(q_values, [first, side * HALF], q_ready, q_halves.index(side))
            tma_load(q_rope, [first, VALUES], q_ready, q_rotated)


@gluon.jit
def _score_piece(means, place, count, problem):
    ring, own_q, weights, lse, scale, heads = means
    halves, rotated, ready, _ = ring
    q_halves, q_rotated, q_ready, q_empty = own_q
    factors, weighed, sums, summed, sums_empty = weights
    _, query, length, start, stop, slot = place
    done, piece = count
    _, _, queries, _, _, _ = problem
    query += gl.arange(0, QUERIES, layout=OF_QUERIES)
    # Of its piece, the last key that a query sees.
    seen = length + query // heads - start * PAGE
    key = gl.arange(0, PAGE, layout=OF_KEYS)
    best = gl.full([QUERIES], float("-inf"), gl.float32, OF_QUERIES)
    total = gl.zeros([QUERIES], gl.float32, OF_QUERIES)
    scores = gl.zeros([QUERIES, PAGE], gl.float32, SCORES)
    mbarrier.wait(q_ready, piece & 1)
    for index in range(stop - start):
        stage = (done + index) % STAGES
        phase = (done + index) // STAGES & 1
        mbarrier.wait(ready.index(3 * stage), phase)
        left = halves.index(2 * stage).permute((1, 0))
        scores = warpgroup_mma(q_halves.index(0), left, scores, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(3 * stage + 1), phase)
        right = halves.index(2 * stage + 1).permute((1, 0))
        scores = warpgroup_mma(q_halves.index(1), right, scores, is_async=True)
        mbarrier.wait(ready.index(3 * stage + 2), phase)
        keys = rotated.index(stage)
        scores = warpgroup_mma(q_rotated, keys.permute((1, 0)), scores, is_async=True)
        scores = warpgroup_mma_wait(deps=[scores])
        visible = key[None, :] <= (seen - index * PAGE)[:, None]
        scores = gl.where(visible, scores, float("-inf"))
        higher = gl.maximum(best, gl.max(scores, 1))
        shift = gl.where(higher > float("-inf"), higher * -scale, 0.0)
        weight = gl.exp2(gl.fma(scores, scale, shift[:, None]))
        factor = gl.exp2(gl.fma(best, scale, shift))
        best = higher
        keys.store(weight.to(gl.bfloat16))
        factors.index(stage).store(factor)
        fence_async_shared()
        mbarrier.arrive(weighed.index(stage))
        total = total * factor + gl.sum(weight, 1)
    mbarrier.arrive(q_empty)
    # Queries that see none of these keys have a sum of 0: their mix becomes 0, not NaN.
    mbarrier.wait(sums_empty, (piece & 1) ^ 1)
    sums.store(1.0 / gl.where(total > 0, total, 1.0))
    mbarrier.arrive(summed)
    if slot >= 0:
        places = lse + slot.to(gl.int64) * queries + query
        gl.store(places, best * scale + gl.log2(total), query < queries)


@gluon.jit
def _mix_piece(means, place, count, problem):
    ring, weights, side, out, partial = means
    halves, rotated, ready, empty = ring
    factors, weighed, sums, summed, sums_empty = weights
    row, query, _, start, stop, slot = place
    done, piece = count
    _, _, queries, _, _, _ = problem
    mixed = gl.zeros([QUERIES, HALF], gl.float32, MIX)
    for index in range(stop - start):
        stage = (done + index) % STAGES
        phase = (done + index) // STAGES & 1
        mbarrier.wait(ready.index(3 * stage + side), phase)
        mbarrier.wait(weighed.index(stage), phase)
        mixed = mixed * factors.index(stage).load(gl.SliceLayout(1, MIX))[:, None]
        values = halves.index(2 * stage + side)
        mixed = warpgroup_mma(rotated.index(stage), values, mixed, is_async=True)
        mixed = warpgroup_mma_wait(deps=[mixed])
        mbarrier.arrive(empty.index(stage))
    mbarrier.wait(summed, piece & 1)
    mixed = mixed * sums.load(gl.SliceLayout(1, MIX))[:, None]
    mbarrier.arrive(sums_empty)
    query += gl.arange(0, QUERIES, layout=gl.SliceLayout(1, MIX))
    value = gl.arange(0, HALF, layout=gl.SliceLayout(0, MIX)) + side * HALF
    inside = (query < queries)[:, None]
    if slot >= 0:
        at = (slot.to(gl.int64) * queries + query)[:, None] * VALUES + value[None, :]
        gl.store(partial + at, mixed, inside)
    else:
        at = (row.to(gl.int64) * queries + query)[:, None] * VALUES + value[None, :]
        gl.store(out + at, mixed.to(gl.bfloat16), inside)
