"""The feed-forward half of a block: a dense SwiGLU, or shared and routed experts (paper 2.1.2)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.dispatch import Dispatched
from whalefall.model.router import Router
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer, or the shared experts as one."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """The routed experts, stacked; ``gate_up_proj`` has an expert's gate rows, then its up rows."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts, hidden = config.n_routed_experts, config.hidden_size
        intermediate = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, intermediate))

    def forward(self, dispatched: Dispatched) -> Float[Tensor, "pairs hidden"]:
        """Each row's expert output times the row's weight.

        The weight goes before the last projection, which is linear: the product is narrower
        there, and the backward pass needs no copy of the output.
        """
        gate_up = grouped_linear(dispatched.rows, self.gate_up_proj, dispatched.ends)
        activated = swiglu(gate_up, dispatched.weights)
        return grouped_linear(activated, self.down_proj, dispatched.ends)


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
