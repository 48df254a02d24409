"""vLLM's offline LLM with dummy weights."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import shapes

from peers import Setting

NAME = "vLLM"


def why_unavailable(setting: Setting) -> str:
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed"
    return "" if setting.device == "cuda" else "this adapter runs vLLM on a GPU only"


def seconds(llm: Any, prompts: list[list[int]], new: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
    begun = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    took = time.perf_counter() - begun
    if any(len(output.outputs[0].token_ids) != new for output in outputs):
        raise RuntimeError("vLLM ended a row early")
    return took


def decode(setting: Setting) -> Iterator[tuple[int, float]]:
    """The time of `new` tokens less that of one: prefill cancels."""
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        config = {**shapes.hf_config(setting.shape, setting.length), "torch_dtype": setting.dtype}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=setting.dtype,
            max_model_len=setting.length,
            max_num_seqs=max(setting.batches),
            enable_prefix_caching=False,
            gpu_memory_utilization=0.8,
        )
        for batch in setting.batches:
            prompts = setting.prompts(batch)
            seconds(llm, prompts, setting.new)
            whole, first = (seconds(llm, prompts, new) for new in (setting.new, 1))
            yield batch, batch * (setting.new - 1) / (whole - first)
