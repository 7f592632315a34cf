"""Which layouts fit, which are fastest, and what to do where none fits."""

from dataclasses import fields

import pytest

from whalefall.plan.answers import training_report
from whalefall.plan.layout import Layout, parse_layout
from whalefall.plan.search import plan_training


def test_the_best_layouts_fit_and_are_in_order() -> None:
    answer = plan_training("v3-671b", gpus=2048, gpu="h800")
    best = answer.best
    assert answer.plan is best[0]
    assert all(plan.fits for plan in best)
    assert [plan.step.total for plan in best] == sorted(plan.step.total for plan in best)
    assert not any(plan.fits for plan in answer.too_large)


def test_words_fix_a_layout_and_the_rest_is_searched() -> None:
    answer = plan_training("v3-671b", gpus=2048, gpu="h800", layout="pp16, EP64")
    for plan in (*answer.best, *answer.too_large):
        assert (plan.setting.layout.pp, plan.setting.layout.ep) == (16, 64)


@pytest.mark.parametrize(
    ("model", "gpus", "gpu", "rows"),
    [
        ("moonlight-16b", 64, "h100", 2048),
        ("kimi-k2", 2048, "h800", None),
        ("deepseek-v2", 512, "a100", None),
        ("qwen-2.5-72b", 512, "h200", 4096),
        ("llama-3.1-405b", 1024, "gb200", 2048),
        ("bench-6b", 8, "b200", 64),
        ("bench-v3-slice", 8, "rtx-4090", 64),
        ("quickstart", 1, "cpu", None),
    ],
)
def test_anything_is_planned(model: str, gpus: int, gpu: str, rows: int | None) -> None:
    answer = plan_training(model, gpus=gpus, gpu=gpu, batch_rows=rows)
    assert 0 < answer.plan.mfu(causal=True) < 1
    if not answer.best:
        assert answer.plan.missing_gib > 0


def test_what_does_not_fit_says_by_how_much_and_what_does() -> None:
    answer = plan_training("v3-671b", gpus=2048, gpu="h800", layout="pp16,ep64,1f1b,none,mb1")
    assert answer.plan.missing_gib > 10
    assert answer.nearest is not None and answer.nearest.fits
    asked, near = answer.plan.setting.layout, answer.nearest.setting.layout
    changed = [f.name for f in fields(Layout) if getattr(asked, f.name) != getattr(near, f.name)]
    assert changed == ["recompute"]
    text = training_report(answer).markdown
    assert f"{answer.plan.missing_gib:.1f} GiB are missing" in text
    assert str(near) in text


def test_giving_up_the_pipeline_gives_up_its_copies() -> None:
    answer = plan_training("v3-671b", gpus=2048, gpu="h800", layout="pp2,dp1024,none")
    assert answer.nearest is not None
    assert answer.nearest.setting.layout.gpus == 2048


def test_too_few_gpus_are_told_how_many_are_enough() -> None:
    answer = plan_training("bench-6b", gpus=1, gpu="rtx-4090")
    assert not answer.best
    assert answer.nearest is not None
    assert answer.nearest.fits and answer.nearest.setting.layout.gpus > 1


def test_a_layout_reads_what_it_writes() -> None:
    layout = Layout(pp=4, dp=8, ep=2, schedule="zb1p", recompute="block", products="fp8")
    assert Layout(**parse_layout(str(layout))) == layout
