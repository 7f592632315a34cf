"""The training loss: next token, MTP depths, and sequence-wise balance (paper 2.1.2 and 2.2)."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.model.router import sequence_balance_loss
from whalefall.model.transformer import Transformer
from whalefall.ops.cross_entropy import IGNORED, linear_cross_entropy


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
) -> Losses:
    """Loss of rows of S + 1 + D tokens: S inputs, and a target for each at every one of D depths.

    ``mtp_weight`` is lambda, ``sequence_alpha`` alpha. With ``documents`` (the document of every
    token) neither attention nor a target crosses from one document into another.
    """
    depths = len(model.mtp_modules)
    seq = tokens.shape[1] - 1 - depths
    seen = None if documents is None else documents[:, :-1]
    states = model.hidden_states(tokens[:, :-1], lookahead=depths, documents=seen)

    targets = [_targets(tokens, documents, 1 + depth, seq) for depth in range(1 + depths)]
    counts = [(target != IGNORED).sum().clamp(min=1) for target in targets]
    shares = [1.0] + [mtp_weight / depths for _ in range(depths)]
    weights = [
        (share / count).expand(target.numel())
        for share, count, target in zip(shares, counts, targets, strict=True)
    ]
    # One call for all depths: they share the head, so its gradient is made once.
    prediction, nll = linear_cross_entropy(
        torch.cat([hidden.flatten(0, 1) for hidden in (states.main, *states.mtp)]),
        model.lm_head.weight,
        torch.cat(targets),
        torch.cat(weights),
    )
    parts = [part.sum() / n for part, n in zip(nll.chunk(1 + depths), counts, strict=True)]

    total, balance = prediction, prediction.new_zeros(())
    if states.routings:
        batch, top_k = len(tokens), model.config.num_experts_per_tok
        by_layer = torch.stack(
            [
                sequence_balance_loss(routing.scores.unflatten(0, (batch, -1)), top_k)
                for routing in states.routings
            ]
        )
        # The paper adds every layer's loss; the mean is only for reading.
        total, balance = total + sequence_alpha * by_layer.sum(), by_layer.detach().mean()
        loads = torch.stack([routing.loads for routing in states.routings])
    else:
        loads = tokens.new_zeros(0, model.config.n_routed_experts)
    return Losses(total, parts[0], parts[1:], balance, loads)


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
