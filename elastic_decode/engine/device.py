"""The device as the engine sees it: a queue that runs work in order, later, and copies to and from it.

What the host enqueues is done in that order and at an unknown time, so a host buffer that a copy reads or
writes belongs to the copy until the device has passed it: `Staging` lends it and takes it back after an
event. On the CPU (`HostDevice`) the queue is always empty: work is done as it is launched.
"""

from __future__ import annotations

import contextlib
import gc
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

Work = Callable[[], object]
_TORCH_DTYPES = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}


class Event(Protocol):
    """A place in the queue."""

    def passed(self) -> bool: ...

    def wait(self) -> None: ...


class Staging:
    """Host buffers by size; the same one again only after the event it was lent until."""

    def __init__(self, allocate: Callable[[int], torch.Tensor]) -> None:
        self._allocate = allocate
        self._free: dict[int, list[torch.Tensor]] = {}
        self._lent: list[torch.Tensor] = []
        self._until: deque[tuple[Event, list[torch.Tensor]]] = deque()

    def take(self, nbytes: int) -> torch.Tensor:
        """A uint8 buffer of at least `nbytes` that nothing on the device names any more."""
        while self._until and self._until[0][0].passed():
            for buffer in self._until.popleft()[1]:
                self.give_back(buffer)
        size = max(256, 1 << (nbytes - 1).bit_length())
        free = self._free.get(size)
        return free.pop() if free else self._allocate(size)

    def lend(self, buffer: torch.Tensor) -> None:
        """The buffer belongs to work enqueued just now: until the next `mark`'s event."""
        self._lent.append(buffer)

    def mark(self, event: Event) -> None:
        self._until.append((event, self._lent))
        self._lent = []

    def give_back(self, buffer: torch.Tensor) -> None:
        self._free.setdefault(len(buffer), []).append(buffer)


class Download(Protocol):
    """Copies of device tensors on their way to the host."""

    def read(self, then: Callable[[list[np.ndarray]], Any], *, queued_behind: bool) -> Any:
        """`then` of the arrays, once they are there; they are not to be kept. Waits if need be.

        queued_behind: whether the device has work after this copy, so that it does not stand idle meanwhile.
        """


class _Copies:
    """A Download through staging buffers."""

    def __init__(self, device: Device, event: Event, buffers: list[torch.Tensor], views: list[Any]) -> None:
        self._device, self._event, self._buffers, self._views = device, event, buffers, views

    def read(self, then: Callable[[list[np.ndarray]], Any], *, queued_behind: bool) -> Any:
        self._device.count_wait(queued_behind)
        self._event.wait()
        result = then([view.numpy() for view in self._views])
        for buffer in self._buffers:
            self._device.staging.give_back(buffer)
        self._buffers, self._views = [], []
        return result


class Device(ABC):
    """One in-order queue. `graphs`: whether steps are recorded once per shape and replayed."""

    graphs: bool
    flights: int  # how many horizons may be under way when the host turns to the oldest

    def __init__(self, device: torch.device, allocate_host: Callable[[int], torch.Tensor]) -> None:
        self.device = device
        self.staging = Staging(allocate_host)
        self.waits = 0  # for a flight's results
        self.idle_waits = 0  # those with nothing enqueued behind them

    @abstractmethod
    def launch(self, work: Work) -> None:
        """Enqueue `work`: torch operations on this device's tensors."""

    @abstractmethod
    def record_event(self) -> Event:
        """The place after everything launched so far."""

    @abstractmethod
    def record(self, work: Work) -> Work:
        """What to `replay` to do `work` again on the same tensors. Within `at_work`; `work` may run here."""

    def replay(self, recorded: Work) -> None:
        """Enqueue recorded work."""
        recorded()

    @abstractmethod
    def finish(self) -> None:
        """Wait until everything launched has been done."""

    @abstractmethod
    def give_back(self) -> None:
        """Return memory that nothing names any more, recorded work's included, for others to use."""

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """Around each call of the engine: orders its queue after the caller's work, and the caller's next
        after its own."""
        yield

    def upload(self, values: Sequence[int] | np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        """A new device tensor that holds `values` for whatever is launched after this."""
        array: np.ndarray = np.ascontiguousarray(values, dtype=dtype)
        torch_dtype = _TORCH_DTYPES[array.dtype]
        target = self._empty(array.shape, torch_dtype)
        if array.nbytes == 0:
            return target
        buffer = self.staging.take(array.nbytes)
        host = buffer[: array.nbytes].view(torch_dtype).view(array.shape)
        host.numpy()[...] = array
        self.launch(lambda: target.copy_(host, non_blocking=True))
        self.staging.lend(buffer)
        return target

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        """Start copying contiguous tensors, as they are after everything launched so far."""
        buffers = [self.staging.take(tensor.nbytes) for tensor in tensors]
        views = [
            buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            for buffer, tensor in zip(buffers, tensors, strict=True)
        ]

        def copy() -> None:
            for view, tensor in zip(views, tensors, strict=True):
                view.copy_(tensor, non_blocking=True)

        self.launch(copy)
        event = self.record_event()
        self.staging.mark(event)
        return _Copies(self, event, buffers, views)

    def count_wait(self, queued_behind: bool) -> None:
        self.waits += 1
        self.idle_waits += not queued_behind

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)


class _Passed:
    def passed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class _Here:
    """A Download of tensors that are on the host; nothing is launched before it is read."""

    def __init__(self, device: Device, tensors: Sequence[torch.Tensor]) -> None:
        self._device, self._tensors = device, tensors

    def read(self, then: Callable[[list[np.ndarray]], Any], *, queued_behind: bool) -> Any:
        self._device.count_wait(queued_behind)
        return then([tensor.numpy() for tensor in self._tensors])


class HostDevice(Device):
    """The CPU: work is done when it is launched."""

    graphs = False
    flights = 1

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))

    def launch(self, work: Work) -> None:
        work()

    def record_event(self) -> Event:
        return _Passed()

    def record(self, work: Work) -> Work:
        return work

    def finish(self) -> None:
        pass

    def give_back(self) -> None:
        pass  # pages are large enough for the C library to return them by itself

    def upload(self, values: Sequence[int] | np.ndarray, dtype: type = np.int32) -> torch.Tensor:
        return torch.from_numpy(np.array(values, dtype=dtype))  # a copy: the caller's may change

    def download(self, tensors: Sequence[torch.Tensor]) -> Download:
        return _Here(self, tensors)


class CudaDevice(Device):
    """A stream of the engine's own, ordered with the caller's around each call, and CUDA graphs.

    Has not run on a GPU yet.
    """

    flights = 2

    def __init__(self, device: torch.device, *, graphs: bool) -> None:
        super().__init__(device, lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
        self.graphs = graphs
        self.stream = torch.cuda.Stream(device)
        self._pool: Any = None  # memory that all recorded graphs share: only one runs at a time
        self._newest: Any = None  # the pool's last graph: PyTorch opens none again whose graphs are all gone

    def launch(self, work: Work) -> None:
        work()

    def record_event(self) -> Event:
        return _CudaEvent(self.stream)

    def record(self, work: Work) -> Work:
        # Kernels are compiled, and libraries set up, outside the capture.
        for _ in range(2):
            work()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Not `with torch.cuda.graph(...)`, which waits for the device and collects garbage each time. Other
        # threads (a trainer's data loader) may go on allocating during the capture.
        with _no_garbage_collection():  # which may destroy another engine's events and graphs
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                self._pool = None  # it may be without a graph now
                with contextlib.suppress(RuntimeError):  # not in the place of what went wrong first
                    graph.capture_end()
                raise
            graph.capture_end()
        self._newest = graph
        return graph.replay

    def finish(self) -> None:
        self.stream.synchronize()

    def give_back(self) -> None:
        self._pool = self._newest = None  # the pool goes with its last graph; another is made for the next
        torch.cuda.empty_cache()

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        caller = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(caller)
        try:
            with torch.cuda.stream(self.stream):
                yield
        except BaseException:
            with contextlib.suppress(RuntimeError):  # a lost context has been told of
                caller.wait_stream(self.stream)
            raise
        caller.wait_stream(self.stream)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


class _CudaEvent:
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._event = torch.cuda.Event()
        self._event.record(stream)

    def passed(self) -> bool:
        return self._event.query()

    def wait(self) -> None:
        self._event.synchronize()


@contextlib.contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Without gradients; what is made within can be written later, even if the caller is in inference mode
    now and not then.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def open_device(name: str, *, graphs: bool) -> Device:
    """The queue of torch device `name`."""
    device = torch.device(name)
    if device.type == "cuda" and device.index is None:  # that of now, whatever is current at a later call
        device = torch.device("cuda", torch.cuda.current_device())
    return CudaDevice(device, graphs=graphs) if device.type == "cuda" else HostDevice(device)
