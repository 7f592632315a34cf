"""Multi-token prediction: one more block a depth, each seeing one more token (paper 2.2)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.attention import Context
from whalefall.model.block import Block
from whalefall.model.cache import CachedStep
from whalefall.model.dispatch import Dispatcher
from whalefall.model.linear import Linear
from whalefall.model.norm import RMSNorm
from whalefall.model.router import Routing


class SharedHead(nn.Module):
    """The norm before the output head; the head itself is the main model's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class MTPModule(Block):
    """Depth k: predicts token i+k+1 from h_i^(k-1) and the embedding of token i+k (eq. 21-23).

    Equation 21 writes [h; emb]; the published checkpoint stores ``eh_proj`` for [emb; h], and that
    order is kept. ``previous`` is what the depth before hands to the head: the main model's
    representation after the final norm, which the published weights expect, then each module's
    after its ``shared_head.norm``, as in ``transformers``.
    """

    def __init__(self, config: ModelConfig, layer: int, dispatcher: Dispatcher):
        super().__init__(config, layer, dispatcher)
        hidden = config.hidden_size
        self.enorm = RMSNorm(hidden, config.rms_norm_eps)
        self.hnorm = RMSNorm(hidden, config.rms_norm_eps)
        self.eh_proj = Linear(2 * hidden, hidden)
        self.shared_head = SharedHead(config)

    def predict(
        self,
        previous: Float[Tensor, "batch seq hidden"],
        embedded: Float[Tensor, "batch seq hidden"],
        context: Context,
    ) -> tuple[Float[Tensor, "batch seq hidden"], Routing | None]:
        """The representation of this depth, normed for the head, and its routing."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(previous)], -1))
        stream, routing = self((x,), context)
        _, normed = self.shared_head.norm.after_add(*stream)
        return normed, routing

    def guess(
        self,
        previous: Float[Tensor, "tokens hidden"],
        embedded: Float[Tensor, "tokens hidden"],
        step: CachedStep,
    ) -> Float[Tensor, "tokens hidden"]:
        """``predict`` with a cache: for inference."""
        x = self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(previous)], -1))
        return self.infer(x, self.input_layernorm(x), step, self.shared_head.norm)[1]
