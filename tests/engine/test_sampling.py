"""Sampling: the right distribution, from the right set, the same wherever a row stands."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whalefall.engine.sampling import SamplingParams, keep_top_p, sample, uniform
from whalefall.errors import UserError

DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, 1.0, -3.0, 2.5])


def frequencies(params: SamplingParams) -> Tensor:
    """How often each token is drawn from LOGITS at the first DRAWS positions."""
    uniforms = [uniform(7, position) for position in range(DRAWS)]
    drawn = sample(LOGITS.expand(DRAWS, -1), [params] * DRAWS, uniforms)
    return drawn.bincount(minlength=len(LOGITS))


def assert_distributed(counts: Tensor, probabilities: Tensor) -> None:
    """Pearson's chi-square, five standard deviations above its mean at most."""
    assert not counts[probabilities == 0].any()
    expected = probabilities[probabilities > 0] * counts.sum()
    statistic = ((counts[probabilities > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float) -> None:
    counts = frequencies(SamplingParams(temperature=temperature))
    assert_distributed(counts, (LOGITS / temperature).softmax(-1))


def test_draws_from_the_nucleus_keep_its_proportions() -> None:
    counts = frequencies(SamplingParams(top_p=0.8))
    nucleus = LOGITS.softmax(-1).where(LOGITS >= 2.0, 0)  # 0.43, 0.26 and 0.16: two are too few
    assert_distributed(counts, nucleus / nucleus.sum())


def test_temperature_zero_takes_the_most_likely() -> None:
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    drawn = sample(logits, [SamplingParams(temperature=0.0, top_p=0.1)] * 50, [0.999] * 50)
    assert torch.equal(drawn, logits.argmax(-1))


def test_the_smallest_temperature_is_greedy_and_finite() -> None:
    drawn = sample(LOGITS.unsqueeze(0) * 1000, [SamplingParams(temperature=1e-300)], [0.999])
    assert drawn.tolist() == [3]


def test_the_smallest_top_p_is_greedy() -> None:
    assert sample(LOGITS.unsqueeze(0), [SamplingParams(top_p=1e-9)], [0.999]).tolist() == [3]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set(weights: list[int], top_p: float) -> None:
    probabilities = torch.tensor([weights], dtype=torch.float64)
    probabilities /= probabilities.sum()
    kept = keep_top_p(probabilities, torch.tensor([top_p], dtype=torch.float64))
    is_kept = kept > 0
    assert torch.equal(kept[is_kept], probabilities[is_kept])
    chosen = probabilities[is_kept]
    assert chosen.sum() >= top_p - 1e-12
    assert chosen.sum() - chosen.min() < top_p + 1e-12  # one fewer would not do
    dropped = probabilities[~is_kept]
    assert not len(dropped) or chosen.min() >= dropped.max()


def test_a_row_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(1))
    params = [
        SamplingParams(temperature=temperature, top_p=top_p)
        for temperature, top_p in [
            (0.0, 1.0),
            (1.0, 1.0),
            (0.5, 0.9),
            (2.0, 0.3),
            (1.0, 0.99),
            (0.0, 0.5),
        ]
    ]
    uniforms = [uniform(seed, 5) for seed in range(6)]
    together = sample(logits, params, uniforms).tolist()
    for row in range(6):
        alone = sample(logits[row : row + 1], [params[row]], [uniforms[row]])
        assert alone.tolist() == [together[row]]


@given(st.integers(), st.integers(0, 2**40))
def test_a_uniform_number_is_below_one_and_has_one_value(seed: int, position: int) -> None:
    number = uniform(seed, position)
    assert 0 <= number < 1
    assert number == uniform(seed, position)


def test_uniform_numbers_are_uniform_and_seeds_unrelated() -> None:
    numbers = torch.tensor(
        [[uniform(seed, position) for position in range(500)] for seed in range(40)],
        dtype=torch.float64,
    )
    counts = torch.histc(numbers, bins=50, min=0, max=1)
    assert_distributed(counts, torch.full((50,), 1 / 50))
    correlation = torch.corrcoef(numbers) - torch.eye(40)
    assert correlation.abs().max() < 5 / math.sqrt(500)
    assert numbers.unique().numel() == numbers.numel()  # no sequence is another one, shifted


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"stop": ("a", "")}, "empty text"),
        ({"stop": ""}, "empty text"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        SamplingParams(**wrong)


def test_one_stop_text_may_stand_alone() -> None:
    assert SamplingParams(stop="\n\n").stop == ("\n\n",)
