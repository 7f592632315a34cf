"""Every kernel at the sizes of bench-6b, beside a library's, on one GPU.

    python benchmarks/kernels/run.py [NAME ...] [--json PATH]

Medians of single runs with a cold L2 in between. GB/s counts the fewest bytes that must move, and
is set beside a plain copy of this run; TFLOPS counts the products.
"""

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common_kernels import Row
from rich.console import Console
from rich.table import Table

NAMES = sorted(
    path.stem
    for path in Path(__file__).parent.glob("*.py")
    if path.stem not in ("run", "common_kernels")
)


def milliseconds(run: Callable[[], object]) -> float:
    """Median device time of one run with a cold L2, whatever the host needs to launch it."""
    cold = torch.empty(2**28, dtype=torch.int8, device="cuda")
    for _ in range(5):
        run()
    times = []
    for _ in range(25):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        cold.zero_()
        torch.cuda._sleep(1_000_000)  # half a millisecond, in which the host gets ahead
        begun.record()
        run()
        ended.record()
        times.append((begun, ended))
    torch.cuda.synchronize()
    return statistics.median(begun.elapsed_time(ended) for begun, ended in times)


def copy_bandwidth() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 4 * source.numel() / milliseconds(lambda: target.copy_(source)) / 1e6


def measure(row: Row) -> dict[str, float | str | None]:
    found: dict[str, float | str | None] = {"name": row.name, "peer": row.peer_name or None}
    for who, run in (("ours", row.run), ("peer", row.peer)):
        if run is None:
            continue
        try:
            ms = milliseconds(run)
        except Exception as error:
            found[f"{who}_error"] = str(error).strip().splitlines()[0][:160]
            continue
        found[f"{who}_ms"] = round(ms, 4)
        if row.bytes:
            found[f"{who}_gb_s"] = round(row.bytes / ms / 1e6)
        if row.flops:
            found[f"{who}_tflops"] = round(row.flops / ms / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=NAMES, help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    copy = copy_bandwidth()
    table = Table("kernel", "ms", "GB/s", "of copy", "TFLOPS", "peer", "ms", "TFLOPS")
    results = []
    for name in options.names:
        for row in importlib.import_module(name).rows():
            found = measure(row)
            results.append(found)
            speed = found.get("ours_gb_s")
            cells = [
                found["name"],
                found.get("ours_ms", found.get("ours_error")),
                speed,
                f"{float(speed) / copy:.0%}" if isinstance(speed, int) else None,
                found.get("ours_tflops"),
                found.get("peer"),
                found.get("peer_ms", found.get("peer_error")),
                found.get("peer_tflops"),
            ]
            table.add_row(*("" if cell is None else str(cell) for cell in cells))
        torch.cuda.empty_cache()
    console = Console(width=170)
    console.print(f"copy {copy:.0f} GB/s")
    console.print(table)
    if options.json:
        sys.path.insert(0, str(Path(__file__).parent.parent))
        from common import write_result

        write_result(options.json, {"copy_gb_s": round(copy), "results": results})


if __name__ == "__main__":
    main()
