"""How long a pipeline schedule takes and how long its ranks idle, and the published figures beside.

Times have the meaning of the published table ([A] table 2; deepseek-ai/DualPipe, README): F, B and
W are a forward, a *whole* backward and its weight gradient of one micro-batch in one stage, F&B an
overlapped forward and whole backward. The input gradient alone takes B - W.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isclose
from typing import NamedTuple

from whalefall.errors import UserError
from whalefall.parallel.build_schedule import build_schedule
from whalefall.parallel.schedule import (
    Result,
    Schedule,
    ScheduleKind,
    Step,
    Work,
    peak_activations,
    peak_deferred,
)
from whalefall.plan.units import check


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds, or any other unit, of one micro-batch in one stage.

    Raises:
        UserError: a time is not above 0 (``transfer``: below 0), or W is not below B.
    """

    forward: float
    """F."""
    backward: float
    """B, both gradients."""
    weight_gradient: float
    """W, the part of B that may wait."""
    overlapped: float
    """F&B; F + B where nothing overlaps."""
    transfer: float = 0.0
    """From a rank to another (``simulate``)."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            check(f"the time {name}", value, above=name != "transfer")
        if self.weight_gradient >= self.backward:
            raise UserError(
                f"the weight gradient ({self.weight_gradient:g}) is a part of the whole backward "
                f"({self.backward:g}) and must take less"
            )

    @property
    def input_gradient(self) -> float:
        return self.backward - self.weight_gradient

    def of(self, step: Step) -> float:
        if len(step) == 2:
            return self.overlapped
        return {
            Work.FORWARD: self.forward,
            Work.BACKWARD: self.backward,
            Work.INPUT_GRADIENT: self.input_gradient,
            Work.WEIGHT_GRADIENT: self.weight_gradient,
        }[step[0].work]


class TimedStep(NamedTuple):
    step: Step
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """When every step runs, from the start of the first one of all ranks."""

    schedule: Schedule
    ranks: tuple[tuple[TimedStep, ...], ...]

    @property
    def step_time(self) -> float:
        """Until the last rank is done, where the optimizer waits for all."""
        return max(steps[-1].end for steps in self.ranks)

    @property
    def work(self) -> list[dict[str, float]]:
        """Time of each rank in steps of each kind: F, B, I, W and F&B."""
        ranks = []
        for steps in self.ranks:
            spent = dict.fromkeys([*map(str, Work), "F&B"], 0.0)
            for step, start, end in steps:
                spent["F&B" if len(step) == 2 else str(step[0].work)] += end - start
            ranks.append(spent)
        return ranks

    @property
    def busy(self) -> list[float]:
        """Time of each rank in steps of any kind."""
        return [sum(end - start for _, start, end in steps) for steps in self.ranks]

    @property
    def idle(self) -> list[float]:
        """Bubble of each rank: the step's time in which it does nothing."""
        return [self.step_time - busy for busy in self.busy]

    @property
    def bubble(self) -> float:
        """Idle time of the rank that idles most."""
        return max(self.idle)

    @property
    def bubble_fraction(self) -> float:
        return self.bubble / self.step_time

    @property
    def gaps(self) -> list[float]:
        """Idle time of each rank between its own first and last step.

        It is what remains where no rank waits for the others before or after its list, which is
        how zero-bubble papers count (arXiv 2401.10241, with the optimizer's post-validation).
        """
        spans = (steps[-1].end - steps[0].start for steps in self.ranks)
        return [span - busy for span, busy in zip(spans, self.busy, strict=True)]


def simulate(
    schedule: Schedule, seconds: Callable[[int, Step], float], transfer: float = 0.0
) -> Timeline:
    """Every rank takes its steps in order, each as soon as what it needs has arrived.

    Args:
        seconds: how long a rank takes for a step, in any unit.
        transfer: from the end of a step on one rank until another rank can use what it made.
    """
    ready: dict[Result, tuple[int, float]] = {}  # the rank that made it, and when
    timed: list[list[TimedStep]] = [[] for _ in schedule.steps]

    for rank, step, needs, makes in schedule.order:
        start = timed[rank][-1].end if timed[rank] else 0.0
        for maker, when in map(ready.__getitem__, needs):
            start = max(start, when if maker == rank else when + transfer)
        end = start + seconds(rank, step)
        timed[rank].append(TimedStep(step, start, end))
        ready.update(dict.fromkeys(makes, (rank, end)))
    return Timeline(schedule, tuple(map(tuple, timed)))


class PublishedBubble(NamedTuple):
    """A formula of the published table, for one set of times."""

    formula: str
    time: float
    assumes: str
    """What times the formula is exact for, as ``simulate`` shows."""
    holds: bool
    """Whether these times are such."""


@dataclass(frozen=True)
class SchedulePlan(Timeline):
    """What a schedule costs, in the unit of ``times``."""

    times: Times

    @property
    def published(self) -> PublishedBubble:
        return published_bubble(self.schedule.kind, self.schedule.stages, self.times)

    @property
    def peak_activations(self) -> tuple[int, ...]:
        """Of each rank, in activations of one micro-batch in one stage."""
        return peak_activations(self.schedule)

    @property
    def peak_deferred(self) -> tuple[int, ...]:
        """Weight gradients of each rank that wait at once."""
        return peak_deferred(self.schedule)

    @property
    def parameter_multiple(self) -> int:
        """Stages on each rank: its parameters, in one part of the network of as many as stages."""
        return len(self.schedule.stage_at) // self.schedule.ranks


def plan_schedule(kind: str, *, pp: int, micro_batches: int, times: Times) -> SchedulePlan:
    """Build a schedule and time it.

    Args: as of ``build_schedule``: ``pp`` counts stages, and V-shaped schedules have pp/2 ranks.

    Raises:
        UserError: no such kind, or too few stages or micro-batches, or odd ones, for it.
    """
    schedule = build_schedule(kind, pp=pp, micro_batches=micro_batches)
    timeline = simulate(schedule, lambda _, step: times.of(step), times.transfer)
    return SchedulePlan(schedule, timeline.ranks, times)


def published_bubble(kind: ScheduleKind, pp: int, times: Times) -> PublishedBubble:
    """The table of [A] 3.2.1 and of deepseek-ai/DualPipe's README; ZB-V from arXiv 2401.10241, 6.

    ZB-V's own paper counts no bubble at F = B - W = W, because there a rank need not wait for
    others before its first step nor after its last; over the whole step each rank idles for the
    fill of the V, (PP/2-1)F. Its activations are those of 1F1B over as many ranks: PP stages'.
    """
    forward, both, weight = times.forward, times.backward, times.weight_gradient
    pair, half, even = times.overlapped, pp // 2, isclose(times.input_gradient, times.forward)
    match kind:
        case ScheduleKind.ONE_F_ONE_B:
            formula, time = "(PP-1)(F+B)", (pp - 1) * (forward + both)
            assumes, holds = "any F, B", True
        case ScheduleKind.ZB1P:
            formula, time = "(PP-1)(F+B-2W)", (pp - 1) * (forward + both - 2 * weight)
            assumes, holds = "W <= F, W <= B-W", weight <= min(forward, times.input_gradient)
        case ScheduleKind.ZB_V:
            formula, time = "(PP/2-1)F", (half - 1) * forward
            assumes, holds = "F = B-W = W", even and isclose(forward, weight)
        case ScheduleKind.DUALPIPE | ScheduleKind.DUALPIPE_V:
            formula, time = "(PP/2-1)(F&B+B-3W)", (half - 1) * (pair + both - 3 * weight)
            assumes = "F = B-W, W <= F, B <= F&B <= F+B"
            holds = even and weight <= forward and both <= pair <= forward + both
    return PublishedBubble(formula, time, assumes, holds and times.transfer == 0)
