"""Time of short device work: replays of a CUDA graph between events; on the CPU a clock around each call."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

Call = Callable[[], Any]
REPLAY_US = 1000.0  # a replay is at least as long, so that the events' resolution does not show
MOST_CALLS = 512  # in one graph


class Timing(NamedTuple):
    """Microseconds of one call: the median over replays and the 10th and 90th percentile."""

    us: float
    low: float
    high: float
    replays: int


def summary(samples: Sequence[float]) -> Timing:
    ordered = sorted(samples)
    last = len(ordered) - 1
    return Timing(
        statistics.median(ordered),
        ordered[round(0.1 * last)],
        ordered[round(0.9 * last)],
        len(ordered),
    )


class Replayable:
    """Calls captured in one graph, or just called on the CPU. `us()` runs all once: the time of one.

    Give calls over different inputs that together exceed the cache (`copies_for`), else the cache is timed.
    """

    def __init__(self, calls: Sequence[Call], device: torch.device) -> None:
        self._device = device
        self._calls = list(calls)
        self._graph: torch.cuda.CUDAGraph | None = None
        for call in self._calls:  # compiles, and sets libraries up, before the capture
            call()
        if device.type != "cuda":
            return
        self._capture(1)
        once = min(self.us() for _ in range(3)) * len(self._calls)
        rounds = min(math.ceil(REPLAY_US / max(once, 1.0)), max(1, MOST_CALLS // len(self._calls)))
        if rounds > 1:
            self._capture(rounds)

    def _capture(self, rounds: int) -> None:
        self._rounds = rounds
        self._graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self._graph):
            for _ in range(rounds):
                for call in self._calls:
                    call()
        self._graph.replay()
        torch.cuda.synchronize()

    def us(self) -> float:
        if self._graph is None:
            begun = time.perf_counter()
            for call in self._calls:
                call()
            return 1e6 * (time.perf_counter() - begun) / len(self._calls)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        self._graph.replay()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / (self._rounds * len(self._calls))


def measure(calls: Sequence[Call], device: torch.device, *, seconds: float = 0.1) -> Timing:
    """The time of one of `calls`, over replays that together take about `seconds`."""
    return summary(samples_in_turn([Replayable(calls, device)], seconds=seconds)[0])


def samples_in_turn(contestants: Sequence[Replayable], *, seconds: float = 0.1) -> list[list[float]]:
    """Times of each contestant, a replay of each in turn, so that a change of clock meets all alike."""
    samples: list[list[float]] = [[one.us()] for one in contestants]
    until = time.perf_counter() + seconds * len(contestants)
    while len(samples[0]) < 5 or (time.perf_counter() < until and len(samples[0]) < 1000):
        for one, into in zip(contestants, samples, strict=True):
            into.append(one.us())
    return samples


def copies_for(nbytes: float, device: torch.device) -> int:
    """How many sets of inputs of `nbytes` to go through so that none is still in the cache when its turn
    comes again.
    """
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    free, _ = torch.cuda.mem_get_info(device)
    wanted = math.ceil(3 * cache / max(nbytes, 1.0)) + 1
    return max(1, min(wanted, 64, int(0.4 * free / max(nbytes, 1.0))))


def ceilings(device: torch.device) -> tuple[float, float]:
    """(bytes/s of a device-to-device copy, read and written; flop/s of a large bfloat16 product): what this
    device gives PyTorch. Random data: a product of zeros runs faster.
    """
    on_gpu = device.type == "cuda"
    size = (2 << 30) if on_gpu else (16 << 20)
    # int16 of random bits: copied as they are
    source = torch.randint(-(2**15), 2**15, (size // 2,), dtype=torch.int16, device=device)
    seconds = 0.3 if on_gpu else 0.02
    copy = measure([partial(torch.empty_like(source).copy_, source)], device, seconds=seconds)
    edge = 8192 if on_gpu else 256
    a, b, out = (torch.randn(edge, edge, device=device).bfloat16() for _ in range(3))
    product = measure([partial(torch.mm, a, b, out=out)], device, seconds=seconds)
    return 2 * size / copy.us * 1e6, 2 * edge**3 / product.us * 1e6
