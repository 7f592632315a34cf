"""A network cut into pipeline stages, and what each stage costs and holds."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from whalefall.plan.activations import Kept, deferred_by, kept_by
from whalefall.plan.architecture import Layer
from whalefall.plan.layout import Setting
from whalefall.plan.traffic import exchange_seconds
from whalefall.plan.work import Passes, Work, added, head_work, layer_work, mtp_work, sum_of, times


@dataclass(frozen=True)
class Held:
    """Parameters on a device, experts divided by the expert-parallel degree."""

    plain: int
    routed: int
    projections: int
    """Those that have FP8 forms: all matrices but embedding, head and gates."""

    @property
    def total(self) -> int:
        return self.plain + self.routed


@dataclass(frozen=True)
class Stage:
    """Consecutive layers; the first stage embeds, the last has the head and the MTP modules."""

    setting: Setting
    own_layers: tuple[Layer, ...]
    is_first: bool = False
    is_last: bool = False

    @property
    def mtp_depth(self) -> int:
        return self.setting.architecture.mtp_depth if self.is_last else 0

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Those of the MTP modules included."""
        return self.own_layers + (self.setting.architecture.mtp_layer,) * self.mtp_depth

    @cached_property
    def _parts(self) -> list[dict[str, int]]:
        """Parameters on a device of each layer."""
        hidden, ep = self.setting.architecture.hidden, self.setting.layout.ep
        parts = (layer.parameters(hidden) for layer in self.layers)
        return [it | {"routed_experts": it.get("routed_experts", 0) // ep} for it in parts]

    @property
    def layer_counts(self) -> list[int]:
        """Parameters on a device of each layer."""
        return [sum(parts.values()) for parts in self._parts]

    @cached_property
    def held(self) -> Held:
        network = self.setting.architecture
        has_own_head = self.is_last and not (network.tied and self.is_first)
        # MTP embeds where the network ends.
        has_copy = self.mtp_depth > 0 and not self.setting.layout.ends_meet
        ends = network.vocab * network.hidden * (self.is_first + has_own_head + has_copy)
        joins = self.mtp_depth * network.mtp_projection.parameters
        norms = network.hidden * (self.is_last + 3 * self.mtp_depth)
        routed = sum(parts["routed_experts"] for parts in self._parts)
        matrices = ("attention", "dense", "shared_experts", "routed_experts")
        projections = joins + sum(it.get(name, 0) for it in self._parts for name in matrices)
        return Held(sum(self.layer_counts) - routed + ends + joins + norms, routed, projections)

    @cached_property
    def work(self) -> Work:
        """Arithmetic of one micro-batch."""
        setting = self.setting
        works = [
            times(layer_work(layer, setting), self.own_layers.count(layer))
            for layer in dict.fromkeys(self.own_layers)
        ]
        if self.is_last:
            works += [head_work(setting), mtp_work(setting)]
        if setting.micro_batches > 1:  # the new gradient is read, its FP32 sum read and written
            moved = (setting.layout.bytes + 8) * self.held.total
            works.append({"gradient sums": Passes(0.0, 0.0, moved / setting.hardware.bandwidth)})
        return added(*works)

    @cached_property
    def passes(self) -> Passes:
        return sum_of(list(self.work.values()))

    @cached_property
    def exchange(self) -> float:
        """Seconds of all dispatches and combines of a forward pass."""
        return sum(exchange_seconds(layer, self.setting) for layer in self.layers)

    @property
    def exchange_backward(self) -> float:
        """Blocks that are made again send their tokens again."""
        return self.exchange * (2 if self.setting.layout.recompute == "block" else 1)

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """Of each layer, for one micro-batch."""
        kinds = {layer: kept_by(layer, self.setting) for layer in dict.fromkeys(self.layers)}
        return tuple(kinds[layer] for layer in self.layers)

    @cached_property
    def kept_bytes(self) -> float:
        """Of one micro-batch, from its forward to its backward pass."""
        setting = self.setting
        norms = setting.architecture.hidden * (self.is_last + 3 * self.mtp_depth)
        layers = sum(kept.under(setting.layout.recompute) for kept in self.kept)
        return layers + setting.tokens * setting.layout.bytes * norms

    @cached_property
    def deferred_bytes(self) -> float:
        """Of one micro-batch whose weight gradients are put off."""
        return sum(deferred_by(layer, self.setting) for layer in self.layers)


def cut(setting: Setting) -> list[Stage]:
    """The network in as many stages as the layout has, so that the slowest is as fast as can be.

    Stages before the last take as many layers as the slowest one's time allows; the head may be
    alone in the last.
    """
    layers, count = setting.architecture.layers, setting.layout.stages
    if count == 1:
        return [Stage(setting, layers, is_first=True, is_last=True)]
    kinds = {layer: Stage(setting, (layer,)).passes.total for layer in dict.fromkeys(layers)}
    seconds = [kinds[layer] for layer in layers]
    tail = Stage(setting, (), is_last=True).passes.total
    low, high = max(seconds), sum(seconds) + tail
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if _pack(seconds, tail, count, middle) else (middle, high)
    sizes = _pack(seconds, tail, count, high)
    assert sizes is not None
    ends = list(accumulate(sizes, initial=0))
    return [
        Stage(setting, layers[ends[at] : ends[at + 1]], at == 0, at == count - 1)
        for at in range(count)
    ]


def _pack(times: list[float], tail: float, count: int, most: float) -> list[int] | None:
    """Layers of each stage if none takes longer than ``most``; None if that cannot be."""
    sizes, done = [], 0
    for index in range(count - 1):
        after = count - 2 - index  # stages between this and the last, which need a layer each
        size, seconds = 0, 0.0
        while done < len(times) - after and (not size or seconds + times[done] <= most):
            seconds += times[done]
            size, done = size + 1, done + 1
        sizes.append(size)
    rest = times[done:]
    return [*sizes, len(rest)] if sum(rest) + tail <= most else None
