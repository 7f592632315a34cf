"""RMSNorm, under the parameter name the checkpoints use."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.ops.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """A learned scale on rows of unit root mean square."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return rms_norm(x, self.weight, self.eps)

    def after_add(
        self,
        residual: Float[Tensor, "*batch dim"],
        *deltas: Float[Tensor, "*batch dim"],
        uses: int = 1,
    ) -> tuple[Float[Tensor, "*batch dim"], ...]:
        """residual + deltas, and its norm, once for each of its ``uses`` (``add_rms_norm``)."""
        return add_rms_norm(residual, deltas, self.weight, self.eps, uses)
