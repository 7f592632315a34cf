"""What is done once to a network that is to generate: FP8 weights, weights laid together, and
bits that do not depend on the batch."""

import torch
from torch import nn

from whalefall.errors import UserError
from whalefall.model.attention import LatentAttention
from whalefall.model.feed_forward import MLP, BlockExperts, Experts, MoE
from whalefall.model.hf_layout import is_quantized
from whalefall.model.invariance import Invariance
from whalefall.model.linear import BlockLinear, Linear, join
from whalefall.model.router import Router
from whalefall.model.transformer import Transformer
from whalefall.ops.few_rows import Weight, fixed_block
from whalefall.ops.latent_attention import PAGE

_LEAST_SPLIT, _MOST_PIECES = 8, 16
"""Pages of a piece that attention adds up, at least; and pieces of the longest context, whose sums
take 2 KB a piece, token and head (V3: 1 GB for 256 tokens)."""


def hold_fp8(network: Transformer) -> None:
    """Round the weights that DeepSeek publishes in FP8 to FP8 blocks, one module at a time.

    ``kv_b_proj`` stays as it is: decoding folds it into queries and outputs head by head, as BF16
    (V3: 16.8 M numbers a layer, 1 GB in all).
    """
    for name, module in list(network.named_modules()):
        if isinstance(module, MoE):
            module.part()
        if isinstance(module, Experts):
            network.set_submodule(name, BlockExperts.of(module, network.config))
        elif isinstance(module, Linear) and holds_fp8(f"{name}.weight"):
            network.set_submodule(name, BlockLinear.of(module))


def holds_fp8(name: str) -> bool:
    """Whether ``hold_fp8`` rounds the parameter that has this name on disk."""
    return is_quantized(name) and not name.endswith(".kv_b_proj.weight")


def join_weights(network: nn.Module) -> None:
    """Lay together the weights that multiply the same numbers in decoding.

    The first projections of queries and keys, SwiGLU's two, and the shared expert's behind the
    routed ones'. Values, names and parameters stay, so a trainer may go on with the network.
    """
    for module in network.modules():  # an MoE before its shared experts, which then lie joined
        if isinstance(module, MoE):
            module.join()
        elif isinstance(module, MLP):
            join(module.gate_proj, module.up_proj)
        elif isinstance(module, LatentAttention) and module.config.q_lora_rank is not None:
            join(module.q_a_proj, module.kv_a_proj_with_mqa)


def fix_block_rows(network: nn.Module, rows: int | None) -> None:
    """Multiply so many rows at a time, however many there are.

    Then the bits of a row do not depend on what else is in the batch. None: as is fastest.
    """
    for module in network.modules():
        if isinstance(module, Linear | MoE | Router):
            module.block_rows = rows


def make_invariant(network: Transformer) -> None:
    """What is generated will not depend on what else is in the batch (``model/invariance.py``).

    The network stays so for all who run it. Raises UserError for a vocabulary whose log-softmax on
    CUDA depends on where a row begins.
    """
    head, context = network.lm_head.weight, network.config.max_position_embeddings
    if head.is_cuda and len(head) % 4:
        raise UserError(
            "batch_invariant on a GPU needs a vocab_size that is a multiple of 4; this network's "
            f"is {len(head)}"
        )
    block_rows = _fixed_block(network)
    pages = max(_LEAST_SPLIT, -(-context // (PAGE * _MOST_PIECES)))
    network.invariance = Invariance(PAGE * pages, block_rows)
    fix_block_rows(network, block_rows)


@torch.no_grad()
def _fixed_block(network: Transformer) -> int | None:
    """As ``few_rows.fixed_block`` says for all products of generation."""
    weights = [Weight(network.lm_head.weight)]
    for module in network.modules():
        if isinstance(module, Linear):
            weights.append(module.held)
        elif isinstance(module, Experts):
            weights += module.held
        if isinstance(module, Linear | Experts) and module.recipe is not None:
            return None
    return fixed_block(network.lm_head.weight, *weights)
