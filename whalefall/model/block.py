"""A transformer block in five stages: attend, dispatch, experts, combine, merge.

``Block.forward`` runs them in order. A pipeline runs the stages of two micro-batches in turn, so
that one's communication (dispatch, combine) hides behind the other's arithmetic (attend,
experts); see paper 3.2.1. Nothing else implements a layer.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.attention import Context, LatentAttention
from whalefall.model.dispatch import Dispatched, Dispatcher
from whalefall.model.feed_forward import MLP, MoE
from whalefall.model.norm import RMSNorm
from whalefall.model.router import Routing


@dataclass(frozen=True)
class Attended:
    """After attention: the residual stream, and what the feed-forward half will work on."""

    residual: Float[Tensor, "batch seq hidden"]
    normed: Float[Tensor, "tokens hidden"]
    routing: Routing | None
    """None in a dense layer."""


@dataclass(frozen=True)
class Computed:
    """After the experts: routed rows still where the experts are, shared output where tokens are."""

    routed: Float[Tensor, "pairs hidden"] | None
    shared: Float[Tensor, "tokens hidden"] | None


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher):
        super().__init__()
        self.dispatcher = dispatcher
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_dense = config.is_dense or layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def attend(self, x: Float[Tensor, "batch seq hidden"], context: Context) -> Attended:
        residual = x + self.self_attn(self.input_layernorm(x), context)
        normed = self.post_attention_layernorm(residual).flatten(0, 1)
        return Attended(residual, normed, self.mlp.route(normed))

    def dispatch(self, attended: Attended) -> Dispatched | None:
        return self.mlp.dispatch(attended.normed, attended.routing, self.dispatcher)

    def experts(self, attended: Attended, dispatched: Dispatched | None) -> Computed:
        return Computed(*self.mlp.compute(attended.normed, dispatched))

    def combine(
        self, attended: Attended, dispatched: Dispatched | None, computed: Computed
    ) -> Float[Tensor, "tokens hidden"] | None:
        return self.mlp.combine(computed.routed, dispatched, attended.routing, self.dispatcher)

    def merge(
        self, attended: Attended, computed: Computed, combined: Tensor | None
    ) -> Float[Tensor, "batch seq hidden"]:
        x = attended.residual
        for part in (combined, computed.shared):
            if part is not None:
                x = x + part.view_as(x)
        return x

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], context: Context
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing | None]:
        attended = self.attend(x, context)
        dispatched = self.dispatch(attended)
        computed = self.experts(attended, dispatched)
        combined = self.combine(attended, dispatched, computed)
        return self.merge(attended, computed, combined), attended.routing
