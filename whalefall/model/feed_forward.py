"""The feed-forward half of a block: one dense SwiGLU, or shared and routed experts (paper 2.1.2).

Both kinds answer the same four questions of a block's stages (route, dispatch, compute, combine),
so that ``block.py`` has no branch on them.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.dispatch import Dispatched, Dispatcher
from whalefall.model.router import Router, Routing
from whalefall.ops.grouped_linear import grouped_linear


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer, or the shared experts as one."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def route(self, x: Float[Tensor, "tokens hidden"]) -> None:
        return None

    def dispatch(self, x: Tensor, routing: None, dispatcher: Dispatcher) -> None:
        return None

    def compute(self, x: Float[Tensor, "tokens hidden"], dispatched: None) -> tuple[None, Tensor]:
        return None, self(x)

    def combine(
        self, routed: None, dispatched: None, routing: None, dispatcher: Dispatcher
    ) -> None:
        return None


class Experts(nn.Module):
    """The routed experts, stacked: ``gate_up_proj`` holds each one's gate rows, then its up rows."""

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
        gate, up = grouped_linear(dispatched.rows, self.gate_up_proj, dispatched.ends).chunk(2, -1)
        weights = dispatched.weights.unsqueeze(1).to(gate.dtype)
        return grouped_linear(F.silu(gate) * up * weights, self.down_proj, dispatched.ends)


class MoE(nn.Module):
    """DeepSeekMoE: every token goes to the shared experts and to ``top_k`` routed ones."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            shared_width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = MLP(config.hidden_size, shared_width)
        self.has_shared = config.n_shared_experts > 0

    def route(self, x: Float[Tensor, "tokens hidden"]) -> Routing:
        return self.gate(x)

    def dispatch(self, x: Tensor, routing: Routing, dispatcher: Dispatcher) -> Dispatched:
        return dispatcher.dispatch(x, routing)

    def compute(
        self, x: Float[Tensor, "tokens hidden"], dispatched: Dispatched
    ) -> tuple[Tensor, Tensor | None]:
        """The routed experts' rows, and the shared experts' output for every token."""
        return self.experts(dispatched), self.shared_experts(x) if self.has_shared else None

    def combine(
        self, routed: Tensor, dispatched: Dispatched, routing: Routing, dispatcher: Dispatcher
    ) -> Float[Tensor, "tokens hidden"]:
        return dispatcher.combine(routed, dispatched, routing)
