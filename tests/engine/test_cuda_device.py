"""CudaDevice against a stand-in for PyTorch's CUDA, which keeps its rules for pools, captures and streams."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import pytest
import torch

from elastic_decode.engine.build import check_device
from elastic_decode.engine.device import CudaDevice, open_device
from elastic_decode.errors import ConfigError


class Cuda:
    """`torch.cuda`, as far as CudaDevice uses it."""

    def __init__(self) -> None:
        self.graphs_of: dict[int, int] = {}  # live graphs by pool, as the caching allocator counts them
        self.capturing = False
        self.ends = 0
        cuda = self

        class Graph:
            def __init__(self) -> None:
                self.pool: int | None = None

            def capture_begin(self, *, pool: int, capture_error_mode: str) -> None:
                # TORCH_INTERNAL_ASSERT(it->second->use_count > 0) in CUDACachingAllocator.cpp
                assert cuda.graphs_of.get(pool, 1) > 0, "a pool is opened again whose graphs are all gone"
                cuda.graphs_of[pool] = cuda.graphs_of.get(pool, 0) + 1
                self.pool, cuda.capturing = pool, True

            def capture_end(self) -> None:
                cuda.capturing = False
                cuda.ends += 1

            def replay(self) -> None:
                pass

            def __del__(self) -> None:
                if self.pool is not None:
                    cuda.graphs_of[self.pool] -= 1

        self.CUDAGraph = Graph
        self._handles = iter(range(1000))

    def graph_pool_handle(self) -> int:
        return next(self._handles)

    def empty_cache(self) -> None:
        for pool in [pool for pool, graphs in self.graphs_of.items() if graphs == 0]:
            del self.graphs_of[pool]

    def Stream(self, device: torch.device) -> Any:
        return None


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    made = Cuda()
    for name in ("CUDAGraph", "graph_pool_handle", "Stream", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, getattr(made, name))
    return made


def test_recording_goes_on_when_all_recorded_steps_were_dropped(cuda):
    """As they are when a tensor that they name was replaced by a larger one."""
    device = CudaDevice(torch.device("cuda", 0), graphs=True)
    runs = []
    for _ in range(3):
        recorded = [device.record(lambda: runs.append(cuda.capturing)) for _ in range(2)]
        assert all(recorded)
        del recorded
        gc.collect()
    assert runs == [False, False, True] * 6
    assert list(cuda.graphs_of) == [0], "one pool serves all"


def test_memory_of_recorded_steps_is_given_back_and_recording_goes_on(cuda):
    device = CudaDevice(torch.device("cuda", 0), graphs=True)
    for pool in range(3):
        recorded = [device.record(lambda: None) for _ in range(2)]
        assert cuda.graphs_of == {pool: 2}
        del recorded
        device.give_back()
        assert not cuda.graphs_of


def test_what_goes_wrong_in_a_capture_is_told_and_the_next_capture_works(cuda):
    device = CudaDevice(torch.device("cuda", 0), graphs=True)

    def fails() -> None:
        if cuda.capturing:
            raise MemoryError("in the capture")

    with pytest.raises(MemoryError, match="in the capture"):
        device.record(fails)
    assert cuda.ends == 1
    gc.collect()
    with contextlib.suppress(MemoryError):
        device.record(fails)
    gc.collect()
    assert callable(device.record(lambda: None))


def test_an_error_is_not_hidden_by_the_lost_context_it_leaves(cuda, monkeypatch):
    class Stream:
        def wait_stream(self, other: Any) -> None:
            if lost:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")

    lost: list[bool] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    device = CudaDevice(torch.device("cuda", 0), graphs=True)

    def work() -> None:
        with device.at_work():
            lost.append(True)
            raise ConfigError("the first")

    with pytest.raises(ConfigError, match="the first"):
        work()
    lost.clear()
    with pytest.raises(RuntimeError, match="illegal memory access"), device.at_work():
        lost.append(True)


def test_a_device_without_an_index_is_the_one_that_was_current(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert open_device("cuda", graphs=True).device == torch.device("cuda", 1)
    assert open_device("cuda:0", graphs=True).device == torch.device("cuda", 0)


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_device("cuda")
    check_device("cuda:1")
    with pytest.raises(ConfigError, match=r"cuda:2.*the last that torch sees is 'cuda:1'"):
        check_device("cuda:2")
