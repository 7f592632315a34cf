"""What every rank of a pipeline does in a training step, as data.

The network is cut into stages. Every micro-batch goes forward through all of them in order and
backward in reverse; a schedule says in which order each rank does its share: a list of steps per
rank, which a pipeline executes as it stands, a simulator times (``plan/schedules.py``) and a
picture shows (``plan/schedule_drawing.py``). ``build_schedule.py`` writes the lists.

To execute a list, take its steps in order. Before a pass, receive what its ``source`` makes;
after it, send to its ``target`` without waiting (neither where that is the rank itself). ``check``
proves that no rank then waits forever, and that activations and gradients each reach a rank in the
order in which it uses them: for each, one first-in-first-out channel from rank to rank is enough.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple


class ScheduleKind(StrEnum):
    ONE_F_ONE_B = "1f1b"
    ZB1P = "zb1p"
    ZB_V = "zb-v"
    DUALPIPE = "dualpipe"
    DUALPIPE_V = "dualpipev"


class Work(StrEnum):
    """What a pass does. A whole backward makes both gradients."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT_GRADIENT = "I"
    WEIGHT_GRADIENT = "W"


class Pass(NamedTuple):
    """One micro-batch through one chunk: the stages of a rank are its chunks 0, 1, ..."""

    work: Work
    chunk: int
    micro_batch: int


Step = tuple[Pass, ...]
"""One pass, or two that run overlapped (F&B): a forward, then another micro-batch's backward."""


class Place(NamedTuple):
    """Where a stage is."""

    rank: int
    chunk: int


Route = tuple[Place, ...]
"""The places of all stages, in order."""


class Result(NamedTuple):
    """What a pass makes: activations (F) or a gradient (I, W) of a micro-batch at a stage."""

    work: Work
    micro_batch: int
    stage: int


class Turn(NamedTuple):
    """A step of a rank with what must exist before it and what it makes."""

    rank: int
    step: Step
    needs: list[Result]
    makes: list[Result]


@dataclass(frozen=True)
class Schedule:
    """The steps of every rank, and where the stages are."""

    kind: ScheduleKind
    micro_batches: int
    routes: tuple[Route, ...]
    """One way through all stages, or two: DualPipe keeps every stage twice, and half of the
    micro-batches (the first ones) go from rank 0 to the last, the others from the last to 0."""
    steps: tuple[tuple[Step, ...], ...]
    """The list of each rank."""

    @property
    def ranks(self) -> int:
        return len(self.steps)

    @property
    def stages(self) -> int:
        return len(self.routes[0])

    @cached_property
    def stage_at(self) -> dict[Place, int]:
        return {place: stage for route in self.routes for stage, place in enumerate(route)}

    def route(self, micro_batch: int) -> Route:
        return self.routes[micro_batch * len(self.routes) // self.micro_batches]

    def source(self, rank: int, what: Pass) -> Place | None:
        """Where the activations or gradient come from that a pass starts from.

        None for the first stage's forward (data), the last stage's backward (the loss) and weight
        gradients.
        """
        return self._along(rank, what, -1)

    def target(self, rank: int, what: Pass) -> Place | None:
        """Where the activations or gradient go that a pass makes; None where nobody waits."""
        return self._along(rank, what, 1)

    def _along(self, rank: int, what: Pass, hop: int) -> Place | None:
        if what.work is Work.WEIGHT_GRADIENT:
            return None
        stage = self.stage_at[Place(rank, what.chunk)]
        stage += hop if what.work is Work.FORWARD else -hop
        return self.route(what.micro_batch)[stage] if 0 <= stage < self.stages else None

    def needs(self, rank: int, what: Pass) -> list[Result]:
        """What must exist before a pass can start."""
        stage = self.stage_at[Place(rank, what.chunk)]
        if what.work is Work.WEIGHT_GRADIENT:
            return [Result(Work.INPUT_GRADIENT, what.micro_batch, stage)]
        needs = []
        if what.work is not Work.FORWARD:
            needs.append(Result(Work.FORWARD, what.micro_batch, stage))
        if (source := self.source(rank, what)) is not None:
            crossing = Work.FORWARD if what.work is Work.FORWARD else Work.INPUT_GRADIENT
            needs.append(Result(crossing, what.micro_batch, self.stage_at[source]))
        return needs

    def makes(self, rank: int, what: Pass) -> list[Result]:
        """What a pass makes."""
        stage = self.stage_at[Place(rank, what.chunk)]
        works = (
            (Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT)
            if what.work is Work.BACKWARD
            else (what.work,)
        )
        return [Result(work, what.micro_batch, stage) for work in works]

    @cached_property
    def order(self) -> tuple[Turn, ...]:
        """All steps, each after what it needs and in its rank's order.

        Raises:
            ValueError: the ranks wait for each other forever.
        """
        waiting = [deque(self._turns(rank)) for rank in range(self.ranks)]
        made: set[Result] = set()
        order: list[Turn] = []
        while any(waiting):
            before = len(order)
            for turns in waiting:
                while turns and made.issuperset(turns[0].needs):
                    order.append(turns.popleft())
                    made.update(order[-1].makes)
            if len(order) == before:
                stuck = next(turns[0] for turns in waiting if turns)
                raise ValueError(f"rank {stuck.rank} waits forever to do {stuck.step}")
        return tuple(order)

    def _turns(self, rank: int) -> Iterator[Turn]:
        for step in self.steps[rank]:
            needs = [need for what in step for need in self.needs(rank, what)]
            makes = [result for what in step for result in self.makes(rank, what)]
            yield Turn(rank, step, needs, makes)


def check(schedule: Schedule) -> None:
    """Prove that a schedule trains every micro-batch on every stage once and that ranks can run it.

    Raises:
        ValueError: a step is neither one pass nor F&B; a pass is off its micro-batch's route,
            missing or repeated; ranks wait for each other forever; or a channel delivers in
            another order than its receiver needs.
    """
    _check_steps(schedule)
    made = Counter(result for turn in schedule.order for result in turn.makes)
    for work in (Work.FORWARD, Work.INPUT_GRADIENT, Work.WEIGHT_GRADIENT):
        for micro_batch in range(schedule.micro_batches):
            for stage in range(schedule.stages):
                count = made[Result(work, micro_batch, stage)]
                if count != 1:
                    raise ValueError(f"{work}{micro_batch} of stage {stage} is made {count} times")
    _check_channels(schedule)


def _check_steps(schedule: Schedule) -> None:
    for rank, steps in enumerate(schedule.steps):
        for step in steps:
            if len(step) != 1 and [what.work for what in step] != [Work.FORWARD, Work.BACKWARD]:
                raise ValueError(f"rank {rank} has a step of neither one pass nor F&B: {step}")
            for what in step:
                exists = 0 <= what.micro_batch < schedule.micro_batches
                if not exists or (rank, what.chunk) not in schedule.route(what.micro_batch):
                    raise ValueError(f"rank {rank} is off the route of {what}")


def _check_channels(schedule: Schedule) -> None:
    """First in, first out: what a rank sends to another is in the order in which it is used."""
    sent, used = defaultdict(list), defaultdict(list)
    for rank, steps in enumerate(schedule.steps):
        for what in (what for step in steps for what in step):
            forward = what.work is Work.FORWARD
            here, place = Place(rank, what.chunk), schedule.target(rank, what)
            if place is not None and place.rank != rank:
                sent[rank, place.rank, forward].append((what.micro_batch, here, place))
            place = schedule.source(rank, what)
            if place is not None and place.rank != rank:
                used[place.rank, rank, forward].append((what.micro_batch, place, here))
    for channel, messages in sent.items():
        if messages != used[channel]:
            raise ValueError("rank {} sends to rank {} in another order than used".format(*channel))


def peak_activations(schedule: Schedule) -> tuple[int, ...]:
    """Most micro-batches per rank whose activations are kept at once, counted for each chunk.

    One is the activations of one micro-batch in one stage. They live from the forward pass until
    the weight gradient, which reads them too.
    """
    return _peaks(schedule, {Work.FORWARD}, {Work.BACKWARD, Work.WEIGHT_GRADIENT})


def peak_deferred(schedule: Schedule) -> tuple[int, ...]:
    """Most weight gradients per rank that are put off at once, each with its output's gradient."""
    return _peaks(schedule, {Work.INPUT_GRADIENT}, {Work.WEIGHT_GRADIENT})


def _peaks(schedule: Schedule, begins: set[Work], ends: set[Work]) -> tuple[int, ...]:
    peaks = []
    for steps in schedule.steps:
        live = peak = 0
        for step in steps:
            live += sum(what.work in begins for what in step)
            peak = max(peak, live)
            live -= sum(what.work in ends for what in step)
        peaks.append(peak)
    return tuple(peaks)
