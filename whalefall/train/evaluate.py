"""Held-out quality in bits per byte, which compares across tokenizers."""

import math

import torch
from jaxtyping import Int
from torch import Tensor

from whalefall.errors import UserError
from whalefall.model.loss import token_losses
from whalefall.model.transformer import Transformer


@torch.no_grad()
def bits_per_byte(
    model: Transformer,
    rows: Int[Tensor, "rows length"],
    token_bytes: Int[Tensor, "vocab"],
    *,
    documents: Int[Tensor, "rows length"] | None = None,
    rows_at_once: int = 8,
) -> float:
    """Mean code length of the text in ``rows`` under the main model, in bits per UTF-8 byte.

    Every token after a row's first is a target. ``token_bytes`` says how many bytes each token
    stands for; tokens that stand for none (specials) are context but are not scored. ``documents``
    forbids attention across documents, and then the first token of a document is not scored either.

    Raises:
        UserError: the rows hold nothing but specials.
    """
    device = model.lm_head.weight.device
    was_training = model.training
    model.eval()
    nats, text_bytes = 0.0, 0
    for start in range(0, len(rows), rows_at_once):
        part = slice(start, start + rows_at_once)
        seen = None if documents is None else documents[part]
        sizes = token_bytes[rows[part, 1:]]
        if seen is not None:
            sizes = sizes * (seen[:, 1:] == seen[:, :-1])
            seen = seen.to(device)
        losses = token_losses(model, rows[part].to(device), documents=seen).cpu()
        nats += losses.double()[sizes > 0].sum().item()
        text_bytes += int(sizes.sum())
    model.train(was_training)
    if text_bytes == 0:
        raise UserError("the held-out rows hold no text to score")
    return nats / math.log(2) / text_bytes
