"""The feed-forward half of a block: a dense SwiGLU, or shared and routed experts (paper 2.1.2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.dispatch import Dispatched
from whalefall.model.linear import Linear
from whalefall.model.router import Router
from whalefall.ops.fp8_experts import fp8_experts
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.quantize import TILE
from whalefall.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer, or the shared experts as one."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        if self.gate_proj.recipe is None and not torch.is_grad_enabled():
            # Decoding must not copy the weights to put them side by side.
            return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(swiglu(self.gate_proj.beside(self.up_proj, x)))


class Experts(nn.Module):
    """The routed experts, stacked; ``gate_up_proj`` has an expert's gate rows, then its up rows."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        intermediate = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))
        self.recipe: Recipe | None = None
        self._casts = (WeightCast(), WeightCast())

    def forward(self, dispatched: Dispatched) -> Float[Tensor, "pairs hidden"]:
        """Each row's expert output times the row's weight.

        The weight goes before the last projection, which is linear: the product is narrower
        there, and the backward pass needs no copy of the output.
        """
        rows, weights, ends = dispatched.rows, dispatched.weights, dispatched.ends
        recipe, (up_cast, down_cast) = self.recipe, self._casts
        if recipe is None:
            activated = swiglu(grouped_linear(rows, self.gate_up_proj, ends), weights)
            return grouped_linear(activated, self.down_proj, ends)
        if recipe.is_complete and self.down_proj.shape[2] % TILE == 0:
            return fp8_experts(
                rows, weights, ends, self.gate_up_proj, self.down_proj, self._casts, recipe
            )
        gate_up = fp8_linear(rows, [self.gate_up_proj], up_cast, recipe, ends)
        return fp8_linear(swiglu(gate_up, weights), [self.down_proj], down_cast, recipe, ends)


class MoE(nn.Module):
    """DeepSeekMoE: a router, routed experts, and shared experts that every token meets.

    A holder of parts: which runs when is the business of the block's stages.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None
