"""Runs that give the same bits twice on the same device.

Our kernels always add in one order. What this changes on CUDA is the library's part, which is
little: attention's backward pass is ours anyway (``ops/attention``), but for masks and for widths
other than V3's, where ours takes seven products for cuDNN's five.
"""

import os

import torch
from torch.utils import deterministic


def make_deterministic(wanted: bool) -> None:
    """Let torch choose operations that add in one order, or raise where it has none; or not."""
    torch.use_deterministic_algorithms(wanted)
    # It would fill all memory that is about to be written, which finds errors and takes time.
    deterministic.fill_uninitialized_memory = not wanted  # type: ignore[attr-defined]
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS wants for it
