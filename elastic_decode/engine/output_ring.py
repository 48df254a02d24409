"""The output ring: where steps leave tokens and the host reads them, a ring row a step and a column a batch
row.

The device counts steps itself (`index`), so that a captured step needs no host value. Every flight begins at
row 0 and its rows are on their way to the host before the next flight's steps are enqueued.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from elastic_decode.engine.device import Device, Download
from elastic_decode.engine.sequence import Sequence
from elastic_decode.kernels.draw import make_ring


@dataclass(frozen=True, slots=True)
class Flight:
    """Steps that have been launched: a column of each belongs to one of `sequences`; their output is on its
    way to the host."""

    sequences: list[Sequence]
    steps: int
    download: Download


@dataclass(frozen=True, slots=True)
class Landed:
    """A flight's output, lists of [rows][steps]."""

    tokens: list[list[int]]
    flags: list[list[int]]
    logprobs: list[list[float]]
    sampling_logprobs: list[list[float]]


class OutputRing:
    """`length` rows: the most steps a flight may have. `width` columns: the most rows of a batch."""

    def __init__(self, *, length: int, width: int, device: Device) -> None:
        self._device = device
        self.length = length
        self.tensors = make_ring(length, width, device.device)

    def begin(self) -> None:
        """The steps launched next fill rows 0, 1, …"""
        index = self.tensors.index
        self._device.launch(lambda: index.fill_(-1))

    def end(self, sequences: list[Sequence], steps: int) -> Flight:
        """The steps launched since `begin` are a flight: start its way to the host."""
        assert steps <= self.length
        rows = [tensor[:steps] for tensor in self.tensors[:4]]
        return Flight(sequences, steps, self._device.download(rows))


def collect(flight: Flight, *, queued_behind: bool) -> Landed:
    """A flight's output; waits until it is there. See Download.read."""
    width = len(flight.sequences)

    def convert(arrays: list[np.ndarray]) -> Landed:
        return Landed(*(array[:, :width].T.tolist() for array in arrays))

    landed: Landed = flight.download.read(convert, queued_behind=queued_behind)
    return landed
