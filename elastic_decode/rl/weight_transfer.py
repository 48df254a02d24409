"""Weights from a trainer's process to engines in other processes: in buckets, checked before and after.

    init     Link: trainer (rank 0) and rollout workers (1 …) join a process group of their own, beside
             whatever groups they are in
    start    the sender says what comes: an epoch, names, shapes, dtypes; every receiver compares that with
             its engine and all learn whether one refuses, before a weight is overwritten
    update   tensors in the sender's order, packed into buckets, a broadcast each; a receiver copies them into
             its engine's buffers as they come
    finish   every receiver says whether its engine has taken over all of them

`send_weights` and `receive_weights` go through the last three; both sides have to be called (a rollout worker
is told over whatever controls it). A receiver needs no more memory than a bucket.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from elastic_decode.errors import CheckpointError, ConfigError, RankError
from elastic_decode.llm import Engine
from elastic_decode.models.layout import LM_HEAD
from elastic_decode.rl.distributed import whole

BUCKET = 256 << 20  # bytes
_ABORTED = -1


@dataclass(frozen=True, slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


@dataclass(frozen=True, slots=True)
class _Manifest:
    epoch: int
    tensors: tuple[_Tensor, ...]


class Link:
    """A process group of one sender, rank 0, and `size - 1` receivers.

    host, port: where rank 0 listens, the same for all. device: where buckets lie. backend: gloo takes them
    over the host whatever the device; nccl wants them on GPUs, one a rank. timeout: seconds that one waits
    for the others. Raises RankError where they do not come.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rank: int,
        size: int,
        device: str = "cpu",
        backend: Literal["gloo", "nccl"] = "gloo",
        timeout: float = 600.0,
    ) -> None:
        if size < 2 or not 0 <= rank < size:
            raise ConfigError(f"a link has a sender (rank 0) and receivers; got rank {rank} of {size}")
        if backend not in ("gloo", "nccl"):
            raise ConfigError(f"backend must be gloo or nccl, got {backend!r}")
        if backend == "nccl" and torch.device(device).type != "cuda":
            raise ConfigError(f"nccl needs device 'cuda', got {device!r}")
        self.rank, self.size = rank, size
        self.device = device if backend == "nccl" else "cpu"
        limit = timedelta(seconds=timeout)
        with self._talking("to connect"):
            store = dist.TCPStore(host, port, size, rank == 0, timeout=limit, wait_for_workers=False)
            made: Any = dist.ProcessGroupGloo if backend == "gloo" else dist.ProcessGroupNCCL
            self._group = made(store, rank, size, limit)

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sender's values into every receiver's `tensor`, which is on the link's device."""
        with self._talking("to broadcast"):
            self._group.broadcast(tensor, 0).wait()
        return tensor

    def share(self, value: Any) -> Any:
        """The sender's value, anything that can be pickled, on every rank."""
        data = pickle.dumps(value) if self.rank == 0 else b""
        size = int(self.broadcast(torch.tensor([len(data)], device=self.device)))
        buffer = torch.frombuffer(bytearray(data or size), dtype=torch.uint8).to(self.device)
        return pickle.loads(self.broadcast(buffer).cpu().numpy().tobytes())

    def agree(self, failure: str | None) -> list[str]:
        """What went wrong on any rank, this one's news included; the same on each."""
        data = (failure or "").encode()[:_NEWS]
        own = torch.zeros(_NEWS, dtype=torch.uint8)
        own[: len(data)] = torch.frombuffer(bytearray(data or b"\0"), dtype=torch.uint8)[: len(data)]
        own = own.to(self.device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        with self._talking("to agree"):
            self._group.allgather([every], [own]).wait()
        said = [bytes(news.cpu().numpy()).rstrip(b"\0").decode(errors="replace") for news in every]
        return [f"rank {rank}: {text}" for rank, text in enumerate(said) if text]

    @contextmanager
    def _talking(self, doing: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} of the weight transfer waited in vain {doing}: another process ended, or "
                f"does not take part ({error})"
            ) from error


_NEWS = 1024  # bytes of an error's text


def send_weights(model: Any, link: Link | None, *, epoch: int, bucket: int = BUCKET) -> None:
    """Send the parameters of `model`, a Hugging Face causal LM, to all receivers of `link`.

    Of a sharded model they are gathered one at a time: all its ranks call this together, those that are not
    the sender with link=None. epoch: a number of these weights that receivers hand on (the updates so far,
    for one). bucket: bytes a broadcast; a larger tensor is one by itself. Raises CheckpointError where a
    receiver's engine has other weights, with nothing overwritten anywhere, and RankError where one failed.
    """
    named = [
        (_Tensor(name, tuple(parameter.shape), parameter.dtype), parameter)
        for name, parameter in model.named_parameters()
    ]
    if link is None:
        for _, parameter in named:
            whole(parameter.detach())
        return
    link.share(_Manifest(epoch, tuple(tensor for tensor, _ in named)))
    if refusals := link.agree(None):
        raise CheckpointError(f"no weights were sent: {'; '.join(refusals)}")
    try:
        for batch in _buckets([tensor for tensor, _ in named], bucket):
            parts = [
                whole(named[i][1].detach()).to(link.device).contiguous().view(torch.uint8).view(-1)
                for i in batch
            ]
            filled = torch.cat(parts)
            link.broadcast(torch.tensor([filled.numel()], device=link.device))
            link.broadcast(filled)
    except BaseException as error:
        if not isinstance(error, RankError):
            link.broadcast(torch.tensor([_ABORTED], device=link.device))
        raise
    if failures := link.agree(None):
        raise RankError(f"the weights of epoch {epoch} were not taken over everywhere: {'; '.join(failures)}")


def receive_weights(engine: Engine, link: Link) -> int:
    """Take over what the sender sends; the epoch it gave them.

    engine: one with weights of its own (`Engine.from_pretrained`). As with `Engine.sync_weights`, prefixes of
    the old weights are forgotten, and requests in flight, if there are any, go on with the new weights over
    the keys and values that the old ones left: finish or abort them first where samples shall be of one
    policy. Raises CheckpointError, with nothing overwritten, where names, shapes or dtypes are not the
    engine's, and RankError where the sender went away; the engine then decodes no more until a transfer
    succeeds.
    """
    manifest: _Manifest = link.share(None)
    refusal = _refusal(engine, manifest)
    if refusals := link.agree(refusal):
        raise CheckpointError(refusal or f"no weights were received: {'; '.join(refusals)}")
    incoming = _incoming(manifest, link)
    try:
        engine.sync_weights(incoming)
    except RankError:
        raise  # the sender is not there to be told
    except Exception as error:
        for _ in incoming:  # the sender goes on to the end
            pass
        link.agree(f"{type(error).__name__}: {error}")
        raise
    if failures := link.agree(None):
        raise RankError(
            f"this engine has the weights of epoch {manifest.epoch}, others: {'; '.join(failures)}"
        )
    return manifest.epoch


def _buckets(tensors: list[_Tensor], most: int) -> Iterator[list[int]]:
    """Places of tensors that go together, in order."""
    batch: list[int] = []
    size = 0
    for place, tensor in enumerate(tensors):
        if batch and size + tensor.bytes > most:
            yield batch
            batch, size = [], 0
        batch.append(place)
        size += tensor.bytes
    if batch:
        yield batch


def _incoming(manifest: _Manifest, link: Link) -> Iterator[tuple[str, torch.Tensor]]:
    """Pairs as `Engine.sync_weights` wants them; a tensor is good until the next bucket comes."""
    tensors = iter(manifest.tensors)
    left = len(manifest.tensors)
    while left:
        size = int(link.broadcast(torch.zeros(1, dtype=torch.int64, device=link.device)))
        if size == _ABORTED:
            raise RankError("the sender broke off in the middle of its weights: see its error")
        buffer = link.broadcast(torch.empty(size, dtype=torch.uint8, device=link.device))
        start = 0
        while start < size:
            tensor = next(tensors)
            part = buffer[start : start + tensor.bytes].clone()  # aligned for its dtype
            yield tensor.name, part.view(tensor.dtype).view(tensor.shape)
            start += tensor.bytes
            left -= 1


def _refusal(engine: Engine, manifest: _Manifest) -> str | None:
    """Why these weights are not the engine's."""
    wanted = engine.weight_shapes
    sent = {tensor.name: tensor for tensor in manifest.tensors}
    if engine.model_config.tie_embeddings and LM_HEAD not in sent:
        wanted.pop(LM_HEAD, None)
    for name in sorted(wanted.keys() ^ sent.keys()):
        lacks = "the engine has no" if name in sent else "the sender has no"
        return f"{lacks} tensor {name!r}: they hold other models"
    for name, tensor in sent.items():
        if tensor.shape != wanted[name]:
            return f"tensor {name!r} has shape {tensor.shape} at the sender, {wanted[name]} in the engine"
        if not tensor.dtype.is_floating_point:
            return (
                f"tensor {name!r} has dtype {tensor.dtype} at the sender; weights are floating-point numbers"
            )
    return None
