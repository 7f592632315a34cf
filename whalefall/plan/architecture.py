"""Any decoder-only transformer in numbers: layers, what they are made of, and exact counts.

Attention is latent (MLA) or grouped: MHA, GQA and MQA are one formula. What all of it costs is the
business of ``flops``, ``memory`` and ``step``.
"""

from dataclasses import astuple, dataclass
from functools import cached_property
from math import gcd
from typing import NamedTuple


class Projection(NamedTuple):
    """A matrix product with weights: ``inputs`` numbers of a token become ``outputs``."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs + self.outputs * self.bias

    @property
    def flops(self) -> int:
        """Of the forward product of one token; each of the two backward products costs the same."""
        return 2 * self.inputs * self.outputs


class Matrices(NamedTuple):
    """Projections of one part of a layer."""

    projections: list[Projection]
    held: int = 1
    """How often the layer has them: once, or for each routed expert."""
    met: int = 1
    """How many of these a token meets."""

    @property
    def size(self) -> int:
        """Parameters of one of them."""
        return sum(it.parameters for it in self.projections)


@dataclass(frozen=True)
class LatentAttention:
    """MLA: keys and values of all heads are expanded from one latent ([A] equations 1 to 11)."""

    heads: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    q_rank: int | None = None
    """Width of the compressed query; None projects it directly."""
    bias: bool = False

    @property
    def qk_width(self) -> int:
        return self.heads * (self.nope + self.rope)

    @property
    def kv_width(self) -> int:
        """Of the expanded keys without position and values."""
        return self.heads * (self.nope + self.value)

    @property
    def v_width(self) -> int:
        return self.heads * self.value

    @property
    def kv_numbers(self) -> int:
        """Cached a token: the latent and the rotating key that all heads share."""
        return self.kv_rank + self.rope

    @property
    def norm_parameters(self) -> int:
        return self.kv_rank + (self.q_rank or 0)

    def projections(self, hidden: int) -> list[Projection]:
        query = [Projection("q_proj", hidden, self.qk_width)]
        if self.q_rank is not None:
            query = [
                Projection("q_a_proj", hidden, self.q_rank, self.bias),
                Projection("q_b_proj", self.q_rank, self.qk_width),
            ]
        return [
            *query,
            Projection("kv_a_proj_with_mqa", hidden, self.kv_numbers, self.bias),
            Projection("kv_b_proj", self.kv_rank, self.kv_width),
            Projection("o_proj", self.v_width, hidden, self.bias),
        ]


@dataclass(frozen=True)
class GroupedAttention:
    """Query heads that share key-value heads: MHA (as many), GQA (fewer), MQA (one)."""

    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    """RMSNorm of every query and key head (Qwen3)."""

    @property
    def qk_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def v_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return 2 * self.kv_heads * self.head_dim

    @property
    def kv_numbers(self) -> int:
        """Cached a token."""
        return self.kv_width

    @property
    def norm_parameters(self) -> int:
        return 2 * self.head_dim * self.qk_norm

    def projections(self, hidden: int) -> list[Projection]:
        return [
            Projection("q_proj", hidden, self.qk_width, self.qkv_bias),
            Projection("kv_proj", hidden, self.kv_width, self.qkv_bias),
            Projection("o_proj", self.v_width, hidden, self.output_bias),
        ]


Attention = LatentAttention | GroupedAttention


@dataclass(frozen=True)
class Dense:
    """A SwiGLU that every token meets."""

    intermediate: int

    def matrices(self, hidden: int) -> dict[str, Matrices]:
        return {"dense": Matrices(_swiglu(hidden, self.intermediate))}


@dataclass(frozen=True)
class Experts:
    """Routed and shared SwiGLUs of one width ([A] 2.1.2)."""

    routed: int
    top_k: int
    shared: int
    intermediate: int
    groups: int = 1
    top_groups: int = 1
    """A token's experts are in at most so many of the ``groups`` (one group a node in V3)."""

    def matrices(self, hidden: int) -> dict[str, Matrices]:
        """The shared experts are one SwiGLU."""
        shared = _swiglu(hidden, self.shared * self.intermediate) if self.shared else []
        expert = _swiglu(hidden, self.intermediate)
        return {
            "shared_experts": Matrices(shared),
            "routed_experts": Matrices(expert, self.routed, self.top_k),
            "gates": Matrices([Projection("gate", hidden, self.routed)]),
        }


def _swiglu(hidden: int, intermediate: int) -> list[Projection]:
    return [
        Projection("gate_up_proj", hidden, 2 * intermediate),
        Projection("down_proj", intermediate, hidden),
    ]


@dataclass(frozen=True)
class Layer:
    """Norm, attention, norm, feed-forward."""

    attention: Attention
    feed_forward: Dense | Experts

    def matrices(self, hidden: int) -> dict[str, Matrices]:
        """By part, named as in ``Parameters``."""
        attention = Matrices(self.attention.projections(hidden))
        return {"attention": attention, **self.feed_forward.matrices(hidden)}

    def parameters(self, hidden: int) -> dict[str, int]:
        """Counts by part."""
        counts = {part: it.held * it.size for part, it in self.matrices(hidden).items()}
        return counts | {"norms": 2 * hidden + self.attention.norm_parameters}


class Run(NamedTuple):
    """So many equal layers in a row."""

    layer: Layer
    length: int


@dataclass(frozen=True)
class Parameters:
    """Counts by part; ``total`` and ``active`` leave the MTP modules out, as papers do."""

    embedding: int
    head: int
    """0 where it is the embedding."""
    attention: int
    dense: int
    """Feed-forward of the dense layers."""
    shared_experts: int
    routed_experts: int
    gates: int
    norms: int
    mtp: int
    """The MTP modules' own, all experts counted; embedding and head are shared."""
    active_routed: int
    """What a token meets of ``routed_experts``."""

    @property
    def total(self) -> int:
        return sum(astuple(self)) - self.mtp - self.active_routed

    @property
    def active(self) -> int:
        return self.total - self.routed_experts + self.active_routed

    @property
    def active_without_embedding(self) -> int:
        """What multiplies: a tied embedding works as the head."""
        return self.active - (self.embedding if self.head else 0)


@dataclass(frozen=True)
class Architecture:
    name: str
    vocab: int
    hidden: int
    runs: tuple[Run, ...]
    tied: bool = False
    """The head is the embedding."""
    mtp_depth: int = 0
    """Modules of multi-token prediction, each a layer like the last one ([A] 2.2)."""

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer of the main model, in order."""
        return tuple(run.layer for run in self.runs for _ in range(run.length))

    @cached_property
    def experts(self) -> list[Experts]:
        """Of each layer that has any."""
        halves = (layer.feed_forward for layer in self.layers)
        return [half for half in halves if isinstance(half, Experts)]

    @cached_property
    def routed_experts(self) -> int:
        """Of each layer that has any; what divides all where layers differ. 0 without experts."""
        return gcd(*(it.routed for it in self.experts))

    @property
    def mtp_layer(self) -> Layer:
        return self.runs[-1].layer

    @property
    def mtp_projection(self) -> Projection:
        """Joins a representation and an embedding ([A] equation 21)."""
        return Projection("eh_proj", 2 * self.hidden, self.hidden)

    @property
    def head(self) -> Projection:
        return Projection("lm_head", self.hidden, self.vocab)

    def parameters(self) -> Parameters:
        """Exact counts; the routers' biases are no parameters (nothing differentiates them)."""
        embedding, hidden = self.vocab * self.hidden, self.hidden
        parts = ("attention", "dense", "shared_experts", "routed_experts", "gates", "norms")
        sums = {
            part: sum(run.length * run.layer.parameters(hidden).get(part, 0) for run in self.runs)
            for part in parts
        }
        sums["norms"] += hidden
        module = sum(self.mtp_layer.parameters(hidden).values())
        module += self.mtp_projection.parameters + 3 * hidden
        every = (it.matrices(hidden)["routed_experts"] for it in self.experts)
        return Parameters(
            embedding=embedding,
            head=0 if self.tied else embedding,
            **sums,
            mtp=self.mtp_depth * module,
            active_routed=sum(it.met * it.size for it in every),
        )
