"""Recomputation changes what is kept, and nothing that is computed."""

import pytest
import torch
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model.loss import training_loss
from whalefall.model.recompute import Recompute
from whalefall.model.transformer import Transformer
from whalefall.train.kept import saved_bytes


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


def test_nothing_is_made_twice_without_gradients(tiny_config: ModelConfig) -> None:
    model = Transformer.create(tiny_config)
    tokens = torch.arange(12).view(1, 12)
    with torch.no_grad():
        plain = model(tokens).logits
        model.recompute("block")
        assert torch.equal(model(tokens).logits, plain)
