"""Forward and backward over the micro-batches of one step, as if they were one batch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.data.loader import Batch
from whalefall.model.loss import BatchSize, count_targets, training_loss
from whalefall.model.transformer import Transformer
from whalefall.ops.transfer import sent


@dataclass(frozen=True)
class StepLosses:
    """The losses of a step's micro-batches, and where its tokens went; on the device."""

    names: list[str]
    """``main``, ``mtp 1``, ..., ``balance``, ``loss``."""
    parts: Float[Tensor, "names micro_batches"]
    """What each micro-batch adds to each of them."""
    expert_loads: Int[Tensor, "layers experts"]


def summary(names: Sequence[str], parts: Float[Tensor, "names micro_batches"]) -> dict[str, Any]:
    """The losses of the whole batch: loss, main, mtp (a list over the depths) and balance."""
    sums = dict(zip(names, parts.double().sum(1).tolist(), strict=True))
    mtp = [value for name, value in sums.items() if name.startswith("mtp")]
    return {"loss": sums["loss"], "main": sums["main"], "mtp": mtp, "balance": sums["balance"]}


def accumulate_gradients(
    model: Transformer,
    micro_batches: Sequence[Batch],
    *,
    mtp_weight: float,
    sequence_alpha: float,
) -> StepLosses:
    """Add the gradients of the whole batch's loss to the parameters, a micro-batch at a time.

    The host does not wait for the device.
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
            sent(batch.tokens, device),
            mtp_weight=mtp_weight,
            sequence_alpha=sequence_alpha,
            documents=None if documents is None else sent(documents, device),
            size=size,
        )
        losses.total.backward()
        parts = [losses.main, *losses.mtp, losses.balance, losses.total.detach()]
        values.append(torch.stack(parts))
        loads.append(losses.expert_loads)
    names = ["main", *(f"mtp {depth}" for depth in range(1, depths + 1)), "balance", "loss"]
    return StepLosses(names, torch.stack(values, dim=1), torch.stack(loads).sum(0))
