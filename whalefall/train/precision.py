"""From a run's configuration to its network: types, FP8 products, and whether a device has them."""

import torch

from whalefall.config.train import PrecisionConfig, TrainConfig
from whalefall.errors import UserError
from whalefall.model.transformer import Transformer
from whalefall.ops.fp8_linear import Recipe

_WORKING = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_network(config: TrainConfig, device: torch.device) -> Transformer:
    """A run's network as it begins: its weights' type, its FP8 products, what it recomputes.

    Raises UserError where the device or a size does not suit FP8.
    """
    dtype = _WORKING[config.precision.working]
    model = Transformer.create(config.model, seed=config.seed, device=device, dtype=dtype)
    model.use_recipe(recipe(config.precision, device))
    model.recompute(config.memory.recompute)
    return model


def recipe(precision: PrecisionConfig, device: torch.device) -> Recipe | None:
    """Which products run in FP8; None where none does.

    On the CPU the same arithmetic runs through the references, slowly.

    Raises:
        UserError: the device is a GPU without the FP8 tensor cores that the kernels are written
            for, or the working type is not theirs.
    """
    if not precision.uses_fp8:
        return None
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major != 9:
            raise UserError(
                f"FP8 products need a GPU of compute capability 9 (H100, H200, H800), but "
                f"{torch.cuda.get_device_name(device)} has {major}.{minor}; take them out of "
                "precision, or run the slow reference with runtime.device=cpu"
            )
        if precision.working != "bf16":
            raise UserError("FP8 products on a GPU need precision.working=bf16, not fp32")
    return Recipe(
        precision.fprop == "fp8",
        precision.dgrad == "fp8",
        precision.wgrad == "fp8",
        precision.power_of_two_scales,
    )
