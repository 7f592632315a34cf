"""Generation on one GPU: the engine beside `transformers`, the bench-6b network, greedy.

    python benchmarks/generate_gpu.py [--batch 1 32 128 256] [--fp8] [--peer 128] [--json PATH]

Prompts of 1,024 random tokens, 128 new tokens each, random weights. Prompts and decoding are timed
apart, each as users meet it: requests go through the scheduler, tokens are read on the host. The
time of the network alone stands beside that of a step.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import peer_model, write_result
from train_gpu import network

from whalefall.config.engine import EngineConfig
from whalefall.engine.engine import Engine
from whalefall.engine.request import Request
from whalefall.engine.sampling import SamplingParams
from whalefall.model.inference import hold_fp8
from whalefall.model.transformer import Transformer

NEW = 128


def measure(engine: Engine, batch: int, prompt_length: int) -> tuple[float, float]:
    """Prompt tokens a second, and seconds of a decode step with all requests in it."""
    vocab = engine.model.config.vocab_size
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    for prompt in torch.randint(vocab, (batch, prompt_length)).tolist():
        engine.add(Request(prompt, params))
    torch.cuda.synchronize()
    start = time.perf_counter()
    begun: set[Request] = set()
    while len(begun) < batch:
        begun.update(delta.request for delta in engine.step())
    torch.cuda.synchronize()
    prompts = time.perf_counter() - start
    engine.step()  # what is in flight is not what is timed
    before, start, ended = engine.stats.generated_tokens, time.perf_counter(), False
    while not ended:
        ended = any(delta.finish_reason for delta in engine.step())
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    steps = (engine.stats.generated_tokens - before) / batch
    while engine.has_work:
        engine.step()
    return batch * prompt_length / prompts, seconds / steps


def half_way(engine: Engine, batch: int, prompt_length: int) -> None:
    """Bring requests to the middle of their decoding."""
    params = SamplingParams(max_tokens=NEW, temperature=0.0)
    for prompt in torch.randint(engine.model.config.vocab_size, (batch, prompt_length)).tolist():
        engine.add(Request(prompt, params))
    while engine.stats.generated_tokens % (batch * NEW) < batch * NEW // 2:
        engine.step()
    torch.cuda.synchronize()


@torch.inference_mode()
def forward_seconds(engine: Engine, batch: int, prompt_length: int) -> float:
    """The network alone, from tokens to logits, as a CUDA graph: the least a step can take."""
    half_way(engine, batch, prompt_length)
    runner, model = engine._runner, engine.model
    slots = [sequence.slot for sequence in engine.scheduler.running]
    line = runner.decoding(torch.tensor(slots, device="cuda"))
    step = model.cached_step(runner.cache, line.groups, line.known)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model.logits(model.decode(line.tokens, step))
    graph.replay()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        graph.replay()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / 50
    while engine.has_work:
        engine.step()
    return seconds


def profile(engine: Engine, batch: int, prompt_length: int) -> None:
    """Where the device's time goes in twenty decode steps."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    half_way(engine, batch, prompt_length)
    with record(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(20):
            engine.step()
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    print(f"batch {batch}: {total / 20:.0f} us of kernels a step")
    for row in rows[:26]:  # the longest
        share, count = row.device_time_total / 20, row.count / 20
        print(f"  {share:8.1f} us {count:6.1f} x {share / count:7.2f}  {row.key[:80]}")
    while engine.has_work:
        engine.step()


def ours(
    model: Transformer, batch: int, args: argparse.Namespace, **options: Any
) -> dict[str, Any]:
    """``options`` are those of the engine."""
    config = EngineConfig(
        max_running=batch,
        token_budget=8192 + batch * (1 + args.drafts),
        cache_tokens=batch * (args.prompt + NEW + 64),
        drafts=args.drafts,
        prefix_cache=False,
        **options,
    )
    engine = Engine(model, None, config)
    measure(engine, batch, args.prompt)
    runs = [measure(engine, batch, args.prompt) for _ in range(args.rounds)]
    step = statistics.median(seconds for _, seconds in runs)
    forward = forward_seconds(engine, batch, args.prompt)
    if args.profile:
        profile(engine, batch, args.prompt)
    return {
        "batch": batch,
        "decode_tokens_per_second": round(batch / step, 1),
        "milliseconds_a_step": round(step * 1e3, 3),
        "of_which_forward": round(forward * 1e3, 3),
        "prompt_tokens_per_second": round(statistics.median(speed for speed, _ in runs)),
        "accepted": engine.stats.accepted,
    }


def theirs(model: Transformer, batch: int, prompt_length: int) -> dict[str, Any]:
    """`transformers`, dynamic cache: the whole of `generate`, and without its first token."""
    peer = peer_model(model)
    peer.generation_config.eos_token_id = None
    prompts = torch.randint(model.config.vocab_size, (batch, prompt_length), device="cuda")

    def seconds(new: int) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        mask = torch.ones_like(prompts)
        peer.generate(prompts, attention_mask=mask, max_new_tokens=new, do_sample=False)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    seconds(2)
    first, whole = seconds(1), seconds(33)
    return {
        "batch": batch,
        "decode_tokens_per_second": round(batch * 32 / (whole - first), 1),
        "prompt_tokens_per_second": round(batch * prompt_length / first),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--drafts", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--fp8-cache", action="store_true", help="also with the cache in FP8")
    parser.add_argument("--fp8", action="store_true", help="also with weights held in FP8 blocks")
    parser.add_argument("--invariant", action="store_true", help="also in batch-invariant mode")
    parser.add_argument("--peer", type=int, help="also `transformers` at this batch")
    parser.add_argument("--profile", action="store_true", help="also list the kernels of a step")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = network().model_copy(update={"max_position_embeddings": 4 * args.prompt})
    model = Transformer.create(config, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    results: dict[str, Any] = {
        "prompt_tokens": args.prompt,
        "new_tokens": NEW,
        "drafts": args.drafts,
    }

    def run(name: str, **options: Any) -> None:
        results[name] = []
        for batch in args.batch:
            results[name].append(ours(model, batch, args, **options))
            print(name, results[name][-1], flush=True)

    if args.peer:
        results["transformers"] = theirs(model, args.peer, args.prompt)
        print("transformers", results["transformers"], flush=True)
    run("bf16")
    if args.fp8_cache:
        run("bf16, fp8 cache", fp8_cache=True)
    if args.fp8:
        hold_fp8(model)
        run("fp8")
    if args.invariant:  # last, because the network stays so
        run("batch-invariant", batch_invariant=True)
    if args.json:
        write_result(args.json, results)


if __name__ == "__main__":
    main()
