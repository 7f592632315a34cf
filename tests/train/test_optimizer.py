"""AdamW against PyTorch's, its masters, its clip and its state."""

import pytest
import torch
from torch import Tensor, nn

from whalefall.config.train import OptimizerConfig
from whalefall.ops.halves import split
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
        assert norm.item() == pytest.approx(total.item(), rel=1e-6)
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
        assert torch.equal(parameter, split(optimizer.masters[name])[0])


def test_masters_are_the_weights_of_an_fp32_network_with_the_same_gradients() -> None:
    """To the last bit, in four bytes a parameter with the working weights."""
    settings = config(moment_dtype="bfloat16")
    narrow, wide = network(torch.bfloat16), network(torch.bfloat16).float()
    optimizer = AdamW(narrow.named_parameters(), settings)
    expected = AdamW(wide.named_parameters(), settings)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        for mine, other in zip(narrow.parameters(), wide.parameters(), strict=True):
            # So small that nothing is clipped: the norms may differ in their last bit.
            gradient = 1e-2 * torch.randn(mine.shape, generator=generator).bfloat16()
            (mine * gradient).sum().backward()
            other.grad = gradient.float()
        optimizer.step(1e-3)
        expected.step(1e-3)
        for name, weight in wide.named_parameters():
            assert torch.equal(optimizer.masters[name], weight)
    assert sum(tensor.nbytes for tensor in optimizer.masters.tensors()) == 4 * sum(
        parameter.numel() for parameter in narrow.parameters()
    )


@pytest.mark.parametrize("masters", ["float32", "none"])
@pytest.mark.parametrize("passes", [1, 2, 16])
def test_bf16_gradients_accumulate_in_fp32(passes: int, masters: str) -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), config(masters=masters))
    sums: dict[str, Tensor] = {}
    for seed in range(passes):
        alone = network(torch.bfloat16)
        backward(alone, seed)
        for name, parameter in alone.named_parameters():
            sums[name] = sums.get(name, 0) + parameter.grad.float()
        backward(model, seed)
    gradients = optimizer.gradients()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert gradients[name].dtype == (torch.bfloat16 if passes == 1 else torch.float32)
        assert torch.equal(gradients[name].float(), sums[name])


def test_one_bf16_gradient_or_its_fp32_copy_make_the_same_step() -> None:
    stepped = []
    for widen in (False, True):
        model = network(torch.bfloat16)
        optimizer = AdamW(model.named_parameters(), config(clip_norm=0.1))
        backward(model, 0)
        if widen:  # by a second gradient, of zeros
            backward(model, 0, scale=0.0)
        norm = optimizer.step(1e-2)
        assert norm.dtype == torch.float32 and not optimizer.gradients()
        stepped.append([norm, *optimizer.masters.values()])
    for narrow, wide in zip(*stepped, strict=True):
        assert torch.equal(narrow, wide)


def test_without_masters_the_weights_themselves_are_updated_and_rounded() -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), config(masters="none"))
    assert all(optimizer.masters[name] is p for name, p in model.named_parameters())
    twin = network(torch.bfloat16)
    follower = AdamW(twin.named_parameters(), config())
    backward(model, 0)
    backward(twin, 0)
    optimizer.step(1e-2)
    follower.step(1e-2)
    for parameter, expected in zip(model.parameters(), twin.parameters(), strict=True):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, expected)  # the same FP32 number, rounded once

    before = [parameter.clone() for parameter in model.parameters()]
    backward(model, 1)
    optimizer.step(1e-7)  # less than half a step of BF16, of all but the smallest weights
    unmoved = sum((p == b).sum() for p, b in zip(model.parameters(), before, strict=True))
    assert unmoved > 0.9 * sum(b.numel() for b in before)


@pytest.mark.parametrize("masters", ["float32", "none"])
def test_a_step_is_seen_by_who_keeps_something_made_of_the_weights(masters: str) -> None:
    model = network(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), config(masters=masters))
    before = [parameter._version for parameter in model.parameters()]
    backward(model, 0)
    optimizer.step(1e-2)
    assert all(p._version > v for p, v in zip(model.parameters(), before, strict=True))


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
    assert not norm.isfinite()
    for name, value in {**dict(model.named_parameters()), **optimizer.state_dict()}.items():
        assert torch.equal(value, before[name])
    assert not optimizer.gradients()["2.weight"].isfinite().all()


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("weights", "masters"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "none")],
)
def test_going_on_from_the_state_is_exact(moments: str, weights: torch.dtype, masters: str) -> None:
    settings = config(moment_dtype=moments, masters=masters)
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


@pytest.mark.gpu
@pytest.mark.parametrize("masters", ["float32", "none"])
@pytest.mark.parametrize("passes", [1, 2])
def test_a_gpu_makes_the_steps_of_a_cpu(passes: int, masters: str) -> None:
    """From the same gradients; only the order of the norm's sum may differ."""
    settings = config(moment_dtype="bfloat16", masters=masters, clip_norm=0.5)
    here, there = network(torch.bfloat16), network(torch.bfloat16).cuda()
    on_cpu = AdamW(here.named_parameters(), settings)
    on_gpu = AdamW(there.named_parameters(), settings)
    versions = [parameter._version for parameter in there.parameters()]
    for step in range(4):
        for seed in range(passes):
            generator = torch.Generator().manual_seed(passes * step + seed)
            for mine, other in zip(here.parameters(), there.parameters(), strict=True):
                gradient = torch.randn(mine.shape, generator=generator).bfloat16()
                (mine * gradient).sum().backward()
                (other * gradient.cuda()).sum().backward()
        norms = on_cpu.step(1e-2), on_gpu.step(1e-2)
        torch.testing.assert_close(norms[1].cpu(), norms[0], rtol=1e-6, atol=0)
    for name, master in on_cpu.masters.items():
        tolerance = 1e-4 if masters == "float32" else 1e-2  # a BF16 moment may round either way
        torch.testing.assert_close(
            on_gpu.masters[name].detach().cpu(), master.detach(), rtol=tolerance, atol=tolerance
        )
    for parameter, version in zip(there.parameters(), versions, strict=True):
        assert parameter._version > version


@pytest.mark.gpu
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gpu_skips_the_update_without_waiting(bad: float) -> None:
    model = network(torch.bfloat16).cuda()
    optimizer = AdamW(model.named_parameters(), config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        gradient = torch.ones_like(parameter)
        if name == "2.weight":
            gradient[1, 1] = bad
        (parameter * gradient).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norm = optimizer.step(0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert norm.is_cuda and not norm.isfinite()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert torch.equal(parameter, split(optimizer.masters[name])[0])
    assert all((moment == 0).all() for moment in optimizer.moments.values())
