"""Attention of ragged prompts on Hopper's tensor cores for V3's widths, 128 + 64 and 128, in Gluon.

A program has 128 queries of one head, as in ``prompt_attention``. Its warps have two roles:

* one warp **loads**: the copy engine (TMA) brings keys and values, 128 tokens at a time, into
  rings of two stages each;
* two warpgroups **attend**, each for 64 queries. While a warpgroup makes weights of the scores of
  one step, the tensor core mixes the values of the step before and serves the other warpgroup.

Queries and two stages take 208 of 227 KiB. A thread holds 64 scores, 64 sums of values and 64
weights in BF16: 160 of its 232 registers.

Barriers, of which use u is phase u (a wait names the parity of a phase; what comes before phase 0
counts as over): ``k_ready`` and ``v_ready`` of a stage complete when its bytes have come,
``k_empty`` and ``v_empty`` when both warpgroups have multiplied with it.

The copy engine does not know where a sequence ends. Scores of the next sequence's keys are masked,
but their values, times a weight of 0, could still be NaN: the loader sets them to 0.
"""

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

from whalefall.kernels import prompt_blocks
from whalefall.kernels.barriers import barriers
from whalefall.kernels.device import is_hopper
from whalefall.kernels.mla_heads import _pairs, _turn

HALF = gl.constexpr(64)  # queries of a warpgroup
KEYS = gl.constexpr(128)  # of a step
NOPE = gl.constexpr(128)
ROPE = gl.constexpr(64)
VALUES = gl.constexpr(128)
STAGES = gl.constexpr(2)
ROWS = gl.constexpr(8)  # of values that the loader's registers can hold

OPERANDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 128, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, SUMS, 2))
OF_QUERIES = gl.constexpr(gl.SliceLayout(1, SUMS))
OF_KEYS = gl.constexpr(gl.SliceLayout(0, SUMS))
ROWWISE = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
BY_WARP = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))


def takes(q: Tensor, kv: Tensor, k_rope: Tensor) -> bool:
    """Whether the widths are V3's, and the GPU a Hopper."""
    widths = (q.shape[-1], kv.shape[-1], k_rope.shape[-1])
    return widths == (NOPE.value + ROPE.value, NOPE.value + VALUES.value, ROPE.value) and is_hopper(
        q.device
    )


def attend(
    q: Tensor,
    kv: Tensor,
    k_rope: Tensor,
    turns: Tensor,
    ends: tuple[Tensor, Tensor],
    out: Tensor,
    scale: float,
) -> None:
    """As ``prompt_attention._attend``."""
    tokens, heads, _ = q.shape
    _kernel[(prompt_blocks.programs(tokens, len(ends[0]), heads),)](
        TensorDescriptor.from_tensor(q.flatten(1), [HALF.value, NOPE.value], OPERANDS),
        TensorDescriptor.from_tensor(kv.flatten(1), [KEYS.value, NOPE.value], OPERANDS),
        TensorDescriptor.from_tensor(k_rope, [KEYS.value, ROPE.value], OPERANDS),
        q, turns, *ends, out, scale, tokens, len(ends[0]), heads, num_warps=4,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["tokens", "sequences"])
def _kernel(
    q, kv, k_rope, q_ptr, turns, query_ends, key_ends, out, scale, tokens, sequences,
    HEADS: gl.constexpr,
):  # fmt: skip
    block = prompt_blocks.find(query_ends, key_ends, tokens, sequences, HEADS)
    if block[2] == 0:
        return
    q_nope = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, NOPE], q.layout)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [2, HALF, ROPE], q.layout)
    k_nope = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, NOPE], kv.layout)
    shared = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, ROPE], k_rope.layout)
    values = gl.allocate_shared_memory(gl.bfloat16, [STAGES, KEYS, VALUES], kv.layout)
    k_ready, k_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    v_ready, v_empty = barriers(STAGES, 1), barriers(STAGES, 2)
    q_ready, tail = barriers(1, 1).index(0), barriers(1, 1).index(0)
    fence_async_shared()  # the copy engine must see the barriers, too

    own_q = (q_nope, q_rope, q_ready)
    k_ring, v_ring = (k_nope, shared, k_ready, k_empty), (values, v_ready, v_empty)
    problem = (q_ptr, turns, out, scale, tokens)
    gl.warp_specialize(
        [
            (_attend, (own_q, k_ring, v_ring, block, 0, problem, HEADS)),
            (_attend, (own_q, k_ring, v_ring, block, 1, problem, HEADS)),
            (_load, (own_q, k_ring, v_ring, block, tail, (q, kv, k_rope))),
        ],
        worker_num_warps=[4, 1],
        # The first role has what these leave of 504, which is 232.
        worker_num_regs=[232, 40],
    )


@gluon.jit
def _steps(queries, keys):
    """Steps to the last key that a query of the block sees."""
    return gl.cdiv(keys - gl.maximum(queries - prompt_blocks.QUERIES, 0), KEYS)


@gluon.jit
def _load(own_q, k_ring, v_ring, block, tail, sources):
    q_nope, _, q_ready = own_q
    k_nope, shared, k_ready, k_empty = k_ring
    values, v_ready, v_empty = v_ring
    head, query, queries, key_start, keys = block
    q, kv, k_rope = sources
    mbarrier.expect(q_ready, 2 * q.block_type.nbytes)
    for side in gl.static_range(2):
        tma_load(q, [query + side * HALF, head * (NOPE + ROPE)], q_ready, q_nope.index(side))
    for step in range(_steps(queries, keys)):
        stage = step % STAGES
        before = (step // STAGES & 1) ^ 1
        token = key_start + step * KEYS
        column = head * (NOPE + VALUES)
        full = k_ready.index(stage)
        mbarrier.wait(k_empty.index(stage), before)
        mbarrier.expect(full, kv.block_type.nbytes + k_rope.block_type.nbytes)
        tma_load(kv, [token, column], full, k_nope.index(stage))
        tma_load(k_rope, [token, 0], full, shared.index(stage))
        full = v_ready.index(stage)
        mbarrier.wait(v_empty.index(stage), before)
        left = keys - step * KEYS
        if left >= KEYS:
            mbarrier.expect(full, kv.block_type.nbytes)
            tma_load(kv, [token, column + NOPE], full, values.index(stage))
        else:  # the last step of the sequence
            mbarrier.expect(tail, kv.block_type.nbytes)
            tma_load(kv, [token, column + NOPE], tail, values.index(stage))
            mbarrier.wait(tail, 0)
            _clear(values.index(stage), left)
            mbarrier.arrive(full)


@gluon.jit
def _clear(values, first):
    """Sets the rows from ``first`` on to 0."""
    for start in gl.static_range(0, KEYS, ROWS):
        if first < start + ROWS:
            rows = values.slice(start, ROWS)
            row = start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, BY_WARP))
            rows.store(gl.where((row < first)[:, None], rows.load(BY_WARP), 0.0))
    fence_async_shared()


@gluon.jit
def _attend(own_q, k_ring, v_ring, block, side: gl.constexpr, problem, HEADS: gl.constexpr):
    q_nope, q_rope, q_ready = own_q
    _, _, _, k_empty = k_ring
    _, _, v_empty = v_ring
    head, query, queries, _, keys = block
    q, turns, out, scale, tokens = problem
    steps = _steps(queries, keys)
    query += side * HALF
    queries -= side * HALF  # none or less where the block ends before
    own_q = (q_nope.index(side), q_rope.index(side))
    _turn_queries(own_q[1], q, turns, query, tokens, head, HEADS)
    mbarrier.wait(q_ready, 0)

    row = gl.arange(0, HALF, layout=OF_QUERIES)
    key = gl.arange(0, KEYS, layout=OF_KEYS)
    last = keys - queries + row  # the last key that each query sees
    whole = (keys - queries + 1) // KEYS  # steps whose keys all of them see
    scores = gl.zeros([HALF, KEYS], gl.float32, SUMS)
    mixed = gl.zeros([HALF, VALUES], gl.float32, SUMS)
    best = gl.full([HALF], float("-inf"), gl.float32, OF_QUERIES)
    total = gl.zeros([HALF], gl.float32, OF_QUERIES)

    # In step 0 every query sees key 0, so from then on ``best`` is finite.
    _await_keys(k_ring, 0, steps)
    scores = warpgroup_mma_wait(0, deps=[_score(own_q, k_ring, 0, scores)])
    mbarrier.arrive(k_empty.index(0))
    scores = gl.where(key[None, :] <= last[:, None], scores, float("-inf"))
    weights, best, total, _ = _weigh(scores, best, total, scale)
    operand = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    _await_keys(k_ring, 1, steps)
    for diagonal in gl.static_range(2):
        begin = gl.maximum(whole, 1) if diagonal else 1
        end = steps if diagonal else whole
        for step in range(begin, end):
            scores = _score(own_q, k_ring, step, scores)
            mixed = _mix(operand, v_ring, step - 1, mixed)
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(step % STAGES))
            if diagonal:
                visible = (step * KEYS + key)[None, :] <= last[:, None]
                scores = gl.where(visible, scores, float("-inf"))
            weights, best, total, kept = _weigh(scores, best, total, scale)
            # Without a loop between, ptxas waits for the mix before it starts with the weights.
            _await_keys(k_ring, step + 1, steps)
            mixed, operand = warpgroup_mma_wait(0, deps=[mixed, operand])
            mbarrier.arrive(v_empty.index((step - 1) % STAGES))
            mixed = mixed * kept[:, None]
            operand = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    mixed = warpgroup_mma_wait(0, deps=[_mix(operand, v_ring, steps - 1, mixed)])
    _store(mixed / total[:, None], own_q[0], out, query, queries, head, HEADS)


@gluon.jit
def _await_keys(k_ring, step, steps):
    _, _, k_ready, _ = k_ring
    mbarrier.wait(k_ready.index(step % STAGES), step // STAGES & 1, pred=step < steps)


@gluon.jit
def _score(own_q, k_ring, step, scores):
    q_nope, q_rope = own_q
    k_nope, shared, _, _ = k_ring
    stage = step % STAGES
    own, common = k_nope.index(stage).permute((1, 0)), shared.index(stage).permute((1, 0))
    scores = warpgroup_mma(q_nope, own, scores, use_acc=False, is_async=True)
    return warpgroup_mma(q_rope, common, scores, is_async=True)


@gluon.jit
def _mix(weights, v_ring, step, mixed):
    values, v_ready, _ = v_ring
    stage = step % STAGES
    mbarrier.wait(v_ready.index(stage), step // STAGES & 1)
    return warpgroup_mma(weights, values.index(stage), mixed, is_async=True)


@gluon.jit
def _weigh(scores, best, total, scale):
    """Weights of a step, the best score and the sum of weights so far, and how much they shrank."""
    higher = gl.maximum(best, gl.max(scores, 1))
    shift = higher * -scale
    weights = gl.exp2(gl.fma(scores, scale, shift[:, None]))
    kept = gl.exp2(gl.fma(best, scale, shift))
    return weights, higher, total * kept + gl.sum(weights, 1), kept


@gluon.jit
def _turn_queries(to, q, turns, query, tokens, head, HEADS: gl.constexpr):
    row = query + gl.arange(0, HALF, layout=gl.SliceLayout(1, ROWWISE))
    column = gl.arange(0, ROPE, layout=gl.SliceLayout(0, ROWWISE))[None, :]
    here = (row < tokens)[:, None]
    row = row.to(gl.int64)[:, None]
    x = gl.load(q + (row * HEADS + head) * (NOPE + ROPE) + NOPE + column, here, 0.0)
    real, imaginary = _pairs(gl.load(turns + row * ROPE + column, here, 0.0))
    to.store(_turn(x, real, imaginary).to(gl.bfloat16))
    fence_async_shared()


@gluon.jit
def _store(mixed, through, out, query, queries, head, HEADS: gl.constexpr):
    """By whole rows, which shared memory puts together: nobody needs these queries any more."""
    through.store(mixed.to(gl.bfloat16))
    row = gl.arange(0, HALF, layout=gl.SliceLayout(1, ROWWISE))
    column = gl.arange(0, VALUES, layout=gl.SliceLayout(0, ROWWISE))[None, :]
    at = ((query + row).to(gl.int64) * HEADS + head)[:, None] * VALUES + column
    gl.store(out + at, through.load(ROWWISE), (row < queries)[:, None])
