"""Training speed on one GPU: us in BF16 and FP8, and `transformers`; random tokens.

    python benchmarks/train_gpu.py [--network bench-6b] [--rows 4] [--rounds 2] [--json PATH]

Every measurement is a process of its own (the networks do not fit side by side), and the rounds
alternate. MTP is off, because the peer trains none. "same types" updates BF16 weights and moments,
as the peer does; "FP32 masters" is our default.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from common import write_result

from whalefall.config.load import load_config
from whalefall.config.model import ModelConfig
from whalefall.config.train import OptimizerConfig
from whalefall.model.loss import training_loss
from whalefall.model.transformer import Transformer
from whalefall.ops.fp8_linear import Recipe
from whalefall.train.determinism import make_deterministic
from whalefall.train.metrics import flops_per_token
from whalefall.train.optimizer import AdamW

CONTENDERS = {
    "bf16": "whalefall BF16, same types as transformers",
    "bf16-masters": "whalefall BF16, FP32 masters (our default)",
    "fp8": "whalefall FP8, same types as transformers",
    "fp8-masters": "whalefall FP8, FP32 masters",
    "bf16-block": "whalefall BF16, same types, blocks recomputed",
    "fp8-selective": "whalefall FP8, same types, selective recompute",
    "bf16-deterministic": "whalefall BF16, same types, deterministic",
    "fp8-deterministic": "whalefall FP8, same types, deterministic",
    "peer": "transformers, grouped_mm experts",
    "peer-compiled": "transformers, grouped_mm experts, compiled",
}
DEFAULT = ["bf16", "fp8", "peer", "peer-compiled", "bf16-masters", "fp8-masters"]
PEAK = 990e12
"""Dense BF16 FLOPS of an H100 or H200."""


def network(name: str = "bench-6b") -> ModelConfig:
    return load_config(name).model.model_copy(update={"num_nextn_predict_layers": 0})


def our_step(config: ModelConfig, contender: str) -> Callable[[torch.Tensor], torch.Tensor]:
    precision, _, extra = contender.partition("-")
    if extra == "deterministic":
        make_deterministic(True)
    model = Transformer.create(config, device="cuda", dtype=torch.bfloat16)
    if precision == "fp8":
        model.use_recipe(Recipe(fprop=True, dgrad=True, wgrad=True))
    if extra in ("block", "selective"):
        model.recompute(extra)
    masters = "float32" if extra == "masters" else "none"
    optimizer = AdamW(model.named_parameters(), OptimizerConfig(masters=masters))

    def step(tokens: torch.Tensor) -> torch.Tensor:
        losses = training_loss(model, tokens, mtp_weight=0.0, sequence_alpha=1e-4)
        losses.total.backward()
        optimizer.step(1e-5)
        return losses.main

    return step


def peer_step(config: ModelConfig, *, compiled: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    raw = {key: value for key, value in config.to_hf().items() if key != "architectures"}
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(
            DeepseekV3Config(**raw), dtype=torch.bfloat16, experts_implementation="grouped_mm"
        )
    model.train()
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step(tokens: torch.Tensor) -> torch.Tensor:
        inputs = tokens[:, :-1]
        loss = forward(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step


def measure(name: str, contender: str, rows: int, sequence: int, steps: int) -> dict[str, float]:
    """Tokens/s over ``steps`` steps in a row after four warm-ups, and the peak of allocated memory.

    The host runs ahead of the device, as in training: nothing waits between the steps.
    """
    config = network(name)
    if contender.startswith("peer"):
        step = peer_step(config, compiled=contender == "peer-compiled")
    else:
        step = our_step(config, contender)
    batches = torch.randint(config.vocab_size, (4 + steps, rows, sequence + 1), device="cuda")
    for tokens in batches[:4]:
        loss = step(tokens)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for tokens in batches[4:]:
        loss = step(tokens)
    torch.cuda.synchronize()
    speed = steps * rows * sequence / (time.perf_counter() - began)
    return {
        "tokens_per_second": round(speed),
        "mfu_percent": round(100 * speed * flops_per_token(config, sequence) / PEAK, 1),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
        "loss": round(loss.item(), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", default="bench-6b", help="a preset")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--sequence", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.network, args.worker, args.rows, args.sequence, args.steps)))
        return
    shared = ["--network", args.network, "--rows", args.rows]
    shared += ["--sequence", args.sequence, "--steps", args.steps]
    results: dict[str, list[dict[str, float]]] = {name: [] for name in args.contenders}
    for _ in range(args.rounds):
        for name in args.contenders:
            command = [sys.executable, __file__, "--worker", name, *map(str, shared)]
            run = subprocess.run(command, capture_output=True, text=True)
            if run.returncode:
                last = (run.stderr.strip().splitlines() or ["no message"])[-1]
                print(f"{CONTENDERS[name]:45} failed: {last[:200]}", flush=True)
                continue
            results[name].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"{CONTENDERS[name]:45} {results[name][-1]}", flush=True)
    rows = [
        {"contender": CONTENDERS[name], **max(found, key=lambda row: row["tokens_per_second"])}
        for name, found in results.items()
        if found
    ]
    if args.json:
        work = {"network": args.network, "rows": args.rows, "sequence": args.sequence}
        write_result(args.json, {**work, "results": rows})


if __name__ == "__main__":
    main()
