"""What a run says about itself: one record a step, to as many sinks as listen."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils.tensorboard import SummaryWriter

from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.model.transformer import parameter_counts

Record = Mapping[str, Any]
"""A step: step, tokens, loss, main, mtp, balance, learning_rate, gradient_norm, rows, seconds,
tokens_per_second, mfu (where the peak is known), and per layer max_violation and expert_load
(shares). An evaluation: step, tokens, heldout_bits_per_byte, ema_heldout_bits_per_byte. ``step``
counts the steps taken, this one included."""

# Dense BF16 TFLOPS of the data sheets, by a part of the device's name.
_PEAK_TFLOPS = {"H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148,
                "B200": 2250, "A100": 312, "A800": 312, "L40S": 362, "RTX 4090": 165}  # fmt: skip


@runtime_checkable
class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


class Broadcast:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[Sink]):
        self._sinks = sinks

    def write(self, record: Record) -> None:
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """``metrics.jsonl``, one object a line. Records after ``step`` are dropped on opening: a run
    that was killed after its last checkpoint writes them again."""

    def __init__(self, path: Path, step: int):
        history = read_records(path) if path.exists() else []
        kept = [json.dumps(record) + "\n" for record in history if record["step"] <= step]
        # Replaced, not cut in place: a kill at this point must not lose the history.
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class TensorBoard:
    """Scalars for TensorBoard; the spread over experts as their extremes in each layer."""

    def __init__(self, folder: Path, step: int):
        self._writer = SummaryWriter(str(folder), purge_step=step + 1)

    def write(self, record: Record) -> None:
        group = "evaluation" if "heldout_bits_per_byte" in record else "train"
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])
        for depth, loss in enumerate(record.get("mtp", []), start=1):
            self._writer.add_scalar(f"train/mtp_{depth}", loss, record["step"])
        for layer, loads in enumerate(record.get("expert_load", [])):
            violation = record["max_violation"][layer]
            self._writer.add_scalar(f"max_violation/layer_{layer}", violation, record["step"])
            self._writer.add_scalar(f"least_load/layer_{layer}", min(loads), record["step"])

    def close(self) -> None:
        self._writer.close()


def flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """Training FLOPs a token: 6 P + 3 L 2 n_heads (qk_head_dim + v_head_dim) S / 2.

    P is what a token meets without the input embedding; the second term is causal attention,
    forward and backward. The MTP modules are not counted, as in the paper's 250 GFLOP for
    DeepSeek-V3 at 4096 (arXiv 2505.09343, table 2).
    """
    per_position = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    attention = 3 * config.num_hidden_layers * per_position * sequence_length / 2
    return 6 * parameter_counts(config).active_without_embedding + attention


class Speed:
    """Tokens a second, and the share of the device's peak that they need (MFU)."""

    def __init__(self, config: TrainConfig, device: torch.device):
        self._flops = flops_per_token(config.model, config.data.sequence_length)
        self._peak = _peak_flops(device, config.logging.peak_tflops)

    def record(self, tokens: int, seconds: float) -> dict[str, float]:
        speed = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        if self._peak is None:
            return speed
        return {**speed, "mfu": tokens / seconds * self._flops / self._peak}


def _peak_flops(device: torch.device, tflops: float | None) -> float | None:
    """FLOPS of the device: as configured, else known by its name, else None."""
    if tflops is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tflops = next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)
    return None if tflops is None else tflops * 1e12
