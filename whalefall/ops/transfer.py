"""From the host to a device, without the host waiting."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """On the device; from pinned memory, the only kind that is copied without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
