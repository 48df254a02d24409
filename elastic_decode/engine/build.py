"""The engine's parts put together: from a model's weights and a configuration to a Runner."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from elastic_decode.config import EngineConfig, ModelConfig, parse_size
from elastic_decode.delimiters import Delimiters
from elastic_decode.engine.batch_state import BatchState
from elastic_decode.engine.decode_loop import DecodeLoop
from elastic_decode.engine.delivery import Delivery
from elastic_decode.engine.device import Device, open_device, ordinary_tensors
from elastic_decode.engine.intake import Intake
from elastic_decode.engine.kv_cache import KVPages, PagePool, plan_pages
from elastic_decode.engine.output_ring import OutputRing
from elastic_decode.engine.proof import must_be_proven, prove, shapes_of
from elastic_decode.engine.runner import Runner
from elastic_decode.engine.scheduler import Scheduler
from elastic_decode.errors import ConfigError
from elastic_decode.kernels import registry
from elastic_decode.models.decoder import Decoder
from elastic_decode.models.layout import Weights
from elastic_decode.models.weights import choose_dtype
from elastic_decode.vocabulary import vocabulary_bytes


def check_device(name: str) -> None:
    """Raises ConfigError where torch has no such device here."""
    device = torch.device(name)
    if device.type != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError(f"device {name!r}: no CUDA device is available to torch here; use device='cpu'")
    if device.index is not None and device.index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(f"device {name!r}: the last that torch sees is 'cuda:{last}'")


def choose_backends(config: EngineConfig, kv_dtype: torch.dtype) -> dict[str, str]:
    """The backend of each op for `config`. Raises ConfigError where one cannot run here as configured."""
    device_type = torch.device(config.device).type
    try:
        backends = registry.resolve(config.backend, device_type, batch_invariant=config.batch_invariant)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"EngineConfig.backend: {error}") from error
    if kv_dtype == torch.float8_e4m3fn and "cpu" in (backends["rope"], backends["paged_attention"]):
        raise ConfigError(
            "EngineConfig.kv_dtype 'float8_e4m3fn': the CPU kernels have no such KV cache; use 'bfloat16' or "
            "'float32', or a GPU"
        )
    return backends


@dataclass(frozen=True, slots=True)
class Parts:
    """What an Engine holds of its inside. `max_model_len` is the resolved one."""

    runner: Runner
    intake: Intake
    loop: DecodeLoop
    pool: PagePool
    device: Device
    max_model_len: int
    backends: dict[str, str]  # op -> backend


def build(
    model: ModelConfig,
    weights: Weights,
    tokenizer: Any,
    delimiters: Delimiters,
    config: EngineConfig,
    *,
    prefix_cache: bool,
) -> Parts:
    """Allocate pages and rows for `config` and connect everything. Raises ConfigError where the sizes cannot
    work, BackendUnproven where an op gives wrong results on this GPU.
    """
    device = open_device(config.device, graphs=config.cuda_graphs)
    # What is made here belongs to the engine's queue, and the weights are there before it reads them,
    # whatever stream the first call comes from.
    with ordinary_tensors(), device.at_work():
        return _build(model, weights, tokenizer, delimiters, config, device, prefix_cache=prefix_cache)


def _build(
    model: ModelConfig,
    weights: Weights,
    tokenizer: Any,
    delimiters: Delimiters,
    config: EngineConfig,
    device: Device,
    *,
    prefix_cache: bool,
) -> Parts:
    dtype_name = str(weights.dtype).removeprefix("torch.")
    kv_dtype = choose_dtype(config.kv_dtype, dtype_name, device.device)
    backends = choose_backends(config, kv_dtype)
    if must_be_proven(device.device):
        shapes = shapes_of(model, weights.dtype, kv_dtype, config.page_size)
        prove(backends, shapes, device.device, batch_invariant=config.batch_invariant)
    num_pages, max_model_len = plan_pages(
        model,
        page_size=config.page_size,
        dtype=kv_dtype,
        kv_bytes=parse_size(config.kv_memory, "EngineConfig.kv_memory"),
        max_batch=config.max_batch,
        max_model_len=config.max_model_len,
        index_prefixes=prefix_cache,
    )
    pool = PagePool(num_pages, config.page_size, index_prefixes=prefix_cache)
    kv_pages = KVPages(model, num_pages=num_pages, page_size=config.page_size, dtype=kv_dtype, device=device)
    batch = BatchState(
        num_slots=config.max_batch,
        max_pages=pool.pages_for(max_model_len),
        vocab_size=model.vocab_size,
        device=device,
    )
    ring = OutputRing(length=config.horizon, width=config.max_batch, device=device)
    decoder = Decoder(model, weights, backend=backends, max_positions=max_model_len)
    scheduler = Scheduler(pool, kv_pages, batch, prefill_tokens=config.prefill_tokens)
    loop = DecodeLoop(decoder, kv_pages, pool, batch, ring, device, backends=backends)
    intake = Intake(
        tokenizer=tokenizer,
        delimiters=delimiters,
        vocabulary=vocabulary_bytes(tokenizer, model.vocab_size),
        vocab_size=model.vocab_size,
        max_model_len=max_model_len,
        page_size=config.page_size,
        num_pages=num_pages,
    )
    runner = Runner(
        scheduler=scheduler,
        loop=loop,
        batch=batch,
        intake=intake,
        delivery=Delivery(tokenizer),
        device=device,
        horizon=config.horizon,
    )
    return Parts(runner, intake, loop, pool, device, max_model_len, backends)
