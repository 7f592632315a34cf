"""Networks: sizes from their constructions, the published table, and messages over them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.errors import UserError
from whalefall.plan.hardware import Link
from whalefall.plan.network import (
    BUILDERS,
    dragonfly,
    multi_plane_tree,
    published_table,
    slim_fly,
    slim_fly_of,
    three_layer_tree,
    two_layer_tree,
)
from whalefall.plan.network_cost import INFINIBAND, ROCE, UnitPrices, compare_networks

CARD = Link(gb_per_s=50, achieved_gb_per_s=40, latency_us=3.7)
LARGEST = {"ft2": 2048, "mpft": 16384, "ft3": 65536, "slim-fly": 35322, "dragonfly": 262656}


def test_the_published_table_comes_out():
    found = compare_networks(None, card=CARD, size=1e6).plans
    rows = [
        (it.topology.name, it.topology.endpoints, it.topology.switches, it.topology.links)
        for it in found
    ]
    assert rows == [
        ("ft2", 2048, 96, 2048),
        ("mpft", 16384, 768, 16384),
        ("ft3", 65536, 5120, 131072),
        ("slim-fly", 32928, 1568, 32928),
        ("dragonfly", 261632, 16352, 384272),
    ]
    assert [round(it.dollars / 1e6) for it in found] == [9, 72, 491, 146, 1522]
    published = [("4.39", 2), ("4.39", 2), ("7.5", 1), ("4.4", 1), ("5.8", 1)]
    for plan, (figure, digits) in zip(found, published, strict=True):
        assert f"{plan.dollars_per_endpoint / 1e3:.{digits}f}" == figure


def test_switches_pass_messages_on_as_published():
    assert (INFINIBAND.through(1), INFINIBAND.through(3)) == (2.8, 3.7)
    assert (ROCE.through(1), ROCE.through(3)) == (3.6, 5.6)
    found = {it.topology.name: it for it in compare_networks(None, card=CARD, size=1e6).plans}
    assert found["ft3"].latency_us == pytest.approx(4.6)
    assert found["dragonfly"].latency_us == pytest.approx(4.15)
    assert found["mpft"].other_plane_us == pytest.approx(3.7 + 3.33)
    assert found["ft2"].other_plane_us is None


def test_all_to_all_is_at_full_rate_and_bad_pairings_are_not():
    found = {it.topology.name: it for it in compare_networks(None, card=CARD, size=40e6).plans}
    for plan in found.values():
        assert 1e3 * plan.all_to_all_seconds == pytest.approx(1, rel=0.01)
    for name in ("ft2", "mpft", "ft3"):
        assert found[name].adverse_seconds == found[name].all_to_all_seconds
    for name in ("slim-fly", "dragonfly"):
        assert 1e3 * found[name].adverse_seconds == pytest.approx(2, rel=0.01)


@pytest.mark.parametrize("name", LARGEST)
def test_each_kind_has_a_largest_instance(name):
    build, most = BUILDERS[name], LARGEST[name]
    assert build(most).capacity == most
    with pytest.raises(UserError, match=f"{name} connects at most {most:,} endpoints"):
        build(most + 1)
    with pytest.raises(UserError, match="at least 1"):
        build(0)


@given(st.data(), st.sampled_from(sorted(LARGEST)))
def test_instances_hold_what_is_asked_and_use_no_more_ports_than_there_are(data, name):
    wanted = data.draw(st.integers(1, LARGEST[name]))
    found = BUILDERS[name](wanted)
    assert found.endpoints == wanted <= found.capacity
    assert found.capacity + 2 * found.links <= 64 * found.switches
    assert 0 < found.uniform <= 1
    fewer = BUILDERS[name](max(1, wanted // 2))
    assert fewer.switches <= found.switches


def test_trees_have_as_much_going_up_as_down():
    for tree in (two_layer_tree(300), multi_plane_tree(5000), three_layer_tree(20_000)):
        layers = 2 if tree.name == "ft3" else 1
        assert tree.links == layers * tree.capacity
    assert two_layer_tree(100).switches == 4 + 2


def test_slim_fly_is_its_formula():
    """Hoffman and Singleton's graph of 50 switches with 7 neighbours is the one of q = 5."""
    small = slim_fly_of(5)
    assert (small.switches, small.links, small.capacity) == (50, 175, 200)
    assert slim_fly_of(29).capacity == 2 * 29**2 * 21
    assert slim_fly_of(64) is None
    assert slim_fly(32928).design == "q = 29", "28 is no prime power"
    assert slim_fly(32928).farthest == 3


def test_dragonfly_groups_are_all_wired_to_each_other():
    whole = dragonfly(262656)
    assert whole.design == "513 groups of 32"
    assert whole.links - whole.short_links == 513 * 512 // 2
    assert dragonfly(500).links == dragonfly(500).short_links == 32 * 31 // 2


def test_planes_are_two_layer_trees():
    mpft, plane = multi_plane_tree(16384), two_layer_tree(2048)
    assert (mpft.switches, mpft.links) == (8 * plane.switches, 8 * plane.links)
    assert [it.name for it in published_table()] == list(BUILDERS)


def test_networks_that_are_too_small_are_named():
    found = compare_networks(50_000, card=CARD, size=1e6)
    assert [it.topology.name for it in found.plans] == ["ft3", "dragonfly"]
    assert found.too_small["mpft"] == "mpft connects at most 16,384 endpoints, not 50,000"


def test_money_is_switches_and_cables():
    prices = UnitPrices(switch=1e6, link=1e3, short_link=1, endpoint=0)
    found = compare_networks(512, card=CARD, size=1, prices=prices)
    dollars = {it.topology.name: it.dollars for it in found.plans}
    assert dollars["ft2"] == 24e6 + 512e3
    assert dollars["dragonfly"] == 32e6 + 496
