"""How many pages the latent cache gets."""

import torch

from whalefall.config.engine import EngineConfig
from whalefall.errors import UserError
from whalefall.model.cache import entry_bytes
from whalefall.model.transformer import Transformer
from whalefall.ops.latent_attention import PAGE

_SHARE_OF_FREE = 0.85
"""Of a GPU's free memory; the rest is for what a step computes."""
_MOST_ON_CPU = 2**30


def pages_that_fit(model: Transformer, config: EngineConfig) -> int:
    """Pages of 64 tokens, in all layers. Raises UserError where a single context does not fit."""
    weight = model.lm_head.weight
    context = model.config.max_position_embeddings
    layers = model.config.num_hidden_layers
    if config.drafts:
        layers += len(model.mtp_modules)
    page = PAGE * layers * entry_bytes(model.config, weight.dtype, fp8=config.fp8_cache)
    if config.cache_tokens is not None:
        return -(-config.cache_tokens // PAGE)
    if weight.is_cuda:
        free, _ = torch.cuda.mem_get_info(weight.device)
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        room = int((free + unused) * _SHARE_OF_FREE)
    else:
        room = _MOST_ON_CPU
    wanted = config.max_running * -(-context // PAGE)
    pages = min(wanted, room // page)
    least = -(-context // PAGE)
    if pages < least:
        raise UserError(
            f"a cache for one context of {context} tokens needs {least * page / 2**30:.2f} GiB, "
            f"and there are {room / 2**30:.2f}: free memory, or set cache_tokens"
        )
    return pages
