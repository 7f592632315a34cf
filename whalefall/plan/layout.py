"""How a run is spread over devices and what it keeps; with a network, a machine and a batch it is a
``Setting``: what a plan is a plan of."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from whalefall.errors import UserError
from whalefall.parallel.build_schedule import check_sizes
from whalefall.parallel.schedule import ScheduleKind
from whalefall.plan.architecture import Architecture
from whalefall.plan.hardware import Hardware
from whalefall.plan.units import FP8_TILES, WIDTH, Format

Recompute = Literal["none", "selective", "block"]

SCHEDULES = tuple(map(str, ScheduleKind))
RECOMPUTES: tuple[Recompute, ...] = ("none", "selective", "block")


@dataclass(frozen=True)
class Layout:
    """Pipeline, expert and data parallelism, the schedule, and what a rank keeps.

    Ranks of an expert-parallel group are neighbours, then come data-parallel ranks, then pipeline
    ranks. There is no tensor parallelism ([A] 3.2).
    """

    pp: int = 1
    """Devices of a pipeline; schedules in a V have two stages on each."""
    dp: int = 1
    """Pipelines: every one takes its share of the batch."""
    ep: int = 1
    """Devices, out of ``dp``, over which a layer's experts are spread."""
    schedule: str = "1f1b"
    micro_batch_rows: int = 1
    recompute: Recompute = "none"
    products: Format = "bf16"
    masters: bool = True
    """FP32 masters of BF16 weights, stored as the 16 bits that these lack."""
    zero: int = 1
    """1 shards masters and moments over the copies of a weight ([A] 3.2)."""

    @property
    def gpus(self) -> int:
        return self.pp * self.dp

    @property
    def stages(self) -> int:
        return self.pp * (2 if self.schedule in ("zb-v", "dualpipev") else 1)

    @property
    def copies(self) -> int:
        """How often one pipeline holds each weight."""
        return 2 if self.schedule == "dualpipe" and self.pp > 1 else 1

    @property
    def shards(self) -> int:
        """Ranks over which masters and moments of a weight outside of routed experts are spread."""
        return self.dp * self.copies if self.zero else 1

    @property
    def ends_meet(self) -> bool:
        """Whether the first and the last stage are on one rank, which then has one embedding for
        both the network and MTP ([A] 3.2.2)."""
        return self.pp == 1 or self.schedule in ("zb-v", "dualpipe", "dualpipev")

    @property
    def is_fp8(self) -> bool:
        return self.products == "fp8"

    @property
    def bytes(self) -> int:
        """Of a weight or activation in the working type."""
        return 4 if self.products == "fp32" else 2

    @property
    def input_bytes(self) -> float:
        """Of a number of a projection's input, or on its way to the experts ([A] 3.3.3)."""
        return FP8_TILES if self.is_fp8 else self.bytes

    @property
    def remainder_bytes(self) -> int:
        """Of a master, besides its weight."""
        return 2 if self.masters and self.bytes == 2 else 0

    def __str__(self) -> str:
        words = [f"pp{self.pp}", f"ep{self.ep}", f"dp{self.dp}", f"mb{self.micro_batch_rows}"]
        words += [self.schedule] if self.pp > 1 else []
        words += [self.recompute, self.products]
        words += [] if self.zero else ["zero0"]
        words += [] if self.masters else ["no-masters"]
        return ",".join(words)


_WORDS: dict[str, dict[str, Any]] = {
    **{word: {"schedule": word} for word in SCHEDULES},
    **{word: {"recompute": word} for word in RECOMPUTES},
    **{word: {"products": word} for word in WIDTH},
    "masters": {"masters": True},
    "no-masters": {"masters": False},
    "zero0": {"zero": 0},
    "zero1": {"zero": 1},
}


def parse_layout(text: str) -> dict[str, Any]:
    """The fields of a layout that its words fix, in any order: ``pp16,ep64,dualpipe``.

    Raises:
        UserError: a word that is unknown.
    """
    fixed: dict[str, Any] = {}
    for word in filter(None, re.split(r"[,\s]+", text.lower())):
        if word in _WORDS:
            fixed |= _WORDS[word]
        elif found := re.fullmatch(r"(pp|dp|ep|mb)([1-9]\d*)", word):
            fixed["micro_batch_rows" if found[1] == "mb" else found[1]] = int(found[2])
        else:
            raise UserError(
                f"{word!r} is no word of a layout; allowed are ppN, epN, dpN, mbN (rows of a "
                f"micro-batch), {', '.join(_WORDS)}"
            )
    return fixed


@dataclass(frozen=True)
class Setting:
    """A network, on a machine, in a layout, with a batch.

    Raises:
        UserError: the batch does not divide over the layout, the experts not over its devices, or
            the machine lacks the format.
    """

    architecture: Architecture
    hardware: Hardware
    layout: Layout
    sequence: int
    """Tokens of a row."""
    batch_rows: int
    """Rows of a step, over all devices."""

    def __post_init__(self) -> None:
        layout, network = self.layout, self.architecture
        self.hardware.check_format(layout.products)
        if layout.dp % layout.ep or network.routed_experts % layout.ep:
            raise UserError(
                f"ep{layout.ep} must divide the {layout.dp} GPUs of a pipeline stage and the "
                f"{network.routed_experts or 'no'} experts of {network.name}"
            )
        if self.batch_rows % (layout.dp * layout.micro_batch_rows):
            raise UserError(
                f"a batch of {self.batch_rows} rows does not divide over {layout.dp} pipelines "
                f"in micro-batches of {layout.micro_batch_rows}"
            )
        if layout.stages > len(network.layers) + 1:
            raise UserError(
                f"{layout} has {layout.stages} pipeline stages, but {network.name} has "
                f"{len(network.layers)} layers"
            )
        if layout.pp > 1:
            kind = ScheduleKind(layout.schedule)
            check_sizes(kind, stages=layout.stages, micro_batches=self.micro_batches)

    @property
    def tokens(self) -> int:
        """Of a micro-batch on one device."""
        return self.layout.micro_batch_rows * self.sequence

    @property
    def micro_batches(self) -> int:
        """Of one pipeline in a step."""
        return self.batch_rows // (self.layout.dp * self.layout.micro_batch_rows)

    @property
    def gradient_bytes(self) -> int:
        """Gradients of several micro-batches are summed in FP32."""
        return 4 if self.micro_batches > 1 else self.layout.bytes
