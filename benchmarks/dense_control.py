"""Is the mixture of experts worth it? The quickstart against a dense network of its active size.

    make quickstart
    python benchmarks/dense_control.py --seeds 0 1 2 --parallel 6 --json PATH

Both read the same tokens in the same order, with the same recipe; the dense network's SwiGLU is as
wide as what one token meets in the mixture. Held-out bits per byte over the whole held-out text.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from common import write_result

from whalefall.config.load import load_config
from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.model.transformer import parameter_counts
from whalefall.train.trainer import Trainer

KINDS = ("mixture", "dense")
WHOLE_HELDOUT = 10**6
"""Rows: all there are."""


def dense_control(mixture: ModelConfig) -> ModelConfig:
    """The same network without experts, as many parameters as are active in the mixture."""
    layers = mixture.num_hidden_layers
    dense = mixture.model_copy(update={"first_k_dense_replace": layers})
    wanted = parameter_counts(mixture).active
    spare = wanted - parameter_counts(dense).active
    width = mixture.intermediate_size + round(spare / (3 * mixture.hidden_size * layers))
    return dense.model_copy(update={"intermediate_size": width})


def settings(kind: str, seed: int, data: Path, output: Path, threads: int) -> TrainConfig:
    config = load_config(
        "quickstart",
        [
            f"data.sources=[{{path: {data}}}]",
            f"output={output}",
            f"seed={seed}",
            f"runtime.threads={threads}",
            "runtime.max_minutes=null",
            "evaluation.every_steps=1000000",
            f"evaluation.rows={WHOLE_HELDOUT}",
        ],
    )
    model = config.model if kind == "mixture" else dense_control(config.model)
    return config.model_copy(update={"model": model})


def measure(kind: str, seed: int, data: Path, threads: int) -> dict[str, float | int | str]:
    with TemporaryDirectory() as folder:
        config = settings(kind, seed, data, Path(folder) / "run", threads)
        trainer = Trainer(config, sinks=[])
        result = trainer.run()
        lines = (config.output / "metrics.jsonl").read_text().splitlines()
    speeds = [
        record["tokens_per_second"] for line in lines if "loss" in (record := json.loads(line))
    ]
    counts = parameter_counts(config.model)
    assert result.heldout_bits_per_byte is not None
    return {
        "kind": kind,
        "seed": seed,
        "heldout_bits_per_byte": round(result.heldout_bits_per_byte, 4),
        "tokens_per_second": round(statistics.median(speeds)),
        "parameters": counts.total,
        "active": counts.active,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument("--threads", type=int, default=2, help="threads of each run")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        kind, seed = args.worker
        print(json.dumps(measure(kind, int(seed), args.data, args.threads)))
        return

    def run(job: tuple[int, str]) -> dict[str, float | int | str]:
        seed, kind = job
        command = [sys.executable, __file__, "--data", args.data, "--threads", args.threads]
        command += ["--worker", kind, seed]
        output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
        row = json.loads(output.stdout.splitlines()[-1])
        print(row, flush=True)
        return row

    with ThreadPoolExecutor(args.parallel) as pool:
        rows = list(pool.map(run, product(args.seeds, KINDS)))
    means = {
        kind: statistics.mean(row["heldout_bits_per_byte"] for row in rows if row["kind"] == kind)
        for kind in KINDS
    }
    print({kind: round(mean, 4) for kind, mean in means.items()})
    if args.json:
        write_result(args.json, {"mean_bits_per_byte": means, "results": rows})


if __name__ == "__main__":
    main()
