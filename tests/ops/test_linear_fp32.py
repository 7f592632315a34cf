"""The gate's product: FP32 whatever the operands, against float64."""

import pytest
import torch
from torch import Tensor

from whalefall.ops.linear_fp32 import linear_fp32

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def error(own: Tensor, right: Tensor) -> float:
    return ((own.double() - right).norm() / right.norm()).item()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "inner", "out"), [(33, 64, 8), (1, 200, 5), (700, 2048, 64)])
def test_fp32_of_any_operands(
    device: str, dtype: torch.dtype, rows: int, inner: int, out: int
) -> None:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inner, generator=generator).to(device, dtype).requires_grad_()
    weight = torch.randn(out, inner, generator=generator).to(device, dtype).requires_grad_()
    # Of very different sizes, as a gate's gradients are.
    outer = torch.randn(rows, out, generator=generator).pow(5).to(device)
    own = linear_fp32(x, weight)
    exact = [value.detach().double().requires_grad_() for value in (x, weight)]
    right = exact[0] @ exact[1].T
    assert own.dtype == torch.float32
    # The tensor cores' sums are FP32, though not rounded to nearest.
    assert error(own, right) < 1e-5
    grads = torch.autograd.grad(own, (x, weight), outer)
    for one, other in zip(grads, torch.autograd.grad(right, exact, outer.double()), strict=True):
        assert one.dtype == dtype
        # BF16 results are rounded once; the FP32 gradient is not rounded before.
        assert error(one, other) < (3e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_keep_what_one_bfloat16_number_would_lose(device: str) -> None:
    # 1 + 2^-10 and -1 differ by 2^-10, which vanishes if the first is rounded to BF16.
    x = torch.ones(2, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    weight = torch.ones(2, 8, dtype=torch.bfloat16, device=device).requires_grad_()
    outer = torch.tensor([[1 + 2**-10, -1.0], [-1.0, 1.0]], device=device)
    of_x, of_weight = torch.autograd.grad(linear_fp32(x, weight), (x, weight), outer)
    assert (of_x[0] == 2**-10).all() and (of_x[1] == 0).all()
    assert (of_weight[0] == 2**-10).all() and (of_weight[1] == 0).all()
