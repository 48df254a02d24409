"""The processes of a run, as torchrun starts them: who this one is, and what all of them have to agree on.

Every rank goes through the same calls in the same order. A step's prompts are dealt out like cards (rank r of
R has the r-th, the r+R-th …), so that every stretch of the global order, and with it every mini-batch, is
spread over all ranks. What decides on numbers is exchanged and then computed by every rank from the same
data; what may fail on one rank alone stands in `together`, which ends all of them with the same news instead
of leaving the others to wait.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from elastic_decode.errors import ConfigError, RankError

T = TypeVar("T")
# What gloo and NCCL say in errors that are plain RuntimeErrors.
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")


class World:
    """`size` processes, of which this one is `rank` and trains on `device`. One alone has nothing to say, and
    then nothing costs.

    Raises RankError, from any method, where another process failed or cannot be reached.
    """

    def __init__(self, rank: int = 0, size: int = 1, device: str = "cpu") -> None:
        self.rank, self.size, self.device = rank, size, device
        self._broken: str | None = None

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and shows things."""
        return self.rank == 0

    def mine(self, count: int) -> range:
        """Which of `count` things are this rank's."""
        return range(self.rank, count, self.size)

    def gather(self, value: T) -> list[T]:
        """Every rank's value (anything that can be pickled), in the order of ranks."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        with self._talking("gather"):
            dist.all_gather_object(found, value)
        return found

    def most(self, value: int) -> int:
        """The largest of the ranks' values."""
        return max(self.gather(value))

    def add(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            with self._talking("add"):
                dist.all_reduce(tensor)
        return tensor

    def concat(self, tensor: torch.Tensor) -> torch.Tensor:
        """The ranks' one-dimensional tensors, of any lengths and one dtype, end to end; on the CPU."""
        if self.size == 1:
            return tensor.cpu()
        return torch.cat([torch.from_numpy(part) for part in self.gather(tensor.cpu().numpy())])

    @contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """The body fails on all ranks or on none: at its end each says whether it got through.

        The rank that failed raises its own error, the others a RankError with its text.
        """
        try:
            yield
        except Exception as error:
            if self.size > 1 and self._broken is None:
                self._agree(doing, f"{type(error).__name__}: {error}")
            raise
        if self.size > 1:
            self._agree(doing, None)

    @contextmanager
    def listening(self, doing: str) -> Iterator[None]:
        """Around what torch itself exchanges (gradients, shards): where another rank went away in the middle,
        a RankError says so. An error of this rank's own is let through.
        """
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _LOST)
            if self.size == 1 or isinstance(error, RankError) or not lost:
                raise
            raise self._unreachable(doing, error) from error

    def _agree(self, doing: str, failure: str | None) -> None:
        said = self.gather(failure)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(said) if text is not None]
        if failed:
            self._broken = f"{doing} failed on {'; '.join(failed)}"
            if failure is None:
                raise RankError(f"{self._broken}. Rank {self.rank} ends with it")

    @contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        if self._broken is not None:
            raise RankError(f"the run has ended: {self._broken}")
        try:
            yield
        except RuntimeError as error:
            raise self._unreachable(doing, error) from error

    def _unreachable(self, doing: str, error: Exception) -> RankError:
        self._broken = f"rank {self.rank} cannot reach the others any more ({doing}: {error})"
        return RankError(
            f"{self._broken}. Another process ended, hangs or is slower than distributed.timeout; the first "
            "error in the ranks' output is the cause"
        )


def whole(tensor: Any) -> torch.Tensor:
    """A sharded tensor (DTensor) gathered, by all its ranks together; another as it is."""
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def part_of(full: torch.Tensor, like: Any) -> torch.Tensor:
    """What this rank holds of `full`, which every rank has, where `like` is sharded; else all of it."""
    if not hasattr(like, "placements"):
        return full
    from torch.distributed.tensor import distribute_tensor

    full = full.to(like.device)
    part: torch.Tensor = distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)
    return part


def started() -> bool:
    """Whether this is one of several processes: torchrun's environment or a process group says so."""
    return dist.is_available() and (dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) > 1)


def own_device(device: str) -> str:
    """`device` for this process: of CUDA that of LOCAL_RANK. Raises ConfigError where that is not there."""
    if not started() or torch.device(device).type != "cuda":
        return device
    if torch.device(device).index is not None:
        raise ConfigError(f"engine.device is {device!r}, but every process has another one: say 'cuda'")
    local, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= there:
        raise ConfigError(f"LOCAL_RANK is {local} and torch sees {there} GPUs: start fewer processes a node")
    return f"cuda:{local}"


@contextmanager
def joined(device: str, *, timeout: float = 1800.0) -> Iterator[World]:
    """This process in its world: the process group that is there already, or torchrun's (gloo, and NCCL for
    CUDA tensors), made now and taken down at the end; without either, a world of one.

    device: `own_device`. timeout: seconds that a rank waits for the slowest.
    """
    if not started():
        yield World()
        return
    there = dist.is_initialized()
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(device)
    if not there:
        # Objects go by gloo, whatever the device: they are in the host's memory.
        backend = "cpu:gloo,cuda:nccl" if torch.device(device).type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield World(dist.get_rank(), dist.get_world_size(), device)
    except BaseException:
        # gloo tells the others at once; NCCL would wait for them, and ends with the process.
        if not there and torch.device(device).type == "cpu":
            dist.destroy_process_group()
        raise
    if not there:
        dist.destroy_process_group()
