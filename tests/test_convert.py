"""Conversion: the same network on the other side, and memory that does not grow with it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whalefall.config.model import ModelConfig
from whalefall.config.train import DataConfig, TrainConfig
from whalefall.convert import convert
from whalefall.errors import UserError
from whalefall.model.checkpoint import load_model, save_model
from whalefall.model.transformer import Transformer
from whalefall.train.checkpoint import CheckpointWriter, State, load_weights
from whalefall.train.schedule import Position


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    network = Transformer.create(tiny_config, seed=1)
    for router in network.routers():
        router.e_score_correction_bias.copy_(torch.linspace(-0.1, 0.123, len(router.weight)))
    return network


@pytest.fixture
def run(model: Transformer, tmp_path: Path) -> Path:
    """A run with two checkpoints, an average, and a tokenizer. The newer one holds ``model``."""
    folder = tmp_path / "run"
    weights = model.state_dict()
    average = {name: parameter.detach() * 0.5 for name, parameter in model.named_parameters()}
    config = TrainConfig(model=model.config, data=DataConfig(sequence_length=16))
    with CheckpointWriter(folder, keep=2) as writer:
        old = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
        writer.save(State(Position(1, 16, 1), config, old, {}, average, "", None))
        writer.save(State(Position(2, 32, 2), config, weights, {}, average, "", None))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(f'"{name}"')
    return folder


def assert_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_a_run_becomes_the_folder_that_saving_its_network_gives(
    model: Transformer, run: Path, tmp_path: Path
) -> None:
    for dtype, stored in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        convert(run, tmp_path / dtype, dtype=dtype)
        save_model(model, tmp_path / f"{dtype}-saved", dtype=stored)
        config = json.loads((tmp_path / dtype / "config.json").read_text())
        assert config == json.loads((tmp_path / f"{dtype}-saved" / "config.json").read_text())
        assert_weights(
            load_file(tmp_path / dtype / "model-00001-of-00001.safetensors"),
            load_file(tmp_path / f"{dtype}-saved" / "model-00001-of-00001.safetensors"),
        )
    assert_weights(load_model(tmp_path / "float32").state_dict(), model.state_dict())


def test_without_a_type_it_is_bfloat16(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_fp8_is_what_saving_in_fp8_gives(model: Transformer, run: Path, tmp_path: Path) -> None:
    convert(run / "checkpoints" / "step-00000002", tmp_path / "hf", dtype="fp8")
    save_model(model, tmp_path / "saved", dtype=torch.bfloat16, fp8=True)
    found, saved = load_model(tmp_path / "hf"), load_model(tmp_path / "saved")
    assert_weights(found.state_dict(), saved.state_dict())


def test_ema_takes_the_average_and_keeps_the_router_bias(
    model: Transformer, run: Path, tmp_path: Path
) -> None:
    convert(run, tmp_path / "hf", dtype="float32", ema=True)
    found = load_model(tmp_path / "hf").state_dict()
    parameters = dict(model.named_parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor * 0.5 if name in parameters else tensor), name


def test_there_and_back_is_bit_exact(model: Transformer, run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf", dtype="float32", max_shard_bytes=20_000)
    convert(tmp_path / "hf", tmp_path / "back")
    config, weights = load_weights(tmp_path / "back")
    assert config == load_model(tmp_path / "hf").config
    assert_weights(weights, model.state_dict())
    state = json.loads((tmp_path / "back" / "state.json").read_text())
    assert state["position"] == {"step": 0, "tokens": 0, "rows": 0}
    for folder in ("hf", "back"):
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (tmp_path / folder / name).read_text() == f'"{name}"'


def test_fp8_becomes_its_dequantized_values(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf", dtype="fp8")
    convert(tmp_path / "hf", tmp_path / "back")
    _, weights = load_weights(tmp_path / "back")
    assert_weights(weights, load_model(tmp_path / "hf").state_dict())


def test_wrong_requests_are_named_and_leave_nothing(run: Path, tmp_path: Path) -> None:
    convert(run, tmp_path / "hf")
    empty = tmp_path / "empty"
    empty.mkdir()
    for source, target, options, message in (
        (empty, "a", {}, "neither a Hugging Face folder"),
        (tmp_path / "nowhere", "a", {}, "neither a Hugging Face folder"),
        (run, "hf", {}, "already exists"),
        (run, "run", {}, "already exists"),
        (tmp_path / "hf", "hf", {}, "already exists"),
        (tmp_path / "hf", "a", {"ema": True}, "neither dtype nor ema applies"),
        (tmp_path / "hf", "a", {"dtype": "fp8"}, "neither dtype nor ema applies"),
    ):
        with pytest.raises(UserError, match=message):
            convert(source, tmp_path / target, **options)
    newest = run / "checkpoints" / "step-00000002"
    (newest / "ema.safetensors").unlink()
    with pytest.raises(UserError, match=r"ema\.safetensors is missing"):
        convert(run, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_full_disk_is_told_before_anything_is_mapped(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(run, tmp_path / "hf")
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="disk is full: 1000 bytes were free"):
        convert(tmp_path / "hf", tmp_path / "back")
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hf"}


# Resident memory that is not a mapped file: file pages can be dropped at any time, and are read
# and written through mappings here.
MEASURE = """
import sys, threading
from pathlib import Path
import torch
from whalefall.convert import convert

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024

def watch():
    while not done.wait(0.002):
        peak.append(max(peak.pop(), resident()))

torch.nn.Embedding(2, 2, device="meta")  # imports 70 MB of torch
run, folder, back, shard = sys.argv[1:]
for source, target in (run, folder), (folder, back):
    start = resident()
    peak, done = [start], threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    convert(source, target, max_shard_bytes=int(shard))
    done.set()
    watcher.join()
    print(peak[0] - start)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_is_bounded_by_a_shard_and_not_by_the_network(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    """150 MB of weights; the stacked tensors of experts are 50 and 25 MB each."""
    sizes = {
        "hidden_size": 512, "moe_intermediate_size": 192, "n_routed_experts": 64,
        "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
    }  # fmt: skip
    config = tiny_config.model_copy(update=sizes)
    weights = Transformer.create(config).state_dict()
    total = sum(tensor.nbytes for tensor in weights.values())
    training = TrainConfig(model=config, data=DataConfig(sequence_length=16))
    with CheckpointWriter(tmp_path / "run", keep=1) as writer:
        writer.save(State(Position(), training, weights, {}, None, "", None))
    shard = 4 * 2**20
    folders = [tmp_path / name for name in ("run", "folder", "back")]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, *folders, str(shard)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 2
    assert max(peaks) < 5 * shard < total / 6
    assert (tmp_path / "back" / "model.safetensors").stat().st_size > total
