"""Peak memory of the loss at the vocabulary of V3: linear_cross_entropy beside transformers' loss.

Each loss runs forward and backward in a process of its own. What is counted is the highest
resident memory during the run above what lies there before it (hidden states, head) and what
must remain after it (their gradients): the price of the loss itself. On CUDA it is the
allocator's peak. Exits with 1 where ours takes more than 1 GiB.

    python benchmarks/loss_memory.py --hidden 1024 --json benchmarks/results/loss_memory.json
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import write_result
from rich.console import Console
from rich.table import Table
from torch import Tensor

from whalefall.ops.cross_entropy import linear_cross_entropy

LIMIT_MIB = 1024
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    weights = torch.full((len(targets),), 1 / len(targets), device=hidden.device)
    return linear_cross_entropy(hidden, head, targets, weights)[0]


def transformers(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """The head and the loss of its causal language models: F.cross_entropy(logits.float())."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    return ForCausalLMLoss(hidden @ head.T, None, len(head), shift_labels=targets)


LOSSES: dict[str, Loss] = {"whalefall": ours, "transformers": transformers}


class PeakMemory:
    """Bytes in use now, and the most since this object was made."""

    def __init__(self, device: str):
        self.on_cuda = device == "cuda"
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS

    def now(self) -> int:
        return torch.cuda.memory_allocated() if self.on_cuda else self._resident("VmRSS")

    def highest(self) -> int:
        return torch.cuda.max_memory_allocated() if self.on_cuda else self._resident("VmHWM")

    def _resident(self, field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def measure(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Loss and peak memory of one loss, in this process."""
    generator = torch.Generator(options.device).manual_seed(0)
    like = {
        "device": options.device,
        "dtype": getattr(torch, options.dtype),
        "generator": generator,
    }

    def problem(tokens: int, vocab: int) -> tuple[Tensor, Tensor, Tensor]:
        hidden = torch.randn(tokens, options.hidden, **like)
        head = torch.randn(vocab, options.hidden, **like).mul_(0.006)
        targets = torch.randint(vocab, (tokens,), device=options.device, generator=generator)
        return hidden.requires_grad_(), head.requires_grad_(), targets

    LOSSES[name](*problem(8, 16)).backward()  # libraries load here
    hidden, head, targets = problem(options.tokens, options.vocab)
    memory = PeakMemory(options.device)
    before = memory.now()
    loss = LOSSES[name](hidden, head, targets)
    loss.backward()
    gradients = sum(x.grad.numel() * x.grad.element_size() for x in (hidden, head))
    return {"loss": loss.item(), "peak_mib": (memory.highest() - before - gradients) / 2**20}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=129280)
    parser.add_argument("--hidden", type=int, default=7168)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--only", choices=LOSSES, help="measure one loss here, print it as JSON")
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return 0
    results = {}
    for name in LOSSES:
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        results[name] = json.loads(output.splitlines()[-1])

    shape = f"{options.tokens:,} tokens, vocabulary {options.vocab:,}, hidden {options.hidden:,}"
    table = Table("loss", "nats", "peak MiB", title=f"{shape}, {options.dtype}, {options.device}")
    for name, result in results.items():
        table.add_row(name, f"{result['loss']:.4f}", f"{result['peak_mib']:,.0f}")
    Console().print(table)
    if options.json:
        settings = {key: vars(options)[key] for key in ("tokens", "vocab", "hidden", "dtype")}
        write_result(options.json, {**settings, "limit_mib": LIMIT_MIB, "results": results})
    return int(results["whalefall"]["peak_mib"] > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
