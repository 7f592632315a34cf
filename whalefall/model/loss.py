"""The training loss: next token, MTP depths, and sequence-wise balance (paper 2.1.2 and 2.2)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.model.router import Routing, sequence_balance_loss
from whalefall.model.transformer import Transformer
from whalefall.ops.cross_entropy import IGNORED, linear_cross_entropy


@dataclass(frozen=True)
class BatchSize:
    """What the means are taken over."""

    rows: int
    targets: list[int]
    """Tokens predicted at each distance, the next one first; see ``count_targets``."""


@dataclass(frozen=True)
class Losses:
    """Parts of one step's loss; only ``total`` carries gradients."""

    total: Float[Tensor, ""]
    """main + lambda/D sum of mtp + alpha balance."""
    main: Float[Tensor, ""]
    """Mean cross-entropy of the next token, nats."""
    mtp: list[Float[Tensor, ""]]
    """Mean cross-entropy of each MTP depth, nats, unweighted."""
    balance: Float[Tensor, ""]
    """Sequence-wise balance, mean over layers and sequences, unweighted; 1 is perfect balance."""
    expert_loads: Int[Tensor, "layers experts"]


def training_loss(
    model: Transformer,
    tokens: Int[Tensor, "batch row"],
    *,
    mtp_weight: float,
    sequence_alpha: float,
    documents: Int[Tensor, "batch row"] | None = None,
    size: BatchSize | None = None,
) -> Losses:
    """Loss of rows of S + 1 + D tokens: S inputs, and a target for each at every one of D depths.

    ``mtp_weight`` is lambda, ``sequence_alpha`` alpha. With ``documents`` (the document of every
    token) neither attention nor a target crosses from one document into another. With the ``size``
    of a larger batch these rows are a part of it, and the parts' losses add up to the batch's.
    """
    depths = len(model.mtp_modules)
    seq = tokens.shape[1] - 1 - depths
    size = size or BatchSize(len(tokens), count_targets(tokens, documents, depths))
    seen = None if documents is None else documents[:, :-1]
    states = model.hidden_states(tokens[:, :-1], lookahead=depths, documents=seen)

    targets = [_targets(tokens, documents, 1 + depth, seq) for depth in range(1 + depths)]
    shares = [1.0] + [mtp_weight / depths for _ in range(depths)]
    weights = [
        torch.full(target.shape, share / max(1, count), device=tokens.device)
        for share, count, target in zip(shares, size.targets, targets, strict=True)
    ]
    # One call for all depths: they share the head, so its gradient is made once.
    prediction, nll = linear_cross_entropy(
        torch.cat([hidden.flatten(0, 1) for hidden in (states.main, *states.mtp)]),
        model.lm_head.weight,
        torch.cat(targets),
        torch.cat(weights),
    )
    sums = nll.unflatten(0, (1 + depths, -1)).sum(1)
    main, *mtp = [part / max(1, count) for part, count in zip(sums, size.targets, strict=True)]
    balance, loads = _balance(model, states.routings, len(tokens), size.rows)
    # The paper adds every layer's balance loss; their mean is what reads well.
    total = prediction + sequence_alpha * len(states.routings) * balance
    return Losses(total, main, mtp, balance.detach(), loads)


def count_targets(
    tokens: Int[Tensor, "batch row"], documents: Int[Tensor, "batch row"] | None, depths: int
) -> list[int]:
    """Targets of rows for the main model and each MTP depth."""
    seq = tokens.shape[1] - 1 - depths
    if documents is None:
        return [len(tokens) * seq] * (1 + depths)
    same = (
        documents[:, ahead : ahead + seq] == documents[:, :seq] for ahead in range(1, depths + 2)
    )
    return [int(inside.sum()) for inside in same]


@torch.no_grad()
def token_losses(
    model: Transformer,
    tokens: Int[Tensor, "batch row"],
    *,
    documents: Int[Tensor, "batch row"] | None = None,
) -> Float[Tensor, "batch seq"]:
    """Negative log-likelihood in nats of tokens 1.. given those before, by the main model."""
    seen = None if documents is None else documents[:, :-1]
    states = model.hidden_states(tokens[:, :-1], documents=seen, with_mtp=False)
    target = _targets(tokens, documents, 1, tokens.shape[1] - 1)
    _, nll = linear_cross_entropy(
        states.main.flatten(0, 1), model.lm_head.weight, target, torch.ones_like(target).float()
    )
    return nll.view_as(tokens[:, 1:])


def _balance(
    model: Transformer, routings: list[Routing], rows: int, batch_rows: int
) -> tuple[Float[Tensor, ""], Int[Tensor, "layers experts"]]:
    """Sequence-wise loss, the mean over layers and the batch's rows, and the experts' loads."""
    if not routings:
        weight = model.lm_head.weight
        loads = torch.zeros(0, model.config.n_routed_experts, dtype=torch.int64)
        return weight.new_zeros((), dtype=torch.float32), loads.to(weight.device)
    top_k = model.config.num_experts_per_tok
    by_layer = [
        sequence_balance_loss(routing.scores.unflatten(0, (rows, -1)), top_k)
        for routing in routings
    ]
    loads = torch.stack([routing.loads for routing in routings])
    return torch.stack(by_layer).mean() * (rows / batch_rows), loads


def _targets(
    tokens: Int[Tensor, "batch row"],
    documents: Int[Tensor, "batch row"] | None,
    ahead: int,
    seq: int,
) -> Int[Tensor, "positions"]:
    """The token ``ahead`` of each of the first ``seq`` positions; ignored in another document."""
    target = tokens[:, ahead : ahead + seq]
    if documents is not None:
        inside = documents[:, ahead : ahead + seq] == documents[:, :seq]
        target = target.where(inside, IGNORED)
    return target.flatten()
