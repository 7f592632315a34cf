"""A run may start from any folder that holds a network of its shape."""

from pathlib import Path

import pytest
import torch
from train.conftest import MakeConfig

from whalefall.convert import convert
from whalefall.errors import UserError
from whalefall.train.trainer import Trainer
from whalefall.train.weights import load_network


def same(left: torch.nn.Module, right: torch.nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("layout", ["run", "checkpoint", "hugging face"])
def test_a_run_starts_from_a_network(layout: str, make_config: MakeConfig, tmp_path: Path) -> None:
    first = Trainer(make_config("first"), sinks=[])
    first.run()
    source = tmp_path / "first"
    if layout == "checkpoint":
        source = next((source / "checkpoints").glob("step-00000012"))
    elif layout == "hugging face":
        convert(source, tmp_path / "exported", dtype="float32")
        source = tmp_path / "exported"
    assert same(load_network(source), first.model)

    second = Trainer(make_config("second", initialize_from=str(source)), sinks=[])
    assert same(second.model, first.model)
    assert second.position.step == 0
    assert second.ema is not None
    for name, average in second.ema.state_dict().items():
        assert torch.equal(average, first.optimizer.masters[name])


def test_the_context_may_be_extended(make_config: MakeConfig, tmp_path: Path) -> None:
    """YaRN changes the rotation, not the weights: the second phase of the paper starts so."""
    first = Trainer(make_config("first"), sinks=[])
    first.run()
    model = first.config.model.model_dump(mode="json") | {"rope_scaling": {"factor": 4.0}}
    config = make_config("longer", initialize_from=str(tmp_path / "first"), model=model)
    extended = Trainer(config, sinks=[])
    assert same(extended.model, first.model)
    tokens = torch.arange(40).unsqueeze(0)
    assert not torch.equal(extended.model(tokens).logits, first.model(tokens).logits)


def test_a_resumed_run_goes_on_from_its_own_checkpoint(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    Trainer(make_config("first"), sinks=[]).run()
    second = Trainer(make_config("second", initialize_from=str(tmp_path / "first")), sinks=[])
    second.run()
    again = Trainer(make_config("second", initialize_from=str(tmp_path / "first")), sinks=[])
    assert same(again.model, second.model)
    assert again.position == second.position


def test_another_shape_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    first = Trainer(make_config("first"), sinks=[])
    first.run()
    model = first.config.model.model_dump(mode="json") | {"hidden_size": 64}
    with pytest.raises(UserError, match=r"initialize_from: .* is \[.*48.*\] in .* and \[.*64"):
        Trainer(
            make_config("wider", initialize_from=str(tmp_path / "first"), model=model), sinks=[]
        )


def test_a_folder_without_a_network_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="neither a Hugging Face folder"):
        Trainer(make_config("second", initialize_from=str(tmp_path / "empty")), sinks=[])
