"""The feed-forward half of a block: a dense SwiGLU, or shared and routed experts (paper 2.1.2)."""

from collections.abc import Callable
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.dispatch import Dispatched
from whalefall.model.joined import if_together, lay_together
from whalefall.model.linear import Linear
from whalefall.model.router import Router
from whalefall.ops.block_linear import block_experts
from whalefall.ops.few_rows import Weight, are_few, few_rows
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.fp8_mlp import fp8_experts, fp8_mlp, suits_fp8_mlp
from whalefall.ops.gate import Sorted
from whalefall.ops.grouped_linear import grouped_linear
from whalefall.ops.looped_experts import looped_experts
from whalefall.ops.permute import permute, unpermute
from whalefall.ops.quantize import TILE, quantize_blocks
from whalefall.ops.silu_mul import silu_mul
from whalefall.ops.swiglu import swiglu


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). A dense layer, or the shared experts as one."""

    def __init__(self, hidden: int, intermediate: int):
        super().__init__()
        self.gate_proj = Linear(hidden, intermediate)
        self.up_proj = Linear(hidden, intermediate)
        self.down_proj = Linear(intermediate, hidden)
        self._casts = (WeightCast(), WeightCast())

    def forward(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        alike = gate.recipe == up.recipe == down.recipe
        if alike and suits_fp8_mlp(gate.recipe, down.in_features):
            return fp8_mlp(x, gate.weight, up.weight, down.weight, self._casts, gate.recipe)
        if torch.is_grad_enabled() or gate.recipe is not None or gate.joint(up) is not None:
            return down(swiglu(gate.beside(up, x)))
        # Decoding must not copy the weights to put them side by side.
        return down(silu_mul(gate(x), up(x)))


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

    @property
    def held(self) -> tuple[Weight, Weight]:
        """The weights as they are in memory: of gate and up, and of down."""
        return Weight(self.gate_up_proj), Weight(self.down_proj)

    def forward(self, dispatched: Dispatched) -> Float[Tensor, "tokens hidden"]:
        """The weighted outputs of each token's experts, summed."""
        x, places, row_tokens = dispatched.x, dispatched.places, dispatched.row_tokens
        weights, ends, recipe = dispatched.row_weights, dispatched.ends, self.recipe
        if suits_fp8_mlp(recipe, self.down_proj.shape[2]):
            held = (self.gate_up_proj, self.down_proj, self._casts)
            return fp8_experts(x, places, row_tokens, weights, ends, *held, recipe)
        trained = torch.is_grad_enabled() and self.gate_up_proj.requires_grad
        if trained and x.is_cpu and recipe is None:
            parts = (self.gate_up_proj, self.down_proj)
            return looped_experts(x, places, row_tokens, weights, ends, *parts)
        rows = self.on_rows(permute(x, places, row_tokens), weights, ends)
        return unpermute(rows, places, row_tokens)

    def on_rows(
        self,
        rows: Float[Tensor, "rows hidden"],
        weights: Float[Tensor, "rows"],
        ends: Int[Tensor, "experts"],
    ) -> Float[Tensor, "rows hidden"]:
        """Each row's expert output times the row's weight.

        The weight goes before the last projection, which is linear: the product is narrower
        there, and the backward pass needs no copy of the output.
        """
        recipe, (up_cast, down_cast) = self.recipe, self._casts
        if recipe is None:
            activated = swiglu(grouped_linear(rows, self.gate_up_proj, ends), weights)
            return grouped_linear(activated, self.down_proj, ends)
        gate_up = fp8_linear(rows, [self.gate_up_proj], up_cast, recipe, ends)
        return fp8_linear(swiglu(gate_up, weights), [self.down_proj], down_cast, recipe, ends)


class BlockExperts(Experts):
    """Experts whose weights are FP8 blocks, as checkpoints hold them: for inference."""

    gate_up_proj_scale_inv: Tensor
    """The blocks of an expert's gate, then those of its up part."""
    down_proj_scale_inv: Tensor

    @classmethod
    def of(cls, experts: Experts, config: ModelConfig) -> Self:
        """The same experts, their weights rounded."""
        with torch.device("meta"):
            held = cls(config)
        for name, parts in (("gate_up_proj", 2), ("down_proj", 1)):
            weight = getattr(experts, name).detach()
            blocks = quantize_blocks(weight.unflatten(1, (parts, -1)))
            scales = blocks.scales[..., : -(-weight.shape[2] // TILE)]
            values = nn.Parameter(blocks.values.flatten(1, 2), requires_grad=False)
            setattr(held, name, values)
            held.register_buffer(f"{name}_scale_inv", scales.flatten(1, 2).contiguous())
        return held

    @property
    def held(self) -> tuple[Weight, Weight]:
        return (
            Weight(self.gate_up_proj, self.gate_up_proj_scale_inv),
            Weight(self.down_proj, self.down_proj_scale_inv),
        )

    def on_rows(
        self,
        rows: Float[Tensor, "rows hidden"],
        weights: Float[Tensor, "rows"],
        ends: Int[Tensor, "experts"],
    ) -> Float[Tensor, "rows hidden"]:
        return block_experts(rows, weights, ends, *self.held)


class MoE(nn.Module):
    """DeepSeekMoE: a router, routed experts, and shared experts that every token meets.

    In training a holder of parts: which runs when is the business of the block's stages.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = MLP(config.hidden_size, width) if width else None
        self.block_rows: int | None = None
        """As ``Linear.block_rows``."""
        self._all_up: Weight | None = None
        self._all_down: Weight | None = None

    def infer(
        self, x: Float[Tensor, "tokens hidden"], choice: Sorted
    ) -> tuple[Float[Tensor, "pairs hidden"], Float[Tensor, "tokens hidden"] | None]:
        """Routed rows as ``choice`` sorts them, weighted, and the shared experts' output.

        For inference. Where each expert has few rows kernels make both, the shared expert
        being one more expert if it was joined to the others.
        """
        _, _, places, ends, row_tokens, row_weights = choice
        shared, pairs = self.shared_experts, len(row_tokens)
        if self._takes_few(x, pairs):
            joint = self._joint()
            weights = joint or self.experts.held
            rows = few_rows(x, row_tokens, row_weights, ends, *weights, block_rows=self.block_rows)
            if joint is not None:
                return rows[:pairs], rows[pairs:]
        else:
            rows = self.experts.on_rows(permute(x, places, row_tokens), row_weights, ends)
        return rows, None if shared is None else shared(x)

    def join(self) -> None:
        """Lay the shared expert's weights behind the others', if it is as wide as one of them."""
        shared = self.shared_experts
        if shared is not None and shared.down_proj.in_features == self.experts.down_proj.shape[2]:
            (up, down), gate = self.experts.held, shared.gate_proj.held
            self._all_up = lay_together(up, gate, shared.up_proj.held)
            self._all_down = lay_together(down, shared.down_proj.held)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.part()  # the weights may move
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the parameters do not lie together."""
        return self.__dict__ | {"_all_up": None, "_all_down": None}

    def _takes_few(self, x: Tensor, pairs: int) -> bool:
        if self.experts.recipe is not None:
            return False
        return self.block_rows is not None or are_few(pairs, x, *self.experts.held)

    def _joint(self) -> tuple[Weight, Weight] | None:
        """The experts with the shared one behind them, if they were joined."""
        experts, shared = self.experts, self.shared_experts
        if shared is None:
            return None
        gate, up = shared.gate_proj.weight, shared.up_proj.weight
        all_up = if_together(self._all_up, experts.gate_up_proj, gate, up)
        all_down = if_together(self._all_down, experts.down_proj, shared.down_proj.weight)
        if all_up is None or all_down is None:
            self.part()
            return None
        return all_up, all_down

    def part(self) -> None:
        """Hold the weights together no longer; their memory goes when they do."""
        self._all_up = self._all_down = None
