"""This project's engine, under the budget that forces a close half way."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from decode_window import decode_window, make_engine, random_weights, warm

from elastic_decode import Budget, EngineConfig
from peers import Setting

NAME = "elastic_decode"
HORIZON = 32


def why_unavailable(setting: Setting) -> str:
    from elastic_decode.kernels import registry

    try:
        registry.resolve("auto", setting.device)
    except RuntimeError as error:
        return str(error)
    return ""


def decode(setting: Setting) -> Iterator[tuple[int, float]]:
    weights = random_weights(setting.shape, getattr(torch, setting.dtype), setting.device, setting.length)
    think = setting.new // 2
    policy = Budget(think=think, solve=setting.new - think - 1)
    for batch in setting.batches:
        a_token = 2 * sum(layer.qkv.shape[0] for layer in weights.layers) * weights.dtype.itemsize
        config = EngineConfig(
            device=setting.device,
            dtype=setting.dtype,
            max_batch=batch,
            max_model_len=setting.length,
            kv_memory=batch * (setting.length + 32) * a_token + (1 << 20),  # more than enough
            prefill_tokens=min(8192, setting.prompt * batch),
            horizon=min(HORIZON, max(1, setting.new // 8)),
        )
        with make_engine(setting.shape, weights, config) as engine:
            prompts = setting.prompts(batch)
            warm(engine, batch, setting.prompt + setting.new)
            yield batch, decode_window(engine, prompts, setting.new, policy).tokens_per_s
