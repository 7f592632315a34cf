"""The published table of bubbles and memory, out of the simulator; and the drawing."""

import json
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.errors import UserError
from whalefall.parallel.build_schedule import build_schedule
from whalefall.parallel.schedule import ScheduleKind
from whalefall.plan.answers import schedule_report
from whalefall.plan.schedule_drawing import draw
from whalefall.plan.schedules import Times, plan_schedule, published_bubble, simulate

PICTURE = Times(forward=1, backward=2, weight_gradient=1, overlapped=3)
UNIT = st.integers(1, 40)  # whole numbers add without rounding


def passes(forward: int, input_gradient: int, weight_gradient: int, overlapped: int = 1) -> Times:
    backward = input_gradient + weight_gradient
    return Times(
        forward=forward,
        backward=backward,
        weight_gradient=weight_gradient,
        overlapped=overlapped,
    )


STAGES = st.integers(2, 16)
EVEN_STAGES = st.integers(1, 8).map(lambda half: 2 * half)
EXTRA = st.integers(0, 12)


@given(pp=STAGES, micro_batches=st.integers(1, 40), times=st.builds(passes, UNIT, UNIT, UNIT))
def test_1f1b_idles_for_a_forward_and_backward_of_each_other_stage(pp, micro_batches, times):
    plan = plan_schedule("1f1b", pp=pp, micro_batches=micro_batches, times=times)
    assert plan.published.holds
    assert set(plan.idle) == {plan.published.time}
    assert plan.published.time == (pp - 1) * (times.forward + times.backward)


@given(pp=STAGES, extra=EXTRA, forward=UNIT, inputs=UNIT, data=st.data())
def test_zb1p_hides_two_weight_gradients_a_stage(pp, extra, forward, inputs, data):
    weights = data.draw(st.integers(1, min(forward, inputs)))
    times = passes(forward, inputs, weights)
    plan = plan_schedule("zb1p", pp=pp, micro_batches=pp + extra, times=times)
    assert plan.published.holds
    assert set(plan.idle) == {plan.published.time}
    assert plan.published.time == (pp - 1) * (forward + times.backward - 2 * weights)


@given(
    kind=st.sampled_from([ScheduleKind.DUALPIPE, ScheduleKind.DUALPIPE_V]),
    pp=EVEN_STAGES,
    extra=EXTRA,
    forward=UNIT,
    data=st.data(),
)
def test_dualpipe_idles_for_half_the_stages(kind, pp, extra, forward, data):
    weights = data.draw(st.integers(1, forward))
    backward = forward + weights
    times = passes(forward, forward, weights, data.draw(st.integers(backward, forward + backward)))
    micro_batches = (pp + extra) * (2 if kind is ScheduleKind.DUALPIPE else 1)
    plan = plan_schedule(kind, pp=pp, micro_batches=micro_batches, times=times)
    assert plan.published.holds
    assert plan.bubble == plan.published.time
    assert plan.published.time == (pp / 2 - 1) * (times.overlapped + backward - 3 * weights)
    if times.overlapped == forward + backward:  # else ranks with fewer pairs work longer
        assert set(plan.idle) == {plan.bubble}


@given(pp=EVEN_STAGES, extra=EXTRA, unit=UNIT)
def test_zb_v_has_no_gaps_where_all_passes_take_the_same(pp, extra, unit):
    times = passes(unit, unit, unit)
    plan = plan_schedule("zb-v", pp=pp, micro_batches=pp + extra, times=times)
    assert plan.published.holds
    assert set(plan.gaps) == {0}
    assert set(plan.idle) == {plan.published.time} == {(pp // 2 - 1) * unit}


@pytest.mark.parametrize(
    ("kind", "times"),
    [
        ("zb1p", passes(2, 2, 3)),
        ("zb1p", passes(3, 2, 3)),
        ("zb-v", passes(2, 3, 2)),
        ("dualpipe", passes(2, 3, 1, 5)),
        ("dualpipe", passes(3, 2, 1, 4)),
        ("dualpipe", passes(2, 2, 3, 6)),
        ("dualpipe", passes(4, 4, 1, 4)),
        ("dualpipev", passes(1, 1, 1, 4)),
    ],
)
def test_where_a_formula_is_not_exact_the_report_says_so(kind, times):
    plan = plan_schedule(kind, pp=8, micro_batches=20, times=times)
    assert plan.bubble != plan.published.time
    assert not plan.published.holds


def test_the_table_at_8_stages_and_20_micro_batches():
    plans = {
        kind: plan_schedule(kind, pp=8, micro_batches=20, times=PICTURE) for kind in ScheduleKind
    }
    table = {
        kind.value: (
            plan.schedule.ranks,
            plan.step_time,
            plan.bubble,
            max(plan.peak_activations),
            plan.parameter_multiple,
        )
        for kind, plan in plans.items()
    }
    assert table == {
        "1f1b": (8, 81, 21, 8, 1),
        "zb1p": (8, 67, 7, 8, 1),
        "zb-v": (4, 123, 3, 8, 2),
        "dualpipe": (8, 66, 6, 9, 2),
        "dualpipev": (4, 126, 6, 9, 2),
    }
    assert {kind.value: len(plan.schedule.routes) for kind, plan in plans.items()} == {
        "1f1b": 1, "zb1p": 1, "zb-v": 1, "dualpipe": 2, "dualpipev": 1,
    }  # fmt: skip
    assert plans[ScheduleKind.DUALPIPE].bubble_fraction == 6 / 66


@pytest.mark.parametrize("kind", ScheduleKind)
@given(transfer=st.integers(0, 5), forward=UNIT, inputs=UNIT, weights=UNIT, pair=UNIT)
def test_a_timeline_keeps_the_rules(kind, transfer, forward, inputs, weights, pair):
    schedule = build_schedule(kind, pp=4, micro_batches=10)
    times = Times(
        forward=forward,
        backward=inputs + weights,
        weight_gradient=weights,
        overlapped=pair,
        transfer=transfer,
    )
    timeline = simulate(schedule, lambda _, step: times.of(step), transfer)
    made = {
        result: (rank, timed.end)
        for rank, steps in enumerate(timeline.ranks)
        for timed in steps
        for what in timed.step
        for result in schedule.makes(rank, what)
    }
    for rank, steps in enumerate(timeline.ranks):
        assert tuple(timed.step for timed in steps) == schedule.steps[rank]
        assert all(timed.end - timed.start == times.of(timed.step) for timed in steps)
        free = [0, *(timed.end for timed in steps)]
        for timed, end_before in zip(steps, free, strict=False):
            needs = [made[need] for what in timed.step for need in schedule.needs(rank, what)]
            arrivals = [when + transfer * (maker != rank) for maker, when in needs]
            assert timed.start == max([end_before, *arrivals])  # neither early nor late
        assert sum(timeline.work[rank].values()) == timeline.busy[rank]


def test_transfers_delay_the_fill_and_the_drain():
    slow = Times(forward=1, backward=2, weight_gradient=1, overlapped=3, transfer=0.5)
    plan = plan_schedule("1f1b", pp=2, micro_batches=1, times=slow)
    assert plan.step_time == 1 + 0.5 + 3 + 0.5 + 2
    assert not plan.published.holds


def test_work_is_split_by_kind_of_step():
    """Rank 0 of the published picture: what a measured step's 1F, 1B, 1W and 1F1B are made of."""
    plan = plan_schedule("dualpipe", pp=8, micro_batches=20, times=PICTURE)
    assert plan.work[0] == {"F": 11, "B": 8, "I": 7, "W": 7, "F&B": 27}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward": 0}, "the time forward is 0; it must be above 0"),
        ({"overlapped": -1}, "the time overlapped is -1; it must be above 0"),
        ({"transfer": -1}, "the time transfer is -1; it must not be below 0"),
        ({"forward": float("nan")}, "the time forward is nan"),
        ({"backward": float("inf")}, "the time backward is inf"),
        (
            {"weight_gradient": 2},
            r"the weight gradient \(2\) is a part of the whole backward \(2\)",
        ),
    ],
)
def test_impossible_times_are_told_in_a_line(changes, message):
    times = {"forward": 1, "backward": 2, "weight_gradient": 1, "overlapped": 3} | changes
    with pytest.raises(UserError, match=message) as caught:
        Times(**times)
    assert "\n" not in str(caught.value)


def test_sizes_are_checked_before_anything_is_built():
    with pytest.raises(UserError, match="dualpipe over 8 stages needs at least 16 micro-batches"):
        plan_schedule("dualpipe", pp=8, micro_batches=10, times=PICTURE)


def test_a_plan_becomes_json():
    plan = plan_schedule("dualpipev", pp=8, micro_batches=10, times=PICTURE)
    read = json.loads(schedule_report([plan]).to_json())["schedules"][0]
    assert read["kind"] == "dualpipev"
    assert read["published"]["formula"] == "(PP/2-1)(F&B+B-3W)"
    assert read["times"]["overlapped"] == 3
    assert read["bubble"] == read["published"]["time"] == 6
    assert read["ranks"] == 4


@pytest.mark.parametrize("kind", ScheduleKind)
def test_a_picture_shows_every_pass_in_its_place(kind):
    timeline = plan_schedule(kind, pp=4, micro_batches=12, times=PICTURE)
    picture = ElementTree.fromstring(draw(timeline))
    svg = "{http://www.w3.org/2000/svg}"
    numbers = [
        text.text for text in picture.iter(f"{svg}text") if "number" in text.get("class", "")
    ]
    passes_of_all = [what for turn in timeline.schedule.order for what in turn.step]
    assert sorted(numbers) == sorted(str(what.micro_batch) for what in passes_of_all)
    rows = [box for box in picture.iter(f"{svg}rect") if box.get("class") == "row"]
    assert len(rows) == timeline.schedule.ranks
    width, right = (
        float(picture.get("width")),
        float(rows[0].get("x")) + float(rows[0].get("width")),
    )
    assert all(float(box.get("x")) + float(box.get("width")) <= right + 0.1 for box in rows)
    assert right < width
    assert "bubble" in picture.findtext(f"{svg}title")
    assert "prefers-color-scheme: dark" in picture.findtext(f"{svg}style")


def test_boxes_of_a_rank_do_not_overlap_in_the_picture():
    timeline = plan_schedule("zb-v", pp=4, micro_batches=6, times=PICTURE)
    picture = ElementTree.fromstring(draw(timeline))
    boxes: dict[str, list[tuple[float, float]]] = {}
    for box in picture.iter("{http://www.w3.org/2000/svg}rect"):
        if box.get("class")[1:3] == " c" and float(box.get("height")) == 30:
            x = float(box.get("x"))
            boxes.setdefault(box.get("y"), []).append((x, x + float(box.get("width"))))
    assert len(boxes) == 2
    for row in boxes.values():
        assert len(row) == 6 * 6
        assert all(before[1] <= after[0] for before, after in pairwise(sorted(row)))


def test_a_long_step_stays_a_picture_of_bounded_width():
    timeline = plan_schedule("1f1b", pp=2, micro_batches=1500, times=PICTURE)
    picture = ElementTree.fromstring(draw(timeline))
    assert float(picture.get("width")) < 6200
    assert not [text for text in picture.iter() if text.get("class", "").startswith("number")]


@pytest.mark.parametrize("kind", ScheduleKind)
def test_published_formulas_name_their_assumptions(kind):
    published = published_bubble(kind, 2, PICTURE)
    assert published.holds
    assert published.assumes
    assert published.time == plan_schedule(kind, pp=2, micro_batches=4, times=PICTURE).bubble
