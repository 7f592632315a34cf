"""The network that most tests run."""

from whalefall.config.model import ModelConfig

TINY = ModelConfig(
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
"""DeepSeek-V3 with every part on, small enough for milliseconds."""
