"""What a network costs, and how long messages and an all-to-all take on it."""

from dataclasses import dataclass

from whalefall.errors import UserError
from whalefall.plan.hardware import Link, load_hardware
from whalefall.plan.network import BUILDERS, Topology, published_table
from whalefall.plan.units import check


@dataclass(frozen=True)
class UnitPrices:
    """Dollars of parts, 400 Gb/s.

    [B] table 3 publishes costs of whole networks (9, 72, 491, 146 and 1,522 M$) and no prices.
    Tuned: a switch at about its list price (36 to 50 k$ in 2024), the three cables so that all five
    costs come out. With one price for all links no prices above 0 do that, so a Dragonfly's short
    ones have their own.
    """

    switch: float = 50_000
    link: float = 1_540
    """Between switches: fibre with two transceivers."""
    short_link: float = 1_458
    """Within a Dragonfly group."""
    endpoint: float = 510
    """From a switch to an endpoint: copper."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check(f"the price {name}", value)

    def parts(self, it: Topology) -> dict[str, float]:
        """Dollars of a network by part."""
        return {
            "switches": self.switch * it.switches,
            "links": self.link * (it.links - it.short_links),
            "short links": self.short_link * it.short_links,
            "cables of endpoints": self.endpoint * it.endpoints,
        }

    def of(self, it: Topology) -> float:
        return sum(self.parts(it).values())


@dataclass(frozen=True)
class Latencies:
    """Microseconds of a small message, end to end ([B] table 5)."""

    same_leaf: float
    """Through one switch."""
    cross_leaf: float
    """Through three."""

    def through(self, switches: int) -> float:
        return self.same_leaf + (switches - 1) * (self.cross_leaf - self.same_leaf) / 2


INFINIBAND = Latencies(2.8, 3.7)
ROCE = Latencies(3.6, 5.6)
NVLINK_US = 3.33
LATENCIES = {"infiniband": INFINIBAND, "roce": ROCE}


@dataclass(frozen=True)
class NetworkPlan:
    """A topology with prices, and a way to send."""

    topology: Topology
    prices: UnitPrices
    latencies: Latencies
    card: Link
    """Of an endpoint."""
    size: float
    """Bytes that an endpoint sends to all others together."""

    @property
    def dollars(self) -> float:
        return self.prices.of(self.topology)

    @property
    def dollars_per_endpoint(self) -> float:
        return self.dollars / self.topology.endpoints

    @property
    def latency_us(self) -> float:
        """Of the farthest pair, in one plane where there are several."""
        return self.latencies.through(self.topology.farthest)

    @property
    def other_plane_us(self) -> float | None:
        """To a card of another plane: over NVLink to the GPU whose card is in it, and on."""
        return self.latency_us + NVLINK_US if self.topology.other_plane else None

    @property
    def all_to_all_seconds(self) -> float:
        """Of balanced all-to-all: every endpoint sends as much to every other."""
        return self._seconds(self.topology.uniform)

    @property
    def adverse_seconds(self) -> float:
        """Of the same bytes, each endpoint's to one other, the worst for the network."""
        return self._seconds(self.topology.adverse)

    def _seconds(self, share: float) -> float:
        rate = 1e9 * self.card.achieved_gb_per_s * share
        return 1e-6 * self.latency_us + self.size / rate


@dataclass(frozen=True)
class Comparison:
    """Networks for so many endpoints, or the published ones."""

    endpoints: int | None
    """What was asked for; None for the instances of [B] table 3."""
    plans: list[NetworkPlan]
    too_small: dict[str, str]
    """Why a topology is not among them."""


def compare_networks(
    endpoints: int | None = None,
    *,
    card: Link | None = None,
    size: float = 64 * 2**20,
    latencies: Latencies = INFINIBAND,
    prices: UnitPrices | None = None,
) -> Comparison:
    """The smallest instance of every topology that connects so many; None for those of [B] table 3.

    Args:
        card: of an endpoint; an H800's unless told.
        size: bytes that an endpoint sends to all others together.

    Raises:
        UserError: no topology connects so many, or a number that is not allowed.
    """
    if endpoints is not None and endpoints < 1:
        raise UserError(f"{endpoints} endpoints; there must be at least 1")
    check("what each endpoint sends", size, above=True)
    too_small: dict[str, str] = {}
    found = published_table() if endpoints is None else []
    for name, build in BUILDERS.items() if endpoints is not None else ():
        try:
            found.append(build(endpoints or 0))
        except UserError as error:
            too_small[name] = str(error)
    if not found:
        raise UserError(too_small["dragonfly"])
    card, prices = card or load_hardware("h800").nic, prices or UnitPrices()
    plans = [NetworkPlan(it, prices, latencies, card, size) for it in found]
    return Comparison(endpoints, plans, too_small)
