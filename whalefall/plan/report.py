"""A plan's answer: on a terminal, as JSON, or as one web page that needs nothing else.

What people read is written once, as a Markdown template in ``reports/``: a title, headline facts,
and sections of notes, tables and plots. Programs get the numbers.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as RichTable
from rich.text import Text

from whalefall.errors import UserError
from whalefall.page import Fact, Plot, render
from whalefall.plan.templates import rendered

ASSUMED = "Assumed (* tuned)"
"""The section whose table JSON has too."""


@dataclass(frozen=True)
class Note:
    kind: ClassVar = "note"
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of words and figures; columns whose cells are figures are aligned by themselves."""

    kind: ClassVar = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    strong: Sequence[int] = ()
    """Rows to look at first."""

    @property
    def is_wide(self) -> bool:
        """Whether it takes the whole width of a page rather than half of it."""
        lines = [self.columns, *self.rows]
        return sum(max(map(len, column)) for column in zip(*lines, strict=True)) > 56

    def is_number(self, column: int) -> bool:
        cells = [row[column] for row in self.rows if row[column]]
        return bool(cells) and all(re.match(r"[-+~<]?\d", cell) for cell in cells)


@dataclass(frozen=True)
class Section:
    title: str
    items: Sequence[Note | Table | Plot]


@dataclass(frozen=True)
class Report:
    title: str
    facts: Sequence[Fact]
    sections: Sequence[Section]
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Everything that the plan says, for JSON; units are in the names."""
    markdown: str = ""

    def to_terminal(self) -> RenderableType:
        shown = [it for it in self.sections if any(not isinstance(x, Plot) for x in it.items)]
        title = Text(self.title, style="bold")
        return Group(title, *map(_fact, self.facts), *map(_section, shown))

    def to_json(self) -> str:
        return json.dumps(plain(self.numbers), indent=2)

    def to_html(self) -> str:
        values = {"title": self.title, "facts": self.facts, "sections": self.sections}
        return render("plan/reports/report.html.j2", **values)


def report(
    name: str, numbers: Mapping[str, Any], plots: Mapping[str, str] | None = None, **values: Any
) -> Report:
    """What ``reports/NAME.md.j2`` says of the numbers and some values.

    Args:
        plots: drawings (SVG) by the names that the template calls them.
    """
    markdown = rendered(f"{name}.md", numbers=numbers, **values)
    title, facts, sections = _read(markdown, plots or {})
    if assumed := [it for it in sections if it.title == ASSUMED]:
        (table,) = assumed[0].items
        assert isinstance(table, Table)
        keys = ("tuned", "text", "source")
        rows = [(what[:2] == "* ", what.removeprefix("* "), why) for what, why in table.rows]
        numbers = {**numbers, "assumptions": [dict(zip(keys, row, strict=True)) for row in rows]}
    return Report(title, facts, sections, numbers, markdown)


def _read(markdown: str, plots: Mapping[str, str]) -> tuple[str, list[Fact], list[Section]]:
    """Blocks of Markdown, between empty lines, as the parts of a report."""
    title, heading = "", ""
    facts: list[Fact] = []
    sections: list[tuple[str, list[Note | Table | Plot]]] = []
    for block in filter(None, re.split(r"\n\s*\n", markdown.strip())):
        lines = block.replace("`", "").strip().split("\n")
        mark, _, text = lines[0].partition(" ")
        match mark:
            case "#":
                title = text
            case "##":
                sections.append((text, []))
            case "###":
                heading = text
            case "-" if not sections:
                facts += [_fact_of(line) for line in lines]
            case "|":
                sections[-1][1].append(_table_of(lines, heading))
                heading = ""
            case _ if image := re.fullmatch(r'!\[(.*)\]\((.*?)( "wide")?\)', lines[0]):
                summary, name, wide = image.groups()
                sections[-1][1].append(Plot(heading, plots[name], summary, wide is not None))
                heading = ""
            case _:
                sections[-1][1].append(Note(" ".join(lines)))
    return title, facts, [Section(*it) for it in sections]


def _fact_of(line: str) -> Fact:
    found = re.fullmatch(r"- \*\*(.+?)\*\* (.+?)(?: \((.+)\))?", line)
    assert found is not None, line
    value, label, note = found.groups(default="")
    return Fact(value, label, note)


def _table_of(lines: Sequence[str], title: str) -> Table:
    """Rows whose first cell is bold are the strong ones."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    columns, rows = cells[0], cells[2:]
    strong = [index for index, row in enumerate(rows) if row[0].startswith("**")]
    return Table(columns, [[row[0].replace("**", ""), *row[1:]] for row in rows], title, strong)


def write(path: Path, text: str) -> None:
    """
    Raises:
        UserError: the file cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from None


def pick(value: object, *names: str) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def plain(value: Any) -> Any:
    """Records as mappings of their fields and of what they work out, all the way down."""
    if (is_dataclass(value) and not isinstance(value, type)) or hasattr(value, "_fields"):
        names = [it.name for it in fields(value)] if is_dataclass(value) else list(value._fields)
        names += [
            name
            for name, member in vars(type(value)).items()
            if isinstance(member, property | cached_property) and not name.startswith("_")
        ]
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, BaseModel):
        return value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item) for item in value]
    return value


def _fact(fact: Fact) -> RenderableType:
    note = f" ({fact.note})" if fact.note else ""
    text = Text.assemble((fact.value, "bold"), f" {fact.label}", (note, "dim"))
    return Padding(text, (0, 0, 0, 2), expand=False)


def _section(section: Section) -> RenderableType:
    items = [_item(item) for item in section.items if not isinstance(item, Plot)]
    return Group(Text(f"\n{section.title}", style="bold underline"), *items)


def _item(item: Note | Table) -> RenderableType:
    if isinstance(item, Note):
        return Padding(Text(item.text, style="dim"), (0, 0, 0, 2), expand=False)
    table = RichTable(box=None, pad_edge=False, padding=(0, 1), title_justify="left")
    for index, column in enumerate(item.columns):
        is_number = item.is_number(index)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for index, row in enumerate(item.rows):
        table.add_row(*map(Text, row), style="bold" if index in item.strong else None)
    title = [Text(item.title, style="italic")] if item.title else []
    return Padding(Group(*title, table), (0, 0, 0, 2), expand=False)
