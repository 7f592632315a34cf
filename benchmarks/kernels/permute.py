"""Sorting the pairs of a layer by expert, and moving rows there and back."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from common_kernels import Row

from whalefall.ops.permute import permute, sort_by_expert, unpermute

TOKENS, TOP_K, EXPERTS, HIDDEN = 16384, 6, 64, 2048
PAIRS = TOKENS * TOP_K


def rows() -> Iterator[Row]:
    generator = torch.Generator("cuda").manual_seed(0)
    like = {"device": "cuda", "generator": generator}
    chance = torch.rand(TOKENS, EXPERTS, **like)
    experts = chance.topk(TOP_K).indices
    yield Row(
        "permute: sort by expert",
        lambda: sort_by_expert(experts, EXPERTS),
        bytes=PAIRS * (2 * 8 + 4),
        peer=lambda: experts.flatten().argsort(stable=True),
        peer_name="torch.argsort",
    )
    places, row_tokens = sort_by_expert(experts, EXPERTS)
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, **like)
    moved = (TOKENS + PAIRS) * HIDDEN * 2 + PAIRS * 8
    yield Row(
        "permute: to the experts",
        lambda: permute(x, places, row_tokens),
        bytes=moved,
        peer=lambda: x.index_select(0, row_tokens),
        peer_name="index_select",
    )
    sorted_rows = permute(x, places, row_tokens)
    yield Row(
        "permute: back, summed",
        lambda: unpermute(sorted_rows, places, row_tokens),
        bytes=moved,
        peer=lambda: F.embedding_bag(places, sorted_rows, mode="sum"),
        peer_name="embedding_bag",
    )
