"""Loading safetensors: into the right rows, with one copy of memory, and errors that name what is wrong."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_decode.config import ModelConfig
from elastic_decode.errors import CheckpointError, ConfigError, UnsupportedModel
from elastic_decode.models import weights as module
from elastic_decode.models.layout import empty
from elastic_decode.models.weights import choose_dtype, load_checkpoint, stored_dtype

Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(make_model, tmp_path):
    """A Qwen2 checkpoint in one file."""
    make_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


def load(folder, dtype=torch.float32):
    return load_checkpoint(folder, ModelConfig.from_hf(folder), dtype)


def edit(folder, change):
    """Applies `change` to the dict of tensors in model.safetensors."""
    path = Path(folder) / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def equal(one, other):
    for a, b in zip(one.layers, other.layers, strict=True):
        for field in type(a).__slots__:
            x, y = getattr(a, field), getattr(b, field)
            assert (x is None) == (y is None)
            assert x is None or torch.equal(x, y)
    return all(torch.equal(getattr(one, f), getattr(other, f)) for f in ("embed", "lm_head", "final_norm"))


def test_fused_rows(folder):
    tensors = load_file(folder / "model.safetensors")
    weights = load(folder)
    assert (weights.dtype, weights.device.type) == (torch.float32, "cpu")
    for index, layer in enumerate(weights.layers):
        prefix = f"model.layers.{index}."
        for kind, fused in (("weight", layer.qkv), ("bias", layer.qkv_bias)):
            parts = [tensors[f"{prefix}self_attn.{p}_proj.{kind}"] for p in "qkv"]
            assert torch.equal(fused, torch.cat(parts))
        mlp = [tensors[f"{prefix}mlp.{p}_proj.weight"] for p in ("gate", "up")]
        assert torch.equal(layer.gate_up, torch.cat(mlp))
        assert torch.equal(layer.down, tensors[f"{prefix}mlp.down_proj.weight"])
        assert torch.equal(layer.post_norm, tensors[f"{prefix}post_attention_layernorm.weight"])
        assert layer.q_norm is layer.o_bias is layer.down_bias is layer.gate_up_bias is None
    assert torch.equal(weights.lm_head, tensors["lm_head.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_equals_single(tied, make_model, tmp_path):
    model = make_model("llama", attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="30KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = load(tmp_path / "one"), load(tmp_path / "many")
    assert equal(one, many)
    assert (one.lm_head is one.embed) == tied


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.bfloat16, torch.float32])
def test_dtypes(stored, wanted, folder):
    edit(folder, lambda t: t.update({name: x.to(stored) for name, x in t.items()}))
    stored_rows = load_file(folder / "model.safetensors")["model.layers.1.mlp.up_proj.weight"]
    assert torch.equal(load(folder, wanted).layers[1].gate_up[80:], stored_rows.to(wanted))
    assert stored_dtype(folder) == str(stored).removeprefix("torch.")


@pytest.mark.parametrize("shape", [(3, 5), (1024, 2048), (2**21 + 1,)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_empty(shape, dtype):
    """Memory of its own, written and freed like any tensor's, whichever pages it lies on."""
    tensor, other = empty(shape, dtype, "cpu"), empty(shape, dtype, "cpu")
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(1)
    other.fill_(2)
    assert (tensor == 1).all()
    assert tensor.data_ptr() % 64 == 0


def test_choose_dtype():
    assert choose_dtype("auto", "bfloat16", "cpu") == torch.bfloat16
    assert choose_dtype("auto", "float16", "cpu") == torch.bfloat16
    assert choose_dtype("auto", "float16", "cuda") == torch.float16
    assert choose_dtype("auto", None, "cpu") == torch.float32
    assert choose_dtype("float32", "bfloat16", "cpu") == torch.float32
    with pytest.raises(ConfigError, match="float16"):
        choose_dtype("float16", None, "cpu")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads memory from /proc")
@pytest.mark.parametrize("shards", ["10GB", "20MB"])
def test_peak_memory_is_one_copy(shards, make_model, tmp_path, monkeypatch):
    """Anonymous memory never grows by much more than the weights themselves; files are only mapped."""
    make_model("llama", vocab_size=40000, hidden_size=240).save_pretrained(tmp_path, max_shard_size=shards)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size > 70e6

    def anonymous():
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
        raise AssertionError("no RssAnon in /proc/self/status")

    seen = []
    read = module._tensor

    def watched(*args):
        tensor = read(*args)
        tensor.sum()  # touch every page of the mapped file
        seen.append(anonymous())
        return tensor

    monkeypatch.setattr(module, "_tensor", watched)
    before = anonymous()
    weights = load(tmp_path)
    seen.append(anonymous())
    assert weights.embed.shape == (40000, 240)
    assert max(seen) - before < 1.15 * size


def test_computed_buffers_and_a_tied_head_are_tolerated(make_model, tmp_path):
    make_model("llama", tie_word_embeddings=True).save_pretrained(tmp_path)
    plain = load(tmp_path)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path, add)
    assert equal(load(tmp_path), plain)
    edit(tmp_path, lambda t: t["lm_head.weight"].add_(1))
    with pytest.raises(CheckpointError, match=r"tie_word_embeddings is true, but lm_head\.weight differs"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        (lambda t: t.pop(Q0), CheckpointError, rf"lacks tensor '{Q0}'"),
        (lambda t: t.pop("lm_head.weight"), CheckpointError, "lacks tensor 'lm_head.weight'"),
        (lambda t: t.update(extra=torch.ones(2)), CheckpointError, "holds tensor 'extra'"),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": torch.ones(2)}),
            CheckpointError,
            r"model\.layers\.3\.mlp",
        ),
        (lambda t: t.update({Q0: torch.ones(48, 47)}), CheckpointError, rf"'{Q0}'.*\(48, 47\).*\(48, 48\)"),
        (
            lambda t: t.update({Q0: torch.ones(48, 48, dtype=torch.int8)}),
            UnsupportedModel,
            rf"'{Q0}'.*I8",
        ),
    ],
)
def test_wrong_tensors_are_named(change, error, named, folder):
    edit(folder, change)
    with pytest.raises(error, match=named):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_truncated_file_is_named(keep, folder):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is truncated"):
        load(folder)


@pytest.fixture
def sharded(make_model, tmp_path):
    make_model("qwen2").save_pretrained(tmp_path, max_shard_size="30KB")
    return tmp_path


def rewrite_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_errors(sharded):
    index = sharded / "model.safetensors.index.json"
    good = index.read_text()
    shards = json.loads(good)["weight_map"]
    elsewhere = next(shard for shard in shards.values() if shard != shards[Q0])
    cases = [
        (
            lambda m: m.update({Q0: elsewhere}),
            rf"places tensor '{Q0}' in {elsewhere}, which does not hold it",
        ),
        (lambda m: m.update({Q0: "absent.safetensors"}), r"absent\.safetensors is missing"),
        (lambda m: m.update({Q0: "../model.safetensors"}), r"\.\./model\.safetensors"),
        (lambda m: m.update({Q0: "pytorch_model.bin"}), r"pytorch_model\.bin"),
        (lambda m: m.update(ghost=shards[Q0]), "places tensor 'ghost'"),
        (lambda m: m.clear(), "is empty"),
    ]
    for change, named in cases:
        rewrite_index(sharded, change)
        with pytest.raises(CheckpointError, match=named):
            load(sharded)
        index.write_text(good)
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json is corrupt"):
            load(sharded)
    index.write_text(good)
    (sharded / elsewhere).unlink()
    with pytest.raises(CheckpointError, match=rf"{elsewhere} is missing"):
        load(sharded)


def test_tensor_in_two_shards(sharded):
    shards = json.loads((sharded / "model.safetensors.index.json").read_text())["weight_map"]
    other = sharded / next(shard for shard in shards.values() if shard != shards[Q0])
    save_file({**{n: t.clone() for n, t in load_file(other).items()}, Q0: torch.ones(48, 48)}, other)
    with pytest.raises(CheckpointError, match=rf"'{Q0}' is in both"):
        load(sharded)


def test_pickled_weights_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*save_pretrained"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        load(folder)
