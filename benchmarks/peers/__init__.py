"""Other engines behind one interface, a file each; bench_peers.py runs them.

A peer is a module with
    NAME                              how it is called in a table
    why_unavailable(setting) -> str   why it cannot run here, in one line; empty where it can
    decode(setting) -> Iterator[tuple[int, float]]
                                      (batch, tokens/s) for each of setting.batches, as they are known

Each makes its own random weights of the shape, decodes `setting.new` tokens a row greedily from random
prompts, EOS ignored, and counts decode alone: from where every row has its first token to the end. What was
compiled or captured before is not in the time.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import shapes
import torch

NAMES = ("ours", "hf_static", "hf_continuous", "vllm_offline", "sglang_offline")


@dataclass(frozen=True)
class Setting:
    """What every peer decodes."""

    shape: str
    dtype: str
    device: str
    batches: tuple[int, ...]
    prompt: int
    new: int

    def prompts(self, batch: int) -> list[list[int]]:
        """The same for every peer."""
        vocab = shapes.SHAPES[self.shape]["vocab_size"]
        generator = torch.Generator().manual_seed(batch)
        low = min(1000, vocab // 2)
        return torch.randint(low, vocab, (batch, self.prompt), generator=generator).tolist()

    @property
    def length(self) -> int:
        """Positions of a sequence."""
        return self.prompt + self.new + 8


def peer(name: str) -> ModuleType:
    return importlib.import_module(f"peers.{name}")
