"""AdamW with float32 master weights, and learning-rate schedules as functions of the step.

A bfloat16 parameter has 8 bits: an update of less than 1/256 of it is rounded away, and at a learning rate of
1e-6 nearly all are. So the optimizer keeps float32 copies, updates those, and rounds them into the module's
own parameters, in place: an engine that shares their storage sees the new weights. Gradients of micro-batches
are added up in float32, too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch

from elastic_decode.errors import ConfigError
from elastic_decode.rl.distributed import part_of, whole

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(step: int, *, lr: float, schedule: Schedule, warmup: int, steps: int) -> float:
    """The rate of update `step`, counted from 0, of `steps`.

    Up linearly over `warmup` updates; then constant, or down to 0 linearly or as half a cosine.
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = min(1.0, (step - warmup) / max(1, steps - warmup))
    if schedule == "linear":
        return lr * (1 - done)
    if schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * done))
    raise ConfigError(f"no schedule {schedule!r}; there are constant, linear, cosine")


class MasterAdamW:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) over float32 copies of the parameters that need them.

    Parameters with one dimension (norms, biases) are not decayed. float32 parameters are their own masters.
    Of sharded parameters each rank keeps masters and moments of its part.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        if not self.parameters:
            raise ConfigError("no parameter of the model requires a gradient: there is nothing to train")
        self._masters = [
            parameter
            if parameter.dtype == torch.float32
            else torch.nn.Parameter(parameter.detach().float().clone())
            for parameter in self.parameters
        ]
        matrices = [master for master in self._masters if master.dim() > 1]
        others = [master for master in self._masters if master.dim() <= 1]
        self._ordered = [*matrices, *others]  # as AdamW counts them
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=lr,
            betas=betas,
            eps=eps,
        )

    def zero_grad(self) -> None:
        for parameter, master in zip(self.parameters, self._masters, strict=True):
            parameter.grad = master.grad = None

    def take_gradients(self) -> None:
        """Adds the parameters' gradients to the masters' and lets go of them."""
        for parameter, master in zip(self.parameters, self._masters, strict=True):
            if master is parameter or parameter.grad is None:
                continue
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

    def step(self, lr: float) -> None:
        """One update with the gradients since `zero_grad`, written to the parameters in place."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self.take_gradients()
        self._adamw.step()
        with torch.no_grad():
            for parameter, master in zip(self.parameters, self._masters, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                    master.grad = None

    def clip(self, most: float) -> torch.Tensor:
        """Scale the gradients of all parameters down to a norm of `most` at most; the norm that they had."""
        self.take_gradients()
        return whole(torch.nn.utils.clip_grad_norm_(self._masters, most))

    def state_dict(self, *, keep: bool = True) -> dict[str, Any]:
        """Moments and masters, whole: with it a run goes on bit for bit, on any number of ranks. Of sharded
        parameters it is gathered, by all ranks together; those with keep=False do without the result.
        """
        copies = [
            None if master is parameter else _kept(master, keep)
            for parameter, master in zip(self.parameters, self._masters, strict=True)
        ]
        state = self._adamw.state_dict()
        moments = {
            index: {name: _kept(value, keep) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {"adamw": {**state, "state": moments}, "masters": copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError where it is another model's."""
        copies = state["masters"]
        shapes = [None if copy is None else tuple(copy.shape) for copy in copies]
        want = [
            None if master is parameter else tuple(master.shape)
            for parameter, master in zip(self.parameters, self._masters, strict=True)
        ]
        if shapes != want:
            raise ConfigError(
                f"the optimizer's state is of {len(shapes)} parameters that are not these {len(want)}: "
                "another model, another dtype, or other parameters frozen"
            )
        moments = {
            index: {name: _placed(value, self._ordered[index]) for name, value in values.items()}
            for index, values in state["adamw"]["state"].items()
        }
        self._adamw.load_state_dict({**state["adamw"], "state": moments})
        with torch.no_grad():
            for parameter, master, copy in zip(self.parameters, self._masters, copies, strict=True):
                if copy is not None:
                    master.copy_(part_of(copy, master))
                    parameter.copy_(master)


def _kept(value: Any, keep: bool) -> Any:
    """A tensor whole, on the CPU where it had to be gathered; None where it is not wanted."""
    if not isinstance(value, torch.Tensor):
        return value
    full = whole(value.detach())
    if not keep:
        return None
    return full.cpu() if hasattr(value, "full_tensor") else full


def _placed(value: Any, parameter: torch.Tensor) -> Any:
    """A moment as its parameter is; the count of steps is a scalar."""
    return part_of(value, parameter) if isinstance(value, torch.Tensor) and value.dim() else value
