"""The question that ``whalefall plan serve MODEL`` answers: units that decode and that read
prompts, how fast they are, and a day's income and cost."""

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property

from whalefall.errors import UserError
from whalefall.plan.decode import DecodeStep, NetworkLimit, decode_step, network_limit
from whalefall.plan.hardware import load_hardware
from whalefall.plan.models import architecture_of
from whalefall.plan.prefill import Prefill, prefill
from whalefall.plan.unit import Unit, fewest_redundant
from whalefall.plan.units import DAY, GIB, Format, check

MEAN_CONTEXT = 4989
"""Mean length while decoding in DeepSeek's production (open-infra-index, day 6)."""
SLOWEST = 0.05
"""Seconds a token that users were given in DeepSeek's production: 20 to 22 tokens a second."""
CONTEXTS = (1024, 4096, 8192, 32768, 131072)
MOST_GPUS = 4096


@dataclass(frozen=True)
class Prices:
    """Dollars for 10^6 tokens; the defaults are DeepSeek-R1's (open-infra-index, day 6)."""

    hit: float = 0.14
    """Of input that is in the cache."""
    miss: float = 0.55
    """Of input that is not."""
    output: float = 2.19

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(f"the price {name}", value)


@dataclass(frozen=True)
class Traffic:
    """Tokens of a day; the defaults are DeepSeek's of 27 to 28 February 2025 (open-infra-index,
    day 6: 608 B in, 342 B or 56.3 % of them from the cache, 168 B out)."""

    input_tokens: float = 608e9
    output_tokens: float = 168e9
    hit_rate: float = 0.563

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(f"the count {name}", value, above=name != "hit_rate")
        if self.hit_rate >= 1:
            raise UserError(f"the cache hit rate is {self.hit_rate:g}; it must be below 1")

    @property
    def computed_tokens(self) -> float:
        """Input that the cache does not have."""
        return (1 - self.hit_rate) * self.input_tokens

    def prompt_of(self, context: float) -> float:
        """Mean prompt that goes with a mean length while decoding: a prompt and half an answer."""
        return context / (1 + self.output_tokens / self.input_tokens / 2)


@dataclass(frozen=True)
class Day:
    """GPUs that serve a day's traffic, paid by the hour; the defaults are DeepSeek's 226.75 nodes.

    These cost 87,072 $ and took in, at R1's prices, 562,027 $: a margin of 545 % (open-infra-index,
    day 6; the rounded token counts that are published give 561,975).
    """

    traffic: Traffic = Traffic()
    prices: Prices = Prices()
    gpus: float = 8 * 226.75
    """On average."""
    dollars_per_hour: float = 2.0
    """Of a GPU."""

    @property
    def income(self) -> float:
        traffic, prices = self.traffic, self.prices
        hits = traffic.hit_rate * traffic.input_tokens
        dollars = prices.hit * hits + prices.miss * traffic.computed_tokens
        return (dollars + prices.output * traffic.output_tokens) / 1e6

    @property
    def cost(self) -> float:
        return 24 * self.gpus * self.dollars_per_hour

    @property
    def margin(self) -> float:
        """What is left of the income, as a multiple of the cost."""
        return (self.income - self.cost) / self.cost


@dataclass(frozen=True)
class ServingPlan:
    """A network on units that decode and units that read prompts. Worked out when asked for."""

    unit: Unit
    """That decodes."""
    prefill_unit: Unit
    context: int
    """Mean length of a sequence while it decodes."""
    batch: int
    """Sequences of a group."""
    traffic: Traffic
    prices: Prices

    @cached_property
    def decode(self) -> DecodeStep:
        return decode_step(self.unit, self.batch, self.context)

    @cached_property
    def prefill(self) -> Prefill:
        prompt = self.traffic.prompt_of(self.context)
        return prefill(self.prefill_unit, prompt, self.traffic.hit_rate)

    @property
    def limit(self) -> NetworkLimit | None:
        return network_limit(self.unit, self.batch / 2 / self.unit.tp)

    @cached_property
    def by_batch(self) -> list[DecodeStep]:
        """From one sequence to as many as fit."""
        most = max(self.batch, self.unit.most_sequences(self.context))
        sizes = {1, self.batch, most, *(2**power for power in range(most.bit_length()))}
        return [decode_step(self.unit, size, self.context) for size in sorted(sizes)]

    @cached_property
    def by_context(self) -> list[DecodeStep]:
        """As many sequences of each length as fit; lengths of which none fits are left out."""
        fitting = ((context, self.unit.most_sequences(context)) for context in CONTEXTS)
        return [decode_step(self.unit, most, context) for context, most in fitting if most]

    @property
    def decode_gpus(self) -> float:
        """On average, were they always full."""
        return self.traffic.output_tokens / DAY / self.decode.gpu_tokens_per_second

    @property
    def prefill_gpus(self) -> float:
        return self.traffic.computed_tokens / DAY / self.prefill.computed_per_second

    @property
    def day(self) -> Day:
        gpus = self.decode_gpus + self.prefill_gpus
        return Day(self.traffic, self.prices, gpus, self.unit.hardware.dollars_per_hour)

    @property
    def dollars_per_million_output(self) -> float:
        """Of decoding alone."""
        hourly = self.unit.hardware.dollars_per_hour
        return 1e6 * hourly / 3600 / self.decode.gpu_tokens_per_second


def plan_serving(
    model: str,
    *,
    gpu: str,
    gpus: int | None = None,
    prefill_gpus: int | None = None,
    tp: int | None = None,
    redundant: int | None = None,
    batch: int | None = None,
    slowest: float = SLOWEST,
    context: int = MEAN_CONTEXT,
    weights: Format | None = None,
    cache: Format | None = None,
    window: int | None = None,
    traffic: Traffic | None = None,
    prices: Prices | None = None,
) -> ServingPlan:
    """Plan how to serve a network.

    Args: as the options of ``whalefall plan serve`` say; ``slowest`` in seconds. Unless told, the
        fewest GPUs and the smallest groups that fit, as many sequences as fit and are no slower
        than ``slowest``, and FP8 where the hardware has it.

    Raises:
        UserError: a name that is unknown, a number that is not allowed, or something that does not
            fit, with what does.
    """
    counts = {"context": context, "batch": batch, "gpus": gpus, "prefill_gpus": prefill_gpus}
    for name, value in {**counts, "tp": tp}.items():
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    check("the time of the slowest token", slowest, above=True)
    network, hardware = architecture_of(model), load_hardware(gpu)
    alone = Unit(
        network, hardware, weights or hardware.narrowest, cache or hardware.working, window
    )
    smallest = _resized(alone, gpus or tp or 1, tp or 1)
    fitting = (it for it in _units(smallest, gpus, tp) if not it.missing(batch or 1, context))
    unit = next(fitting, smallest)
    if redundant is not None:
        unit = replace(unit, redundant=redundant)
    reading = _resized(unit, prefill_gpus or unit.gpus, unit.tp)
    _check(unit, batch or 1, context)
    _check(reading, 1, context)
    return ServingPlan(
        unit,
        reading,
        context,
        batch or _most(unit, context, slowest),
        traffic or Traffic(),
        prices or Prices(),
    )


def _most(unit: Unit, context: int, slowest: float) -> int:
    """Sequences of a group that fit and are fast enough; one where that is too slow."""
    sizes = range(1, unit.most_sequences(context) + 1)
    fast = bisect_right(sizes, slowest, key=lambda size: decode_step(unit, size, context).seconds)
    return max(1, fast)


def _resized(unit: Unit, gpus: int, tp: int) -> Unit:
    redundant = fewest_redundant(unit.architecture.routed_experts, gpus)
    return replace(unit, gpus=gpus, tp=tp, redundant=redundant)


def _units(unit: Unit, gpus: int | None, tp: int | None) -> Iterator[Unit]:
    """Of so many GPUs, or of ever more, in groups of so many, or of ever more."""
    count = unit.gpus
    while count <= (gpus or MOST_GPUS):
        size = tp or 1
        while size <= min(tp or count, unit.hardware.gpus_per_node):
            with suppress(UserError):  # groups that do not divide the GPUs or the heads
                yield _resized(unit, count, size)
            size *= 2
        count *= 2


def _check(unit: Unit, batch: int, context: int) -> None:
    """That the weights and so many sequences fit.

    Raises:
        UserError: by how much they do not, and what does.
    """
    missing = unit.missing(batch, context) / GIB
    if not missing:
        return
    need = unit.usable / GIB + missing
    text = (
        f"{unit.architecture.name} does not fit on {unit.gpus} x {unit.hardware.name}: with "
        f"{batch:,} of {context:,} tokens a GPU needs {need:.1f} GiB, {missing:.1f} GiB more than "
        "can be used; "
    )
    if most := unit.most_sequences(context):
        raise UserError(f"{text}{most:,} such sequences fit")
    for other in _units(replace(unit, tp=1), None, None):
        if not other.missing(1, context):
            groups = f" in groups of {other.tp}" if other.tp > 1 else ""
            raise UserError(f"{text}the nearest that fits one is {other.gpus} GPUs{groups}")
    raise UserError(f"{text}no unit of up to {MOST_GPUS:,} GPUs fits one")
