"""The head's loss: the kernel on one chunk of logits, and the whole of head and loss."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row
from torch import Tensor

from whalefall.kernels import cross_entropy as kernel
from whalefall.ops.cross_entropy import CHUNK_LOGITS_CUDA, IGNORED, linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 16384, 2048, 32768


def rows() -> Iterator[Row]:
    yield _logits(CHUNK_LOGITS_CUDA // VOCAB, VOCAB)
    yield _logits(CHUNK_LOGITS_CUDA // 129280, 129280)
    yield _head_and_loss()
    x = torch.randn(VOCAB, HIDDEN, device="cuda", dtype=torch.bfloat16)
    one = torch.ones((), device="cuda")
    yield Row("scale by a one on the device", lambda: kernel.scale_(x, one))


def _logits(tokens: int, vocab: int) -> Row:
    logits = torch.randn(tokens, vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(vocab, (tokens,), device="cuda")
    weights = torch.full((tokens,), 1 / tokens, device="cuda")
    nll = torch.empty(tokens, device="cuda")
    theirs = logits.clone().requires_grad_()

    def run() -> None:  # on its own results after the first time, which are logits too
        kernel.nll_and_gradient_(logits, targets, weights, nll, ignored=IGNORED, with_gradient=True)

    def peer() -> tuple[Tensor, ...]:
        return torch.autograd.grad(F.cross_entropy(theirs.float(), targets), theirs)

    name = f"cross-entropy and gradient, {tokens} x {vocab}"
    return Row(name, run, bytes=2 * logits.nbytes, peer=peer, peer_name="torch")


def _head_and_loss() -> Row:
    like = {"device": "cuda", "dtype": torch.bfloat16}
    hidden = torch.randn(TOKENS, HIDDEN, **like).requires_grad_()
    head = (torch.randn(VOCAB, HIDDEN, **like) / HIDDEN**0.5).requires_grad_()
    targets = torch.randint(VOCAB, (TOKENS,), device="cuda")
    weights = torch.full((TOKENS,), 1 / TOKENS, device="cuda")

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            linear_cross_entropy(hidden, head, targets, weights)[0], (hidden, head)
        )

    def peer() -> tuple[Tensor, ...]:
        loss = F.cross_entropy((hidden @ head.T).float(), targets)
        return torch.autograd.grad(loss, (hidden, head))

    name = f"head and loss, forward and backward, {TOKENS} x {HIDDEN} x {VOCAB}"
    flops = 3 * 2 * TOKENS * HIDDEN * VOCAB
    return Row(name, run, flops=flops, peer=peer, peer_name="torch")
