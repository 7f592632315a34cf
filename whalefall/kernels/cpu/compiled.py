"""From loops over numbers to functions of tensors.

A kernel is written over addresses and sizes: handing over an array costs Numba a microsecond, an
integer next to nothing. Inside, ``floats(x, (rows, dim))`` is the array at an address.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, config, njit, types
from numba.extending import intrinsic
from torch import Tensor

_FAST = {"reassoc", "contract", "nsz", "arcp"}
"""Sums may be cut into vectors; NaN and infinities are taken into account."""


def kernel(function: Callable[..., None]) -> Callable[..., None]:
    """Compile a function of addresses and numbers, to be called with tensors and numbers.

    None is address 0. What the tensors must be (their type, all of it contiguous but for strides
    that are among the numbers) nobody checks here: ``ops`` does, by ``runs_cpu_kernel``.
    """
    with _kept_on_disk():
        run = njit(cache=True, nogil=True, error_model="numpy", fastmath=_FAST)(function)

    def call(tensors: Sequence[Tensor | None], *numbers: float) -> None:
        run(*[0 if x is None else x.data_ptr() for x in tensors], *numbers)

    return call


def helper(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function that kernels call."""
    return njit(error_model="numpy", fastmath=_FAST)(function)


@contextmanager
def _kept_on_disk() -> Iterator[None]:
    """Machine code goes to a folder of this version of the kernels.

    Numba itself looks at a kernel's own file only, not at those of the helpers that it calls.
    """
    here, given = Path(__file__).parent, config.CACHE_DIR
    sources = b"".join(path.read_bytes() for path in sorted(here.glob("*.py")))
    version = hashlib.sha256(sources).hexdigest()[:16]
    config.CACHE_DIR = str(Path(given or here / "__pycache__") / f"numba-{version}")
    try:
        yield
    finally:
        config.CACHE_DIR = given


def _pointer_to(number):
    @intrinsic
    def pointer(_typing, _address):
        result = types.CPointer(number)

        def generate(context, builder, _signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(result))

        return result(types.int64), generate

    return pointer


_float_at, _long_at, _int_at = map(_pointer_to, (types.float32, types.int64, types.int32))


@helper
def floats(address, shape):
    return carray(_float_at(address), shape)


@helper
def longs(address, shape):
    return carray(_long_at(address), shape)


@helper
def ints(address, shape):
    return carray(_int_at(address), shape)


@intrinsic
def _bits_as_float(_typing, _bits):
    def generate(context, builder, _signature, arguments):
        return builder.bitcast(arguments[0], context.get_value_type(types.float32))

    return types.float32(types.int32), generate


@helper
def exp(x):
    """e^x to two units in the last place, between e^-87 and e^88; loops over it become vectors."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1)
    return p * _bits_as_float(np.int32((np.int32(n) + np.int32(127)) << np.int32(23)))
