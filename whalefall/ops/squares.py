"""Sums of squares that lie with a gradient, left there by the product that made it.

The norm of all gradients is a pass over all of them. Nearly all are the experts', and the kernels
that write these have every number in registers, not yet rounded: they add up the squares too, and
the norm reads some sums instead.

The sums are an attribute of the gradient's storage, because that is what stays the same on the way
to the optimizer, where views and ``detach`` make new tensors; they go when it goes. They hold until
something is written, which is seen by the version that every operation in place counts up. Writes
through ``.data``, of collectives and of kernels hide from it: who changes a gradient so must call
``torch.autograd.graph.increment_version``.
"""

from jaxtyping import Float
from torch import Tensor

_ATTRIBUTE = "_whalefall_squares"


def keep_squares(x: Tensor, sums: Float[Tensor, "parts"]) -> None:
    """Leaves with x, which is all of its storage, what its squares add up to, in parts."""
    assert _is_whole(x)
    if not x.is_inference():  # such a tensor has no version
        setattr(x.untyped_storage(), _ATTRIBUTE, (x.dtype, x._version, sums))


def kept_squares(x: Tensor) -> Float[Tensor, "parts"] | None:
    """What was left with these numbers; None if nothing was or it may not hold any more."""
    kept = getattr(x.untyped_storage(), _ATTRIBUTE, None)
    if kept is None or kept[:2] != (x.dtype, x._version) or not _is_whole(x):
        return None
    sums: Tensor = kept[2]
    return sums


def _is_whole(x: Tensor) -> bool:
    """Whether x has all numbers of its storage, each once."""
    return x.is_contiguous() and x.nbytes == x.untyped_storage().nbytes()
