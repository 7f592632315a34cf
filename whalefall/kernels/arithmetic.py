"""Arithmetic that takes fewer instructions than what Triton makes of its own names for it.

A register holds two BF16 numbers, which are rounded, compared and moved together: a *pair*, an
integer of 32 bits with the first number in its lower half.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def inverse_of(x):
    """1 / x to the last bit or the one before; 0 where that is below FP32's normal numbers."""
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def power_of_2(x):
    """2^x to the last bits; 0 where that is below FP32's normal numbers."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def rounded(x):
    """FP32 to BF16, two at once: ``to`` takes one at a time and then packs them."""
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [x], gl.bfloat16, is_pure=True, pack=2
    )


@gluon.jit
def pairs_of(x):
    """BF16 [rows, cols], neighbours of a row with the same thread, as pairs [rows, cols / 2]."""
    pairs = gl.inline_asm_elementwise(
        "mov.b32 $0, $2; mov.b32 $1, $2;", "=r,=r,r", [x], gl.int32, is_pure=True, pack=2
    )
    return pairs.reshape([x.shape[0], x.shape[1] // 2, 2]).split()[0]


@gluon.jit
def halves(pairs):
    """The two numbers of each pair, in FP32."""
    low = (pairs << 16).to(gl.float32, bitcast=True)
    return low, (pairs & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def larger(a, b):
    """The larger magnitudes of two pairs; the signs are of no use."""
    return gl.inline_asm_elementwise(
        "max.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, is_pure=True, pack=1
    )
