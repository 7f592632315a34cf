"""The network computes what ``transformers`` computes: logits, gradients, MTP, either way round."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from whalefall.config.model import ModelConfig, RopeScaling
from whalefall.model.checkpoint import load_model, save_model
from whalefall.model.hf_layout import to_disk
from whalefall.model.transformer import Transformer

V3 = ModelConfig(
    vocab_size=96, hidden_size=32, num_hidden_layers=3, first_k_dense_replace=1,
    intermediate_size=48, num_attention_heads=4, q_lora_rank=24, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=16,
    num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=16,
    num_nextn_predict_layers=0, max_position_embeddings=64,
)  # fmt: skip
YARN = RopeScaling(factor=40.0, original_max_position_embeddings=32)
CONFIGS = {
    "v3": V3,
    "moonlight": V3.model_copy(
        update={"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 2}
    ),
    "yarn": V3.model_copy(update={"rope_scaling": YARN, "max_position_embeddings": 1280}),
    "dense": V3.model_copy(update={"first_k_dense_replace": 3}),
    "biased": V3.model_copy(update={"attention_bias": True, "norm_topk_prob": False}),
}
TOLERANCE = 1e-4


@torch.no_grad()
def randomise(tensors: dict[str, Tensor]) -> None:
    """Weights large enough to make routing and attention matter; biased scores stay positive."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.endswith("e_score_correction_bias"):
            tensor.uniform_(0.0, 0.1, generator=generator)
        elif tensor.ndim == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=0.2, generator=generator)


def ours(config: ModelConfig) -> Transformer:
    model = Transformer.create(config)
    randomise(model.state_dict())
    return model


def theirs(config: ModelConfig) -> DeepseekV3ForCausalLM:
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**config.to_hf()))
    randomise(model.state_dict())
    return model


def transformers_load(folder: Path) -> DeepseekV3ForCausalLM:
    model, report = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return model


def some_tokens(config: ModelConfig, batch: int = 2, seq: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.vocab_size, (batch, seq), generator=generator)


def assert_close(name: str, found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)
    assert error <= TOLERANCE, f"{name} differs by {error:.2e}"


def gradients(model: torch.nn.Module, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """Of the mean next-token cross-entropy, one a parameter, named as on disk."""
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    named = [(name, parameter.grad) for name, parameter in model.named_parameters()]
    return {part: view for name, grad in named for part, view in to_disk(name, grad)}


def assert_same_network(mine: Transformer, reference: DeepseekV3ForCausalLM) -> None:
    tokens = some_tokens(mine.config)
    expected_logits = reference(tokens, use_cache=False).logits
    logits = mine(tokens).logits
    assert_close("logits", logits, expected_logits)
    expected = gradients(reference, expected_logits, tokens)
    found = gradients(mine, logits, tokens)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert_close(name, found[name], gradient)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_transformers_saves_is_the_same_network_here(
    config: ModelConfig, tmp_path: Path
) -> None:
    reference = theirs(config)
    reference.save_pretrained(tmp_path)
    model = load_model(tmp_path)
    assert model.config.model_dump(exclude={"num_key_value_heads"}) == config.model_dump(
        exclude={"num_key_value_heads"}
    )
    assert_same_network(model, reference)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_what_is_saved_here_is_the_same_network_in_transformers(
    config: ModelConfig, tmp_path: Path
) -> None:
    model = ours(config)
    save_model(model, tmp_path, dtype=torch.float32, max_shard_bytes=20_000)
    assert_same_network(model, transformers_load(tmp_path))


@pytest.mark.parametrize("seq", [4, 17])
def test_mtp_depths_draft_what_transformers_drafts(seq: int, tmp_path: Path) -> None:
    """Depth 1 sees the next token, depth 2 also what depth 1 drafted, at the last position."""
    config = V3.model_copy(update={"num_nextn_predict_layers": 2})
    model = ours(config)
    save_model(model, tmp_path, dtype=torch.float32)
    reference = transformers_load(tmp_path)
    # transformers knows the MTP layer by DeepSeek's own number of layers only.
    layers = [rf"model\.layers\.{config.num_hidden_layers + depth}\." for depth in range(2)]
    reference._keys_to_ignore_on_load_unexpected = layers
    modules = MtpModel.from_pretrained(reference)

    tokens = some_tokens(config, batch=1, seq=seq + 1)
    hidden = reference.model(tokens[:, :-1], use_cache=False).last_hidden_state
    drafts, expected, _ = modules(
        tokens[:, 1:],
        last_hidden_states=hidden,
        attention_mask=torch.ones_like(tokens[:, 1:]),
        position_ids=torch.arange(1, seq + 1).unsqueeze(0),
        mtp_cache=MtpCache(config=reference.config.get_mtp_config()),
    )
    output = model(torch.cat([tokens, drafts[:, :1]], dim=1))
    for depth in range(2):
        # Two positions more than were given to transformers, less one a depth from the end.
        found = output.mtp_logits[depth][:, seq - 1]
        assert_close(f"depth {depth + 1}", found, expected[:, depth])
