"""`generate_batch` of transformers: continuous batching over a paged cache, as an engine does it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import harness
import torch

from peers import Setting

NAME = "transformers continuous batching"
PAGE = 256  # tokens of a page, its default


def why_unavailable(setting: Setting) -> str:
    import inspect

    from transformers import Qwen2ForCausalLM

    method = getattr(Qwen2ForCausalLM, "generate_batch", None)
    if method is None or "record_timestamps" not in inspect.signature(method).parameters:
        return "this transformers has no generate_batch that records when tokens came"
    return ""


def run(model: Any, prompts: list[list[int]], generation: Any, limits: Any) -> float:
    results = model.generate_batch(
        prompts,
        generation_config=generation,
        continuous_batching_config=limits,
        record_timestamps=True,
    )
    times = [result.timestamps for result in results.values()]
    short = [len(each or ()) for each in times if len(each or ()) != generation.max_new_tokens]
    if short or len(times) != len(prompts):
        errors = {str(result.error) for result in results.values() if result.error}
        raise RuntimeError(
            f"generate_batch gave {len(times)} results, lengths {short}: {errors or 'no error'}"
        )
    # The tokens of one step carry nearly the same time: from the step that gave the last row its first one.
    start, end = max(each[0] for each in times), max(each[-1] for each in times)
    return sum(at > start for each in times for at in each) / (end - start)


def decode(setting: Setting) -> Iterator[tuple[int, float]]:
    from transformers.generation import ContinuousBatchingConfig, GenerationConfig

    dtype = getattr(torch, setting.dtype)
    model = harness.random_qwen2(setting.shape, dtype, setting.device, setting.length)
    generation = GenerationConfig(
        max_new_tokens=setting.new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    for batch in setting.batches:
        prompts = setting.prompts(batch)
        # Else it fills nearly all memory, again in every call. All else is its own choice, CUDA graphs too.
        limits = ContinuousBatchingConfig(
            num_blocks=batch * (2 + setting.length // PAGE),
            max_batch_tokens=min(8192, batch * setting.prompt),
        )
        run(model, prompts, generation, limits)
        yield batch, run(model, prompts, generation, limits)
