"""AdamW and the gradients' norm on one layer's stacked experts, 369 million numbers."""

from collections.abc import Iterator

import torch
from common_kernels import Row

from whalefall.ops.adamw import adamw_, global_norm

SHAPE = (64, 2816, 2048)
SETTINGS = {"learning_rate": 1e-5, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FP32, BF16 = torch.float32, torch.bfloat16


def rows() -> Iterator[Row]:
    yield _update("AdamW, FP32 master in halves", BF16, has_remainder=True)
    yield _update("AdamW, FP32 master in halves, FP32 gradient", FP32, has_remainder=True)
    yield _update("AdamW, BF16 weight", BF16, has_remainder=False)
    gradients = [torch.randn(SHAPE, device="cuda", dtype=BF16) for _ in range(2)]
    yield Row(
        "norm of BF16 gradients",
        lambda: global_norm(gradients),
        bytes=sum(gradient.nbytes for gradient in gradients),
        peer=lambda: torch.nn.utils.get_total_norm(gradients),
        peer_name="torch",
    )


def _update(name: str, gradient_dtype: torch.dtype, *, has_remainder: bool) -> Row:
    """Of BF16 weights and moments. The peer is torch's fused update, of equal types throughout."""
    weight = torch.randn(SHAPE, device="cuda", dtype=BF16)
    remainder = torch.zeros_like(weight, dtype=torch.int16) if has_remainder else None
    gradient = torch.randn(SHAPE, device="cuda", dtype=gradient_dtype)
    moments = [torch.zeros(SHAPE, device="cuda", dtype=BF16) for _ in range(2)]
    divisor = torch.ones((), device="cuda")
    peer = None
    if not has_remainder:
        parameter = torch.nn.Parameter(weight.clone())
        parameter.grad = gradient
        peer = torch.optim.AdamW([parameter], lr=1e-5, fused=True).step

    def run() -> None:
        first, second = moments
        adamw_(
            [weight], [remainder], [gradient], [first], [second],
            step=10, gradient_divisor=divisor, **SETTINGS,
        )  # fmt: skip

    updated = [weight, *moments] if remainder is None else [weight, remainder, *moments]
    moved = 2 * sum(tensor.nbytes for tensor in updated) + gradient.nbytes
    return Row(name, run, bytes=moved, peer=peer, peer_name="torch, fused")
