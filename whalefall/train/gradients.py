"""Forward and backward over the micro-batches of one step, as if they were one batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from whalefall.data.loader import Batch
from whalefall.model.loss import training_loss
from whalefall.model.transformer import Transformer


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step's micro-batches, and where its tokens went."""

    parts: dict[str, list[float]]
    """By name (``main``, ``mtp 1``, ..., ``balance``, ``loss``), a value for each micro-batch."""
    shares: list[float]
    """What each micro-batch weighs; they add up to 1."""
    expert_loads: Int[Tensor, "layers experts"]

    def record(self) -> dict[str, float | list[float]]:
        """The losses of the whole batch: loss, main, mtp (a list over the depths) and balance."""
        mean = {
            part: sum(share * value for share, value in zip(self.shares, values, strict=True))
            for part, values in self.parts.items()
        }
        mtp = [value for part, value in mean.items() if part.startswith("mtp")]
        return {"loss": mean["loss"], "main": mean["main"], "mtp": mtp, "balance": mean["balance"]}

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

    A micro-batch weighs what it has of the batch's next-token targets, which is its share of the
    rows unless sample masks leave rows with different numbers of targets. The device is waited for
    once, at the end.
    """
    device = model.lm_head.weight.device
    targets = [_count_targets(batch, len(model.mtp_modules)) for batch in micro_batches]
    shares = [count / max(1, sum(targets)) for count in targets]
    values, loads = [], []
    for batch, share in zip(micro_batches, shares, strict=True):
        documents = batch.documents
        losses = training_loss(
            model,
            batch.tokens.to(device, non_blocking=True),
            mtp_weight=mtp_weight,
            sequence_alpha=sequence_alpha,
            documents=None if documents is None else documents.to(device, non_blocking=True),
        )
        (losses.total * share).backward()
        parts = [losses.main, *losses.mtp, losses.balance, losses.total.detach()]
        values.append(torch.stack(parts))
        loads.append(losses.expert_loads)
    names = ["main", *(f"mtp {k + 1}" for k in range(len(losses.mtp))), "balance", "loss"]
    by_part = torch.stack(values, dim=1).tolist()
    return StepLosses(dict(zip(names, by_part, strict=True)), shares, torch.stack(loads).sum(0))


def _count_targets(batch: Batch, depths: int) -> int:
    seq = batch.tokens.shape[1] - 1 - depths
    if batch.documents is None:
        return len(batch.tokens) * seq
    documents = batch.documents[:, : seq + 1]
    return int((documents[:, 1:] == documents[:, :-1]).sum())
