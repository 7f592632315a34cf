"""The engine on a CPU: a trained model's drafts, and many requests at once beside `transformers`.

    whalefall quickstart
    python benchmarks/engine_cpu.py runs/quickstart --json benchmarks/results/engine_cpu.json

The prompts are held-out code of the run. `transformers` gets them one after the other, and all as
one padded batch; every answer is compared, token by token. Requests are of one length, which suits
a padded batch best, or of different lengths: a quarter to all of the prompt, a quarter to seven
quarters of the new tokens.
"""

import argparse
import random
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from common import alternate, peer_model, write_result
from rich.console import Console
from rich.table import Table

from whalefall.api import load
from whalefall.data.tokenizer import Tokenizer
from whalefall.engine.generate import engine_for
from whalefall.engine.request import Request
from whalefall.engine.sampling import SamplingParams
from whalefall.model.transformer import Transformer
from whalefall.report.samples import heldout_documents


def prompts_of(data: Path, tokenizer: Tokenizer, count: int, length: int) -> list[list[int]]:
    """The beginnings of held-out documents, as training saw documents begin."""
    texts = (tokenizer.encode(text)[: length - 1] for _, text in heldout_documents(data, tokenizer))
    long_enough = (tokens for tokens in texts if len(tokens) == length - 1)
    return [[tokenizer.bos_id, *tokens] for tokens in islice(long_enough, count)]


def drafting(model: Transformer, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
    """One request after the other: tokens a second, and how many drafts were right."""
    rows = []
    for drafts in range(4):
        requests = [
            Request(prompt, SamplingParams(max_tokens=new, temperature=0)) for prompt in prompts
        ]
        warm = Request(prompts[0], SamplingParams(max_tokens=new, temperature=0))
        engine_for(model, None, [warm], drafts=drafts).complete([warm])
        engine = engine_for(model, None, requests[:1], drafts=drafts)
        start = time.perf_counter()
        for request in requests:
            engine.complete([request])
        seconds = time.perf_counter() - start
        stats = engine.stats
        rows.append(
            {
                "drafts": drafts,
                "tokens_per_second": round(stats.generated_tokens / seconds, 1),
                "accepted": round(stats.accepted / max(1, stats.drafted), 3),
                "tokens_a_step": round(stats.generated_tokens / (stats.steps - len(prompts)), 2),
            }
        )
    return rows


def concurrent(
    model: Transformer, prompts: list[list[int]], new: list[int], rounds: int
) -> dict[str, float]:
    """Tokens a second of all requests together, prompts included; ``new`` tokens for each."""
    peer = peer_model(model)
    peer.generation_config.eos_token_id = None

    def ours(drafts: int) -> list[list[int]]:
        requests = [
            Request(prompt, SamplingParams(max_tokens=count, temperature=0))
            for prompt, count in zip(prompts, new, strict=True)
        ]
        engine_for(model, None, requests, drafts=drafts).complete(requests)
        return [request.tokens for request in requests]

    def theirs(prompts: list[list[int]], new: list[int]) -> list[list[int]]:
        """One batch, padded on the left, until the last one is done."""
        width = max(map(len, prompts))
        batch = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        out = peer.generate(batch, attention_mask=mask, max_new_tokens=max(new), do_sample=False)
        return [row[:count] for row, count in zip(out[:, width:].tolist(), new, strict=True)]

    contenders: dict[str, Callable[[], list[list[int]]]] = {
        "whalefall": lambda: ours(0),
        "whalefall, 1 draft": lambda: ours(1),
        "transformers, a batch": lambda: theirs(prompts, new),
        "transformers, one by one": lambda: [
            theirs([prompt], [count])[0] for prompt, count in zip(prompts, new, strict=True)
        ],
    }
    right = contenders["whalefall"]()
    for name, run in contenders.items():
        if run() != right:
            print(f"{name}: some tokens differ (ties broken by rounding)")
    seconds = alternate(contenders, rounds)
    return {name: round(sum(new) / s, 1) for name, s in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of a quickstart")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.run / "model")
    prompts = prompts_of(args.run / "data", tokenizer, args.requests, args.prompt)
    speculation = drafting(model, prompts, args.new)
    table = Table("drafts a step", "tokens/s", "of drafts right", "tokens a step")
    for row in speculation:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    draw = random.Random(0)
    cut = [prompt[: draw.randint(args.prompt // 4, args.prompt)] for prompt in prompts]
    wanted = [draw.randint(args.new // 4, args.new * 7 // 4) for _ in prompts]
    loads = {
        "of one length": (prompts, [args.new] * len(prompts)),
        "of different lengths": (cut, wanted),
    }
    together = {}
    for name, (some, new) in loads.items():
        found = together[name] = concurrent(model, some, new, args.rounds)
        table = Table(f"{len(prompts)} requests {name}", "tokens/s", "ours is faster by")
        for who, speed in found.items():
            table.add_row(who, str(speed), f"{found['whalefall'] / speed:.2f}")
        Console().print(table)
    if args.json:
        work = {"requests": len(prompts), "prompt_tokens": args.prompt, "new_tokens": args.new}
        write_result(args.json, {**work, "one_request": speculation, "together": together})


if __name__ == "__main__":
    main()
