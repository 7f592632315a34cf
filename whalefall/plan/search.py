"""Which layouts there are, which of them fit, and which of those are fast.

There are thousands; a rough estimate orders them and leaves out those that need far too much, and
only the first are planned stage by stage.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, product
from math import ceil, gcd
from typing import Any

from whalefall.errors import UserError
from whalefall.plan.architecture import Architecture
from whalefall.plan.hardware import Hardware, load_hardware
from whalefall.plan.layout import RECOMPUTES, SCHEDULES, Layout, Setting, parse_layout
from whalefall.plan.models import architecture_of
from whalefall.plan.stages import Stage
from whalefall.plan.traffic import on_network
from whalefall.plan.training import TrainingPlan, Workload, workload_of
from whalefall.plan.units import GIB

LONGEST_PIPELINE = 64
MICRO_BATCH_ROWS = (1, 2, 4, 8)
NUMERICS = ("products", "masters")
HOPELESS = 1.5
"""A rough estimate of memory so much above what the device has is not looked into."""


@dataclass(frozen=True)
class Question:
    """What is to be trained, where, and what of the layout is fixed."""

    architecture: Architecture
    hardware: Hardware
    gpus: int
    workload: Workload
    fixed: Mapping[str, Any]
    """Fields of ``Layout``."""


@dataclass(frozen=True)
class Answer:
    """The layouts that do best."""

    question: Question
    best: list[TrainingPlan]
    """Those that fit, fastest first; empty where none does."""
    too_large: list[TrainingPlan]
    """Those estimated to be as fast that do not fit."""
    tried: int
    """Layouts that the devices, the batch and the network allow."""
    hopeless: int
    """Those of them that need far more memory than there is."""

    @property
    def plan(self) -> TrainingPlan:
        """The fastest that fits; where none does, the one nearest to it."""
        return self.best[0] if self.best else min(self.too_large, key=lambda it: it.missing_gib)

    @cached_property
    def nearest(self) -> TrainingPlan | None:
        """Where none fits: one that does, with as few words of the layout changed as can be, or
        else on as many more GPUs as it takes; None where that helps neither."""
        return None if self.best else _nearest(self.question) or _enough_gpus(self.question)


def plan_training(
    model: str,
    *,
    gpus: int,
    gpu: str,
    network: str | None = None,
    layout: str = "",
    sequence: int | None = None,
    batch_rows: int | None = None,
    tokens: float | None = None,
) -> Answer:
    """Plan a training run; what is left out is a preset's own, else DeepSeek-V3's ([A] 4.2).

    Args: as the options of ``whalefall plan`` say. What the words of ``layout`` leave open is
        searched; products are in FP8 where the hardware has it.

    Raises:
        UserError: a name or word that is unknown, or words that no layout of the GPUs satisfies.
    """
    architecture, hardware = architecture_of(model), load_hardware(gpu)
    if network is not None:
        hardware = on_network(hardware, network, gpus)
    usual = workload_of(model)
    workload = Workload(
        sequence or usual.sequence, batch_rows or usual.batch_rows, tokens or usual.tokens
    )
    fixed = {"products": hardware.narrowest, **parse_layout(layout)}
    return search(Question(architecture, hardware, gpus, workload, fixed))


def search(question: Question, *, keep: int = 3) -> Answer:
    """The fastest layouts that fit, among those with the fixed fields.

    Raises:
        UserError: the fixed fields, the devices and the batch allow no layout.
    """
    settings = list(_settings(question))
    rough: dict[Layout, _Rough] = {}
    estimates: list[tuple[float, float, Setting]] = []
    for setting in settings:
        alike = replace(setting.layout, pp=1, dp=1, schedule="1f1b")
        if alike not in rough:
            rough[alike] = _Rough(setting)
        estimates.append((*rough[alike].estimate(setting), setting))
    most = max(HOPELESS * question.hardware.memory_gib * GIB, min(size for _, size, _ in estimates))
    promising = sorted((it for it in estimates if it[1] <= most), key=lambda it: it[0])
    best: list[TrainingPlan] = []
    too_large: list[TrainingPlan] = []
    for _, _, setting in promising:
        plan = TrainingPlan(setting, question.workload.tokens)
        (best if plan.fits else too_large).append(plan)
        if len(best) == keep:
            break
    best.sort(key=lambda plan: plan.step.total)
    return Answer(question, best, too_large, len(settings), len(settings) - len(promising))


def _nearest(question: Question) -> TrainingPlan | None:
    """The fastest plan that fits with as few of the fixed fields given up as can be; None where
    nothing fits. ``products`` and ``masters``, which change the numerics, are never given up."""
    fixed = {name: value for name, value in question.fixed.items() if name != "dp"}
    movable = [name for name in fixed if name not in NUMERICS]
    for count in range(1, len(movable) + 1):
        found = []
        for given_up in combinations(movable, count):
            kept = {name: value for name, value in fixed.items() if name not in given_up}
            found += search(replace(question, fixed=kept), keep=1).best
        if found:
            return min(found, key=lambda plan: plan.step.total)
    return None


def _enough_gpus(question: Question) -> TrainingPlan | None:
    """The plan on twice as many devices, or four times as many, ... on which something fits."""
    fixed = {name: question.fixed[name] for name in NUMERICS if name in question.fixed}
    for power in range(1, 9):
        gpus = question.gpus * 2**power
        rows = max(gpus, question.workload.batch_rows)
        workload = replace(question.workload, batch_rows=rows + -rows % gpus)
        larger = replace(question, gpus=gpus, workload=workload, fixed=fixed)
        if best := search(larger, keep=1).best:
            return best[0]
    return None


def _settings(question: Question) -> Iterator[Setting]:
    workload, refusals, found = question.workload, [], False
    for layout in _layouts(question):
        try:
            yield Setting(
                question.architecture,
                question.hardware,
                layout,
                workload.sequence,
                workload.batch_rows,
            )
            found = True
        except UserError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]


def _layouts(question: Question) -> Iterator[Layout]:
    """Every layout with the fixed fields; whether the batch suits it is not asked here."""
    fixed, gpus = question.fixed, question.gpus
    experts = question.architecture.routed_experts

    def choices(name: str, otherwise: Iterable[Any]) -> Iterable[Any]:
        return (fixed[name],) if name in fixed else otherwise

    longest = min(LONGEST_PIPELINE, len(question.architecture.layers))
    for pp in choices("pp", [pp for pp in _divisors(gpus) if pp <= longest]):
        dp = gpus // pp
        if pp * fixed.get("dp", dp) != gpus:
            raise UserError(f"pp{pp} x dp{fixed.get('dp', dp)} is not {gpus} GPUs")
        for ep, schedule, rows, recompute in product(
            choices("ep", _divisors(gcd(dp, experts)) if experts else [1]),
            choices("schedule", SCHEDULES if pp > 1 else SCHEDULES[:1]),
            choices("micro_batch_rows", MICRO_BATCH_ROWS),
            choices("recompute", RECOMPUTES),
        ):
            chosen = {
                "pp": pp, "dp": dp, "ep": ep, "schedule": schedule,
                "micro_batch_rows": rows, "recompute": recompute,
            }  # fmt: skip
            yield Layout(**{**fixed, **chosen})


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


class _Rough:
    """What layouts of equal micro-batches, experts and recompute share: a layer, and the ends."""

    def __init__(self, setting: Setting):
        self.layer = Stage(setting, (setting.architecture.mtp_layer,))
        self.ends = Stage(setting, (), is_first=True, is_last=True)

    def estimate(self, setting: Setting) -> tuple[float, float]:
        """Seconds of a step, and bytes of a rank: the table of [A] 3.2.1 with the slowest stage."""
        layout, one = setting.layout, self.layer
        layers = len(setting.architecture.layers)
        tail = self.ends.passes.total / one.passes.total
        slowest = max((layers + tail) / layout.stages, ceil(layers / layout.stages), tail)
        work, exchange = one.passes.times(slowest), slowest * one.exchange
        back = slowest * one.exchange_backward
        apart, overlapped = work.total + exchange + back, max(work.total, exchange + back)
        weight, chunks, pp = work.weight_gradient, layout.stages // layout.pp, layout.pp
        steps = apart
        match layout.schedule if pp > 1 else "1f1b":
            case "1f1b":
                bubble, live, deferred = (pp - 1) * apart, pp, 0
            case "zb1p" | "zb-v":
                bubble = (pp - 1) * (apart - 2 * weight)
                live, deferred = layout.stages, layout.stages // 2
            case _:
                steps, backward = overlapped, work.backward + back - 3 * weight
                warm_up = 1.2 * layout.stages * (apart - overlapped)
                bubble = (layout.stages / 2 - 1) * (overlapped + backward) + warm_up
                live, deferred = layout.stages + 1, layout.stages // 4
        seconds = chunks * setting.micro_batches * steps + bubble
        live = min(live, setting.micro_batches)
        kept = int(slowest) * (live * one.kept_bytes + deferred * one.deferred_bytes)
        return seconds, kept + self._state(setting, chunks * layout.copies * slowest)

    def _state(self, setting: Setting, layers: float) -> float:
        """Bytes of weights, gradients, masters and moments of so many layers and an embedding."""
        layout, held = setting.layout, self.layer.held
        embedding = setting.architecture.vocab * setting.architecture.hidden
        sharded = (held.plain + held.routed * layout.ep) / layout.shards
        number = layout.bytes + 4 + 2 * layout.is_fp8
        workspace = self.layer.kept[0].workspace
        return layers * (number * held.total + 6 * sharded) + number * embedding + workspace
