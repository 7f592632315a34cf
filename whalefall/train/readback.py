"""Numbers on their way from the device to the host, so that nobody has to wait for them."""

from collections.abc import Mapping

import torch
from torch import Tensor


class Readback:
    """Device tensors being copied; ``read`` waits for the copies alone, not for later work."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self._host = {
            name: tensor.detach().to("cpu", non_blocking=True) for name, tensor in tensors.items()
        }
        self._done = torch.cuda.Event() if any(t.is_cuda for t in tensors.values()) else None
        if self._done is not None:
            self._done.record()

    def read(self) -> dict[str, Tensor]:
        if self._done is not None:
            self._done.synchronize()
        return self._host
