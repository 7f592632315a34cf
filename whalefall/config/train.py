"""A run: the network, its data, and the recipe, as one file."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from whalefall.config.model import ModelConfig, Section


class Phase(Section):
    """One stretch of a schedule: how a number moves until a count of tokens has been seen."""

    value: float
    """The number at the end of the stretch."""
    until: float | None = None
    """Tokens seen at which the stretch ends; null for the last one, which never ends."""
    shape: Literal["constant", "linear", "cosine"] = "constant"
    """``constant`` holds ``value``; the others move to it from ``start``."""
    start: float | None = None
    """The number at the beginning; null takes the end of the stretch before."""


Schedule = list[Phase]


def _check_schedule(name: str, phases: Schedule) -> None:
    if not phases:
        raise ValueError(f"{name} needs at least one phase")
    last = 0.0
    for index, phase in enumerate(phases):
        is_final = index == len(phases) - 1
        if (phase.until is None) != is_final:
            raise ValueError(f"{name}[{index}].until must be null in the last phase and only there")
        if is_final and phase.shape != "constant":
            raise ValueError(f"{name}[{index}] never ends, so its shape must be 'constant'")
        if index == 0 and phase.shape != "constant" and phase.start is None:
            raise ValueError(f"{name}[0] is {phase.shape} and needs a start")
        if phase.until is not None:
            if phase.until <= last:
                raise ValueError(f"{name}[{index}].until ({phase.until:g}) is not after {last:g}")
            last = phase.until


class SourceConfig(Section):
    """One prepared data set (the output folder of ``whalefall data prepare``)."""

    path: Path
    weight: float = Field(1.0, gt=0)
    """Share of the rows drawn from it, relative to the other sources' weights."""


class DataConfig(Section):
    sources: list[SourceConfig] = Field(default_factory=list)
    sequence_length: int = Field(4096, gt=0)
    sample_masks: bool = False
    """Forbid attention between documents packed in one row (SFT); pre-training allows it."""


class ScheduleConfig(Section):
    """What changes with the tokens seen (paper 4.2). Every field is a pure function of position."""

    total_tokens: float = Field(14.8e12, gt=0)
    warmup_steps: int = Field(2000, ge=0)
    """The learning rate is multiplied by (step + 1) / warmup_steps during the first steps."""
    learning_rate: Schedule = [
        Phase(value=2.2e-4, until=10e12),
        Phase(value=2.2e-5, until=14.3e12, shape="cosine"),
        Phase(value=2.2e-5, until=14.633e12),
        Phase(value=7.3e-6),
    ]
    batch_rows: Schedule = [
        Phase(start=3072, value=15360, until=469e9, shape="linear"),
        Phase(value=15360),
    ]
    """Rows of ``sequence_length`` tokens in one optimizer step, over all ranks."""
    bias_update_speed: Schedule = [Phase(value=0.001, until=14.3e12), Phase(value=0.0)]
    """gamma of the auxiliary-loss-free balancing."""
    mtp_weight: Schedule = [Phase(value=0.3, until=10e12), Phase(value=0.1)]
    """lambda of the multi-token prediction loss."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("learning_rate", "batch_rows", "bias_update_speed", "mtp_weight"):
            _check_schedule(name, getattr(self, name))
        return self


class OptimizerConfig(Section):
    """AdamW on FP32 masters (paper 4.2 and 3.3.3)."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    """Applied to matrices; norms and biases are left alone."""
    clip_norm: float = Field(1.0, gt=0)
    moment_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    masters: Literal["float32", "none"] = "float32"
    """Of BF16 weights; stored exactly, as the weight and the 16 bits that it lacks of FP32.
    ``none`` updates the weights in place and saves these 2 bytes a parameter. Updates below half a
    step of BF16 (1/512 to 1/256 of a weight) are then lost, so small learning rates stop learning;
    the weights in checkpoints become BF16 too."""
    micro_batch_rows: int | None = Field(None, gt=0)
    """Rows in one forward and backward pass of one rank; null takes the whole batch at once."""


class BalanceConfig(Section):
    sequence_alpha: float = Field(0.0001, ge=0)
    """Weight of the sequence-wise balance loss (paper eq. 17-20)."""


class EMAConfig(Section):
    """An average of the parameters, kept on the CPU, updated beside the training (paper 3.2.3)."""

    enabled: bool = True
    decay: float = Field(0.999, gt=0, lt=1)
    every_steps: int = Field(1, gt=0)


class EvaluationConfig(Section):
    every_steps: int = Field(1000, gt=0)
    rows: int = Field(64, gt=0)
    """Held-out rows scored each time, the same ones every time."""


class CheckpointConfig(Section):
    every_steps: int = Field(1000, gt=0)
    keep: int = Field(2, gt=0)
    """Newest checkpoints kept; older ones are removed once a newer one is whole."""


class LoggingConfig(Section):
    every_steps: int = Field(1, gt=0)
    tensorboard: bool = True
    peak_tflops: float | None = Field(None, gt=0)
    """Peak of the device, for the FLOPs utilisation (MFU); null looks the device's name up."""


Product = Literal["fp32", "bf16", "fp8"]


class PrecisionConfig(Section):
    """Types of a run (paper 3.3); those of masters and moments are the optimizer's business.

    With all three products in FP8, SwiGLU's input is kept for the backward pass in FP8 too, where
    ``moe_intermediate_size`` is a multiple of 128: the experts are then one fused operation.
    """

    working: Literal["fp32", "bf16"] = "bf16"
    """Of weights and activations."""
    fprop: Product | None = None
    """Of the forward products of all projections and experts: ``fp8``, or null for the working
    type. Embedding, head, router, norms and attention always have the working type or FP32."""
    dgrad: Product | None = None
    """Of the products that make their inputs' gradients."""
    wgrad: Product | None = None
    """Of the products that make their weights' gradients."""
    power_of_two_scales: bool = False
    """Round the FP8 scales up to powers of two, where they would be any FP32 number."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("fprop", "dgrad", "wgrad"):
            value = getattr(self, name)
            if value not in (None, "fp8", self.working):
                raise ValueError(
                    f"{name} is {value!r}; it must be 'fp8' or the working type ({self.working!r})"
                )
        if self.power_of_two_scales and not self.uses_fp8:
            raise ValueError("power_of_two_scales is set, but no product is in 'fp8'")
        return self

    @property
    def uses_fp8(self) -> bool:
        return "fp8" in (self.fprop, self.dgrad, self.wgrad)


class MemoryConfig(Section):
    recompute: Literal["none", "selective", "block"] = "none"
    """What the backward pass makes again instead of keeping: ``selective`` the norm before
    attention and MLA's projections, but on CUDA not attention itself (paper 3.2.3); ``block``
    everything but each block's input. ``whalefall config memory`` lists what is kept."""


class RuntimeConfig(Section):
    device: str = "auto"
    """``auto`` takes CUDA where there is one, else the CPU."""
    threads: int | None = Field(None, gt=0)
    """CPU threads of torch; null leaves torch's own choice."""
    deterministic: bool = False
    """The same bits from the same seed on the same device, at the price of some speed on CUDA."""
    max_minutes: float | None = Field(None, gt=0)
    """Wall-clock limit of one invocation; reaching it checkpoints and stops, as SIGTERM does."""


class TrainConfig(Section):
    """Everything a run is. The defaults are DeepSeek-V3's own recipe (paper 4.2)."""

    output: Path = Path("runs/default")
    """Folder of the run: resolved config, metrics, checkpoints."""
    seed: int = 0
    initialize_from: Path | None = None
    """Start from these weights instead of random ones: a Hugging Face folder or a checkpoint. The
    network's shape must be ``model``; its rotary scaling and context may differ (YaRN)."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    data: DataConfig = Field(default_factory=DataConfig)
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    balance: BalanceConfig = Field(default_factory=BalanceConfig)
    ema: EMAConfig = Field(default_factory=EMAConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)
    precision: PrecisionConfig = Field(default_factory=PrecisionConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)

    @model_validator(mode="after")
    def _check(self) -> Self:
        scaling = self.model.rope_scaling
        reach = self.model.max_position_embeddings
        if scaling is not None:
            reach = max(reach, int(scaling.factor * scaling.original_max_position_embeddings))
        if self.data.sequence_length > reach:
            raise ValueError(
                f"data.sequence_length ({self.data.sequence_length}) exceeds the positions the "
                f"model has ({reach}): raise model.max_position_embeddings or set rope_scaling"
            )
        return self
