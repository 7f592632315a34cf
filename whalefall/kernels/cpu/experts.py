"""SwiGLU, and the experts of few rows around it."""

import numpy as np
import torch
from torch import Tensor

from whalefall.kernels.cpu.compiled import exp, floats, helper, ints, kernel, longs
from whalefall.kernels.cpu.linear import multiply


def few_rows(
    x: Tensor,
    row_tokens: Tensor,
    row_weights: Tensor,
    ends: Tensor,
    gate_up: Tensor,
    down: Tensor,
    *,
    row_by_row: bool,
) -> Tensor:
    """As ``ops.few_rows.few_rows``; ``row_by_row`` as in ``linear``."""
    (tokens, hidden), (groups, _, inner), pairs = x.shape, down.shape, len(row_tokens)
    out = x.new_empty(pairs + (tokens if groups > len(ends) else 0), hidden)
    tensors = (x, row_tokens, row_weights, ends, gate_up, down, out)
    _few_rows(tensors, tokens, pairs, len(out), hidden, inner, len(ends), groups, int(row_by_row))
    return out


def swiglu(gate_up: Tensor, weights: Tensor | None) -> Tensor:
    """As ``ops.swiglu.swiglu``."""
    inner = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], inner)
    _swiglu((gate_up, weights, out), out.numel() // inner, inner)
    return out


def swiglu_backward(
    grad: Tensor, gate_up: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Gradients of ``gate_up`` and of the weights."""
    grad_gate_up = torch.empty_like(gate_up)
    grad_weights = None if weights is None else torch.empty_like(weights)
    inner = grad.shape[-1]
    tensors = (grad, gate_up, weights, grad_gate_up, grad_weights)
    _swiglu_backward(tensors, grad.numel() // inner, inner)
    return grad_gate_up, grad_weights


@kernel
def _swiglu(gate_up, weights, out, rows, inner):
    is_weighted = weights != 0
    gate_up, out = floats(gate_up, (rows, 2 * inner)), floats(out, (rows, inner))
    weights = floats(weights, rows)
    for row in range(rows):
        weight = weights[row] if is_weighted else np.float32(1)
        _silu_mul(gate_up[row, :inner], gate_up[row, inner:], weight, out[row])


@kernel
def _swiglu_backward(grad, gate_up, weights, grad_gate_up, grad_weights, rows, inner):
    is_weighted = weights != 0
    grad, weights = floats(grad, (rows, inner)), floats(weights, rows)
    gate_up, grad_weights = floats(gate_up, (rows, 2, inner)), floats(grad_weights, rows)
    grad_gate_up = floats(grad_gate_up, (rows, 2, inner))
    for row in range(rows):
        weight, along = weights[row] if is_weighted else np.float32(1), np.float32(0)
        for i in range(inner):
            gate, up = gate_up[row, 0, i], gate_up[row, 1, i]
            sigmoid = np.float32(1) / (np.float32(1) + exp(-gate))
            silu, grad_out = gate * sigmoid, grad[row, i]
            along += grad_out * silu * up
            grad_out *= weight
            grad_gate_up[row, 0, i] = grad_out * up * (sigmoid + silu * (np.float32(1) - sigmoid))
            grad_gate_up[row, 1, i] = grad_out * silu
        if is_weighted:
            grad_weights[row] = along


@kernel
def _few_rows(
    x, row_tokens, row_weights, ends, gate_up, down, out,
    tokens, pairs, rows, hidden, inner, experts, groups, row_by_row,
):  # fmt: skip
    x, out = floats(x, (tokens, hidden)), floats(out, (rows, hidden))
    row_tokens, row_weights = longs(row_tokens, pairs), floats(row_weights, pairs)
    ends = ints(ends, experts)
    gate_up = floats(gate_up, (groups, 2 * inner, hidden))
    down = floats(down, (groups, hidden, inner))
    start = 0
    for expert in range(experts):
        part = slice(start, ends[expert])
        if ends[expert] > start:
            own = np.empty((ends[expert] - start, hidden), np.float32)
            for row in range(len(own)):
                for i in range(hidden):
                    own[row, i] = x[row_tokens[start + row], i]
            _expert(own, row_weights[part], gate_up[expert], down[expert], out[part], row_by_row)
        start = ends[expert]
    if groups > experts:
        ones = np.ones(tokens, np.float32)
        _expert(x, ones, gate_up[experts], down[experts], out[pairs:], row_by_row)


@helper
def _expert(x, weights, gate_up, down, out, row_by_row):
    """down(silu(gate(x)) * up(x) * weight) of every row."""
    rows, inner = len(x), down.shape[1]
    joint, activated = np.empty((rows, 2 * inner), np.float32), np.empty((rows, inner), np.float32)
    multiply(x, gate_up, joint, row_by_row)
    for row in range(rows):
        _silu_mul(joint[row, :inner], joint[row, inner:], weights[row], activated[row])
    multiply(activated, down, out, row_by_row)


@helper
def _silu_mul(gate, up, weight, out):
    for i in range(len(out)):
        out[i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i] * weight
