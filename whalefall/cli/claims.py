"""``whalefall claims``: what was published, and what we find."""

from pathlib import Path
from typing import Annotated

import typer

from whalefall.cli.show import Html, Json, show


def claims(
    markdown: Annotated[Path | None, typer.Option(help="Write a document instead.")] = None,
    as_json: Json = False,
    html: Html = None,
) -> None:
    """Check published claims: each with our figure, how we come to it, and the verdict."""
    from whalefall.plan.claims import claims_report
    from whalefall.plan.report import write

    report = claims_report()
    if markdown is None:
        show(report, as_json, html)
    else:
        write(markdown, report.markdown)
        typer.echo(markdown)
