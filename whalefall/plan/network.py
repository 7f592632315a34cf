"""Networks of switches with 64 ports: switches, links, ways, and what all-to-all gets of them.

Sizes follow from each construction; [B] table 3 lists one instance of each. Links are between
switches; the cables of endpoints are counted apart.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import ceil

from whalefall.errors import UserError

PORTS = 64
PLANES = 8
"""Of a multi-plane fat tree: one for each network card of a node ([B] 5.1)."""


@dataclass(frozen=True)
class Topology:
    """A network, built."""

    name: str
    design: str
    """What its size follows from."""
    capacity: int
    """Endpoints it has ports for."""
    endpoints: int
    """Of these, in use."""
    switches: int
    links: int
    farthest: int
    """Switches on the longest of the shortest ways."""
    short_links: int = 0
    """Of the links, those within a Dragonfly group."""
    uniform: float = 1.0
    """Share of an endpoint's rate that all endpoints reach at once, each sending as much to each
    other: channels there are over channels that shortest ways take (Dally and Towles, 3.3)."""
    adverse: float = 1.0
    """The same for the worst pairing of endpoints. Low-diameter networks then detour over a random
    switch, which takes twice the channels (Valiant 1982; Kim et al., ISCA 2008)."""
    other_plane: bool = False
    """Whether seven of eight ways need a hop over NVLink: to another plane ([B] 5.1)."""


def two_layer_tree(endpoints: int) -> Topology:
    """FT2: half of a leaf's ports down, half up, evenly to all spines. At most ports^2 / 2."""
    half = PORTS // 2
    _fits("ft2", endpoints, PORTS * half)
    leaves = max(2, ceil(endpoints / half))
    spines = _spines(leaves, half)
    return Topology(
        name="ft2",
        design=f"{leaves} leaves, {spines} spines",
        capacity=leaves * half,
        endpoints=endpoints,
        switches=leaves + spines,
        links=leaves * half,
        farthest=3,
    )


def multi_plane_tree(endpoints: int) -> Topology:
    """MPFT: eight two-layer trees, and of a node's eight cards one in each ([B] 5.1)."""
    _fits("mpft", endpoints, PLANES * PORTS * PORTS // 2)
    plane = two_layer_tree(ceil(endpoints / PLANES))
    return replace(
        plane,
        name="mpft",
        design=f"{PLANES} planes of {plane.design}",
        capacity=PLANES * plane.capacity,
        endpoints=endpoints,
        switches=PLANES * plane.switches,
        links=PLANES * plane.links,
        other_plane=True,
    )


def three_layer_tree(endpoints: int) -> Topology:
    """FT3: pods of ports/2 leaves and as many spines, each spine evenly to its share of the cores.
    At most ports^3 / 4 (Al-Fares et al., SIGCOMM 2008)."""
    half = PORTS // 2
    _fits("ft3", endpoints, PORTS * half * half)
    pods = max(2, ceil(endpoints / half**2))
    cores = half * _spines(pods, half)
    return Topology(
        name="ft3",
        design=f"{pods} pods, {cores} cores",
        capacity=pods * half**2,
        endpoints=endpoints,
        switches=pods * PORTS + cores,
        links=2 * pods * half**2,
        farthest=5,
    )


def _spines(below: int, uplinks: int) -> int:
    """The fewest that the uplinks of each switch below divide over evenly."""
    enough = range(ceil(below / 2), uplinks + 1)
    return next(count for count in enough if uplinks % count == 0)


def slim_fly(endpoints: int) -> Topology:
    """The smallest Slim Fly that holds so many: fewest switches, then fewest links.

    Its graphs exist for prime powers q; where ports allow, links are doubled, so that switches
    are used up.
    """
    graphs = [q for q in range(3, PORTS) if q % 4 != 2 and _is_prime_power(q)]
    every = [it for q in graphs for width in range(1, PORTS) if (it := slim_fly_of(q, width))]
    _fits("slim-fly", endpoints, max(it.capacity for it in every))
    large_enough = (it for it in every if it.capacity >= endpoints)
    smallest = min(large_enough, key=lambda it: (it.switches, it.links))
    return replace(smallest, endpoints=endpoints)


def slim_fly_of(q: int, width: int = 1) -> Topology | None:
    """2 q^2 switches with (3 q - d) / 2 neighbours each, q = 4 w + d and d of -1, 0, 1, at a
    distance of at most 2; half as many endpoints as neighbours (Besta and Hoefler, SC 2014).

    None where the ports do not suffice for half of them. [B] table 3 takes q = 28, which the
    formulas allow although 28 is no prime power, so that no such graph is known.
    """
    delta = (q + 1) % 4 - 1
    neighbours = (3 * q - delta) // 2
    channels = width * neighbours
    attached = min(ceil(channels / 2), PORTS - channels)
    if attached < channels / 4:
        return None
    switches = 2 * q * q
    hops = (neighbours + 2 * (switches - 1 - neighbours)) / switches
    return Topology(
        name="slim-fly",
        design=f"q = {q}" + (f", links x {width}" if width > 1 else ""),
        capacity=switches * attached,
        endpoints=switches * attached,
        switches=switches,
        links=switches * channels // 2,
        farthest=3,
        uniform=min(1.0, channels / attached / hops),
        adverse=0.5,
    )


def _is_prime_power(q: int) -> bool:
    prime = next(factor for factor in range(2, q + 1) if q % factor == 0)
    while q % prime == 0:
        q //= prime
    return q == 1


def dragonfly(endpoints: int) -> Topology:
    """A quarter of a switch's ports for endpoints and for other groups, the rest for the 31 others
    of its group; as few groups as needed, all ports to other groups wired. At most
    a p (a h + 1) = 262,656; [B] table 3 has 511 of the 513 groups (Kim et al., ISCA 2008)."""
    attached = far = PORTS // 4
    size = 2 * far
    _fits("dragonfly", endpoints, size * attached * (size * far + 1))
    groups = ceil(endpoints / (size * attached))
    inside = groups * size * (size - 1) // 2
    outside = groups * size * far // 2 if groups > 1 else 0
    # To other groups a way takes a channel out and up to one in each of the two groups.
    others = (groups - 1) / groups
    near_hops = (1 + others) * (size - 1) / size
    return Topology(
        name="dragonfly",
        design=f"{groups} groups of {size}",
        capacity=groups * size * attached,
        endpoints=endpoints,
        switches=groups * size,
        links=inside + outside,
        farthest=4 if groups > 1 else 2,
        short_links=inside,
        uniform=min(1.0, (size - 1) / attached / near_hops),
        adverse=0.5,
    )


BUILDERS: dict[str, Callable[[int], Topology]] = {
    "ft2": two_layer_tree,
    "mpft": multi_plane_tree,
    "ft3": three_layer_tree,
    "slim-fly": slim_fly,
    "dragonfly": dragonfly,
}


def published_table() -> list[Topology]:
    """The instances of [B] table 3."""
    slim = slim_fly_of(28)
    assert slim is not None
    return [
        two_layer_tree(2048),
        multi_plane_tree(16384),
        three_layer_tree(65536),
        slim,
        dragonfly(261632),
    ]


def _fits(name: str, endpoints: int, most: int) -> None:
    if endpoints < 1:
        raise UserError(f"{endpoints} endpoints; there must be at least 1")
    if endpoints > most:
        raise UserError(f"{name} connects at most {most:,} endpoints, not {endpoints:,}")
