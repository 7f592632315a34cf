"""What a machine can do, and how much of it programs have been seen to reach.

One YAML file a machine, under ``data/hardware``; each number there names its source. Anyone's own
machine is one more file of the same keys.
"""

from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, model_validator

from whalefall.config.explain import validated
from whalefall.config.model import Section
from whalefall.errors import UserError
from whalefall.plan.files import DATA, names_in, nearest_of
from whalefall.plan.units import Format

COMMUNICATING = 20
"""Multiprocessors set aside for dispatch and combine for the whole step ([A] 3.2.2 and 3.5.1)."""


class Link(Section):
    """One GPU's way to others."""

    gb_per_s: float = Field(gt=0)
    """Peak in one direction, 10^9 bytes a second."""
    achieved_gb_per_s: float = Field(gt=0)
    """What large transfers reach."""
    latency_us: float = Field(ge=0)
    """Of a small message, end to end."""

    def seconds(self, size: float) -> float:
        """Of a transfer of so many bytes."""
        return 1e-6 * self.latency_us + size / (1e9 * self.achieved_gb_per_s)


class ProductFractions(Section):
    """Shares of a format's peak that matrix products reach."""

    dense: float = Field(gt=0, le=1)
    dense_wgrad: float = Field(gt=0, le=1)
    grouped: float = Field(gt=0, le=1)
    """The experts' products, forward and input gradient."""
    grouped_wgrad: float = Field(gt=0, le=1)


class Achieved(Section):
    """Shares of the peaks, kernel by kernel, alone on the machine."""

    products: dict[Format, ProductFractions]
    attention_forward: float = Field(gt=0, le=1)
    """Of the peak of the ``working`` type, causal: the half that is masked counts nothing."""
    attention_backward: float = Field(gt=0, le=1)
    memory: float = Field(gt=0, le=1)
    """Of the memory's bandwidth, in fused steps such as norms and SwiGLU."""
    sustained: float = Field(1.0, gt=0, le=1)
    """Speed of kernels within hours of training over their speed alone (power limit)."""


class Hardware(Section):
    name: str
    peak_tflops: dict[Format, float]
    """Dense, by format; a format that is missing cannot be planned with."""
    multiprocessors: int | None = Field(None, gt=0)
    memory_gib: float = Field(gt=0)
    """Of one device, as programs find it (2^30 bytes)."""
    memory_gb_per_s: float = Field(gt=0)
    gpus_per_node: int = Field(gt=0)
    nvlink: Link
    """Within a node (PCIe or shared memory where there is no NVLink)."""
    nic: Link
    """One device's share of the network between nodes."""
    dollars_per_hour: float = Field(ge=0)
    """Rent of one device, its share of the server included."""
    watts: float = Field(gt=0)
    """Of one device under load."""
    achieved: Achieved

    @property
    def working(self) -> Format:
        """The widest product format for training besides FP8."""
        return "bf16" if "bf16" in self.peak_tflops else "fp32"

    @property
    def narrowest(self) -> Format:
        """FP8 where there is."""
        return "fp8" if "fp8" in self.peak_tflops else self.working

    @property
    def bandwidth(self) -> float:
        """Bytes a second that fused memory-bound steps reach over hours."""
        return 1e9 * self.memory_gb_per_s * self.achieved.memory * self.achieved.sustained

    def rate(self, fmt: Format, fraction: float = 1.0) -> float:
        """FLOPs a second at a fraction of a format's peak, over hours."""
        return 1e12 * self.peak_tflops[fmt] * fraction * self.achieved.sustained

    @property
    def computing_share(self) -> float:
        """Of the multiprocessors, what communication leaves for products and attention."""
        return 1 - COMMUNICATING / self.multiprocessors if self.multiprocessors else 1.0

    def check_format(self, fmt: Format) -> None:
        """
        Raises:
            UserError: the machine has no products in it.
        """
        if fmt not in self.peak_tflops:
            raise UserError(f"{self.name} has no {fmt}; it has {', '.join(self.peak_tflops)}")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.peak_tflops.keys() != self.achieved.products.keys():
            raise ValueError(
                f"peak_tflops has {', '.join(self.peak_tflops)}, but achieved.products "
                f"{', '.join(self.achieved.products)}; they must be of the same formats"
            )
        if not self.peak_tflops.keys() & {"bf16", "fp32"}:
            raise ValueError("peak_tflops needs bf16 or fp32: FP8 is of products alone")
        return self


def hardware_names() -> list[str]:
    """The machines that come with the package."""
    return names_in("hardware")


def load_hardware(name_or_path: str | Path) -> Hardware:
    """A machine by name (``h800``) or from a YAML file of one's own.

    Raises:
        UserError: no such machine or file, or a key or value that is not allowed.
    """
    name, names = str(name_or_path), hardware_names()
    is_known = name.lower() in names
    file = DATA / "hardware" / f"{name.lower()}.yaml" if is_known else Path(name)
    try:
        values = yaml.safe_load(file.read_text())
    except OSError:
        raise UserError(
            f"{name} is no known GPU and no YAML file; {nearest_of(name.lower(), names)}known are "
            f"{', '.join(names)}"
        ) from None
    except yaml.YAMLError as error:
        raise UserError(f"{name} is no YAML: {error}".replace("\n", " ")) from None
    if not isinstance(values, dict):
        raise UserError(f"{name} describes no machine: it must be a YAML mapping of keys")
    return validated(Hardware, values)
