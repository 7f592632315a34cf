"""A transformer block in five stages: attend, dispatch, experts, combine, merge.

``Block.forward`` runs them in order. A pipeline runs the stages of two micro-batches in turn, so
that one's communication (dispatch, combine) hides behind the other's arithmetic (attend,
experts); see paper 3.2.1. Nothing else implements a layer.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.attention import Context, LatentAttention
from whalefall.model.cache import CachedStep
from whalefall.model.dispatch import Dispatched, Dispatcher
from whalefall.model.feed_forward import MLP, MoE
from whalefall.model.norm import RMSNorm
from whalefall.model.recompute import Recompute, rerun, rerun_around_attention
from whalefall.model.router import Routing
from whalefall.ops.merge_norm import merge_norm
from whalefall.ops.rms_norm import add_up

Stream = tuple[Float[Tensor, "batch seq hidden"], ...]
"""The residual stream between blocks, as terms of its sum: who norms it next adds them."""


@dataclass(frozen=True)
class Attended:
    """After attention: the residual stream, and what the feed-forward half will work on."""

    residual: Float[Tensor, "batch seq hidden"]
    normed: Float[Tensor, "tokens hidden"]
    normed_again: Float[Tensor, "tokens hidden"]
    """The same for the shared experts: the norm adds their gradient to the others' itself."""
    routing: Routing | None
    """None in a dense layer."""


@dataclass(frozen=True)
class Computed:
    """After the experts."""

    routed: Float[Tensor, "there hidden"] | None
    """Sums of the tokens' routed experts, where these are. None in a dense layer."""
    shared: Float[Tensor, "tokens hidden"] | None
    """Of the shared experts, or of a dense layer as a whole."""


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher):
        super().__init__()
        self.dispatcher = dispatcher
        self.recompute: Recompute = "none"
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        is_dense = config.is_dense or layer < config.first_k_dense_replace
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if is_dense else MoE(config)

    def attend(self, stream: Stream, context: Context) -> Attended:
        if self.recompute == "selective" and torch.is_grad_enabled():
            x, attended = rerun_around_attention(
                lambda x, context: self._attention((x,), context), add_up(*stream), context
            )
        else:
            x, attended = self._attention(stream, context)
        residual, *readers = self.post_attention_layernorm.after_add(x, attended, uses=3)
        normed, again, for_gate = (reader.flatten(0, 1) for reader in readers)
        routing = self.mlp.gate(for_gate) if isinstance(self.mlp, MoE) else None
        return Attended(residual, normed, again, routing)

    def dispatch(self, attended: Attended) -> Dispatched | None:
        if attended.routing is None:
            return None
        return self.dispatcher.dispatch(attended.normed, attended.routing)

    def experts(self, attended: Attended, dispatched: Dispatched | None) -> Computed:
        if isinstance(self.mlp, MLP) or dispatched is None:
            return Computed(None, self.mlp(attended.normed))
        shared, x = self.mlp.shared_experts, attended.normed_again
        return Computed(self.mlp.experts(dispatched), None if shared is None else shared(x))

    def combine(
        self, attended: Attended, dispatched: Dispatched | None, computed: Computed
    ) -> Float[Tensor, "tokens hidden"] | None:
        if attended.routing is None or dispatched is None or computed.routed is None:
            return None
        return self.dispatcher.combine(computed.routed, dispatched, attended.routing)

    def merge(self, attended: Attended, computed: Computed, combined: Tensor | None) -> Stream:
        x, parts = attended.residual, (combined, computed.shared)
        return x, *(part.view_as(x) for part in parts if part is not None)

    def forward(self, stream: Stream, context: Context) -> tuple[Stream, Routing | None]:
        if self.recompute == "block" and torch.is_grad_enabled():
            # Of the terms of the sum nothing is kept.
            return rerun(lambda x, context: self._stages((x,), context), add_up(*stream), context)
        return self._stages(stream, context)

    def infer(
        self,
        x: Float[Tensor, "tokens hidden"],
        normed: Float[Tensor, "tokens hidden"],
        step: CachedStep,
        next_norm: RMSNorm,
    ) -> tuple[Float[Tensor, "tokens hidden"], Float[Tensor, "tokens hidden"]]:
        """The same five stages with a cache, where nothing is differentiated: in few launches.

        Takes the residual stream and its ``input_layernorm``; gives the stream, and ``next_norm``
        of it.
        """
        attended = self.self_attn.infer(normed, step)
        x, normed = self.post_attention_layernorm.after_add(x, attended)
        if isinstance(self.mlp, MLP):
            x, normed = next_norm.after_add(x, self.mlp(normed))
            return x, normed
        choice = self.mlp.gate.sort(normed)
        routed, shared = self.mlp.infer(normed, choice)
        return merge_norm(x, routed, choice.places, shared, next_norm.weight, next_norm.eps)

    def _attention(self, stream: Stream, context: Context) -> tuple[Tensor, Tensor]:
        """The stream added up, and what attention makes of it."""
        x, normed = self.input_layernorm.after_add(*stream)
        return x, self.self_attn(normed, context)

    def _stages(self, stream: Stream, context: Context) -> tuple[Stream, Routing | None]:
        attended = self.attend(stream, context)
        dispatched = self.dispatch(attended)
        computed = self.experts(attended, dispatched)
        combined = self.combine(attended, dispatched, computed)
        return self.merge(attended, computed, combined), attended.routing
