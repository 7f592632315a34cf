"""How the answers of the planner are shown: tables, JSON or a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from whalefall.plan.report import Report

Json = Annotated[bool, typer.Option("--json", help="Print numbers for programs.")]
Html = Annotated[Path | None, typer.Option(help="Write a page that stands alone.")]


def show(report: "Report", as_json: bool, html: Path | None) -> None:
    """On the terminal, as tables or JSON; and where wanted as a page."""
    from rich.console import Console

    if html is not None:
        from whalefall.plan.report import write

        write(html, report.to_html())
    if as_json:
        typer.echo(report.to_json())
        return
    Console(highlight=False).print(report.to_terminal())
    if html is not None:
        typer.echo(f"\n{html}")
