"""Published claims, what we find, and the verdicts that follow from the two.

``data/claims.yaml`` is the list, and says what of a command's answer or of a measurement's result
our figure is; ``findings`` works out those that are nowhere printed as such.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import inf, isclose
from pathlib import Path
from typing import Self

import yaml
from pydantic import Field, model_validator

import whalefall
from whalefall.config.model import Section
from whalefall.errors import UserError
from whalefall.plan.files import DATA
from whalefall.plan.findings import COMPUTED, MEASURED, Value, answer_to, follow
from whalefall.plan.report import Report, report

RESULTS = Path(whalefall.__file__).parents[1] / "benchmarks" / "results"
"""Of a checkout; an installed package has no results of measurements."""
COMMAND = "whalefall claims --markdown docs/claims.md"


class Claim(Section):
    """A claim, and how it is looked into: by exactly one of ``how``, ``measured``, ``test`` and
    ``needs``."""

    id: str
    says: str
    source: str
    published: float | str | tuple[float | None, float | None]
    """A number, words, or a range whose ends may be open."""
    form: str = "{:,g}"
    """How a number was printed; of what a path leads to that is no number, how it is told."""
    finer: str | None = None
    """How ours is printed where it has more digits."""
    within: float | None = Field(None, gt=0)
    """Relative; unless told, ours must read the same when it is printed alike."""
    how: str | None = None
    """Arithmetic on published inputs: the command that shows it, or where it is."""
    measured: str | None = None
    """A file in ``benchmarks/results``."""
    test: str | None = None
    needs: str | None = None
    """What it would take."""
    reads: str | None = None
    """The path to our figure in the command's numbers or in the file."""
    unit: float = 1
    """What our figure is told in."""
    ours: str | None = None
    """Our figure, where it is words."""
    in_small: bool = False
    """Whether we look into less than the claim is about, or on another machine."""
    remark: str = ""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len([it for it in (self.how, self.measured, self.test, self.needs) if it]) != 1:
            raise ValueError(f"{self.id} needs exactly one of how, measured, test and needs")
        return self

    @property
    def as_published(self) -> str:
        match self.published:
            case (None, float(high)):
                return f"at most {self.form.format(high)}"
            case (float(low), None):
                return f"at least {self.form.format(low)}"
            case (low, high):
                return f"{self.form.format(low)} to {self.form.format(high)}"
            case str(words):
                return words
            case number:
                return self.form.format(number)

    def write(self, ours: Value) -> str:
        return ours if isinstance(ours, str) else (self.finer or self.form).format(ours)

    def agrees(self, ours: Value) -> bool:
        published = self.published
        if isinstance(published, str) or isinstance(ours, str):
            return ours == published
        if isinstance(published, tuple):
            low, high = published
            return (-inf if low is None else low) <= ours <= (inf if high is None else high)
        if self.within is not None:
            return isclose(ours, published, rel_tol=self.within)
        return self.form.format(ours) == self.as_published


class Topic(Section):
    """Claims that are read together."""

    title: str
    note: str = ""
    claims: list[Claim]


class Verdict(StrEnum):
    REPRODUCED = "reproduced"
    IN_SMALL = "reproduced in small"
    COMPUTED = "computed"
    CONTRADICTED = "contradicted"
    UNTESTABLE = "not testable here"


@dataclass(frozen=True)
class Checked:
    """A claim with what we find; "" where that is nothing."""

    claim: Claim
    ours: str
    how: str
    verdict: Verdict


def topics() -> Iterator[Topic]:
    """All claims. What a topic says of ``source``, ``how`` and the like holds for its claims."""
    for topic in yaml.safe_load((DATA / "claims.yaml").read_text("utf-8")):
        own = {name: topic.pop(name) for name in ("title", "note", "claims") if name in topic}
        yield Topic.model_validate(own | {"claims": [topic | it for it in own["claims"]]})


def check(claim: Claim, results: Path = RESULTS) -> Checked:
    """
    Args:
        results: the folder of measured results; claims on those that are missing are not testable.

    Raises:
        UserError: a result does not hold what the claim reads.
    """
    if claim.needs is not None:
        return Checked(claim, "", f"needs {claim.needs}", Verdict.UNTESTABLE)
    if claim.test is not None:  # which passes, or the suite would not
        return Checked(claim, claim.as_published, claim.test, _looked_into(claim, True))
    if claim.how is not None:
        ours = _computed(claim)
        verdict = Verdict.COMPUTED if claim.agrees(ours) else Verdict.CONTRADICTED
        return Checked(claim, claim.write(ours), claim.how, verdict)
    how = f"benchmarks/results/{claim.measured}"
    file = results / str(claim.measured)
    if not file.is_file():
        return Checked(claim, "", f"{how} is missing", Verdict.UNTESTABLE)
    ours = _measured(claim, file)
    return Checked(claim, claim.write(ours), how, _looked_into(claim, claim.agrees(ours)))


def _computed(claim: Claim) -> Value:
    if claim.ours is not None:
        return claim.ours
    if claim.reads is None:
        return COMPUTED[claim.id]()
    found = follow(answer_to(str(claim.how)), claim.reads)
    return claim.form.format(**found) if isinstance(found, dict) else found / claim.unit


def _measured(claim: Claim, file: Path) -> Value:
    try:
        result = json.loads(file.read_text())
        return follow(result, claim.reads) if claim.reads else MEASURED[claim.id](result)
    except (ValueError, LookupError, TypeError, StopIteration) as error:
        raise UserError(f"{file} does not hold what {claim.id} reads: {error!r}") from None


def _looked_into(claim: Claim, agrees: bool) -> Verdict:
    """A small experiment can support a claim about a large one, and cannot refute it."""
    if claim.in_small:
        return Verdict.IN_SMALL if agrees else Verdict.UNTESTABLE
    return Verdict.REPRODUCED if agrees else Verdict.CONTRADICTED


def claims_report() -> Report:
    """Every claim checked, against the results of measurements that are there."""
    checked = [(topic, [check(it, RESULTS) for it in topic.claims]) for topic in topics()]
    everything = [it for _, found in checked for it in found]
    counts = Counter(it.verdict for it in everything)
    numbers = {"claims": everything}
    return report("claims", numbers, checked=checked, counts=counts, command=COMMAND)
