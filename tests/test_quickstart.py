"""The first five minutes, in small: real data, training, samples, model folder and page."""

import signal
import sysconfig
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from whalefall import quickstart as room
from whalefall.api import load
from whalefall.errors import UserError
from whalefall.quickstart import quickstart, standard_library
from whalefall.report import load_metrics, load_samples
from whalefall.train.metrics import JsonLines, Record

TINY = [
    "model.vocab_size=400",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.intermediate_size=48",
    "model.num_attention_heads=2",
    "model.q_lora_rank=16",
    "model.kv_lora_rank=16",
    "model.qk_nope_head_dim=8",
    "model.qk_rope_head_dim=8",
    "model.v_head_dim=8",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=2",
    "model.moe_intermediate_size=16",
    "data.sequence_length=64",
    "schedule.total_tokens=1536",  # six steps of four rows
    "schedule.batch_rows=[{value: 4}]",
    "evaluation.rows=4",
    "logging.every_steps=1",
    "logging.tensorboard=false",
    "runtime.device=cpu",
    "runtime.threads=1",
]


def run(folder: Path, *overrides: str) -> str:
    """What a quickstart of six steps into ``folder`` says."""
    said = StringIO()
    console = Console(file=said, width=200, highlight=False)
    part = standard_library()[:200]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "standard_library", lambda: part)
        quickstart([f"output={folder}", *TINY, *overrides], console=console)
    return said.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a run that went through, and what was said."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(folder)


def test_it_trains_writes_saves_and_reports(finished: tuple[Path, str]) -> None:
    folder, said = finished
    steps, evaluations = load_metrics(folder / "metrics.jsonl")
    assert [each.step for each in steps] == [1, 2, 3, 4, 5, 6]
    assert f"takes it {evaluations[-1].heldout_bits_per_byte:.2f} bits per byte" in said
    # (16 + 8) against 2 heads of (8 + 8), in two bytes and two layers; and DeepSeek-V3's own.
    for number in ("96", "128", "1.3", "70,272", "3,997,696", "56.9"):
        assert f" {number} " in said

    *continued, filled = load_samples(folder)
    assert continued
    for sample in (*continued, filled):
        assert sample.title in said
    assert filled.suffix
    page = (folder / "report.html").read_text()
    assert "a hole filled" in page

    model, tokenizer = load(folder / "model")
    assert model.config.hidden_size == 32
    assert tokenizer.vocab_size == 400


def test_interrupted_it_says_how_to_go_on_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = JsonLines.write

    def interrupt_at_three(sink: JsonLines, record: Record) -> None:
        write(sink, record)
        if record["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(JsonLines, "write", interrupt_at_three)
        said = run(folder)
    assert f"whalefall quickstart output={folder} model.vocab_size=400" in said
    assert not (folder / "report.html").exists()
    before = (folder / "data" / "dataset.json").stat().st_mtime_ns

    for _ in ("to the end", "and once more"):
        assert "What it learned" in run(folder)
    steps, _ = load_metrics(folder / "metrics.jsonl")
    assert [each.step for each in steps] == [1, 2, 3, 4, 5, 6]
    assert (folder / "report.html").exists()
    assert (folder / "data" / "dataset.json").stat().st_mtime_ns == before


def test_data_of_other_settings_are_not_used(finished: tuple[Path, str]) -> None:
    folder, _ = finished
    with pytest.raises(UserError, match=r"data was made with model\.vocab_size=400 seed=0"):
        run(folder, "seed=1")


def test_data_of_the_users_own_are_used(finished: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = finished
    said = run(tmp_path, f"data.sources=[{{path: {folder / 'data'}}}]")
    assert "What it learned" in said
    assert not (tmp_path / "data").exists()


def test_the_library_is_the_interpreters_own_code() -> None:
    documents = standard_library()
    names = [document.name for document in documents]
    root = Path(sysconfig.get_path("stdlib"))
    assert {"heapq.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert names == sorted(set(names))
    assert documents == standard_library()
    for document in documents:
        assert document.name.endswith(".py")
        assert not {"test", "tests", "idle_test", "site-packages"} & set(document.name.split("/"))
    by_name = {document.name: document.text for document in documents}
    assert by_name["heapq.py"] == (root / "heapq.py").read_text(encoding="utf-8")
    assert sum(len(text or "") for text in by_name.values()) > 5_000_000


def test_a_python_without_sources_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").touch()
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(UserError, match=r"has no sources of the standard library.*data\.sources"):
        standard_library()
