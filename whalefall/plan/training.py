"""The plan of a training run: does it fit, how long does it take, what does it cost, and why."""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from whalefall.config import load_config, preset_names
from whalefall.plan.flops import training_flops
from whalefall.plan.layout import Recompute, Setting
from whalefall.plan.memory import Memory, memory_by_rank
from whalefall.plan.stages import Stage, cut
from whalefall.plan.step import StepTime, step_time
from whalefall.plan.units import DAY, GIB

RESERVE = 0.02
"""Share of the memory that the allocator's fragments take (assumed)."""


@dataclass(frozen=True)
class Workload:
    """What is to be trained. The defaults are DeepSeek-V3's ([A] 4.2)."""

    sequence: int = 4096
    batch_rows: int = 15360
    tokens: float = 14.8e12


def workload_of(model: str) -> Workload:
    """What a preset or a run's file trains; DeepSeek-V3's for anything else."""
    if model not in preset_names() and Path(model).suffix not in (".yaml", ".yml"):
        return Workload()
    run = load_config(model)
    rows = round(run.schedule.batch_rows[-1].value)
    return Workload(run.data.sequence_length, rows, run.schedule.total_tokens)


@dataclass(frozen=True)
class TrainingPlan:
    """A network in one layout. Everything is worked out when it is asked for."""

    setting: Setting
    tokens: float
    """To train on."""

    @cached_property
    def stages(self) -> list[Stage]:
        return cut(self.setting)

    @cached_property
    def memory(self) -> list[Memory]:
        """Of each rank of a pipeline."""
        return memory_by_rank(self.stages, self.setting)

    @property
    def fullest(self) -> int:
        """The rank that needs the most memory."""
        return max(range(len(self.memory)), key=lambda rank: self.memory[rank].total)

    @property
    def needed_gib(self) -> float:
        """Of the fullest rank."""
        return self.memory[self.fullest].total / GIB

    @property
    def usable_gib(self) -> float:
        return (1 - RESERVE) * self.setting.hardware.memory_gib

    @property
    def missing_gib(self) -> float:
        """What the fullest rank lacks; 0 where all fit."""
        return max(0.0, self.needed_gib - self.usable_gib)

    @property
    def fits(self) -> bool:
        return self.missing_gib == 0

    def recomputing(self, recompute: Recompute) -> "TrainingPlan":
        layout = replace(self.setting.layout, recompute=recompute)
        return replace(self, setting=replace(self.setting, layout=layout))

    @cached_property
    def step(self) -> StepTime:
        return step_time(self.stages, self.setting)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices."""
        return self.setting.batch_rows * self.setting.sequence / self.step.total

    @property
    def tokens_per_day(self) -> float:
        return DAY * self.tokens_per_second

    def tflops(self, *, causal: bool) -> float:
        """Model FLOPs a second of a device, 10^12; MTP and what is made again count nothing."""
        flops = training_flops(self.setting.architecture, self.setting.sequence, causal=causal)
        return flops * self.tokens_per_second / self.setting.layout.gpus / 1e12

    def mfu(self, *, causal: bool) -> float:
        """Share of the peak of the working type, BF16 also where products are FP8 ([B] table 4)."""
        hardware = self.setting.hardware
        return self.tflops(causal=causal) / hardware.peak_tflops[hardware.working]

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_day

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.setting.layout.gpus

    @property
    def dollars(self) -> float:
        return self.gpu_hours * self.setting.hardware.dollars_per_hour

    @property
    def megawatt_hours(self) -> float:
        return self.gpu_hours * self.setting.hardware.watts / 1e6
