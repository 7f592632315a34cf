"""The training loss against its definition: cross-entropies of all depths, and balance."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.model.loss import (
    BatchSize,
    Losses,
    count_targets,
    token_losses,
    training_loss,
)
from whalefall.model.transformer import Transformer

BATCH, SEQ = 2, 7
LAMBDA, ALPHA = 0.3, 0.01
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def network(config: ModelConfig, **changes: Any) -> Transformer:
    """In float64, with router biases, which choose experts but must not enter the balance loss."""
    model = Transformer.create(config.model_copy(update=changes), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    for router in model.routers():
        router.e_score_correction_bias.normal_(std=0.2, generator=generator)
    return model


def rows(depths: int, batch: int = BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(128, (batch, SEQ + 1 + depths), generator=generator)


def loss_of(model: Transformer, tokens: Tensor, **options: Any) -> Losses:
    options = {"mtp_weight": LAMBDA, "sequence_alpha": ALPHA, **options}
    return training_loss(model, tokens, **options)


def cross_entropies(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Of each depth by F.cross_entropy on all logits: depth k at i predicts token i + k + 1."""
    depths = len(model.mtp_modules)
    states = model.hidden_states(tokens[:, :-1], lookahead=depths)
    parts = []
    for k, hidden in enumerate([states.main, *states.mtp]):
        logits = hidden @ model.lm_head.weight.T
        target = tokens[:, k + 1 : k + 1 + SEQ]
        assert logits.shape[1] == SEQ
        parts.append(F.cross_entropy(logits.flatten(0, 1), target.flatten()))
    return parts


def balance_of_layers(model: Transformer, tokens: Tensor) -> list[Tensor]:
    """Equations 17 to 20, differentiable, on the unbiased scores of each sequence and layer."""
    experts, top_k = model.config.n_routed_experts, model.config.num_experts_per_tok
    states = model.hidden_states(tokens[:, :-1], lookahead=len(model.mtp_modules))
    layers = []
    for routing in states.routings:
        sequences = []
        for scores in routing.scores.view(len(tokens), -1, experts):
            held = F.one_hot(scores.topk(top_k).indices, experts).sum((0, 1))
            frequency = experts / (top_k * len(scores)) * held
            probability = (scores / scores.sum(1, keepdim=True)).mean(0)
            sequences.append((frequency * probability).sum())
        layers.append(torch.stack(sequences).mean())
    return layers


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_parts_and_total(tiny_config: ModelConfig, depths: int) -> None:
    model = network(tiny_config, num_nextn_predict_layers=depths)
    tokens = rows(depths)
    losses = loss_of(model, tokens)
    main, *mtp = cross_entropies(model, tokens)
    balances = balance_of_layers(model, tokens)
    torch.testing.assert_close(losses.main.double(), main, **CLOSE)
    assert len(losses.mtp) == depths
    for own, right in zip(losses.mtp, mtp, strict=True):
        torch.testing.assert_close(own.double(), right, **CLOSE)
    torch.testing.assert_close(losses.balance, torch.stack(balances).mean(), **CLOSE)
    total = main + ALPHA * sum(balances)
    if depths:
        total = total + LAMBDA / depths * sum(mtp)
    torch.testing.assert_close(losses.total.double(), total, **CLOSE)


@pytest.mark.parametrize("depths", [0, 1, 2])
def test_gradients_of_every_parameter(tiny_config: ModelConfig, depths: int) -> None:
    model = network(tiny_config, num_nextn_predict_layers=depths)
    tokens, parameters = rows(depths), dict(model.named_parameters())
    own = torch.autograd.grad(loss_of(model, tokens).total, list(parameters.values()))
    main, *mtp = cross_entropies(model, tokens)
    total = main + ALPHA * sum(balance_of_layers(model, tokens))
    if depths:
        total = total + LAMBDA / depths * sum(mtp)
    right = torch.autograd.grad(total, list(parameters.values()))
    for name, one, other in zip(parameters, own, right, strict=True):
        assert other.abs().max() > 1e-7, name
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6, msg=name)


def test_embedding_and_head_learn_from_every_depth(tiny_config: ModelConfig) -> None:
    """The gradients of lambda = 0.3 and of 0 differ by 0.3 times those of the MTP loss itself."""
    model = network(tiny_config)
    tokens, shared = rows(1), [model.model.embed_tokens.weight, model.lm_head.weight]

    def gradients(loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, shared)

    silent = gradients(loss_of(model, tokens, mtp_weight=0.0).total)
    heard = gradients(loss_of(model, tokens).total)
    alone = gradients(cross_entropies(model, tokens)[1])
    for without, both, mtp in zip(silent, heard, alone, strict=True):
        assert without.norm() > 1e-3 and mtp.norm() > 1e-3
        torch.testing.assert_close(both - without, LAMBDA * mtp, **CLOSE)


def test_expert_loads_of_every_layer(tiny_config: ModelConfig) -> None:
    model = network(tiny_config)
    loads = loss_of(model, rows(1)).expert_loads
    assert loads.shape == (tiny_config.num_moe_layers, tiny_config.n_routed_experts)
    assert (loads.sum(1) == BATCH * SEQ * tiny_config.num_experts_per_tok).all()


@pytest.mark.parametrize("depths", [0, 1])
def test_a_dense_network_has_no_balance(tiny_config: ModelConfig, depths: int) -> None:
    model = network(tiny_config, first_k_dense_replace=3, num_nextn_predict_layers=depths)
    losses = loss_of(model, rows(depths))
    assert losses.balance == 0
    assert losses.expert_loads.shape == (0, tiny_config.n_routed_experts)
    expected = losses.main + LAMBDA * sum(losses.mtp)
    torch.testing.assert_close(losses.total, torch.as_tensor(expected), **CLOSE)


def documents_of(lengths: list[int]) -> Tensor:
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).unsqueeze(0)


def test_no_target_lies_in_another_document(tiny_config: ModelConfig) -> None:
    """Ten tokens in documents of 4, 1 and 5: depth k keeps the pairs (i, i + k + 1) within one.

    With i among the first 7: tokens 0 to 3 and 5 to 9 give 3 + 2 pairs at distance 1 (the row
    ends before the others), 2 + 2 at distance 2 and 1 + 2 at distance 3. Each pair costs what
    it costs where its document stands alone.
    """
    model = network(tiny_config, num_nextn_predict_layers=2)
    tokens, documents = rows(2, batch=1), documents_of([4, 1, 5])
    losses = loss_of(model, tokens, documents=documents)
    alone = [model(part) for part in tokens.split([4, 1, 5], 1)]
    for k, own in enumerate([losses.main, *losses.mtp]):
        costs = []
        for start, part, output in zip((0, 4, 5), tokens.split([4, 1, 5], 1), alone, strict=True):
            logits = output.logits if k == 0 else output.mtp_logits[k - 1]
            for i in range(part.shape[1] - k - 1):
                if start + i < SEQ:
                    costs.append(F.cross_entropy(logits[0, i], part[0, i + k + 1]))
        assert len(costs) == (5, 4, 3)[k]
        torch.testing.assert_close(own, torch.stack(costs).mean(), **CLOSE)


def test_without_documents_targets_cross_freely(tiny_config: ModelConfig) -> None:
    model = network(tiny_config)
    tokens = rows(1, batch=1)
    free = loss_of(model, tokens)
    one_document = loss_of(model, tokens, documents=documents_of([SEQ + 2]))
    torch.testing.assert_close(one_document.total, free.total, **CLOSE)


def test_a_row_without_any_target_is_zero_and_not_nan(tiny_config: ModelConfig) -> None:
    model = network(tiny_config)
    tokens = rows(1, batch=1)
    losses = loss_of(model, tokens, documents=documents_of([1] * (SEQ + 2)), sequence_alpha=0.0)
    losses.total.backward()
    assert losses.total == losses.main == losses.mtp[0] == 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_add_up_to_the_batch(tiny_config: ModelConfig, masked: bool) -> None:
    """Also where their rows have unequal numbers of targets, and one of them none at all."""
    model = network(tiny_config, num_nextn_predict_layers=2)
    tokens = rows(2, batch=4)
    borders = [[10], [4, 1, 5], [1] * 10, [9, 1]]
    documents = torch.cat([documents_of(lengths) for lengths in borders]) if masked else None
    size = BatchSize(4, count_targets(tokens, documents, depths=2))
    whole = loss_of(model, tokens, documents=documents)
    parts = [
        loss_of(model, tokens[part], documents=documents[part] if masked else None, size=size)
        for part in (slice(0, 2), slice(2, 3), slice(3, 4))
    ]
    for name in ("total", "main", "balance", "expert_loads"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(total, getattr(whole, name), **CLOSE)
    for depth, expected in enumerate(whole.mtp):
        torch.testing.assert_close(sum(part.mtp[depth] for part in parts), expected, **CLOSE)
    parameters = list(model.parameters())
    right = torch.autograd.grad(whole.total, parameters)
    own = torch.autograd.grad(sum(part.total for part in parts), parameters)
    for one, other in zip(own, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_targets_are_counted_by_distance() -> None:
    """As in ``test_no_target_lies_in_another_document``: 5, 4 and 3 of the seven positions."""
    tokens = rows(2, batch=1)
    assert count_targets(tokens, documents_of([4, 1, 5]), depths=2) == [5, 4, 3]
    assert count_targets(tokens, None, depths=2) == [7, 7, 7]


def test_only_the_total_carries_gradients(tiny_config: ModelConfig) -> None:
    losses = loss_of(network(tiny_config), rows(1))
    assert losses.total.requires_grad
    assert not any(part.requires_grad for part in (losses.main, *losses.mtp, losses.balance))


def test_token_losses_are_the_main_loss_token_by_token(tiny_config: ModelConfig) -> None:
    model = network(tiny_config)
    tokens = rows(0)
    nll = token_losses(model, tokens)
    assert nll.shape == (BATCH, SEQ) and not nll.requires_grad
    logits = model(tokens[:, :-1]).logits
    expected = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
    torch.testing.assert_close(nll, expected, **CLOSE)


def test_token_losses_of_documents_are_zero_at_their_borders(tiny_config: ModelConfig) -> None:
    model = network(tiny_config)
    tokens = rows(0, batch=1)
    nll = token_losses(model, tokens, documents=documents_of([3, 5]))
    first, second = token_losses(model, tokens[:, :3]), token_losses(model, tokens[:, 3:])
    expected = torch.cat([first, torch.zeros(1, 1), second], 1)
    torch.testing.assert_close(nll, expected, **CLOSE)
