"""Attention with unequal widths, against a softmax written out in float64."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from whalefall.ops import attention as module
from whalefall.ops.attention import attention, reference

BATCH, HEADS, SEQ = 2, 3, 6
WIDTHS = [(6, 4), (4, 4), (3, 5)]  # of queries and keys, of values: V3 has 192 and 128


def problem(qk: int, v: int, queries: int = SEQ) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(qk + v)

    def random(length: int, width: int) -> Tensor:
        shape = (BATCH, HEADS, length, width)
        return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()

    return random(queries, qk), random(SEQ, qk), random(SEQ, v)


def by_definition(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor) -> Tensor:
    """sum_j exp(scale q.k_j) v_j / sum_j exp(scale q.k_j) over the allowed keys, one by one."""
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(q.shape[2]):
                keys = [j for j in range(k.shape[2]) if mask[b, 0, i, j]]
                weight = [(scale * (q[b, h, i] * k[b, h, j]).sum()).exp() for j in keys]
                total = sum(weight)
                parts = [w / total * v[b, h, j] for w, j in zip(weight, keys, strict=True)]
                out[b, h, i] = torch.stack(parts).sum(0)
    return out


def causal() -> Tensor:
    return torch.ones(SEQ, SEQ, dtype=torch.bool).tril().expand(BATCH, 1, SEQ, SEQ)


def assert_same(own: Tensor, right: Tensor, inputs: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(own, right)
    outer = torch.randn(own.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for one, other in zip(
        torch.autograd.grad(own, inputs, outer),
        torch.autograd.grad(right, inputs, outer),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.fixture(params=[1, 4, 128], ids=lambda size: f"blocks of {size}")
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six queries in blocks of one, of four and two, and all at once."""
    monkeypatch.setattr(module, "QUERY_BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("qk", "v"), WIDTHS)
def test_causal_without_a_mask(qk: int, v: int) -> None:
    inputs = problem(qk, v)
    own = attention(*inputs, scale=0.37)
    assert own.shape == (BATCH, HEADS, SEQ, v)
    assert_same(own, by_definition(*inputs, 0.37, causal()), inputs)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(("qk", "v"), WIDTHS)
def test_a_mask_is_taken_as_it_is(qk: int, v: int) -> None:
    """A mask replaces causality: here some queries see later keys and not earlier ones."""
    inputs = problem(qk, v)
    mask = torch.rand(BATCH, 1, SEQ, SEQ, generator=torch.Generator().manual_seed(1)) < 0.5
    mask |= torch.eye(SEQ, dtype=torch.bool)
    own = attention(*inputs, scale=qk**-0.5, mask=mask)
    assert_same(own, by_definition(*inputs, qk**-0.5, mask), inputs)


@pytest.mark.usefixtures("blocks")
def test_fewer_queries_than_keys() -> None:
    inputs, mask = problem(6, 4, queries=2), causal()[:, :, -2:]
    own = attention(*inputs, scale=1.0, mask=mask)
    assert_same(own, by_definition(*inputs, 1.0, mask), inputs)


def test_the_plain_reference_is_the_definition() -> None:
    inputs = problem(6, 4)
    expected = by_definition(*inputs, 0.37, causal())
    torch.testing.assert_close(reference(*inputs, scale=0.37), expected)
    torch.testing.assert_close(reference(*inputs, scale=0.37, mask=causal()), expected)


@pytest.mark.parametrize("sharpness", [1.0, 4.0])
def test_bfloat16_scores_are_fp32(sharpness: float) -> None:
    """Only inputs and results are BF16; scores of that precision would be ten times as far off."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, 2, 200, width, generator=generator).bfloat16().requires_grad_()
        for width in (192, 192, 128)
    )
    scale = sharpness * 192**-0.5
    own = attention(q, k, v, scale=scale)
    right = reference(q.double(), k.double(), v.double(), scale=scale)
    assert own.dtype == torch.bfloat16
    assert (own - right).norm() < 2**-8 * right.norm()
    outer = torch.randn(own.shape, generator=generator).bfloat16()
    grads = torch.autograd.grad(right, (q, k, v), outer.double())
    for one, other in zip(torch.autograd.grad(own, (q, k, v), outer), grads, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).double().norm() < 2**-8 * other.double().norm()


def test_the_scale_is_inside_the_softmax() -> None:
    # One query, keys 1 and 0, values 1 and 0: the output is sigmoid(scale).
    q, k = torch.ones(1, 1, 1, 1), torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    mask = torch.ones(1, 1, 1, 2, dtype=torch.bool)
    for scale in (0.0, 1.0, 3.0):
        out = attention(q, k, k, scale=scale, mask=mask)
        assert out.item() == pytest.approx(1 / (1 + math.exp(-scale)))


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
def test_the_cuda_kernels_agree_at_the_widths_of_v3(masked: bool) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def random(width: int) -> Tensor:
        shape = (BATCH, 4, 200, width)
        like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}
        return torch.randn(shape, **like).requires_grad_()

    q, k, v = random(192), random(192), random(128)
    visible = torch.ones(200, 200, dtype=torch.bool, device="cuda").tril()
    mask = visible.expand(BATCH, 1, 200, 200) if masked else None
    own = attention(q, k, v, scale=192**-0.5, mask=mask)
    scores = (q.double() @ k.double().transpose(-1, -2)) * 192**-0.5
    right = scores.masked_fill(~visible, -math.inf).softmax(-1) @ v.double()
    torch.testing.assert_close(own.double(), right, rtol=2e-2, atol=2e-2)
    outer = torch.randn(own.shape, device="cuda", generator=generator)
    for one, other in zip(
        torch.autograd.grad(own, (q, k, v), outer.bfloat16()),
        torch.autograd.grad(right, (q, k, v), outer.double()),
        strict=True,
    ):
        assert (one - other).norm() < 2e-2 * other.norm()


@pytest.fixture
def deterministic() -> Iterator[Callable[[bool], None]]:
    """Turns torch's deterministic algorithms on and off, and off in the end."""
    yield torch.use_deterministic_algorithms
    torch.use_deterministic_algorithms(False)


Case = tuple[list[Tensor], Tensor, Tensor | None]


def on_cuda(qk: int, v: int, queries: int, keys: int, *, masked: bool) -> Case:
    """Queries, keys and values in the memory of [batch, seq, heads, dim], a gradient, a mask."""
    generator = torch.Generator("cuda").manual_seed(qk + queries)
    like = {"device": "cuda", "dtype": torch.bfloat16, "generator": generator}

    def random(length: int, width: int) -> Tensor:
        return torch.randn(BATCH, length, HEADS, width, **like).transpose(1, 2)

    inputs = [random(queries, qk), random(keys, qk), random(keys, v)]
    mask = None
    if masked:
        mask = torch.rand(BATCH, 1, queries, keys, device="cuda", generator=generator) < 0.5
        mask[..., 0] = True
    return [x.requires_grad_() for x in inputs], random(queries, v), mask


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("qk", "v", "queries", "keys", "masked"),
    [
        *((192, 128, length, length, False) for length in (17, 64, 128, 129, 200, 1000)),
        (144, 80, 200, 200, False),
        *((qk, v, 200, 200, False) for qk, v in [(48, 32), (32, 16), (112, 80), (256, 256)]),
        (192, 128, 200, 200, True),
        (192, 128, 90, 333, True),
        (48, 32, 130, 130, True),
    ],
)
def test_deterministic_gradients_repeat_their_bits(
    qk: int,
    v: int,
    queries: int,
    keys: int,
    masked: bool,
    deterministic: Callable[[bool], None],
) -> None:
    inputs, outer, mask = on_cuda(qk, v, queries, keys, masked=masked)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    right = reference(*wide, scale=qk**-0.5, mask=mask)
    right_grads = torch.autograd.grad(right, wide, outer.double())
    deterministic(True)  # not before: it forbids cuBLAS products, such as the reference's
    runs = []
    for _ in range(2):
        own = attention(*inputs, scale=qk**-0.5, mask=mask)
        assert type(own.grad_fn).__name__.startswith("_OrderedAttention")
        runs.append((own, *torch.autograd.grad(own, inputs, outer)))
    deterministic(False)
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)
    for one, other in zip(runs[0], (right, *right_grads), strict=True):
        assert one.shape == other.shape
        assert one.transpose(1, 2).is_contiguous()
        assert (one - other).norm() < 4e-3 * other.norm()


@pytest.mark.gpu
def test_heads_in_groups_have_the_same_bits(
    deterministic: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six heads of 200 tokens at once, in groups of two, and one by one."""
    from whalefall.kernels import attention_backward_hopper as kernel

    inputs, outer, _ = on_cuda(192, 128, 200, 200, masked=False)
    deterministic(True)
    own = attention(*inputs, scale=192**-0.5)
    together = torch.autograd.grad(own, inputs, outer, retain_graph=True)
    head_bytes = 3 * 128 * 128 * 2  # blocks on and below the diagonal
    for memory in (2 * head_bytes, 1):
        monkeypatch.setattr(kernel, "MEMORY", memory)
        apart = torch.autograd.grad(own, inputs, outer, retain_graph=True)
        for one, other in zip(together, apart, strict=True):
            assert torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize(("qk", "values"), [(48, 32), (192, 128)])
def test_gradients_of_any_memory_are_the_same(
    qk: int, values: int, deterministic: Callable[[bool], None]
) -> None:
    """Values that are a part of a longer row, a gradient that is one number everywhere."""
    (q, k, v), _, _ = on_cuda(qk, values, 150, 150, masked=False)
    joint = torch.cat([k, v], -1).detach().requires_grad_()
    deterministic(True)
    own = attention(q, joint[..., :qk], joint[..., qk:], scale=qk**-0.5)
    grad_q, grad_joint = torch.autograd.grad(own.sum(), (q, joint))
    apart = torch.autograd.grad(attention(q, k, v, scale=qk**-0.5).sum(), (q, k, v))
    for one, other in zip((grad_q, *grad_joint.split([qk, values], -1)), apart, strict=True):
        assert (one - other).norm() < 4e-3 * other.norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("qk", "v", "dtype"), [(40, 32, "bfloat16"), (48, 32, "float32")])
def test_other_sizes_and_types_stay_with_the_library(
    qk: int, v: int, dtype: str, deterministic: Callable[[bool], None]
) -> None:
    inputs, outer, _ = on_cuda(qk, v, 70, 70, masked=False)
    inputs = [x.detach().to(getattr(torch, dtype)).requires_grad_() for x in inputs]
    deterministic(True)
    own = attention(*inputs, scale=qk**-0.5)
    assert not type(own.grad_fn).__name__.startswith("_OrderedAttention")
    torch.autograd.grad(own, inputs, outer.to(own.dtype))
