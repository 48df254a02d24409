"""EngineConfig: what it refuses, and that it stays as it was made."""

import copy
import dataclasses
import json
import pickle

import pytest

from elastic_decode.config import EngineConfig
from elastic_decode.errors import ConfigError


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("quantum", "EngineConfig.backend: unknown backend 'quantum'; a name for all ops is auto, reference"),
        ("torch", "it has some ops only, name them: {op: 'torch'}"),
        ({"liner": "cpu"}, "unknown op 'liner'; the ops are linear"),
        ({"linear": "fast"}, "unknown backend 'fast' for linear"),
        (None, "a name or a mapping"),
        (["cpu"], "a name or a mapping"),
    ],
)
def test_backends_are_checked(backend, message):
    with pytest.raises(ConfigError) as raised:
        EngineConfig(backend=backend)
    assert message in str(raised.value)


def test_a_mapping_of_backends_is_frozen():
    mine = {"linear": "torch"}
    config = EngineConfig(backend=mine)
    mine["linear"] = "cpu"
    assert config.backend == {"linear": "torch"}
    with pytest.raises(TypeError, match="frozen"):
        config.backend["linear"] = "cpu"
    for change in (lambda b: b.update(rope="cpu"), lambda b: b.clear(), lambda b: b.pop("linear")):
        with pytest.raises(TypeError, match="frozen"):
            change(config.backend)
    assert hash(config) == hash(EngineConfig(backend={"linear": "torch"}))


def test_copies_of_a_mapping_of_backends():
    config = EngineConfig(backend={"linear": "torch"}, batch_invariant=False)
    for other in (pickle.loads(pickle.dumps(config)), copy.deepcopy(config), dataclasses.replace(config)):
        assert other == config
    assert json.loads(json.dumps(dataclasses.asdict(config)))["backend"] == {"linear": "torch"}


def test_dtypes():
    assert EngineConfig(kv_dtype="float8_e4m3fn").kv_dtype == "float8_e4m3fn"
    for name, value in (("dtype", "float8_e4m3fn"), ("kv_dtype", "int8")):
        with pytest.raises(ConfigError, match=f"EngineConfig.{name} must be one of auto, float32.*{value}"):
            EngineConfig(**{name: value})


@pytest.mark.parametrize("name", ["cuda_graphs", "batch_invariant", "prefix_cache"])
def test_a_word_is_no_truth_value(name):
    with pytest.raises(ConfigError, match=f"EngineConfig.{name} must be True or False, got 'no'"):
        EngineConfig(**{name: "no"})
