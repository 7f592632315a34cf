"""The loop: what a run leaves, and what may stop it."""

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whalefall.config.load import load_config
from whalefall.config.train import TrainConfig
from whalefall.data.prepare import prepare
from whalefall.data.sources import Document
from whalefall.errors import UserError
from whalefall.ops.halves import split
from whalefall.train import gradients
from whalefall.train.checkpoint import latest, load_weights
from whalefall.train.metrics import Record
from whalefall.train.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


class Recorder:
    """A sink that keeps the records, and may act on them."""

    def __init__(self, act: Callable[[Record], None] = lambda record: None):
        self.records: list[Record] = []
        self.closed = False
        self._act = act

    def write(self, record: Record) -> None:
        self.records.append(record)
        self._act(record)

    def close(self) -> None:
        self.closed = True

    @property
    def steps(self) -> list[Record]:
        return [record for record in self.records if "loss" in record]


def test_a_run_learns_and_leaves_its_folder(make_config: MakeConfig) -> None:
    config = make_config(logging={"tensorboard": True})
    sink = Recorder()
    result = Trainer(config, sinks=[sink]).run()
    assert (result.steps, result.tokens, result.stopped) == (12, 12 * 4 * 32, "finished")
    assert sink.closed
    first, last = sink.steps[0], sink.steps[-1]
    assert [record["step"] for record in sink.steps] == list(range(1, 13))
    assert last["loss"] < first["loss"] - 0.3
    assert len(first["max_violation"]) == len(first["expert_load"]) == 2
    assert sum(first["expert_load"][0]) == pytest.approx(1, abs=1e-5)
    evaluations = [record for record in sink.records if "heldout_bits_per_byte" in record]
    assert [record["step"] for record in evaluations] == [6, 12]
    assert result.heldout_bits_per_byte == evaluations[-1]["heldout_bits_per_byte"]

    folder = config.output
    names = {path.name for path in folder.iterdir()}
    assert names >= {"config.yaml", "tokenizer.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    assert load_config(folder / "config.yaml") == config
    checkpoints = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert checkpoints == ["step-00000010", "step-00000012"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == json.loads(json.dumps(sink.records))


def test_the_routing_biases_are_trained_and_saved(make_config: MakeConfig) -> None:
    trainer = Trainer(make_config(), sinks=[])
    trainer.run()
    _, weights = load_weights(latest(trainer.config.output))
    biases = {name: w for name, w in weights.items() if name.endswith("e_score_correction_bias")}
    assert len(biases) == 2
    for bias in biases.values():
        assert bias.abs().max() > 0.004
        # Twelve steps of 0.001 either way, or none.
        torch.testing.assert_close(bias / 0.001, (bias / 0.001).round(), atol=1e-3, rtol=0)


@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_equal_the_whole_batch(make_config: MakeConfig, size: int) -> None:
    whole = Trainer(make_config("whole"), sinks=[])
    parts = Trainer(make_config("parts", optimizer={"micro_batch_rows": size}), sinks=[])
    losses = []
    for trainer in (whole, parts):
        trainer.model.double()
        batches = trainer._micro_batches(4)
        step = gradients.accumulate_gradients(
            trainer.model, batches, mtp_weight=0.3, sequence_alpha=0.1
        )
        losses.append(step)
    assert len(parts._micro_batches(4)) == -(-4 // size)
    whole_losses, part_losses = (gradients.summary(step.names, step.parts) for step in losses)
    for part, value in whole_losses.items():
        assert part_losses[part] == pytest.approx(value, rel=1e-6)
    assert torch.equal(losses[0].expert_loads, losses[1].expert_loads)
    for (name, a), b in zip(whole.model.named_parameters(), parts.model.parameters(), strict=True):
        assert (b.grad - a.grad).norm() <= 1e-6 * a.grad.norm(), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(
    make_config: MakeConfig, number: signal.Signals
) -> None:
    def interrupt(record: Record) -> None:
        if record["step"] == 3:
            os.kill(os.getpid(), number)

    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    config = make_config()
    result = Trainer(config, sinks=[Recorder(interrupt)]).run()
    assert (result.stopped, result.steps) == ("signal", 3)
    assert latest(config.output).name == "step-00000003"
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    sink = Recorder()
    assert Trainer(config, sinks=[sink]).run().stopped == "finished"
    assert [record["step"] for record in sink.steps] == list(range(4, 13))


def test_the_time_limit_saves_and_stops(make_config: MakeConfig) -> None:
    config = make_config(runtime={"max_minutes": 1e-9})
    result = Trainer(config, sinks=[]).run()
    assert (result.stopped, result.steps) == ("time", 0)
    assert latest(config.output).name == "step-00000000"


def test_a_run_outside_the_main_thread(make_config: MakeConfig) -> None:
    results = []
    trainer = Trainer(make_config(), sinks=[])
    thread = threading.Thread(target=lambda: results.append(trainer.run()))
    thread.start()
    thread.join()
    assert results[0].stopped == "finished"


def test_a_finished_run_has_nothing_left_to_do(make_config: MakeConfig) -> None:
    config = make_config()
    first = Trainer(config, sinks=[]).run()
    before = (config.output / "metrics.jsonl").read_text()
    again = Trainer(config, sinks=[]).run()
    assert (again.stopped, again.steps) == ("finished", first.steps)
    assert (config.output / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize("part", ["main", "mtp", "balance"])
def test_a_loss_that_is_not_finite_is_named_and_not_applied(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = make_config(optimizer={"micro_batch_rows": 2})
    calls = 0

    def broken(*args, **kwargs):
        nonlocal calls
        calls += 1
        losses = original(*args, **kwargs)
        if calls != 14:  # the second micro-batch of step 7
            return losses
        bad = torch.tensor(float("nan"))
        changes = {part: [bad] if part == "mtp" else bad, "total": losses.total * bad}
        return type(losses)(**{**vars(losses), **changes})

    original = gradients.training_loss
    monkeypatch.setattr(gradients, "training_loss", broken)
    trainer = Trainer(config, sinks=[])
    with pytest.raises(UserError) as caught:
        trainer.run()
    name = "mtp 1" if part == "mtp" else part
    documents = trainer.loader.batch(6 * 4 + 2, 2).document_ids
    assert f"step 7: {name} is nan, in documents {', '.join(documents[:8])}" in str(caught.value)
    assert latest(config.output).name == "step-00000005"
    assert all(p.isfinite().all() for p in trainer.model.parameters())

    monkeypatch.setattr(gradients, "training_loss", original)
    assert Trainer(config, sinks=[]).run().steps == 12


def test_a_gradient_that_is_not_finite_is_named_and_not_applied(make_config: MakeConfig) -> None:
    config = make_config()
    trainer = Trainer(config, sinks=[])
    name = "model.layers.1.mlp.experts.down_proj"
    dict(trainer.model.named_parameters())[name].register_hook(
        lambda gradient: gradient * float("inf") if trainer.position.step == 6 else gradient
    )
    with pytest.raises(UserError, match=rf"step 7: gradient norm \(first bad gradient: {name}\)"):
        trainer.run()
    assert latest(config.output).name == "step-00000005"
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_bf16_weights_train_on_fp32_masters(make_config: MakeConfig) -> None:
    changes = {"precision": {"working": "bf16"}, "optimizer": {"moment_dtype": "bfloat16"}}
    sink = Recorder()
    trainer = Trainer(make_config(**changes), sinks=[sink])
    trainer.run()
    assert sink.steps[-1]["loss"] < sink.steps[0]["loss"] - 0.3
    _, weights = load_weights(latest(trainer.config.output))
    for name, parameter in trainer.model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert weights[name].dtype == torch.float32
        assert torch.equal(split(weights[name])[0], parameter)  # the nearest, ties away from zero


def test_a_dense_network_without_mtp(make_config: MakeConfig) -> None:
    dense = {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}
    sink = Recorder()
    Trainer(make_config(model=dense), sinks=[sink]).run()
    assert sink.steps[-1]["loss"] < sink.steps[0]["loss"] - 0.3
    assert sink.steps[-1]["mtp"] == sink.steps[-1]["max_violation"] == []


def test_data_of_another_tokenizer_cannot_go_on(
    make_config: MakeConfig, dataset: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(dataset, copy)
    config = make_config(data={"sources": [{"path": str(copy)}]})
    Trainer(config, sinks=[]).run()
    shutil.rmtree(copy)
    prepare([Document(f"{i}", "another text " * 50) for i in range(20)], copy, vocab_size=290,
            heldout_fraction=0.5, workers=1)  # fmt: skip
    with pytest.raises(UserError, match="tokenizer"):
        Trainer(config, sinks=[])


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_resumes_bit_for_bit(make_config: MakeConfig, precision: str) -> None:
    def config(folder: str, steps: int) -> TrainConfig:
        return make_config(
            folder,
            model={"moe_intermediate_size": 24},  # rows of 16 bytes for the grouped GEMM
            schedule={"total_tokens": steps * 4 * 32.0},
            optimizer={"moment_dtype": "bfloat16", "micro_batch_rows": 2},
            precision={"working": precision},
            runtime={"device": "cuda"},
        )

    Trainer(config("straight", 12), sinks=[]).run()
    Trainer(config("halves", 7), sinks=[]).run()
    Trainer(config("halves", 12), sinks=[]).run()
    straight, halves = (latest(config(name, 12).output) for name in ("straight", "halves"))
    for file in ("model", "optimizer", "ema"):
        expected, found = (load_file(f / f"{file}.safetensors") for f in (straight, halves))
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_sample_masks_run(make_config: MakeConfig, dataset: Path) -> None:
    data = {"sources": [{"path": str(dataset)}], "sample_masks": True}
    assert Trainer(make_config(data=data), sinks=[]).run().heldout_bits_per_byte > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"vocab_size": 100}}, "vocab_size"),
        ({"data": {"sources": []}}, "data.sources"),
        ({"runtime": {"device": "abacus"}}, "runtime.device is 'abacus'"),
        ({"runtime": {"device": "cuda:77"}}, "runtime.device is 'cuda:77'"),
    ],
)
def test_what_does_not_fit_is_named(make_config: MakeConfig, changes: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Trainer(make_config(**changes), sinks=[])
