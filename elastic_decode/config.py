"""Configuration: frozen, keyword-only, unknown keys raise."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from elastic_decode.errors import ConfigError
from elastic_decode.kernels import registry
from elastic_decode.model_config import ModelConfig, RopeConfig

__all__ = ["EngineConfig", "ModelConfig", "RopeConfig", "parse_size"]

DTYPES = ("auto", "float32", "bfloat16", "float16")
KV_DTYPES = (*DTYPES, "float8_e4m3fn")

_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]i?B?|B)?\s*$", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_size(value: int | str, name: str = "size") -> int:
    """Bytes of `2GiB`, `512 MB`, `4096` or an int. Raises ConfigError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value <= 0:
            raise ConfigError(f"{name} must be positive, got {value}")
        return value
    match = _SIZE.match(value) if isinstance(value, str) else None
    if match is None:
        raise ConfigError(f"{name} must be a number of bytes or a string like '2GiB', got {value!r}")
    unit = (match.group(2) or "").lower().removesuffix("b") or ""
    size = int(float(match.group(1)) * _UNITS[unit])
    if size <= 0:
        raise ConfigError(f"{name} must be positive, got {value!r}")
    return size


class _FrozenDict(dict[str, str]):
    """A mapping that a frozen configuration may hold: it cannot change, it has a hash, it can be pickled."""

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("an EngineConfig is frozen; make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (dict(self),)


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How the engine runs; nothing here changes what is decoded except `dtype` and `kv_dtype`.

    device: "cpu" or "cuda[:i]". dtype: "auto" takes the checkpoint's (float16 becomes bfloat16 on the CPU).
    kv_dtype: of the KV pages, "auto" is dtype; "float8_e4m3fn" has no scales: values saturate at 448; not on
    the CPU's kernels.
    max_batch: rows decoded at once. max_model_len: prompt + output positions of one sequence; None takes the
    model's. kv_memory: bytes of KV pages. prefill_tokens: prompt tokens computed between two horizons.
    horizon: decode steps launched at a time; on a GPU 1 shows each token as soon as it is drawn, 8 to 32 are
    for throughput. cuda_graphs: replay recorded steps instead of launching their kernels one by one.
    prefix_cache: reuse KV pages of equal prompt beginnings; None = on, but off for `Engine.from_model`.
    backend: which kernels: "auto" (the CPU's C++ on the CPU, Triton on CUDA), "reference", "cpu", "triton",
    "cuda" or "flashinfer" (each with Triton for the ops it has not), or a mapping of ops to backends, where
    what is not named is auto; nothing takes the place of one that cannot run. `Engine.backends` tells.
    batch_invariant: the CPU kernels always are; False lets "auto" take PyTorch's matrix products on CUDA, and
    allows backends whose results depend on what else is in the batch.
    """

    device: str = "cpu"
    dtype: str = "auto"
    kv_dtype: str = "auto"
    max_batch: int = 32
    max_model_len: int | None = None
    page_size: int = 16
    kv_memory: int | str = "2GiB"
    backend: str | Mapping[str, str] = "auto"
    horizon: int = 1
    cuda_graphs: bool = True
    prefill_tokens: int = 512
    prefix_cache: bool | None = None
    batch_invariant: bool = True

    def __post_init__(self) -> None:
        for name in ("max_batch", "page_size", "horizon", "prefill_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"EngineConfig.{name} must be an int >= 1, got {value!r}")
        for name in ("cuda_graphs", "batch_invariant", "prefix_cache"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name != "prefix_cache"):
                raise ConfigError(f"EngineConfig.{name} must be True or False, got {value!r}")
        if self.max_model_len is not None and self.max_model_len < 2:
            raise ConfigError(f"EngineConfig.max_model_len must be >= 2 or None, got {self.max_model_len}")
        try:
            registry.check_choice(self.backend)
        except ValueError as error:
            raise ConfigError(f"EngineConfig.backend: {error}") from None
        if isinstance(self.backend, Mapping):
            object.__setattr__(self, "backend", _FrozenDict(self.backend))
        for name, dtypes in (("dtype", DTYPES), ("kv_dtype", KV_DTYPES)):
            if getattr(self, name) not in dtypes:
                raise ConfigError(
                    f"EngineConfig.{name} must be one of {', '.join(dtypes)}, got {getattr(self, name)!r}"
                )
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            raise ConfigError(f"EngineConfig.device must be 'cpu' or 'cuda[:index]', got {self.device!r}")
        parse_size(self.kv_memory, "EngineConfig.kv_memory")
