"""How the inference engine runs a network."""

from pydantic import Field

from whalefall.config.model import Section


class EngineConfig(Section):
    """Every limit that a batch of requests meets."""

    max_running: int = Field(256, gt=0)
    """Requests that generate at the same time; the others wait."""
    token_budget: int = Field(8192, gt=0)
    """Tokens of one step: one and its drafts a running request, the rest for prompts."""
    cache_tokens: int | None = Field(None, gt=0)
    """Tokens that the latent cache holds. Null takes most of the free memory on a GPU, and enough
    for ``max_running`` requests of full context, but at most 1 GiB, elsewhere."""
    fp8_cache: bool = False
    """Hold the latents in FP8: 656 bytes a token and layer of V3, not 1,152, so 1.76 times the
    tokens. Each number keeps 4 significant bits, an error of 2.6 % (root mean square); the
    rotated keys stay in BF16."""
    drafts: int = Field(0, ge=0)
    """Tokens that MTP proposes a step; beyond the network's depths the last module is used again.
    The text does not depend on it."""
    prefix_cache: bool = True
    """Find beginnings of prompts in the cache that other requests left there."""
    batch_invariant: bool = False
    """Make a request's bits independent of what else is in its batch, at some cost in speed."""
    cuda_graphs: bool = True
    """Launch a decode step as one CUDA graph."""
