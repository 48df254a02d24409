"""`generate` of transformers with a static cache, compiled (on a GPU: replayed as CUDA graphs)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import harness
import torch
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from peers import Setting

NAME = "transformers generate, static cache, compiled"


def why_unavailable(setting: Setting) -> str:
    return ""


class Clock(StoppingCriteria):
    """Stops nothing; notes when the first new token and the last were there."""

    def __init__(self, device: str) -> None:
        self._device = device
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        if not self.times:
            harness.synchronize(self._device)
        self.times.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def run(model: Any, prompts: torch.Tensor, new: int, device: str) -> float:
    clock = Clock(device)
    model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
        cache_implementation="static",
        stopping_criteria=StoppingCriteriaList([clock]),
    )
    harness.synchronize(device)
    return (new - 1) * len(prompts) / (time.perf_counter() - clock.times[0])


def decode(setting: Setting) -> Iterator[tuple[int, float]]:
    """On the CPU transformers does not compile unless told to; the static cache is used all the same."""
    dtype = getattr(torch, setting.dtype)
    model = harness.random_qwen2(setting.shape, dtype, setting.device, setting.length)
    for batch in setting.batches:
        torch.compiler.reset()  # a batch size compiles anew; the last one's graphs only take memory
        prompts = torch.tensor(setting.prompts(batch), device=setting.device)
        for _ in range(2):  # the same lengths: the static cache is as long, so nothing compiles later
            run(model, prompts, setting.new, setting.device)
        yield batch, run(model, prompts, setting.new, setting.device)
