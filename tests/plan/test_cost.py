"""A whole programme's cost beside the published one."""

import pytest

from whalefall.plan.cost import (
    OFFICIAL_HOURS,
    Programme,
    Range,
    assumptions,
    comparisons,
    official,
    plan_programme,
)
from whalefall.plan.hardware import load_hardware
from whalefall.plan.network import multi_plane_tree
from whalefall.plan.network_cost import UnitPrices

H800 = load_hardware("h800")


def programme(gpus: int = 2048, rent: float = 2.0, **given: float) -> Programme:
    return plan_programme(None, gpus, "h800", rent, **given)


def test_the_official_figure():
    run = official(H800)
    dollars = [run.rent * hours / 1e6 for hours in OFFICIAL_HOURS.values()]
    assert dollars == pytest.approx([5.328, 0.238, 0.01])
    assert run.hours == 2.788e6
    assert run.run_rented == pytest.approx(5.576e6)
    assert OFFICIAL_HOURS["pre-training"] / 14.8 == pytest.approx(180e3)
    assert pytest.approx(3.7, abs=0.05) == 180e3 / 2048 / 24


def test_llama_took_eleven_times_the_hours():
    ours, llama = comparisons(2.0)
    assert llama.gpu_hours == 30.84e6
    assert llama.gpu_hours / ours.gpu_hours == pytest.approx(11.06, abs=0.01)
    assert llama.dollars == pytest.approx(61.68e6)


def test_a_rented_programme_adds_other_runs_and_people():
    plan = programme(attempts=3, people=10, years=0.5, dollars_per_person_year=1e5)
    assert plan.other_runs_rented.values == (2 * plan.run_rented,) * 3
    assert plan.people.values == (5e5,) * 3
    assert plan.rented.values == (3 * plan.run_rented + 5e5,) * 3


def test_own_gpus_cost_their_life_their_building_and_their_power():
    plan = programme(
        server_dollars=40_000, lifetime_years=4, use=0.5, power_usage_effectiveness=1.2,
        dollars_per_kwh=0.1, dollars_per_kw_month=100,
    )  # fmt: skip
    network = UnitPrices().of(multi_plane_tree(2048)) / 2048
    assert plan.network_dollars == pytest.approx(network) == pytest.approx(4390, rel=2e-3)
    assert plan.purchase.typical == pytest.approx(2048 * (40_000 + network))
    assert plan.capital_per_hour.typical == pytest.approx((40_000 + network) / (4 * 8766 * 0.5))
    assert plan.power_per_hour.typical == pytest.approx(1.275 * 1.2 * 0.1)
    assert plan.building_per_hour.typical == pytest.approx(1.275 * 100 * 12 / 8766 / 0.5)


def test_a_typical_own_gpu_costs_about_the_rent_that_was_assumed():
    assert official(H800).owned_per_hour.typical == pytest.approx(2.0, rel=0.1)


def test_ranges_run_from_cheap_to_dear():
    plan = programme()
    for it in (plan.people, plan.rented, plan.owned, plan.owned_per_hour, plan.purchase):
        assert it.low < it.typical < it.high
    assert all(it.source not in ("", "given") for it in assumptions().values())
    assert plan.megawatt_hours.low == pytest.approx(2.788e6 * 1275e-6 * 1.1 * 1.2)


def test_larger_clusters_take_the_network_that_connects_them():
    assert programme(20_000).network_dollars > programme(16_000).network_dollars
    assert programme(100_000).network_dollars == pytest.approx(5830, rel=0.02)


def test_a_range_adds_multiplies_and_divides_case_by_case():
    one, two = Range(1, 2, 3), Range(4, 5, 6)
    assert (one + two).values == (5, 7, 9)
    assert (one * two).values == (4, 10, 18)
    assert (two / one).values == (4, 2.5, 2)
    assert (one * 2).values == (2, 4, 6)
