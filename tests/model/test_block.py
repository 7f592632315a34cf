"""The five stages: in order, interleaved, and with experts that live elsewhere."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.model.attention import Context
from whalefall.model.block import Block
from whalefall.model.dispatch import Dispatched, Dispatcher, LocalDispatcher
from whalefall.model.feed_forward import MoE
from whalefall.model.router import Routing
from whalefall.ops.rms_norm import add_up
from whalefall.ops.rope import inverse_frequencies, rotations

BATCH, SEQ = 2, 5


def make_block(config: ModelConfig, layer: int, dispatcher: Dispatcher) -> Block:
    block = Block(config, layer, dispatcher).double()
    generator = torch.Generator().manual_seed(layer)
    for parameter in block.parameters():
        mean = 1.0 if parameter.ndim == 1 else 0.0
        parameter.data.normal_(mean=mean, std=0.2, generator=generator)
    return block


def random_input(config: ModelConfig, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (BATCH, SEQ, config.hidden_size)
    return torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()


def context(config: ModelConfig) -> Context:
    frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta)
    return Context(rotations(torch.arange(SEQ).unsqueeze(0), frequencies))


def through(block: Block, x: Tensor, around: Context) -> tuple[Tensor, Routing | None]:
    """The block's output added up, and its routing."""
    stream, routing = block((x,), around)
    return add_up(*stream), routing


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    gated = gate @ x
    return down @ (gated * torch.sigmoid(gated) * (up @ x))


def test_a_dense_block_by_hand(tiny_config: ModelConfig) -> None:
    """x + attention(norm(x)), then x + SwiGLU(norm(x))."""
    block = make_block(tiny_config, 0, LocalDispatcher())
    x, around = random_input(tiny_config, 0), context(tiny_config)
    out, routing = through(block, x, around)
    assert routing is None
    residual = x + block.self_attn(block.input_layernorm(x), around)
    mlp = block.mlp
    for b in range(BATCH):
        for t in range(SEQ):
            normed = block.post_attention_layernorm(residual[b, t])
            weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            expected = residual[b, t] + swiglu(normed, *weights)
            torch.testing.assert_close(out[b, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_an_expert_block_by_hand(tiny_config: ModelConfig, shared: int) -> None:
    """Equation 12: x + shared(u) + sum of weight_e expert_e(u), token by token."""
    config = tiny_config.model_copy(update={"n_shared_experts": shared})
    block = make_block(config, 1, LocalDispatcher())
    x, around, width = random_input(config, 0), context(config), config.moe_intermediate_size
    out, routing = through(block, x, around)
    residual = x + block.self_attn(block.input_layernorm(x), around)
    experts = block.mlp.experts
    for token in range(BATCH * SEQ):
        b, t = divmod(token, SEQ)
        normed = block.post_attention_layernorm(residual[b, t])
        expected = residual[b, t]
        for e, weight in zip(routing.experts[token], routing.weights[token], strict=True):
            gate, up = experts.gate_up_proj[e][:width], experts.gate_up_proj[e][width:]
            expected = expected + weight * swiglu(normed, gate, up, experts.down_proj[e])
        if shared:
            mlp = block.mlp.shared_experts
            assert mlp.up_proj.weight.shape == (shared * width, config.hidden_size)
            weights = (mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
            expected = expected + swiglu(normed, *weights)
        torch.testing.assert_close(out[b, t], expected, rtol=1e-4, atol=1e-5)


def test_the_five_stages_are_the_forward(tiny_config: ModelConfig) -> None:
    for layer in (0, 1):
        block = make_block(tiny_config, layer, LocalDispatcher())
        x, around = random_input(tiny_config, 0), context(tiny_config)
        attended = block.attend((x,), around)
        dispatched = block.dispatch(attended)
        computed = block.experts(attended, dispatched)
        combined = block.combine(attended, dispatched, computed)
        stream = block.merge(attended, computed, combined)
        assert torch.equal(add_up(*stream), through(block, x, around)[0])


def interleaved(
    blocks: list[Block], a: Tensor, b: Tensor, around: Context
) -> tuple[Tensor, Tensor]:
    """Two micro-batches, each one's dispatch and combine beside the other's arithmetic."""
    stream_a, stream_b = (a,), (b,)
    for block in blocks:
        attended_a = block.attend(stream_a, around)
        dispatched_a = block.dispatch(attended_a)
        attended_b = block.attend(stream_b, around)
        computed_a = block.experts(attended_a, dispatched_a)
        dispatched_b = block.dispatch(attended_b)
        combined_a = block.combine(attended_a, dispatched_a, computed_a)
        computed_b = block.experts(attended_b, dispatched_b)
        stream_a = block.merge(attended_a, computed_a, combined_a)
        combined_b = block.combine(attended_b, dispatched_b, computed_b)
        stream_b = block.merge(attended_b, computed_b, combined_b)
    return add_up(*stream_a), add_up(*stream_b)


def one_after_the_other(
    blocks: list[Block], a: Tensor, b: Tensor, around: Context
) -> tuple[Tensor, Tensor]:
    for block in blocks:
        a = through(block, a, around)[0]
    for block in blocks:
        b = through(block, b, around)[0]
    return a, b


Schedule = Callable[[list[Block], Tensor, Tensor, Context], tuple[Tensor, Tensor]]


def test_interleaved_micro_batches_are_two_plain_forwards(tiny_config: ModelConfig) -> None:
    blocks = [make_block(tiny_config, layer, LocalDispatcher()) for layer in range(3)]
    inputs = (random_input(tiny_config, 0), random_input(tiny_config, 1))
    outer = [random_input(tiny_config, seed).detach() for seed in (2, 3)]
    parameters = [*inputs, *nn.ModuleList(blocks).parameters()]

    def run(schedule: Schedule) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
        outputs = schedule(blocks, *inputs, context(tiny_config))
        return outputs, torch.autograd.grad(outputs, parameters, outer)

    outputs, gradients = run(interleaved)
    expected, expected_gradients = run(one_after_the_other)
    for own, right in zip(outputs, expected, strict=True):
        assert torch.equal(own, right)
    for own, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-5, atol=1e-6)


class BackwardsDispatcher(LocalDispatcher):
    """Within each expert, tokens come last first."""

    def dispatch(self, x: Tensor, routing: Routing) -> Dispatched:
        pairs, top_k = routing.experts.numel(), routing.experts.shape[1]
        key = routing.experts.flatten() * pairs + torch.arange(pairs).flip(0)
        order = key.argsort()
        places, weights = order.argsort().view(-1, top_k), routing.weights.flatten()[order]
        ends = routing.loads.cumsum(0).to(torch.int32)
        return Dispatched(x, places, order // top_k, weights, ends)


def test_the_order_of_an_experts_tokens_does_not_matter(tiny_config: ModelConfig) -> None:
    x, around = random_input(tiny_config, 0), context(tiny_config)
    results = []
    for dispatcher in (LocalDispatcher(), BackwardsDispatcher()):
        block = make_block(tiny_config, 1, dispatcher)
        out = through(block, x, around)[0]
        results.append((out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])))
    for own, right in zip(*results, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)


class Exchange:
    """What two ranks, here two threads, hand to each other."""

    def __init__(self) -> None:
        self.boxes: dict[tuple[int, int], tuple[Tensor, ...]] = {}
        self.barrier = threading.Barrier(2, timeout=30)

    def all_to_all(self, rank: int, parcels: list[tuple[Tensor, ...]]) -> list[tuple[Tensor, ...]]:
        for receiver, parcel in enumerate(parcels):
            self.boxes[rank, receiver] = parcel
        self.barrier.wait()
        received = [self.boxes[sender, rank] for sender in range(2)]
        self.barrier.wait()
        return received


@dataclass(frozen=True)
class Sent(Dispatched):
    tokens: list[Tensor]
    """The own tokens that went to each rank."""
    counts: list[int]
    """Tokens that came from each rank."""


class TwoRankDispatcher:
    """Rank r holds half r of the experts; a token travels once to each rank that has any of its
    choices, with all of them and their weights, and the sum of those that are there travels back.
    """

    def __init__(self, exchange: Exchange, rank: int, experts: int):
        self.exchange, self.rank, self.local = exchange, rank, experts // 2

    def dispatch(self, x: Tensor, routing: Routing) -> Sent:
        owners, top_k = routing.experts // self.local, routing.experts.shape[1]
        tokens = [(owners == rank).any(1).nonzero().flatten() for rank in range(2)]
        parcels = [(x[mine], routing.experts[mine], routing.weights[mine]) for mine in tokens]
        received = self.exchange.all_to_all(self.rank, parcels)
        x, experts, weights = (torch.cat(parts) for parts in zip(*received, strict=True))
        experts = experts.flatten()
        here = (experts // self.local == self.rank).nonzero().flatten()
        order = here[experts[here].argsort(stable=True)]
        places = torch.full_like(experts, -1).index_put((order,), torch.arange(len(order)))
        loads = torch.bincount(experts[here] % self.local, minlength=self.local)
        return Sent(
            x,
            places.view(-1, top_k),
            order // top_k,
            weights.flatten()[order],
            loads.cumsum(0).to(torch.int32),
            tokens,
            [len(tokens) for tokens, _, _ in received],
        )

    def combine(self, summed: Tensor, dispatched: Sent, routing: Routing) -> Tensor:
        parcels = [(parcel,) for parcel in summed.split(dispatched.counts)]
        received = self.exchange.all_to_all(self.rank, parcels)
        out = summed.new_zeros(len(routing.weights), summed.shape[1])
        parts = torch.cat([part for (part,) in received])
        return out.index_add(0, torch.cat(dispatched.tokens), parts)


def test_experts_split_over_two_ranks(tiny_config: ModelConfig) -> None:
    """Each rank has its own tokens and half of the experts; the block is the same block."""
    experts, around = tiny_config.n_routed_experts, context(tiny_config)
    whole = make_block(tiny_config, 1, LocalDispatcher())
    whole.mlp.gate.e_score_correction_bias[: experts // 2] += 0.3  # more for rank 0 than for 1
    inputs = [random_input(tiny_config, seed) for seed in range(2)]
    outer = [random_input(tiny_config, seed).detach() for seed in (2, 3)]
    expected = [through(whole, x, around)[0] for x in inputs]
    torch.autograd.backward(expected, outer)
    expected_inputs = [x.grad for x in inputs]

    exchange, ranks = Exchange(), []
    for rank in range(2):
        block = deepcopy(whole)
        block.zero_grad()
        block.dispatcher = TwoRankDispatcher(exchange, rank, experts)
        assert isinstance(block.mlp, MoE)
        for name, parameter in block.mlp.experts.named_parameters():
            setattr(block.mlp.experts, name, nn.Parameter(parameter.data.chunk(2)[rank].clone()))
        ranks.append(block)
    copies = [x.detach().clone().requires_grad_() for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda block, x: through(block, x, around)[0], ranks, copies))
    torch.autograd.backward(outputs, outer)

    for own, right in zip(outputs, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-4, atol=1e-5)
    for copy, grad in zip(copies, expected_inputs, strict=True):
        torch.testing.assert_close(copy.grad, grad, rtol=1e-4, atol=1e-5)
    for name, parameter in whole.named_parameters():
        parts = [block.get_parameter(name).grad for block in ranks]
        total = torch.cat(parts) if "mlp.experts." in name else parts[0] + parts[1]
        torch.testing.assert_close(total, parameter.grad, rtol=1e-4, atol=1e-5)
