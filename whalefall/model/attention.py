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
from jaxtyping import Bool, Complex, Float, Shaped
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.cache import CachedStep, Prompts, Rows
from whalefall.model.linear import Linear
from whalefall.model.norm import RMSNorm
from whalefall.ops.absorb import absorb_query, unfold_values
from whalefall.ops.attention import attention
from whalefall.ops.latent_attention import decode_latents, latent_attention
from whalefall.ops.mla_heads import mla_heads
from whalefall.ops.mla_latents import mla_latents
from whalefall.ops.prompt_attention import prompt_attention
from whalefall.ops.rope import yarn_mscale


@dataclass(frozen=True)
class Context:
    """What a forward pass knows of its tokens besides their content."""

    rotation: Complex[Tensor, "#batch seq half"]
    """Rotary turn of each position."""
    mask: Bool[Tensor, "batch seq keys"] | None = None
    """Which keys a query sees; None is causal."""


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
        """Sequences attend to themselves."""
        config, heads = self.config, self.config.num_attention_heads
        widths = [config.q_lora_rank or 0, config.kv_lora_rank, config.qk_rope_head_dim]
        joint = self._down(x.flatten(0, 1)).unflatten(0, x.shape[:-1])
        query, latent, k_rope = joint.split_with_sizes(widths, -1)
        q = self.q_b_proj(self.q_a_layernorm(query)) if config.q_lora_rank else self.q_proj(x)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent))
        q, k, v = mla_heads(
            q.unflatten(-1, (heads, -1)), kv.unflatten(-1, (heads, -1)), k_rope, context.rotation
        )
        mask = None if context.mask is None else context.mask.unsqueeze(1)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out = attention(q, k, v, scale=self.scale, mask=mask)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def infer(
        self, x: Float[Tensor, "tokens hidden"], step: CachedStep
    ) -> Float[Tensor, "tokens hidden"]:
        """Sequences continue: their latents are cached, and each attends to its own pages."""
        config, store = self.config, step.cache.latents.select(0, self.layer)
        q_weight = None if config.q_lora_rank is None else self.q_a_layernorm.weight
        compressed_query = mla_latents(
            self._down(x), q_weight, self.kv_a_layernorm.weight, step.rotation, store, step.slots
        )
        q = self.q_proj(x) if compressed_query is None else self.q_b_proj(compressed_query)
        q = q.view(len(x), config.num_attention_heads, config.qk_head_dim)
        outs, start = [], 0
        for rows, plan in zip(step.groups, step.plans, strict=True):
            part = slice(start, start := start + rows.tokens)
            outs.append(self._absorbed(q[part], step.rotation[part], store, rows, plan))
        if step.prompts is not None:
            outs.append(self._prompts(q[start:], step.rotation[start:], store, step.prompts))
        return self.o_proj(outs[0] if len(outs) == 1 else torch.cat(outs))

    def _prompts(
        self,
        q: Float[Tensor, "tokens heads qk"],
        rotation: Complex[Tensor, "tokens half"],
        store: Shaped[Tensor, "pages page size"],
        prompts: Prompts,
    ) -> Float[Tensor, "tokens values"]:
        """Keys and values are expanded from the latents of whole prompts, as far as they are."""
        latents = store.flatten(0, 1)[prompts.key_slots]
        if latents.dtype == torch.uint8:
            latents = decode_latents(latents, self.config.kv_lora_rank, q.dtype)
        compressed, k_rope = latents.tensor_split([self.config.kv_lora_rank], -1)
        kv = self.kv_b_proj(compressed).unflatten(-1, (self.config.num_attention_heads, -1))
        ends = prompts.query_ends, prompts.key_ends
        return prompt_attention(q, kv, k_rope, rotation, *ends, scale=self.scale)

    def _absorbed(
        self,
        q: Float[Tensor, "tokens heads qk"],
        rotation: Complex[Tensor, "tokens half"],
        store: Shaped[Tensor, "pages page size"],
        rows: Rows,
        plan: Tensor | None,
    ) -> Float[Tensor, "tokens values"]:
        """W_uk is folded into the query and W_uv into the output: the keys are the latents."""
        config, width = self.config, rows.width
        w_uk, w_uv = self.kv_b_proj.weight.view(
            config.num_attention_heads, -1, config.kv_lora_rank
        ).split_with_sizes([config.qk_nope_head_dim, config.v_head_dim], 1)
        mixed = latent_attention(
            absorb_query(q, rotation, w_uk).unflatten(0, (-1, width)),
            store,
            rows.pages,
            rows.lengths,
            value_dim=config.kv_lora_rank,
            scale=self.scale,
            split_keys=rows.split_keys,
            plan=plan,
        )
        return unfold_values(mixed.flatten(0, 1), w_uv)

    def _down(self, x: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens joint"]:
        """The queries' latents, if they have any, and the keys and values', side by side."""
        if self.config.q_lora_rank is None:
            return self.kv_a_proj_with_mqa(x)
        if self.q_a_proj.bias is None:
            return self.q_a_proj.beside(self.kv_a_proj_with_mqa, x)
        return torch.cat([self.q_a_proj(x), self.kv_a_proj_with_mqa(x)], 1)


def expansion_is_cheaper(config: ModelConfig, width: int) -> bool:
    """For ``width`` queries: expansion multiplies once a key, absorption once a query and key."""
    wider = 2 * config.kv_lora_rank - config.qk_nope_head_dim - config.v_head_dim
    return width * wider > config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
