"""The experts' products in BF16 on Hopper's tensor cores, forward and backward, in Gluon.

x W^T (``fprop``), dy W (``dgrad``) and dy^T x (``wgrad``) are one kernel. They differ in which
operand is turned, and that costs nothing: the tensor core reads BF16 along either dimension.

One persistent program a multiprocessor takes every n-th tile of the output. A tile is 128 x 256
or, where 128 columns or fewer are left over, 256 x 128 ("tall"). Tiles are ordered by group, and
in a group so that those worked on at the same time are about a square: what they read comes from
device memory once. A program's warps have four roles:

* one warp **loads**: the copy engine (TMA) brings 64 of the contraction at a time into a ring of
  stages in shared memory. All there is made of pieces of 64 x 64. A stage has six: a pair of the
  operand of which the tile has 128, a quad of the other;
* two warpgroups **multiply**: one the upper, the other the lower half of the tile. So an
  instruction has all columns of the tile, and shared memory is read least: B once for 64 rows;
* one warp **stores**: each warpgroup leaves its sums in shared memory, a quad in BF16, and the
  copy engine takes them to the device while the next tile is multiplied. All programs finish
  tiles at about the same time: warpgroups that stored themselves would wait for the memory.

The tensor core always has work waiting: a warpgroup starts step i and only then waits for step
i - 1, which frees that step's stage.

Shared memory has room for four stages and one quad, which takes a tile's upper half. The lower one
goes through the ring, as if the tile had a step more: the loader hands on a stage with nothing in
it, and the storing warp frees it.

Barriers, of which use u is phase u. A wait names the parity of the phase that must be over; what
comes before phase 0 counts as over. Who waits for one phase waits for all: parities repeat.

* ``ready`` of a stage: the loader has announced its bytes (one arrival) and all have come.
* ``empty`` of a stage: both warpgroups have multiplied with it, or it is stored (two arrivals).
* ``full``: both warpgroups' sums are in shared memory. ``free``: they are stored.

Groups begin at any row, yet nothing is masked: the copy engine is told where a group ends. It
gives zeros from there on, and stores nothing (``_rows_of_groups``). So nothing of the next group,
nor of rows that belong to nobody and may be NaN, gets into a sum over a group's tokens.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from whalefall.kernels.barriers import barriers
from whalefall.kernels.device import multiprocessors

PIECE = gl.constexpr(64)  # 128 bytes, the widest swizzle; also an instruction's rows, and a step
SHORT = gl.constexpr(128)  # rows of a tile, columns of a tall one
LONG = gl.constexpr(256)
STAGES = gl.constexpr(4)  # of 48 KiB; with the quad of 32 KiB they take 224 of 227 KiB
BAND = gl.constexpr(16)  # tiles of rows: 16 x 8 tiles are a square, and nearly one a program
END = gl.constexpr(2**30)  # of the rows that the copy engine sees: more than any tensor has


def linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x[i] weight[group of i]^T: [rows, out] of [rows, in] and [groups, out, in].

    ``weight`` may be a transpose: either of its last dimensions may be the contiguous one. Rows
    from ``ends[-1]`` on are undefined.
    """
    out = x.new_empty(len(x), weight.shape[1])
    if not out.numel():
        return out
    turned = weight.mT.is_contiguous()
    b = _matrices(weight.mT if turned else weight.contiguous())
    _launch(x, b, ends, _rows_of_groups(out), None, "dgrad" if turned else "fprop")
    return out


def weight_gradient(grad: Tensor, x: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """grad^T x over the rows of each group: [groups, out, in]; zeros for an empty group.

    And what their squares add up to before they are rounded: FP32 [parts].
    """
    groups, rows, cols = len(ends), grad.shape[1], x.shape[1]
    out = x.new_empty(groups, rows, cols)
    tiles = groups * -(-rows // SHORT.value) * -(-cols // LONG.value)  # at most
    squares = x.new_zeros(2 * tiles * PIECE.value, dtype=torch.float32)
    if not len(x):
        return out.zero_(), squares
    _launch(grad, _rows_of_groups(x.contiguous()), ends, _matrices(out), squares, "wgrad")
    return out, squares


def _launch(
    a: Tensor,
    b: TensorDescriptor,
    ends: Tensor,
    out: TensorDescriptor,
    squares: Tensor | None,
    product: str,
) -> None:
    programs = (multiprocessors(a.device),)
    rows = _rows_of_groups(a.contiguous())
    _grouped_linear_kernel[programs](rows, b, ends, out, squares, len(ends), product, num_warps=4)


def _matrices(x: Tensor) -> TensorDescriptor:
    """x [groups, rows, columns] in pieces."""
    return TensorDescriptor.from_tensor(x, [1, PIECE.value, PIECE.value], _operand(3))


def _rows_of_groups(x: Tensor) -> TensorDescriptor:
    """x [rows, features] in pieces that end where their group does (see ``_box``).

    The copy engine compares each coordinate with the size of its own dimension only. A group that
    ends before row ``end`` and has ``size`` rows gets its row r at coordinate END - size + r of a
    dimension that ends at END: the box is cut off where the group is. That address is wrong by
    END - end rows. Two more dimensions, which have no end, correct it: one by ``end`` rows; the
    other by END times (2^34 elements less a row), which is END rows less, because addresses wrap
    at 2^64 bytes. (Triton does the same in ``tools.ragged_tma``, without a form for Gluon.)
    """
    features = x.shape[1]
    endless = 2**31 - 2**16
    shape = [endless, endless, END.value, features]
    strides = [2**34 - features, features, features, 1]
    return TensorDescriptor(x, shape, strides, [1, 1, PIECE.value, PIECE.value], _operand(4))


@gluon.constexpr_function
def _operand(rank: int) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=rank)


@gluon.jit(do_not_specialize=["groups"])
def _grouped_linear_kernel(a, b, ends, out, squares, groups, PRODUCT: gl.constexpr):
    pairs = gl.allocate_shared_memory(a.dtype, [2 * STAGES, PIECE, PIECE], _operand(2))
    quads = gl.allocate_shared_memory(a.dtype, [4 * (STAGES + 1), PIECE, PIECE], _operand(2))
    ring = (pairs, quads, barriers(STAGES, 1), barriers(STAGES, 2))
    shelf = (barriers(1, 2), barriers(1, 1))
    hopper.fence_async_shared()  # the copy engine must see the barriers, too
    problem = (ends, groups, a.shape[3], out.shape[len(out.block_shape) - 1])
    gl.warp_specialize(
        [
            (_walk, (gl.constexpr(_multiply_tile), (ring, shelf, squares, 0), problem, PRODUCT)),
            (_walk, (gl.constexpr(_multiply_tile), (ring, shelf, squares, 1), problem, PRODUCT)),
            (_walk, (gl.constexpr(_load_tile), (ring, a, b), problem, PRODUCT)),
            (_walk, (gl.constexpr(_store_tile), (ring, shelf, out), problem, PRODUCT)),
        ],
        worker_num_warps=[4, 1, 1],
        # The first role has what these leave of 504, which is 232: the last two share their 40.
        worker_num_regs=[232, 40, 40],
    )


@gluon.jit
def _walk(role: gl.constexpr, means, problem, PRODUCT: gl.constexpr):
    """Plays a role in this program's tiles. All roles walk alike: their n-th steps are the same."""
    ends, groups, features, cols = problem
    across = (cols + SHORT - 1) // LONG
    tile = gl.program_id(0)
    first_tile = 0  # of the group
    start = 0  # its first token
    done = 0  # uses of stages before
    tiles = 0  # before
    for group in range(groups):
        end = gl.load(ends + group)
        if PRODUCT == "wgrad":
            rows, inner = features, end - start
        else:
            rows, inner = end - start, features
        down = gl.cdiv(rows, SHORT)
        steps = gl.cdiv(inner, PIECE)
        tall_tiles = gl.where(across * LONG < cols, gl.cdiv(rows, LONG), 0)
        next_tile = first_tile + down * across + tall_tiles
        while tile < next_tile:
            row, col, tall = _place(tile - first_tile, down, across)
            span = (done, done + steps, tiles)
            role(means, (group, start, end), (row, col, rows, tall), span, PRODUCT)
            done += steps + 1  # one for sums
            tiles += 1
            tile += gl.num_programs(0)
        first_tile = next_tile
        start = end


@gluon.jit
def _place(tile, down, across):
    """A tile's first row and column; whether it is tall (those come last; others by bands)."""
    tall = tile >= down * across
    if tall:
        row, col = (tile - down * across) * LONG, across * LONG
    else:
        band = tile // (BAND * across)
        height = gl.minimum(down - band * BAND, BAND)
        tile = tile % (BAND * across)
        row, col = (band * BAND + tile % height) * SHORT, tile // height * LONG
    return row, col, tall


@gluon.jit
def _load_tile(means, tokens, place, span, PRODUCT: gl.constexpr):
    ring, a, b = means
    pairs, quads, ready, empty = ring
    row, col, _, tall = place
    done, last, _ = span
    for use in range(done, last):
        stage = use % STAGES
        k = (use - done) * PIECE
        come = ready.index(stage)
        mbarrier.wait(empty.index(stage), (use // STAGES & 1) ^ 1)
        mbarrier.expect(come, 2 * a.block_type.nbytes + 4 * b.block_type.nbytes)
        if tall:
            _load_pieces(a, tokens, row, k, PRODUCT == "wgrad", come, quads, stage, 4)
            _load_pieces(b, tokens, col, k, PRODUCT != "fprop", come, pairs, stage, 2)
        else:
            _load_pieces(a, tokens, row, k, PRODUCT == "wgrad", come, pairs, stage, 2)
            _load_pieces(b, tokens, col, k, PRODUCT != "fprop", come, quads, stage, 4)
    mbarrier.wait(empty.index(last % STAGES), (last // STAGES & 1) ^ 1)
    mbarrier.arrive(ready.index(last % STAGES))  # for sums


@gluon.jit
def _load_pieces(source, tokens, at, k, TURNED: gl.constexpr, come, to, stage, N: gl.constexpr):
    for i in gl.static_range(N):
        row, col = at + i * PIECE, k
        if TURNED:
            row, col = col, row
        piece = to.index(N * stage + i).reshape(source.block_shape)
        tma.async_copy_global_to_shared(source, _box(source, tokens, row, col), come, piece)


@gluon.jit
def _box(tensor, tokens, row, col):
    """Where a piece is: in the group's matrix, or in its rows (see ``_rows_of_groups``)."""
    group, start, end = tokens
    of_rows = END, end, END - (end - start) + row, col
    return (group, row, col) if len(tensor.block_shape) == 3 else of_rows


@gluon.jit
def _multiply_tile(means, tokens, place, span, PRODUCT: gl.constexpr):
    ring, shelf, squares, side = means
    _, _, ready, empty = ring
    full, free = shelf
    row, _, rows, tall = place
    done, last, _ = span
    if row + side * gl.where(tall, SHORT, PIECE) >= rows:  # nothing is left for this half
        for use in range(done, last):
            mbarrier.wait(ready.index(use % STAGES), use // STAGES & 1)
            mbarrier.arrive(empty.index(use % STAGES))
        _wait_for_quad(ready, free, span)
    elif tall:
        _multiply_half(ring, free, squares, side, span, True, PRODUCT)
    else:
        _multiply_half(ring, free, squares, side, span, False, PRODUCT)
    mbarrier.arrive(full.index(0))


@gluon.jit
def _multiply_half(ring, free, squares, side, span, TALL: gl.constexpr, PRODUCT: gl.constexpr):
    """64 rows; of a tall tile 128, in two products that share B."""
    pairs, quads, ready, empty = ring
    done, last, tiles = span
    cols: gl.constexpr = SHORT if TALL else LONG
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, cols, 16])
    upper = gl.zeros([PIECE, cols], gl.float32, layout)
    lower = gl.zeros([PIECE, cols], gl.float32, layout)  # of a tall tile
    for use in range(done, last):
        stage = use % STAGES
        mbarrier.wait(ready.index(stage), use // STAGES & 1)
        b = _matrix(pairs if TALL else quads, stage, cols, PRODUCT == "fprop")
        if TALL:
            i = 4 * stage + 2 * side
            upper_a = _matrix(quads, i, PIECE, PRODUCT == "wgrad")
            lower_a = _matrix(quads, i + 1, PIECE, PRODUCT == "wgrad")
            upper = hopper.warpgroup_mma(upper_a, b, upper, is_async=True)
            lower = hopper.warpgroup_mma(lower_a, b, lower, is_async=True)
            upper, lower = hopper.warpgroup_mma_wait(2, deps=[upper, lower])
        else:
            a = _matrix(pairs, 2 * stage + side, PIECE, PRODUCT == "wgrad")
            upper = hopper.warpgroup_mma(a, b, upper, is_async=True)
            upper = hopper.warpgroup_mma_wait(1, deps=[upper])
        mbarrier.arrive(empty.index((use + STAGES - 1) % STAGES), pred=use > done)
    upper, lower = hopper.warpgroup_mma_wait(0, deps=[upper, lower])
    mbarrier.arrive(empty.index((last + STAGES - 1) % STAGES), pred=last > done)
    if squares is not None:
        half = 2 * (gl.program_id(0) + tiles * gl.num_programs(0)) + side
        places = squares + half * PIECE + gl.arange(0, PIECE, gl.SliceLayout(1, layout))
        gl.store(places, gl.sum(upper * upper + lower * lower, 1))
    _wait_for_quad(ready, free, span)
    quad = STAGES if side == 0 else last % STAGES
    if TALL:
        _matrix(quads, 2 * quad, cols, False).store(upper.to(quads.dtype))
        _matrix(quads, 2 * quad + 1, cols, False).store(lower.to(quads.dtype))
    else:
        _matrix(quads, quad, cols, False).store(upper.to(quads.dtype))
    hopper.fence_async_shared()  # the copy engine must see it


@gluon.jit
def _matrix(pieces, i, cols: gl.constexpr, TURNED: gl.constexpr):
    """The i-th of the matrices with 64 rows that pieces make beside each other, turned below."""
    number: gl.constexpr = pieces.shape[0] * PIECE // cols
    shape: gl.constexpr = [number, cols, PIECE] if TURNED else [number, PIECE, cols]
    matrix = pieces._reinterpret(pieces.dtype, shape, _operand(2)).index(i)
    return matrix.permute((1, 0)) if TURNED else matrix


@gluon.jit
def _wait_for_quad(ready, free, span):
    """Until a stage is handed on for sums, and those of the tile before are stored."""
    _, last, tiles = span
    mbarrier.wait(ready.index(last % STAGES), last // STAGES & 1)
    mbarrier.wait(free.index(0), (tiles & 1) ^ 1)


@gluon.jit
def _store_tile(means, tokens, place, span, PRODUCT: gl.constexpr):
    ring, shelf, out = means
    _, quads, _, empty = ring
    full, free = shelf
    row, col, _, tall = place
    _, last, tiles = span
    mbarrier.wait(full.index(0), tiles & 1)
    for side in gl.static_range(2):
        quad = STAGES if side == 0 else last % STAGES
        for i in gl.static_range(4):
            down = gl.where(tall, 2 * side + i // 2, side)
            across = gl.where(tall, i % 2, i)
            box = _box(out, tokens, row + down * PIECE, col + across * PIECE)
            piece = quads.index(4 * quad + i).reshape(out.block_shape)
            tma.async_copy_shared_to_global(out, box, piece)
    tma.store_wait(0)
    mbarrier.arrive(empty.index(last % STAGES), count=2)
    mbarrier.arrive(free.index(0))
