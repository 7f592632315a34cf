"""Checkpoints of a run: whole or absent, written beside the training, checked when read.

``checkpoints/step-00000100/`` holds ``model.safetensors`` (FP32 masters and buffers),
``optimizer.safetensors``, ``ema.safetensors`` (if there is an average), ``state.json`` (position,
configuration, versions) and ``manifest.json`` (sizes and checksums). A step draws no random
numbers beyond the seed's, so there is no generator to save.
"""

import json
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from whalefall.config.explain import validated
from whalefall.config.load import diff_configs
from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.errors import UserError
from whalefall.integrity import atomic_folder, verify_manifest, write_manifest
from whalefall.train.schedule import Position

PINNED = ("model.", "data.", "seed", "optimizer.moment_dtype")
"""What a resumed run may not change: the network, the order of the data, the state's type."""


@dataclass(frozen=True)
class State:
    """Everything a run needs to go on as if it had never stopped."""

    position: Position
    config: TrainConfig
    model: Mapping[str, Tensor]
    """FP32 masters under the parameters' names, and the buffers."""
    optimizer: Mapping[str, Tensor]
    ema: Mapping[str, Tensor] | None
    tokenizer: str
    """Fingerprint of the tokenizer that made the data."""
    heldout_bits_per_byte: float | None
    """Of the last evaluation; for the reader."""


class CheckpointWriter:
    """Writes checkpoints of one run on a thread, one at a time, and keeps the newest ``keep``.

    A failure (a full disk, say) is raised by the next call; the older checkpoints are still there.
    As a context manager it waits for the last write.
    """

    def __init__(self, run_folder: Path, keep: int):
        self._folder = run_folder / "checkpoints"
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        for leftover in self._folder.glob(".step-*"):  # of a writer that was killed
            shutil.rmtree(leftover)

    def save(self, state: State) -> None:
        """Copy ``state`` to the CPU now, tensor by tensor, and write it while training goes on.

        Raises:
            UserError: the write before this one met a full disk.
        """
        self.join()
        tensors = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in part.items()}
            for name, part in (("model", state.model), ("optimizer", state.optimizer),
                               ("ema", state.ema))
            if part is not None
        }  # fmt: skip
        self._pending = self._thread.submit(self._write, tensors, _describe(state))

    def join(self) -> None:
        """Return once the last checkpoint is whole on disk; raise what went wrong with it."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._thread.shutdown()
        self.join()

    def _write(self, tensors: dict[str, dict[str, Tensor]], description: dict[str, Any]) -> None:
        step = description["position"]["step"]
        with atomic_folder(self._folder / f"step-{step:08d}") as folder:
            for name, part in tensors.items():
                save_file(part, folder / f"{name}.safetensors")
            (folder / "state.json").write_text(json.dumps(description, indent=2) + "\n")
            write_manifest(folder, [path.name for path in folder.iterdir()])
        for old in _folders(self._folder)[: -self._keep]:
            # Renamed first, so that a kill in the middle leaves no damaged checkpoint behind.
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))


def latest(run_folder: Path) -> Path | None:
    """The newest checkpoint of a run, verified; None when there is none.

    Raises:
        UserError: it is damaged. The message names the file and the newest older checkpoint that is
            whole; going back to it is the user's decision.
    """
    folders = _folders(run_folder / "checkpoints")
    if not folders:
        return None
    try:
        verify_manifest(folders[-1])
    except UserError as error:
        raise UserError(f"{error}; {_advice(folders)}") from error
    return folders[-1]


def load(folder: Path, config: TrainConfig) -> State:
    """Read a checkpoint to go on under ``config``; the tensors are on the CPU.

    Raises:
        UserError: ``config`` is another network, another order of data, or needs another state.
    """
    raw = json.loads((folder / "state.json").read_text())
    saved = _configuration(folder, raw)
    changed = [line for line in diff_configs(saved, config) if line.startswith(PINNED)]
    if changed:
        raise UserError(
            f"cannot resume {folder}: {'; '.join(changed)} (change it back, or start a new run in "
            "another output folder)"
        )
    average = folder / "ema.safetensors"
    return State(
        Position(**raw["position"]),
        saved,
        load_file(folder / "model.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        load_file(average) if average.is_file() else None,
        raw["tokenizer"],
        raw["heldout_bits_per_byte"],
    )


def load_weights(folder: Path, *, average: bool = False) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The network of a checkpoint and its FP32 weights under the names of ``Transformer``.

    With ``average``, the parameters are their moving averages.

    Raises:
        UserError: the checkpoint is damaged, or has no average.
    """
    verify_manifest(folder)
    raw = json.loads((folder / "state.json").read_text())
    weights = load_file(folder / "model.safetensors")
    if average:
        if not (folder / "ema.safetensors").is_file():
            raise UserError(f"{folder} has no ema.safetensors: the run had ema.enabled=false")
        weights |= load_file(folder / "ema.safetensors")
    return _configuration(folder, raw).model, weights


def _configuration(folder: Path, raw: Mapping[str, Any]) -> TrainConfig:
    try:
        return validated(TrainConfig, raw["config"])
    except UserError as error:
        raise UserError(f"{folder} was written by another version of whalefall: {error}") from None


def _folders(checkpoints: Path) -> list[Path]:
    """Checkpoints by step, oldest first; what a killed writer left has another name."""
    return sorted(checkpoints.glob("step-*"))


def _advice(folders: list[Path]) -> str:
    for folder in reversed(folders[:-1]):
        try:
            verify_manifest(folder)
        except UserError:
            continue
        return f"{folder} is whole: remove {folders[-1]} to resume from there"
    return "no older checkpoint is whole"


def _describe(state: State) -> dict[str, Any]:
    return {
        "position": asdict(state.position),
        "tokenizer": state.tokenizer,
        "heldout_bits_per_byte": state.heldout_bits_per_byte,
        "config": state.config.model_dump(mode="json"),
        "versions": {"torch": torch.__version__},
    }
