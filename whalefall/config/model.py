"""The shape of a network: the keys of a Hugging Face DeepSeek-V3 ``config.json``, typed."""

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from whalefall.config.explain import validated


class Section(BaseModel):
    """A part of a configuration: unknown keys are errors, values are immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class RopeScaling(Section):
    """YaRN on the decoupled rotary part (paper 4.3; arXiv 2309.00071)."""

    type: Literal["yarn"] = "yarn"
    factor: float = Field(40.0, ge=1.0)
    """Context multiplier s: the new length over ``original_max_position_embeddings``."""
    original_max_position_embeddings: int = Field(4096, gt=0)
    beta_fast: float = 32.0
    """Rotations within the original context above which a frequency is left alone."""
    beta_slow: float = 1.0
    """Rotations below which a frequency is divided by ``factor``."""
    mscale: float = 1.0
    mscale_all_dim: float = 1.0
    """With ``mscale`` equal, only the softmax scale is multiplied by (0.1 ln s + 1) squared."""


# Written by libraries next to the shape; they say nothing about the network.
_INERT_KEYS = frozenset(
    """architectures auto_map model_type torch_dtype dtype transformers_version use_cache
    pretraining_tp ep_size pad_token_id head_dim qk_head_dim num_local_experts _name_or_path
    return_dict output_attentions output_hidden_states chunk_size_feed_forward""".split()
)


class ModelConfig(Section):
    """A DeepSeek-V3 style network. The defaults are DeepSeek-V3 itself without YaRN (paper 4.2)."""

    vocab_size: int = Field(129280, gt=0)
    hidden_size: int = Field(7168, gt=0)
    num_hidden_layers: int = Field(61, gt=0)
    first_k_dense_replace: int = Field(3, ge=0)
    """The first k layers are dense; ``num_hidden_layers`` or more makes the whole network dense."""
    intermediate_size: int = Field(18432, gt=0)
    """SwiGLU width of a dense layer."""

    num_attention_heads: int = Field(128, gt=0)
    num_key_value_heads: int | None = None
    """MLA has one key and value per head; given, it must equal ``num_attention_heads``."""
    q_lora_rank: int | None = Field(1536, gt=0)
    """Width of the compressed query; null projects the query directly (Moonlight)."""
    kv_lora_rank: int = Field(512, gt=0)
    """Width of the cached latent from which keys and values are expanded."""
    qk_nope_head_dim: int = Field(128, gt=0)
    qk_rope_head_dim: int = Field(64, gt=0)
    v_head_dim: int = Field(128, gt=0)
    attention_bias: bool = False
    attention_dropout: float = 0.0

    n_routed_experts: int = Field(256, gt=0)
    n_shared_experts: int = Field(1, ge=0)
    num_experts_per_tok: int = Field(8, gt=0)
    n_group: int = Field(8, gt=0)
    topk_group: int = Field(4, gt=0)
    moe_intermediate_size: int = Field(2048, gt=0)
    """SwiGLU width of one expert."""
    moe_layer_freq: int = 1
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    aux_loss_alpha: float = 0.0001
    """Sequence-wise balance factor as published; training uses ``balance.sequence_alpha``."""
    seq_aux: bool = True

    num_nextn_predict_layers: int = Field(1, ge=0)
    """Depth D of multi-token prediction."""

    hidden_act: str = "silu"
    rms_norm_eps: float = Field(1e-6, gt=0)
    initializer_range: float = Field(0.006, gt=0)
    rope_theta: float = Field(10000.0, gt=0)
    rope_scaling: RopeScaling | None = None
    rope_interleave: bool = True
    max_position_embeddings: int = Field(4096, gt=0)
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 0
    eos_token_id: int | list[int] | None = 1
    quantization_config: dict[str, Any] | None = None
    """How the checkpoint on disk is quantized (FP8 blocks); the network in memory is not."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        only = {
            "hidden_act": "silu", "scoring_func": "sigmoid", "topk_method": "noaux_tc",
            "moe_layer_freq": 1, "attention_dropout": 0.0, "tie_word_embeddings": False,
            "rope_interleave": True,
        }  # fmt: skip
        for key, allowed in only.items():
            if getattr(self, key) != allowed:
                raise ValueError(f"{key} is {getattr(self, key)!r}; only {allowed!r} is supported")
        if self.num_key_value_heads not in (None, self.num_attention_heads):
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}; MLA needs it equal to "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.qk_rope_head_dim % 2:
            raise ValueError(f"qk_rope_head_dim is {self.qk_rope_head_dim}; it must be even")
        if not self.is_dense:
            self._check_routing()
        return self

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts ({self.n_routed_experts}) is not divisible by "
                f"n_group ({self.n_group})"
            )
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group ({self.topk_group}) exceeds n_group ({self.n_group})")
        group_size = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group_size < 2:
            raise ValueError(
                f"n_group ({self.n_group}) leaves {group_size} expert a group; a group is scored "
                "by its two best experts, so it needs at least 2"
            )
        if self.num_experts_per_tok > self.topk_group * group_size:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) exceeds the "
                f"{self.topk_group * group_size} experts of topk_group ({self.topk_group}) groups"
            )

    @property
    def is_dense(self) -> bool:
        return self.first_k_dense_replace >= self.num_hidden_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with a router, the MTP modules among them."""
        if self.is_dense:
            return 0
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def latent_dim(self) -> int:
        """Numbers cached per token and layer: the latent and the shared rotary key (576 in V3)."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> Self:
        """Read a Hugging Face ``config.json``, of either generation of rope keys."""
        raw = {key: value for key, value in raw.items() if key not in _INERT_KEYS}
        if rope := raw.pop("rope_parameters", None):
            rope = dict(rope)
            raw["rope_theta"] = rope.pop("rope_theta", raw.get("rope_theta", 10000.0))
            kind = rope.pop("rope_type", rope.pop("type", "default"))
            raw["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
        elif scaling := raw.get("rope_scaling"):
            scaling = dict(scaling)
            scaling["type"] = scaling.pop("rope_type", scaling.get("type"))
            raw["rope_scaling"] = scaling
        if raw.get("num_mtp_layers") is not None:
            raw["num_nextn_predict_layers"] = raw.pop("num_mtp_layers")
        for nullable in ("n_shared_experts", "num_nextn_predict_layers", "aux_loss_alpha"):
            if nullable in raw and raw[nullable] is None:
                raw[nullable] = 0
        return validated(cls, raw)

    def to_hf(self, dtype: str = "float32") -> dict[str, Any]:
        """The ``config.json`` that ``transformers``, vLLM and SGLang read."""
        own = self.model_dump(exclude_none=True)
        own["num_key_value_heads"] = self.num_attention_heads
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "torch_dtype": dtype,
            "use_cache": True,
            **own,
            "q_lora_rank": self.q_lora_rank,
            "rope_scaling": own.get("rope_scaling"),
        }

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        return cls.from_hf(json.loads((folder / "config.json").read_text()))
