"""Templates of what people read and see: reports in Markdown, drawings in SVG."""

import re
from functools import cache
from typing import Any

import jinja2

from whalefall.plan.units import GIB


def rendered(template: str, **values: Any) -> str:
    """A template of ``reports/``, with the filters ``f``, ``short`` and ``code`` of this file."""
    return _templates().get_template(f"{template}.j2").render(values).strip() + "\n"


@cache
def _templates() -> jinja2.Environment:
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("whalefall.plan", "reports"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.globals["GIB"] = GIB
    templates.filters |= {"f": figure, "short": short, "code": code}
    return templates


def figure(value: float, spec: str = "", unit: float = 1) -> str:
    """A number in a unit: ``{{ dollars | f(",.2f", 1e6) }} M$``."""
    return format(value if unit == 1 else value / unit, spec)


def short(value: float) -> str:
    """``0.02``, ``5``, ``20 K``, ``3 M``, ``14.8 T``."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g} {letter}"
    return f"{value:g}"


def code(text: str) -> str:
    """Commands and files as such."""
    return re.sub(
        r"whalefall plan [^|]*\b|(whalefall|tests|benchmarks)/[\w/.:-]+\b", r"`\g<0>`", text
    )
