"""Where our figures for claims come from: answers, results, and arithmetic that neither prints."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import yaml

from whalefall.config import load_config
from whalefall.parallel.eplb import place_experts
from whalefall.plan.answers import ANSWERS
from whalefall.plan.decode import exchange_seconds
from whalefall.plan.flops import published_dense_flops, training_flops
from whalefall.plan.hardware import load_hardware
from whalefall.plan.layout import Layout
from whalefall.plan.models import architecture_of
from whalefall.plan.network import published_table
from whalefall.plan.network_cost import UnitPrices
from whalefall.plan.report import plain
from whalefall.plan.serving import plan_serving
from whalefall.plan.unit import token_bytes
from whalefall.plan.units import DAY

Value = float | str


@cache
def answer_to(command: str) -> Any:
    """The numbers of ``whalefall plan ...``, whose options all have a value."""
    name, *words = command.removeprefix("whalefall plan ").split()
    if name not in ANSWERS:  # it is a model
        name, words = "train", [name, *words]
    model = words[: len(words) % 2]
    names, values = words[len(model) :: 2], words[len(model) + 1 :: 2]
    options = {it[2:].replace("-", "_"): value for it, value in zip(names, values, strict=True)}
    given = {option: yaml.safe_load(value) for option, value in options.items()}
    return plain(ANSWERS[name](*model, **given).numbers)


def follow(numbers: Any, path: str) -> Any:
    """What ``a > b > c`` leads to. A row of a list goes by its first value; of a list of numbers
    it is the largest.

    Raises:
        LookupError, TypeError, StopIteration: there is no such thing.
    """
    for step in path.split(" > "):
        if isinstance(numbers, list):
            numbers = {str(next(iter(row.values()))): row for row in numbers}
        numbers = numbers[step]
    return max(numbers) if isinstance(numbers, list) else numbers


def mfu_of_the_speed() -> float:
    """Of 272.80 B tokens a day on 2,048 GPUs ([B] table 4)."""
    flops = training_flops(architecture_of("v3-671b"), 4096) * 272.80e9 / DAY / 2048
    return flops / (1e12 * load_hardware("h800").peak_tflops["bf16"])


def fp8_over_bf16() -> float:
    peak = load_hardware("h800").peak_tflops
    return peak["fp8"] / peak["bf16"]


def eplb_example() -> str:
    loads = [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86]
    placed = place_experts(loads, slots=16, gpus=8, nodes=2, groups=4)
    return " ".join(str(expert) for gpu in placed for expert in gpu)


def deepep_microseconds() -> float:
    unit = plan_serving("v3-671b", gpu="h800", gpus=128).unit
    return 1e6 * exchange_seconds(unit, unit.architecture.experts[0], 128)


def mean_cache() -> float:
    """KB of a token, of the two other networks of [B] table 1."""
    models = ("qwen-2.5-72b", "llama-3.1-405b")
    return sum(token_bytes(architecture_of(model)) for model in models) / 2e3


def gate() -> str:
    config = load_config("v3-671b").model
    return f"{config.scoring_func}, top-{config.num_experts_per_tok}, a bias for balance"


def gflop_by_rule(model: str) -> float:
    return published_dense_flops(architecture_of(model)) / 1e9


COMPUTED: Mapping[str, Callable[[], Value]] = {
    "gflop-qwen": lambda: gflop_by_rule("qwen-2.5-72b"),
    "gflop-llama": lambda: gflop_by_rule("llama-3.1-405b"),
    "mfu-of-the-speed": mfu_of_the_speed,
    "network-cost": lambda: ", ".join(
        f"{UnitPrices().of(it) / 1e6:.0f}" for it in published_table()
    ),
    "eplb": eplb_example,
    "deepep": deepep_microseconds,
    "fp8-peak": fp8_over_bf16,
    "article-kv-average": mean_cache,
    "article-utilisation": mfu_of_the_speed,
    "article-mtp": lambda: (
        f"{architecture_of('v3-671b').mtp_depth} token, which the network itself verifies"
    ),
    "article-router": gate,
    "article-zero": lambda: f"ZeRO-{Layout().zero}",
}
"""By the claim's id, as ``MEASURED``."""


def _mtp_speed(result: Any) -> float:
    with_draft, without = (
        follow(result, f"one_request > {drafts} > tokens_per_second") for drafts in (1, 0)
    )
    return float(with_draft / without)


def _loss_difference(result: Any, variant: str) -> float:
    """Of the last steps, over BF16's."""
    return float(follow(result, f"results > {variant} > difference_percent")) / 100


def _slowest(result: Any, *kernels: str) -> float:
    """TFLOPS, of all shapes of the kernels."""
    return min(row["ours_tflops"] for row in result["results"] if row["name"].startswith(kernels))


MEASURED: Mapping[str, Callable[[Any], Value]] = {
    "mtp-speed": _mtp_speed,
    "fp8-loss": lambda it: abs(_loss_difference(it, "fp8")),
    "fp8-blocks": lambda it: (
        f"{_loss_difference(it, 'fp8, gradients in 128x128 blocks'):+.2%} of the loss"
    ),
    "fp8-dense": lambda it: _slowest(it, "fprop 4096 x", "dgrad 4096 x"),
    "fp8-grouped": lambda it: _slowest(it, "grouped_gemm 8192 x"),
}
