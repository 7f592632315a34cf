"""Forward and backward over the micro-batches of one step, as if they were one batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from whalefall.data.loader import Batch
from whalefall.model.loss import BatchSize, count_targets, training_loss
from whalefall.model.transformer import Transformer


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step's micro-batches, and where its tokens went."""

    parts: dict[str, list[float]]
    """By name (``main``, ``mtp 1``, ..., ``balance``, ``loss``), what each micro-batch adds."""
    expert_loads: Int[Tensor, "layers experts"]

    def record(self) -> dict[str, float | list[float]]:
        """The losses of the whole batch: loss, main, mtp (a list over the depths) and balance."""
        sums = {part: sum(values) for part, values in self.parts.items()}
        mtp = [value for part, value in sums.items() if part.startswith("mtp")]
        return {"loss": sums["loss"], "main": sums["main"], "mtp": mtp, "balance": sums["balance"]}

    def not_finite(self) -> tuple[str, int] | None:
        """The first part that is NaN or infinite, and its micro-batch."""
        for part, values in self.parts.items():
            for index, value in enumerate(values):
                if not math.isfinite(value):
                    return part, index
        return None


def accumulate_gradients(
    model: Transformer,
    micro_batches: Sequence[Batch],
    *,
    mtp_weight: float,
    sequence_alpha: float,
) -> StepLosses:
    """Add the gradients of the whole batch's loss to the parameters, a micro-batch at a time.

    The device is waited for once, at the end.
    """
    device, depths = model.lm_head.weight.device, len(model.mtp_modules)
    targets = [count_targets(batch.tokens, batch.documents, depths) for batch in micro_batches]
    rows = sum(len(batch.tokens) for batch in micro_batches)
    size = BatchSize(rows, [sum(counts) for counts in zip(*targets, strict=True)])
    values, loads = [], []
    for batch in micro_batches:
        documents = batch.documents
        losses = training_loss(
            model,
            batch.tokens.to(device, non_blocking=True),
            mtp_weight=mtp_weight,
            sequence_alpha=sequence_alpha,
            documents=None if documents is None else documents.to(device, non_blocking=True),
            size=size,
        )
        losses.total.backward()
        parts = [losses.main, *losses.mtp, losses.balance, losses.total.detach()]
        values.append(torch.stack(parts))
        loads.append(losses.expert_loads)
    names = ["main", *(f"mtp {depth}" for depth in range(1, depths + 1)), "balance", "loss"]
    by_part = torch.stack(values, dim=1).tolist()
    return StepLosses(dict(zip(names, by_part, strict=True)), torch.stack(loads).sum(0))
