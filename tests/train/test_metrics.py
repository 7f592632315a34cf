"""Records and where they go."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from whalefall.config.model import ModelConfig
from whalefall.config.train import DataConfig, LoggingConfig, TrainConfig
from whalefall.train.console import ConsoleSink
from whalefall.train.metrics import JsonLines, Speed, TensorBoard, flops_per_token, read_records


def step(number: int) -> dict[str, Any]:
    return {
        "step": number, "tokens": number * 100, "rows": 4, "loss": 2.5, "main": 2.0, "mtp": [1.0],
        "balance": 1.5, "learning_rate": 1e-3, "gradient_norm": 0.5, "seconds": 0.5,
        "tokens_per_second": 200.0, "max_violation": [0.5, 0.25],
        "expert_load": [[0.75, 0.25], [0.375, 0.625]],
    }  # fmt: skip


def evaluation(number: int) -> dict[str, Any]:
    return {"step": number, "tokens": number * 100, "heldout_bits_per_byte": 1.25}


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(path, step=0)
    for number in range(1, 7):
        sink.write(step(number))
    sink.write(evaluation(6))
    sink.close()
    with path.open("a") as file:
        file.write('{"step": 7, "tok')  # killed in the middle of a line
    sink = JsonLines(path, step=4)
    sink.write(step(5))
    sink.close()
    assert read_records(path) == [step(number) for number in range(1, 6)]
    assert list(tmp_path.iterdir()) == [path]


def test_tensorboard(tmp_path: Path) -> None:
    sink = TensorBoard(tmp_path, step=0)
    sink.write(step(1))
    sink.write(evaluation(1))
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()

    def value(tag: str) -> float:
        return events.Scalars(tag)[0].value

    assert value("train/loss") == 2.5
    assert value("train/mtp_1") == 1.0
    assert value("evaluation/heldout_bits_per_byte") == 1.25
    assert value("max_violation/layer_1") == 0.25
    assert value("least_load/layer_1") == 0.375


def test_deepseek_v3_takes_250_gigaflop_a_token() -> None:
    """6 x 36.63 B + 30.7 GFLOP of causal MLA (arXiv 2505.09343, table 2)."""
    assert flops_per_token(ModelConfig(), 4096) == pytest.approx(250.5e9, rel=1e-3)


def test_mfu_of_the_papers_run() -> None:
    """272.80 B tokens a day on 2048 H800 are 38.94 % of BF16's peak (table 4)."""
    config = TrainConfig(
        data=DataConfig(sequence_length=4096), logging=LoggingConfig(peak_tflops=2048 * 989)
    )
    record = Speed(config, torch.device("cpu")).record(int(272.80e9), 24 * 3600.0)
    assert record["mfu"] == pytest.approx(0.3894, rel=5e-3)


def test_no_mfu_where_the_peak_is_unknown(tiny_config: ModelConfig) -> None:
    record = Speed(TrainConfig(model=tiny_config), torch.device("cpu")).record(50, 2.0)
    assert record == {"seconds": 2.0, "tokens_per_second": 25.0}


def test_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(1000.0, Console(file=out, width=200))
    sink.write(step(1))
    sink.write(evaluation(1))
    sink.write(step(2))
    sink.close()
    first, scored, second = out.getvalue().splitlines()
    assert first.startswith("step 1/10 · loss 2.5000 · 200 tokens/s · MaxVio 0.50 · lr 1.00e-03")
    assert first.endswith("0:00:04 left")
    assert scored == "step 1: held-out 1.2500 bits/byte"
    assert "held-out 1.2500 bits/byte" in second
    assert "\x1b" not in out.getvalue()


def test_a_live_line_in_a_terminal() -> None:
    out = io.StringIO()
    sink = ConsoleSink(1000.0, Console(file=out, width=200, force_terminal=True))
    sink.write(step(3))
    sink.close()
    assert "step 3/10" in out.getvalue()
