"""A projection, under the parameter names the checkpoints use."""

from collections.abc import Callable
from typing import Any, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.model.joined import if_together, lay_together
from whalefall.ops.block_linear import block_linear, streamed_linear
from whalefall.ops.few_rows import Weight, fixed_block
from whalefall.ops.fp8_blocks import encode_blocks
from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear
from whalefall.ops.linear import linear
from whalefall.ops.quantize import TILE


class Linear(nn.Linear):
    """x W^T + bias, in the weights' type unless a recipe says that products run in FP8."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.recipe: Recipe | None = None
        self.block_rows: int | None = None
        """Rows multiplied at a time, for results that do not depend on how many there are
        (inference); None is as is fastest."""
        self._cast = WeightCast()
        self._joint: Weight | None = None

    @property
    def held(self) -> Weight:
        """The weight as it is in memory."""
        return Weight(self.weight)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.recipe is None and self.block_rows is None:
            return linear(x, self.weight, self.bias)
        return self._by_rows(x)

    def beside(
        self, other: "Linear", x: Float[Tensor, "tokens in"]
    ) -> Float[Tensor, "tokens both"]:
        """This projection of x and another's, side by side; neither has a bias.

        One product in training and where the two were joined.
        """
        if self.recipe is not None:
            return fp8_linear(x, [self.weight, other.weight], self._cast, self.recipe)
        if torch.is_grad_enabled():
            return linear(x, torch.cat([self.weight, other.weight]))
        if (joint := self.joint(other)) is not None:
            return self._product(x, joint)
        return torch.cat([self(x), other(x)], 1)

    def joint(self, other: "Linear") -> Weight | None:
        """Both weights as one, if they were joined and still lie so."""
        return if_together(self._joint, self.weight, other.weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._joint = None  # the weights may move apart, and must not be kept alive
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        """Copies of the parameters do not lie together."""
        return self.__dict__ | {"_joint": None}

    def _by_rows(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        out = self._product(x.reshape(-1, self.in_features), self.held)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def _product(self, x: Float[Tensor, "rows in"], weight: Weight) -> Float[Tensor, "rows _"]:
        if self.recipe is not None:
            return fp8_linear(x, [weight.values], self._cast, self.recipe)
        if self.block_rows is None or torch.is_grad_enabled() or not fixed_block(x, weight):
            return linear(x, weight.values)
        return streamed_linear(x, weight, self.block_rows)


class BlockLinear(Linear):
    """A projection whose weight is FP8 blocks, as checkpoints hold it: for inference."""

    weight_scale_inv: Tensor

    @classmethod
    def of(cls, linear: Linear) -> Self:
        """The same projection, its weight rounded."""
        with torch.device("meta"):
            held = cls(linear.in_features, linear.out_features)
        values, scales = encode_blocks(linear.weight.detach())
        held.weight = nn.Parameter(values, requires_grad=False)
        held.register_buffer("weight_scale_inv", scales)
        held.bias = linear.bias
        return held

    @property
    def held(self) -> Weight:
        return Weight(self.weight, self.weight_scale_inv)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self._by_rows(x)

    def beside(self, other: Linear, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens both"]:
        with torch.no_grad():
            return super().beside(other, x)

    def _product(self, x: Float[Tensor, "rows in"], weight: Weight) -> Float[Tensor, "rows _"]:
        values, scales = weight
        assert scales is not None
        return block_linear(x, values, scales, block_rows=self.block_rows)


def join(first: Linear, second: Linear) -> None:
    """Lay the weights one behind the other, so that ``first.beside(second, x)`` is one product.

    Parameters, names and values stay; training may go on.
    """
    if isinstance(first, BlockLinear) and first.out_features % TILE:
        return  # the second's first block would begin within the first's last
    first._joint = lay_together(first.held, second.held)
