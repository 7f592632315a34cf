"""What serves together: some GPUs, what each of them holds, and the cache that decoding reads.

Attention is data-parallel, or tensor-parallel within groups of ``tp`` GPUs of a node; the routed
experts are spread over all GPUs, some of them more than once; everything else is on each GPU
([A] 3.4; deepseek-ai/open-infra-index, day 6). MLA caches a latent and one rotating key a token
([A] 2.1.1), grouped attention a key and a value a key-value head.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from math import floor
from typing import NamedTuple

from whalefall.errors import UserError
from whalefall.plan.architecture import (
    Architecture,
    Attention,
    Experts,
    GroupedAttention,
    LatentAttention,
    Layer,
    Projection,
)
from whalefall.plan.hardware import Hardware
from whalefall.plan.units import FP8_BLOCKS, FP8_TILES, GIB, WIDTH, Format

RESERVE = 0.07
"""Share of the memory for activations, buffers of the exchange, graphs and fragments (assumed:
DeepEP's low-latency buffers alone are 1.6 GiB at 128 tokens and 288 experts)."""
EXCHANGE_START = 20e-6
"""Seconds of a low-latency dispatch or combine besides its bytes. Tuned: with it, 128 tokens of
7168 take what DeepEP's README lists from 8 to 256 GPUs, within 15 %."""
NOT_SHARDED = ("q_a_proj", "kv_a_proj_with_mqa", "gate")
"""Small products whose result every GPU of a tensor-parallel group needs whole."""


def token_bytes(network: Architecture, fmt: Format = "bf16") -> float:
    """Cache of a token over all layers ([B] table 1: 70,272 for V3, 327,680 for Qwen-2.5 72B,
    516,096 for LLaMA-3.1 405B, in BF16)."""
    return sum(layer_bytes(layer.attention, fmt) for layer in network.layers)


def layer_bytes(attention: Attention, fmt: Format = "bf16") -> float:
    """Of a token in one layer.

    In FP8 each tile of 128 numbers has an FP32 scale, and MLA's rotating key stays BF16: 656 bytes
    in V3, 512 of latent, 16 of scales, 128 of key (deepseek-ai/FlashMLA, its FP8 cache).
    """
    if fmt != "fp8":
        return WIDTH[fmt] * attention.kv_numbers
    if isinstance(attention, LatentAttention):
        return FP8_TILES * attention.kv_rank + WIDTH["bf16"] * attention.rope
    return FP8_TILES * attention.kv_numbers


class Variant(NamedTuple):
    """The same network with its cache in another way."""

    name: str
    bytes_per_token: float
    """Over all layers."""
    window: int | None = None

    def sequence_bytes(self, context: int) -> float:
        return self.bytes_per_token * min(context, self.window or context)


def variants(network: Architecture, window: int = 4096) -> list[Variant]:
    """First the network's own cache, in BF16; then in FP8 and with a window, and what plain kinds
    of attention with its heads would keep. MHA is 56.9 times MLA in V3."""
    attention = network.mtp_layer.attention
    heads, width = attention.heads, attention.v_width // attention.heads
    own, size = kind_of(attention), token_bytes(network)
    found = [
        Variant(own, size),
        Variant(f"{own}, FP8", token_bytes(network, "fp8")),
        Variant(f"{own}, last {window:,}", size, window),
    ]
    for kv_heads in sorted({heads, min(8, heads), 1}, reverse=True):
        other = GroupedAttention(heads, kv_heads, width)
        if kind_of(other) != own:
            found.append(Variant(kind_of(other), len(network.layers) * layer_bytes(other)))
    return found


def kind_of(attention: Attention) -> str:
    if isinstance(attention, LatentAttention):
        return f"MLA {attention.kv_rank} + {attention.rope}"
    if attention.kv_heads == attention.heads:
        return "MHA"
    return "MQA" if attention.kv_heads == 1 else f"GQA of {attention.kv_heads}"


@dataclass(frozen=True)
class Unit:
    """GPUs that serve one copy of a network.

    Raises:
        UserError: groups or redundant experts do not divide the GPUs, the machine lacks the
            format, or the window is no positive number of tokens.
    """

    architecture: Architecture
    hardware: Hardware
    weights: Format
    """Of the projections; embedding, head, gates and norms stay in the working type ([A] 3.3)."""
    cache: Format = "bf16"
    window: int | None = None
    """Tokens that every layer looks back over; None keeps the cache of all."""
    gpus: int = 1
    tp: int = 1
    redundant: int = 0
    """Routed experts of each layer that are held once more ([A] 3.4.1)."""

    def __post_init__(self) -> None:
        hardware, network = self.hardware, self.architecture
        hardware.check_format(self.weights)
        if self.window is not None and self.window < 1:
            raise UserError(f"the window is {self.window} tokens; it must be at least 1")
        if self.gpus < 1 or self.tp < 1 or self.gpus % self.tp:
            raise UserError(f"tp {self.tp} must divide the {self.gpus} GPUs")
        heads = {run.layer.attention.heads for run in network.runs}
        if self.tp > hardware.gpus_per_node or any(count % self.tp for count in heads):
            raise UserError(
                f"tp {self.tp} must divide the {max(heads)} heads of {network.name} and stay "
                f"within a node of {hardware.gpus_per_node} GPUs"
            )
        experts = network.routed_experts
        if self.redundant < 0 or (self.redundant and not experts):
            raise UserError(f"{self.redundant} redundant experts: {network.name} has {experts}")
        if experts and (experts + self.redundant) % self.gpus:
            raise UserError(
                f"{experts} experts and {self.redundant} redundant ones do not divide over "
                f"{self.gpus} GPUs; {fewest_redundant(experts, self.gpus)} redundant ones do"
            )

    def slots(self, experts: Experts) -> float:
        """Experts of a layer on each GPU."""
        return (experts.routed + self.redundant) / self.gpus

    def share(self, projection: Projection) -> float:
        """What a GPU holds and computes of a projection."""
        return 1.0 if projection.name in NOT_SHARDED else 1 / self.tp

    def format_of(self, part: str) -> Format:
        """Of the weights of a part of the network."""
        return self.hardware.working if part in ("gates", "head") else self.weights

    def matrix_bytes(self, projections: Iterable[Projection], fmt: Format) -> float:
        """On a GPU; FP8 has an FP32 scale for each block of 128 x 128 ([A] 3.3.2)."""
        width = FP8_BLOCKS if fmt == "fp8" else WIDTH[fmt]
        return sum(width * self.share(it) * it.parameters for it in projections)

    def weight_bytes(self) -> dict[str, float]:
        """On a GPU, by part; MTP modules are left out."""
        network = self.architecture
        ends = WIDTH[self.hardware.working] * network.vocab * network.hidden / self.tp
        parts = defaultdict(float, {"embedding and head": ends * (1 if network.tied else 2)})
        for layer, count in network.runs:
            for part, it in layer.matrices(network.hidden).items():
                size = count * self.matrix_bytes(it.projections, self.format_of(part))
                match part, layer.feed_forward:
                    case "routed_experts", Experts() as experts:  # each is whole on its GPU
                        parts["routed experts"] += self.slots(experts) * self.tp * size
                    case "shared_experts" | "gates", _:
                        parts["shared experts and gates"] += size
                    case _:
                        parts[part] += size
        return parts

    @property
    def usable(self) -> float:
        """Bytes of a GPU's memory for weights and cache."""
        return (1 - RESERVE) * self.hardware.memory_gib * GIB

    @property
    def room(self) -> float:
        """Bytes of a GPU's memory for the cache; below 0 where the weights do not fit."""
        return self.usable - sum(self.weight_bytes().values())

    @property
    def cache_share(self) -> float:
        """What of a sequence's cache is on each GPU of its group: latents whole, heads divided."""
        attention = self.architecture.mtp_layer.attention
        if isinstance(attention, LatentAttention):
            return 1.0
        return 1 / min(self.tp, attention.kv_heads)

    def kept(self, context: float) -> float:
        """Tokens of a sequence whose cache is kept."""
        return context if self.window is None else min(context, self.window)

    def sequence_bytes(self, context: float) -> float:
        """On each GPU of its group."""
        return self.cache_share * token_bytes(self.architecture, self.cache) * self.kept(context)

    def most_sequences(self, context: float) -> int:
        """Of a group, all of this length."""
        return max(0, floor(self.room / self.sequence_bytes(context)))

    def missing(self, batch: float, context: float) -> float:
        """Bytes that a GPU lacks for so many sequences of its group; 0 where they fit."""
        return max(0.0, batch * self.sequence_bytes(context) - self.room)

    @property
    def exchange_widths(self) -> tuple[float, float]:
        """Bytes of a number to the experts, in FP8 tiles where weights are, and back ([A] 3.4)."""
        back = WIDTH[self.hardware.working]
        return (FP8_TILES if self.weights == "fp8" else back), back

    def all_reduce_seconds(self, layer: Layer, tokens: float) -> float:
        """A sum over the group after attention, and one after a dense or shared feed-forward."""
        half = layer.feed_forward
        sums = 1 if isinstance(half, Experts) and not half.shared else 2
        numbers = 2 * (self.tp - 1) / self.tp * tokens * self.architecture.hidden
        return sums * self.hardware.nvlink.seconds(numbers * self.exchange_widths[1])


def fewest_redundant(experts: int, gpus: int) -> int:
    """Redundant experts that give each GPU as many: 32 of 256 over 144 GPUs."""
    return -experts % gpus if experts else 0
