"""The run as a person watches it: a live line in a terminal, plain lines elsewhere."""

import math
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from whalefall.train.metrics import Record


class ConsoleSink:
    """Progress of a run of ``total_tokens``; every evaluation stays on the screen as a line."""

    def __init__(self, total_tokens: float, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._total_tokens = total_tokens
        self._heldout = ""
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("starting", total=total_tokens)
        self._progress.start()

    def write(self, record: Record) -> None:
        if "heldout_bits_per_byte" in record:
            self._heldout = f"held-out {record['heldout_bits_per_byte']:.4f} bits/byte"
            self._console.print(f"step {record['step']}: {self._heldout}", highlight=False)
            return
        line = self._describe(record)
        if self._console.is_terminal:
            self._progress.update(self._task, completed=record["tokens"], description=line)
        else:
            self._console.print(line, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()

    def _describe(self, record: Record) -> str:
        tokens_left = max(0.0, self._total_tokens - record["tokens"])
        step_tokens = round(record["tokens_per_second"] * record["seconds"])
        # Exact while the batch is constant, an estimate while it ramps up.
        last_step = record["step"] + math.ceil(tokens_left / step_tokens)
        left = timedelta(seconds=round(tokens_left / record["tokens_per_second"]))
        parts = [
            f"step {record['step']}/{last_step}",
            f"loss {record['loss']:.4f}",
            self._heldout,
            f"{record['tokens_per_second']:,.0f} tokens/s",
            f"MaxVio {max(record['max_violation']):.2f}" if record["max_violation"] else "",
            f"lr {record['learning_rate']:.2e}",
            f"{left} left",
        ]
        return " · ".join(part for part in parts if part)
