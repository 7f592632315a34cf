"""A pipeline schedule as a picture: ranks as rows, time to the right, micro-batches in boxes."""

from math import floor, log10

from whalefall.parallel.schedule import Pass, ScheduleKind, Work, peak_activations
from whalefall.plan.schedules import TimedStep, Timeline

_NAMES = {
    ScheduleKind.ONE_F_ONE_B: "1F1B",
    ScheduleKind.ZB1P: "ZB1P",
    ScheduleKind.ZB_V: "ZB-V",
    ScheduleKind.DUALPIPE: "DualPipe",
    ScheduleKind.DUALPIPE_V: "DualPipeV",
}
_LEGEND = {
    Work.FORWARD: "forward",
    Work.BACKWARD: "backward",
    Work.INPUT_GRADIENT: "input gradient",
    Work.WEIGHT_GRADIENT: "weight gradient",
}
# Chunk 0 is light with dark numbers, chunk 1 dark with light ones, on light and dark pages.
_STYLE = """
.pipeline { --page: #ffffff; --ink: #1f2328; --soft: #59636e; --row: #f0f2f4 }
@media (prefers-color-scheme: dark) {
  .pipeline { --page: #0d1117; --ink: #e6edf3; --soft: #9198a1; --row: #1c2129 }
}
.pipeline text { font: 11px system-ui, sans-serif; fill: var(--soft) }
.pipeline .title { font-size: 15px; font-weight: 600; fill: var(--ink) }
.pipeline .number { font-size: 10px; text-anchor: middle; dominant-baseline: central }
.pipeline .number.c0 { fill: #1f2328 } .pipeline .number.c1 { fill: #ffffff }
.pipeline .page { fill: var(--page) } .pipeline .row { fill: var(--row) }
.pipeline .pair { fill: none; stroke: var(--ink) } .pipeline .axis { stroke: var(--soft) }
.pipeline .F.c0 { fill: #fbc778 } .pipeline .F.c1 { fill: #a85b00 }
.pipeline .B.c0 { fill: #74c3a3 } .pipeline .B.c1 { fill: #14694d }
.pipeline .I.c0 { fill: #b9e3a8 } .pipeline .I.c1 { fill: #4c7d31 }
.pipeline .W.c0 { fill: #9cc2f0 } .pipeline .W.c1 { fill: #2a5d9f }
"""
_LEFT, _TOP, _ROW, _GAP, _BOTTOM = 64, 88, 30, 4, 34
_WIDEST = 6000.0  # pixels; in wider pictures the boxes shrink and numbers that do not fit go


def draw(timeline: Timeline) -> str:
    """An SVG document, legible on light and on dark pages and in a page's own markup.

    Overlapped pairs are framed, the forward above the backward. Where a rank idles its row is bare.
    """
    shortest = min(end - start for steps in timeline.ranks for _, start, end in steps)
    needed = _number_width(timeline.schedule.micro_batches - 1) / shortest
    scale = min(needed, _WIDEST / timeline.step_time)
    width = max(_LEFT + timeline.step_time * scale + 24, 640)
    bottom = _TOP + timeline.schedule.ranks * (_ROW + _GAP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="pipeline" role="img" '
        f'width="{width:.0f}" height="{bottom + _BOTTOM}" '
        f'viewBox="0 0 {width:.0f} {bottom + _BOTTOM}">',
        f"<title>{_title(timeline)}</title><style>{_STYLE}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        f'<text class="title" x="12" y="26">{_title(timeline)}</text>',
        f'<text x="12" y="46">{_figures(timeline)}</text>',
        *_legend(timeline),
    ]
    for rank, steps in enumerate(timeline.ranks):
        y = _TOP + rank * (_ROW + _GAP)
        parts.append(f'<text x="12" y="{y + 19}">rank {rank}</text>')
        parts.append(_box("row", _LEFT, y, timeline.step_time * scale, _ROW))
        for step in steps:
            parts += _step(step, y, scale)
    return "\n".join([*parts, *_axis(timeline.step_time, scale, bottom), "</svg>", ""])


def _title(timeline: Timeline) -> str:
    schedule = timeline.schedule
    bubble = max(timeline.idle)
    return (
        f"{_NAMES[schedule.kind]}: {schedule.stages} stages on {schedule.ranks} ranks, "
        f"{schedule.micro_batches} micro-batches, bubble {bubble:.4g} "
        f"({bubble / timeline.step_time:.1%})"
    )


def _figures(timeline: Timeline) -> str:
    most = max(peak_activations(timeline.schedule))
    return (
        f"step {timeline.step_time:.4g}, "
        f"at most {most} activations (of a micro-batch in a stage) kept on a rank"
    )


def _step(timed: TimedStep, y: float, scale: float) -> list[str]:
    x, width = _LEFT + timed.start * scale, (timed.end - timed.start) * scale
    height = _ROW / len(timed.step)
    parts = []
    for index, what in enumerate(timed.step):
        top = y + index * height
        parts.append(_box(_colour(what), x + 0.5, top, width - 1, height))
        if width >= _number_width(what.micro_batch) - 0.01:
            parts.append(
                f'<text class="number c{what.chunk}" x="{x + width / 2:.1f}" '
                f'y="{top + height / 2:.1f}">{what.micro_batch}</text>'
            )
    if len(timed.step) == 2:
        parts.append(_box("pair", x + 0.5, y, width - 1, _ROW))
    return parts


def _legend(timeline: Timeline) -> list[str]:
    parts, x, y = [], 12.0, 60.0
    steps = [step for rank in timeline.schedule.steps for step in rank]
    works = {what.work for step in steps for what in step}
    chunks = {what.chunk for step in steps for what in step}
    for work in (work for work in Work if work in works):
        for chunk in sorted(chunks):
            parts.append(_box(_colour(Pass(work, chunk, 0)), x, y, 14, 12))
            x += 14
        parts.append(f'<text x="{x + 5:.1f}" y="{y + 10}">{_LEGEND[work]}</text>')
        x += 22 + 5.6 * len(_LEGEND[work])
    if any(len(step) == 2 for step in steps):
        parts.append(_box("pair", x, y, 14, 12))
        parts.append(f'<text x="{x + 19:.1f}" y="{y + 10}">overlapped</text>')
        x += 96
    if len(chunks) > 1:
        parts.append(f'<text x="{x:.1f}" y="{y + 10}">light: chunk 0, dark: chunk 1</text>')
    return parts


def _axis(length: float, scale: float, y: float) -> list[str]:
    rough = 80 / scale  # about 80 pixels from tick to tick, at 1, 2 or 5 times a power of ten
    power = 10.0 ** floor(log10(rough))
    pitch = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    parts = [f'<path class="axis" d="M{_LEFT} {y + 4}H{_LEFT + length * scale:.1f}"/>']
    for index in range(floor(length / pitch) + 1):
        x = _LEFT + index * pitch * scale
        parts.append(f'<path class="axis" d="M{x:.1f} {y + 4}v4"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{y + 22}" text-anchor="middle">{index * pitch:g}</text>'
        )
    return parts


def _box(kind: str, x: float, y: float, width: float, height: float) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'
    )


def _number_width(number: int) -> float:
    return 6.0 * len(str(number)) + 6


def _colour(what: Pass) -> str:
    return f"{what.work} c{what.chunk}"
