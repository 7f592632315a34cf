"""What launchers ask about a GPU. Without Triton, so that ``ops`` may ask, too."""

from functools import cache

import torch


@cache
def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(device: torch.device) -> bool:
    """Whether it has the copy engine and tensor cores that Gluon kernels are written for."""
    return torch.cuda.get_device_capability(device)[0] == 9
