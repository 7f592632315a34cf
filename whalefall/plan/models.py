"""Reading architectures: presets, the planner's own models, and Hugging Face ``config.json``."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from whalefall.config import ModelConfig, load_config, preset_names
from whalefall.config.explain import validated
from whalefall.errors import UserError
from whalefall.plan.architecture import (
    Architecture,
    Dense,
    Experts,
    GroupedAttention,
    LatentAttention,
    Layer,
    Run,
)
from whalefall.plan.files import DATA, names_in, nearest_of


def model_names() -> list[str]:
    """What can be planned by name: the presets, and models that only the planner knows."""
    return sorted({*preset_names(), *names_in("models")})


def architecture_of(name_or_path: str | Path) -> Architecture:
    """The network of a preset, of a model the planner knows, of a run's YAML file, or of a Hugging
    Face folder or ``config.json`` (DeepSeek-V2 and V3 class, or dense LLaMA and Qwen class).

    Raises:
        UserError: no such model or file, or a configuration that cannot be read.
    """
    name, path = str(name_or_path), Path(name_or_path)
    if name in preset_names():
        return _of_config(load_config(name).model, name)
    if name in names_in("models"):
        return _of_hf(json.loads((DATA / "models" / f"{name}.json").read_text()), name)
    if path.suffix in (".yaml", ".yml"):
        return _of_config(load_config(path).model, path.stem)
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except FileNotFoundError:
        names = model_names()
        raise UserError(
            f"{name} is no model, YAML file or folder with a config.json; "
            f"{nearest_of(name, names)}the models are {', '.join(names)}"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{file} is no config.json: it must be a mapping of keys")
    return _of_hf(raw, path.parent.name if path.name == "config.json" else path.stem)


def _of_config(config: ModelConfig, name: str) -> Architecture:
    """The network of a DeepSeek-V3 style configuration."""
    attention = LatentAttention(
        heads=config.num_attention_heads,
        kv_rank=config.kv_lora_rank,
        nope=config.qk_nope_head_dim,
        rope=config.qk_rope_head_dim,
        value=config.v_head_dim,
        q_rank=config.q_lora_rank,
        bias=config.attention_bias,
    )
    experts = Experts(
        routed=config.n_routed_experts,
        top_k=config.num_experts_per_tok,
        shared=config.n_shared_experts,
        intermediate=config.moe_intermediate_size,
        groups=config.n_group,
        top_groups=config.topk_group,
    )
    dense = min(config.first_k_dense_replace, config.num_hidden_layers)
    runs = (
        Run(Layer(attention, Dense(config.intermediate_size)), dense),
        Run(Layer(attention, experts), config.num_hidden_layers - dense),
    )
    return Architecture(
        name=name,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        runs=tuple(run for run in runs if run.length),
        mtp_depth=config.num_nextn_predict_layers,
    )


class _DenseConfig(BaseModel):
    """The keys of a dense ``config.json`` that say how large the network is; others are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model_type: str = "llama"
    vocab_size: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = Field(None, gt=0)
    head_dim: int | None = Field(None, gt=0)
    intermediate_size: int = Field(gt=0)
    attention_bias: bool | None = None
    tie_word_embeddings: bool = False


def _of_hf(raw: dict[str, Any], name: str) -> Architecture:
    if "kv_lora_rank" in raw:
        # How scores are made decides which experts a token meets, and nothing that is counted.
        router = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        return _of_config(ModelConfig.from_hf({**raw, **router}), name)
    if experts := next((key for key in raw if "experts" in key), None):
        raise UserError(
            f"{name} has {experts} but no kv_lora_rank: of networks with experts, those of "
            "DeepSeek's class can be planned"
        )
    config = validated(_DenseConfig, raw)
    is_qwen2 = config.model_type == "qwen2"
    has_bias = is_qwen2 if config.attention_bias is None else config.attention_bias
    attention = GroupedAttention(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=config.head_dim or config.hidden_size // config.num_attention_heads,
        qkv_bias=has_bias,
        output_bias=has_bias and not is_qwen2,
        qk_norm=config.model_type == "qwen3",
    )
    return Architecture(
        name=name,
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        runs=(Run(Layer(attention, Dense(config.intermediate_size)), config.num_hidden_layers),),
        tied=config.tie_word_embeddings,
    )
