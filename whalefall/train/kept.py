"""What a forward pass leaves behind for the backward pass, layer by layer, measured.

The head and the loss keep no activations: their gradients are made in the forward pass.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whalefall.config.train import TrainConfig
from whalefall.model.transformer import HiddenStates, Transformer
from whalefall.train.precision import make_network


@dataclass(frozen=True)
class Kept:
    layer: str
    bytes: int


def kept_by_layer(config: TrainConfig, device: torch.device, rows: int) -> list[Kept]:
    """Bytes of activations after the forward pass of ``rows`` rows of random tokens.

    On CUDA they are what the allocator says; on a CPU, which counts nothing, the tensors that
    autograd saves. The weights are those of the configuration, with its precision and recompute.
    """
    model, shape = make_network(config, device), config.model
    depths = shape.num_nextn_predict_layers
    size = (rows, config.data.sequence_length + depths)
    tokens = torch.randint(shape.vocab_size, size, device=device)

    def run() -> HiddenStates:
        return model.hidden_states(tokens, lookahead=depths)

    if device.type == "cuda":
        run()  # compiles kernels and casts weights, which are not activations
        return _measure(model, run, lambda: torch.cuda.memory_allocated(device))
    with saved_bytes(model) as saved:
        return _measure(model, run, saved)


def _measure(
    model: Transformer, run: Callable[[], HiddenStates], total: Callable[[], int]
) -> list[Kept]:
    """What ``total`` grows by from one layer's beginning to the next one's."""
    marks = [("embedding", total())]
    layers: list[tuple[str, nn.Module]]
    layers = [(f"layer {index}", block) for index, block in enumerate(model.blocks)]
    # An MTP module begins with the norm of what it embeds.
    layers += [(f"MTP depth {k}", module.enorm) for k, module in enumerate(model.mtp_modules, 1)]
    handles = [
        module.register_forward_pre_hook(
            lambda _module, _inputs, name=name: marks.append((name, total()))
        )
        for name, module in layers
    ]
    states = run()
    ends = [count for _, count in marks[1:]] + [total()]
    del states
    for handle in handles:
        handle.remove()
    return [Kept(name, end - begin) for (name, begin), end in zip(marks, ends, strict=True)]


@contextmanager
def saved_bytes(model: Transformer) -> Iterator[Callable[[], int]]:
    """Counts the bytes that autograd saves in the block, the weights' apart."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(kept.values())
