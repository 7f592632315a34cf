"""MLA's queries, keys and values, against pairs turned one by one."""

from itertools import product

import pytest
import torch
from torch import Tensor

from whalefall.ops.mla_heads import composed, mla_heads, reference
from whalefall.ops.rope import rotations

NOPE, ROPE, VALUE = 6, 4, 5


def problem(
    batch: int, seq: int, heads: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of MLA's layout: the shared key is the end of a row that begins with the latent."""
    generator = torch.Generator().manual_seed(batch * seq * heads)
    q = torch.randn(batch, seq, heads, NOPE + ROPE, dtype=dtype, generator=generator)
    kv = torch.randn(batch, seq, heads, NOPE + VALUE, dtype=dtype, generator=generator)
    k_rope = torch.randn(batch, seq, 8 + ROPE, dtype=dtype, generator=generator)[..., 8:]
    rotation = rotations(torch.arange(seq).unsqueeze(0), torch.tensor([1.0, 0.1]), scale=1.2)
    return q.requires_grad_(), kv.requires_grad_(), k_rope.requires_grad_(), rotation


@pytest.mark.parametrize("form", [mla_heads, reference])
def test_by_hand(form) -> None:
    q, kv, k_rope, rotation = problem(2, 5, 3)
    own_q, own_k, own_v = form(q, kv, k_rope, rotation)
    assert torch.equal(own_q[..., :NOPE], q[..., :NOPE])
    assert torch.equal(own_k[..., :NOPE], kv[..., :NOPE])
    assert torch.equal(own_v, kv[..., NOPE:])
    for b, s, h, pair in product(range(2), range(5), range(3), range(ROPE // 2)):
        turn = rotation[0, s, pair].item()
        at = slice(NOPE + 2 * pair, NOPE + 2 * pair + 2)
        for turned, x in ((own_q, q[b, s, h, at]), (own_k, k_rope[b, s, at.start - NOPE :])):
            right = complex(*x[:2].tolist()) * turn
            own = complex(*turned[b, s, h, at].tolist())
            assert abs(own - right) < 1e-6


@pytest.mark.parametrize("sizes", [(2, 5, 3), (1, 1, 1), (2, 0, 3), (0, 5, 3)])
@pytest.mark.parametrize("own_rotations", [False, True])
def test_values_and_gradients(sizes: tuple[int, int, int], own_rotations: bool) -> None:
    """With one rotation for every row of the batch, or one each."""
    *inputs, rotation = problem(*sizes)
    if own_rotations:
        rotation = torch.stack([rotation[0] * 1j**row for row in range(sizes[0])] or [rotation[0]])
        rotation = rotation[: sizes[0]]
    own, right = mla_heads(*inputs, rotation), reference(*inputs, rotation)
    outer = [torch.randn_like(out) for out in right]
    for one, other in zip(own, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(own, inputs, outer),
        torch.autograd.grad(right, inputs, outer),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_gradcheck_of_the_definition() -> None:
    *inputs, rotation = problem(2, 2, 3)
    assert torch.autograd.gradcheck(lambda *x: reference(*x, rotation), inputs)


def test_values_are_a_view_and_types_are_kept() -> None:
    q, kv, k_rope, rotation = problem(2, 5, 3, dtype=torch.bfloat16)
    outs = mla_heads(q, kv, k_rope, rotation)
    assert all(out.dtype == torch.bfloat16 for out in outs)
    assert outs[2].data_ptr() == kv[..., NOPE:].data_ptr()


GPU_BOUND = {torch.bfloat16: 3e-3, torch.float32: 1e-6}
GPU_SIZES = [  # batch, seq, heads, nope, rope, value
    (2, 70, 16, 128, 64, 128),
    (1, 9, 128, 128, 64, 128),
    (3, 5, 17, 12, 8, 10),
    (1, 33, 5, 48, 48, 33),
    (2, 0, 3, 12, 8, 12),
]


def relative_error(own: Tensor, right: Tensor) -> float:
    assert own.shape == right.shape
    right = right.detach()
    return float((own.detach().double() - right).norm() / right.norm().clamp_min(1e-30))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_BOUND)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("sizes", GPU_SIZES)
def test_cuda_agrees_with_the_definition(
    sizes: tuple[int, ...], transposed: bool, dtype: torch.dtype
) -> None:
    """``transposed``: inputs and gradients that lie in memory heads before positions."""
    batch, seq, heads, nope, rope, value = sizes
    generator = torch.Generator("cuda").manual_seed(sum(sizes))

    def random(dim: int) -> Tensor:
        shape = (batch, heads, seq, dim) if transposed else (batch, seq, heads, dim)
        x = torch.randn(shape, device="cuda", generator=generator).to(dtype)
        return x.transpose(1, 2) if transposed else x

    q, kv = random(nope + rope), random(nope + value)
    row = torch.randn(batch, seq, 16 + rope, device="cuda", generator=generator).to(dtype)
    inputs = [x.requires_grad_() for x in (q, kv, row[..., 16:])]
    positions = torch.arange(seq, device="cuda").expand(batch if transposed else 1, seq)
    rotation = rotations(positions, torch.rand(rope // 2, device="cuda", generator=generator), 1.2)
    outer = [random(nope + rope), random(nope + rope), random(nope + value)[..., nope:]]

    wide = [x.detach().double().requires_grad_() for x in inputs]
    own, right = mla_heads(*inputs, rotation), reference(*wide, rotation)
    for one, other in zip(own, right, strict=True):
        assert one.dtype == dtype and relative_error(one, other) < GPU_BOUND[dtype]
    grads = torch.autograd.grad(own, inputs, outer, retain_graph=True)
    right_grads = torch.autograd.grad(right, wide, [x.double() for x in outer])
    for one, other in zip(grads, right_grads, strict=True):
        assert one.dtype == dtype and relative_error(one, other) < GPU_BOUND[dtype]
    again = torch.autograd.grad(own, inputs, outer)
    assert all(torch.equal(*pair) for pair in zip(grads, again, strict=True))


@pytest.mark.gpu
def test_cuda_as_the_projections_call_it() -> None:
    """Behind linear layers and with a gradient without memory of its own."""
    batch, seq, heads = 2, 12, 4
    linear = torch.nn.Linear(32, heads * 48 + heads * 64 + 16, bias=False, device="cuda")
    x = torch.randn(batch, seq, 32, device="cuda")
    rotation = rotations(torch.arange(seq, device="cuda")[None], torch.ones(8, device="cuda"))
    grads = []
    for form in (mla_heads, composed):
        q, kv, k_rope = linear(x).split([heads * 48, heads * 64, 16], -1)
        outs = form(q.unflatten(-1, (heads, 48)), kv.unflatten(-1, (heads, 64)), k_rope, rotation)
        loss = sum(out.sum() * weight for weight, out in enumerate(outs, 1))
        grads.append(torch.autograd.grad(loss, linear.weight)[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
