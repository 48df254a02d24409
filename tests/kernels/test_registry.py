"""Which backend a choice means, what is refused, and that nothing takes the place of what cannot run."""

from pathlib import Path

import pytest

from elastic_decode.kernels import registry

OPS = registry.OPS


def test_auto():
    assert registry.choose("auto", "cpu") == dict.fromkeys(OPS, "cpu")
    assert registry.choose("auto", "cuda") == dict.fromkeys(OPS, "triton")
    assert registry.choose("auto", "cpu", batch_invariant=False) == dict.fromkeys(OPS, "cpu")
    loose = registry.choose("auto", "cuda", batch_invariant=False)
    assert loose == dict.fromkeys(OPS, "triton") | {"linear": "torch"}


def test_a_name_stands_for_every_op():
    for name in ("reference", "cpu", "triton"):
        assert registry.choose(name, "cpu") == dict.fromkeys(OPS, name)


def test_a_name_stands_for_the_ops_it_has():
    for name, ops in registry.CHOSEN_FOR.items():
        chosen = registry.choose(name, "cuda")
        assert {op for op, backend in chosen.items() if backend == name} == set(OPS) & set(ops)
        assert chosen["paged_attention"] == name
        assert set(chosen.values()) == {name, "triton"}


def test_cuda_stands_for_all_that_is_written_in_cuda():
    written = {path.parent.name for path in Path(registry.__file__).parent.glob("*/cuda.py")}
    assert written <= set(registry.CHOSEN_FOR["cuda"])


def test_a_mapping_overrides_auto():
    mapping = {"linear": "torch", "rope": "reference", "sample": "auto"}
    assert registry.choose(mapping, "cpu") == dict.fromkeys(OPS, "cpu") | {
        "linear": "torch",
        "rope": "reference",
    }
    assert registry.choose({}, "cuda") == registry.choose("auto", "cuda")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("quantum", "unknown backend 'quantum'"),
        ("torch", "it has some ops only"),
        ({"liner": "cpu"}, "unknown op 'liner'"),
        ({"linear": "gpu"}, "unknown backend 'gpu' for linear"),
        (7, "a name or a mapping"),
    ],
)
def test_unknown_names_raise(choice, message):
    with pytest.raises(ValueError, match=message):
        registry.resolve(choice, "cpu")


def test_unknown_device():
    with pytest.raises(ValueError, match="no kernels for device type 'mps'"):
        registry.resolve("auto", "mps")


def test_what_runs_is_given():
    assert registry.resolve("auto", "cpu") == dict.fromkeys(OPS, "cpu")
    assert registry.resolve("reference", "cpu") == dict.fromkeys(OPS, "reference")
    mixed = registry.resolve({"linear": "reference"}, "cpu")
    assert (mixed["linear"], mixed["rope"]) == ("reference", "cpu")


def test_what_cannot_run_raises(monkeypatch):
    with pytest.raises(RuntimeError, match=r"means 'cuda' for linear on cpu.*no cuda implementation.*cpu"):
        registry.resolve({"linear": "cuda"}, "cpu")
    for backend in ("reference", "cpu"):
        with pytest.raises(RuntimeError, match="works on CPU tensors, not on cuda tensors"):
            registry.resolve(backend, "cuda")
    monkeypatch.setattr(registry, "why_unavailable", lambda op, backend: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="works on CUDA tensors, not on cpu tensors"):
        registry.resolve("triton", "cpu")
    assert set(registry.resolve("triton", "cuda").values()) == {"triton"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert set(registry.resolve("triton", "cpu").values()) == {"triton"}


def test_a_backend_that_depends_on_the_batch_is_asked_for(monkeypatch):
    monkeypatch.setattr(registry, "why_unavailable", lambda op, backend: None)
    for choice, device in (({"linear": "torch"}, "cpu"), ("flashinfer", "cuda")):
        with pytest.raises(ValueError, match="results depend on the batch"):
            registry.resolve(choice, device)
        registry.resolve(choice, device, batch_invariant=False)


def test_why_not_on_says_what_is_missing_first():
    assert "no flashinfer implementation" in str(registry.why_not_on("rope", "flashinfer", "cpu"))
