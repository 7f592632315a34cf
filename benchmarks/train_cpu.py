"""Training speed on a CPU: us and `transformers`, the same networks, in turn, in FP32.

    python benchmarks/train_cpu.py [--rounds 8] [--json PATH]

A step is forward, backward, clipping and torch's fused AdamW for both; our sequence-wise balance
loss is on. MTP is off, because the peer trains none. The peer runs as it comes: SDPA attention and
`grouped_mm` experts.
"""

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from common import NETWORKS, alternate, peer_model, write_result
from rich.console import Console
from rich.table import Table

from whalefall.model.loss import training_loss
from whalefall.model.transformer import Transformer, parameter_counts

SHAPES = ((4, 512), (2, 1024))
"""Rows a step, tokens a row."""


def our_step(model: Transformer, tokens: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        losses = training_loss(model, tokens, mtp_weight=0.0, sequence_alpha=1e-4)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return losses.main.item()

    return step


def peer_step(model: torch.nn.Module, tokens: torch.Tensor) -> Callable[[], object]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    inputs = tokens[:, :-1].contiguous()
    model.train()

    def step() -> float:
        # It shifts the labels itself.
        loss = model(input_ids=inputs, labels=inputs, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    table = Table("network", "active", "rows", "ours tok/s", "transformers tok/s", "ratio")
    results = []
    for (name, config), (rows, seq) in product(NETWORKS.items(), SHAPES):
        model = Transformer.create(config)
        tokens = torch.randint(config.vocab_size, (rows, seq + 1))
        contenders = {
            "ours": our_step(model, tokens),
            "transformers": peer_step(peer_model(model), tokens),
        }
        speed = {who: rows * seq / s for who, s in alternate(contenders, args.rounds).items()}
        ratio = speed["ours"] / speed["transformers"]
        active = parameter_counts(config).active
        results.append(
            {
                "network": name,
                "active": active,
                "rows": rows,
                "sequence": seq,
                **{f"{who} tokens/s": round(value) for who, value in speed.items()},
                "ratio": round(ratio, 2),
            }
        )
        table.add_row(
            name, f"{active / 1e6:.1f} M", f"{rows} x {seq}",
            *(f"{value:,.0f}" for value in speed.values()), f"{ratio:.2f}",
        )  # fmt: skip
    Console().print(table)
    if args.json:
        write_result(args.json, {"results": results})


if __name__ == "__main__":
    main()
