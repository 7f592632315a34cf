"""RMSNorm, and the sums that come before it in a block."""

import numpy as np
import torch
from torch import Tensor

from whalefall.kernels.cpu.compiled import floats, helper, kernel, longs


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As ``ops.rms_norm.rms_norm``."""
    out = torch.empty_like(x)
    _rms_norm((x, weight, out), out.numel() // len(weight), len(weight), eps)
    return out


def add_rms_norm(
    residual: Tensor, delta: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As ``ops.rms_norm.add_rms_norm``."""
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    dim = len(weight)
    tensors = (residual, None, None, delta, weight, total, out)
    _merge_norm(tensors, out.numel() // dim, 0, dim, eps)
    return total, out


def backward(grad: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of what was normed and of the weight; ``scale`` is 1 / rms of each row."""
    grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
    tensors = (grad, x, weight, scale, grad_x, grad_weight)
    _backward(tensors, scale.numel(), len(weight))
    return grad_x, grad_weight


def merge_norm(
    residual: Tensor,
    rows: Tensor,
    places: Tensor,
    shared: Tensor | None,
    weight: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """As ``ops.merge_norm.merge_norm``."""
    total, out = torch.empty_like(residual), torch.empty_like(residual)
    sizes = (*places.shape, len(weight))
    _merge_norm((residual, rows, places, shared, weight, total, out), *sizes, eps)
    return total, out


@kernel
def _rms_norm(x, weight, out, rows, dim, eps):
    x, weight, out = floats(x, (rows, dim)), floats(weight, dim), floats(out, (rows, dim))
    for row in range(rows):
        norm(x[row], weight, out[row], eps)


@kernel
def _backward(grad, x, weight, scale, grad_x, grad_weight, rows, dim):
    grad, x, scale = floats(grad, (rows, dim)), floats(x, (rows, dim)), floats(scale, rows)
    weight, grad_weight = floats(weight, dim), floats(grad_weight, dim)
    grad_x = floats(grad_x, (rows, dim))
    for row in range(rows):
        along = np.float32(0)
        for i in range(dim):
            product = grad[row, i] * x[row, i] * scale[row]
            grad_weight[i] += product
            along += product * weight[i]
        along *= scale[row] / np.float32(dim)
        for i in range(dim):
            grad_x[row, i] = (grad[row, i] * weight[i] - x[row, i] * along) * scale[row]


@kernel
def _merge_norm(residual, rows, places, shared, weight, total, out, tokens, top_k, dim, eps):
    has_shared = shared != 0
    residual, shared = floats(residual, (tokens, dim)), floats(shared, (tokens, dim))
    rows, places = floats(rows, (tokens * top_k, dim)), longs(places, (tokens, top_k))
    weight = floats(weight, dim)
    total, out = floats(total, (tokens, dim)), floats(out, (tokens, dim))
    for token in range(tokens):
        for i in range(dim):
            total[token, i] = residual[token, i]
        for choice in range(top_k):
            row = places[token, choice]
            for i in range(dim):
                total[token, i] += rows[row, i]
        if has_shared:
            for i in range(dim):
                total[token, i] += shared[token, i]
        norm(total[token], weight, out[token], eps)


@helper
def norm(x, weight, out, eps):
    """out = x / sqrt(mean(x^2) + eps) * weight."""
    squares = np.float32(0)
    for i in range(len(weight)):
        squares += x[i] * x[i]
    scale = np.float32(1) / np.sqrt(squares / np.float32(len(weight)) + np.float32(eps))
    for i in range(len(weight)):
        out[i] = x[i] * scale * weight[i]
