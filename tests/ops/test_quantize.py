"""FP8 tiles and blocks: layout, error bound, groups, edges; the kernels give the same bits."""

from dataclasses import astuple
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whalefall.ops.quantize import (
    Blocks,
    Tiles,
    dequantize,
    quantize_blocks,
    quantize_blocks_both,
    quantize_both,
    quantize_tiles,
    quantize_transposed,
)

SHAPES = [(1, 16), (3, 128), (130, 576), (128, 300), (0, 128)]
GROUPS = [
    [130, 0, 128, 5],
    [0, 0, 300],
    [256, 1, 0],
    [0, 0],
    [1] * 20,
]


def sample(*shape: int, seed: int = 0) -> Tensor:
    """Normal values whose rows and columns differ in size, so that no two tiles scale alike."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    spread = torch.randn(shape[-2], 1, generator=generator) + torch.randn(
        shape[-1], generator=generator
    )
    return x * spread.exp()


def ends_of(sizes: list[int]) -> Tensor:
    return torch.tensor(sizes).cumsum(0).to(torch.int32)


def sources_of(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randint(tokens, (rows,), generator=generator, dtype=torch.int32)


def bits(x: Tensor) -> bytes:
    return x.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()


def assert_same(one: Tiles | Blocks, other: Tiles | Blocks) -> None:
    for a, b in zip(astuple(one), astuple(other), strict=True):
        assert a.shape == b.shape and a.is_contiguous()
        assert bits(a) == bits(b)


def assert_equal(one: Tiles | Blocks, other: Tiles | Blocks) -> None:
    """The same bits, but for the sign of a zero."""
    for a, b in zip(astuple(one), astuple(other), strict=True):
        assert a.is_contiguous() and torch.equal(a.cpu().float(), b.cpu().float())


def half_a_step(x: Tensor, scale: Tensor) -> Tensor:
    """3 mantissa bits: 2^-4 of the value; below 2^-6 the grid of E4M3 is 2^-9 wide."""
    return torch.maximum(x.abs() * 2**-4, scale * 2**-10) * 1.0001


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_has_its_own_scale(shape: tuple[int, int], power_of_two: bool) -> None:
    x = sample(*shape)
    tiles = quantize_tiles(x, power_of_two=power_of_two)
    assert tiles.values.shape == x.shape and tiles.values.dtype == torch.float8_e4m3fn
    assert tiles.scales.shape == (-(-shape[1] // 128), shape[0])
    for tile, part in enumerate(x.split(128, 1)):
        exact = part.abs().amax(1) / 448
        scale = tiles.scales[tile]
        if power_of_two:
            assert (scale.frexp().mantissa == 0.5).all()
            assert (scale >= exact).all() and (scale < 2 * exact).all()
        else:
            assert torch.equal(scale, exact)
        error = (dequantize(tiles)[:, 128 * tile : 128 * (tile + 1)] - part).abs()
        assert (error <= half_a_step(part, scale[:, None])).all()


def test_scales_that_are_powers_of_two_are_kept() -> None:
    x = torch.zeros(3, 128)
    x[:, 5] = torch.tensor([448.0, 448 * 2.0**-20, 449.0])
    assert quantize_tiles(x, power_of_two=True).scales[0].tolist() == [1, 2.0**-20, 2]


@pytest.mark.parametrize("shape", SHAPES)
def test_transposed_is_the_transpose_in_tiles(shape: tuple[int, int]) -> None:
    x = sample(*shape)
    padded = torch.zeros(-(-shape[0] // 128) * 128, shape[1])
    padded[: shape[0]] = x
    assert_same(quantize_transposed(x), quantize_tiles(padded.T))


@pytest.mark.parametrize("unowned", [0, 140], ids=["all-owned", "rest-unowned"])
@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_groups_are_padded_to_whole_tiles(sizes: list[int], unowned: int) -> None:
    """Each group's part is what the group alone gives; nothing else is stored but zeros."""
    x = sample(sum(sizes) + unowned, 48)
    tiles = quantize_transposed(x, ends_of(sizes))
    assert tiles.values.shape == (48, (len(x) // 128 + len(sizes)) * 128)
    first = 0
    for part in x.split([*sizes, unowned])[:-1]:
        alone = quantize_transposed(part)
        after = first + alone.values.shape[1]
        found = Tiles(
            tiles.values[:, first:after].contiguous(), tiles.scales[first // 128 : after // 128]
        )
        assert_same(found, alone)
        first = after
    assert (tiles.values[:, first:].float() == 0).all()
    assert (tiles.scales[first // 128 :] == 1).all()


@given(st.lists(st.integers(0, 200), min_size=1, max_size=12), st.integers(0, 200))
def test_any_groups_fit_and_come_back(sizes: list[int], unowned: int) -> None:
    x = sample(sum(sizes) + unowned, 2)
    restored = dequantize(quantize_transposed(x, ends_of(sizes))).T
    kept = restored[(restored != 0).any(1)]
    assert len(kept) <= sum(sizes)
    assert restored.abs().sum() == pytest.approx(x[: sum(sizes)].abs().sum().item(), rel=2**-4)


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_both_are_the_two(sizes: list[int]) -> None:
    x, ends = sample(sum(sizes) + 7, 144), ends_of(sizes)
    for groups in (None, ends):
        straight, transposed = quantize_both(x, groups, power_of_two=True)
        assert_same(straight, quantize_tiles(x, power_of_two=True))
        assert_same(transposed, quantize_transposed(x, groups, power_of_two=True))


@pytest.mark.parametrize("sizes", GROUPS, ids=str)
def test_rows_may_come_through_a_table(sizes: list[int]) -> None:
    """Tokens that appear several times, or never."""
    x, sources = sample(50, 144), sources_of(sum(sizes) + 7, 50)
    there = x[sources.long()]
    assert_same(quantize_tiles(x, sources=sources), quantize_tiles(there))
    for ends in (None, ends_of(sizes)):
        straight, transposed = quantize_both(x, ends, sources=sources)
        assert_same(straight, quantize_tiles(there))
        assert_same(transposed, quantize_transposed(there, ends))
        assert_same(transposed, quantize_transposed(x, ends, sources=sources))


@pytest.mark.parametrize("shape", [(128, 128), (200, 576), (3, 130, 250), (2, 2, 16, 520)])
def test_blocks_of_weights_and_of_their_transposes(shape: tuple[int, ...]) -> None:
    weight = sample(*shape)
    blocks, transposed = quantize_blocks_both(weight)
    assert_same(blocks, quantize_blocks(weight))
    rows, cols = -(-shape[-2] // 128), -(-shape[-1] // 128)
    assert blocks.scales.shape == (*shape[:-2], rows, -(-cols // 4) * 4)
    assert (blocks.scales[..., cols:] == 1).all()
    for row, part in enumerate(weight.split(128, -2)):
        for col, block in enumerate(part.split(128, -1)):
            assert torch.equal(blocks.scales[..., row, col], block.abs().amax((-2, -1)) / 448)
    assert transposed.values.is_contiguous() and transposed.scales.shape[-1] % 4 == 0
    assert torch.equal(transposed.values.float(), blocks.values.float().mT)
    assert torch.equal(transposed.scales[..., :rows], blocks.scales[..., :cols].mT)
    scale = dequantize(Blocks(torch.ones(shape).to(torch.float8_e4m3fn), blocks.scales))
    assert ((dequantize(blocks) - weight).abs() <= half_a_step(weight, scale)).all()


def test_dequantize_rounds_once() -> None:
    tiles = quantize_tiles(sample(5, 256))
    scales = tiles.scales.T.repeat_interleave(128, 1)
    assert torch.equal(dequantize(tiles, torch.float64), tiles.values.double() * scales.double())
    product = tiles.values.float() * scales
    assert torch.equal(dequantize(tiles, torch.bfloat16), product.bfloat16())


def test_ties_go_to_even_and_nothing_overflows() -> None:
    x = torch.zeros(1, 128)
    x[0, :5] = torch.tensor([448.0, 1.0625, 1.1875, -2.125, 2.0**-10])
    assert dequantize(quantize_tiles(x))[0, :5].tolist() == [448, 1, 1.25, -2, 0]


def test_extremes() -> None:
    """Zeros, an outlier beside ordinary values, the smallest and largest numbers, a NaN."""
    assert torch.equal(dequantize(quantize_tiles(torch.zeros(2, 128))), torch.zeros(2, 128))
    x = sample(1, 256)
    x[0, 3] = 1e4
    alone = dequantize(quantize_tiles(x[:, 128:].contiguous()))
    assert torch.equal(dequantize(quantize_tiles(x))[:, 128:], alone)
    for size in (1e-38, 3e38):
        x = torch.full((2, 130), size)
        torch.testing.assert_close(dequantize(quantize_tiles(x)), x, rtol=2**-4, atol=0)
    x[0, 0] = float("nan")
    assert dequantize(quantize_tiles(x)).isnan().nonzero().tolist() == [[0, 0]]


def on_cuda(
    x: Tensor, ends: Tensor | None, power_of_two: bool, sources: Tensor | None = None
) -> None:
    """Every form of x by the kernels has the bits of the plain form."""
    there = x.cuda()
    groups, table = (None if y is None else y.cuda() for y in (ends, sources))
    like: dict[str, Any] = {"power_of_two": power_of_two, "sources": sources}
    like_there = {**like, "sources": table}
    assert_equal(quantize_tiles(there, **like_there), quantize_tiles(x, **like))
    turned = quantize_transposed(x, ends, **like)
    assert_equal(quantize_transposed(there, groups, **like_there), turned)
    straight_there, turned_there = quantize_both(there, groups, **like_there)
    assert_equal(straight_there, quantize_tiles(x, **like))
    assert_equal(turned_there, turned)


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1), (300, 7), (640, 2816)])
def test_kernels_give_the_same_bits(
    shape: tuple[int, int], dtype: torch.dtype, power_of_two: bool
) -> None:
    on_cuda(sample(*shape).to(dtype), None, power_of_two)


@pytest.mark.gpu
@pytest.mark.parametrize("unowned", [0, 1, 140])
@pytest.mark.parametrize("sizes", [*GROUPS, [0] * 63 + [77], list(range(300))], ids=len)
def test_kernels_find_the_groups(sizes: list[int], unowned: int) -> None:
    x = sample(sum(sizes) + unowned, 272).bfloat16()
    on_cuda(x, ends_of(sizes), power_of_two=False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cols", [16, 272, 1408])
@pytest.mark.parametrize("sizes", [*GROUPS, [0] * 63 + [77], list(range(40))], ids=len)
def test_kernels_read_through_a_table(sizes: list[int], cols: int, dtype: torch.dtype) -> None:
    x, sources = sample(50, cols).to(dtype), sources_of(sum(sizes) + 140, 50)
    for ends in (None, ends_of(sizes)):
        on_cuda(x, ends, False, sources)
    on_cuda(x.T.contiguous().T, ends_of(sizes), True, torch.stack([sources, sources], 1)[:, 0])


@pytest.mark.gpu
def test_rows_that_belong_to_nobody_may_hold_anything() -> None:
    x = sample(300, 128).bfloat16().cuda()
    x[130:] = float("nan")
    _, turned = quantize_both(x, torch.tensor([1, 130], device="cuda", dtype=torch.int32))
    assert turned.values.float().isfinite().all() and turned.scales.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(128, 128), (1408, 576), (3, 130, 250), (5, 16, 520)])
def test_block_kernels_give_the_same_bits(
    shape: tuple[int, ...], dtype: torch.dtype, power_of_two: bool
) -> None:
    weight = sample(*shape).to(dtype)
    there = weight.cuda()
    like = {"power_of_two": power_of_two}
    assert_equal(quantize_blocks(there, **like), quantize_blocks(weight, **like))
    pairs = zip(
        quantize_blocks_both(there, **like), quantize_blocks_both(weight, **like), strict=True
    )
    for own, right in pairs:
        assert_equal(own, right)


@pytest.mark.gpu
def test_kernels_agree_on_extremes_ties_and_slices() -> None:
    x = torch.zeros(6, 256)
    x[1], x[2], x[3, 0] = 1e-38, 3e38, 1e4
    x[4, :5] = torch.tensor([448.0, 1.0625, 1.1875, -2.125, 2.0**-10])
    # Where amax is no multiple of 7, this is as near to a tie as division gets.
    x[5, ::2], x[5, 1::2] = 1.9921875, 1.9921875 * 21 / 512
    on_cuda(x, None, power_of_two=False)
    on_cuda(x.bfloat16(), None, power_of_two=False)
    wide = sample(200, 512).bfloat16()
    for view in (
        lambda x: x[:, 128:400],
        lambda x: x[3:, :96],
        lambda x: x[:, 1:50],
        lambda x: x.T,
    ):
        pairs = zip(quantize_both(view(wide.cuda())), quantize_both(view(wide)), strict=True)
        for own, right in pairs:
            assert_equal(own, right)
