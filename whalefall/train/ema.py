"""An average of the parameters on the CPU, updated beside the training (paper 3.2.3)."""

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from whalefall.train.masters import Masters


class EMA:
    """average = decay * average + (1 - decay) * weight, starting from the initial weights.

    There is no bias correction: before about 1 / (1 - decay) updates the average still remembers
    where it started. Averages are FP32, whatever the weights are. On CUDA an update copies the
    weights, as they are stored, to pinned memory on a stream of its own and averages them in a
    thread; call ``wait_for_copy`` before the weights change again.
    """

    def __init__(self, weights: Masters, decay: float):
        """``weights`` are live; they are read at each update."""
        self._weights = self._staged = weights
        self._averages = {
            name: weight.detach().to("cpu", torch.float32, copy=True)
            for name, weight in weights.items()
        }
        self._rate = 1 - decay
        device = weights.tensors()[0].device
        self._is_asynchronous = device.type == "cuda"
        if self._is_asynchronous:
            self._staged = weights.pinned()
            self._stream = torch.cuda.Stream(device)
            self._copied = torch.cuda.Event()
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="ema")
            self._pending: Future[None] | None = None

    def update(self) -> None:
        """Absorb the weights as they are now."""
        if not self._is_asynchronous:
            self._absorb()
            return
        self.join()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            torch._foreach_copy_(self._staged.tensors(), self._weights.tensors(), non_blocking=True)
            self._copied.record()
        self._pending = self._worker.submit(self._absorb_staged)

    def wait_for_copy(self) -> None:
        """Let the device finish reading the weights before it changes them."""
        if self._is_asynchronous:
            torch.cuda.current_stream().wait_event(self._copied)

    def join(self) -> None:
        """Return once every update has arrived in the averages."""
        if self._is_asynchronous and self._pending is not None:
            self._pending.result()
            self._pending = None

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, with all updates in them; views, not copies."""
        self.join()
        return dict(self._averages)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.join()
        _fill(self._averages, state)

    @contextmanager
    def swap(self, parameters: Mapping[str, Tensor]) -> Iterator[None]:
        """Run the block with the averages in ``parameters``; exact restoration afterwards."""
        averages = self.state_dict()
        kept = {name: weight.detach().to("cpu", copy=True) for name, weight in parameters.items()}
        try:
            _fill(parameters, averages)
            yield
        finally:
            _fill(parameters, kept)

    def _absorb_staged(self) -> None:
        self._copied.synchronize()
        self._absorb()

    @torch.no_grad()
    def _absorb(self) -> None:
        for name, average in self._averages.items():
            average.lerp_(self._staged[name].float(), self._rate)


@torch.no_grad()
def _fill(targets: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(values[name])
