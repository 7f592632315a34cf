"""How long a decoding step takes, and what the network alone would allow.

Every product costs the larger of its arithmetic and of reading its weights, attention the larger
of its arithmetic and of reading the cache ([A] 3.4.2: decoding is bound by memory). Experts'
tokens travel while the other half of the batch computes, where that is faster than one batch whose
tokens are waited for ([A] 3.4.2, [B] 2.3).
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from whalefall.plan.architecture import Experts, LatentAttention, Layer, Projection
from whalefall.plan.layout import Layout, Setting
from whalefall.plan.traffic import both_ways
from whalefall.plan.unit import EXCHANGE_START, Unit, layer_bytes
from whalefall.plan.units import Format
from whalefall.plan.work import KINDS, streams


@dataclass(frozen=True)
class DecodeStep:
    """One token for every sequence."""

    batch: int
    """Sequences of a group."""
    context: float
    """Their mean length."""
    halves: bool
    """Whether two half batches hide each other's transfers."""
    parts: dict[str, float]
    """Seconds by kind of work."""
    gpus_of_group: int

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return 1 / self.seconds

    @property
    def gpu_tokens_per_second(self) -> float:
        return self.batch / self.gpus_of_group / self.seconds


def decode_step(unit: Unit, batch: int, context: float) -> DecodeStep:
    """The faster of one batch and two halves."""
    can_halve = batch > 1 and unit.gpus > 1 and unit.architecture.experts
    steps = [_step(unit, batch, context, pieces) for pieces in ((1, 2) if can_halve else (1,))]
    return min(steps, key=lambda step: step.seconds)


def _step(unit: Unit, batch: int, context: float, pieces: int) -> DecodeStep:
    network = unit.architecture
    parts: dict[str, float] = defaultdict(float)
    for layer, count in network.runs:
        work = _layer(unit, layer, batch / pieces, context)
        if isinstance(layer.feed_forward, Experts):
            exchange = exchange_seconds(unit, layer.feed_forward, batch / pieces)
            hidden = sum(work.values()) if pieces == 2 else 0.0
            work["exposed all-to-all"] = max(0.0, exchange - hidden)
        for part, seconds in work.items():
            parts[part] += pieces * count * seconds
    parts["head"] = _products(unit, [network.head], batch, unit.format_of("head"))
    return DecodeStep(batch, context, pieces == 2, parts, unit.tp)


def _layer(unit: Unit, layer: Layer, tokens: float, context: float) -> dict[str, float]:
    """Seconds of a layer by part, transfers between experts left out."""
    matrices = layer.matrices(unit.architecture.hidden)
    projections = matrices.pop("attention").projections
    parts: dict[str, float] = defaultdict(float)
    parts["attention projections"] = _products(unit, projections, tokens, unit.weights)
    parts["attention"] = _attention(unit, layer, tokens, context)
    parts["memory-bound"] = _streams(unit, layer, tokens)
    if unit.tp > 1:
        parts["tensor-parallel sums"] = unit.all_reduce_seconds(layer, tokens)
    for part, it in matrices.items():
        if isinstance(layer.feed_forward, Experts) and part == "routed_experts":
            parts[KINDS[part]] = _experts(unit, layer.feed_forward, it.projections, tokens)
        else:
            parts[KINDS[part]] += _products(unit, it.projections, tokens, unit.format_of(part))
    return parts


def _products(unit: Unit, projections: Iterable[Projection], rows: float, fmt: Format) -> float:
    hardware = unit.hardware
    rate = hardware.rate(fmt, hardware.achieved.products[fmt].dense)
    return sum(
        max(
            rows * unit.share(it) * it.flops / rate,
            unit.matrix_bytes([it], fmt) / hardware.bandwidth,
        )
        for it in projections
    )


def _attention(unit: Unit, layer: Layer, tokens: float, context: float) -> float:
    """MLA absorbed: all heads attend over the one latent ([A] 2.1.1), at 2 (576 + 512) FLOPs a
    head and cached token in V3."""
    attention, hardware = layer.attention, unit.hardware
    if isinstance(attention, LatentAttention):
        width = attention.heads * (2 * attention.kv_rank + attention.rope)
    else:
        width = attention.qk_width + attention.v_width
    rate = hardware.rate(hardware.working, hardware.achieved.attention_forward)
    read = unit.cache_share * layer_bytes(attention, unit.cache)
    seconds = max(2 * width / unit.tp / rate, read / hardware.bandwidth)
    return tokens * unit.kept(context) * seconds


def _streams(unit: Unit, layer: Layer, tokens: float) -> float:
    """Norms, rotations, SwiGLU and rows on their way: as much a token as in training's forward."""
    layout = Layout(products=unit.weights)
    setting = Setting(unit.architecture, unit.hardware, layout, sequence=1, batch_rows=1)
    return streams(layer, setting).forward * tokens


def _experts(unit: Unit, experts: Experts, expert: list[Projection], tokens: float) -> float:
    """A GPU's experts with an even share of all tokens; those that no token meets are not read."""
    hardware, everyone = unit.hardware, tokens * unit.gpus / unit.tp
    rows = everyone * experts.top_k / unit.gpus
    met = unit.slots(experts) * (1 - (1 - experts.top_k / experts.routed) ** everyone)
    rate = hardware.rate(unit.weights, hardware.achieved.products[unit.weights].grouped)
    arithmetic = rows * sum(it.flops for it in expert) / rate
    return max(
        arithmetic,
        met * unit.tp * unit.matrix_bytes(expert, unit.weights) / hardware.bandwidth,
    )


def exchange_seconds(unit: Unit, experts: Experts, tokens: float) -> float:
    """Dispatch and combine of a group's tokens, a copy to each of their experts: to other nodes
    through the network card, within the node over NVLink, both at once."""
    if unit.gpus == 1:
        return 0.0
    local = min(unit.gpus, unit.hardware.gpus_per_node)
    numbers = tokens / unit.tp * experts.top_k * unit.architecture.hidden
    beside, elsewhere = numbers * (local - 1) / unit.gpus, numbers * (1 - local / unit.gpus)
    return both_ways(beside, elsewhere, unit.exchange_widths, unit.hardware, EXCHANGE_START)


@dataclass(frozen=True)
class NetworkLimit:
    """What a token's way to its experts and back allows, were everything else for free.

    The published figures of [B] 2.3.2: 32 tokens a device, 9 experts, 7000 numbers, 1 byte there
    and 2 back, 61 layers, two half batches that each wait for the other. 50 GB/s make 120.96 us,
    14.76 ms and 67 tokens a second; the 900 GB/s of a GB200 NVL72 6.72 us, 0.82 ms and 1200.
    """

    gb_per_s: float
    tokens: float = 32
    experts: int = 9
    hidden: int = 7000
    layers: int = 61
    bytes_both_ways: float = 3

    @property
    def exchange_seconds(self) -> float:
        """Dispatch and combine of a half batch in one layer."""
        size = self.bytes_both_ways * self.tokens * self.experts * self.hidden
        return size / (1e9 * self.gb_per_s)

    @property
    def step_seconds(self) -> float:
        return 2 * self.layers * self.exchange_seconds

    @property
    def tokens_per_second(self) -> float:
        """Of one sequence."""
        return 1 / self.step_seconds


def network_limit(unit: Unit, tokens: float = 32) -> NetworkLimit | None:
    """Of this network: its own width, layers with experts, and the slowest link that its GPUs
    need. None where no token leaves its GPU."""
    network, hardware = unit.architecture, unit.hardware
    if not network.experts or unit.gpus == 1:
        return None
    link = hardware.nic if unit.gpus > hardware.gpus_per_node else hardware.nvlink
    top_k = max(it.top_k for it in network.experts)
    widths = sum(unit.exchange_widths)
    return NetworkLimit(link.gb_per_s, tokens, top_k, network.hidden, len(network.experts), widths)
