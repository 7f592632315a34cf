"""What every test shares: shape checks at run time, one thread, a tiny network."""

import jaxtyping
import pytest
import torch
from hypothesis import settings

# Before anything imports these rooms: from here on their jaxtyping signatures are checked at
# every call. Each xdist worker reads this file too.
jaxtyping.install_import_hook(
    [f"whalefall.{room}" for room in ("model", "ops", "engine", "train", "data")],
    "typechecks.checked",
)

from tiny import TINY  # noqa: E402

from whalefall.config.model import ModelConfig  # noqa: E402

torch.set_num_threads(1)

# The same examples on every machine, however slow, and no folder left behind.
settings.register_profile("whalefall", deadline=None, derandomize=True, database=None)
settings.load_profile("whalefall")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def tiny_config() -> ModelConfig:
    return TINY
