"""What every test shares: shape checks at run time, one thread, a tiny network."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before anything imports these rooms: from here on their jaxtyping signatures are checked at
# every call. Each xdist worker reads this file too.
jaxtyping.install_import_hook(
    [f"whalefall.{room}" for room in ("model", "ops", "engine", "train", "data")],
    "typechecks.checked",
)

from whalefall.config.model import ModelConfig  # noqa: E402

torch.set_num_threads(1)

# The same examples on every machine, however slow, and no folder left behind.
settings.register_profile("whalefall", deadline=None, derandomize=True, database=None)
settings.load_profile("whalefall")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def tiny_config() -> ModelConfig:
    """DeepSeek-V3 with every part on, small enough for milliseconds."""
    return ModelConfig(
        vocab_size=128,
        hidden_size=48,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        intermediate_size=96,
        num_attention_heads=4,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=12,
        qk_rope_head_dim=8,
        v_head_dim=12,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        moe_intermediate_size=20,
        num_nextn_predict_layers=1,
        initializer_range=0.05,
    )
