"""FP8 runs: from the configuration to the products, on whatever device there is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from whalefall.config.train import PrecisionConfig, TrainConfig
from whalefall.errors import UserError
from whalefall.model.feed_forward import Experts
from whalefall.model.linear import Linear
from whalefall.ops.fp8_linear import Recipe
from whalefall.train.metrics import read_records
from whalefall.train.precision import recipe
from whalefall.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]
FP8: dict[str, Any] = {"fprop": "fp8", "dgrad": "fp8", "wgrad": "fp8"}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
}
"""Multiples of 16, as FP8 wants them."""


def losses_of(config: TrainConfig) -> list[float]:
    """The main loss of every step of the run."""
    Trainer(config, sinks=[]).run()
    records = read_records(config.output / "metrics.jsonl")
    return [record["main"] for record in records if "main" in record]


def test_a_recipe_is_what_the_precision_says() -> None:
    cpu = torch.device("cpu")
    assert recipe(PrecisionConfig(), cpu) is None
    assert recipe(PrecisionConfig(fprop="bf16"), cpu) is None
    assert recipe(PrecisionConfig(**FP8), cpu) == Recipe(True, True, True)
    mixed = PrecisionConfig(fprop="fp8", dgrad="fp8", wgrad="bf16", power_of_two_scales=True)
    assert recipe(mixed, cpu) == Recipe(True, True, False, power_of_two=True)


def test_a_gpu_without_the_tensor_cores_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(UserError, match=r"compute capability 9 .*NVIDIA A100 has 8\.0"):
        recipe(PrecisionConfig(**FP8), torch.device("cuda"))


def test_a_gpu_wants_bf16_beside_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(UserError, match=r"precision\.working=bf16"):
        recipe(PrecisionConfig(working="fp32", **FP8), torch.device("cuda"))


def test_all_projections_and_experts_follow_and_nothing_else(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(model=SIZES, precision=FP8), sinks=[])
    names = {
        name
        for name, module in trainer.model.named_modules()
        if isinstance(module, Linear | Experts)
    }
    assert all(dict(trainer.model.named_modules())[name].recipe is not None for name in names)
    weights = {name for name, p in trainer.model.named_parameters() if p.ndim > 1}
    others = {weight for weight in weights if not any(weight.startswith(n + ".") for n in names)}
    kept = {"model.embed_tokens.weight", "lm_head.weight"}
    assert {name for name in others if "gate.weight" not in name} == kept


def test_the_loss_follows_the_working_precision(make_config: MakeConfig) -> None:
    losses = {}
    for name, precision in (("fp32", {}), ("fp8", FP8), ("wgrad fp32", {**FP8, "wgrad": "fp32"})):
        losses[name] = losses_of(make_config(name, model=SIZES, precision=precision))
    assert len({tuple(run) for run in losses.values()}) == 3
    assert losses["fp8"][-1] < losses["fp8"][0] - 0.3
    for name in ("fp8", "wgrad fp32"):
        assert losses[name][-1] == pytest.approx(losses["fp32"][-1], rel=0.01)


def test_sizes_that_fp8_cannot_take_are_named(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"multiples of 16, but model\.layers\.0\..* is \d+ x \d+"):
        Trainer(make_config(model={**SIZES, "q_lora_rank": 24}, precision=FP8), sinks=[])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, FP8])
@pytest.mark.parametrize("micro_batch_rows", [None, 2])
def test_the_host_waits_for_nothing_in_a_step(
    make_config: MakeConfig, precision: dict[str, Any], micro_batch_rows: int | None
) -> None:
    config = make_config(
        model=SIZES,
        precision={"working": "bf16", **precision},
        optimizer={"moment_dtype": "bfloat16", "micro_batch_rows": micro_batch_rows},
        evaluation={"every_steps": 1000, "rows": 4},
        checkpoint={"every_steps": 1000, "keep": 1},
        logging={"tensorboard": False, "every_steps": 1000},
        ema={"enabled": False},
        runtime={"device": "cuda"},
    )
    trainer = Trainer(config, sinks=[])
    for _ in range(2):  # compiles kernels, fills caches
        trainer._step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            trainer._step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer._settle()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [{}, FP8])
def test_deterministic_runs_have_the_same_bits(
    make_config: MakeConfig, precision: dict[str, Any]
) -> None:
    sections = {
        "model": SIZES,
        "precision": {"working": "bf16", **precision},
        "runtime": {"device": "cuda", "deterministic": True},
    }
    once, twice = (losses_of(make_config(name, **sections)) for name in ("once", "twice"))
    assert once == twice
