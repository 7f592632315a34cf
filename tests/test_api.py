"""The public face: quick to import, and one way in and out for every kind of folder."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import whalefall
from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.data.tokenizer import SMALLEST_VOCABULARY, Tokenizer
from whalefall.model.transformer import Transformer
from whalefall.train.checkpoint import CheckpointWriter, State
from whalefall.train.schedule import Position

TOKENIZER = Tokenizer.train([], SMALLEST_VOCABULARY)
TOKENS = torch.arange(3, 15).unsqueeze(0)


@pytest.fixture
def model(tiny_config: ModelConfig) -> Transformer:
    changes = {"vocab_size": SMALLEST_VOCABULARY, "initializer_range": 0.3}
    return Transformer.create(tiny_config.model_copy(update=changes))


def write_run(model: Transformer, folder: Path, steps: list[int]) -> None:
    """A run whose checkpoints hold the network's weights times their step."""
    TOKENIZER.save(folder)
    config = TrainConfig(model=model.config, output=folder)
    with CheckpointWriter(folder, keep=10) as writer:
        for step in steps:
            weights = {name: tensor * step for name, tensor in model.state_dict().items()}
            writer.save(State(Position(step), config, weights, {}, None, "", None))


def assert_same(found: Transformer, expected: Transformer) -> None:
    assert found.config.to_hf() == expected.config.to_hf()
    assert torch.equal(found(TOKENS).logits, expected(TOKENS).logits)


def test_what_is_saved_is_loaded(model: Transformer, tmp_path: Path) -> None:
    whalefall.save(model, TOKENIZER, tmp_path / "model")
    loaded = whalefall.load(tmp_path / "model", device="cpu")
    assert_same(loaded.model, model)
    assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
    network, tokenizer = whalefall.load(str(tmp_path / "model"), device="cpu")
    assert tokenizer.encode("né") == TOKENIZER.encode("né")
    assert network.lm_head.weight.dtype == torch.float32


def test_types_can_be_chosen(model: Transformer, tmp_path: Path) -> None:
    whalefall.save(model, TOKENIZER, tmp_path / "model", dtype=torch.bfloat16)
    as_stored = whalefall.load(tmp_path / "model", device="cpu", dtype=torch.bfloat16).model
    assert torch.equal(as_stored.lm_head.weight, model.lm_head.weight.bfloat16())
    widened = whalefall.load(tmp_path / "model", device="cpu").model
    assert torch.equal(widened.lm_head.weight, as_stored.lm_head.weight.float())


def test_a_run_gives_its_newest_checkpoint(model: Transformer, tmp_path: Path) -> None:
    write_run(model, tmp_path / "run", [2, 1])
    newest = whalefall.load(tmp_path / "run", device="cpu")
    assert torch.equal(newest.model.lm_head.weight, model.lm_head.weight * 2)
    assert newest.tokenizer.fingerprint == TOKENIZER.fingerprint


def test_a_checkpoint_is_loaded_with_the_tokenizer_of_its_run(
    model: Transformer, tmp_path: Path
) -> None:
    write_run(model, tmp_path / "run", [1, 2])
    first = whalefall.load(tmp_path / "run" / "checkpoints" / "step-00000001", device="cpu")
    assert_same(first.model, model)
    assert first.tokenizer.fingerprint == TOKENIZER.fingerprint


@pytest.mark.parametrize("folder", ["missing", "."])
def test_another_folder_is_told_what_is_accepted(folder: str, tmp_path: Path) -> None:
    message = r"neither a Hugging Face folder .*, nor a run .*, nor a checkpoint"
    with pytest.raises(whalefall.UserError, match=message):
        whalefall.load(tmp_path / folder)


def test_a_folder_without_a_tokenizer_is_told(model: Transformer, tmp_path: Path) -> None:
    whalefall.save(model, TOKENIZER, tmp_path / "model")
    (tmp_path / "model" / "manifest.json").unlink()
    (tmp_path / "model" / "tokenizer.json").unlink()
    with pytest.raises(whalefall.UserError, match=r"tokenizer\.json"):
        whalefall.load(tmp_path / "model")


def test_a_tokenizer_larger_than_the_network_is_refused(
    tiny_config: ModelConfig, tmp_path: Path
) -> None:
    whalefall.save(Transformer.create(tiny_config), TOKENIZER, tmp_path / "model")
    with pytest.raises(whalefall.UserError, match=r"274 tokens, but .* vocab_size is 128"):
        whalefall.load(tmp_path / "model")


def test_what_is_no_saved_model_is_not_overwritten(model: Transformer, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").touch()
    with pytest.raises(whalefall.UserError, match="already exists"):
        whalefall.save(model, TOKENIZER, tmp_path / "model")


def test_generate_answers_as_it_is_asked(model: Transformer) -> None:
    one = whalefall.generate(model, TOKENIZER, "ab", max_tokens=5, seed=1)
    assert isinstance(one, whalefall.Completion)
    assert len(one.tokens) == 5
    assert whalefall.generate(model, TOKENIZER, ["ab", "cd"], max_tokens=5, seed=1)[0] == one
    with pytest.raises(whalefall.UserError, match="top_p"):
        whalefall.generate(model, TOKENIZER, "ab", top_p=2.0)
    with pytest.raises(TypeError, match="temprature"):
        whalefall.generate(model, TOKENIZER, "ab", temprature=0.5)


def test_importing_the_package_does_not_import_torch() -> None:
    check = "import sys, whalefall; whalefall.UserError; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_every_public_name_is_there() -> None:
    for name in whalefall.__all__:
        assert getattr(whalefall, name).__module__.startswith("whalefall.")
        assert name in dir(whalefall)
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        _ = whalefall.lod


def test_the_version_is_the_package_s() -> None:
    assert whalefall.__version__ == version("whalefall")
