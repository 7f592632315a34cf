"""Making activations again in the backward pass instead of keeping them (paper 3.2.3)."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from whalefall.model.attention import Context

Recompute = Literal["none", "selective", "block"]
"""``selective``: the norm before attention and MLA's projections, which turn a small latent into
wide queries and keys; what the library's fused attention made is kept. ``block``: everything but
the block's input."""

_ATTENTION = {
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


def rerun(region: Callable[[Tensor, Context], Any], x: Tensor, context: Context) -> Any:
    """``region(x, context)``, keeping x alone: the backward pass runs it again."""
    return checkpoint(region, x, context, use_reentrant=False, preserve_rng_state=False)


def rerun_around_attention(
    region: Callable[[Tensor, Context], Any], x: Tensor, context: Context
) -> Any:
    """As ``rerun``, but what the library's attention returned is kept and not made again."""
    return checkpoint(
        region,
        x,
        context,
        use_reentrant=False,
        preserve_rng_state=False,
        context_fn=partial(create_selective_checkpoint_contexts, _keep_attention),
    )


def _keep_attention(_context: Any, operation: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    if operation in _ATTENTION:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
