"""What FP8 costs in loss: one network, one data order, BF16 beside FP8 and its ablations.

    whalefall data prepare SOURCES --output DATA --vocab-size 16384
    python benchmarks/fp8_loss.py DATA [--start 2.6e7] [--variants ...] [--seeds 4] [--json PATH]

Every part of DeepSeek-V3 is on; embedding, head, router, norms and attention stay in BF16 or FP32
in every variant. The two coarse ones concern activations and gradients, not weights, and keep
SwiGLU's input in BF16, as does the one with wgrad in BF16. Losses are means over windows of the
steps, compared window by window (paper, appendix B.1: below 0.25 %).

From random weights the smallest change of a bit leads another way at this size, and two BF16 runs
end about 1 % apart. So every variant runs with several seeds, each beside BF16 with the same
weights and the same data order, and the mean difference comes with its standard error. With
``--start`` all go on from networks that BF16 trained on so many tokens, one for every two seeds,
which keeps them on one way. With several GPUs, runs are side by side. ``--folder`` keeps networks
and finished runs, and nothing that is found there is run again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import write_result
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_mm

from whalefall.config.train import Phase, TrainConfig
from whalefall.model.transformer import parameter_counts
from whalefall.ops import fp8_linear
from whalefall.ops.quantize import E4M3_MAX, Blocks, Tiles, dequantize, quantize_blocks, scale_of
from whalefall.train.checkpoint import latest
from whalefall.train.trainer import Trainer

FP8 = {"fprop": "fp8", "dgrad": "fp8", "wgrad": "fp8"}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "bf16": {},
    "fp8": {"precision": FP8},
    "fp8, power-of-two scales": {"precision": {**FP8, "power_of_two_scales": True}},
    "fp8, one scale a tensor": {"precision": {**FP8, "power_of_two_scales": True}},
    "fp8, one scale a tensor, no fp32 promotion": {
        "precision": {**FP8, "power_of_two_scales": True}
    },
    "fp8, gradients in 128x128 blocks": {"precision": {**FP8, "power_of_two_scales": True}},
    "fp8, wgrad in bf16": {"precision": {**FP8, "wgrad": "bf16"}},
    "fp8, fp32 moments": {"precision": FP8, "optimizer": {"moment_dtype": "float32"}},
}

SEQUENCE, ROWS, WINDOW = 2048, 32, 50


def make_config(
    variant: str, seed: int, data: Path, output: Path, tokens: float, start: Path | None
) -> TrainConfig:
    base: dict[str, Any] = {
        "seed": seed if start is None else 1000 + seed,  # not the data again in the same order
        "output": str(output),
        "initialize_from": start and str(start),
        "model": {
            "vocab_size": 16384,
            "hidden_size": 1024,
            "num_hidden_layers": 10,
            "first_k_dense_replace": 1,
            "intermediate_size": 3072,
            "num_attention_heads": 8,
            "q_lora_rank": 512,
            "kv_lora_rank": 256,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 384,
            "num_nextn_predict_layers": 1,
            "max_position_embeddings": SEQUENCE,
            "rope_scaling": None,
        },
        "data": {"sources": [{"path": str(data)}], "sequence_length": SEQUENCE},
        "schedule": {
            "total_tokens": tokens,
            "warmup_steps": 100 if start is None else 30,
            "learning_rate": [
                {"value": 4e-4, "until": tokens / 3},
                {"value": 4e-6, "until": tokens, "shape": "cosine"},
                {"value": 4e-6},
            ],
            "batch_rows": [{"value": ROWS}],
            "bias_update_speed": [{"value": 0.001}],
            "mtp_weight": [{"value": 0.3}],
        },
        "ema": {"enabled": False},
        "evaluation": {"every_steps": 10**9, "rows": 64},
        "checkpoint": {"every_steps": 10**9, "keep": 1},
        "logging": {"tensorboard": False},
        "runtime": {"device": "cuda"},
    }
    for section, values in VARIANTS[variant].items():
        base[section] = {**base.get(section, {}), **values}
    return TrainConfig.model_validate(base)


# With scales that are powers of two, the 1x128 tiles that follow represent a rounded tensor
# exactly: their own scales are smaller powers of two. So the coarse rounding is the only one.


def by_tensor(x: Tensor) -> Tensor:
    """x in E4M3 with one scale, back in its type."""
    scale = scale_of(x.abs().amax().float(), power_of_two=True)
    values = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (values.float() * scale).to(x.dtype)


def by_block(x: Tensor) -> Tensor:
    """x in E4M3 with a scale for each 128 x 128 block, back in its type."""
    return dequantize(quantize_blocks(x, power_of_two=True), x.dtype)


def unpromoted(a: Tiles, b: Tiles | Blocks, dtype: torch.dtype) -> Tensor:
    """a b^T with one scale a tensor, summed by the tensor core alone (about 14 bits)."""
    operands = []
    for x in (dequantize(a, torch.float32), dequantize(b, torch.float32)):
        scale = scale_of(x.abs().amax(), power_of_two=True)  # rounds nothing again
        operands.append(((x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale))
    (x, scale_x), (y, scale_y) = operands
    whole = ScalingType.TensorWise
    return scaled_mm(
        x, y.T, scale_x, whole, scale_y, whole, output_dtype=dtype, use_fast_accum=True
    )


@contextmanager
def coarser(variant: str) -> Iterator[None]:
    """Replace the quantization of activations or gradients by the variant's; experts unfused.

    Without promotion are the dense products only: no library has them grouped.
    """
    if variant.endswith("no fp32 promotion"):
        fp8_linear.gemm = fp8_linear.gemm_wgrad = unpromoted
        variant = "fp8, one scale a tensor"
    original: Callable[..., Any] = fp8_linear.quantized

    def quantized(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        # Gradients are quantized in the backward pass, where nothing records.
        is_gradient = torch._C._current_graph_task_id() != -1
        if variant == "fp8, one scale a tensor":
            x = by_tensor(x)
        elif is_gradient:
            x = by_block(x)
        return original(x, *args, **kwargs)

    if variant not in ("fp8, one scale a tensor", "fp8, gradients in 128x128 blocks"):
        yield
        return
    fp8_linear.quantized = quantized
    fp8_linear.Recipe.is_complete = False
    yield


class Losses:
    """A sink that keeps each step's main loss."""

    def __init__(self) -> None:
        self.main: list[float] = []
        self.seconds = 0.0
        self.bits_per_byte = 0.0

    def write(self, record: Any) -> None:
        if "main" in record:
            self.main.append(record["main"])
            self.seconds += record["seconds"]
        else:
            self.bits_per_byte = record["heldout_bits_per_byte"]

    def close(self) -> None:
        pass


def train_start(seed: int, data: Path, tokens: float, folder: Path) -> None:
    """A network for others to start from: BF16, its rate not lowered."""
    config = make_config("bf16", seed, data, folder, tokens, None)
    constant = config.schedule.model_copy(update={"learning_rate": [Phase(value=4e-4)]})
    Trainer(config.model_copy(update={"schedule": constant}), sinks=[Losses()]).run()


def train(variant: str, seed: int, data: Path, tokens: float, start: Path | None) -> dict[str, Any]:
    losses = Losses()
    with TemporaryDirectory() as output, coarser(variant):
        config = make_config(variant, seed, data, Path(output), tokens, start)
        Trainer(config, sinks=[losses]).run()
    return {
        "variant": variant,
        "seed": seed,
        "parameters": parameter_counts(config.model).total,
        "heldout_bits_per_byte": round(losses.bits_per_byte, 4),
        "tokens_per_second": round(len(losses.main) * ROWS * SEQUENCE / losses.seconds),
        "main": losses.main,
    }


def windows(main: list[float]) -> Tensor:
    return torch.tensor(main[: len(main) // WINDOW * WINDOW]).unflatten(0, (-1, WINDOW)).mean(1)


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Relative difference to BF16 of the same seed in the last fifth of the run, over the seeds."""
    runs = sorted(runs, key=lambda run: run["seed"])
    bf16 = {run["seed"]: windows(run["main"]) for run in runs if run["variant"] == "bf16"}
    rows = []
    for variant in VARIANTS:
        of_variant = [run for run in runs if run["variant"] == variant and run["seed"] in bf16]
        if not of_variant:
            continue
        losses = torch.stack([windows(run["main"]) for run in of_variant])
        relative = losses / torch.stack([bf16[run["seed"]] for run in of_variant]) - 1
        fifth = max(1, losses.shape[1] // 5)
        ends = 100 * relative[:, -fifth:].mean(1)
        error = ends.std() / len(ends) ** 0.5 if len(ends) > 1 else torch.tensor(float("nan"))
        rows.append(
            {
                "variant": variant,
                "parameters": of_variant[0]["parameters"],
                "tokens_per_second": max(run["tokens_per_second"] for run in of_variant),
                "heldout_bits_per_byte": [run["heldout_bits_per_byte"] for run in of_variant],
                "final_loss": round(losses[:, -fifth:].mean().item(), 4),
                "difference_percent": round(ends.mean().item(), 3),
                "standard_error_percent": round(error.item(), 3),
                "seeds": [run["seed"] for run in of_variant],
                "by_seed_percent": [round(end, 3) for end in ends.tolist()],
                "losses": [round(loss, 4) for loss in losses.mean(0).tolist()],
                "differences": [round(100 * d, 3) for d in relative.mean(0).tolist()],
            }
        )
    chance = torch.stack([*bf16.values()])
    spread = 100 * (chance.std(0) / chance.mean(0))[-max(1, chance.shape[1] // 5) :].mean()
    print(f"BF16 runs of different seeds end {spread:.2f} % apart (standard deviation)")
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    curves, differences = figure.subplots(1, 2)
    for row in rows:
        steps = [WINDOW * (index + 1) for index in range(len(row["losses"]))]
        seeds = len(row["by_seed_percent"])
        label = f"{row['variant']} ({seeds} runs)"
        differences.plot(steps, row["differences"], label=label, linewidth=1)
        if seeds == len(rows[0]["by_seed_percent"]):  # the mean of other runs is another curve
            curves.plot(steps, row["losses"], linewidth=1)
    curves.set(xlabel="step", ylabel="loss (nats a token)")
    differences.legend(fontsize=6)
    differences.axhspan(-0.25, 0.25, color="0.92")
    differences.set(xlabel="step", ylabel="difference to bf16 (%)", ylim=(-0.5, 0.5))
    figure.savefig(path, dpi=150)


class Pool:
    """Runs this script once for each case, a case a GPU."""

    def __init__(self) -> None:
        self.free: Queue[int] = Queue()
        for gpu in range(torch.cuda.device_count()):
            self.free.put(gpu)
        self.size = self.free.qsize()

    def run(self, *arguments: object) -> str | None:
        """The last line that the case printed; None if it failed."""
        gpu = self.free.get()
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": str(gpu)}
        command = [sys.executable, __file__, *map(str, arguments)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
        finally:
            self.free.put(gpu)
        print(*arguments[1:], "failed: " + done.stderr[-1500:] if done.returncode else "done")
        sys.stdout.flush()
        return None if done.returncode else done.stdout.splitlines()[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--tokens", type=float, default=6e7)
    parser.add_argument("--start", type=float, default=0.0, help="tokens of BF16 before all others")
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_loss"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--worker", choices=["start", *VARIANTS], help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker == "start":
        train_start(args.seed, args.data, args.start, args.folder / f"start-{args.seed}")
        print("saved")
        return
    start = args.folder / f"start-{args.seed // 2}" if args.start and args.worker else None
    if args.worker:
        print(json.dumps(train(args.worker, args.seed, args.data, args.tokens, start)))
        return

    pool = Pool()
    if not pool.size:
        parser.error("this needs a CUDA device")
    # What is found there must be of the same length.
    args.folder /= f"{args.start:g}+{args.tokens:g}"
    runs = args.folder / "runs.jsonl"
    args.folder.mkdir(parents=True, exist_ok=True)
    shared = ("--tokens", args.tokens, "--start", args.start, "--folder", args.folder)

    def run(case: tuple[int, str]) -> None:
        seed, variant = case
        line = pool.run(args.data, "--worker", variant, "--seed", seed, *shared)
        if line is not None and variant != "start":
            with runs.open("a") as finished:
                finished.write(line + "\n")

    with ThreadPoolExecutor(pool.size) as threads:
        if args.start:
            starts = [(number, "start") for number in range((args.seeds + 1) // 2)]
            missing = [case for case in starts if not latest(args.folder / f"start-{case[0]}")]
            list(threads.map(run, missing))
        known = map(json.loads, runs.read_text().splitlines()) if runs.exists() else []
        ended = {(found["seed"], found["variant"]) for found in known}
        variants = ["bf16", *(name for name in args.variants if name != "bf16")]
        cases = [(seed, variant) for variant in variants for seed in range(args.seeds)]
        list(threads.map(run, [case for case in cases if case not in ended]))
    rows = compare([json.loads(line) for line in runs.read_text().splitlines()])
    for row in rows:
        print({k: v for k, v in row.items() if k not in ("losses", "differences")}, flush=True)
    if args.plot:
        plot(rows, args.plot)
    if args.json:
        work = {"tokens": args.tokens, "tokens_before_in_bf16": args.start, "window": WINDOW}
        write_result(args.json, {**work, "results": rows})


if __name__ == "__main__":
    main()
