"""What the benchmarks share: the machine in words, fair rounds, and the same network of a peer."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import whalefall
from whalefall.config.load import load_config
from whalefall.model.transformer import Transformer

if TYPE_CHECKING:
    from transformers import DeepseekV3ForCausalLM


# MTP is off: transformers drops the modules in training, and plain decoding does not use them.
_QUICKSTART = load_config("quickstart").model.model_copy(update={"num_nextn_predict_layers": 0})
NETWORKS = {
    "tiny": _QUICKSTART.model_copy(
        update={"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192}
    ),
    "quickstart": _QUICKSTART,
    "wider": _QUICKSTART.model_copy(
        update={
            "hidden_size": 256,
            "num_hidden_layers": 6,
            "intermediate_size": 704,
            "q_lora_rank": 128,
            "moe_intermediate_size": 96,
        }
    ),
}
"""What the CPU benchmarks run: the quickstart's network, a third of it, and three times it."""


def environment() -> dict[str, Any]:
    """Where and how the numbers were made, so that anyone can make them again."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "commit": commit.strip() + ("+changes" if changes else "") or "unknown",
        "command": shlex.join(["python", *sys.argv]),
        "versions": {
            "python": platform.python_version(),
            "whalefall": whalefall.__version__,
            **{package: version(package) for package in ("torch", "transformers")},
        },
    }


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def alternate(contenders: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after a run that does not count.

    Every round runs all of them, so that what else the machine does falls on all alike.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(found) for name, found in seconds.items()}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Keep a result as JSON, with the environment it was made in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), **result}, indent=2) + "\n")


def peer_model(model: Transformer) -> "DeepseekV3ForCausalLM":
    """The same network in ``transformers``, with the same weights; MTP is left out, as it does."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    peer = DeepseekV3ForCausalLM(DeepseekV3Config(**model.config.to_hf()))
    peer = peer.to(model.lm_head.weight.device, model.lm_head.weight.dtype).eval()
    main = {name: model.state_dict()[name] for name in peer.state_dict()}
    peer.load_state_dict(main)
    return peer
