"""What a run's folder says: steps and evaluations, and samples of the model's writing."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, TypeAdapter, ValidationError

from whalefall.errors import UserError


class Step(BaseModel):
    """A training step, one line of ``metrics.jsonl``; losses are in nats a token."""

    step: int
    tokens: int
    loss: float
    main: float
    mtp: list[float]
    balance: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    max_violation: list[float]
    expert_load: list[list[float]]
    """Each expert's share of the tokens, per layer with experts, the MTP modules' last."""


class Evaluation(BaseModel):
    """Held-out text scored after a step."""

    step: int
    heldout_bits_per_byte: float
    ema_heldout_bits_per_byte: float | None = None
    """The same under the moving average of the parameters."""


class Sample(BaseModel):
    """What the model wrote after ``prompt``; given a ``suffix``, between the two."""

    title: str
    prompt: str
    completion: str
    suffix: str = ""


_SAMPLES = TypeAdapter(list[Sample])


def save_samples(run_folder: Path, samples: Sequence[Sample]) -> None:
    """Keep samples with the run, in place of earlier ones; its reports show them."""
    _samples_file(run_folder).write_bytes(_SAMPLES.dump_json(list(samples), indent=2))


def load_samples(run_folder: Path) -> list[Sample]:
    """The samples kept with a run; none if there are none."""
    file = _samples_file(run_folder)
    if not file.exists():
        return []
    try:
        return _SAMPLES.validate_json(file.read_bytes())
    except ValidationError as error:
        raise UserError(f"{file} is damaged: {_first_problem(error)}") from None


def load_metrics(file: Path) -> tuple[list[Step], list[Evaluation]]:
    """The records of a ``metrics.jsonl``, in its order.

    A last line without its newline is still being written, and is left out.

    Raises:
        UserError: the file is missing, has no step, or has a line that is neither kind of record.
    """
    if not file.is_file():
        raise UserError(f"{file} is missing: the run has not taken its first step")
    steps: list[Step] = []
    evaluations: list[Evaluation] = []
    *lines, _ = file.read_text().split("\n")
    for number, line in enumerate(lines, start=1):
        try:
            if "heldout_bits_per_byte" in line:
                evaluations.append(Evaluation.model_validate_json(line))
            else:
                steps.append(Step.model_validate_json(line))
        except ValidationError as error:
            raise UserError(f"{file}, line {number}: {_first_problem(error)}") from None
    if not steps:
        raise UserError(f"{file} has no step yet")
    return steps, evaluations


def _samples_file(run_folder: Path) -> Path:
    return run_folder / "samples.json"


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    return f"{where}: {problem['msg']}" if where else problem["msg"]
