"""AdamW on FP32 masters, with a global-norm clip (paper 3.3.3 and 4.2)."""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from whalefall.config.train import OptimizerConfig
from whalefall.ops.adamw import adamw_


class AdamW:
    """Updates a network's parameters; decay on matrices only.

    Each parameter has an FP32 master. An FP32 parameter is its own; a BF16 one gets a copy, and its
    gradient is added in FP32 to the master's as soon as a backward pass has made it, so that
    micro-batches accumulate without rounding and no BF16 gradient outlives its layer.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
    ):
        self.config = config
        self.steps = 0
        self.masters: dict[str, Tensor] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        """(working weight, master) of every parameter that is not its own master."""
        for name, parameter in named_parameters:
            if parameter.dtype == torch.float32:
                self.masters[name] = parameter
            else:
                self.masters[name] = master = parameter.detach().float()
                self._copies.append((parameter.detach(), master))
                parameter.register_post_accumulate_grad_hook(_accumulate_into(master))
        moment_dtype = getattr(torch, config.moment_dtype)
        self.moments = {
            f"{name}.{moment}": torch.zeros_like(master, dtype=moment_dtype, requires_grad=False)
            for name, master in self.masters.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def gradients(self) -> dict[str, Tensor]:
        """The FP32 gradients accumulated since the last step, by parameter name."""
        return {
            name: master.grad for name, master in self.masters.items() if master.grad is not None
        }

    def step(self, learning_rate: float) -> float:
        """Clip, update, forget the gradients; returns their norm before clipping.

        A norm that is not finite leaves everything as it was, the gradients too.
        """
        gradients = self.gradients()
        norm = torch.nn.utils.get_total_norm(list(gradients.values()))
        if not math.isfinite(value := norm.item()):
            return value
        self.steps += 1
        divisor = (norm / self.config.clip_norm).clamp(min=1.0)
        matrices = [name for name in gradients if gradients[name].ndim >= 2]
        vectors = [name for name in gradients if gradients[name].ndim < 2]
        for names, decay in ((matrices, self.config.weight_decay), (vectors, 0.0)):
            adamw_(
                [self.masters[name] for name in names],
                [gradients[name] for name in names],
                [self.moments[f"{name}.exp_avg"] for name in names],
                [self.moments[f"{name}.exp_avg_sq"] for name in names],
                step=self.steps,
                learning_rate=learning_rate,
                betas=self.config.betas,
                eps=self.config.eps,
                weight_decay=decay,
                gradient_divisor=divisor,
            )
        self._refresh()
        for master in self.masters.values():
            master.grad = None
        return value

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the steps taken; the masters are the model's to save."""
        return {"steps": torch.tensor(self.steps), **self.moments}

    @torch.no_grad()
    def load_masters(self, masters: Mapping[str, Tensor]) -> None:
        """Take over FP32 weights; the working weights follow."""
        for name, master in self.masters.items():
            master.copy_(masters[name])
        self._refresh()

    @torch.no_grad()
    def load_state_dict(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take over masters and state."""
        self.load_masters(masters)
        for name, moment in self.moments.items():
            moment.copy_(state[name])
        self.steps = int(state["steps"])

    def _refresh(self) -> None:
        if self._copies:
            working, masters = zip(*self._copies, strict=True)
            torch._foreach_copy_(list(working), list(masters))


def _accumulate_into(master: Tensor) -> Callable[[Tensor], None]:
    def accumulate(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.float()
        else:
            master.grad += parameter.grad
        parameter.grad = None

    return accumulate
