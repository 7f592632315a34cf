"""Rotary positions on interleaved pairs, and YaRN's frequencies, against numbers by hand."""

import cmath
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whalefall.ops.rope import (
    inverse_frequencies,
    rotate,
    rotations,
    yarn_frequencies,
    yarn_mscale,
)

V3_YARN = {"factor": 40.0, "original_length": 4096, "beta_fast": 32.0, "beta_slow": 1.0}


def test_frequencies_fall_from_one_to_theta() -> None:
    # theta^(-2i/dim) at theta 10000, dim 8: exponents 0, -1/4, -1/2, -3/4.
    torch.testing.assert_close(
        inverse_frequencies(8, 10000.0), torch.tensor([1.0, 0.1, 0.01, 0.001])
    )


def test_pairs_are_neighbours() -> None:
    # Position 1, a quarter and a half turn: (1, 2) -> (-2, 1), (3, 4) -> (-3, -4).
    turn = rotations(torch.tensor([1]), torch.tensor([math.pi / 2, math.pi]))
    out = rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), turn)
    torch.testing.assert_close(out, torch.tensor([[-2.0, 1.0, -3.0, -4.0]]), rtol=0, atol=1e-6)


def test_each_pair_is_a_complex_number_turned_by_its_angle() -> None:
    frequencies = inverse_frequencies(8, 10000.0)
    x = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    out = rotate(x, rotations(torch.tensor([37]), frequencies))[0]
    for pair in range(4):
        turned = complex(*x[0, 2 * pair : 2 * pair + 2]) * cmath.exp(37j * 10000 ** (-pair / 4))
        assert complex(*out[2 * pair : 2 * pair + 2]) == pytest.approx(turned, abs=1e-5)


@settings(deadline=None)
@given(shift=st.integers(0, 2000), distance=st.integers(0, 200), seed=st.integers(0, 100))
def test_products_depend_on_the_distance_only(shift: int, distance: int, seed: int) -> None:
    q, k = torch.randn(2, 1, 16, generator=torch.Generator().manual_seed(seed))
    frequencies = inverse_frequencies(16, 10000.0)

    def product(query_position: int, key_position: int) -> float:
        turns = rotations(torch.tensor([query_position, key_position]), frequencies)
        return (rotate(q, turns[:1]) * rotate(k, turns[1:])).sum().item()

    assert product(shift + distance, shift) == pytest.approx(product(distance, 0), abs=5e-3)


def test_position_zero_is_the_identity_and_lengths_are_kept() -> None:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    out = rotate(x, rotations(torch.arange(5), inverse_frequencies(16, 10000.0)))
    assert torch.equal(out[0], x[0])
    torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_bfloat16_is_turned_in_fp32_and_rounded_once() -> None:
    x = torch.randn(9, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    turns = rotations(torch.arange(1000, 1009), inverse_frequencies(16, 10000.0))
    assert rotate(x, turns).dtype == torch.bfloat16
    assert torch.equal(rotate(x, turns), rotate(x.float(), turns).bfloat16())


def test_yarn_by_hand_for_v3() -> None:
    """Rotary width 64, theta 10000, 4096 to 163,840 positions.

    A pair i turns 4096 theta^(-2i/64) / 2 pi times. 32 turns: i = 64 ln(4096 / 64 pi) / (2 ln
    theta) = 10.47, so the pairs to 10 are kept; 1 turn: i = 22.51, so those from 23 are divided by
    40. Pair 16 lies 6/13 of the way: 0.01 (7/13 + 6/13 / 40) = 0.0055.
    """
    plain, yarn = inverse_frequencies(64, 10000.0), yarn_frequencies(64, 10000.0, **V3_YARN)
    assert torch.equal(yarn[:11], plain[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    assert yarn[16].item() == pytest.approx(0.0055)
    assert (yarn[11:23] < plain[11:23]).all() and (yarn[11:23] > plain[11:23] / 40).all()


def test_yarn_of_factor_one_changes_nothing() -> None:
    same = yarn_frequencies(64, 10000.0, **{**V3_YARN, "factor": 1.0})
    torch.testing.assert_close(same, inverse_frequencies(64, 10000.0))


def test_mscale() -> None:
    assert yarn_mscale(40.0) == pytest.approx(1.3689, abs=5e-5)  # 0.1 ln 40 + 1
    assert yarn_mscale(40.0, 0.5) == pytest.approx(1.18444, abs=5e-6)
    assert yarn_mscale(1.0) == 1.0


def test_a_scale_multiplies_the_turn() -> None:
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    frequencies = inverse_frequencies(8, 10000.0)
    plain = rotate(x, rotations(torch.arange(3), frequencies))
    torch.testing.assert_close(rotate(x, rotations(torch.arange(3), frequencies, 1.5)), 1.5 * plain)
