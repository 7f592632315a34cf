"""A projection, under the parameter names the checkpoints use."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from whalefall.ops.fp8_linear import Recipe, WeightCast, fp8_linear


class Linear(nn.Linear):
    """x W^T + bias, in the weights' type unless a recipe says that products run in FP8."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False):
        super().__init__(in_features, out_features, bias=bias)
        self.recipe: Recipe | None = None
        self._cast = WeightCast()

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.recipe is None:
            return F.linear(x, self.weight, self.bias)
        out = fp8_linear(x.reshape(-1, self.in_features), [self.weight], self._cast, self.recipe)
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias

    def beside(
        self, other: "Linear", x: Float[Tensor, "tokens in"]
    ) -> Float[Tensor, "tokens both"]:
        """This projection of x and another's, in one product; neither has a bias."""
        weights = [self.weight, other.weight]
        if self.recipe is None:
            return F.linear(x, torch.cat(weights))
        return fp8_linear(x, weights, self._cast, self.recipe)
