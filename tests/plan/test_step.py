"""Time of a step, against DeepSeek's own measurement on 2048 H800 ([B] table 4)."""

from dataclasses import replace

import pytest

from whalefall.plan.answers import training_report
from whalefall.plan.hardware import load_hardware
from whalefall.plan.layout import Layout, Setting
from whalefall.plan.models import architecture_of
from whalefall.plan.search import plan_training
from whalefall.plan.stages import cut
from whalefall.plan.step import step_time
from whalefall.plan.traffic import exchange_seconds, visited
from whalefall.plan.training import TrainingPlan

LAYOUT = Layout(pp=16, dp=128, ep=64, schedule="dualpipe", products="fp8", recompute="selective")
SETTING = Setting(architecture_of("v3-671b"), load_hardware("h800"), LAYOUT, 4096, 15360)
PLAN = TrainingPlan(SETTING, 14.8e12)


def near(published: float) -> object:
    return pytest.approx(published, rel=0.15)


def test_the_phases_of_the_published_step_are_predicted() -> None:
    phases = PLAN.step.phases
    assert phases.forward == near(1.13)
    assert phases.backward == near(1.99)
    assert phases.weight_gradient == near(0.48)
    assert phases.overlapped == near(13.95)
    assert phases.bubble == near(2.06)
    assert PLAN.step.optimizer == near(0.29)


def test_the_published_speed_is_predicted() -> None:
    assert PLAN.step.total == pytest.approx(19.926, rel=0.05)
    assert PLAN.tokens_per_day == pytest.approx(272.80e9, rel=0.05)
    assert PLAN.mfu(causal=True) == pytest.approx(0.3894, rel=0.05)
    assert PLAN.mfu(causal=False) == pytest.approx(0.4373, rel=0.05)
    assert PLAN.tflops(causal=True) == pytest.approx(385, rel=0.05)
    assert PLAN.gpu_hours == pytest.approx(2664e3, rel=0.05)
    assert PLAN.dollars == pytest.approx(5.328e6, rel=0.05)


def test_parts_and_phases_are_the_same_seconds() -> None:
    step = PLAN.step
    assert sum(step.parts.values()) == pytest.approx(step.total)
    assert sum(step.phases) + step.optimizer == pytest.approx(step.total)
    assert min(step.parts.values()) > 0


def test_what_was_tuned_is_named() -> None:
    words = "pp16,ep64,dualpipe,selective,mb1"
    spread = plan_training("v3-671b", gpus=2048, gpu="h800", layout=words)
    alone = plan_training("quickstart", gpus=1, gpu="h800", layout="pp1")
    for answer, count in ((spread, 3), (alone, 0)):
        tuned = [it["tuned"] for it in training_report(answer).numbers["assumptions"]]
        assert tuned.count(True) == count < len(tuned)


def test_the_network_is_cut_as_deepseek_profiled_it() -> None:
    """Four layers a stage; the last has one, MTP and both heads."""
    assert [len(stage.own_layers) for stage in cut(SETTING)] == [4] * 15 + [1]


@pytest.mark.parametrize("pp", [2, 3, 8, 32])
def test_every_layer_is_in_one_stage(pp: int) -> None:
    layout = Layout(pp=pp, schedule="1f1b", products="fp8")
    stages = cut(replace(SETTING, layout=layout, batch_rows=64))
    layers = [layer for stage in stages for layer in stage.own_layers]
    assert layers == list(SETTING.architecture.layers)
    assert [stage.is_first for stage in stages] == [True] + [False] * (pp - 1)
    assert [stage.is_last for stage in stages] == [False] * (pp - 1) + [True]


def total(**changes: object) -> float:
    layout = replace(LAYOUT, **changes)  # type: ignore[arg-type]
    setting = replace(SETTING, layout=layout)
    return step_time(cut(setting), setting).total


def test_better_schedules_are_faster() -> None:
    assert total() < total(schedule="zb1p") < total(schedule="1f1b")


def test_what_is_computed_again_takes_time() -> None:
    assert total(recompute="none") < total() < total(recompute="block")


def test_time_goes_on_in_a_straight_line() -> None:
    """Many micro-batches are not run through one by one."""
    layout = replace(LAYOUT, pp=4, dp=512)
    steps = [
        replace(SETTING, layout=layout, batch_rows=512 * micro_batches)
        for micro_batches in (12, 100, 188)
    ]
    few, more, most = (step_time(cut(setting), setting).total for setting in steps)
    assert most - more == pytest.approx(more - few)


def test_a_token_visits_no_more_nodes_than_routing_allows() -> None:
    experts = SETTING.architecture.runs[-1].layer.feed_forward
    assert visited(8, experts) == 4  # type: ignore[arg-type]
    assert visited(2, experts) < 2  # type: ignore[arg-type]
    assert visited(1, experts) == 1  # type: ignore[arg-type]


def test_the_exchange_is_what_deepep_measured() -> None:
    """4096 tokens over 64 H800: 2.3 ms to dispatch in FP8 and 4.7 ms to combine in BF16."""
    seconds = exchange_seconds(SETTING.architecture.runs[-1].layer, SETTING)
    assert seconds == pytest.approx(7.0e-3, rel=0.03)


def test_experts_on_one_device_exchange_nothing() -> None:
    alone = replace(SETTING, layout=replace(LAYOUT, ep=1))
    assert exchange_seconds(SETTING.architecture.runs[-1].layer, alone) == 0
