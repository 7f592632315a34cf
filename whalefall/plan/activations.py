"""Bytes that a layer keeps from its forward to its backward pass, as our trainer keeps them.

Read off ``model/`` and ``ops/``: every operation saves its inputs or what it documents. In FP8 a
projection keeps its input transposed in tiles, one byte a number and a scale of four for 128
(``ops/fp8_linear.py``); an MLP keeps SwiGLU's input in tiles too, and not its output
(``ops/fp8_mlp.py``, [A] 3.3.3).
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
        projections=tokens * _projections(attention, setting) + _side_by_side(attention, setting),
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
    # Projections that are not one product keep tiles each, or all of them one BF16 tensor.
    products = 2 if is_fp8 and not _is_joint(attention) else 1
    kept = STATISTIC + products * kept_input * setting.architecture.hidden
    if is_fp8:  # in BF16 the last projection's input is attention's output itself
        kept += FP8_TILES * attention.v_width
    if not isinstance(attention, LatentAttention):
        return kept + width * (attention.qk_width + attention.kv_width)
    if attention.q_rank is not None:
        kept += STATISTIC + (width + kept_input) * attention.q_rank
    kept += STATISTIC + width * attention.kv_numbers + kept_input * attention.kv_rank
    # Queries and keys are written anew with their rotated parts; values are a view.
    return kept + width * (2 * attention.qk_width + attention.kv_width)


def _is_joint(attention: Attention) -> bool:
    """Whether queries' latents and keys' and values' are one product of the normed input."""
    return isinstance(attention, LatentAttention) and attention.q_rank is not None


def _side_by_side(attention: Attention, setting: Setting) -> float:
    """The copy of two weights that a joint product in BF16 reads."""
    if setting.layout.is_fp8 or not isinstance(attention, LatentAttention):
        return 0
    rows = (attention.q_rank or 0) + attention.kv_numbers if _is_joint(attention) else 0
    return setting.layout.bytes * rows * setting.architecture.hidden


def _swiglu(inner: int, setting: Setting) -> float:
    """Bytes that a dense layer or the shared experts keep besides their input."""
    width = setting.layout.bytes
    if setting.layout.is_fp8 and inner % TILE == 0:
        return setting.tokens * FP8_TILES * 2 * inner
    # In BF16 gate and up are put side by side for one product, and that copy of them is kept.
    copied = 0 if setting.layout.is_fp8 else 2 * width * inner * setting.architecture.hidden
    return setting.tokens * (2 * width + setting.layout.input_bytes) * inner + copied


def _fused(rows: float, columns: float, inner: int, setting: Setting, weights: float) -> float:
    """The workspace of an MLP whose backward pass is one operation in FP8 (``ops/fp8_mlp.py``).

    Tiles of SwiGLU's gradient and, transposed, of both gradients and its output, and with them the
    largest of: tiles of the output's gradient and what SwiGLU's is made of, the gradient of the
    rows, the gradients of the weights. ``columns`` are bytes of a transposed tiles' row.
    """
    width, hidden = setting.layout.bytes, setting.architecture.hidden
    tiles = FP8_TILES * rows * 2 * inner + columns * (hidden + 3 * inner)
    begun = rows * (FP8_TILES * hidden + width * inner)
    return tiles + max(begun, rows * width * hidden, weights)


def _dense(dense: Dense, setting: Setting) -> tuple[float, float]:
    """Bytes that are kept, and the workspace."""
    width, inner, hidden = setting.layout.bytes, dense.intermediate, setting.architecture.hidden
    weights = 3 * width * inner * hidden  # their gradients
    kept = _swiglu(inner, setting) + setting.tokens * setting.layout.input_bytes * hidden
    if setting.layout.is_fp8 and inner % TILE == 0:
        tokens = setting.tokens
        return kept, _fused(tokens, FP8_TILES * tokens, inner, setting, weights)
    if setting.layout.is_fp8:
        rows = width * (hidden + 2 * inner) + 2 * FP8_TILES * 2 * inner
    else:
        rows = width * (hidden + inner)
    return kept, setting.tokens * rows + weights


def _experts(experts: Experts, setting: Setting) -> tuple[float, float]:
    """Bytes that shared and routed experts keep, and the workspace of the routed ones."""
    hidden, width, inner = setting.architecture.hidden, setting.layout.bytes, experts.intermediate
    rows, held = setting.tokens * experts.top_k, experts.routed // setting.layout.ep
    # The gate reads the normed tokens as they are; places, tokens and weights of the sorted rows.
    kept = float(setting.tokens * width * hidden + rows * (8 + 4 + 4))
    if experts.shared:
        kept += _swiglu(experts.shared * inner, setting)
        if setting.layout.is_fp8:  # else they read what the gate reads
            kept += setting.tokens * FP8_TILES * hidden
    up, down = (width * held * size * hidden * inner for size in (2, 1))  # weights' gradients
    if setting.layout.is_fp8:
        # Each expert's columns begin at a multiple of 128.
        columns = FP8_TILES * (rows // TILE + held) * TILE
        kept += columns * hidden + FP8_TILES * rows * 2 * inner
        return kept, _fused(rows, columns, inner, setting, up + down)
    kept += rows * width * (hidden + 2 * inner + inner)
    # At the last projection everything is there; at the first, SwiGLU's input and output are gone.
    at_last, at_first = hidden + inner, hidden - inner
    workspace = max(rows * width * at_last + down, rows * width * at_first + down + up)
    return kept, workspace
