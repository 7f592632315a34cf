"""A pipeline schedule as a picture: ranks as rows, time to the right, micro-batches in boxes."""

from math import floor, log10

from whalefall.parallel.schedule import Schedule, ScheduleKind, Work, peak_activations
from whalefall.plan.schedules import Timeline
from whalefall.plan.templates import rendered

NAMES = {
    ScheduleKind.ONE_F_ONE_B: "1F1B",
    ScheduleKind.ZB1P: "ZB1P",
    ScheduleKind.ZB_V: "ZB-V",
    ScheduleKind.DUALPIPE: "DualPipe",
    ScheduleKind.DUALPIPE_V: "DualPipeV",
}
WORK = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT_GRADIENT: "input gradient",
    Work.WEIGHT_GRADIENT: "weight gradient",
}
WIDEST = 6000.0
"""Pixels; in wider pictures the boxes shrink and numbers that do not fit go."""


def draw(timeline: Timeline) -> str:
    """An SVG document, legible on light and on dark pages and in a page's own markup.

    Overlapped pairs are framed, the forward above the backward. Where a rank idles its row is bare.
    """
    schedule = timeline.schedule
    shortest = min(end - start for steps in timeline.ranks for _, start, end in steps)
    number_width = 6.0 * len(str(schedule.micro_batches - 1)) + 6
    scale = min(number_width / shortest, WIDEST / timeline.step_time)
    return rendered(
        "pipeline.svg",
        timeline=timeline,
        schedule=schedule,
        name=NAMES[schedule.kind],
        activations=max(peak_activations(schedule)),
        scale=scale,
        width=max(88 + timeline.step_time * scale, 640),
        ticks=_ticks(timeline.step_time, 80 / scale),
        **_legend(schedule),
    )


def _legend(schedule: Schedule) -> dict[str, object]:
    """Which kinds of passes there are, how many chunks, and whether any overlap."""
    steps = [step for rank in schedule.steps for step in rank]
    passes = [what for step in steps for what in step]
    works = {what.work for what in passes}
    return {
        "works": {str(work): name for work, name in WORK.items() if work in works},
        "chunks": max(what.chunk for what in passes) + 1,
        "overlaps": any(len(step) == 2 for step in steps),
    }


def _ticks(length: float, least: float) -> list[float]:
    """At least so much apart, at 1, 2 or 5 times a power of ten."""
    power = 10.0 ** floor(log10(least))
    pitch = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    return [index * pitch for index in range(floor(length / pitch) + 1)]
