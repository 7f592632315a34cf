"""The recipe of the paper, number by number (4.2)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.config.train import Phase, ScheduleConfig
from whalefall.train.schedule import (
    Position,
    advance,
    batch_rows,
    bias_update_speed,
    learning_rate,
    mtp_weight,
    value_at,
)

PAPER = ScheduleConfig()


def after(tokens: float, step: int = 10_000) -> Position:
    return Position(step=step, tokens=int(tokens), rows=int(tokens) // 4096)


@pytest.mark.parametrize(
    ("tokens", "rate"),
    [
        (5e12, 2.2e-4),
        (10e12, 2.2e-4),
        (12.15e12, (2.2e-4 + 2.2e-5) / 2),
        (14.3e12, 2.2e-5),
        (14.5e12, 2.2e-5),
        (14.633e12, 7.3e-6),
        (14.7e12, 7.3e-6),
    ],
)
def test_learning_rate_after_warmup(tokens: float, rate: float) -> None:
    assert learning_rate(PAPER, after(tokens)) == pytest.approx(rate, rel=1e-9)


def test_learning_rate_warms_up_over_2000_steps() -> None:
    assert learning_rate(PAPER, after(0, step=0)) == pytest.approx(2.2e-4 / 2000)
    assert learning_rate(PAPER, after(12e9, step=999)) == pytest.approx(1.1e-4)
    assert learning_rate(PAPER, after(25e9, step=1999)) == pytest.approx(2.2e-4)
    assert learning_rate(PAPER, after(25e9, step=2000)) == pytest.approx(2.2e-4)


def test_without_warmup_the_first_step_has_the_whole_rate() -> None:
    schedule = ScheduleConfig(warmup_steps=0)
    assert learning_rate(schedule, Position()) == 2.2e-4


@pytest.mark.parametrize(
    ("tokens", "rows"), [(0, 3072), (234.5e9, 9216), (469e9, 15360), (10e12, 15360)]
)
def test_batch_ramp(tokens: float, rows: int) -> None:
    assert batch_rows(PAPER, after(tokens)) == rows


@pytest.mark.parametrize(
    ("tokens", "speed"), [(0, 0.001), (14.29e12, 0.001), (14.3e12, 0.0), (14.8e12, 0.0)]
)
def test_bias_update_speed(tokens: float, speed: float) -> None:
    assert bias_update_speed(PAPER, after(tokens)) == speed


@pytest.mark.parametrize(("tokens", "weight"), [(0, 0.3), (9.99e12, 0.3), (10e12, 0.1)])
def test_mtp_weight(tokens: float, weight: float) -> None:
    assert mtp_weight(PAPER, after(tokens)) == weight


@given(tokens=st.integers(0, 15 * 10**12), world=st.integers(1, 4096))
def test_batch_is_a_positive_multiple_of_the_world(tokens: int, world: int) -> None:
    rows = batch_rows(PAPER, after(tokens), world)
    assert rows >= world
    assert rows % world == 0
    exact = value_at(PAPER.batch_rows, tokens)
    assert rows == world or abs(rows - exact) <= world / 2


def test_a_phase_may_start_elsewhere_than_the_one_before_ended() -> None:
    phases = [Phase(value=1.0, until=10), Phase(start=5.0, value=3.0, until=20, shape="linear"),
              Phase(value=7.0)]  # fmt: skip
    assert [value_at(phases, tokens) for tokens in (0, 9, 10, 15, 20, 99)] == [1, 1, 5, 4, 7, 7]


def test_advance() -> None:
    position = advance(Position(step=3, tokens=40, rows=10), rows=2, sequence_length=4)
    assert position == Position(step=4, tokens=48, rows=12)
