"""What a whole training programme costs: the run that is published, and what is not in it.

[A] table 1 counts the GPU hours of the official run at a rent of 2 $, "excluding the costs
associated with prior research and ablation experiments". The rest is nowhere published: here it is
a range with a source, or an assumption that says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from operator import add, mul, sub, truediv

import yaml

from whalefall.errors import UserError
from whalefall.plan.files import DATA
from whalefall.plan.hardware import Hardware, load_hardware
from whalefall.plan.network import dragonfly, multi_plane_tree, three_layer_tree
from whalefall.plan.network_cost import UnitPrices
from whalefall.plan.units import check

HOURS_PER_YEAR = 365.25 * 24
OFFICIAL_HOURS = {"pre-training": 2.664e6, "context extension": 0.119e6, "post-training": 0.005e6}
"""H800 hours of [A] table 1."""
OFFICIAL_TOKENS = 14.8e12
LLAMA_HOURS, LLAMA_TOKENS = 30.84e6, 15.6e12
"""H100 hours of LLaMA-3.1 405B (its model card: 30.84 M; 39.3 M with 8B and 70B) and its tokens
(arXiv 2407.21783)."""


@dataclass(frozen=True)
class Range:
    """What something is thought to be; ``low`` makes the programme cheap, ``high`` dear.

    Raises:
        UserError: a number is below 0, or a divisor is 0.
    """

    low: float
    typical: float
    high: float
    source: str = "given"

    def __post_init__(self) -> None:
        for value in self.values:
            check("a cost or count", value)

    @classmethod
    def of(cls, value: float) -> "Range":
        return cls(value, value, value)

    @property
    def values(self) -> tuple[float, float, float]:
        return self.low, self.typical, self.high

    def __add__(self, other: "Range | float") -> "Range":
        return self._with(add, other)

    def __sub__(self, other: "Range | float") -> "Range":
        return self._with(sub, other)

    def __mul__(self, other: "Range | float") -> "Range":
        return self._with(mul, other)

    def __truediv__(self, other: "Range | float") -> "Range":
        if isinstance(other, Range) and not all(other.values):
            raise UserError("a lifetime and a share of use must be above 0")
        return self._with(truediv, other)

    def _with(self, join: Callable[[float, float], float], other: "Range | float") -> "Range":
        others = other.values if isinstance(other, Range) else (other,) * 3
        low, typical, high = map(join, self.values, others)
        return Range(low, typical, high, "computed")


def assumptions(**given: float | None) -> dict[str, Range]:
    """``data/programme.yaml``, with some of it known; None leaves one as it is."""
    usual = yaml.safe_load((DATA / "programme.yaml").read_text())
    known = {name: Range.of(value) for name, value in given.items() if value is not None}
    return {name: Range(**values) for name, values in usual.items()} | known


@dataclass(frozen=True)
class Programme:
    """A training run with everything around it. Costs are in dollars."""

    gpu_hours: dict[str, float]
    """Of the final run, by phase."""
    gpus: int
    hardware: Hardware
    rent: float
    """Of a GPU for an hour."""
    assumed: dict[str, Range]
    """What its cost rests on besides GPU hours and rent, as of ``assumptions``."""

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise UserError(f"{self.gpus} GPUs; there must be at least 1")
        for name, hours in self.gpu_hours.items():
            check(f"the count of GPU hours ({name})", hours, above=True)
        if min(self.assumed["attempts"].values) < 1:
            raise UserError("all compute over the final run's must be at least 1")
        check("the rent", self.rent)

    @property
    def hours(self) -> float:
        return sum(self.gpu_hours.values())

    @property
    def days(self) -> float:
        """On all GPUs at once."""
        return self.hours / self.gpus / 24

    @property
    def run_rented(self) -> float:
        """The final run: 5.576 M$ for V3 ([A] table 1)."""
        return self.rent * self.hours

    @property
    def run_rented_by_phase(self) -> dict[str, float]:
        return {phase: self.rent * hours for phase, hours in self.gpu_hours.items()}

    @property
    def other_runs_rented(self) -> Range:
        """Experiments, ablations and failures before and around it."""
        return (self.assumed["attempts"] - 1) * self.run_rented

    @property
    def people(self) -> Range:
        assumed = self.assumed
        return assumed["people"] * assumed["years"] * assumed["dollars_per_person_year"]

    @property
    def rented(self) -> Range:
        """The programme on rented GPUs."""
        return self.other_runs_rented + self.run_rented + self.people

    @property
    def network_dollars(self) -> float:
        """Of an endpoint, in the first of MPFT, FT3 and Dragonfly that connects so many."""
        sizes = {16384: multi_plane_tree, 65536: three_layer_tree}
        build = next((build for most, build in sizes.items() if self.gpus <= most), dragonfly)
        return UnitPrices().of(build(self.gpus)) / self.gpus

    @property
    def purchase(self) -> Range:
        """Of all servers and their network."""
        return (self.assumed["server_dollars"] + self.network_dollars) * self.gpus

    @property
    def megawatt_hours(self) -> Range:
        """At the site's meter, for the final run and the others."""
        use = self.assumed["power_usage_effectiveness"] * self.assumed["attempts"]
        return use * (self.hours * self.hardware.watts / 1e6)

    @property
    def power_per_hour(self) -> Range:
        """Dollars of a working GPU's hour."""
        assumed = self.assumed
        return assumed["power_usage_effectiveness"] * assumed["dollars_per_kwh"] * self._kilowatts

    @property
    def building_per_hour(self) -> Range:
        """Dollars of a working GPU's hour; the building is paid whether it works or not."""
        yearly = self.assumed["dollars_per_kw_month"] * (12 * self._kilowatts)
        return yearly / self.assumed["use"] / HOURS_PER_YEAR

    @property
    def capital_per_hour(self) -> Range:
        """Dollars of a working GPU's hour, the purchase spread evenly over its life."""
        working = self.assumed["lifetime_years"] * self.assumed["use"] * HOURS_PER_YEAR
        return self.purchase / self.gpus / working

    @property
    def owned_per_hour(self) -> Range:
        """What stands in for the rent where the GPUs are one's own."""
        return self.capital_per_hour + self.building_per_hour + self.power_per_hour

    @property
    def owned(self) -> Range:
        """The programme on GPUs of one's own, with no more than the hours it takes counted."""
        return self.owned_per_hour * self.assumed["attempts"] * self.hours + self.people

    @property
    def _kilowatts(self) -> float:
        return self.hardware.watts / 1e3


def official(hardware: Hardware) -> Programme:
    """DeepSeek-V3's on 2048 H800 at 2 $ an hour ([A] table 1)."""
    return Programme(OFFICIAL_HOURS, 2048, hardware, 2.0, assumptions())


def plan_programme(
    gpu_hours: float | None = None,
    gpus: int = 2048,
    gpu: str = "h800",
    rent: float | None = None,
    **given: float | None,
) -> Programme:
    """DeepSeek-V3's programme, but for what is told; ``given`` is of ``assumptions``.

    Raises:
        UserError: a number that is not allowed, or the price of the machine is needed.
    """
    if given.get("server_dollars") is None and gpu.lower() not in ("h800", "h100", "h200"):
        raise UserError(f"the price of a {gpu} server is not known here: give --gpu-price")
    hardware = load_hardware(gpu)
    return Programme(
        OFFICIAL_HOURS if gpu_hours is None else {"final run": gpu_hours},
        gpus,
        hardware,
        hardware.dollars_per_hour if rent is None else rent,
        assumptions(**given),
    )


@dataclass(frozen=True)
class FinalRun:
    """A network's final run at a rent."""

    name: str
    gpu_hours: float
    tokens: float
    rent: float

    @property
    def dollars(self) -> float:
        return self.rent * self.gpu_hours

    @property
    def hours_per_trillion_tokens(self) -> float:
        return self.gpu_hours / (self.tokens / 1e12)

    @property
    def times_v3(self) -> float:
        return self.gpu_hours / sum(OFFICIAL_HOURS.values())


def comparisons(rent: float) -> list[FinalRun]:
    """V3's pre-training hours are 180 K a trillion tokens; all phases make 188 K."""
    return [
        FinalRun("DeepSeek-V3", sum(OFFICIAL_HOURS.values()), OFFICIAL_TOKENS, rent),
        FinalRun("LLaMA-3.1 405B", LLAMA_HOURS, LLAMA_TOKENS, rent),
    ]
