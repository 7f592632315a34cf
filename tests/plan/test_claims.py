"""Every published claim is looked into, and its verdict follows from the figures."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from whalefall.cli.app import app
from whalefall.errors import UserError
from whalefall.plan.claims import COMMAND, Claim, Verdict, check, claims_report, topics
from whalefall.plan.findings import answer_to

PROJECT = Path(__file__).parents[2]
CLAIMS = [claim for topic in topics() for claim in topic.claims]
BY_ID = {claim.id: claim for claim in CLAIMS}


def claim(published: object, **more: object) -> Claim:
    how = {} if {"measured", "test", "needs"} & more.keys() else {"how": "x"}
    return Claim.model_validate({"id": "x", "says": "x", "source": "x", "published": published}
                                | how | more)  # fmt: skip


def test_the_document_is_fresh() -> None:
    written = (PROJECT / "docs" / "claims.md").read_text()
    assert written == claims_report().markdown, f"write it again: {COMMAND}"


def test_ids_are_unique() -> None:
    assert len(BY_ID) == len(CLAIMS) >= 60


def test_of_the_papers_nothing_is_contradicted_and_of_the_articles_everything() -> None:
    for it in CLAIMS:
        is_contradicted = check(it).verdict is Verdict.CONTRADICTED
        assert is_contradicted == (it.source == "articles"), it.id


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("parameters", "671.03 B"),
        ("active-parameters", "36.63 B"),
        ("mtp-parameters", "11.61 B"),
        ("kv-v3", "70,272 bytes"),
        ("gflop-v3", "250.4"),
        ("dollars", "5.576 M$"),
        ("bubble-dualpipe", "6"),
        ("tpot-ib", "14.76 ms"),
        ("day-margin", "545%"),
        ("article-kv-quarter", "56.9"),
        ("article-hours", "2,788,000"),
        ("article-utilisation", "39.0%"),
    ],
)
def test_figures_are_the_known_ones(name: str, ours: str) -> None:
    assert check(BY_ID[name]).ours == ours


@pytest.mark.parametrize(
    ("published", "more", "same", "other"),
    [
        (671, {"form": "{:.0f} B"}, 671.03, 671.6),
        (250, {"within": 0.01}, 252.4, 253),
        ([0.85, 0.9], {}, 0.87, 0.84),
        ([None, 0.0025], {}, 0.0025, 0.003),
        ([1.8, None], {}, 2.5, 1.79),
        ("ZeRO-3", {}, "ZeRO-3", "ZeRO-1"),
        (1.3689, {"form": "{:.4f}"}, 1.36888, "none"),
    ],
)
def test_agreement(published: object, more: dict, same: object, other: object) -> None:
    it = claim(published, **more)
    assert it.agrees(same)  # type: ignore[arg-type]
    assert not it.agrees(other)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("published", "text"),
    [
        ([0.85, 0.9], "85% to 90%"),
        ([None, 0.5], "at most 50%"),
        ([0.5, None], "at least 50%"),
        (0.5, "50%"),
        ("half", "half"),
    ],
)
def test_published_figures_are_printed(published: object, text: str) -> None:
    assert claim(published, form="{:.0%}").as_published == text


@pytest.mark.parametrize(
    ("difference", "in_small", "verdict"),
    [
        (0.1, True, Verdict.IN_SMALL),
        (0.3, True, Verdict.UNTESTABLE),
        (0.1, False, Verdict.REPRODUCED),
        (-0.3, False, Verdict.CONTRADICTED),
    ],
)
def test_a_small_experiment_supports_and_does_not_refute(
    difference: float, in_small: bool, verdict: Verdict, tmp_path: Path
) -> None:
    result = {"results": [{"variant": "fp8", "difference_percent": difference}]}
    (tmp_path / "fp8_loss.json").write_text(json.dumps(result))
    it = BY_ID["fp8-loss"].model_copy(update={"in_small": in_small})
    found = check(it, tmp_path)
    assert found.verdict is verdict
    assert found.ours == f"{abs(difference) / 100:.2%}"


def test_what_is_not_measured_is_not_testable(tmp_path: Path) -> None:
    for it in CLAIMS:
        if it.measured:
            found = check(it, tmp_path)
            assert (found.verdict, found.ours) == (Verdict.UNTESTABLE, "")
            assert found.how == f"benchmarks/results/{it.measured} is missing"


@pytest.mark.parametrize("text", ["", "[]", '{"results": [{}]}', '{"results": []}'])
def test_a_result_without_the_figure_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "fp8_loss.json").write_text(text)
    with pytest.raises(UserError, match=r"fp8_loss\.json does not hold what fp8-loss reads"):
        check(BY_ID["fp8-loss"], tmp_path)


def test_measured_results_are_read(tmp_path: Path) -> None:
    drafts = [
        {"drafts": 0, "accepted": 0.0, "tokens_per_second": 100},
        {"drafts": 1, "accepted": 0.86, "tokens_per_second": 170},
    ]
    (tmp_path / "engine_cpu.json").write_text(json.dumps({"one_request": drafts}))
    rank = {"decoding": {"tokens_per_second": 2000}}
    (tmp_path / "rank_of_671b.json").write_text(json.dumps(rank))
    found = [check(BY_ID[it], tmp_path) for it in ("mtp-acceptance", "mtp-speed", "rank-output")]
    assert [it.ours for it in found] == ["86%", "1.7x", "2,000"]
    assert [it.verdict for it in found] == [
        Verdict.IN_SMALL, Verdict.UNTESTABLE, Verdict.IN_SMALL,
    ]  # fmt: skip


@pytest.mark.parametrize("it", [it for it in CLAIMS if it.test], ids=lambda it: it.id)
def test_the_tests_that_stand_for_claims_exist(it: Claim) -> None:
    assert it.test is not None
    file, name = it.test.split("::")
    assert re.search(rf"^def {name}\(", (PROJECT / file).read_text(), flags=re.MULTILINE)


def test_the_files_that_show_claims_exist() -> None:
    text = " ".join(it.how or "" for it in CLAIMS)
    files = re.findall(r"whalefall/[\w/.-]+\b", text)
    assert files
    assert [file for file in files if not (PROJECT / file).is_file()] == []


COMMANDS = sorted({it.how for it in CLAIMS if it.how and it.how.startswith("whalefall ")})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_that_show_claims_give_what_is_read(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split()[1:], "--json"]).output
    assert json.loads(shown) == answer_to(command)


def test_what_fits_is_what_can_be_used() -> None:
    """The bound of a claim is typed; the planner says the same."""
    shown = CliRunner().invoke(app, BY_ID["no-tensor-parallelism"].how.split()[1:])
    assert "77.5" in shown.output


def test_exactly_one_way_to_look_into_a_claim() -> None:
    with pytest.raises(ValueError, match="exactly one of how, measured, test and needs"):
        claim(1, how="x", test="y")
    with pytest.raises(ValueError, match="exactly one"):
        claim(1, how=None)


def test_the_command_prints_tables_json_pages_and_the_document(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["claims"], env={"COLUMNS": "150"}).output
    for text in ("published claims", "not testable here", "14.76 ms", "2 or 3 tokens"):
        assert text in shown
    found = json.loads(CliRunner().invoke(app, ["claims", "--json"]).output)["claims"]
    assert [it["claim"]["id"] for it in found] == [it.id for it in CLAIMS]
    document, page = tmp_path / "claims.md", tmp_path / "claims.html"
    CliRunner().invoke(app, ["claims", "--markdown", str(document)])
    assert document.read_text() == claims_report().markdown
    CliRunner().invoke(app, ["claims", "--html", str(page)])
    assert "contradicted" in page.read_text()


def test_every_row_of_the_document_has_every_column() -> None:
    for part in claims_report().markdown.split("\n\n"):
        if part.startswith("|"):
            assert len({line.count("|") for line in part.splitlines()}) == 1, part
