"""The training loop. ``Trainer.run`` reads top to bottom; what a step does is in ``_step``.

A step is a function of the configuration and its ``Position``: which rows, how many, and every
scheduled number. A run that is killed and started again goes on from its last checkpoint with the
same bits, on the same device and number of threads (on CUDA with ``runtime.deterministic``).
"""

import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from whalefall.config.load import save_config
from whalefall.config.train import TrainConfig
from whalefall.data.loader import Batch, Loader
from whalefall.errors import UserError
from whalefall.train.balance import load_shares, max_violation, sum_over_ranks, update_biases
from whalefall.train.checkpoint import CheckpointWriter, State, latest, load
from whalefall.train.console import ConsoleSink
from whalefall.train.determinism import make_deterministic
from whalefall.train.ema import EMA
from whalefall.train.evaluate import bits_per_byte
from whalefall.train.gradients import accumulate_gradients, summary
from whalefall.train.masters import Masters
from whalefall.train.metrics import Broadcast, JsonLines, Record, Sink, Speed, TensorBoard
from whalefall.train.optimizer import AdamW
from whalefall.train.precision import make_network
from whalefall.train.readback import Readback
from whalefall.train.schedule import (
    Position,
    advance,
    batch_rows,
    bias_update_speed,
    learning_rate,
    mtp_weight,
)
from whalefall.train.signals import stop_requests
from whalefall.train.weights import load_network

Reason = Literal["finished", "time", "signal"]


@dataclass(frozen=True)
class TrainResult:
    steps: int
    """Steps and tokens of the run, over all invocations."""
    tokens: int
    heldout_bits_per_byte: float | None
    """Of the last evaluation."""
    run_folder: Path
    stopped: Reason


@dataclass(frozen=True)
class _Step:
    """A step that the device has been given, and what is to be known of it."""

    position: Position
    """After it."""
    rows: int
    learning_rate: float
    batches: Sequence[Batch]
    names: list[str]
    """Of the losses' parts."""
    numbers: Readback
    began: float


class Trainer:
    """One run: set up, or resumed, by the constructor; carried on by ``run``.

    Raises:
        UserError: the configuration does not fit the data, the device, or the checkpoint found in
            ``config.output``; from ``run``: a loss or gradient that is not finite, a full disk.
    """

    def __init__(self, config: TrainConfig, *, sinks: Sequence[Sink] | None = None):
        """``sinks`` see every record in place of the console; the run folder's always do."""
        _check_single_process()
        self.config = config
        self.device = device_of(config.runtime.device)
        make_deterministic(config.runtime.deterministic)
        if config.runtime.threads is not None:
            torch.set_num_threads(config.runtime.threads)
        self.loader = Loader(
            config.data.sources,
            sequence_length=config.data.sequence_length,
            extra_tokens=1 + config.model.num_nextn_predict_layers,
            seed=config.seed,
            sample_masks=config.data.sample_masks,
        )
        self.loader.check_vocabulary(config.model.vocab_size)
        self.heldout = self.loader.held_out(config.evaluation.rows)
        self._token_bytes = torch.as_tensor(self.loader.tokenizer.token_bytes())
        self.model = make_network(config, self.device)
        self.optimizer = AdamW(self.model.named_parameters(), config.optimizer)
        folder = latest(config.output)
        if folder is None and config.initialize_from is not None:
            self._start_from(config.initialize_from)
        self.ema = EMA(self.optimizer.masters, config.ema.decay) if config.ema.enabled else None
        self.position = Position()
        self._heldout_score: float | None = None
        if folder is not None:
            self._restore(load(folder, config))

        config.output.mkdir(parents=True, exist_ok=True)
        save_config(config, config.output / "config.yaml")
        self.loader.tokenizer.save(config.output)
        self._saved_step = None if folder is None else self.position.step
        self._speed = Speed(config, self.device)
        self._given_sinks = sinks
        self._has_failed = False
        self._unread: deque[_Step] = deque()
        self._last_read = 0.0

    def run(self) -> TrainResult:
        """Train until the tokens are used up, the time is over, or a signal asks to stop."""
        if self._has_failed:
            raise UserError("this run met something not finite; start it anew from its checkpoint")
        config = self.config
        deadline = time.monotonic() + 60 * (config.runtime.max_minutes or math.inf)
        with (
            closing(self._sinks()) as self._metrics,
            CheckpointWriter(config.output, config.checkpoint.keep) as self._writer,
            stop_requests() as asked,
        ):
            while (stopped := self._reason_to_stop(deadline, asked())) is None:
                self._step()
                if self._is_due(config.evaluation.every_steps):
                    self._evaluate()
                if self._is_due(config.checkpoint.every_steps):
                    self._save()
            if stopped == "time" and not self._is_due(config.evaluation.every_steps):
                self._evaluate()
            self._settle()
            if self._saved_step != self.position.step:
                self._save()
        return TrainResult(
            self.position.step, self.position.tokens, self._heldout_score, config.output, stopped
        )

    def _step(self) -> None:
        """One optimizer step: a function of the configuration and the position.

        On CUDA the host does not wait for it: its numbers are read a step later, while the device
        works on the next one.
        """
        began = time.perf_counter()
        schedule, position = self.config.schedule, self.position
        rows = batch_rows(schedule, position)
        batches = self._micro_batches(rows)
        losses = accumulate_gradients(
            self.model,
            batches,
            mtp_weight=mtp_weight(schedule, position),
            sequence_alpha=self.config.balance.sequence_alpha,
        )
        if self.ema is not None:
            self.ema.wait_for_copy()
        rate = learning_rate(schedule, position)
        norm = self.optimizer.step(rate, losses=losses.parts)
        loads = sum_over_ranks(losses.expert_loads)
        update_biases(self.model.routers(), loads, bias_update_speed(schedule, position))
        self.position = advance(position, rows, self.config.data.sequence_length)
        if self.ema is not None and self.position.step % self.config.ema.every_steps == 0:
            self.ema.update()
        numbers = Readback({"parts": losses.parts, "norm": norm, "loads": loads})
        self._unread.append(_Step(self.position, rows, rate, batches, losses.names, numbers, began))
        self._settle(leaving=1 if self.device.type == "cuda" else 0)

    def _settle(self, *, leaving: int = 0) -> None:
        """Read the numbers of all steps but the last few: stop at a bad one, record the others."""
        while len(self._unread) > leaving:
            step = self._unread.popleft()
            numbers = step.numbers.read()
            now = time.perf_counter()
            seconds, self._last_read = now - max(step.began, self._last_read), now
            self._check(step, numbers["parts"], numbers["norm"].item())
            is_last = step.position.tokens >= self.config.schedule.total_tokens
            if is_last or step.position.step % self.config.logging.every_steps == 0:
                self._metrics.write(self._record(step, numbers, seconds))

    def _record(self, step: _Step, numbers: Mapping[str, Tensor], seconds: float) -> Record:
        tokens = step.rows * self.config.data.sequence_length
        return {
            "step": step.position.step,
            "tokens": step.position.tokens,
            "rows": step.rows,
            **summary(step.names, numbers["parts"]),
            "learning_rate": step.learning_rate,
            "gradient_norm": numbers["norm"].item(),
            **self._speed.record(tokens, seconds),
            "max_violation": max_violation(numbers["loads"]).tolist(),
            "expert_load": load_shares(numbers["loads"]),
        }

    def _evaluate(self) -> None:
        """Score the held-out rows with the weights, and with their average where there is one."""
        self._settle()
        scores = {"heldout_bits_per_byte": self._score_heldout()}
        if self.ema is not None:
            with self.ema.swap(dict(self.model.named_parameters())):
                scores["ema_heldout_bits_per_byte"] = self._score_heldout()
        self._heldout_score = scores["heldout_bits_per_byte"]
        self._metrics.write({"step": self.position.step, "tokens": self.position.tokens, **scores})

    def _save(self) -> None:
        """Take a checkpoint of this position; it is written while training goes on."""
        self._settle()
        self._writer.save(
            State(
                self.position,
                self.config,
                # FP32 masters in place of the working weights; the rest are buffers.
                Masters(self.model.state_dict(), self.optimizer.masters.remainders),
                self.optimizer.state_dict(),
                None if self.ema is None else self.ema.state_dict(),
                self.loader.tokenizer.fingerprint,
                self._heldout_score,
            )
        )
        self._saved_step = self.position.step

    def _start_from(self, folder: Path) -> None:
        """Take over the weights of another network of the same shape."""
        weights = load_network(folder).state_dict()
        theirs = {name: list(tensor.shape) for name, tensor in weights.items()}
        ours = {name: list(tensor.shape) for name, tensor in self.model.state_dict().items()}
        if theirs != ours:
            name = min(n for n in theirs.keys() | ours.keys() if theirs.get(n) != ours.get(n))
            raise UserError(
                f"initialize_from: {name} is {theirs.get(name, 'missing')} in {folder} and "
                f"{ours.get(name, 'missing')} in model; they must be of one shape"
            )
        self.model.load_state_dict(weights)
        self.optimizer.masters.copy_(weights)

    def _restore(self, state: State) -> None:
        if state.tokenizer != self.loader.tokenizer.fingerprint:
            raise UserError(
                f"cannot resume {self.config.output}: its tokenizer is not the one that "
                f"{self.config.data.sources[0].path} is prepared with now"
            )
        self.model.load_state_dict(state.model)
        self.optimizer.load_state_dict(state.model, state.optimizer)
        if self.ema is not None:
            # An average that the run did not have so far starts here.
            self.ema.load_state_dict(state.model if state.ema is None else state.ema)
        self.position = state.position
        self._heldout_score = state.heldout_bits_per_byte

    def _reason_to_stop(self, deadline: float, asked: bool) -> Reason | None:
        if self._is_finished():
            return "finished"
        if asked:
            return "signal"
        return "time" if time.monotonic() >= deadline else None

    def _is_finished(self) -> bool:
        return self.position.tokens >= self.config.schedule.total_tokens

    def _is_due(self, every_steps: int) -> bool:
        return self._is_finished() or self.position.step % every_steps == 0

    def _micro_batches(self, rows: int) -> list[Batch]:
        first, size = self.position.rows, self.config.optimizer.micro_batch_rows or rows
        return [
            self.loader.batch(first + start, min(size, rows - start))
            for start in range(0, rows, size)
        ]

    def _score_heldout(self) -> float:
        targets = slice(self.config.data.sequence_length + 1)
        documents = self.heldout.documents
        return bits_per_byte(
            self.model,
            self.heldout.tokens[:, targets],
            self._token_bytes,
            documents=None if documents is None else documents[:, targets],
        )

    def _check(self, step: _Step, parts: Tensor, norm: float) -> None:
        """Raise UserError where the step met something not finite, which changed no weight."""
        for name, values in zip(step.names, parts.tolist(), strict=True):
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    raise self._not_finite(step, name, value, step.batches[index : index + 1])
        if not math.isfinite(norm):
            # A GPU's gradients are gone by now.
            named = self.optimizer.gradients().items()
            bad = (name for name, gradient in named if not gradient.isfinite().all())
            first = next(bad, None)
            which = f" (first bad gradient: {first})" if first else ""
            raise self._not_finite(step, f"gradient norm{which}", norm, step.batches)

    def _not_finite(
        self, step: _Step, part: str, value: float, batches: Sequence[Batch]
    ) -> UserError:
        self._has_failed = True
        names = sorted({name for batch in batches for name in batch.document_ids})
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return UserError(
            f"step {step.position.step}: {part} is {value}, in documents "
            f"{', '.join(names[:8])}{more}; the step was not applied, and the checkpoints in "
            f"{self.config.output} are as they were"
        )

    def _sinks(self) -> Sink:
        config, step = self.config, self.position.step
        sinks: list[Sink] = [JsonLines(config.output / "metrics.jsonl", step)]
        if config.logging.tensorboard:
            sinks.append(TensorBoard(config.output / "tensorboard", step))
        if self._given_sinks is None:
            return Broadcast([*sinks, ConsoleSink(config.schedule.total_tokens)])
        return Broadcast([*sinks, *self._given_sinks])


def device_of(name: str) -> torch.device:
    """The device of ``runtime.device``, which must be there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)  # the kernels run on the current one
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"runtime.device is {name!r}, which cannot be used: {error}") from None
    return device


def _check_single_process() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise UserError(
            f"training runs in one process so far, but torch.distributed has "
            f"{dist.get_world_size()} ranks"
        )
