"""A run is one file and its overrides; whatever is wrong with them is told in one line."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalefall.config import (
    TrainConfig,
    diff_configs,
    dump_config,
    load_config,
    preset_names,
    save_config,
)
from whalefall.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def test_presets() -> None:
    assert preset_names() == [
        "bench-6b",
        "bench-v3-slice",
        "moonlight-16b",
        "quickstart",
        "v3-671b",
    ]


@pytest.mark.parametrize("name", preset_names())
def test_preset_survives_being_saved(name: str, file: Path) -> None:
    config = load_config(name)
    save_config(config, file)
    assert load_config(file) == config


def test_v3_preset_spells_the_defaults_out() -> None:
    """But for what must be asked for: a lower precision, and making things twice."""
    assert diff_configs(TrainConfig(), load_config("v3-671b")) == [
        'output: "runs/default" -> "runs/v3-671b"',
        'precision.fprop: null -> "fp8"',
        'precision.dgrad: null -> "fp8"',
        'precision.wgrad: null -> "fp8"',
        'memory.recompute: "none" -> "selective"',
    ]


@given(
    number=st.floats(1e-30, 1e30),
    form=st.sampled_from(["{:e}", "{:.3e}", "{:.0e}", "{:E}", "{!r}", "{:g}"]),
)
def test_every_way_to_write_a_float_is_a_number(number: float, form: str) -> None:
    text = form.format(number)
    config = load_config("quickstart", [f"schedule.total_tokens={text}"])
    assert config.schedule.total_tokens == float(text)


@pytest.mark.parametrize("text", ["1e9", "1E9", "+1e9", "1.e9", "1.0e+9", "1_000e6", "1000000000"])
def test_float_without_the_dot_that_yaml_wants(text: str, file: Path) -> None:
    file.write_text(f"schedule: {{total_tokens: {text}}}")
    assert load_config(file).schedule.total_tokens == 1e9


def test_text_that_looks_like_a_float_stays_text(file: Path) -> None:
    file.write_text("output: 1e9x")
    assert load_config(file).output == Path("1e9x")


def test_overrides_reach_into_lists_and_empty_sections() -> None:
    config = load_config(
        "quickstart",
        [
            "data.sources=[{path: code}]",
            "data.sources.1.path=prose",
            "data.sources.1.weight=3",
            "schedule.learning_rate.0.value=1e-4",
            "optimizer.betas.1=0.99",
            "model.rope_scaling.factor=4",
            "output=runs/a=b",
            "seed=1",
            "seed=2",
        ],
    )
    assert [(str(source.path), source.weight) for source in config.data.sources] == [
        ("code", 1.0),
        ("prose", 3.0),
    ]
    assert config.schedule.learning_rate[0].value == 1e-4
    assert config.optimizer.betas == (0.9, 0.99)
    assert config.model.rope_scaling is not None
    assert config.model.rope_scaling.factor == 4.0
    assert config.output == Path("runs/a=b")
    assert config.seed == 2


def test_overrides_are_checked_together() -> None:
    config = load_config("quickstart", ["model.n_group=3", "model.n_routed_experts=12"])
    assert config.model.n_routed_experts == 12


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "schedule.warmup_step=3",
            "schedule.warmup_step is not a key of schedule; did you mean warmup_steps?",
        ),
        ("hidden_size=3", "hidden_size is not a key of a run; did you mean model.hidden_size?"),
        ("modle.hidden_size=3", "modle is not a key of a run; did you mean model?"),
        (
            "data.sources=[{path: x, wieght: 2}]",
            "data.sources.0.wieght is not a key of data.sources.0; did you mean weight?",
        ),
        (
            "balance.xyz=1",
            "balance.xyz is not a key of balance; its keys are sequence_alpha",
        ),
        ("model.hidden_size=abc", "model.hidden_size is 'abc'; must be a valid integer"),
        ("model.hidden_size=0", "model.hidden_size is 0; must be greater than 0"),
        ("model.eos_token_id=abc", "model.eos_token_id is 'abc'; must be a valid integer"),
        ("model=3", "model is 3; must be a mapping of keys"),
        ("output=3", "output is 3; must be a valid path"),
        ("precision.working=fp8", "precision.working is 'fp8'; must be 'fp32' or 'bf16'"),
        (
            "precision.wgrad=bf16",
            "wgrad is 'bf16'; it must be 'fp8' or the working type ('fp32')",
        ),
        ("data.sources.0.weight=2", "data.sources.0.path is missing"),
        ("model.n_group=3", "n_routed_experts (16) is not divisible by n_group (3)"),
        ("schedule.mtp_weight=[]", "mtp_weight needs at least one phase"),
        (
            "data.sequence_length=9999",
            "data.sequence_length (9999) exceeds the positions the model has (1024): "
            "raise model.max_position_embeddings or set rope_scaling",
        ),
        ("seed", "'seed' is no override; write key.path=value"),
        ("=3", "'=3' is no override; write key.path=value"),
        ("seed.x=3", "seed is 0, which has no key x"),
        (
            "data.sources.3.path=x",
            "data.sources.3: data.sources is a list, whose next free index is 0",
        ),
        ("seed=[1", "seed=[1, line 1: expected ',' or ']', but got '<stream end>'"),
    ],
)
def test_wrong_override_is_told_exactly(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config("quickstart", [override])
    assert str(caught.value) == message


def test_first_of_several_errors_is_told() -> None:
    with pytest.raises(UserError) as caught:
        load_config("quickstart", ["seed=x", "model.hidden_size=y", "foo=1"])
    assert str(caught.value) == "seed is 'x'; must be a valid integer (and 2 more)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {}\nseed: 2", "line 3: the key seed is given twice"),
        (
            "model:\n  hidden_size: 8\n  hidden_size: 8",
            "line 3: the key hidden_size is given twice",
        ),
        ("seed: [1\nb: 2", "line 2: expected ',' or ']'"),
        ("[1, 2]: 3", "line 1: found unhashable key"),
        ("", "describes no run"),
        ("- seed: 1", "describes no run"),
        ("seed: \x01", "is no YAML"),
        ("sed: 1", "sed is not a key of a run; did you mean seed?"),
    ],
)
def test_broken_file_is_told(text: str, message: str, file: Path) -> None:
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_name_is_answered_with_the_presets() -> None:
    with pytest.raises(UserError, match=r"did you mean quickstart\? the presets are bench-6b"):
        load_config("quickstrat")


def test_unreadable_files(tmp_path: Path, file: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        load_config(tmp_path)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is no text in UTF-8"):
        load_config(file)


def test_differences_name_the_key_and_both_values() -> None:
    a = load_config("quickstart")
    b = load_config(
        "quickstart",
        ["model.hidden_size=512", "data.sources=[{path: x}]", "schedule.batch_rows.0.until=3e5"],
    )
    assert diff_configs(a, a) == []
    assert diff_configs(a, b) == [
        "model.hidden_size: 128 -> 512",
        'data.sources: [] -> [{"path": "x", "weight": 1.0}]',
        "schedule.batch_rows.0.until: 100000.0 -> 300000.0",
    ]


def test_dumped_config_names_every_key() -> None:
    dumped = dump_config(load_config("quickstart"))
    for section in ("model", "data", "schedule", "optimizer", "balance", "ema", "runtime"):
        assert f"\n{section}:\n" in dumped
    assert "rope_scaling: null" in dumped
