"""The engine on Triton's kernels: whole decodes, under the interpreter on the CPU and compiled on a GPU."""

from __future__ import annotations

import os

import pytest
import torch

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.engine import decode_loop, prefix_groups
from elastic_decode.kernels import registry

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
GREEDY = SamplingParams(temperature=0)

pytestmark = pytest.mark.interpret if INTERPRETING else pytest.mark.gpu


def config(backend: str | dict[str, str], **options) -> EngineConfig:
    """On the CPU under the interpreter, else on the GPU."""
    device = "cpu" if INTERPRETING or backend == "cpu" else "cuda"
    sizes = {"max_batch": 4, "max_model_len": 512, "kv_memory": "32MiB"}
    return EngineConfig(device=device, backend=backend, dtype="float32", **{**sizes, **options})


def rows(generations) -> list:
    return [
        (c.token_ids, c.forced, c.phases, c.think_end, c.finish_reason)
        for generation in generations
        for c in generation.completions
    ]


def logprobs(generations) -> torch.Tensor:
    return torch.tensor([p for generation in generations for c in generation.completions for p in c.logprobs])


def test_greedy_tokens_equal_those_of_cpp():
    prompts = ["9 1 6 = 3", "9 3 7 = 20", "1 2 3 = 6"]
    chats = [[{"role": "user", "content": text}] for text in prompts]
    results = []
    for backend in ("cpu", "triton"):
        with Engine.from_pretrained(tiny_model_path(), config(backend)) as engine:
            assert set(engine.backends.values()) == {backend}
            results.append(engine.generate(chats, budget=Budget(think=6, solve=3), sampling=GREEDY))
    assert rows(results[0]) == rows(results[1])
    torch.testing.assert_close(logprobs(results[1]), logprobs(results[0]), atol=2e-4, rtol=0)


def test_a_shared_prefix_changes_no_bit(monkeypatch):
    """A group over a prompt longer than attention's splits, with the shared pass and without."""
    prompt = [5 + i % 90 for i in range(262)]
    backend = {"paged_attention": "triton"} if INTERPRETING else "triton"  # the others only take time
    results, grouped = [], []

    def group(sequences, page_size):
        groups = prefix_groups.group_by_prefix(sequences, page_size)
        grouped.append(max(groups.lengths) if groups else 0)
        return groups

    monkeypatch.setattr(decode_loop, "group_by_prefix", group)
    for worthwhile in (256, 10**9):
        monkeypatch.setattr(prefix_groups, "WORTHWHILE", worthwhile)
        with Engine.from_pretrained(tiny_model_path(), config(backend)) as engine:
            budget = Budget(think=1, solve=1)
            results.append(engine.generate([prompt], n=3, budget=budget, sampling=SamplingParams(seed=1)))
    assert rows(results[0]) == rows(results[1])
    assert torch.equal(logprobs(results[0]), logprobs(results[1]))
    assert set(grouped) == {0, 256}


def test_every_op_the_engine_uses_is_there():
    assert all(registry.why_unavailable(op, "triton") is None for op in registry.OPS)
