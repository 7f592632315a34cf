"""A prepared data set of rhymes, and runs on it that take seconds."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig
from whalefall.data.prepare import prepare
from whalefall.data.sources import Document

WORDS = "the whale fell slowly down into dark water where small crabs and worms lived well".split()

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(0)
    documents = [
        Document(f"rhyme-{i}.txt", " ".join(rng.choices(WORDS, k=rng.randint(20, 60))) + ".\n")
        for i in range(120)
    ]
    folder = tmp_path_factory.mktemp("data") / "rhymes"
    prepare(documents, folder, vocab_size=300, heldout_fraction=0.1, workers=1)
    return folder


@pytest.fixture
def make_config(tmp_path: Path, dataset: Path, tiny_config: ModelConfig) -> MakeConfig:
    """A run of 12 steps on 4 rows of 32 tokens; keyword arguments override by section."""

    def make(folder: str = "run", **sections: Any) -> TrainConfig:
        shape = tiny_config.model_dump(mode="json")
        model = {**shape, "vocab_size": 320, "num_hidden_layers": 2}
        values: dict[str, Any] = {
            "output": str(tmp_path / folder),
            "seed": 7,
            "model": model,
            "data": {"sources": [{"path": str(dataset)}], "sequence_length": 32},
            "schedule": {
                "total_tokens": 12 * 4 * 32.0,
                "warmup_steps": 3,
                "learning_rate": [{"value": 3e-3}],
                "batch_rows": [{"value": 4}],
            },
            "optimizer": {"moment_dtype": "float32"},
            "ema": {"decay": 0.9},
            "evaluation": {"every_steps": 6, "rows": 4},
            "checkpoint": {"every_steps": 5, "keep": 2},
            "logging": {"tensorboard": False},
            "precision": {"working": "fp32"},
            "memory": {},
            "runtime": {"device": "cpu", "threads": 1},
        }
        for section, changes in sections.items():
            is_section = isinstance(changes, dict)
            values[section] = {**values[section], **changes} if is_section else changes
        return TrainConfig.model_validate(values)

    return make
