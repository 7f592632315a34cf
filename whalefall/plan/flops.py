"""Floating-point operations of a token, by part.

A product with a matrix of n parameters takes 2n forward and twice that backward; attention over a
context of S takes 2 S (q and k width + v width) forward, of which causality needs half. Norms,
rotations and activations are left out, and so is what is computed again or for MTP: this is what
papers count as model FLOPs ([B] table 2, [D]).
"""

from whalefall.plan.architecture import Architecture

FEED_FORWARD = ("dense", "shared_experts", "routed_experts", "gates")


def forward_flops(network: Architecture, sequence: int, *, causal: bool = True) -> dict[str, float]:
    """Of the main model with its head, per token of a sequence, on average over its positions;
    ``attention`` is of scores and their products with the values."""
    flops = dict.fromkeys(("attention_projections", "attention", *FEED_FORWARD, "head"), 0.0)
    flops["head"] = network.head.flops
    seen = sequence * (0.5 if causal else 1.0)
    for layer, count in network.runs:
        attention = layer.attention
        flops["attention"] += count * 2 * seen * (attention.qk_width + attention.v_width)
        for part, it in layer.matrices(network.hidden).items():
            name = "attention_projections" if part == "attention" else part
            flops[name] += count * it.met * sum(projection.flops for projection in it.projections)
    return flops


def training_flops(network: Architecture, sequence: int, *, causal: bool = True) -> float:
    """Of a trained token: three times forward. 250.4 G for DeepSeek-V3 ([B] table 2: 250)."""
    return 3 * sum(forward_flops(network, sequence, causal=causal).values())


def published_dense_flops(network: Architecture) -> float:
    """Of a trained token, by the rule behind [B] table 2's figures for dense networks.

    72 layers hidden^2 + 6 vocab hidden: each layer is taken for 12 hidden^2 parameters, attention
    to the context is left out. It gives the 394 G of "Qwen-72B" and the 2448 G of LLaMA-405B to
    the digit, where the true shapes (wider feed-forward, grouped keys) take 445 G and 2473 G;
    the table's figures for V2 and V3 are true counts.
    """
    hidden = network.hidden
    return 72 * len(network.layers) * hidden**2 + 6 * network.vocab * hidden
