"""Attention's backward pass with one order of sums, beside those of torch's backends.

cuDNN's, which training takes by default, adds in an order that varies; the memory-efficient one is
what torch itself falls back to where runs must repeat their bits.
"""

from collections.abc import Callable, Iterator

import torch
from common_kernels import Row
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from whalefall.kernels import attention_backward as kernel

QK, VALUES, SCALE = 192, 128, 192**-0.5
CUDNN, EFFICIENT = SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION


def rows() -> Iterator[Row]:
    yield backward(4, 16, 4096, CUDNN)
    yield backward(4, 16, 4096, EFFICIENT)
    yield backward(1, 128, 4096, CUDNN)
    yield backward(4, 16, 4096, EFFICIENT, documents=4)


def backward(
    batch: int, heads: int, seq: int, peer: SDPBackend, documents: int | None = None
) -> Row:
    """Causal, or with the mask of so many documents of equal length."""

    def random(width: int) -> Tensor:
        x = torch.randn(batch, seq, heads, width, device="cuda", dtype=torch.bfloat16)
        return x.transpose(1, 2).requires_grad_()

    q, k, v, grad = random(QK), random(QK), random(VALUES), random(VALUES).detach()
    mask = None
    if documents is not None:
        document = torch.arange(seq, device="cuda") // (seq // documents)
        mask = (document[:, None] == document).tril().expand(batch, 1, seq, seq)
    bias = None if mask is None else torch.where(mask, 0.0, -65504.0).to(q.dtype)
    with torch.no_grad():
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, bias, True, is_causal=mask is None, scale=SCALE
        )
    seen = batch * heads * seq * seq / (2 if mask is None else 1)
    name = f"{batch} x {seq}, {heads} heads" + ("" if mask is None else ", with a mask")
    return Row(
        f"attention backward {name}",
        lambda: kernel.backward(grad, q, k, v, out, lse, mask, SCALE),
        bytes=2 * (2 * (q.numel() + k.numel()) + 3 * v.numel() + 2 * grad.numel()),
        flops=2 * seen * (3 * QK + 2 * VALUES),  # five products; ours makes seven with a mask
        peer=_library(q, k, v, grad, mask, peer),
        peer_name=peer.name.split("_")[0].lower(),
    )


def _library(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, mask: Tensor | None, backend: SDPBackend
) -> Callable[[], object]:
    with sdpa_kernel(backend):
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=SCALE
        )
    return lambda: torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)
