"""The whole network: names, shapes, initialisation, size, and what a token can see."""

from typing import Any

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model.router import Router
from whalefall.model.transformer import Transformer, parameter_counts

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tokens(batch: int = 2, seq: int = 9) -> Tensor:
    return torch.randint(128, (batch, seq), generator=torch.Generator().manual_seed(0))


def network(config: ModelConfig, **changes: Any) -> Transformer:
    return Transformer.create(config.model_copy(update=changes), dtype=torch.float64)


def test_names_and_shapes_are_the_checkpoints(tiny_config: ModelConfig) -> None:
    model = Transformer.create(tiny_config)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    attention = {
        "q_a_proj": (24, 48), "q_a_layernorm": (24,), "q_b_proj": (4 * 20, 24),
        "kv_a_proj_with_mqa": (16 + 8, 48), "kv_a_layernorm": (16,),
        "kv_b_proj": (4 * 24, 16), "o_proj": (48, 4 * 12),
    }  # fmt: skip
    dense = {"gate_proj": (96, 48), "up_proj": (96, 48), "down_proj": (48, 96)}
    expected: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (128, 48),
        "model.norm.weight": (48,),
        "lm_head.weight": (128, 48),
        "model.layers.3.enorm.weight": (48,),
        "model.layers.3.hnorm.weight": (48,),
        "model.layers.3.eh_proj.weight": (48, 96),
        "model.layers.3.shared_head.norm.weight": (48,),
    }
    for layer in range(4):
        prefix = f"model.layers.{layer}"
        expected[f"{prefix}.input_layernorm.weight"] = (48,)
        expected[f"{prefix}.post_attention_layernorm.weight"] = (48,)
        for name, shape in attention.items():
            expected[f"{prefix}.self_attn.{name}.weight"] = shape
        if layer == 0:
            expected |= {f"{prefix}.mlp.{name}.weight": shape for name, shape in dense.items()}
            continue
        expected[f"{prefix}.mlp.gate.weight"] = (8, 48)
        expected[f"{prefix}.mlp.gate.e_score_correction_bias"] = (8,)
        expected[f"{prefix}.mlp.experts.gate_up_proj"] = (8, 40, 48)
        expected[f"{prefix}.mlp.experts.down_proj"] = (8, 48, 20)
        for name, shape in (("gate", (20, 48)), ("up", (20, 48)), ("down", (48, 20))):
            expected[f"{prefix}.mlp.shared_experts.{name}_proj.weight"] = shape
    assert shapes == expected


def test_output(tiny_config: ModelConfig) -> None:
    output = Transformer.create(tiny_config, dtype=torch.bfloat16)(tokens())
    assert output.logits.shape == (2, 9, 128) and output.logits.dtype == torch.float32
    assert [part.shape for part in output.mtp_logits] == [(2, 8, 128)]
    assert output.mtp_logits[0].dtype == torch.float32
    # Two main layers with experts, then the MTP module with one position fewer.
    assert output.expert_loads.shape == (3, 8)
    assert output.expert_loads.sum(1).tolist() == [2 * 9 * 3, 2 * 9 * 3, 2 * 8 * 3]


def test_a_network_without_experts_or_mtp(tiny_config: ModelConfig) -> None:
    model = network(tiny_config, first_k_dense_replace=3, num_nextn_predict_layers=0)
    output = model(tokens())
    assert output.mtp_logits == [] and output.expert_loads.shape == (0, 8)
    assert model.routers() == [] and model.mtp_modules == []


def test_routers_are_in_the_order_of_the_loads(tiny_config: ModelConfig) -> None:
    """A bias on one router's expert shows in its own row of the loads, and there only fully."""
    model = network(tiny_config)
    routers = model.routers()
    assert len(routers) == tiny_config.num_moe_layers == 3
    assert [type(router) for router in routers] == [Router] * 3
    for layer, router in enumerate(routers):
        router.e_score_correction_bias[5] = 100
        loads = model(tokens()).expert_loads
        router.e_score_correction_bias[5] = 0
        full = loads[:, 5] == loads.sum(1) // tiny_config.num_experts_per_tok
        assert full.nonzero().flatten().tolist() == [layer]


@pytest.mark.parametrize("changed", [1, 4, 8])
def test_a_later_token_changes_nothing_before_it(tiny_config: ModelConfig, changed: int) -> None:
    model, rows = network(tiny_config), tokens()
    other = rows.clone()
    other[0, changed] = (other[0, changed] + 1) % 128
    moved = (model(rows).logits - model(other).logits).abs().amax(-1)
    assert (moved[0, :changed] < 1e-9).all() and (moved[0, changed:] > 1e-6).all()
    assert (moved[1] < 1e-9).all()  # nor anything in another row


def test_packed_documents_are_as_if_alone(tiny_config: ModelConfig) -> None:
    model, rows, lengths = network(tiny_config), tokens(1), [3, 1, 5]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).unsqueeze(0)
    packed = model(rows, documents=documents).logits
    alone = torch.cat([model(part).logits for part in rows.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, **CLOSE)
    assert (model(rows).logits - alone)[:, 3:].abs().max() > 1e-3  # the mask is what does it


def test_document_numbers_only_name(tiny_config: ModelConfig) -> None:
    """Each row has its own documents, and which numbers they bear says nothing."""
    model, rows = network(tiny_config), tokens()
    documents = torch.tensor([[0] * 4 + [1] * 5, [0] * 7 + [1] * 2])
    renamed = torch.tensor([[70] * 4 + [3] * 5, [2] * 7 + [9] * 2])
    one, two = model(rows, documents=documents), model(rows, documents=renamed)
    assert torch.equal(one.logits, two.logits)
    single = model(rows[1:], documents=documents[1:]).logits
    torch.testing.assert_close(one.logits[1:], single, **CLOSE)


def test_initialisation(tiny_config: ModelConfig) -> None:
    """Normal(0, std) for every matrix, one for norms, zero for biases (paper 4.2)."""
    config = tiny_config.model_copy(update={"initializer_range": 0.006, "attention_bias": True})
    model = Transformer.create(config, seed=3)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            spread = 5 / parameter.numel() ** 0.5  # five standard errors, or more
            assert parameter.std().item() == pytest.approx(0.006, rel=spread), name
            assert abs(parameter.mean().item()) < 0.006 * spread, name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name
    for router in model.routers():
        assert (router.e_score_correction_bias == 0).all()


def test_a_seed_is_a_network(tiny_config: ModelConfig) -> None:
    one, same, other = (Transformer.create(tiny_config, seed=seed) for seed in (5, 5, 6))
    torch.rand(3)  # the global generator has no part in it
    for (name, a), b, c in zip(
        one.named_parameters(), same.parameters(), other.parameters(), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.ndim == 1 or not torch.equal(a, c), name


def test_a_bf16_network_keeps_fp32_router_biases(tiny_config: ModelConfig) -> None:
    model = Transformer.create(tiny_config, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {r.e_score_correction_bias.dtype for r in model.routers()} == {torch.float32}


def test_a_cast_keeps_fp32_router_biases(tiny_config: ModelConfig) -> None:
    model = Transformer.create(tiny_config)
    for router in model.routers():
        router.e_score_correction_bias.fill_(0.3001)  # BF16 has 0.2988 and 0.3008 there
    model.to(torch.bfloat16)
    for router in model.routers():
        assert router.weight.dtype == torch.bfloat16
        assert torch.equal(router.e_score_correction_bias, torch.full((8,), 0.3001))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_learns(tiny_config: ModelConfig, dtype: torch.dtype) -> None:
    model = Transformer.create(tiny_config, dtype=dtype)
    output = model(tokens(4, 16))
    (output.logits.square().mean() + output.mtp_logits[0].square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name


def test_the_size_of_v3() -> None:
    counts = parameter_counts(ModelConfig())
    assert counts.total == pytest.approx(671.026e9, abs=1e6)
    assert counts.active == pytest.approx(37.55e9, abs=5e6)
    assert counts.active_without_embedding == pytest.approx(36.63e9, abs=5e6)
    assert counts.mtp == pytest.approx(11.61e9, abs=5e6)


def test_the_size_of_v3s_parts() -> None:
    """Per layer: MLA 187.11 M, a dense feed-forward 396.36 M, one expert 44.04 M."""

    def total(**changes: Any) -> int:
        return parameter_counts(ModelConfig.model_validate(changes)).total

    norms, feed_forward, expert = 2 * 7168, 3 * 7168 * 18432, 3 * 7168 * 2048
    outside = 2 * 129280 * 7168 + 7168  # embedding, head, last norm
    dense = total(num_hidden_layers=1, first_k_dense_replace=1) - outside
    assert dense - norms - feed_forward == pytest.approx(187.11e6, abs=5e3)
    assert feed_forward == pytest.approx(396.36e6, abs=5e3)
    assert expert == pytest.approx(44.04e6, abs=5e3)
    mixed = total(num_hidden_layers=1, first_k_dense_replace=0) - outside
    assert mixed - dense + feed_forward == 257 * expert + 256 * 7168  # and the gate


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, {"num_nextn_predict_layers": 2}])
def test_counts_are_those_of_an_allocated_network(
    tiny_config: ModelConfig, changes: dict[str, Any]
) -> None:
    config = tiny_config.model_copy(update=changes)
    model, counts = Transformer.create(config), parameter_counts(config)
    mtp = sum(p.numel() for module in model.mtp_modules for p in module.parameters())
    assert counts.mtp == mtp
    assert counts.total + counts.mtp == sum(p.numel() for p in model.parameters())
    idle_experts = 2 * (8 - 3) * 3 * 48 * 20  # two layers, five of eight, three matrices
    assert counts.active == counts.total - idle_experts
    assert counts.active_without_embedding == counts.active - 128 * 48


def test_a_dense_network_is_all_active(tiny_config: ModelConfig) -> None:
    dense = {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}
    counts = parameter_counts(tiny_config.model_copy(update=dense))
    assert counts.active == counts.total and counts.mtp == 0
