"""Published checkpoints are read as they are, and what we write is read by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config

from whalefall.config.model import ModelConfig
from whalefall.errors import UserError

PUBLISHED = sorted((Path(__file__).parent / "hf").glob("*.json"))


def read(name: str) -> dict[str, Any]:
    return json.loads((Path(__file__).parent / "hf" / f"{name}.json").read_text())


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_published_config_keeps_every_value(file: Path) -> None:
    raw = json.loads(file.read_text())
    dumped = ModelConfig.from_hf(raw).model_dump()
    assert {key: dumped[key] for key in raw.keys() & dumped.keys()} == {
        key: raw[key] for key in raw.keys() & dumped.keys()
    }


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_written_config_reads_back_equal(file: Path) -> None:
    config = ModelConfig.from_hf(json.loads(file.read_text()))
    reread = ModelConfig.from_hf(json.loads(json.dumps(config.to_hf())))
    assert reread == config.model_copy(update={"num_key_value_heads": config.num_attention_heads})


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_config_rewritten_by_transformers_describes_the_same_network(
    file: Path, tmp_path: Path
) -> None:
    raw = json.loads(file.read_text())
    ours = ModelConfig.from_hf(raw)
    DeepseekV3Config(**raw).save_pretrained(tmp_path)
    assert ModelConfig.from_folder(tmp_path) == ours


def test_transformers_reads_what_we_write(tiny_config: ModelConfig, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config.to_hf("bfloat16")))
    theirs = DeepseekV3Config.from_pretrained(tmp_path)
    for key in ("hidden_size", "q_lora_rank", "n_group", "topk_group", "moe_intermediate_size"):
        assert getattr(theirs, key) == getattr(tiny_config, key)
    assert theirs.rope_parameters["rope_theta"] == tiny_config.rope_theta


def test_defaults_are_deepseek_v3_before_its_context_was_extended() -> None:
    published = ModelConfig.from_hf(read("deepseek-v3")).model_dump()
    defaults = ModelConfig().model_dump()
    assert {key for key in defaults if defaults[key] != published[key]} == {
        "num_key_value_heads",
        "aux_loss_alpha",  # the paper trained with 0.0001 and initialised with 0.006
        "initializer_range",
        "rope_scaling",
        "max_position_embeddings",
        "quantization_config",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_group": 3}, r"n_routed_experts \(256\) is not divisible by n_group \(3\)"),
        ({"topk_group": 9}, r"topk_group \(9\) exceeds n_group \(8\)"),
        ({"n_group": 256, "topk_group": 8}, "needs at least 2"),
        ({"topk_group": 1, "num_experts_per_tok": 33}, "exceeds the 32 experts of topk_group"),
        ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; it must be even"),
        ({"num_key_value_heads": 8}, r"equal to num_attention_heads \(128\)"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; only 'sigmoid' is supported"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True; only False is supported"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling.type"),
        ({"sliding_window": 128}, "sliding_window"),
    ],
)
def test_a_network_we_cannot_run_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ModelConfig.from_hf(read("deepseek-v3") | change)


def test_routing_keys_do_not_matter_to_a_dense_network() -> None:
    dense = ModelConfig(num_hidden_layers=2, first_k_dense_replace=2, n_group=3)
    assert dense.is_dense
    assert dense.num_moe_layers == 0
