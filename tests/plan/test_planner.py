"""Questions as users ask them."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whalefall.cli.plan import plan_app
from whalefall.errors import UserError
from whalefall.plan.layout import Layout, parse_layout
from whalefall.plan.search import plan_training

DEEPSEEK = ["v3-671b", "--gpus", "2048", "--gpu", "h800"]


def run(*words: str) -> str:
    result = CliRunner().invoke(plan_app, list(words), env={"COLUMNS": "120"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_a_model_is_planned_without_naming_a_command() -> None:
    words = [*DEEPSEEK, "--network", "mpft", "--layout", "pp16,ep64,dualpipe"]
    assert run(*words) == run("train", *words)


def test_the_readme_shows_what_is_printed() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    printed = run(*DEEPSEEK).split("\n\n")[0]
    assert "\n".join(line.rstrip() for line in printed.splitlines()) in readme


def test_json_has_every_number() -> None:
    found = json.loads(run(*DEEPSEEK, "--layout", "pp16,ep64,dualpipe,selective,mb1", "--json"))
    assert found["parameters"]["total"] == 671026404352
    assert found["step_seconds"]["total"] == pytest.approx(19.9, rel=0.15)
    assert found["memory_gib"]["by_recompute"].keys() == {"none", "selective", "block"}
    assert found["tried"] == 1


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
    text = " ".join(run(*DEEPSEEK, "--layout", "pp16,ep64,1f1b,none,mb1").split())
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "v3"}, "the models are"),
        ({"gpu": "h900"}, "known are"),
        ({"layout": "tp8"}, "'tp8' is no word of a layout; allowed are ppN, epN"),
        ({"layout": "pp3"}, "pp3 x dp682 is not 2048 GPUs"),
        ({"layout": "pp16,ep48"}, "ep48 must divide"),
        ({"layout": "pp16,dp64"}, "pp16 x dp64 is not 2048 GPUs"),
        ({"gpu": "a100", "layout": "fp8"}, "has no fp8; it has bf16"),
        ({"batch_rows": 7}, "a batch of 7 rows does not divide"),
        ({"network": "sneakernet"}, "allowed are ft2, mpft, ft3"),
    ],
)
def test_a_wrong_word_is_told_in_one_line(changes: dict[str, object], message: str) -> None:
    question: dict[str, object] = {"model": "v3-671b", "gpus": 2048, "gpu": "h800"} | changes
    with pytest.raises(UserError, match=message) as caught:
        plan_training(**question)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_the_command_line_starts_without_the_planner() -> None:
    code = "import sys, whalefall.cli; assert not [it for it in sys.modules if 'fall.plan' in it]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_needs_no_torch() -> None:
    code = (
        "import pkgutil, sys, importlib, whalefall.plan as plan\n"
        "for module in pkgutil.iter_modules(plan.__path__):\n"
        "    importlib.import_module(f'whalefall.plan.{module.name}')\n"
        "from whalefall.plan.search import plan_training\n"
        "plan_training('v3-671b', gpus=2048, gpu='h800').plan.step\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
