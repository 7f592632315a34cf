"""Counts of parameters and FLOPs, against the papers and against the network itself."""

import json
from pathlib import Path

import pytest

from whalefall.config import load_config
from whalefall.errors import UserError
from whalefall.model.transformer import parameter_counts
from whalefall.plan.architecture import Dense, GroupedAttention
from whalefall.plan.flops import published_dense_flops, training_flops
from whalefall.plan.models import architecture_of, model_names

HF = Path(__file__).parents[1] / "config" / "hf"


def test_deepseek_v3_has_the_papers_parameters() -> None:
    counts = architecture_of("v3-671b").parameters()
    assert round(counts.total / 1e9, 2) == 671.03
    assert round(counts.active / 1e9, 2) == 37.55
    assert round(counts.active_without_embedding / 1e9, 2) == 36.63
    assert round(counts.mtp / 1e9, 2) == 11.61


@pytest.mark.parametrize("preset", ["quickstart", "bench-6b", "moonlight-16b", "v3-671b"])
def test_counts_are_the_networks_own(preset: str) -> None:
    ours, network = (
        architecture_of(preset).parameters(),
        parameter_counts(load_config(preset).model),
    )
    assert ours.total == network.total
    assert ours.active == network.active
    assert ours.active_without_embedding == network.active_without_embedding
    assert ours.mtp == network.mtp


@pytest.mark.parametrize(
    ("model", "total"),
    # Of the models' cards: 235.7 B, 1.03 T (1,026.4 B), 405.85 B, 72.7 B.
    [
        ("deepseek-v2", 235.74),
        ("kimi-k2", 1026.41),
        ("llama-3.1-405b", 405.85),
        ("qwen-2.5-72b", 72.71),
    ],
)
def test_other_models_have_their_parameters(model: str, total: float) -> None:
    assert round(architecture_of(model).parameters().total / 1e9, 2) == total


@pytest.mark.parametrize(("model", "published"), [("deepseek-v2", 155e9), ("v3-671b", 250e9)])
def test_training_flops_of_mixtures_are_the_papers(model: str, published: float) -> None:
    assert training_flops(architecture_of(model), 4096) == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize(
    ("model", "published"), [("qwen-2.5-72b", 394e9), ("llama-3.1-405b", 2448e9)]
)
def test_training_flops_of_dense_networks_are_a_rule_of_thumb(model: str, published: float) -> None:
    """The paper's figures for dense networks are those of the rule, not of the shapes."""
    network = architecture_of(model)
    assert published_dense_flops(network) == pytest.approx(published, rel=0.0005)
    assert training_flops(network, 4096) > 1.01 * published


def test_causal_attention_counts_half() -> None:
    network = architecture_of("v3-671b")
    attention = training_flops(network, 4096, causal=False) - training_flops(network, 4096)
    assert attention == pytest.approx(61 * 128 * (192 + 128) * 4096 * 3)


@pytest.mark.parametrize("file", sorted(HF.glob("*.json")), ids=lambda file: file.stem)
def test_published_configurations_are_read(file: Path) -> None:
    assert architecture_of(file).parameters().total > 1e10


def test_the_planners_kimi_is_the_published_one() -> None:
    ours, published = architecture_of("kimi-k2"), architecture_of(HF / "kimi-k2.json")
    assert ours.runs == published.runs
    assert ours.parameters() == published.parameters()


def test_a_small_dense_configuration_is_enough(tmp_path: Path) -> None:
    shape = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 1, "intermediate_size": 96, "vocab_size": 100,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape))
    network = architecture_of(tmp_path)
    layer = network.runs[0].layer
    assert layer.attention == GroupedAttention(heads=4, kv_heads=1, head_dim=16)
    assert layer.feed_forward == Dense(96)
    counts = network.parameters()
    attention = 2 * 64 * 64 + 2 * 64 * 16
    assert counts.total == 100 * 64 + 2 * (attention + 3 * 64 * 96 + 2 * 64) + 64
    assert counts.active_without_embedding == counts.total  # the embedding is the head


def test_an_unknown_model_is_told_in_one_line() -> None:
    with pytest.raises(UserError, match="did you mean kimi-k2") as caught:
        architecture_of("kimi-k3")
    assert all(name in str(caught.value) for name in model_names())


def test_experts_without_latent_attention_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"num_local_experts": 8, "hidden_size": 64}))
    with pytest.raises(UserError, match="num_local_experts but no kv_lora_rank"):
        architecture_of(tmp_path)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 64}))
    with pytest.raises(UserError, match="vocab_size is missing"):
        architecture_of(tmp_path)
