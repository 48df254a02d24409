"""What only a GPU can show, each test also rehearsed on the CPU.

`target` is a GPU ("gpu"), or in rehearsal the CPU behind the engine tests' late device, which runs its work
out of step with the host as a GPU does. A rehearsal shows that the test is right, not that the GPU is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import elastic_decode.engine.build as engine_build
from elastic_decode import Engine, EngineConfig

TESTS = Path(__file__).resolve().parent.parent


def load(path: str) -> ModuleType:
    """A test module's helpers; tests are no package."""
    spec = importlib.util.spec_from_file_location("helpers_" + path.replace("/", "_")[:-3], TESTS / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


parity = load("engine/test_hf_parity.py")
in_flight = load("engine/test_in_flight.py")
TOKENIZER = load("engine/conftest.py").make_byte_tokenizer()


@dataclass
class Target:
    """Where a test's engines run. `pick(gpu, rehearsal)`: a size."""

    real: bool
    patch: pytest.MonkeyPatch

    @property
    def device(self) -> str:
        return "cuda" if self.real else "cpu"

    def pick(self, gpu: Any, rehearsal: Any) -> Any:
        return gpu if self.real else rehearsal

    def engine(self, model: Any, *, fed: Collection[str] = (), **options: Any) -> Engine:
        """An engine over a Hugging Face module."""
        options = {"dtype": "float32", "kv_memory": "64MiB", "max_model_len": 128, **options}
        if not self.real:

            def late(name: str, *, graphs: bool) -> Any:
                return in_flight.LateDevice(0, graphs=graphs)

            self.patch.setattr(engine_build, "open_device", late)
        config = EngineConfig(device=self.device, **options)
        return Engine.from_model(model, TOKENIZER, config, fed=fed)

    @contextmanager
    def waits_forbidden(self) -> Iterator[None]:
        """Within, PyTorch raises where it would wait for the GPU."""
        if not self.real:
            yield
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(params=[pytest.param("gpu", marks=pytest.mark.gpu), "rehearsal"])
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Target:
    return Target(request.param == "gpu", monkeypatch)


@pytest.fixture(scope="session")
def helpers() -> ModuleType:
    """tests/engine/test_hf_parity.py: random models, prompts, greedy tokens of `generate`."""
    return parity


@pytest.fixture(scope="session")
def flights() -> ModuleType:
    """tests/engine/test_in_flight.py: requests of every kind, and what can be compared of completions."""
    return in_flight


@pytest.fixture(scope="session")
def model(helpers: ModuleType) -> Any:
    return helpers.random_model("qwen2", {})
