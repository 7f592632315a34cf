"""SwiGLU of few rows, expert by expert."""

import numpy as np
from torch import Tensor

from whalefall.kernels.cpu.compiled import exp, floats, helper, ints, kernel, longs
from whalefall.kernels.cpu.linear import multiply


def few_rows(
    x: Tensor, row_tokens: Tensor, row_weights: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    """As ``ops.few_rows.few_rows``."""
    (tokens, hidden), (groups, _, inner), pairs = x.shape, down.shape, len(row_tokens)
    out = x.new_empty(pairs + (tokens if groups > len(ends) else 0), hidden)
    tensors = (x, row_tokens, row_weights, ends, gate_up, down, out)
    _few_rows(tensors, tokens, pairs, len(out), hidden, inner, len(ends), groups)
    return out


@kernel
def _few_rows(
    x, row_tokens, row_weights, ends, gate_up, down, out,
    tokens, pairs, rows, hidden, inner, experts, groups,
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
            _swiglu(own, row_weights[part], gate_up[expert], down[expert], out[part])
        start = ends[expert]
    if groups > experts:
        _swiglu(x, np.ones(tokens, np.float32), gate_up[experts], down[experts], out[pairs:])


@helper
def _swiglu(x, weights, gate_up, down, out):
    """down(silu(gate(x)) * up(x) * weight) of every row."""
    rows, inner = len(x), down.shape[1]
    joint, activated = np.empty((rows, 2 * inner), np.float32), np.empty((rows, inner), np.float32)
    multiply(x, gate_up, joint)
    for row in range(rows):
        gate, up = joint[row, :inner], joint[row, inner:]
        for i in range(inner):
            activated[row, i] = gate[i] / (np.float32(1) + exp(-gate[i])) * up[i] * weights[row]
    multiply(activated, down, out)
