"""What each number format keeps of a tensor: an error table, on a CPU in seconds.

    python benchmarks/formats.py [--rows 1024] [--seed 0]

Tiles are 1 x 128. Cells are the RMS of the relative error, and the signal to noise ratio in dB.
"""

import argparse

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from whalefall.ops.formats import (
    dequantize_values,
    logfmt_decode,
    logfmt_encode,
    quantize_e5m2,
    quantize_e5m6,
)
from whalefall.ops.quantize import dequantize, quantize_tiles

FORMATS = {
    "E4M3": (8, lambda x: dequantize(quantize_tiles(x))),
    "E5M2": (8, lambda x: dequantize_values(*quantize_e5m2(x))),
    "LogFMT-8": (8, lambda x: logfmt_decode(*logfmt_encode(x, 8), 8)),
    "LogFMT-10": (10, lambda x: logfmt_decode(*logfmt_encode(x, 10), 10)),
    "E5M6": (12, lambda x: dequantize_values(*quantize_e5m6(x))),
    "BF16": (16, lambda x: x.bfloat16().float()),
}


def samples(rows: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, 2048, generator=generator)
    outlier = torch.rand(normal.shape, generator=generator) < 1e-3
    return {
        "normal": normal,
        "normal, 1 in 1000 x 100": torch.where(outlier, 100 * normal, normal),
        "log-normal": normal.sign() * torch.randn(normal.shape, generator=generator).exp(),
    }


def error(x: Tensor, restored: Tensor) -> str:
    noise = restored.double() - x.double()
    relative = (noise / x)[x != 0].square().mean().sqrt().item()
    ratio = 10 * torch.log10(x.double().square().sum() / noise.square().sum()).item()
    return f"{relative:.2%}  {ratio:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = samples(arguments.rows, arguments.seed)
    table = Table("format", "bits", *data)
    for name, (bits, round_trip) in FORMATS.items():
        table.add_row(name, str(bits), *(error(x, round_trip(x)) for x in data.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
