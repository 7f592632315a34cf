"""The average against its formula."""

import pytest
import torch

from whalefall.train.ema import EMA

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
    ema = EMA(live, decay=0.9)
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
def test_swap_shows_the_average_and_puts_the_weights_back(device: str) -> None:
    live = weights(device)
    ema = EMA(live, decay=0.9)
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
    ema = EMA(live, decay=0.5)
    live["a"].add_(1)
    ema.update()
    saved = {name: average.clone() for name, average in ema.state_dict().items()}
    other = EMA(live, decay=0.5)
    other.load_state_dict(saved)
    for each in (ema, other):
        each.update()
    for name, average in ema.state_dict().items():
        assert torch.equal(other.state_dict()[name], average)
