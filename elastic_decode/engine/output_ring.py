"""The output ring: where steps leave tokens and the host reads them, a ring row a step and a column a batch
row.

The device counts steps itself (`index`), so that a captured step needs no host value; the host counts along
and knows which ring rows a flight has filled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from elastic_decode.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Flight:
    """Steps that have been launched: their rows' sequences and their ring rows `first … first + steps - 1`
    (modulo the length).
    """

    sequences: list[Sequence]
    first: int
    steps: int


@dataclass(frozen=True, slots=True)
class Landed:
    """A flight's output, lists of [steps][rows]."""

    tokens: list[list[int]]
    flags: list[list[int]]
    logprobs: list[list[float]]
    sampling_logprobs: list[list[float]]


class OutputRing:
    def __init__(self, *, length: int, width: int, device: torch.device) -> None:
        self.length = length
        self.tokens = torch.zeros((length, width), dtype=torch.int32, device=device)
        self.flags = torch.zeros((length, width), dtype=torch.int32, device=device)
        self.logprobs = torch.zeros((length, width), dtype=torch.float32, device=device)
        self.sampling_logprobs = torch.zeros((length, width), dtype=torch.float32, device=device)
        self.index = torch.zeros(1, dtype=torch.int32, device=device)
        self.launched = 0  # the host's count of steps

    def advance(self) -> None:
        """The step just launched has written its row."""
        self.index.add_(1)
        self.launched += 1
        if self.launched == self.length:
            self.index.zero_()
            self.launched = 0

    def collect(self, flight: Flight) -> Landed:
        rows = (flight.first + np.arange(flight.steps)) % self.length
        width = len(flight.sequences)

        def read(tensor: torch.Tensor) -> list:
            return tensor.numpy()[rows, :width].tolist()

        return Landed(read(self.tokens), read(self.flags), read(self.logprobs), read(self.sampling_logprobs))
