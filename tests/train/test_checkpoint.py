"""Checkpoints are whole or absent, and a resumed run cannot be told from one that never stopped."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from whalefall.config.load import save_config
from whalefall.config.train import TrainConfig
from whalefall.errors import UserError
from whalefall.model.transformer import Transformer
from whalefall.train import checkpoint
from whalefall.train.checkpoint import CheckpointWriter, State, latest, load, load_weights
from whalefall.train.metrics import read_records
from whalefall.train.schedule import Position
from whalefall.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


def state(config: TrainConfig, step: int) -> State:
    filled = torch.full((4, 3), float(step))
    return State(
        Position(step, 128 * step, 4 * step),
        config,
        {"a.weight": filled, "a.bias": filled[0]},
        {"steps": torch.tensor(step), "a.weight.exp_avg": filled.bfloat16()},
        {"a.weight": -filled},
        "fingerprint",
        1.5,
    )


def write(config: TrainConfig, *steps: int, keep: int = 2) -> Path:
    with CheckpointWriter(config.output, keep) as writer:
        for step in steps:
            writer.save(state(config, step))
    return config.output


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_is_loaded(make_config: MakeConfig) -> None:
    config = make_config()
    folder = latest(write(config, 3))
    assert folder is not None
    loaded, expected = load(folder, config), state(config, 3)
    assert (loaded.position, loaded.config) == (expected.position, config)
    assert (loaded.tokenizer, loaded.heldout_bits_per_byte) == ("fingerprint", 1.5)
    for ours, theirs in ((loaded.model, expected.model), (loaded.optimizer, expected.optimizer),
                         (loaded.ema, expected.ema)):  # fmt: skip
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name].dtype == theirs[name].dtype
            assert torch.equal(ours[name], theirs[name])


def test_a_snapshot_is_taken_at_the_call(make_config: MakeConfig) -> None:
    config = make_config()
    taken = state(config, 3)
    with CheckpointWriter(config.output, keep=1) as writer:
        writer.save(taken)
        taken.model["a.weight"].zero_()
    assert load(latest(config.output), config).model["a.weight"].min() == 3


def test_the_newest_are_kept(make_config: MakeConfig) -> None:
    run = write(make_config(), 1, 2, 10, 11, keep=3)
    assert names(run) == ["step-00000002", "step-00000010", "step-00000011"]
    assert latest(run).name == "step-00000011"


def test_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path) is None


def test_a_half_written_checkpoint_is_never_picked_up(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer dies with the process (nothing is cleaned up) between two files."""
    run = write(config := make_config(), 5)
    original = checkpoint.save_file

    def die(tensors: dict[str, Any], path: Path) -> None:
        original(tensors, path)
        os._exit(9)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(checkpoint, "save_file", die)
        CheckpointWriter(run, keep=1)._write(
            {"model": {"a": torch.ones(3)}}, {"position": {"step": 6}}
        )
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(names(run)) == 2
    assert latest(run).name == "step-00000005"
    write(config, 6)
    assert names(run) == ["step-00000005", "step-00000006"]


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip_a_bit, truncate, Path.unlink])
@pytest.mark.parametrize("file", ["model.safetensors", "ema.safetensors", "state.json"])
def test_damage_is_named_with_the_healthy_one_before(
    make_config: MakeConfig, damage: Callable[[Path], None], file: str
) -> None:
    run = write(make_config(), 1, 2, 3, keep=3)
    damage(run / "checkpoints" / "step-00000003" / file)
    flip_a_bit(run / "checkpoints" / "step-00000002" / "optimizer.safetensors")
    with pytest.raises(UserError) as caught:
        latest(run)
    assert f"step-00000003/{file}" in str(caught.value)
    assert "step-00000001 is whole" in str(caught.value)
    with pytest.raises(UserError, match=file):
        load_weights(run / "checkpoints" / "step-00000003")


def test_a_full_disk_is_told_and_loses_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()

    def full(tensors: dict[str, Any], path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    write(config, 5)
    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match=r"disk is full.*step-00000006"):
        write(config, 6)
    writer = CheckpointWriter(config.output, keep=1)
    writer.save(state(config, 7))
    with pytest.raises(UserError, match=r"disk is full.*step-00000007"):
        writer.save(state(config, 8))
    assert names(config.output) == ["step-00000005"]
    assert latest(config.output).name == "step-00000005"


def test_a_full_disk_stops_a_run_at_its_last_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config()
    original = checkpoint.save_file

    def full_from_step_10(tensors: dict[str, Any], path: Path) -> None:
        if "step-00000005" not in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_from_step_10)
    with pytest.raises(UserError, match="disk is full"):
        Trainer(config, sinks=[]).run()
    monkeypatch.undo()
    assert latest(config.output).name == "step-00000005"
    assert Trainer(config, sinks=[]).run().stopped == "finished"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 8}, "seed: 7 -> 8"),
        ({"model": {"kv_lora_rank": 20}}, "model.kv_lora_rank: 16 -> 20"),
        ({"data": {"sequence_length": 16}}, "data.sequence_length: 32 -> 16"),
        ({"optimizer": {"moment_dtype": "bfloat16"}}, "optimizer.moment_dtype"),
    ],
)
def test_another_run_cannot_be_resumed(
    make_config: MakeConfig, changes: dict[str, Any], words: str
) -> None:
    folder = latest(write(make_config(), 1))
    with pytest.raises(UserError, match=words):
        load(folder, make_config(**changes))


def test_harmless_changes_are_allowed(make_config: MakeConfig) -> None:
    folder = latest(write(make_config(), 1))
    changed = make_config(
        "elsewhere",
        schedule={"total_tokens": 1e9},
        logging={"every_steps": 7},
        checkpoint={"every_steps": 3},
        evaluation={"rows": 9},
        runtime={"max_minutes": 5.0, "threads": 2},
    )
    assert load(folder, changed).position.step == 1


def test_weights_alone(make_config: MakeConfig) -> None:
    config = make_config()
    trainer = Trainer(config, sinks=[])
    trainer.run()
    shape, weights = load_weights(latest(config.output))
    assert shape == config.model
    model = Transformer(shape)
    model.load_state_dict(weights)
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(dict(model.named_parameters())[name], parameter)
    _, averages = load_weights(latest(config.output), average=True)
    assert averages.keys() == weights.keys()
    for name, average in trainer.ema.state_dict().items():
        assert torch.equal(averages[name], average)


def test_weights_without_an_average(make_config: MakeConfig) -> None:
    config = make_config(ema={"enabled": False}, schedule={"total_tokens": 128.0})
    Trainer(config, sinks=[]).run()
    with pytest.raises(UserError, match=r"ema\.enabled=false"):
        load_weights(latest(config.output), average=True)


def start(config: TrainConfig) -> subprocess.Popen[bytes]:
    config.output.mkdir(parents=True, exist_ok=True)
    path = config.output.with_suffix(".yaml")
    save_config(config, path)
    program = (
        "import sys; from whalefall.config.load import load_config; "
        "from whalefall.train.trainer import Trainer; Trainer(load_config(sys.argv[1])).run()"
    )
    return subprocess.Popen([sys.executable, "-c", program, str(path)], stderr=subprocess.DEVNULL)


def history(run: Path) -> list[dict[str, Any]]:
    """What a run recorded, without how long it took."""
    return [
        {key: value for key, value in record.items() if "second" not in key}
        for record in read_records(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize("changes", [{}, {"precision": {"working": "bf16"},
                                          "optimizer": {"micro_batch_rows": 2}}])  # fmt: skip
def test_kill_9_and_go_on_bit_for_bit(make_config: MakeConfig, changes: dict[str, Any]) -> None:
    schedule = {
        "total_tokens": 18 * 4 * 32.0,
        "learning_rate": [{"value": 3e-3, "until": 500}, {"value": 1e-4, "until": 2000,
                          "shape": "cosine"}, {"value": 1e-4}],
        "batch_rows": [{"start": 2, "value": 4, "until": 1500, "shape": "linear"}, {"value": 4}],
    }  # fmt: skip
    straight = make_config("straight", schedule=schedule, **changes)
    Trainer(straight, sinks=[]).run()

    killed = make_config("killed", schedule=schedule, **changes)
    process = start(killed)
    checkpoints, metrics = killed.output / "checkpoints", killed.output / "metrics.jsonl"
    while not (list(checkpoints.glob("step-*")) and len(read_records(metrics)) > 8):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    Trainer(killed, sinks=[]).run()

    assert history(killed.output) == history(straight.output)
    ends = [latest(config.output) for config in (straight, killed)]
    for file in ("model", "optimizer", "ema"):
        expected, found = (load_file(folder / f"{file}.safetensors") for folder in ends)
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
