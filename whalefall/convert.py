"""Between training checkpoints and Hugging Face folders, never holding a network in memory.

Both directions stream. Source files are mapped, so a tensor is read where it is used, one expert
at a time. A Hugging Face folder is written shard by shard; the one file of a training checkpoint
is mapped as well and filled in place, in whatever order the source has its tensors.
"""

import errno
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from whalefall.config.model import ModelConfig
from whalefall.config.train import DataConfig, TrainConfig
from whalefall.errors import UserError
from whalefall.integrity import atomic_folder, write_manifest
from whalefall.model.checkpoint import (
    MAX_SHARD_BYTES,
    SINGLE_FILE,
    HuggingFaceFolder,
    require_new,
    write_folder,
)
from whalefall.model.transformer import Transformer
from whalefall.train.schedule import Position
from whalefall.train.weights import checkpoint_in, is_hugging_face, tokenizer_folder

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def convert(
    source: Path | str,
    target: Path | str,
    *,
    dtype: Literal["float32", "bfloat16", "fp8"] | None = None,
    ema: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Turn a training checkpoint into a Hugging Face folder, or the other way round.

    ``source`` is a checkpoint folder, a run folder (its newest checkpoint is taken) or a Hugging
    Face folder. The tokenizer is copied along where there is one.

    ``dtype`` is what a Hugging Face folder is stored in, BF16 if not given; ``fp8`` means 128x128
    blocks for what DeepSeek publishes so, and BF16 for the rest. ``ema`` takes the moving averages
    of the parameters. Neither applies to a training checkpoint made from a Hugging Face folder:
    it is FP32, at step 0 of a run with the default recipe.

    Raises:
        UserError: ``source`` is none of the three, damaged, or has no averages; ``dtype`` or
            ``ema`` does not apply; ``target`` already holds something; the disk is full.
    """
    source, target = Path(source), require_new(target)
    if is_hugging_face(source):
        if ema or dtype not in (None, "float32"):
            raise UserError(
                f"{source} is a Hugging Face folder and becomes an FP32 training checkpoint: "
                "neither dtype nor ema applies"
            )
        _to_training(source, target)
        return
    checkpoint = checkpoint_in(source)
    state = json.loads((checkpoint / "state.json").read_text())
    write_folder(
        target,
        TrainConfig.model_validate(state["config"]).model,
        _weights(checkpoint, ema),
        dtype=torch.float32 if dtype == "float32" else torch.bfloat16,
        fp8=dtype == "fp8",
        max_shard_bytes=max_shard_bytes,
        other_files=_tokenizer_files(checkpoint),
    )


def _to_training(source: Path, target: Path) -> None:
    stored = HuggingFaceFolder(source)
    with torch.device("meta"):
        network = Transformer(stored.config)
    with atomic_folder(target) as partial:
        stored.load_into(_mapped_file(partial / SINGLE_FILE, network.state_dict()))
        state = {"position": asdict(Position()), "config": _run_with(stored.config)}
        (partial / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        for file in _tokenizer_files(source):
            shutil.copyfile(file, partial / file.name)
        write_manifest(partial, [file.name for file in partial.iterdir()])


def _mapped_file(path: Path, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A new safetensors file of FP32 zeros, as tensors that lie in it: writing them writes it."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in like.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data are then aligned
    if shutil.disk_usage(path.parent).free < len(text) + end:
        # Writing to a mapped file that the disk cannot hold would kill the process.
        raise OSError(errno.ENOSPC, "No space left on device")
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    first = (8 + len(text)) // 4
    numbers = torch.from_file(str(path), shared=True, size=first + end // 4, dtype=torch.float32)
    parts = numbers[first:].split([tensor.numel() for tensor in like.values()])
    return {
        name: part.view(tensor.shape)
        for (name, tensor), part in zip(like.items(), parts, strict=True)
    }


def _weights(checkpoint: Path, ema: bool) -> Iterator[tuple[str, Tensor]]:
    """The tensors as views of their mapped files, named and stacked as in memory."""
    model = safe_open(checkpoint / SINGLE_FILE, framework="pt")
    files = dict.fromkeys(model.keys(), model)
    if ema:
        if not (checkpoint / "ema.safetensors").is_file():
            raise UserError(f"{checkpoint} has no moving averages (ema.safetensors)")
        averages = safe_open(checkpoint / "ema.safetensors", framework="pt")
        files |= dict.fromkeys(averages.keys(), averages)
    for name, file in files.items():
        yield name, file.get_tensor(name)


def _tokenizer_files(folder: Path) -> list[Path]:
    folder = tokenizer_folder(folder)
    return [file for name in _TOKENIZER_FILES if (file := folder / name).is_file()]


def _run_with(config: ModelConfig) -> dict[str, Any]:
    """The default recipe for this network, on rows that its positions reach."""
    length = min(DataConfig().sequence_length, config.max_position_embeddings)
    run = TrainConfig(model=config, data=DataConfig(sequence_length=length))
    return run.model_dump(mode="json")
