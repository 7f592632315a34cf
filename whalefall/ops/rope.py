"""Rotary position embedding on interleaved pairs, with YaRN (paper 2.1.1 and 4.3)."""

import math

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor


def inverse_frequencies(
    dim: int, theta: float, device: torch.device | str = "cpu"
) -> Float[Tensor, "half"]:
    """theta^(-2i/dim) for each pair i, in radians a position."""
    return theta ** -(torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)


def yarn_frequencies(
    dim: int,
    theta: float,
    *,
    factor: float,
    original_length: int,
    beta_fast: float,
    beta_slow: float,
    device: torch.device | str = "cpu",
) -> Float[Tensor, "half"]:
    """Inverse frequencies interpolated by YaRN (arXiv 2309.00071, section 3.2).

    Pairs that turn more than ``beta_fast`` times within ``original_length`` keep their frequency,
    those that turn less than ``beta_slow`` times are divided by ``factor``, those between are
    blended linearly in the index of the pair.
    """

    def pair_that_turns(rotations: float) -> float:
        return dim * math.log(original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_that_turns(beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=device)
    ramp = (index - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    frequencies = inverse_frequencies(dim, theta, device)
    return frequencies / factor * interpolated + frequencies * (1 - interpolated)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """0.1 mscale ln(factor) + 1: the paper's sqrt(t) for ``mscale`` 1 (1.3689 at factor 40)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotations(
    positions: Int[Tensor, "*batch seq"], frequencies: Float[Tensor, "half"], scale: float = 1.0
) -> Complex[Tensor, "*batch seq half"]:
    """The turn of every pair at every position, as complex numbers of modulus ``scale``."""
    angles = positions.unsqueeze(-1).float() * frequencies
    return torch.polar(torch.full_like(angles, scale), angles)


def rotate(
    x: Float[Tensor, "*batch rope"], rotation: Complex[Tensor, "*#batch half"]
) -> Float[Tensor, "*batch rope"]:
    """Turn the pairs (x_2i, x_2i+1); computed in FP32, returned in the type of ``x``."""
    pairs = torch.view_as_complex(x.float().view(*x.shape[:-1], x.shape[-1] // 2, 2))
    return torch.view_as_real(pairs * rotation).flatten(-2).type_as(x)
