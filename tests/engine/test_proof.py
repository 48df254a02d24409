"""The check before an engine uses a device: raised, remembered, and done again when anything changes."""

import contextlib
import json
import os

import pytest
import torch

from elastic_decode import Engine, EngineConfig
from elastic_decode.assets import tiny_model_path
from elastic_decode.config import ModelConfig
from elastic_decode.engine import build, proof
from elastic_decode.engine.proof import USED, cache_folder, prove, shapes_of
from elastic_decode.errors import BackendUnproven
from elastic_decode.kernels import registry, selfcheck

CPU = torch.device("cpu")
BACKENDS = dict.fromkeys(registry.OPS, "cpu")


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.setenv("ELASTIC_DECODE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "proofs"


@pytest.fixture
def checked(monkeypatch):
    """The (op, backend) checked, in order; the checks pass unless `broken` says otherwise."""
    calls = []

    def check(op, backend, shapes, device, *, batch_invariant):
        calls.append((op, backend))
        worst = selfcheck.Finding("decode, bits of 257 keys alone", float(op in broken), 0.0)
        return selfcheck.Outcome(op, backend, op not in broken, worst, broken.get(op), 3, 0.01)

    broken: dict[str, str | None] = {}
    check.broken = broken
    check.calls = calls
    monkeypatch.setattr(selfcheck, "check", check)
    return check


@pytest.fixture
def shapes():
    model = ModelConfig.from_hf(tiny_model_path())
    return shapes_of(model, torch.float32, torch.float32, 16)


def run(shapes, backends=BACKENDS, **options):
    return prove(backends, shapes, CPU, **{"batch_invariant": True, **options})


def test_the_shapes_are_those_of_the_weights(shapes):
    engine = Engine.from_pretrained(tiny_model_path(), EngineConfig(kv_memory="4MiB", max_model_len=64))
    weights = engine._loop._decoder.weights
    layer = weights.layers[0]
    used = {tuple(each.shape) for each in (layer.qkv, layer.o, layer.gate_up, layer.down, weights.lm_head)}
    assert {(m.outputs, m.inputs) for m in shapes.matrices} == used
    assert shapes.qk_norm == (layer.q_norm is not None)
    assert [m.bias for m in shapes.matrices] == [
        bias is not None for bias in (layer.qkv_bias, layer.o_bias, layer.gate_up_bias, layer.down_bias)
    ] + [False]
    assert [m.float32_out for m in shapes.matrices] == [False] * 4 + [True]


def test_it_is_true_of_the_real_checks(folder, shapes):
    outcomes = run(shapes)
    assert [outcome.op for outcome in outcomes] == list(USED)
    assert run(shapes) == []


def test_done_once_then_remembered(folder, checked, shapes):
    assert len(run(shapes)) == len(USED)
    assert checked.calls == [(op, "cpu") for op in USED]
    assert run(shapes) == []
    assert len(checked.calls) == len(USED)
    (file,) = folder.iterdir()
    assert {entry["op"] for entry in json.loads(file.read_text())["proven"]} == set(USED)


def test_done_again_when_anything_changes(folder, checked, shapes, monkeypatch):
    run(shapes)

    def done_again(*arguments, **options):
        before = len(checked.calls)
        run(*arguments, **options)
        return len(checked.calls) > before

    assert not done_again(shapes)
    assert done_again(shapes._replace(page_size=32))
    assert done_again(shapes._replace(kv_dtype=torch.bfloat16))
    assert done_again(shapes, batch_invariant=False)
    assert done_again(shapes, BACKENDS | {"rope": "reference"})
    assert not done_again(shapes, BACKENDS | {"sample": "reference"}), "an engine does not use it"
    for name in ("device_name", "source_hash"):
        with monkeypatch.context() as patch:
            patch.setattr(proof, name, lambda *_: "another")
            assert done_again(shapes), name
    with monkeypatch.context() as patch:
        patch.setattr(proof, "_version", lambda package: "9.9")
        assert done_again(shapes)
    assert not done_again(shapes)


@pytest.mark.parametrize("damage", ["", "{", "null", "[]", '{"key": {}}', "half", "less"])
def test_a_damaged_memory_is_none(folder, checked, shapes, damage):
    run(shapes)
    (file,) = folder.iterdir()
    text = file.read_text()
    if damage == "less":
        found = json.loads(text)
        found["proven"].pop()
        damage = json.dumps(found)
    file.write_text(text[: len(text) // 2] if damage == "half" else damage)
    assert len(run(shapes)) == len(USED)
    assert file.read_text() == text
    assert run(shapes) == []


def test_a_wrong_op_raises_and_is_not_remembered(folder, checked, shapes):
    checked.broken["paged_attention"] = None
    with pytest.raises(BackendUnproven) as raised:
        run(shapes)
    message = str(raised.value)
    for part in (
        "on the CPU (cpu)",
        "paged_attention on backend 'cpu' disagrees with its reference",
        "decode, bits of 257 keys alone: error 1, bound 0",
        "EngineConfig(backend={'paged_attention': ...}) (here there are: paged_attention: reference",
        "elastic-decode info --check",
    ):
        assert part in message
    assert not folder.exists() or not list(folder.iterdir())
    checked.broken.clear()
    assert len(run(shapes)) == len(USED)


def test_an_op_that_loses_the_context_is_still_named(folder, checked, shapes, monkeypatch):
    """After an illegal access every further call of CUDA raises."""

    def raises():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    checked.broken["rope"] = "AcceleratorError: CUDA error: an illegal memory access was encountered"
    monkeypatch.setattr(torch.cuda, "empty_cache", raises)
    monkeypatch.setattr(proof, "on_device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(proof, "device_name", lambda device: "a GPU")
    monkeypatch.setattr(proof, "_key", lambda *about: {"backends": dict.fromkeys(USED, "triton")})
    with pytest.raises(BackendUnproven, match=r"rope on backend 'triton' could not be checked"):
        prove(dict.fromkeys(USED, "triton"), shapes, torch.device("cuda", 0), batch_invariant=True)


def test_what_cannot_be_checked_is_unproven_too(folder, checked, shapes):
    checked.broken["linear"] = "OutOfMemoryError: 3 GiB"
    with pytest.raises(BackendUnproven, match="linear on backend 'cpu' could not be checked: OutOfMemory"):
        run(shapes)


def test_a_folder_that_cannot_be_written_is_said(checked, shapes, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ELASTIC_DECODE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot be remembered.*ELASTIC_DECODE_CACHE"):
        run(shapes)


def test_nothing_half_written_is_left(folder, checked, shapes, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.warns(UserWarning, match="disk full"):
        run(shapes)
    assert not list(folder.iterdir())


def test_where_it_is_remembered(monkeypatch, tmp_path):
    monkeypatch.setenv("ELASTIC_DECODE_CACHE", "/a/b")
    assert str(cache_folder()) == "/a/b"
    monkeypatch.delenv("ELASTIC_DECODE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert str(cache_folder()) == "/x/elastic_decode"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder().parts[-2:] == (".cache", "elastic_decode")


def test_an_engine_on_the_cpu_trusts_its_own_kernels(folder, checked):
    Engine.from_pretrained(tiny_model_path(), EngineConfig(kv_memory="4MiB", max_model_len=64))
    assert checked.calls == []


def test_an_engine_elsewhere_asks_first(folder, checked, monkeypatch):
    """As on a GPU: the device only says that it is not the CPU."""
    monkeypatch.setattr(build, "must_be_proven", lambda device: True)
    config = EngineConfig(kv_memory="4MiB", max_model_len=64)
    Engine.from_pretrained(tiny_model_path(), config)
    assert checked.calls == [(op, "cpu") for op in USED]
    Engine.from_pretrained(tiny_model_path(), config)
    assert len(checked.calls) == len(USED)
    checked.broken["draw"] = None
    with pytest.raises(BackendUnproven, match="draw on backend 'cpu'"):
        Engine.from_pretrained(tiny_model_path(), EngineConfig(kv_memory="4MiB", page_size=8))
