"""The gate's choice in a decode step, and the rows sorted by expert."""

import numpy as np
import torch
from torch import Tensor

from whalefall.kernels.cpu.compiled import exp, floats, helper, ints, kernel, longs


def choose(
    logits: Tensor,
    bias: Tensor,
    top_k: int,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    scale: float,
) -> tuple[Tensor, ...]:
    """As ``ops.gate.gate`` from the logits on; of scores that tie the first wins."""
    tokens, experts = logits.shape
    chosen, places = logits.new_empty(2, tokens, top_k, dtype=torch.int64)
    weights = logits.new_empty(tokens, top_k)
    ends = logits.new_empty(experts, dtype=torch.int32)
    row_tokens, row_weights = chosen.new_empty(tokens * top_k), logits.new_empty(tokens * top_k)
    out = chosen, weights, places, ends, row_tokens, row_weights
    sizes = (tokens, experts, top_k, n_group, topk_group)
    _choose_and_sort((logits, bias, *out), *sizes, int(norm_topk_prob), scale)
    return out


@kernel
def _choose_and_sort(
    logits, bias,
    chosen, weights, places, ends, row_tokens, row_weights,
    tokens, experts, top_k, n_group, topk_group, norm_topk_prob, scale,
):  # fmt: skip
    scores = floats(logits, (tokens, experts))
    bias, ends = floats(bias, experts), ints(ends, experts)
    chosen, weights = longs(chosen, (tokens, top_k)), floats(weights, (tokens, top_k))
    places, pairs = longs(places, (tokens, top_k)), tokens * top_k
    for token in range(tokens):
        _choose(scores[token], bias, chosen[token], n_group, topk_group)
        total = np.float32(1e-20)
        for choice in range(top_k):
            weights[token, choice] = scores[token, chosen[token, choice]]
            total += weights[token, choice]
        share = np.float32(scale) / total if norm_topk_prob else np.float32(scale)
        for choice in range(top_k):
            weights[token, choice] *= share
    _sort(chosen, weights, places, ends, longs(row_tokens, pairs), floats(row_weights, pairs))


@helper
def _choose(scores, bias, chosen, n_group, topk_group):
    """The best experts by biased score, the best first; ``scores`` come as logits."""
    biased = np.empty(len(scores), np.float32)
    for i in range(len(scores)):
        scores[i] = np.float32(1) / (np.float32(1) + exp(-scores[i]))
        biased[i] = scores[i] + bias[i]
    if topk_group < n_group:
        _close_groups(biased, n_group, topk_group)
    for choice in range(len(chosen)):
        chosen[choice] = _largest(biased)
        biased[chosen[choice]] = -np.inf


@helper
def _close_groups(biased, n_group, topk_group):
    """-inf for all but the groups whose two best scores are worth most."""
    size = len(biased) // n_group
    worth, is_open = np.empty(n_group, np.float32), np.zeros(n_group, np.int64)
    for group in range(n_group):
        first = second = np.float32(-np.inf)
        for i in range(group * size, (group + 1) * size):
            second = max(second, min(first, biased[i]))
            first = max(first, biased[i])
        worth[group] = first + second
    for _ in range(topk_group):
        best = _largest(worth)
        worth[best], is_open[best] = -np.inf, 1
    for i in range(len(biased)):
        if not is_open[i // size]:
            biased[i] = -np.inf


@helper
def _largest(x):
    """The index of the largest number, the first if several tie."""
    best = 0
    for i in range(1, len(x)):
        if x[i] > x[best]:
            best = i
    return best


@helper
def _sort(chosen, weights, places, ends, row_tokens, row_weights):
    """By expert, and by token within one."""
    tokens, top_k = chosen.shape
    for expert in range(len(ends)):
        ends[expert] = 0
    for token in range(tokens):
        for choice in range(top_k):
            ends[chosen[token, choice]] += 1
    next_row, end = np.empty(len(ends), np.int64), 0
    for expert in range(len(ends)):
        next_row[expert] = end
        end += ends[expert]
        ends[expert] = end
    for token in range(tokens):
        for choice in range(top_k):
            row = next_row[chosen[token, choice]]
            next_row[chosen[token, choice]] += 1
            places[token, choice], row_tokens[row] = row, token
            row_weights[row] = weights[token, choice]
