"""Multi-head latent attention (paper 2.1.1, equations 1 to 11).

Keys and values of all heads are expanded from one latent a token, and only that latent and one
shared rotary key are cached. Two forms compute the same thing:

- expanded: keys and values are made from the latents and attended to as usual. Training and
  long prefills, where the expansion is shared by many queries.
- absorbed: W_uk is folded into the query and W_uv into the output, so the heads attend over the
  latents themselves. Decoding, where reading the cache is the cost.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.cache import LatentCache
from whalefall.model.linear import Linear
from whalefall.model.norm import RMSNorm
from whalefall.ops.attention import attention
from whalefall.ops.mla_heads import mla_heads
from whalefall.ops.rope import rotate, yarn_mscale


@dataclass(frozen=True)
class Context:
    """What a forward pass knows of its tokens besides their content."""

    rotation: Complex[Tensor, "#batch seq half"]
    """Rotary turn of each position."""
    mask: Bool[Tensor, "batch seq keys"] | None = None
    """Which keys a query sees; None is causal without a cache, everything with one."""
    cache: LatentCache | None = None


class LatentAttention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        self.layer = layer
        hidden, heads, bias = config.hidden_size, config.num_attention_heads, config.attention_bias
        query_dim = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, query_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, bias=bias)
            # The published code norms both latents with 1e-6, whatever rms_norm_eps says.
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = Linear(config.q_lora_rank, query_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.latent_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank)
        expanded_dim = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, expanded_dim)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, bias=bias)

        self.scale = config.qk_head_dim**-0.5
        if (yarn := config.rope_scaling) is not None and yarn.mscale_all_dim:
            self.scale *= yarn_mscale(yarn.factor, yarn.mscale_all_dim) ** 2

    def forward(
        self, x: Float[Tensor, "batch seq hidden"], context: Context
    ) -> Float[Tensor, "batch seq hidden"]:
        mask = None if context.mask is None else context.mask.unsqueeze(1)
        if context.cache is None:
            return self.uncached(x, context.rotation, mask)
        q_nope, q_rope = self.query(x, context.rotation)
        latent = context.cache.append(self.layer, self.latent(x, context.rotation))
        if mask is not None or latent.shape[1] > x.shape[1]:
            return self._attend_cached(q_nope, q_rope, latent, mask)
        return self.expanded(q_nope, q_rope, latent, mask)

    def uncached(
        self,
        x: Float[Tensor, "batch seq hidden"],
        rotation: Complex[Tensor, "#batch seq half"],
        mask: Bool[Tensor, "batch 1 seq seq"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        """Expanded attention of a sequence to itself: training."""
        compressed, k_rope = self._compress(x)
        kv = self.kv_b_proj(compressed).unflatten(-1, (self.config.num_attention_heads, -1))
        return self._attend(*mla_heads(self._project_query(x), kv, k_rope, rotation), mask)

    def query(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Complex[Tensor, "#batch seq half"]
    ) -> tuple[Float[Tensor, "batch seq heads nope"], Float[Tensor, "batch seq heads rope"]]:
        """The queries' part without position, and their rotated part."""
        nope, rope = self._project_query(x).split_with_sizes(
            [self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1
        )
        return nope, rotate(rope, rotation.unsqueeze(-2))

    def latent(
        self, x: Float[Tensor, "batch seq hidden"], rotation: Complex[Tensor, "#batch seq half"]
    ) -> Float[Tensor, "batch seq latent"]:
        """What is cached: the normed latent, then the rotated key that all heads share."""
        compressed, k_rope = self._compress(x)
        return torch.cat([compressed, rotate(k_rope, rotation)], -1)

    def expanded(
        self,
        q_nope: Float[Tensor, "batch seq heads nope"],
        q_rope: Float[Tensor, "batch seq heads rope"],
        latent: Float[Tensor, "batch keys latent"],
        mask: Bool[Tensor, "batch 1 seq keys"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        config = self.config
        compressed, k_rope = latent.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        kv = self.kv_b_proj(compressed).unflatten(-1, (config.num_attention_heads, -1))
        k_nope, v = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        shared = k_rope.unsqueeze(-2).expand(-1, -1, config.num_attention_heads, -1)
        q = torch.cat([q_nope, q_rope], -1)
        return self._attend(q, torch.cat([k_nope, shared], -1), v, mask)

    def absorbed(
        self,
        q_nope: Float[Tensor, "batch seq heads nope"],
        q_rope: Float[Tensor, "batch seq heads rope"],
        latent: Float[Tensor, "batch keys latent"],
        mask: Bool[Tensor, "batch 1 seq keys"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        config = self.config
        batch, seq, heads, _ = q_nope.shape
        w_uk, w_uv = self.kv_b_proj.weight.view(heads, -1, config.kv_lora_rank).split_with_sizes(
            [config.qk_nope_head_dim, config.v_head_dim], 1
        )
        # Heads first, so that folding the weights is one batched GEMM: [heads, batch*seq, nope].
        folded = torch.bmm(q_nope.flatten(0, 1).transpose(0, 1), w_uk).transpose(0, 1)
        q = torch.cat([folded.view(batch, seq, heads, -1), q_rope], -1).flatten(1, 2)
        scores = torch.bmm(q, latent.transpose(1, 2)).mul_(self.scale)
        if mask is not None:
            by_query = scores.unflatten(1, (seq, heads))
            by_query.masked_fill_(~mask.transpose(1, 2), float("-inf"))
        probabilities = scores.softmax(-1, dtype=torch.float32).type_as(latent)
        mixed = torch.bmm(probabilities, latent[..., : config.kv_lora_rank])
        by_head = mixed.view(batch * seq, heads, -1).transpose(0, 1)
        out = torch.bmm(by_head, w_uv.transpose(1, 2)).transpose(0, 1)
        return self.o_proj(out.flatten(1)).view(batch, seq, config.hidden_size)

    def _project_query(
        self, x: Float[Tensor, "batch seq hidden"]
    ) -> Float[Tensor, "batch seq heads qk"]:
        tokens = x.flatten(0, 1)
        if self.config.q_lora_rank is None:
            q = self.q_proj(tokens)
        else:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(tokens)))
        return q.view(*x.shape[:-1], self.config.num_attention_heads, self.config.qk_head_dim)

    def _compress(
        self, x: Float[Tensor, "batch seq hidden"]
    ) -> tuple[Float[Tensor, "batch seq kv_lora"], Float[Tensor, "batch seq rope"]]:
        """The normed latent, and the shared key before its rotation."""
        config = self.config
        joint = self.kv_a_proj_with_mqa(x.flatten(0, 1)).view(*x.shape[:-1], config.latent_dim)
        latent, k_rope = joint.split_with_sizes([config.kv_lora_rank, config.qk_rope_head_dim], -1)
        return self.kv_a_layernorm(latent), k_rope

    def _attend(
        self,
        q: Float[Tensor, "batch seq heads qk"],
        k: Float[Tensor, "batch keys heads qk"],
        v: Float[Tensor, "batch keys heads v"],
        mask: Bool[Tensor, "batch 1 seq keys"] | None,
    ) -> Float[Tensor, "batch seq hidden"]:
        out = attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale=self.scale, mask=mask
        )
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _attend_cached(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Whichever form multiplies less: expansion costs once a key, absorption once a query."""
        config = self.config
        wider = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
        expansion = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        if q_nope.shape[1] * wider <= expansion:
            return self.absorbed(q_nope, q_rope, latent, mask)
        return self.expanded(q_nope, q_rope, latent, mask)
