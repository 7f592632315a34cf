"""DeepSeek-V3: embedding, blocks, norm, head, and the MTP modules behind them.

The attribute tree spells Hugging Face's parameter names (``model.layers.3.self_attn.o_proj``);
only the routed experts are stacked, see ``model/checkpoint.py``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from whalefall.config.model import ModelConfig
from whalefall.errors import UserError
from whalefall.model.attention import Context, expansion_is_cheaper
from whalefall.model.block import Block, Stream
from whalefall.model.cache import CachedStep, LatentCache, Rows
from whalefall.model.dispatch import Dispatcher, LocalDispatcher
from whalefall.model.feed_forward import Experts
from whalefall.model.invariance import Invariance
from whalefall.model.linear import Linear
from whalefall.model.mtp import MTPModule
from whalefall.model.norm import RMSNorm
from whalefall.model.recompute import Recompute
from whalefall.model.router import Router, Routing
from whalefall.ops.decode_places import Places
from whalefall.ops.fp8_linear import Recipe
from whalefall.ops.gemm import FP8_ALIGNMENT
from whalefall.ops.linear import linear
from whalefall.ops.rope import inverse_frequencies, rotations, yarn_frequencies, yarn_mscale


@dataclass(frozen=True)
class HiddenStates:
    """What the head reads: the main model's representation and each MTP depth's."""

    main: Float[Tensor, "batch seq hidden"]
    mtp: list[Float[Tensor, "batch _ hidden"]]
    routings: list[Routing]
    """One a layer with experts, the MTP modules' last."""


@dataclass(frozen=True)
class Output:
    logits: Float[Tensor, "batch seq vocab"]
    mtp_logits: list[Float[Tensor, "batch _ vocab"]]
    """Depth k (from 1) at position i predicts token i+k+1; it has k positions fewer."""
    expert_loads: Int[Tensor, "layers experts"]
    """Tokens each expert received, per layer with experts, the MTP modules' last."""


class Backbone(nn.Module):
    def __init__(self, config: ModelConfig, dispatcher: Dispatcher):
        super().__init__()
        main, depths = config.num_hidden_layers, config.num_nextn_predict_layers
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        blocks = [Block(config, layer, dispatcher) for layer in range(main)]
        modules = [MTPModule(config, main + depth, dispatcher) for depth in range(depths)]
        self.layers = nn.ModuleList([*blocks, *modules])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Transformer(nn.Module):
    """The whole network. The constructor leaves its weights unset; ``create`` initialises them."""

    def __init__(self, config: ModelConfig, dispatcher: Dispatcher | None = None):
        super().__init__()
        self.config = config
        self.model = Backbone(config, dispatcher or LocalDispatcher())
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.invariance: Invariance | None = None
        """Set where what is generated must not depend on what else is in the batch."""

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """The network with memory but without values; router biases are zero and stay FP32."""
        with torch.device("meta"):
            network = cls(config)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype)
        network.to_empty(device=device)
        for router in network.routers():
            router.e_score_correction_bias.zero_()
        return network

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """Normal(0, ``initializer_range``) for every matrix, one for every norm (paper 4.2)."""
        network = cls.empty(config, device=device, dtype=dtype)
        generator = torch.Generator(device).manual_seed(seed)
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=config.initializer_range, generator=generator)
                else:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        return network

    @property
    def blocks(self) -> list[Block]:
        return [*self.model.layers][: self.config.num_hidden_layers]

    @property
    def mtp_modules(self) -> list[MTPModule]:
        return [*self.model.layers][self.config.num_hidden_layers :]

    def use_recipe(self, recipe: Recipe | None) -> None:
        """Run the products of every projection and expert by ``recipe``; None is the weights' type.

        Embedding, head, routers, norms and attention are not concerned (paper 3.3.1), nor is the
        absorbed form of decoding, which folds ``kv_b_proj`` into attention. Raises UserError where
        a size does not suit FP8.
        """
        for name, module in self.named_modules():
            if isinstance(module, Linear | Experts):
                if recipe is not None:
                    _check_sizes(name, module)
                module.recipe = recipe

    def recompute(self, choice: Recompute) -> None:
        """What each block's backward pass makes again instead of keeping."""
        for layer in self.model.layers:
            cast(Block, layer).recompute = choice

    def routers(self) -> list[Router]:
        """Routers in the order of ``expert_loads``."""
        return [module for module in self.modules() if isinstance(module, Router)]

    def forward(
        self,
        tokens: Int[Tensor, "batch seq"],
        *,
        documents: Int[Tensor, "batch seq"] | None = None,
    ) -> Output:
        """Logits of every position, main and MTP, in FP32."""
        states = self.hidden_states(tokens, documents=documents)
        loads = [routing.loads for routing in states.routings]
        empty = torch.zeros(0, self.config.n_routed_experts, dtype=torch.int64)
        return Output(
            self.head(states.main),
            [self.head(hidden) for hidden in states.mtp],
            torch.stack(loads) if loads else empty.to(tokens.device),
        )

    def hidden_states(
        self,
        tokens: Int[Tensor, "batch length"],
        *,
        lookahead: int = 0,
        documents: Int[Tensor, "batch length"] | None = None,
        with_mtp: bool = True,
    ) -> HiddenStates:
        """Representations before the head.

        The last ``lookahead`` tokens are only seen by MTP modules: with a lookahead of D, each of
        D depths has as many positions as the main model. ``documents`` numbers the document of
        each token and forbids attention between different ones.
        """
        seq = tokens.shape[1] - lookahead
        embedded = self.model.embed_tokens(tokens)
        context = self._context(seq, tokens.device, documents)
        stream: Stream = (embedded[:, :seq],)
        mtp, routings = [], []
        for block in self.blocks:
            stream, routing = block(stream, context)
            routings.append(routing)
        _, main = self.model.norm.after_add(*stream)
        previous = main
        for depth, module in enumerate(self.mtp_modules if with_mtp else [], start=1):
            length = max(0, min(seq, tokens.shape[1] - depth))
            if length < seq:
                context = self._context(length, tokens.device, documents)
            ahead = embedded[:, depth : depth + length]
            previous, routing = module.predict(previous[:, :length], ahead, context)
            mtp.append(previous)
            routings.append(routing)
        return HiddenStates(main, mtp, [routing for routing in routings if routing is not None])

    def expands(self, cached: int, new: int) -> bool:
        """Whether ``new`` tokens of a prompt, ``cached`` ones before them, had best be expanded."""
        if self.invariance is not None:
            return False
        return cached == 0 or expansion_is_cheaper(self.config, new)

    def cached_step(
        self, cache: LatentCache, groups: Sequence[Rows], places: Places | None = None
    ) -> CachedStep:
        """What ``decode`` and ``draft`` know of sequences that continue by a few tokens each."""
        if self.invariance is not None:
            groups = list(self.invariance.apart(groups))
        return CachedStep.of(cache, groups, self.config.num_attention_heads, places)

    def decode(
        self, tokens: Int[Tensor, "tokens"], step: CachedStep
    ) -> Float[Tensor, "tokens hidden"]:
        """Continue sequences; the new tokens' representations before the head. For inference."""
        return self._continue(self._decode, step, tokens)

    def _decode(
        self, tokens: Int[Tensor, "tokens"], step: CachedStep
    ) -> Float[Tensor, "tokens hidden"]:
        x = self.model.embed_tokens(tokens)
        norms = [*(block.input_layernorm for block in self.blocks), self.model.norm]
        normed = norms[0](x)
        for block, next_norm in zip(self.blocks, norms[1:], strict=True):
            x, normed = block.infer(x, normed, step, next_norm)
        return normed

    def draft(
        self,
        depth: int,
        previous: Float[Tensor, "tokens hidden"],
        following: Int[Tensor, "tokens"],
        step: CachedStep,
    ) -> Float[Tensor, "tokens hidden"]:
        """MTP module ``depth`` (from 0) continues: what the head reads to guess one token further.

        ``previous`` is what ``decode`` gave for the tokens of ``step``, or the depth before;
        ``following`` are the tokens after them.
        """
        embedded = self.model.embed_tokens(following)
        return self._continue(self.mtp_modules[depth].guess, step, previous, embedded)

    def _continue(
        self, run: Callable[..., Tensor], step: CachedStep, *lines: Tensor
    ) -> Float[Tensor, "tokens hidden"]:
        """``run`` for a line of tokens: all at once, or one after the other."""
        if self.invariance is None or self.invariance.block_rows is not None:
            return run(*lines, step)
        tokens = zip(*(line.split(1) for line in lines), step.alone(), strict=True)
        return torch.cat([run(*token) for token in tokens])

    def head(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        return self.logits(hidden).float()

    def logits(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch vocab"]:
        """As the product gives them, in the type of the weights: what the sampler reads."""
        if self.invariance is None or torch.is_grad_enabled():
            return linear(hidden, self.lm_head.weight)
        logits = self.invariance.linear(hidden.flatten(0, -2), self.lm_head.weight)
        return logits.view(*hidden.shape[:-1], self.config.vocab_size)

    def rotation(self, positions: Int[Tensor, "*batch seq"]) -> Tensor:
        """The rotary turns of these positions (complex, one a pair of dimensions)."""
        # Made on the device: a copy from the host would wait for it.
        config, scale, device = self.config, 1.0, positions.device
        frequencies = inverse_frequencies(config.qk_rope_head_dim, config.rope_theta, device)
        if (yarn := config.rope_scaling) is not None:
            frequencies = yarn_frequencies(
                config.qk_rope_head_dim,
                config.rope_theta,
                factor=yarn.factor,
                original_length=yarn.original_max_position_embeddings,
                beta_fast=yarn.beta_fast,
                beta_slow=yarn.beta_slow,
                device=device,
            )
            # 1 where mscale equals mscale_all_dim, as in V3: the softmax scale has it all.
            scale = yarn_mscale(yarn.factor, yarn.mscale)
            scale /= yarn_mscale(yarn.factor, yarn.mscale_all_dim)
        return rotations(positions, frequencies, scale)

    def _context(self, seq: int, device: torch.device, documents: Tensor | None) -> Context:
        positions = torch.arange(seq, device=device).unsqueeze(0)
        mask = None if documents is None else same_document_mask(documents[:, :seq])
        return Context(self.rotation(positions), mask)


def _check_sizes(name: str, module: Linear | Experts) -> None:
    for weight in module.parameters():
        if weight.ndim > 1 and any(size % FP8_ALIGNMENT for size in weight.shape[-2:]):
            out_features, in_features = weight.shape[-2:]
            raise UserError(
                f"FP8 products need sizes that are multiples of {FP8_ALIGNMENT}, but {name} is "
                f"{out_features} x {in_features}"
            )


def same_document_mask(documents: Int[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """Causal, and only within a document."""
    seq = documents.shape[1]
    same = documents.unsqueeze(2) == documents.unsqueeze(1)
    return same & torch.ones(seq, seq, dtype=torch.bool, device=documents.device).tril()


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a network, counted on the network itself (no memory is allocated)."""

    total: int
    """Main model with embedding and head, without the MTP modules."""
    active: int
    """What one token meets: top_k of the routed experts, everything else."""
    active_without_embedding: int
    mtp: int
    """The MTP modules' own, all experts counted; embedding and head are shared."""


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    with torch.device("meta"):
        network = Transformer(config)
    mtp = sum(p.numel() for module in network.mtp_modules for p in module.parameters())
    total = sum(p.numel() for p in network.parameters()) - mtp
    routed = sum(
        p.numel()
        for block in network.blocks
        for name, p in block.named_parameters()
        if name.startswith("mlp.experts.")
    )
    idle = routed * (config.n_routed_experts - config.num_experts_per_tok)
    active = total - idle // config.n_routed_experts
    embedding = network.model.embed_tokens.weight.numel()
    return ParameterCounts(total, active, active - embedding, mtp)
