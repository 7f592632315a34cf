"""The report is one page that stands alone and says what the run's folder says."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from whalefall.config import load_config
from whalefall.config.load import save_config
from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.errors import UserError
from whalefall.report import Sample, load_metrics, load_samples, save_samples, write_report
from whalefall.report.page import duration, in_short, layer_names, training_seconds
from whalefall.report.samples import excerpt

VOID = {"meta", "br", "img", "link", "input", "hr", "path", "use", "rect", "image", "stop"}
STEPS = 60


class Page(HTMLParser):
    """Checks that elements close in order, and collects ids, headings, references and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.headings: list[str] = []
        self.text = ""
        self.unlabelled = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.ids += [named["id"] or ""] if "id" in named else []
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        self.unlabelled += named.get("role") == "img" and not named.get("aria-label")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)
        self.text += data


def step(number: int, model: ModelConfig, **changes: Any) -> dict[str, Any]:
    experts, layers = model.n_routed_experts, model.num_moe_layers
    record = {
        "step": number,
        "tokens": 1000 * number,
        "rows": 4,
        "loss": 9.0 / number,
        "main": 8.0 / number,
        "mtp": [8.5 / number] * model.num_nextn_predict_layers,
        "balance": 1.1,
        "learning_rate": 1e-3,
        "gradient_norm": 2.0,
        "seconds": 0.5,
        "tokens_per_second": 2000.0,
        "mfu": 0.4,
        "max_violation": [0.5] * layers,
        "expert_load": [[1 / experts] * experts] * layers,
    }
    return record | changes


def evaluation(number: int, bits: float) -> dict[str, Any]:
    return {"step": number, "tokens": 1000 * number, "heldout_bits_per_byte": bits}


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path, tiny_config: ModelConfig) -> MakeRun:
    def make(records: list[dict[str, Any]] | None = None, **changes: Any) -> Path:
        model = ModelConfig.model_validate(tiny_config.model_dump() | changes)
        folder = tmp_path / "my <run>"
        folder.mkdir()
        save_config(TrainConfig(model=model), folder / "config.yaml")
        if records is None:
            records = [step(number, model) for number in range(1, STEPS + 1)]
            records.insert(30, evaluation(30, 2.5))
            records.append(evaluation(STEPS, 1.875))
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
        return folder

    return make


def test_page_has_every_section_and_the_numbers_of_the_run(make_run: MakeRun) -> None:
    folder = make_run()
    save_samples(folder, [Sample(title="x.py", prompt="def f(", completion="a<b>):", suffix="c")])
    page = Page(write_report(folder).read_text())
    assert not page.open
    assert page.headings[0] == "my <run>"
    for heading in ("Learning", "Training loss", "Held-out text", "Balance of the experts",
                    "Balance loss", "Samples", "x.py", "Configuration", "Environment"):  # fmt: skip
        assert heading in page.headings
    assert "Load of each expert, steps 1 to 3" in page.headings
    assert "Load of each expert, steps 58 to 60" in page.headings
    for fact in ("1.875", "60 K", "in 60 steps", "over 30 s", "144", "def f(a<b>):c"):
        assert fact in page.text
    assert "n_routed_experts: 8" in page.text


def test_page_stands_alone(make_run: MakeRun) -> None:
    text = write_report(make_run()).read_text()
    page = Page(text)
    assert not re.search(r"https?://|@import|<script|<link|<iframe", text)
    assert page.references
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    inside = [reference[1:] for reference in page.references if reference.startswith("#")]
    inside += re.findall(r"url\(#(.*?)\)", text)
    assert set(inside) <= set(page.ids)


def test_plots_follow_the_colours_of_the_page_and_are_described(make_run: MakeRun) -> None:
    text = write_report(make_run()).read_text()
    assert Page(text).unlabelled == 0
    assert "next token: 8 at step 1, 0.1333 at step 60." in text
    used, defined = (
        set(re.findall(r"var\((--[\w-]+)\)", text)),
        set(re.findall(r"(--[\w-]+):", text)),
    )
    assert used <= defined
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL))
    assert not re.search(r"#(0\d)\1\1|#000000", drawings)


def test_a_dense_run_without_mtp_or_evaluations_has_its_page(make_run: MakeRun) -> None:
    dense = {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0}
    silent = {"mtp": [], "balance": 0.0, "max_violation": [], "expert_load": []}
    model = ModelConfig(**dense, num_hidden_layers=3)
    folder = make_run([step(1, model, **silent)], **dense)
    page = Page(write_report(folder).read_text())
    assert "This network is dense" in page.text
    assert "Held-out text" not in page.headings
    assert "Samples" not in page.headings


def test_a_run_with_more_steps_than_a_plot_has_points(
    make_run: MakeRun, tiny_config: ModelConfig
) -> None:
    few = make_run([step(number, tiny_config) for number in range(1, 3001)])
    assert len(write_report(few).read_text()) < 300_000


def test_output_may_be_anywhere(make_run: MakeRun, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "page.html"
    assert write_report(make_run(), target) == target
    assert target.read_text().startswith("<!doctype html>")


def test_samples_survive_the_folder(make_run: MakeRun) -> None:
    folder = make_run()
    assert load_samples(folder) == []
    samples = [Sample(title="é", prompt="\ta\n", completion="\u2028")]
    save_samples(folder, samples)
    assert load_samples(folder) == samples
    (folder / "samples.json").write_text('[{"title": "x"}]')
    with pytest.raises(UserError, match=r"samples\.json is damaged: 0\.prompt"):
        load_samples(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no step yet"),
        ('{"step": 1', "has no step yet"),
        ("nonsense\n", "line 1: Invalid JSON"),
        ('{"step": 1}\n', "line 1: tokens: Field required"),
        ('{"step": 1, "heldout_bits_per_byte": "low"}\n', "line 1: heldout_bits_per_byte"),
        ("[1, 2]\n", "line 1: Input should be an object"),
    ],
)
def test_malformed_metrics_name_the_line(make_run: MakeRun, text: str, message: str) -> None:
    folder = make_run()
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match=f"metrics.jsonl.*{re.escape(message)}"):
        write_report(folder)


def test_missing_files_are_told(make_run: MakeRun, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not the folder of a run"):
        write_report(tmp_path / "nowhere")
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        write_report(folder)


def test_a_line_still_being_written_is_left_out(
    make_run: MakeRun, tiny_config: ModelConfig
) -> None:
    folder = make_run([step(1, tiny_config), step(2, tiny_config)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "tok')
    steps, evaluations = load_metrics(folder / "metrics.jsonl")
    assert [each.step for each in steps] == [1, 2]
    assert evaluations == []


def test_training_time_counts_steps_without_a_record(
    make_run: MakeRun, tiny_config: ModelConfig
) -> None:
    records = [step(number, tiny_config) for number in (10, 20, 25)]
    steps, _ = load_metrics(make_run(records) / "metrics.jsonl")
    assert training_seconds(steps) == pytest.approx(25 * 1000 / 2000)


def test_layers_are_named_in_the_order_of_their_loads(tiny_config: ModelConfig) -> None:
    assert layer_names(tiny_config) == ["layer 1", "layer 2", "MTP 1"]
    v3 = load_config("v3-671b").model
    assert len(layer_names(v3)) == v3.num_moe_layers


def test_numbers_for_people() -> None:
    assert in_short(671_026_404_352) == "671 B"
    assert in_short(3_412_000) == "3.41 M"
    assert in_short(999) == "999"
    assert [duration(s) for s in (7.4, 372, 7260)] == ["7 s", "6 min 12 s", "2 h 1 min"]


def test_an_excerpt_is_cut_where_a_body_begins() -> None:
    filler = [f"x{number} = {number}\n" for number in range(12)]
    documented = ["def g():\n", '    """What."""\n']
    text = "".join([*filler, *documented, "def f(a) -> int:\n", "    return a\n", *filler])
    cut = excerpt("f.py", text)
    assert cut is not None
    assert cut.before[-1] == "def f(a) -> int:\n"
    assert cut.after[0] == "    return a\n"
    assert "".join(cut.before + cut.after) in text


def test_an_excerpt_of_prose_is_its_middle_and_of_a_note_nothing() -> None:
    cut = excerpt("prose.txt", "line\n" * 100)
    assert cut is not None
    assert len(cut.before) == len(cut.after) == 10
    assert excerpt("note.txt", "line\n" * 20) is None
