"""What a run is. This room knows nothing of torch."""

from whalefall.config.load import diff_configs, dump_config, load_config, preset_names, save_config
from whalefall.config.model import ModelConfig
from whalefall.config.train import TrainConfig

__all__ = [
    "ModelConfig",
    "TrainConfig",
    "diff_configs",
    "dump_config",
    "load_config",
    "preset_names",
    "save_config",
]
