"""How the ranks of a run train one model: each a copy (DDP), or each a part of every parameter (FSDP2).

Both are torch's own wrappers around `Policy`, whose forward pass is all that training does. What they average
is what `update` wants added up, so it multiplies a loss by `scale`. Every rank knows all samples of a
mini-batch and deals them out by their lengths, so that who computes what, and how often, needs no exchange.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel

from elastic_decode.errors import ConfigError
from elastic_decode.rl.distributed import World, whole
from elastic_decode.rl.logprobs import Packed, TokenLogprobs

Sharding = Literal["ddp", "fsdp"]


class Policy(torch.nn.Module):
    """A causal language model as a module whose forward pass is all that training does with it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, compute: TokenLogprobs, packed: Packed, chunk: int, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return compute(self.model, packed, chunk=chunk, entropy=entropy)


class Parallel:
    """One process, and what the others have in common: `model` is where it was."""

    def __init__(self, model: Any, world: World | None = None) -> None:
        self.model = model
        self.world = world or World()

    gradients_each_pass = True  # after a micro-batch's backward pass its gradient is what it will be

    @property
    def scale(self) -> int:
        """What a loss is multiplied by: gradients are averaged over ranks where they should be added."""
        return self.world.size

    def share(self, lengths: Sequence[int]) -> list[list[int]]:
        """Which of a mini-batch's samples each rank trains on: the longest first, each to the rank with the
        fewest tokens so far.
        """
        shares: list[list[int]] = [[] for _ in range(self.world.size)]
        loads = [0] * self.world.size
        for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            rank = loads.index(min(loads))
            shares[rank].append(index)
            loads[rank] += lengths[index]
        return [sorted(share) for share in shares]

    def passes(self, counts: Sequence[int]) -> int:
        """How often this rank has to run the model, where `counts` are the micro-batches of every rank."""
        return counts[self.world.rank]

    def logprobs(
        self, compute: TokenLogprobs, packed: Packed, *, chunk: int, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`compute` of the model, through what makes its ranks one."""
        return compute(self.model, packed, chunk=chunk, entropy=entropy)

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around each micro-batch's forward and backward pass."""
        return contextlib.nullcontext()

    @property
    def names(self) -> list[str]:
        """What `weights()` brings: what an engine is to be fed."""
        return []

    def weights(self) -> Iterator[tuple[str, torch.Tensor]] | None:
        """Whole parameters one at a time, which all ranks go through together, for `Engine.sync_weights`;
        None where the engine shares them.
        """
        return None

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model's, on the main rank's CPU (elsewhere empty), where it is sharded; else None."""
        return None

    def frozen(self, model: Any) -> Parallel:
        """Another model of the same kind that is not trained, the reference, kept as this one is."""
        return Parallel(model, self.world)

    def close(self) -> None:
        """Let go of the process group, before it is taken down."""


class Replicated(Parallel):
    """DDP: every rank holds the whole model, which an engine can share. Gradients are averaged during the
    last micro-batch's backward pass, so ranks may differ in how many they have; one without any runs an empty
    one.
    """

    gradients_each_pass = False  # they are added up in the parameters' dtype until the last one's

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model, world)
        names = inspect.signature(DistributedDataParallel).parameters
        # Buffers are tables that no rank changes; the option's name is another in newer versions of torch.
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False, "gradient_as_bucket_view": True}
        self._wrapped = DistributedDataParallel(Policy(model), **options)

    def passes(self, counts: Sequence[int]) -> int:
        return max(1, counts[self.world.rank])

    def logprobs(
        self, compute: TokenLogprobs, packed: Packed, *, chunk: int, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not torch.is_grad_enabled():
            return compute(self.model, packed, chunk=chunk, entropy=entropy)
        found: tuple[torch.Tensor, torch.Tensor | None] = self._wrapped(compute, packed, chunk, entropy)
        return found

    def accumulating(self, *, last: bool) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if last else self._wrapped.no_sync()

    def close(self) -> None:
        # The reducer must not be the last to hold the group: it would wait for the group's threads with
        # Python's lock held, which these may want.
        del self._wrapped
        gc.collect()


class Sharded(Parallel):
    """FSDP2: every rank holds a part of each parameter, its gradient and its optimizer state, and layers are
    gathered as they are needed. Every pass through the model is a collective, so all ranks make as many as
    the one with most. `model` is sharded in place: its parameters are DTensors afterwards.
    """

    def __init__(self, model: Any, world: World) -> None:
        super().__init__(model, world)
        self._policy = self._shard(model)

    def passes(self, counts: Sequence[int]) -> int:
        return max(counts)

    def logprobs(
        self, compute: TokenLogprobs, packed: Packed, *, chunk: int, entropy: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        found: tuple[torch.Tensor, torch.Tensor | None] = self._policy(compute, packed, chunk, entropy)
        if not torch.is_grad_enabled():  # no backward pass comes to do it
            self._policy.reshard()
        return found

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.model.named_parameters()]

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.model.named_parameters():
            yield name, whole(parameter.detach())

    def state_dict(self) -> dict[str, torch.Tensor]:
        tied = dict(self.model.named_parameters(remove_duplicate=False)).keys() - set(self.names)
        found = {}
        for name, tensor in self.model.state_dict().items():
            if name not in tied:
                full = whole(tensor)
                if self.world.main:
                    found[name] = full.cpu()
        return found

    def frozen(self, model: Any) -> Parallel:
        return Sharded(model, self.world)

    def _shard(self, model: Any) -> Any:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(torch.device(self.world.device).type, (self.world.size,))
        precision = MixedPrecisionPolicy(reduce_dtype=torch.float32)
        policy = Policy(model)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(policy, mesh=mesh, mp_policy=precision)
        return policy


def parallel(model: Any, world: World, sharding: Sharding) -> Parallel:
    """How `world` trains `model`. Alone, a world does it as it is."""
    if world.size == 1:
        return Parallel(model, world)
    if sharding == "ddp":
        return Replicated(model, world)
    if sharding == "fsdp":
        return Sharded(model, world)
    raise ConfigError(f"distributed.sharding must be ddp or fsdp, got {sharding!r}")
