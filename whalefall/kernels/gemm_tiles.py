"""What the FP8 products share on Hopper's tensor cores (paper 3.3), in Gluon.

One persistent program a multiprocessor takes every n-th tile of the output; what it does in a tile
is here, which tiles there are is said by a ``walk`` of each product. A tile is two blocks of
128 x 128 beside each other, with the same rows of A, or, where an odd column of blocks is left
over, below each other, with the same rows of B ("tall"). Its warps have three roles:

* one warp **loads**: the copy engine (TMA) brings 128 of the contraction at a time, operands and
  scales, into a ring of stages in shared memory;
* two warpgroups **multiply**, a block each;
* two warps **store**: a finished block in BF16 goes to shared memory, and from there to the device
  while the next tile is multiplied. All programs finish tiles at about the same time: if the
  multipliers wrote themselves, they would wait for the memory, and then the memory for them.

The tensor core keeps about 14 bits of a sum of FP8 products. So a partial sum leaves it every 128
of the contraction and is added, scaled, to FP32 sums in registers. That is the limit: while one
warpgroup adds, the tensor core works for the other, and no larger tile has room for its sums. Those
take 128 registers of a thread; a partial sum, of 64 rows at a time, 64. Nothing in the loop waits
for device memory, and a step reads (128 + 256) x 128 bytes from L2 for 2 x 128 x 256 x 128
operations.

Barriers, of which use u is phase u. A wait names the parity of the phase that must be over; what
comes before phase 0 counts as over.

* ``ready`` and ``empty`` of a stage: its bytes have come; both warpgroups have multiplied with it.
* ``full`` and ``free`` of a warpgroup: its block is in shared memory; it has been copied.

Loads are not masked: the copy engine gives zeros for what lies outside of a tensor, and rows or
columns of others reach only sums that are not stored.
"""

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

from whalefall.kernels.barriers import barriers

BLOCK = gl.constexpr(128)  # rows and columns of a warpgroup's sums, and a step of the contraction
HALF = gl.constexpr(64)  # rows of one instruction of the tensor core
STAGES = gl.constexpr(3)  # of 48 KiB of operands each; two blocks in BF16 take 64 KiB of 227
ROWS = gl.constexpr(8)  # of a block that the storing warp's registers can hold
STEPS = gl.constexpr(32)  # scales of a block of weights, one a step, that are loaded at once
BAND = gl.constexpr(16)  # pairs of blocks across that are done before those to their right

OPERANDS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
SCALES = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
SINGLE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
STAGED = gl.constexpr(gl.SwizzledSharedLayout(8, 1, 8, order=[1, 0]))
SUMS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], instr_shape=[16, 128, 32]))
OF_ROWS = gl.constexpr(gl.SliceLayout(1, SUMS))
OF_COLS = gl.constexpr(gl.SliceLayout(0, SUMS))
ROWWISE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [1, 1], [1, 0]))


@gluon.jit
def play(walk: gl.constexpr, problem, sources, scale_strides, out, cols, squares=None):
    """Starts the roles. All of them walk alike: their n-th steps and tiles are the same.

    ``walk(role, means, problem)`` calls ``role(means, tall, source, target, span)`` for each tile:

    * ``tall``: whether it is;
    * ``source``: the first rows of A and B, and where their scales begin;
    * ``target``: the first row and column of the output, and the rows to be stored (from, to);
    * ``span``: the first step, how many, and how many steps and tiles were before.

    ``scale_strides``: of A's scales from step to step; of B's from step to step and from block to
    block. ``squares``: 64 places a block, those of a tile beside each other, for what the squares
    of its rows r and r + 64 add up to, if that is wanted; it counts what is outside of the output,
    too, which must be zeros then.
    """
    a, a_scales, _, b_scales = sources
    # Stage s has at 3 s what both blocks are made of, at 3 s + 1 and 3 s + 2 their own operands.
    operands = gl.allocate_shared_memory(a.dtype, [3 * STAGES, BLOCK, BLOCK], a.layout)
    a_scale_ring = _scale_ring(a_scales)
    b_scale_ring = _scale_ring(b_scales)
    ring = (operands, a_scale_ring, b_scale_ring, barriers(STAGES, 1), barriers(STAGES, 2))
    # Blocks in FP32 are too large for shared memory: the multipliers store.
    shelf = () if out.dtype.element_ty == gl.float32 else _shelf(out)
    fence_async_shared()  # the copy engine must see the barriers, too
    gl.warp_specialize(
        [
            (_multiply, (walk, problem, ring, shelf, out, cols, squares, 0)),
            (_multiply, (walk, problem, ring, shelf, out, cols, squares, 1)),
            (_load, (walk, problem, ring, sources, scale_strides)),
            (_store, (walk, problem, shelf, out, cols, 0)),
            (_store, (walk, problem, shelf, out, cols, 1)),
        ],
        worker_num_warps=[4, 1, 1, 1],
        # The first role has what these leave of 504, which is 232: the last three share their 40.
        worker_num_regs=[232, 40, 40, 40],
    )


@gluon.jit
def count(down, across):
    """Tiles of so many blocks down and across."""
    return down * (across // 2) + across % 2 * ((down + 1) // 2)


@gluon.jit
def find(tile, down, across):
    """The first row and column of a tile, and whether it is tall: those come last.

    The others go from row to row within a band, so that those done at a time share operands.
    """
    pairs = across // 2
    tall = tile >= down * pairs
    band = tile // gl.maximum(down * BAND, 1)
    width = gl.maximum(gl.minimum(pairs - band * BAND, BAND), 1)
    place = tile - band * BAND * down
    row = gl.where(tall, 2 * (tile - down * pairs), place // width)
    col = gl.where(tall, across - 1, 2 * (band * BAND + place % width))
    return row * BLOCK, col * BLOCK, tall


@gluon.jit
def _offset(side, tall):
    """Of a warpgroup's block in the tile, in rows and columns."""
    down = gl.where(tall, side, 0)
    return down * BLOCK, (side - down) * BLOCK


@gluon.jit
def _scale_ring(source):
    return gl.allocate_shared_memory(
        gl.float32, [2 * STAGES, source.block_type.shape[0]], source.layout
    )


@gluon.jit
def _shelf(out):
    blocks = gl.allocate_shared_memory(out.dtype.element_ty, [4, HALF, BLOCK], STAGED)
    return blocks, barriers(2, 1), barriers(2, 1)


@gluon.jit
def _load(walk: gl.constexpr, problem, ring, sources, scale_strides):
    walk(_load_tile, (ring, sources, scale_strides), problem)


@gluon.jit
def _multiply(walk: gl.constexpr, problem, ring, shelf, out, cols, squares, side):
    walk(_multiply_tile, (ring, shelf, out, cols, squares, side), problem)


@gluon.jit
def _store(walk: gl.constexpr, problem, shelf, out, cols, side):
    if out.dtype.element_ty != gl.float32:
        walk(_store_tile, (shelf, out, cols, side), problem)


@gluon.jit
def _load_tile(means, tall, source, target, span):
    ring, sources, scale_strides = means
    operands, a_scale_ring, b_scale_ring, ready, empty = ring
    a, a_scales, b, b_scales = sources
    a_row, b_row, a_scale, b_scale = source
    first_step, steps, done, _ = span
    a_step, b_step, b_block = scale_strides
    at_once: gl.constexpr = STEPS if b_scales.block_type.shape[0] == STEPS else 1
    scale_bytes: gl.constexpr = a_scales.block_type.nbytes + b_scales.block_type.nbytes
    for i in range(steps):
        stage = (done + i) % STAGES
        step = first_step + i
        full = ready.index(stage)
        mbarrier.wait(empty.index(stage), ((done + i) // STAGES & 1) ^ 1)
        mbarrier.expect(full, 3 * a.block_type.nbytes + 2 * scale_bytes)
        if tall:
            tma_load(b, [b_row, step * BLOCK], full, operands.index(3 * stage))
            tma_load(a, [a_row, step * BLOCK], full, operands.index(3 * stage + 1))
            tma_load(a, [a_row + BLOCK, step * BLOCK], full, operands.index(3 * stage + 2))
        else:
            tma_load(a, [a_row, step * BLOCK], full, operands.index(3 * stage))
            tma_load(b, [b_row, step * BLOCK], full, operands.index(3 * stage + 1))
            tma_load(b, [b_row + BLOCK, step * BLOCK], full, operands.index(3 * stage + 2))
        for side in gl.static_range(2):
            down, across = _offset(side, tall)
            to = 2 * stage + side
            a_at = a_scale + step * a_step + down
            tma_load(a_scales, [a_at], full, a_scale_ring.index(to))
            # Of a block with one scale a step, those of 32 steps are loaded and one is used: the
            # copy engine reads from multiples of 16 bytes only.
            b_at = b_scale + step // at_once * at_once * b_step + across // BLOCK * b_block
            tma_load(b_scales, [b_at], full, b_scale_ring.index(to))


@gluon.jit
def _multiply_tile(means, tall, source, target, span):
    ring, shelf, out, cols, squares, _ = means
    side: gl.constexpr = means[5]
    operands, a_scale_ring, b_scale_ring, ready, empty = ring
    row, col, out_from, out_to = target
    first_step, steps, done, tiles = span
    per_block: gl.constexpr = b_scale_ring.shape[1] == STEPS
    a_slot = gl.where(tall, 1 + side, 0)
    b_slot = 1 + side - a_slot
    upper = gl.zeros([HALF, BLOCK], gl.float32, SUMS)
    lower = gl.zeros([HALF, BLOCK], gl.float32, SUMS)
    partial = gl.zeros([HALF, BLOCK], gl.float32, SUMS)
    for i in range(steps):
        stage = (done + i) % STAGES
        mbarrier.wait(ready.index(stage), (done + i) // STAGES & 1)
        a = operands.index(3 * stage + a_slot)
        b = operands.index(3 * stage + b_slot).permute((1, 0))
        a_scale = a_scale_ring.index(2 * stage + side)
        upper_scale = a_scale.slice(0, HALF).load(OF_ROWS)
        lower_scale = a_scale.slice(HALF, HALF).load(OF_ROWS)
        if per_block:
            singles = b_scale_ring._reinterpret(gl.float32, [2 * STAGES * STEPS, 1], SINGLE)
            at = (2 * stage + side) * STEPS + (first_step + i) % STEPS
            of_block = singles.index(at).load(OF_ROWS)
            upper_scale *= of_block
            lower_scale *= of_block
            b_scale = 1.0
        else:
            b_scale = b_scale_ring.index(2 * stage + side).load(OF_COLS)[None, :]
        # ``upper`` is waited for too, or both partial sums would be held at once.
        partial = warpgroup_mma(a.slice(0, HALF), b, partial, use_acc=False, is_async=True)
        partial, upper = warpgroup_mma_wait(deps=[partial, upper])
        # In this order, or the products of scales, made early, would not fit into registers.
        upper += partial * b_scale * upper_scale[:, None]
        partial = warpgroup_mma(a.slice(HALF, HALF), b, partial, use_acc=False, is_async=True)
        partial, upper = warpgroup_mma_wait(deps=[partial, upper])
        mbarrier.arrive(empty.index(stage))
        lower += partial * b_scale * lower_scale[:, None]
    if squares is not None:
        block = 2 * (gl.program_id(0) + tiles * gl.num_programs(0)) + side
        places = squares + block * HALF + gl.arange(0, HALF, layout=OF_ROWS)
        gl.store(places, gl.sum(upper * upper + lower * lower, 1))
    if out.dtype.element_ty == gl.float32:
        down, across = _offset(side, tall)
        row += down
        _store_rows(out, upper, row, out_from, out_to, col + across, cols)
        _store_rows(out, lower, row + HALF, out_from, out_to, col + across, cols)
    else:
        blocks, full, free = shelf
        mbarrier.wait(free.index(side), (tiles & 1) ^ 1)
        blocks.index(2 * side).store(upper.to(out.dtype.element_ty))
        blocks.index(2 * side + 1).store(lower.to(out.dtype.element_ty))
        mbarrier.arrive(full.index(side))


@gluon.jit
def _store_tile(means, tall, source, target, span):
    shelf, out, cols, _ = means
    side: gl.constexpr = means[3]
    blocks, full, free = shelf
    row, col, out_from, out_to = target
    tiles = span[3]
    down, across = _offset(side, tall)
    row += down
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, ROWWISE))
    c = gl.arange(0, BLOCK, layout=gl.SliceLayout(0, ROWWISE)) + col + across
    places = r[:, None] * cols + c[None, :]  # from the first row of those in registers
    first = out + gl.cast(row, gl.int64) * cols
    rows = blocks._reinterpret(blocks.dtype, [4 * HALF // ROWS, ROWS, BLOCK], STAGED)
    mbarrier.wait(full.index(side), tiles & 1)
    for i in range(BLOCK // ROWS):
        values = rows.index(side * (BLOCK // ROWS) + i).load(ROWWISE)
        inside = ((row + r >= out_from) & (row + r < out_to))[:, None] & (c < cols)[None, :]
        gl.store(first + places, values, mask=inside)
        row += ROWS
        first += ROWS * cols
    mbarrier.arrive(free.index(side))


@gluon.jit
def _store_rows(out, values, row, out_from, out_to, col, cols):
    """Writes the rows among those to be stored, in sectors of 32 bytes."""
    layout: gl.constexpr = values.type.layout
    r = row + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, layout))
    c = col + gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, layout))
    places = out + r.to(gl.int64)[:, None] * cols + c[None, :]
    inside = ((r >= out_from) & (r < out_to))[:, None] & (c < cols)[None, :]
    gl.store(places, values, mask=inside)
