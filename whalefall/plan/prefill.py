"""How fast prompts are read.

A device reads many prompts at once, so that arithmetic is what counts: a layer's forward pass as
training does it, with attention reaching back into what an earlier request left in the cache.
"""

from collections import defaultdict
from dataclasses import dataclass

from whalefall.errors import UserError
from whalefall.plan.architecture import Experts, Layer
from whalefall.plan.layout import Layout, Setting
from whalefall.plan.traffic import both_ways, sent_to
from whalefall.plan.unit import EXCHANGE_START, Unit
from whalefall.plan.work import layer_work

CHUNK = 8192
"""Prompt tokens of a group that are computed at once (assumed)."""


@dataclass(frozen=True)
class Prefill:
    prompt: float
    """Mean length in tokens."""
    hit_rate: float
    """Share of the prompts' tokens that the cache still has."""
    parts: dict[str, float]
    """Seconds by kind of work of a computed token, on a group."""
    gpus_of_group: int

    @property
    def seconds_per_token(self) -> float:
        """Of a GPU, for a token that is computed."""
        return self.gpus_of_group * sum(self.parts.values())

    @property
    def computed_per_second(self) -> float:
        """Tokens of a GPU that the cache does not have."""
        return 1 / self.seconds_per_token

    @property
    def input_per_second(self) -> float:
        """Tokens of a GPU, those in the cache included."""
        return self.computed_per_second / (1 - self.hit_rate)


def prefill(unit: Unit, prompt: float, hit_rate: float = 0.0) -> Prefill:
    """Two micro-batches hide each other's transfers ([A] 3.4.1).

    Args:
        prompt: tokens, on average.
        hit_rate: share of them that are in the cache, below 1.

    Raises:
        UserError: a prompt has no token.
    """
    if prompt < 1:
        raise UserError(f"a prompt has {prompt:g} tokens; it must have at least 1")
    parts: dict[str, float] = defaultdict(float)
    for layer, count in unit.architecture.runs:
        for part, seconds in _layer(unit, layer, prompt, hit_rate).items():
            parts[part] += count * seconds
    return Prefill(prompt, hit_rate, parts, unit.tp)


def _layer(unit: Unit, layer: Layer, prompt: float, hit_rate: float) -> dict[str, float]:
    """Seconds of a token by part, on a group."""
    computed = max(1, round((1 - hit_rate) * prompt))
    setting = Setting(unit.architecture, unit.hardware, Layout(products=unit.weights), computed, 1)
    work = layer_work(layer, setting)
    parts = {part: passes.forward / computed / unit.tp for part, passes in work.items()}
    # Training's attention sees half of what is computed; here the cached tokens come before it.
    seen = hit_rate * prompt + computed / 2
    parts["attention"] *= unit.kept(seen) / (computed / 2)
    if unit.tp > 1:
        parts["tensor-parallel sums"] = unit.all_reduce_seconds(layer, CHUNK) / CHUNK
    if isinstance(layer.feed_forward, Experts) and unit.gpus > 1:
        share = unit.hardware.computing_share
        parts = {part: seconds / share for part, seconds in parts.items()}
        exchange = _exchange_seconds(unit, layer.feed_forward, CHUNK) / CHUNK
        parts["exposed all-to-all"] = max(0.0, exchange - sum(parts.values()))
    return parts


def _exchange_seconds(unit: Unit, experts: Experts, tokens: float) -> float:
    """Dispatch and combine of a group's tokens."""
    numbers = tokens / unit.tp * unit.architecture.hidden
    beside, elsewhere = (numbers * it for it in sent_to(experts, unit.gpus, unit.hardware))
    return both_ways(beside, elsewhere, unit.exchange_widths, unit.hardware, EXCHANGE_START)
