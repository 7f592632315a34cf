"""How long one optimizer step takes, by part, on the ranks of a pipeline.

The schedule's own lists are run through with the times of each stage. Where a list overlaps a
forward and a backward pass, the arithmetic of both hides the transfers of both, or the other way
round; elsewhere they come one after the other ([A] 3.2.1). Then gradients are reduced, weights
updated and gathered.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

from whalefall.parallel.build_schedule import build_schedule
from whalefall.parallel.schedule import Place, Schedule, Step, Work
from whalefall.plan.layout import Setting
from whalefall.plan.schedules import simulate
from whalefall.plan.stages import Stage
from whalefall.plan.traffic import hop_seconds, reduction_seconds
from whalefall.plan.work import added, times


class Phases(NamedTuple):
    """Seconds of a rank until the last one is done; [B] table 4 has the same columns."""

    forward: float
    """Forward passes alone (1F)."""
    backward: float
    """Backward passes alone: of both gradients, or of the input's where the weights' is put off
    (1B)."""
    weight_gradient: float
    """Weight gradients that were put off (1W)."""
    overlapped: float
    """A forward and a backward pass at once (1F1B)."""
    bubble: float
    """Waiting."""


@dataclass(frozen=True)
class StepTime:
    phases: Phases
    """On average over the ranks of a pipeline."""
    optimizer: float
    """Seconds of the slowest rank for gradients' reduction, update and gathering."""
    parts: dict[str, float]
    """The step's seconds by kind of work."""

    @property
    def total(self) -> float:
        return sum(self.phases) + self.optimizer


def step_time(stages: Sequence[Stage], setting: Setting) -> StepTime:
    """Of the stages that ``cut`` made of the setting's network."""
    phases = _phases(stages, setting)
    schedule = schedule_of(setting)
    everything = added(*(stage.work for stage in stages))
    each = times(everything, setting.micro_batches / schedule.ranks)
    parts = {part: passes.total for part, passes in each.items()}
    optimizer = max(
        optimizer_seconds(stages_of(rank, schedule, stages), setting)
        for rank in range(schedule.ranks)
    )
    parts["exposed all-to-all"] = sum(phases) - phases.bubble - sum(parts.values())
    parts |= {"bubble": phases.bubble, "optimizer": optimizer}
    return StepTime(phases, optimizer, parts)


def schedule_of(setting: Setting, fewer: int = 0) -> Schedule:
    """The lists of a step, or where it has many micro-batches of one with enough of them to reach
    the steady state."""
    layout, micro_batches = setting.layout, setting.micro_batches
    most = 3 * layout.pp
    most += (most + micro_batches) % 2
    kind = layout.schedule if layout.pp > 1 else "1f1b"
    return _schedule(kind, layout.stages, min(micro_batches, most) - fewer)


@lru_cache(maxsize=64)
def _schedule(kind: str, stages: int, micro_batches: int) -> Schedule:
    return build_schedule(kind, pp=stages, micro_batches=micro_batches)


def stages_of(rank: int, schedule: Schedule, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that a rank holds, by chunk."""
    places = (Place(rank, chunk) for chunk in range(2))
    return [stages[schedule.stage_at[place]] for place in places if place in schedule.stage_at]


def _phases(stages: Sequence[Stage], setting: Setting) -> Phases:
    """Time is a straight line in the micro-batches once the pipeline is full."""
    schedule = schedule_of(setting)
    phases = _run(schedule, stages, setting)
    further = (setting.micro_batches - schedule.micro_batches) / 2
    if not further:
        return phases
    fewer = _run(schedule_of(setting, fewer=2), stages, setting)
    pairs = zip(phases, fewer, strict=True)
    return Phases(*(more + further * (more - less) for more, less in pairs))


def _run(schedule: Schedule, stages: Sequence[Stage], setting: Setting) -> Phases:
    """The mean over the ranks of a pipeline."""

    def seconds(rank: int, step: Step) -> float:
        return _seconds(step, [stages[schedule.stage_at[Place(rank, it.chunk)]] for it in step])

    timeline = simulate(schedule, seconds, hop_seconds(setting))
    ranks = [
        Phases(work["F"], work["B"] + work["I"], work["W"], work["F&B"], idle)
        for work, idle in zip(timeline.work, timeline.idle, strict=True)
    ]
    return Phases(*(sum(phase) / schedule.ranks for phase in zip(*ranks, strict=True)))


def _seconds(step: Step, at: Sequence[Stage]) -> float:
    if len(step) == 2:
        forward, backward = at
        arithmetic = forward.passes.forward + backward.passes.backward
        return max(arithmetic, forward.exchange + backward.exchange_backward)
    (stage,) = at
    match step[0].work:
        case Work.FORWARD:
            return stage.passes.forward + stage.exchange
        case Work.BACKWARD:
            return stage.passes.backward + stage.exchange_backward
        case Work.INPUT_GRADIENT:
            return stage.passes.input_gradient + stage.exchange_backward
        case Work.WEIGHT_GRADIENT:
            return stage.passes.weight_gradient


def optimizer_seconds(stages: Sequence[Stage], setting: Setting) -> float:
    """From the last gradient to the next step's weights, nothing of it hidden ([A] 3.2 and 3.3).

    Gradients are reduced to the shards of ZeRO-1; their norm reads them; AdamW reads them again and
    moves weight, remainder and two BF16 moments both ways; the working weights are gathered and
    cast to FP8, 2 bytes read and 2 written.
    """
    hardware, layout, gradient = setting.hardware, setting.layout, setting.gradient_bytes
    seconds = moved = 0.0
    for count, replicas, stride in (
        (sum(stage.held.plain for stage in stages), layout.dp, 1),
        (sum(stage.held.routed for stage in stages), layout.dp // layout.ep, layout.ep),
    ):
        for width in (gradient, layout.bytes):
            seconds += reduction_seconds(width * count, replicas, stride, layout.copies, hardware)
        shards = replicas * layout.copies if layout.zero else 1
        state = layout.bytes + 4 + layout.remainder_bytes
        moved += count / shards * (2 * gradient + 2 * state)
    if layout.is_fp8:
        moved += 4 * sum(stage.held.projections for stage in stages)
    return seconds + moved / hardware.bandwidth
