"""AdamW against PyTorch's, its masters, its clip and its state."""

import pytest
import torch
from torch import Tensor, nn

from whalefall.config.train import OptimizerConfig
from whalefall.train.optimizer import AdamW


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def backward(model: nn.Module, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(4, 6, generator=generator).to(next(model.parameters()).dtype)
    (model(inputs).square().sum() * scale).backward()


def config(**changes: object) -> OptimizerConfig:
    return OptimizerConfig.model_validate({"moment_dtype": "float32", **changes})


def torch_adamw(model: nn.Module, settings: OptimizerConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2],
         "weight_decay": settings.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]  # fmt: skip
    return torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps)


@pytest.mark.parametrize("clip_norm", [0.5, 1e9])
def test_parity_with_torch(clip_norm: float) -> None:
    settings = config(clip_norm=clip_norm)
    ours, theirs = network(), network()
    optimizer, expected = AdamW(ours.named_parameters(), settings), torch_adamw(theirs, settings)
    for step in range(8):
        rate = 1e-2 / (step + 1)
        backward(ours, step)
        norm = optimizer.step(rate)
        backward(theirs, step)
        total = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip_norm)
        for group in expected.param_groups:
            group["lr"] = rate
        expected.step()
        expected.zero_grad()
        assert norm == pytest.approx(total.item(), rel=1e-6)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_fp32_parameters_are_their_own_masters() -> None:
    model = network()
    optimizer = AdamW(model.named_parameters(), config())
    assert all(optimizer.masters[name] is p for name, p in model.named_parameters())


def test_bf16_weights_follow_fp32_masters_through_steps_too_small_for_bf16() -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), config(weight_decay=0.0))
    before = {name: master.clone() for name, master in optimizer.masters.items()}
    for step in range(4):
        backward(model, step)
        optimizer.step(1e-5)
    for name, parameter in model.named_parameters():
        moved = optimizer.masters[name] - before[name]
        assert 0 < moved.abs().max() < 1e-4
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


def test_bf16_gradients_accumulate_in_fp32() -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), config())
    sums: dict[str, Tensor] = {}
    for seed in range(16):
        alone = network(torch.bfloat16)
        backward(alone, seed)
        for name, parameter in alone.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.float()
        backward(model, seed)
    gradients = optimizer.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert gradients[name].dtype == torch.float32
        assert torch.equal(gradients[name], sums[name])


def test_only_matrices_decay() -> None:
    model = network()
    optimizer = AdamW(model.named_parameters(), config(weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(model, 0, scale=0.0)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        kept = 0.95 if parameter.ndim >= 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_changes_nothing(bad: float) -> None:
    model = network()
    optimizer = AdamW(model.named_parameters(), config())
    backward(model, 0)
    optimizer.step(0.1)
    before = {**{n: p.detach().clone() for n, p in model.named_parameters()},
              **{n: t.clone() for n, t in optimizer.state_dict().items()}}  # fmt: skip
    backward(model, 1)
    model[2].weight.grad[1, 1] = bad
    norm = optimizer.step(0.1)
    assert not torch.tensor(norm).isfinite()
    for name, value in {**dict(model.named_parameters()), **optimizer.state_dict()}.items():
        assert torch.equal(value, before[name])
    assert not optimizer.gradients()["2.weight"].isfinite().all()


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_going_on_from_the_state_is_exact(moments: str, weights: torch.dtype) -> None:
    settings = config(moment_dtype=moments)
    model = network(weights)
    optimizer = AdamW(model.named_parameters(), settings)

    def run(model: nn.Module, optimizer: AdamW, seeds: range) -> None:
        for seed in seeds:
            backward(model, seed)
            optimizer.step(1e-2)

    run(model, optimizer, range(3))
    masters = {name: master.detach().clone() for name, master in optimizer.masters.items()}
    state = {name: tensor.clone() for name, tensor in optimizer.state_dict().items()}
    run(model, optimizer, range(3, 6))

    other = network(weights)
    resumed = AdamW(other.named_parameters(), settings)
    resumed.load_state_dict(masters, state)
    run(other, resumed, range(3, 6))
    for name, parameter in model.named_parameters():
        assert torch.equal(dict(other.named_parameters())[name], parameter)
        assert torch.equal(resumed.masters[name], optimizer.masters[name])
