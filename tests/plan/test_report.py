"""One report on a terminal, as JSON and as a page, and its plots."""

import json
import re
from dataclasses import dataclass

import pytest
from rich.console import Console

from whalefall.page import Fact, Plot
from whalefall.plan.plot import bars, curve
from whalefall.plan.report import Note, Report, Section, Table, plain
from whalefall.plan.templates import short


def report() -> Report:
    table = Table(("name", "size"), [("a <b>", "1,000"), ("c", "")], "Sizes", strong=[0])
    plot = Plot("A plot", bars({"x": {"part": 1.0}}, unit="GB"), "x is 1 GB")
    return Report(
        "Title & more",
        [Fact("7", "facts", "a note")],
        [Section("One", [Note("Said."), table]), Section("Drawn", [plot])],
        {"size": 1000},
    )


def terminal(it: Report) -> str:
    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(it.to_terminal())
    return capture.get()


def test_a_terminal_shows_all_but_plots():
    shown = terminal(report())
    for text in ("Title & more", "7 facts (a note)", "Said.", "Sizes", "a <b>", "1,000"):
        assert text in shown
    assert "Drawn" not in shown


def test_a_page_escapes_words_and_keeps_drawings():
    page = report().to_html()
    assert "a &lt;b&gt;" in page
    assert "Title &amp; more" in page
    assert '<div role="img" aria-label="x is 1 GB"><svg' in page
    assert '<th scope="col" class="number">size</th>' in page


def test_columns_of_figures_are_aligned():
    table = Table(("a", "b", "c"), [("x", "1", ""), ("2", "-3 ms", "<4")])
    assert [table.is_number(column) for column in range(3)] == [False, True, True]
    assert not Table(("a",), []).is_number(0)


def test_numbers_go_all_the_way_down():
    @dataclass
    class Inner:
        a: int

        @property
        def doubled(self) -> int:
            return 2 * self.a

        @property
        def _hidden(self) -> int:
            raise AssertionError

    value = {"inner": Inner(3), "list": (Inner(1),), "none": None}
    assert plain(value) == {
        "inner": {"a": 3, "doubled": 6},
        "list": [{"a": 1, "doubled": 2}],
        "none": None,
    }
    assert json.loads(report().to_json()) == {"size": 1000}


def test_plots_place_points_within_their_frame():
    svg = curve([(1, 10), (10, 100), (100, 20)], x="x", y="y", marked=[(10, 100)])
    points = re.search(r'points="(.*?)"', svg)[1]
    places = [tuple(map(float, point.split(","))) for point in points.split()]
    assert places == sorted(places)
    assert min(y for _, y in places) == places[1][1]
    assert all(0 < x < 460 and 0 < y < 290 for x, y in places)
    widths = re.findall(r'width="([\d.]+)" height="22"', bars({"a": {"p": 1, "q": 3}}, unit=""))
    assert float(widths[1]) == pytest.approx(3 * float(widths[0]), abs=0.3)
    assert [short(value) for value in (0.5, 20, 2000, 3e6)] == ["0.5", "20", "2 K", "3 M"]
