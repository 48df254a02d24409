"""elastic_decode: decoding for reasoning models under separate think and solve budgets.

Exports load on first use (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_decode import budgets
    from elastic_decode.config import EngineConfig, ModelConfig
    from elastic_decode.core import (
        Budget,
        Completion,
        Generation,
        Phase,
        Request,
        SamplingParams,
        TokenEvent,
    )
    from elastic_decode.delimiters import Delimiters
    from elastic_decode.llm import Engine

__version__ = "0.1.0"

_HOMES = {
    "Engine": "llm",
    "EngineConfig": "config",
    "ModelConfig": "config",
    "Budget": "core",
    "Completion": "core",
    "Generation": "core",
    "Phase": "core",
    "Request": "core",
    "SamplingParams": "core",
    "TokenEvent": "core",
    "Delimiters": "delimiters",
}
__all__ = [
    "Budget",
    "Completion",
    "Delimiters",
    "Engine",
    "EngineConfig",
    "Generation",
    "ModelConfig",
    "Phase",
    "Request",
    "SamplingParams",
    "TokenEvent",
    "__version__",
    "budgets",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in ("budgets", "errors", "kernels"):
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
