"""Bytes that a layer keeps from its forward to its backward pass, as our trainer keeps them.

Read off ``model/`` and ``ops/``: every operation saves its inputs or what it documents. In FP8 a
projection keeps its input transposed in tiles, one byte a number and a scale of four for 128
(``ops/fp8_linear.py``); the experts keep SwiGLU's input so too, and not its output
(``ops/fp8_experts.py``, [A] 3.3.3).
"""

from dataclasses import dataclass

from whalefall.plan.architecture import Attention, Dense, Experts, LatentAttention, Layer
from whalefall.plan.layout import Recompute, Setting
from whalefall.plan.units import FP8_TILES, TILE

STATISTIC = 4
"""Bytes of an FP32 number a row, such as a norm's."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer and micro-batch."""

    always: float
    """The block's input; scores and choices, which the balance loss reads."""
    projections: float
    """The norm before attention, MLA's projections, queries, keys, values."""
    outside: float
    """What the attention kernel returned, and the feed-forward half."""
    workspace: float
    """More than is kept, at most, while the backward pass is in the feed-forward half: gradients
    of rows, and of its weights."""

    def under(self, recompute: Recompute) -> float:
        outside = self.always + (self.outside if recompute != "block" else 0)
        return outside + (self.projections if recompute == "none" else 0)

    def workspace_under(self, recompute: Recompute) -> float:
        """``selective`` makes its part again when the feed-forward half is done and gone."""
        made_again = self.outside + self.projections if recompute == "block" else 0
        return self.workspace + made_again


def kept_by(layer: Layer, setting: Setting) -> Kept:
    hidden, width, tokens = setting.architecture.hidden, setting.layout.bytes, setting.tokens
    attention, half = layer.attention, layer.feed_forward
    routing = 0
    if isinstance(half, Dense):
        feed_forward, workspace = _dense(half, setting)
    else:
        feed_forward, workspace = _experts(half, setting)
        routing = 4 * half.routed + (8 + 4) * half.top_k  # FP32 scores and weights, 64-bit choices
    residual = width * hidden + STATISTIC
    returned = width * attention.v_width + STATISTIC * attention.heads
    return Kept(
        always=tokens * (width * hidden + routing),
        projections=tokens * _projections(attention, setting),
        outside=tokens * (returned + residual) + feed_forward,
        workspace=workspace + 2 * tokens * width * hidden,  # the residual stream's gradients
    )


def deferred_by(layer: Layer, setting: Setting) -> float:
    """Bytes that a put-off weight gradient waits with, beyond what is kept for it: its output's
    gradients, and its inputs where they were made again."""
    recompute, numbers = setting.layout.recompute, 0
    for part, it in layer.matrices(setting.architecture.hidden).items():
        made_again = recompute == "block" or (recompute == "selective" and part == "attention")
        if part != "gates":
            numbers += it.met * sum(p.outputs + made_again * p.inputs for p in it.projections)
    return setting.tokens * setting.layout.input_bytes * numbers


def _projections(attention: Attention, setting: Setting) -> float:
    """A token's bytes from the block's input to what attention reads."""
    width, kept_input = setting.layout.bytes, setting.layout.input_bytes
    is_fp8 = setting.layout.is_fp8
    # Two projections read the normed input: each keeps its own tiles, or both one BF16 tensor.
    kept = STATISTIC + (2 if is_fp8 else 1) * kept_input * setting.architecture.hidden
    if is_fp8:  # in BF16 the last projection's input is attention's output itself
        kept += FP8_TILES * attention.v_width
    if not isinstance(attention, LatentAttention):
        return kept + width * (attention.qk_width + attention.kv_width)
    if attention.q_rank is not None:
        kept += STATISTIC + (width + kept_input) * attention.q_rank
    kept += STATISTIC + width * attention.kv_numbers + kept_input * attention.kv_rank
    # Queries and keys are written anew with their rotated parts; values are a view.
    return kept + width * (2 * attention.qk_width + attention.kv_width)


def _swiglu(inner: int, setting: Setting) -> float:
    """Bytes that a dense layer or the shared experts keep besides their input."""
    width = setting.layout.bytes
    # In BF16 gate and up are put side by side for one product, and that copy of them is kept.
    copied = 0 if setting.layout.is_fp8 else 2 * width * inner * setting.architecture.hidden
    return setting.tokens * (2 * width + setting.layout.input_bytes) * inner + copied


def _dense(dense: Dense, setting: Setting) -> tuple[float, float]:
    """Bytes that are kept, and the workspace."""
    width, inner, hidden = setting.layout.bytes, dense.intermediate, setting.architecture.hidden
    if setting.layout.is_fp8:
        rows = width * (hidden + 2 * inner) + 2 * FP8_TILES * 2 * inner
    else:
        rows = width * (hidden + inner)
    kept = _swiglu(inner, setting) + setting.tokens * setting.layout.input_bytes * hidden
    return kept, setting.tokens * rows + 3 * width * inner * hidden


def _experts(experts: Experts, setting: Setting) -> tuple[float, float]:
    """Bytes that shared and routed experts keep, and the workspace of the routed ones."""
    hidden, width, inner = setting.architecture.hidden, setting.layout.bytes, experts.intermediate
    rows, held = setting.tokens * experts.top_k, experts.routed // setting.layout.ep
    # The gate reads the normed tokens as they are; places and weights of the sorted rows.
    kept = float(setting.tokens * width * hidden + rows * (8 + 4))
    if experts.shared:
        kept += _swiglu(experts.shared * inner, setting)
        if setting.layout.is_fp8:  # else they read what the gate reads
            kept += setting.tokens * FP8_TILES * hidden
    up, down = (width * held * size * hidden * inner for size in (2, 1))  # weights' gradients
    if setting.layout.is_fp8:
        # Each expert's columns begin at a multiple of 128.
        columns = FP8_TILES * (rows // TILE + held) * TILE
        kept += columns * hidden + FP8_TILES * rows * 2 * inner
        # One operation from end to end: nothing goes before its end.
        bf16, straight, turned = 2 * hidden + inner, hidden + 2 * inner, hidden + 3 * inner
        return kept, rows * (width * bf16 + FP8_TILES * straight) + columns * turned + up + down
    kept += rows * width * (hidden + 2 * inner + inner)
    # At the last projection everything is there; at the first, SwiGLU's input and output are gone.
    at_last, at_first = hidden + inner, hidden - inner
    workspace = max(rows * width * at_last + down, rows * width * at_first + down + up)
    return kept, workspace
