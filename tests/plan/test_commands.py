"""``whalefall plan`` as users call it: tables, JSON, pages, pictures, and bad input."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from whalefall.cli.plan import plan_app
from whalefall.errors import UserError
from whalefall.plan.units import GIB

DEEPSEEK = "v3-671b --gpus 2048 --gpu h800"
SERVE = "serve v3-671b --gpu h800 --gpus 144 --prefill-gpus 32"
SCHEDULES = "schedule --pp 8 --micro-batches 20"
PAGES = {
    "train": DEEPSEEK,
    "train what does not fit": "bench-6b --gpus 1 --gpu rtx-4090",
    "serve": "serve v3-671b --gpu h800 --gpus 144",
    "network": "network --endpoints 2048",
    "cost": "cost",
    "schedule": "schedule --pp 4 --micro-batches 8",
}


def run(words: str) -> str:
    result = CliRunner().invoke(plan_app, words.split(), env={"COLUMNS": "140"})
    if result.exception is not None:
        raise result.exception
    return result.output


def numbers(words: str) -> Any:
    return json.loads(run(f"{words} --json"))


def test_a_model_is_planned_without_naming_a_command():
    words = f"{DEEPSEEK} --network mpft --layout pp16,ep64,dualpipe"
    assert run(words) == run(f"train {words}")


def test_the_readme_shows_what_is_printed():
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    printed = run(DEEPSEEK).split("\n\n")[0]
    assert "\n".join(line.rstrip() for line in printed.splitlines()) in readme


@pytest.mark.parametrize(
    ("words", "figures"),
    [
        ("network", ["16,352", "384,272", "1,522", "7.50", "1024 cores"]),
        ("cost", ["5.328", "0.238", "0.010", "5.576", "30.84", "arXiv 2405.21015"]),
        (SERVE, ["70,272", "120.96", "14.76", "87,072", "545%", "open-infra-index"]),
        (SCHEDULES, ["pp/2 ranks", "(PP-1)(F+B)"]),
        ("schedule --pp 7 --micro-batches 20", ["zb1p", "dualpipe needs an even number of stages"]),
    ],
)
def test_tables_have_the_known_figures(words: str, figures: list[str]):
    shown = run(words)
    assert [figure for figure in figures if figure not in shown] == []


def test_schedules_are_side_by_side():
    shown = run(SCHEDULES)
    for row in (r"1f1b +8 +81 +21 ", r"dualpipe +8 +66 +6 ", r"dualpipev +4 +126 +6 "):
        assert re.search(row, shown)


def test_json_of_training():
    found = numbers(f"{DEEPSEEK} --layout pp16,ep64,dualpipe,selective,mb1")
    assert found["parameters"]["total"] == 671026404352
    assert found["step_seconds"]["total"] == pytest.approx(19.9, rel=0.15)
    assert found["memory_gib"]["by_recompute"].keys() == {"none", "selective", "block"}
    assert found["tried"] == 1


def test_json_of_serving():
    found = numbers(SERVE)
    assert found["cache"]["bytes_per_token"] == 70_272
    assert found["published_day"]["cost"] == 87_072
    assert found["decode"]["seconds"] == pytest.approx(sum(found["decode"]["parts"].values()))
    assert found["decode_unit"]["weight_gib"]["attention"] * GIB > 1e10
    assert [it["tuned"] for it in found["assumptions"]].count(True) == 1


def test_json_of_networks_costs_and_schedules():
    networks = numbers("network --endpoints 4096")
    assert networks["networks"]["mpft"]["topology"]["switches"] == 192
    assert networks["too_small"].keys() == {"ft2"}
    cost = numbers("cost --gpu-hours 1e6 --rent 3")
    assert cost["programme"]["run_rented"] == 3e6
    assert cost["official"]["run_rented"] == pytest.approx(5.576e6)
    assert cost["programme"]["assumed"]["attempts"]["source"].startswith("GPT-3")
    kinds = [it["kind"] for it in numbers(SCHEDULES)["schedules"]]
    assert kinds == ["1f1b", "zb1p", "zb-v", "dualpipe", "dualpipev"]


class Page(HTMLParser):
    """Checks that elements close in order, and collects their names."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", PAGES)
def test_every_page_stands_alone(name: str, tmp_path: Path):
    file = tmp_path / "page.html"
    run(f"{PAGES[name]} --html {file}")
    text = file.read_text()
    page = Page(text)
    assert not page.open
    assert {"svg", "table", "h1", "h2"} <= set(page.seen)
    outside = text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?://|@import|<script|<link|<iframe|url\(", outside)
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert used <= set(re.findall(r"(--[\w-]+):", text))
    assert "nan" not in re.findall(r'(?:width|x|y|points)="([^"]*)"', text)


def test_a_schedule_is_drawn(tmp_path: Path):
    file = tmp_path / "picture.svg"
    shown = run(f"schedule --pp 4 --micro-batches 8 --kind zb-v --draw {file}")
    assert file.read_text().startswith("<svg")
    assert "dualpipe " not in shown.split("pp counts")[0]


WRONG = {
    "": [
        ("v3 --gpus 2048 --gpu h800", "the models are"),
        ("v3-671b --gpus 2048 --gpu h900", "known are"),
        ("v3-671b --gpus 2048 --gpu a100 --layout fp8", "has no fp8; it has bf16"),
        (f"{DEEPSEEK} --layout tp8", "'tp8' is no word of a layout; allowed are ppN, epN"),
        (f"{DEEPSEEK} --layout pp3", "pp3 x dp682 is not 2048 GPUs"),
        (f"{DEEPSEEK} --layout pp16,ep48", "ep48 must divide"),
        (f"{DEEPSEEK} --layout pp16,dp64", "pp16 x dp64 is not 2048 GPUs"),
        (f"{DEEPSEEK} --batch-rows 7", "a batch of 7 rows does not divide"),
        (f"{DEEPSEEK} --network sneakernet", "allowed are ft2, mpft, ft3"),
    ],
    "serve": [
        ("nothing --gpu h800", "is no model"),
        ("v3-671b --gpu h80", "did you mean h800"),
        ("v3-671b --gpu h800 --gpus 8", "20.7 GiB more.*nearest that fits one is 16 GPUs"),
        ("v3-671b --gpu h800 --gpus 16 --batch 500", "GiB more than can be used; 54 such"),
        ("v3-671b --gpu h800 --gpus 144 --redundant 31", "32 redundant ones do"),
        ("v3-671b --gpu h800 --gpus 144 --tp 5", "tp 5 must divide the 144 GPUs"),
        ("v3-671b --gpu h800 --gpus 144 --tp 16", "within a node of 8"),
        ("qwen-2.5-72b --gpu h800 --redundant 2", "qwen-2.5-72b has 0"),
        ("llama-3.1-405b --gpu rtx-4090", "no unit of up to 4,096"),
        ("v3-671b --gpu a100 --weights fp8", "has no fp8"),
        ("v3-671b --gpu h800 --batch -1", "batch is -1"),
        ("v3-671b --gpu h800 --gpus 0", "gpus is 0"),
        ("v3-671b --gpu h800 --context 0", "context is 0"),
        ("v3-671b --gpu h800 --window 0", "window is 0"),
        ("v3-671b --gpu h800 --slowest-ms -1", "must be above 0"),
        ("v3-671b --gpu h800 --hit-rate 1", "hit rate is 1"),
        ("v3-671b --gpu h800 --price-miss -0.1", "price miss is -0.1"),
        ("v3-671b --gpu h800 --output-tokens nan", "output_tokens is nan"),
    ],
    "network": [
        ("--endpoints 300000", "dragonfly connects at most 262,656 endpoints, not 300,000"),
        ("--endpoints 0", "at least 1"),
        ("--endpoints -7", "at least 1"),
        ("--mib 0", "above 0"),
        ("--switch-price -1", "price switch is -1"),
        ("--gpu h801", "did you mean"),
    ],
    "cost": [
        ("--gpu b200", "price of a b200 server is not known here: give --gpu-price"),
        ("--gpu h80", "price of a h80 server"),
        ("--gpu h80 --gpu-price 1", "did you mean"),
        ("--rent -1", "rent is -1"),
        ("--attempts 0.5", "at least 1"),
        ("--use 0", "must be above 0"),
        ("--lifetime 0", "must be above 0"),
        ("--people -3", "a cost or count is -3"),
        ("--gpus 0", "at least 1"),
        ("--gpus 300000", "at most 262,656"),
        ("--gpu-hours 0", "must be above 0"),
        ("--kwh-price nan", "a cost or count is nan"),
        ("--html /no/x.html", "cannot be written"),
    ],
    "schedule": [
        ("--pp 8 --micro-batches 20 --draw x.svg", "--draw needs --kind"),
        ("--pp 8 --micro-batches 20 --kind zb2", "there is no schedule"),
        ("--pp 0 --micro-batches 20", "1 or more stages"),
        ("--pp 8 --micro-batches 20 --forward 0", "must be above 0"),
        ("--pp 2 --micro-batches 4 --kind 1f1b --draw /no/x.svg", "cannot be written"),
    ],
}


@pytest.mark.parametrize(
    ("words", "message"),
    [(f"{command} {words}", message) for command, them in WRONG.items() for words, message in them],
)
def test_what_is_wrong_is_told_in_a_line(words: str, message: str):
    with pytest.raises(UserError, match=message) as caught:
        run(words)
    assert "\n" not in str(caught.value)


def test_the_command_line_starts_without_the_planner():
    code = "import sys, whalefall.cli; assert not [it for it in sys.modules if 'fall.plan' in it]"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_planning_needs_no_torch():
    code = (
        "import sys, pkgutil, importlib, whalefall.plan as plan\n"
        "for module in pkgutil.iter_modules(plan.__path__):\n"
        "    importlib.import_module(f'whalefall.plan.{module.name}')\n"
        "plan.claims.claims_report()\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
