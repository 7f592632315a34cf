"""The average against its formula."""

import pytest
import torch

from whalefall.train.ema import EMA
from whalefall.train.masters import Masters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def weights(device: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator).to(device)
        for name, shape in {"a": (257, 129), "b": (7,)}.items()
    }


@pytest.mark.parametrize("device", DEVICES)
def test_formula(device: str) -> None:
    live = weights(device)
    ema = EMA(Masters(live, {}), decay=0.9)
    expected = {name: weight.cpu().double() for name, weight in live.items()}
    for step in range(20):
        ema.wait_for_copy()
        for name, weight in live.items():
            weight.mul_(-1.1).add_(step)
            expected[name] = 0.9 * expected[name] + 0.1 * weight.cpu().double()
        ema.update()
    for name, average in ema.state_dict().items():
        assert average.device.type == "cpu"
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_remainders", [True, False])
def test_bf16_weights_are_averaged_in_fp32(has_remainders: bool, device: str) -> None:
    """With what they lack, if it is kept; by steps too small for BF16 in either case."""
    live = {name: weight.bfloat16() for name, weight in weights(device).items()}
    remainders = {name: torch.zeros_like(w, dtype=torch.int16) for name, w in live.items()}
    masters = Masters(live, remainders if has_remainders else {})
    ema = EMA(masters, decay=0.999)
    expected = {name: weight.cpu().double() for name, weight in masters.items()}
    for _ in range(20):
        ema.wait_for_copy()
        masters.copy_({name: 1.01 * weight.float() for name, weight in masters.items()})
        ema.update()
        for name, weight in masters.items():
            expected[name] = 0.999 * expected[name] + 0.001 * weight.cpu().double()
    for name, average in ema.state_dict().items():
        assert average.dtype == torch.float32
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_swap_shows_the_average_and_puts_the_weights_back(device: str) -> None:
    live = weights(device)
    ema = EMA(Masters(live, {}), decay=0.9)
    working = {name: weight.bfloat16() for name, weight in live.items()}
    for weight in live.values():
        weight.add_(1)
    ema.update()
    before = {name: weight.clone() for name, weight in working.items()}
    with pytest.raises(KeyboardInterrupt), ema.swap(working):
        for name, weight in working.items():
            assert torch.equal(weight.cpu(), ema.state_dict()[name].bfloat16())
            assert not torch.equal(weight, before[name])
        raise KeyboardInterrupt
    assert all(torch.equal(working[name], before[name]) for name in before)


def test_state_goes_on() -> None:
    live = weights("cpu")
    ema = EMA(Masters(live, {}), decay=0.5)
    live["a"].add_(1)
    ema.update()
    saved = {name: average.clone() for name, average in ema.state_dict().items()}
    other = EMA(Masters(live, {}), decay=0.5)
    other.load_state_dict(saved)
    for each in (ema, other):
        each.update()
    for name, average in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], average)
