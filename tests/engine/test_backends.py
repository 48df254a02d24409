"""The backend of each op, as an engine is asked for it and as it reports it."""

import pytest

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError
from elastic_decode.kernels.registry import OPS


def engine(**options) -> Engine:
    config = EngineConfig(dtype="float32", max_batch=2, max_model_len=64, kv_memory="4MiB", **options)
    return Engine.from_pretrained(tiny_model_path(), config)


def test_what_is_chosen_is_reported_and_used():
    greedy, budget = SamplingParams(temperature=0), Budget(4, 3)
    default = engine()
    assert default.backends == dict.fromkeys(OPS, "cpu")
    mixed = engine(backend={"rms_norm": "reference", "rope": "reference"})
    assert mixed.backends == dict.fromkeys(OPS, "cpu") | {"rms_norm": "reference", "rope": "reference"}
    assert mixed._loop._decoder._rms_norm.__module__.endswith("rms_norm.reference")
    found = [
        e.generate(["3 5 2 = 16"], budget=budget, sampling=greedy)[0].completions[0] for e in (default, mixed)
    ]
    assert found[0].token_ids == found[1].token_ids


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "triton"}, "means 'triton' for"),
        ({"backend": {"linear": "cuda"}}, "means 'cuda' for linear"),
        ({"kv_dtype": "float8_e4m3fn"}, "the CPU kernels have no such KV cache"),
        ({"kv_dtype": "float8_e4m3fn", "backend": {"rope": "reference"}}, "the CPU kernels have no such"),
    ],
)
def test_what_cannot_run_is_refused(options, message, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ConfigError, match=message):
        engine(**options)


def test_float8_pages_on_the_reference():
    kept = engine(kv_dtype="float8_e4m3fn", backend={"rope": "reference", "paged_attention": "reference"})
    (generation,) = kept.generate(["3 5 2 = 16"], budget=Budget(4, 3))
    assert 1 <= len(generation.completions[0].token_ids) <= 10
