"""Generation on one GPU: us beside `transformers`, the bench-6b network, BF16, greedy.

    python benchmarks/generate_gpu.py [--batch 1 32] [--json PATH]

Prompts of 1,024 random tokens, 128 new tokens each, the prompts' time included. The first number
for the engine to improve: our generator has neither CUDA graphs nor kernels of its own.
"""

import argparse
from pathlib import Path

import torch
from common import alternate, peer_model, write_result
from train_gpu import network

from whalefall.engine.generate import Request, decode
from whalefall.engine.sampling import SamplingParams
from whalefall.model.transformer import Transformer

PROMPT, NEW = 1024, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    config = network().model_copy(update={"max_position_embeddings": 2 * PROMPT})
    model = Transformer.create(config, device="cuda", dtype=torch.bfloat16)
    peer = peer_model(model)
    peer.generation_config.eos_token_id = None
    results = []
    for batch in args.batch:
        prompts = torch.randint(config.vocab_size, (batch, PROMPT), device="cuda")

        def ours(prompts: torch.Tensor = prompts) -> None:
            params = SamplingParams(max_tokens=NEW, temperature=0.0)
            for _ in decode(model, [Request(prompt, params) for prompt in prompts.tolist()]):
                pass
            torch.cuda.synchronize()

        def theirs(prompts: torch.Tensor = prompts) -> None:
            mask = torch.ones_like(prompts)
            peer.generate(prompts, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
            torch.cuda.synchronize()

        seconds = alternate({"whalefall": ours, "transformers": theirs}, args.rounds)
        speed = {name: round(batch * NEW / s, 1) for name, s in seconds.items()}
        results.append({"batch": batch, "tokens_per_second": speed})
        print(results[-1], flush=True)
    if args.json:
        work = {"prompt_tokens": PROMPT, "new_tokens": NEW, "rounds": args.rounds}
        write_result(args.json, {**work, "results": results})


if __name__ == "__main__":
    main()
