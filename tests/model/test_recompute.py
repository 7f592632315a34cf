"""Recomputation changes what is kept, and nothing that is computed."""

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model import block
from whalefall.model.loss import training_loss
from whalefall.model.recompute import Recompute
from whalefall.model.transformer import Transformer
from whalefall.ops.fp8_linear import Recipe
from whalefall.train.kept import saved_bytes

MULTIPLES_OF_16 = {
    "hidden_size": 64,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
}


def loss_and_gradients(
    config: ModelConfig, choice: Recompute
) -> tuple[Tensor, dict[str, Tensor], int]:
    """Also the bytes that autograd keeps between the passes, weights not counted."""
    model = Transformer.create(config, seed=3)
    model.recompute(choice)
    tokens = torch.randint(config.vocab_size, (2, 66), generator=torch.Generator().manual_seed(0))
    with saved_bytes(model) as saved:
        losses = training_loss(model, tokens, mtp_weight=0.3, sequence_alpha=0.1)
        bytes_kept = saved()
    losses.total.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return losses.total.detach(), gradients, bytes_kept


@pytest.mark.parametrize("choice", ["selective", "block"])
def test_the_same_bits_from_less_memory(tiny_config: ModelConfig, choice: Recompute) -> None:
    loss, gradients, kept = loss_and_gradients(tiny_config, "none")
    again, regained, less = loss_and_gradients(tiny_config, choice)
    assert torch.equal(again, loss)
    assert regained.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(regained[name], gradient), name
    assert less < (0.8 if choice == "selective" else 0.5) * kept


@pytest.mark.parametrize("name", ["rerun", "rerun_around_attention"])
def test_nothing_is_set_up_without_gradients(
    tiny_config: ModelConfig, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Transformer.create(tiny_config)
    tokens = torch.arange(12).view(1, 12)
    calls: list[str] = []
    monkeypatch.setattr(block, name, lambda region, *inputs: calls.append(name) or region(*inputs))
    model.recompute("block" if name == "rerun" else "selective")
    with torch.no_grad():
        model(tokens)
    assert not calls
    model(tokens)
    assert len(calls) == tiny_config.num_hidden_layers + tiny_config.num_nextn_predict_layers


@pytest.mark.parametrize("choice", ["selective", "block"])
def test_the_same_bits_with_fp8_and_masks(tiny_config: ModelConfig, choice: Recompute) -> None:
    config = tiny_config.model_copy(update=MULTIPLES_OF_16)
    tokens = torch.randint(128, (2, 34), generator=torch.Generator().manual_seed(0))
    documents = (torch.arange(34) // 11).expand(2, -1)
    gradients = []
    for recompute in ("none", choice):
        model = Transformer.create(config, seed=3)
        model.use_recipe(Recipe(fprop=True, dgrad=True, wgrad=True))
        model.recompute(recompute)
        losses = training_loss(
            model, tokens, mtp_weight=0.3, sequence_alpha=0.1, documents=documents
        )
        losses.total.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    for kept, remade in zip(*gradients, strict=True):
        assert torch.equal(kept, remade)
