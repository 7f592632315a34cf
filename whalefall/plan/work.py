"""Seconds that a layer takes on one device, by part and pass, from what the machine achieves.

Products go at a share of the tensor cores' peak, attention likewise, everything else at a share of
the memory's bandwidth: the bytes that the fused steps of ``ops/`` read and write, each once. FP8
adds its quantizations, which read 2 bytes a number and write one for each of two forms.
"""

from collections.abc import Sequence
from typing import NamedTuple

from whalefall.plan.architecture import Dense, LatentAttention, Layer, Projection
from whalefall.plan.layout import Setting
from whalefall.plan.units import Format


class Passes(NamedTuple):
    """Seconds of the forward pass and of the two halves of the backward pass."""

    forward: float = 0.0
    input_gradient: float = 0.0
    """What is made again for the backward pass included."""
    weight_gradient: float = 0.0

    @property
    def backward(self) -> float:
        return self.input_gradient + self.weight_gradient

    @property
    def total(self) -> float:
        return sum(self)

    def times(self, count: float) -> "Passes":
        return Passes(*(count * seconds for seconds in self))


Work = dict[str, Passes]
"""By part: ``attention projections``, ``attention``, ``dense and shared``, ``routed experts``,
``memory-bound``, ``head and loss``, ``gradient sums``."""
KINDS = {
    "attention": "attention projections",
    "dense": "dense and shared",
    "shared_experts": "dense and shared",
    "gates": "dense and shared",
    "routed_experts": "routed experts",
}
"""Where the products of a part of a layer are counted."""


def sum_of(passes: Sequence[Passes]) -> Passes:
    return Passes(*map(sum, zip(*passes, strict=True))) if passes else Passes()


def added(*works: Work) -> Work:
    parts = dict.fromkeys(part for work in works for part in work)
    return {part: sum_of([work[part] for work in works if part in work]) for part in parts}


def times(work: Work, count: float) -> Work:
    return {part: passes.times(count) for part, passes in work.items()}


def layer_work(layer: Layer, setting: Setting) -> Work:
    """A layer with one micro-batch, its experts' rows spread evenly, transfers left out."""
    matrices = layer.matrices(setting.architecture.hidden)
    products = [
        {KINDS[part]: _products(it.projections, setting, part=part, rows=it.met)}
        for part, it in matrices.items()
    ]
    moved = streams(layer, setting)
    others = {"attention": _attention(layer, setting), "memory-bound": moved}
    work = added(products[0], others, *products[1:])
    match setting.layout.recompute:
        case "none":
            return work
        case "block":
            again = {part: Passes(0.0, passes.forward) for part, passes in work.items()}
        case "selective":
            # All projections but the one after attention, and about half of what is memory-bound.
            repeated = _products(matrices["attention"].projections[:-1], setting)
            again = {
                "attention projections": Passes(0.0, repeated.forward),
                "memory-bound": Passes(0.0, 0.5 * moved.forward),
            }
    return added(work, again)


def head_work(setting: Setting) -> Work:
    """Head and loss, once for the main model and once for each MTP depth, in the working type."""
    network = setting.architecture
    heads = 1 + network.mtp_depth
    products = _products([network.head], setting, part="head", rows=heads)
    # Logits are read once and made the gradient once.
    logits = 2 * setting.layout.bytes * heads * setting.tokens * network.vocab
    return {"head and loss": sum_of([products, Passes(logits / setting.hardware.bandwidth)])}


def mtp_work(setting: Setting) -> Work:
    """The MTP modules' layers and joining projections; their heads are ``head_work``'s."""
    network = setting.architecture
    if not network.mtp_depth:
        return {}
    norms = setting.tokens * setting.layout.bytes * 6 * network.hidden / setting.hardware.bandwidth
    join = {
        "attention projections": _products([network.mtp_projection], setting),
        "memory-bound": Passes(norms, norms),
    }
    return times(added(layer_work(network.mtp_layer, setting), join), network.mtp_depth)


def _products(
    projections: Sequence[Projection], setting: Setting, *, part: str = "", rows: int = 1
) -> Passes:
    """Of so many rows a token. Each of the three products has the same FLOPs; gates and heads stay
    in the working type ([A] 3.3)."""
    hardware = setting.hardware
    fmt = hardware.working if part in ("gates", "head") else setting.layout.products
    achieved = hardware.achieved.products[fmt]
    flops = rows * setting.tokens * sum(it.flops for it in projections)
    seconds = flops / _peak(setting, fmt)
    if part == "routed_experts":
        straight, weight = achieved.grouped, achieved.grouped_wgrad
    else:
        straight, weight = achieved.dense, achieved.dense_wgrad
    return Passes(seconds / straight, seconds / straight, seconds / weight)


def _attention(layer: Layer, setting: Setting) -> Passes:
    """Causal. Backward has five products where forward has two (arXiv 2205.14135)."""
    attention, achieved = layer.attention, setting.hardware.achieved
    flops = setting.tokens * setting.sequence * (attention.qk_width + attention.v_width)
    seconds = flops / _peak(setting, setting.hardware.working)
    return Passes(seconds / achieved.attention_forward, 2.5 * seconds / achieved.attention_backward)


def _peak(setting: Setting, fmt: Format) -> float:
    """FLOPs a second of what training leaves of the tensor cores."""
    share = setting.hardware.computing_share if setting.layout.ep > 1 else 1.0
    return setting.hardware.rate(fmt, share)


def streams(layer: Layer, setting: Setting) -> Passes:
    """What is bound by memory: bytes over bandwidth."""
    halves = (_attention_streams(layer, setting), _feed_forward_streams(layer, setting))
    seconds = setting.tokens / setting.hardware.bandwidth
    return Passes(*(seconds * sum(half) for half in zip(*halves, strict=True)))


def _attention_streams(layer: Layer, setting: Setting) -> tuple[float, float]:
    """Bytes a token, forward and backward: norms, residual stream, what makes and splits heads."""
    attention, hidden = layer.attention, setting.architecture.hidden
    width, quantized = setting.layout.bytes, _quantized(setting)
    narrow = 0
    heads = 2 * (attention.qk_width + attention.kv_width)  # rotation reads and writes
    if isinstance(attention, LatentAttention):
        narrow = attention.kv_rank + (attention.q_rank or 0)
        heads = 4 * attention.qk_width + 2 * attention.heads * attention.nope
    outputs = sum(projection.outputs for projection in attention.projections(hidden))
    # A norm, an addition with a norm, two additions; backward, branches' gradients are added too.
    forward = width * (12 * hidden + 2 * narrow + heads)
    backward = width * (16 * hidden + 3 * narrow + heads)
    inputs = 2 * hidden + narrow + attention.v_width
    return forward + quantized * inputs, backward + quantized * outputs


def _feed_forward_streams(layer: Layer, setting: Setting) -> tuple[float, float]:
    """Bytes a token, forward and backward: SwiGLU, and the rows' way to the experts and back."""
    half, hidden = layer.feed_forward, setting.architecture.hidden
    width, quantized = setting.layout.bytes, _quantized(setting)
    plain = half.intermediate if isinstance(half, Dense) else half.shared * half.intermediate
    forward = 3 * width * plain + quantized * (hidden + plain)
    backward = 5 * width * plain + quantized * (hidden + 2 * plain)
    if isinstance(half, Dense):
        return forward, backward
    rows, inner = half.top_k, half.intermediate
    copies = 2 * width * (1 + rows) * hidden + 24 * half.routed  # rows, and FP32 scores
    # In FP8 SwiGLU writes its output and what it keeps as tiles, and three forms backward.
    routed = (7, 9) if quantized else (3 * width, 5 * width)
    return (
        forward + copies + rows * (quantized * hidden + routed[0] * inner),
        backward + copies + rows * (quantized * hidden + routed[1] * inner),
    )


def _quantized(setting: Setting) -> int:
    """Bytes of quantizing a number: two read and two forms written, or nothing."""
    return 4 if setting.layout.is_fp8 else 0
