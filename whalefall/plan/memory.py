"""Bytes on a device while it trains, by part, at the moment when they are most.

It is what our trainer keeps (``train/optimizer.py``, ``ops/``): working weights, with FP8 products
also their FP8 forms and those of their transposes; masters as the 16 bits that BF16 weights lack of
FP32; two moments in BF16; gradients in the weights' type, summed in FP32 once a step has more than
one micro-batch. What the allocator wastes and the driver holds is left out.
"""

from collections.abc import Sequence
from typing import NamedTuple

from whalefall.parallel.schedule import Schedule, Work
from whalefall.plan.layout import Setting
from whalefall.plan.stages import Stage
from whalefall.plan.step import schedule_of, stages_of
from whalefall.plan.traffic import exchange_buffers
from whalefall.plan.units import FP8_BLOCKS

HEAD_LOGITS = 2**28
"""Logits alive at a time (``ops/cross_entropy.py``)."""
MOMENT = 2
"""Bytes of each of the two moments ([A] 3.3.3)."""


class Memory(NamedTuple):
    """Of one device, in bytes."""

    weights: float
    fp8_weights: float
    masters: float
    moments: float
    gradients: float
    activations: float
    workspace: float
    """What the busiest operation has at once: a layer's backward pass, or the head's logits."""
    communication: float
    """Rows on their way to experts and back, activations between pipeline ranks."""

    @property
    def total(self) -> float:
        return sum(self)


def memory_by_rank(stages: Sequence[Stage], setting: Setting) -> list[Memory]:
    """Of each rank of a pipeline, holding stages that ``cut`` made of the setting's network."""
    schedule = schedule_of(setting)
    ranks = range(schedule.ranks)
    return [_memory(rank, stages_of(rank, schedule, stages), schedule, setting) for rank in ranks]


def _memory(rank: int, stages: list[Stage], schedule: Schedule, setting: Setting) -> Memory:
    layout = setting.layout
    if setting.micro_batches == 1:
        gradients, activations, workspace = _single_pass(stages, setting)
    else:
        gradients = 4.0 * sum(stage.held.total for stage in stages)
        activations = _most_live(rank, schedule, stages)
        workspace = max(_workspace(stage, setting) for stage in stages)
    plain = sum(stage.held.plain for stage in stages)
    routed = sum(stage.held.routed for stage in stages)
    state = plain / layout.shards + routed / max(1, layout.shards // layout.ep)
    projections = sum(stage.held.projections for stage in stages) if layout.is_fp8 else 0
    hops = 4 * setting.tokens * setting.architecture.hidden * layout.bytes if layout.pp > 1 else 0
    exchanges = [exchange_buffers(layer, setting) for stage in stages for layer in stage.layers]
    return Memory(
        weights=layout.bytes * (plain + routed),
        fp8_weights=2 * FP8_BLOCKS * projections,
        masters=layout.remainder_bytes * state,
        moments=2 * MOMENT * state,
        gradients=gradients,
        activations=activations,
        workspace=workspace,
        communication=hops + max(exchanges, default=0.0),
    )


def _most_live(rank: int, schedule: Schedule, stages: Sequence[Stage]) -> float:
    """Most bytes of activations, and of gradients that put-off passes wait with, along a list."""
    live = most = 0.0
    for step in schedule.steps[rank]:
        for what in step:
            stage = stages[what.chunk]
            match what.work:
                case Work.FORWARD:
                    live += stage.kept_bytes
                case Work.INPUT_GRADIENT:
                    live += stage.deferred_bytes
        most = max(most, live)
        for what in step:
            stage = stages[what.chunk]
            match what.work:
                case Work.BACKWARD:
                    live -= stage.kept_bytes
                case Work.WEIGHT_GRADIENT:
                    live -= stage.kept_bytes + stage.deferred_bytes
    return most


def _workspace(stage: Stage, setting: Setting) -> float:
    layers = (kept.workspace_under(setting.layout.recompute) for kept in stage.kept)
    return max([*layers, _head(stage, setting)])


def _head(stage: Stage, setting: Setting) -> float:
    """Logits of a chunk of tokens, the head's gradient summed over chunks, that of the tokens."""
    if not stage.is_last:
        return 0.0
    network, width = setting.architecture, setting.layout.bytes
    tokens = setting.tokens * (1 + network.mtp_depth)
    rows = min(tokens, max(1, HEAD_LOGITS // network.vocab))
    head = (4 if rows < tokens else width) * network.head.parameters
    return head + width * (rows * network.vocab + 2 * tokens * network.hidden)


def _single_pass(stages: Sequence[Stage], setting: Setting) -> tuple[float, float, float]:
    """Gradients, activations and workspace of a step of one micro-batch, when most.

    Backward, activations go layer by layer while gradients come; the most is in the head or in one
    of the layers.
    """
    recompute, width = setting.layout.recompute, setting.layout.bytes
    gradients, live = 0.0, sum(stage.kept_bytes for stage in stages)
    moments = [(gradients, live, max(_head(stage, setting) for stage in stages))]
    for stage in reversed(stages):
        if stage.is_last:
            gradients += width * setting.architecture.head.parameters
        for kept, count in zip(reversed(stage.kept), reversed(stage.layer_counts), strict=True):
            moments.append((gradients, live, kept.workspace_under(recompute)))
            live -= kept.under(recompute)
            gradients += width * count
    moments.append((float(width * sum(stage.held.total for stage in stages)), 0.0, 0.0))
    return max(moments, key=sum)
