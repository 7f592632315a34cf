"""Runs plans: one forward pass a step for every sequence in it, whatever each is doing.

A step is the same for all: cache the new tokens, choose the next one (or several, where drafts
turn out right), and draft the ones after it. Its tokens are in a line, those of decoding rows
first, then the chunks of prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from whalefall.config.engine import EngineConfig
from whalefall.engine.flight import Flight
from whalefall.engine.grammar import Matcher
from whalefall.engine.graphs import Graphs
from whalefall.engine.logprobs import Logprobs, prompt_logprobs
from whalefall.engine.request import Request
from whalefall.engine.sampler import Chosen, Needs, RowSettings, choose
from whalefall.engine.scheduler import Chunk, Plan
from whalefall.engine.slots import Slots
from whalefall.model.cache import CachedStep, LatentCache, Rows
from whalefall.model.inference import make_invariant
from whalefall.model.transformer import Transformer
from whalefall.ops.decode_places import Places, advance, decode_places
from whalefall.ops.sample import argmax
from whalefall.ops.transfer import sent


@dataclass(frozen=True)
class Line:
    """The tokens of a step."""

    groups: list[Rows]
    tokens: Int[Tensor, "tokens"]
    following: Int[Tensor, "tokens"]
    """The token after each; anything where that is still to be chosen."""
    rows: Int[Tensor, "rows"]
    """Slots of the sequences that get a token."""
    places: Int[Tensor, "rows width"] | None
    """Where in the line the tokens are that theirs follow; None where they are the line."""
    positions: Int[Tensor, "rows"]
    """Of the first token to choose."""
    drafts: Int[Tensor, "rows drafts"]
    verified: Int[Tensor, "rows"] | None = None
    """Drafts of each row that are real; None where all are."""
    known: Places | None = None
    """Where the tokens belong, if all of them are of decoding rows."""


class Runner:
    """A network with its cache and its slots.

    ``pages`` are those that sequences may hold; one more takes what has no place of its own.
    """

    def __init__(self, model: Transformer, config: EngineConfig, pages: int):
        if config.batch_invariant:
            make_invariant(model)
        self.model = model
        self.device = device = model.lm_head.weight.device
        self.width = 1 + config.drafts
        context = model.config.max_position_embeddings
        self.slots = Slots(config.max_running, self.width, context, pages, device)
        self.cache = LatentCache(
            model.config,
            pages + 1,
            model.rotation(torch.arange(self.slots.positions, device=device)),
            mtp=config.drafts > 0,
            dtype=model.lm_head.weight.dtype,
            fp8=config.fp8_cache,
        )
        self.settings = RowSettings(config.max_running, model.config.vocab_size, device)
        self.graphs = Graphs(self.slots) if config.cuda_graphs and device.type == "cuda" else None

    def launch(self, plan: Plan, matchers: Mapping[Request, Matcher]) -> Flight:
        """Run a plan. The results are on the device, and need not be there yet."""
        self._admit(plan)
        plan.prefills.sort(key=self._expands)  # those come last in a step
        needs = Needs.of(sequence.request.params for sequence in plan.rows)
        mask = self._mask(plan, needs, matchers)
        if plan.prefills:
            line = self._mixed(plan)
            hidden, chosen = self.step(line, needs, mask)
            return Flight(plan, chosen, self._score_prompts(plan, line, hidden))
        decoding = [sequence.slot for sequence in plan.decodes]
        return Flight(plan, self.decode(decoding, needs, mask), [])

    def decode(self, slots: list[int], needs: Needs, mask: Tensor | None = None) -> Chosen:
        """A decode step of the sequences in these slots; a CUDA graph where no mask comes along."""

        def step(on_device: Tensor, needs: Needs) -> Chosen:
            return self.step(self.decoding(on_device), needs, mask)[1]

        if self.graphs is not None and mask is None:
            return self.graphs.run(step, slots, needs)
        [on_device] = self._to_device(slots)
        return step(on_device, needs)

    def step(
        self, line: Line, needs: Needs, mask: Tensor | None = None
    ) -> tuple[Float[Tensor, "tokens hidden"], Chosen]:
        """One forward pass; the slots move on."""
        step = self.model.cached_step(self.cache, line.groups, line.known)
        hidden = self.model.decode(line.tokens, step)
        chosen = choose(
            self.model.logits(
                hidden.unflatten(0, (-1, self.width))
                if line.places is None
                else hidden[line.places]
            ),
            line.drafts,
            line.rows,
            line.positions,
            self.settings,
            needs,
            mask=mask,
            verified=line.verified,
        )
        last = advance(
            line.rows,
            self.slots.lengths,
            self.slots.tokens,
            line.positions,
            chosen.tokens,
            chosen.accepted,
        )
        if self.width > 1:
            self.slots.tokens[line.rows, 1:] = self._draft(line, step, hidden, chosen, last)
        return hidden, chosen

    def _draft(
        self,
        line: Line,
        step: CachedStep,
        hidden: Float[Tensor, "tokens hidden"],
        chosen: Chosen,
        last: Int[Tensor, "rows 1"],
    ) -> Int[Tensor, "rows drafts"]:
        """Guess what follows the chosen tokens.

        Each MTP module goes over the line, as it did in training; beyond the last, that one goes
        on with its own guesses.
        """
        wrong = torch.arange(self.width, device=self.device) > chosen.accepted.unsqueeze(1)
        following = line.following.clone()
        places = self._every_place(line) if line.places is None else line.places
        following[places] = torch.where(wrong, last, chosen.tokens)
        newest = places.gather(1, chosen.accepted.unsqueeze(1))[:, 0]
        depths = len(self.model.mtp_modules)
        drafts: list[Tensor] = []
        for draft in range(self.width - 1):
            if 0 < draft < depths:
                following = following.roll(-1)
                following[newest] = drafts[-1]
            if draft < depths:
                hidden = self.model.draft(draft, hidden, following, step)
                previous = hidden[newest]
            elif len(line.rows):
                rows = self.slots.rows(line.rows, 1, ahead=draft - depths)
                ahead = self.model.cached_step(self.cache, [rows])
                previous = self.model.draft(depths - 1, previous, drafts[-1], ahead)
            drafts.append(argmax(self.model.logits(previous)))
        return torch.stack(drafts, 1)

    def decoding(self, slots: Int[Tensor, "rows"]) -> Line:
        own = self.slots
        known = decode_places(slots, own.lengths, own.tokens, own.pages, self.cache.rotation)
        rows, line = Rows(self.width, known.lengths, known.pages), known.tokens.flatten()
        drafts = known.tokens[:, 1:]
        return Line([rows], line, line, slots, None, known.positions, drafts, known=known)

    def _every_place(self, line: Line) -> Int[Tensor, "rows width"]:
        return torch.arange(len(line.tokens), device=self.device).view(-1, self.width)

    def _mixed(self, plan: Plan) -> Line:
        """Decoding rows, then the chunks of prompts."""
        chunks = plan.prefills
        tokens: list[int] = []
        following: list[int] = []
        ends: list[int] = []
        for chunk in chunks:
            known = chunk.sequence.history(chunk.start, chunk.stop + 1)
            tokens += known[: chunk.stop - chunk.start]
            following += known[1:]
            if chunk.is_last:
                ends.append(len(tokens) - 1)
                following.append(0)
        last = [chunk for chunk in chunks if chunk.is_last]
        on_device = self._to_device(
            [sequence.slot for sequence in plan.decodes],
            [chunk.sequence.slot for chunk in chunks],
            [chunk.start for chunk in chunks],
            [chunk.sequence.slot for chunk in last],
            [chunk.stop for chunk in last],
            ends,
            tokens,
            following,
        )
        decoding, owners, starts, end_slots, stops, ends_at, line, after = on_device
        decodes = self.decoding(decoding)
        groups = list(decodes.groups) if len(decoding) else []
        pages, starts = self.slots.pages[owners], starts.int()
        for row, chunk in enumerate(chunks):
            cached = chunk.start if self._expands(chunk) else None
            own = slice(row, row + 1)
            groups.append(Rows(chunk.stop - chunk.start, starts[own], pages[own], cached))
        shift = len(decodes.tokens)
        ends_at = (ends_at + shift).unsqueeze(1).expand(-1, self.width)
        unverified = torch.zeros_like(end_slots)
        return Line(
            groups,
            torch.cat([decodes.tokens, line]),
            torch.cat([decodes.following, after]),
            torch.cat([decoding, end_slots]),
            torch.cat([self._every_place(decodes), ends_at]),
            torch.cat([decodes.positions, stops.int()]),
            torch.cat([decodes.drafts, unverified.unsqueeze(1).expand(-1, self.width - 1)]),
            torch.cat([torch.full_like(decoding, self.width - 1), unverified]),
        )

    def _expands(self, chunk: Chunk) -> bool:
        return self.model.expands(chunk.start, chunk.stop - chunk.start)

    def _admit(self, plan: Plan) -> None:
        """Write what is new in the slots: their requests, and the pages given with this step."""
        if plan.admitted:
            [slots] = self._to_device([sequence.slot for sequence in plan.admitted])
            self.slots.clear(slots)
            for sequence in plan.admitted:
                self.settings.write(sequence.slot, sequence.request)
        if plan.new_pages:
            slots, places, pages = self._to_device(*map(list, zip(*plan.new_pages, strict=True)))
            self.slots.pages[slots, places] = pages.int()

    def _mask(
        self, plan: Plan, needs: Needs, matchers: Mapping[Request, Matcher]
    ) -> Int[Tensor, "rows width words"] | None:
        """The tokens that grammars allow; reading the drafts waits for the device."""
        if not needs.mask:
            return None
        words = -(-self.model.config.vocab_size // 32)
        mask = torch.full((len(plan.rows), self.width, words), -1, dtype=torch.int32)
        for row, sequence in enumerate(plan.rows):
            matcher = matchers.get(sequence.request)
            if matcher is not None and row < len(plan.decodes):
                matcher.fill(mask[row], self.slots.tokens[sequence.slot, 1:].tolist())
            elif matcher is not None:
                matcher.fill(mask[row, :1])
        return mask.to(self.device)

    def _score_prompts(
        self, plan: Plan, line: Line, hidden: Float[Tensor, "tokens hidden"]
    ) -> list[tuple[Chunk, Logprobs]]:
        """Log-probabilities of the prompts that want them, chunk by chunk."""
        scored, start = [], len(plan.decodes) * self.width
        for chunk in plan.prefills:
            request = chunk.sequence.request
            top, begin = request.params.prompt_logprobs, start
            start += chunk.stop - chunk.start
            end = begin + min(chunk.stop, len(request.prompt) - 1) - chunk.start
            if top is not None and end > begin:
                part = slice(begin, end)
                found = prompt_logprobs(self.model.head, hidden[part], line.following[part], top)
                scored.append((chunk, found))
        return scored

    def _to_device(self, *lists: list[int]) -> tuple[Tensor, ...]:
        """The lists as one copy, which the host does not wait for."""
        host = torch.tensor([number for part in lists for number in part], dtype=torch.int64)
        return sent(host, self.device).split_with_sizes([len(part) for part in lists])
