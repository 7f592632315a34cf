"""AdamW on FP32 masters, with a global-norm clip (paper 3.3.3 and 4.2)."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from whalefall.config.train import OptimizerConfig
from whalefall.ops.adamw import adamw_, global_norm
from whalefall.train.masters import Masters


class AdamW:
    """Updates a network's parameters; decay on matrices only.

    An FP32 parameter is its own master. A BF16 one is the upper half of an FP32 master, whose lower
    half is kept here; without masters (``config.masters`` "none") it too is its own. The gradients
    that micro-batches add to a BF16 parameter are summed in FP32; while there is only one, it stays
    as it is.
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], config: OptimizerConfig
    ):
        self.config = config
        self.steps = 0
        self._parameters = dict(named_parameters)
        self._sums: dict[str, Tensor] = {}
        """Gradients of BF16 parameters since the last step."""
        self._remainders: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            if parameter.dtype != torch.bfloat16:
                continue
            parameter.register_post_accumulate_grad_hook(_add_to(self._sums, name))
            if config.masters == "float32":
                self._remainders[name] = _zeros_like(parameter, torch.int16)
        self.masters = Masters(self._parameters, self._remainders)
        self.moments = {
            f"{name}.{moment}": _zeros_like(parameter, getattr(torch, config.moment_dtype))
            for name, parameter in self._parameters.items()
            for moment in ("exp_avg", "exp_avg_sq")
        }

    def gradients(self) -> dict[str, Tensor]:
        """What backward passes have added since the last step, by parameter name.

        Of a BF16 parameter it is BF16 after one backward pass, and FP32 after more.
        """
        found = {name: self._sums.get(name, p.grad) for name, p in self._parameters.items()}
        return {name: gradient for name, gradient in found.items() if gradient is not None}

    def step(self, learning_rate: float, *, losses: Tensor | None = None) -> Tensor:
        """Clip, update, forget the gradients; returns their norm before clipping, a scalar.

        Nothing waits for a GPU: the norm stays on its device. It is NaN if one of ``losses`` is
        not finite, whatever the gradients say. If it is not finite, weights and
        moments are left as they were. On the CPU, where that is seen at once, so are ``steps`` and
        the gradients; a GPU's are gone, and the step has been counted, so the run must not go on.
        """
        gradients = self.gradients()
        norm = global_norm(list(gradients.values()))
        if losses is not None:
            norm = norm.where(losses.isfinite().all(), float("nan"))
        if not norm.is_cuda and not norm.isfinite():
            return norm
        self.steps += 1
        divisor = (norm / self.config.clip_norm).clamp(min=1.0)
        matrices = [name for name in gradients if gradients[name].ndim >= 2]
        vectors = [name for name in gradients if gradients[name].ndim < 2]
        for names, decay in ((matrices, self.config.weight_decay), (vectors, 0.0)):
            adamw_(
                [self._parameters[name] for name in names],
                [self._remainders.get(name) for name in names],
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
        self._sums.clear()
        for parameter in self._parameters.values():
            parameter.grad = None
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the steps taken; the masters are the model's to save."""
        return {"steps": torch.tensor(self.steps), **self.moments}

    @torch.no_grad()
    def load_state_dict(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
        """Take over masters and state."""
        self.masters.copy_(masters)
        for name, moment in self.moments.items():
            moment.copy_(state[name])
        self.steps = int(state["steps"])


def _zeros_like(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)


def _add_to(sums: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's new gradient to ``sums[name]``.

    Autograd would add the next one in the parameter's type, to what it finds in ``grad``.
    """

    def move(parameter: Tensor) -> None:
        new, parameter.grad = parameter.grad, None
        assert new is not None
        if name not in sums:
            sums[name] = new
        elif sums[name].dtype == torch.float32:
            sums[name] += new
        else:
            sums[name] = sums[name].float().add_(new)

    return move
