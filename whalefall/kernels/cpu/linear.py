"""Products with few rows: a weight is read once for up to four of them.

For one row the library's product starts in 2 us and reads a weight at half the memory's speed; for
many rows it is the better one.
"""

import numpy as np
from torch import Tensor

from whalefall.kernels.cpu.compiled import floats, helper, kernel


def linear(x: Tensor, weight: Tensor, *, row_by_row: bool = False) -> Tensor:
    """x @ weight^T; row by row the bits of one do not depend on how many others there are."""
    outer, inner = weight.shape
    out = x.new_empty(*x.shape[:-1], outer)
    _linear((x, weight, out), x.numel() // inner, inner, outer, int(row_by_row))
    return out


@kernel
def _linear(x, weight, out, rows, inner, outer, row_by_row):
    x, out = floats(x, (rows, inner)), floats(out, (rows, outer))
    multiply(x, floats(weight, (outer, inner)), out, row_by_row)


@helper
def multiply(x, weight, out, row_by_row):
    """out = x @ weight^T: rows four at a time, then two, then one, or all one by one."""
    row = 0
    while not row_by_row and row + 4 <= len(x):
        _four_rows(x[row : row + 4], weight, out[row : row + 4])
        row += 4
    if not row_by_row and row + 2 <= len(x):
        _two_rows(x[row], x[row + 1], weight, out[row], out[row + 1])
        row += 2
    while row < len(x):
        _one_row(x[row], weight, out[row])
        row += 1


@helper
def _one_row(x, weight, out):
    for i in range(len(weight)):
        total = np.float32(0)
        for k in range(len(x)):
            total += x[k] * weight[i, k]
        out[i] = total


@helper
def _two_rows(x, y, weight, of_x, of_y):
    for i in range(len(weight)):
        a = b = np.float32(0)
        for k in range(len(x)):
            a += x[k] * weight[i, k]
            b += y[k] * weight[i, k]
        of_x[i], of_y[i] = a, b


@helper
def _four_rows(x, weight, out):
    """Two outputs at a time: eight sums stay in registers, for six numbers read."""
    for i in range(0, len(weight), 2):
        j = min(i + 1, len(weight) - 1)
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        for k in range(x.shape[1]):
            a, b = weight[i, k], weight[j, k]
            a0 += x[0, k] * a
            a1 += x[1, k] * a
            a2 += x[2, k] * a
            a3 += x[3, k] * a
            b0 += x[0, k] * b
            b1 += x[1, k] * b
            b2 += x[2, k] * b
            b3 += x[3, k] * b
        out[0, i], out[1, i], out[2, i], out[3, i] = a0, a1, a2, a3
        out[0, j], out[1, j], out[2, j], out[3, j] = b0, b1, b2, b3
