"""What ``whalefall plan`` answers: for each question the numbers and the plots of a report.

The words are in ``reports/``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from whalefall.errors import UserError
from whalefall.parallel.schedule import ScheduleKind
from whalefall.plan.cost import (
    OFFICIAL_HOURS,
    OFFICIAL_TOKENS,
    Programme,
    Range,
    comparisons,
    official,
    plan_programme,
)
from whalefall.plan.decode import NetworkLimit
from whalefall.plan.flops import forward_flops, training_flops
from whalefall.plan.hardware import COMMUNICATING
from whalefall.plan.layout import RECOMPUTES
from whalefall.plan.memory import Memory
from whalefall.plan.network_cost import Comparison, compare_networks
from whalefall.plan.plot import bars, curve
from whalefall.plan.report import Report, pick, plain, report
from whalefall.plan.schedule_drawing import draw
from whalefall.plan.schedules import SchedulePlan, Times, plan_schedule
from whalefall.plan.search import Answer, plan_training
from whalefall.plan.serving import Day, ServingPlan, plan_serving
from whalefall.plan.training import TrainingPlan
from whalefall.plan.unit import EXCHANGE_START, RESERVE, Unit, token_bytes, variants
from whalefall.plan.units import GIB

LONG = 131072
"""Tokens of a long sequence ([A] 4.3)."""
PUBLISHED_LIMITS = {
    "published, 50 GB/s InfiniBand": NetworkLimit(50),
    "published, 900 GB/s GB200 NVL72": NetworkLimit(900),
}
"""[B] 2.3.2."""


def training_report(answer: Answer) -> Report:
    plan = answer.plan
    plots = {
        "memory": bars({f"rank {at}": _held(it) for at, it in enumerate(plan.memory)}, unit="GiB"),
        "layouts": bars({f"{at}.": _busy(it) for at, it in enumerate(answer.best, 1)}, unit="s"),
    }
    values = {"plan": plan, "setting": plan.setting, "communicating": COMMUNICATING}
    return report("train", _training_numbers(answer), plots, answer=answer, **values)


def _training_numbers(answer: Answer) -> dict[str, Any]:
    plan, setting = answer.plan, answer.plan.setting
    network, sequence = setting.architecture, setting.sequence
    flops = forward_flops(network, sequence)
    memories = {choice: plan.recomputing(choice) for choice in RECOMPUTES}
    return {
        "model": network.name,
        "gpu": setting.hardware.name,
        **_summary(plan),
        **pick(setting, "sequence", "batch_rows"),
        "parameters": plain(network.parameters()),
        "forward_flops_per_token": {**flops, "total": sum(flops.values())},
        "training_flops_per_token": {
            "causal": training_flops(network, sequence),
            "non_causal": training_flops(network, sequence, causal=False),
        },
        "stages": [len(stage.layers) for stage in plan.stages],
        "memory_gib": {
            "usable": plan.usable_gib,
            "by_rank": [memory.total / GIB for memory in plan.memory],
            "fullest_rank": plan.fullest,
            "by_recompute": {
                choice: {name: size / GIB for name, size in plain(it.memory[it.fullest]).items()}
                for choice, it in memories.items()
            },
        },
        "step_seconds": {
            "phases": {**plain(plan.step.phases), "optimizer": plan.step.optimizer},
            **pick(plan.step, "parts", "total"),
        },
        **pick(plan, "tokens", "tokens_per_second", "tokens_per_day", "gpu_hours"),
        **pick(plan, "megawatt_hours", "fits", "missing_gib"),
        "tflops": {"causal": plan.tflops(causal=True), "non_causal": plan.tflops(causal=False)},
        "mfu": {"causal": plan.mfu(causal=True), "non_causal": plan.mfu(causal=False)},
        "best": [_summary(other) for other in answer.best],
        "too_large": [
            {"layout": str(other.setting.layout), "missing_gib": other.missing_gib}
            for other in answer.too_large
        ],
        "tried": answer.tried,
        "far_too_large": answer.hopeless,
        "nearest": None if answer.nearest is None else _summary(answer.nearest),
    }


def _summary(plan: TrainingPlan) -> dict[str, Any]:
    return {
        "gpus": plan.setting.layout.gpus,
        "layout": str(plan.setting.layout),
        "step_time_seconds": plan.step.total,
        "memory_needed_gib": plan.needed_gib,
        "mfu_causal": plan.mfu(causal=True),
        **pick(plan, "days", "dollars"),
    }


def _held(memory: Memory) -> dict[str, float]:
    """GiB by kind, as many as a plot has colours."""
    parts = {
        "weights": memory.weights + memory.fp8_weights,
        "optimizer": memory.masters + memory.moments,
        "gradients": memory.gradients,
        "activations": memory.activations,
        "workspace": memory.workspace,
        "buffers": memory.communication,
    }
    return {name: size / GIB for name, size in parts.items()}


def _busy(plan: TrainingPlan) -> dict[str, float]:
    """Seconds of a step by kind, as many as a plot has colours."""
    parts = dict(plan.step.parts)
    apart = ("attention", "exposed all-to-all", "bubble", "optimizer")
    last = {name: parts.pop(name) for name in apart}
    memory = parts.pop("memory-bound") + parts.pop("gradient sums", 0.0)
    return {"products": sum(parts.values()), "memory-bound": memory, **last}


def serving_report(plan: ServingPlan) -> Report:
    unit, decode, steps = plan.unit, plan.decode, plan.by_batch
    caches = {it.name: it.sequence_bytes(LONG) / GIB for it in variants(unit.architecture)}
    speeds = [(step.tokens_per_second, step.gpu_tokens_per_second) for step in steps]
    here = (decode.tokens_per_second, decode.gpu_tokens_per_second)
    plots = {
        "cache": bars({name: {"GiB": size} for name, size in caches.items()}, unit="GiB"),
        "speed": curve(speeds, x="tokens/s of a user", y="tokens/s of a GPU", marked=[here]),
        "decode": bars({"": {k: 1e3 * it for k, it in decode.parts.items()}}, unit="ms"),
        "prefill": bars({"": {k: 1e6 * it for k, it in plan.prefill.parts.items()}}, unit="us"),
    }
    constants = {"long": LONG, "reserve": RESERVE, "exchange_start": EXCHANGE_START}
    values = {"plan": plan, "variants": variants(unit.architecture), "published": Day()}
    return report("serve", _serving_numbers(plan), plots, **values, **constants)


def _serving_numbers(plan: ServingPlan) -> dict[str, Any]:
    unit, found = plan.unit, variants(plan.unit.architecture)
    own = found[0].bytes_per_token
    return {
        "model": plan.unit.architecture.name,
        "gpu": plan.unit.hardware.name,
        "decode_unit": _unit_numbers(plan.unit),
        "prefill_unit": _unit_numbers(plan.prefill_unit),
        "cache": {
            "format": unit.cache,
            "window": unit.window,
            "bytes_per_token": token_bytes(unit.architecture, unit.cache),
            "variants": [{**plain(it), "times": it.bytes_per_token / own} for it in found],
        },
        **pick(plan, "context", "batch", "decode", "prefill", "by_batch", "by_context"),
        "network_limit": plan.limit,
        "published_network_limits": PUBLISHED_LIMITS,
        **pick(plan, "decode_gpus", "prefill_gpus", "dollars_per_million_output", "day"),
        "published_day": Day(),
    }


def _unit_numbers(unit: Unit) -> dict[str, Any]:
    return {
        **pick(unit, "gpus", "tp", "redundant", "weights"),
        "experts_of_a_layer": max(map(unit.slots, unit.architecture.experts), default=0),
        "weight_gib": {part: size / GIB for part, size in unit.weight_bytes().items()},
        "usable_gib": unit.usable / GIB,
        "room_gib": unit.room / GIB,
    }


def network_report(found: Comparison) -> Report:
    networks = {plan.topology.name: plan for plan in found.plans}
    thousands = {
        name: {
            part: dollars / plan.topology.endpoints / 1e3
            for part, dollars in plan.prices.parts(plan.topology).items()
        }
        for name, plan in networks.items()
    }
    plots = {"dollars": bars(thousands, unit="k$")}
    numbers = {**pick(found, "endpoints", "too_small"), "networks": networks}
    return report("network", numbers, plots, found=found)


def cost_report(plan: Programme) -> Report:
    run = Range.of(plan.run_rented)
    spent = {"final run": run, "other runs": plan.other_runs_rented, "people": plan.people}
    cases = {
        case: {name: getattr(it, case) / 1e6 for name, it in spent.items()}
        for case in ("low", "typical", "high")
    }
    plots = {"programme": bars(cases, unit="M$")}
    pre_training = OFFICIAL_HOURS["pre-training"]
    numbers = {
        "programme": plan,
        "official": official(plan.hardware),
        "official_pre_training": {
            "days": pre_training / 2048 / 24,
            "hours_per_trillion_tokens": pre_training / OFFICIAL_TOKENS * 1e12,
            "days_per_trillion_tokens": pre_training / OFFICIAL_TOKENS * 1e12 / 2048 / 24,
        },
        "comparisons": comparisons(plan.rent),
    }
    return report("cost", numbers, plots, plan=plan, run=run)


def schedule_report(
    found: list[SchedulePlan], refused: Sequence[str] = (), *, pictures: bool = False
) -> Report:
    """
    Args:
        found: at least one.
        refused: why other schedules are not among them.
        pictures: draw each, for a page.
    """
    plots = {str(it.schedule.kind): draw(it) for it in found if pictures}
    numbers = {"schedules": [_schedule_numbers(plan) for plan in found], "refused": list(refused)}
    return report("schedule", numbers, plots, found=found, refused=refused, pictures=pictures)


def _schedule_numbers(plan: SchedulePlan) -> dict[str, Any]:
    schedule = plan.schedule
    return {
        "kind": schedule.kind,
        "pp": schedule.stages,
        **pick(schedule, "ranks", "micro_batches"),
        **pick(plan, "times", "step_time", "bubble", "bubble_fraction", "idle", "gaps"),
        **pick(plan, "published", "peak_activations", "peak_deferred", "parameter_multiple"),
        "model_copies": len(schedule.routes),
    }


def plan_schedules(
    pp: int, micro_batches: int, kind: str | None = None, times: Times | None = None
) -> tuple[list[SchedulePlan], list[str]]:
    """Schedules of a kind, or of all, and why others cannot be.

    Raises:
        UserError: none can be.
    """
    times = times or Times(forward=1, backward=2, weight_gradient=1, overlapped=3)
    found, refused = [], []
    for name in ScheduleKind if kind is None else [kind]:
        try:
            found.append(plan_schedule(name, pp=pp, micro_batches=micro_batches, times=times))
        except UserError as error:
            refused.append(str(error))
    if not found:
        raise UserError(refused[0])
    return found, refused


ANSWERS: Mapping[str, Callable[..., Report]] = {
    "train": lambda model, **it: training_report(plan_training(model, **it)),
    "serve": lambda model, **it: serving_report(plan_serving(model, **it)),
    "network": lambda **it: network_report(compare_networks(**it)),
    "cost": lambda **it: cost_report(plan_programme(**it)),
    "schedule": lambda **it: schedule_report(*plan_schedules(**it)),
}
"""By the command's name, from its options; for those that have one, the model comes first."""
