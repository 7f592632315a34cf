"""What a step does, as a function of what was seen before it (paper 4.2).

Nothing here has state: a checkpoint stores a ``Position``, and every scheduled number follows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from whalefall.config.train import Phase, ScheduleConfig


@dataclass(frozen=True)
class Position:
    """What has been seen before a step."""

    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    rows: int = 0
    """Rows of the data stream consumed, over all ranks."""


def advance(position: Position, rows: int, sequence_length: int) -> Position:
    """The position after a step on ``rows`` rows of ``sequence_length`` tokens."""
    return Position(
        position.step + 1, position.tokens + rows * sequence_length, position.rows + rows
    )


def value_at(phases: Sequence[Phase], tokens: int) -> float:
    """The scheduled number once ``tokens`` have been seen; a phase ends before its ``until``."""
    begin, start = 0.0, phases[0].value
    for phase in phases:
        start = start if phase.start is None else phase.start
        if phase.until is None or tokens < phase.until:
            return phase.value + (start - phase.value) * _remaining(phase, begin, tokens)
        begin, start = phase.until, phase.value
    raise ValueError("the last phase of a schedule must have until = null")


def learning_rate(schedule: ScheduleConfig, position: Position) -> float:
    """The scheduled rate, warmed up linearly over the first steps."""
    rate = value_at(schedule.learning_rate, position.tokens)
    return rate * min(1.0, (position.step + 1) / max(1, schedule.warmup_steps))


def batch_rows(schedule: ScheduleConfig, position: Position, world: int = 1) -> int:
    """Rows of the next step: the nearest multiple of ``world`` ranks, at least one for each."""
    return world * max(1, round(value_at(schedule.batch_rows, position.tokens) / world))


def bias_update_speed(schedule: ScheduleConfig, position: Position) -> float:
    """gamma of the auxiliary-loss-free balancing."""
    return value_at(schedule.bias_update_speed, position.tokens)


def mtp_weight(schedule: ScheduleConfig, position: Position) -> float:
    """lambda of the multi-token prediction loss."""
    return value_at(schedule.mtp_weight, position.tokens)


def _remaining(phase: Phase, begin: float, tokens: int) -> float:
    """How much of the way from start to value is still to go: 1 at the beginning, 0 at the end."""
    if phase.shape == "constant" or phase.until is None:
        return 0.0
    progress = (tokens - begin) / (phase.until - begin)
    return 1 - progress if phase.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
