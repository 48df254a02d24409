"""SGLang's offline Engine with dummy weights."""

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

NAME = "SGLang"


def why_unavailable(setting: Setting) -> str:
    if importlib.util.find_spec("sglang") is None:
        return "sglang is not installed"
    return "" if setting.device == "cuda" else "this adapter runs SGLang on a GPU only"


def seconds(engine: Any, prompts: list[list[int]], new: int) -> float:
    sampling = {"temperature": 0.0, "max_new_tokens": new, "ignore_eos": True}
    begun = time.perf_counter()
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    took = time.perf_counter() - begun
    if any(output["meta_info"]["completion_tokens"] != new for output in outputs):
        raise RuntimeError("SGLang ended a row early")
    return took


def decode(setting: Setting) -> Iterator[tuple[int, float]]:
    """The time of `new` tokens less that of one: prefill cancels."""
    import sglang

    with tempfile.TemporaryDirectory() as folder:
        config = {**shapes.hf_config(setting.shape, setting.length), "torch_dtype": setting.dtype}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        engine = sglang.Engine(
            model_path=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=setting.dtype,
            context_length=setting.length,
            disable_radix_cache=True,
            mem_fraction_static=0.8,
            cuda_graph_max_bs=max(setting.batches),
        )
        try:
            for batch in setting.batches:
                prompts = setting.prompts(batch)
                seconds(engine, prompts, setting.new)
                whole, first = (seconds(engine, prompts, new) for new in (setting.new, 1))
                yield batch, batch * (setting.new - 1) / (whole - first)
        finally:
            engine.shutdown()
