"""Seconds of communication between devices, from bytes, bandwidth and latency.

Two links: NVLink within a node, a network card of each device between nodes. Ranks of an
expert-parallel group are neighbours, then come data-parallel ranks, then pipeline ranks
(``layout``).
"""

from collections.abc import Iterable
from math import comb

from whalefall.errors import UserError
from whalefall.plan.architecture import Dense, Experts, Layer
from whalefall.plan.hardware import Hardware
from whalefall.plan.layout import Setting
from whalefall.plan.network import BUILDERS
from whalefall.plan.network_cost import INFINIBAND


def on_network(hardware: Hardware, name: str, gpus: int) -> Hardware:
    """The machine with its nodes on an InfiniBand network of ``network.BUILDERS``: the latency of
    its farthest pair, and what of the cards' rate all-to-all gets. Fat trees give all of it ([B]
    table 4: MPFT and a rail-optimized one are equal within 0.1 %).

    Raises:
        UserError: there is no such network, or it does not connect so many.
    """
    if name not in BUILDERS:
        raise UserError(f"{name!r} is no network; allowed are {', '.join(BUILDERS)}")
    network, nic = BUILDERS[name](gpus), hardware.nic
    reached = {
        "latency_us": INFINIBAND.through(network.farthest),
        "achieved_gb_per_s": nic.achieved_gb_per_s * network.uniform,
    }
    return hardware.model_copy(update={"nic": nic.model_copy(update=reached)})


def visited(places: int, experts: Experts) -> float:
    """How many of ``places`` that share a layer's experts a token's choices are at, on average.

    ``top_k`` independent choices among n places meet n (1 - (1 - 1/n)^top_k). Routing limited to
    some groups reaches only these groups' places, as many as that allows ([A] 2.1.2).
    """
    groups, chosen = experts.groups, experts.top_groups
    if places > groups:
        return _distinct(places * chosen / groups, experts.top_k)
    others = groups - groups // places  # a place is missed where all groups it has are
    reached = places * (1 - comb(others, chosen) / comb(groups, chosen))
    return min(reached, _distinct(places, experts.top_k))


def _distinct(places: float, choices: int) -> float:
    return places * (1 - (1 - 1 / places) ** choices)


def exchange_seconds(layer: Layer, setting: Setting) -> float:
    """Dispatch and combine of a layer, either direction: dispatch in FP8 where products are,
    combine in the working type ([A] 3.3.3); backward, each is the other's gradient and has the
    same bytes."""
    experts, layout = layer.feed_forward, setting.layout
    if isinstance(experts, Dense) or layout.ep == 1:
        return 0.0
    beside, elsewhere = sent_to(experts, layout.ep, setting.hardware)
    numbers = setting.tokens * setting.architecture.hidden
    widths = layout.input_bytes, layout.bytes
    return both_ways(beside * numbers, elsewhere * numbers, widths, setting.hardware)


def sent_to(experts: Experts, gpus: int, hardware: Hardware) -> tuple[float, float]:
    """GPUs of its own node, and other nodes, that a token goes to, of so many GPUs with experts.

    It crosses the network once for each other node and is passed on there over NVLink ([A] 3.2.2).
    """
    nodes, local = -(-gpus // hardware.gpus_per_node), min(gpus, hardware.gpus_per_node)
    beside = visited(gpus, experts) * (local - 1) / local
    return beside, visited(nodes, experts) * (nodes - 1) / nodes


def both_ways(
    beside: float, elsewhere: float, widths: Iterable[float], hardware: Hardware, start: float = 0.0
) -> float:
    """Seconds of a dispatch and a combine, to the node's own GPUs and to others both at once.

    Args:
        beside, elsewhere: numbers that a GPU sends over NVLink and through its network card.
        widths: bytes of a number there and back.
        start: seconds that each takes besides.
    """
    seconds = 0.0
    for width in widths:
        near = hardware.nvlink.seconds(beside * width)
        far = hardware.nic.seconds(elsewhere * width) if elsewhere else 0.0
        seconds += start + max(near, far)
    return seconds


def exchange_buffers(layer: Layer, setting: Setting) -> float:
    """Bytes of the rows that a device receives in a dispatch and in a combine."""
    experts, layout = layer.feed_forward, setting.layout
    if isinstance(experts, Dense) or layout.ep == 1:
        return 0.0
    rows = setting.tokens * visited(layout.ep, experts)
    return rows * setting.architecture.hidden * (layout.input_bytes + layout.bytes)


def hop_seconds(setting: Setting) -> float:
    """A micro-batch's activations from one pipeline rank to the next."""
    hardware, layout = setting.hardware, setting.layout
    link = hardware.nvlink if layout.gpus <= hardware.gpus_per_node else hardware.nic
    return link.seconds(setting.tokens * setting.architecture.hidden * layout.bytes)


def reduction_seconds(
    size: float, replicas: int, stride: int, copies: int, hardware: Hardware
) -> float:
    """A reduce-scatter or all-gather of ``size`` bytes over ranks ``stride`` apart, each of which
    has so many ``copies`` on other nodes.

    In two levels: within a node each device sends all but its share, between nodes a share of it
    goes through every network card.
    """
    near = min(replicas, max(1, hardware.gpus_per_node // stride))
    nodes = replicas // near * copies
    within = hardware.nvlink.seconds(size * (near - 1) / near) if near > 1 else 0.0
    between = hardware.nic.seconds(size / near * (nodes - 1) / nodes) if nodes > 1 else 0.0
    return within + between
