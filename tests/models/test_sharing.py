"""A live Hugging Face module and the engine's weights are one memory, and a re-bound parameter is noticed."""

import pytest
import torch

from elastic_decode.config import ModelConfig
from elastic_decode.errors import ConfigError, UnsupportedModel, WeightsRebound
from elastic_decode.models.layout import LM_HEAD, named_tensors
from elastic_decode.models.sharing import copy_in
from elastic_decode.models.weights import load_checkpoint, share_module

FAMILIES = [
    ("qwen2", {}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("mistral", {}),
]
IDS = [3, 50, 7, 7, 21, 90]


def share(model, dtype=torch.float32):
    return share_module(model, ModelConfig.from_hf(model.config), dtype, "cpu")


def train(model, steps=1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    ids = torch.tensor([IDS])
    model.train()
    for _ in range(steps):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def hf_logits(model):
    return model(torch.tensor([IDS])).logits[0].float()


@pytest.fixture(params=FAMILIES, ids=lambda case: f"{case[0]}{len(case[1])}")
def model(request, make_model):
    family, changes = request.param
    return make_model(family, **changes)


def test_nothing_is_copied(model):
    """Every parameter lies in the decoder's tensors, and the module computes what it did."""
    before = hf_logits(model)
    pointers = {name: p.data_ptr() for name, p in model.named_parameters()}
    tied = share(model)
    assert tied.shared
    tied.verify()
    assert torch.equal(hf_logits(model), before)
    weights = tied.weights
    assert (weights.lm_head.data_ptr() == weights.embed.data_ptr()) == model.config.tie_word_embeddings
    for layer, hf in zip(weights.layers, model.model.layers, strict=True):
        attention, rows = hf.self_attn, model.config.num_attention_heads * model.config.head_dim
        assert layer.qkv.data_ptr() == attention.q_proj.weight.data_ptr()
        assert layer.qkv[rows:].data_ptr() == attention.k_proj.weight.data_ptr()
        assert layer.gate_up[80:].data_ptr() == hf.mlp.up_proj.weight.data_ptr()
        assert layer.qkv.is_contiguous()
    # What needs no fusing stays where it was.
    for name in ("model.embed_tokens.weight", "model.layers.1.self_attn.o_proj.weight", "model.norm.weight"):
        assert model.get_parameter(name).data_ptr() == pointers[name]


def test_training_in_place_is_seen(model, session, backend):
    tied = share(model)
    config = ModelConfig.from_hf(model.config)
    before = hf_logits(model)
    train(model, 2)
    tied.sync()
    after = hf_logits(model)
    assert (after - before).abs().max() > 0.1
    got = session(config, tied.weights, backend, rows=1).step([IDS])[0]
    assert (got - after).abs().max() < 2e-5 * after.abs().max()


def test_training_gives_what_it_gives_unshared(make_model):
    shared, plain = make_model("qwen2"), make_model("qwen2")
    share(shared)
    for one, other in zip(train(shared, 3).parameters(), train(plain, 3).parameters(), strict=True):
        assert torch.equal(one, other)


def test_saves_and_reloads(model, tmp_path):
    share(model)
    train(model)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(hf_logits(again), hf_logits(model))
    config = ModelConfig.from_hf(tmp_path)
    loaded, live = load_checkpoint(tmp_path, config, torch.float32), share(model).weights
    assert torch.equal(loaded.layers[2].qkv, live.layers[2].qkv)
    assert torch.equal(loaded.lm_head, live.lm_head)


def test_load_state_dict_in_place_is_seen_and_assign_raises(make_model):
    model = make_model("qwen2")
    tied = share(model)
    other = {name: torch.randn_like(t) for name, t in model.state_dict().items()}
    model.load_state_dict(other)
    tied.sync()
    assert torch.equal(tied.weights.layers[0].qkv[:48], other["model.layers.0.self_attn.q_proj.weight"])
    model.load_state_dict({name: t.clone() for name, t in other.items()}, assign=True)
    with pytest.raises(WeightsRebound, match=r"model\.embed_tokens\.weight"):
        tied.verify()
    with pytest.raises(WeightsRebound, match="from_model"):
        tied.sync()


@pytest.mark.parametrize(
    ("rebind", "named"),
    [
        (
            lambda m: m.to(torch.bfloat16),
            r"parameter 'model\.embed_tokens\.weight'",
        ),
        (
            lambda m: setattr(
                m.model.layers[1].mlp.up_proj, "weight", torch.nn.Parameter(torch.zeros(80, 48))
            ),
            r"parameter 'model\.layers\.1\.mlp\.up_proj\.weight'",
        ),
        (
            lambda m: setattr(m.model.layers[0], "mlp", m.model.layers[1].mlp),
            r"module 'model\.layers\.0\.mlp'",
        ),
        (
            lambda m: m.resize_token_embeddings(120),
            r"module 'model\.embed_tokens'|model\.embed_tokens\.weight",
        ),
        (
            lambda m: setattr(m.lm_head, "weight", torch.nn.Parameter(m.lm_head.weight.detach().clone())),
            r"'lm_head\.weight' was tied",
        ),
    ],
)
def test_rebinding_is_named(rebind, named, make_model):
    model = make_model("qwen2", tie_word_embeddings=True)
    tied = share(model)
    rebind(model)
    with pytest.raises(WeightsRebound, match=named):
        tied.verify()


def test_other_dtype_is_copied_at_sync(model):
    """A float32 module under a bfloat16 engine: nothing is re-pointed, `sync` takes the values over."""
    pointers = [p.data_ptr() for p in model.parameters()]
    tied = share(model, torch.bfloat16)
    assert not tied.shared
    assert [p.data_ptr() for p in model.parameters()] == pointers
    q = model.model.layers[0].self_attn.q_proj.weight
    rows = q.shape[0]
    assert torch.equal(tied.weights.layers[0].qkv[:rows], q.detach().bfloat16())
    train(model)
    assert not torch.equal(tied.weights.layers[0].qkv[:rows], q.detach().bfloat16())
    tied.sync()
    assert torch.equal(tied.weights.layers[0].qkv[:rows], q.detach().bfloat16())
    assert torch.equal(tied.weights.lm_head, model.lm_head.weight.detach().bfloat16())
    assert (tied.weights.lm_head is tied.weights.embed) == model.config.tie_word_embeddings


def test_mixed_dtypes_share_what_agrees(make_model):
    model = make_model("qwen2")
    for layer in model.model.layers:
        layer.mlp.to(torch.bfloat16)
    tied = share(model, torch.bfloat16)
    assert not tied.shared
    up = model.model.layers[0].mlp.up_proj.weight
    assert tied.weights.layers[0].gate_up[80:].data_ptr() == up.data_ptr()
    with torch.no_grad():
        up.fill_(2.0)
        model.model.norm.weight.fill_(3.0)
    assert (tied.weights.layers[0].gate_up[80:] == 2).all()
    tied.sync()
    assert (tied.weights.final_norm == 3).all()


def test_two_engines_share_one_module(make_model):
    model = make_model("llama", attention_bias=True)
    first, second = share(model), share(model)
    first.verify()
    second.verify()
    assert first.weights.layers[0].qkv.data_ptr() == second.weights.layers[0].qkv.data_ptr()
    assert first.weights.layers[0].qkv_bias.data_ptr() == second.weights.layers[0].qkv_bias.data_ptr()
    assert second.shared


def test_the_module_decides_whether_the_head_is_tied(make_model):
    model = make_model("qwen2", tie_word_embeddings=True)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(97, 48))
    assert torch.equal(share(model).weights.lm_head, model.lm_head.weight)


def test_rounded_rotary_frequencies_warn(make_model):
    model = make_model("qwen2").to(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"rotary_emb\.inv_freq.*bfloat16"):
        share(model, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            lambda m: delattr(m.model.layers[0].mlp, "up_proj"),
            r"no parameter 'model\.layers\.0\.mlp\.up_proj",
        ),
        (lambda m: m.register_parameter("lora", torch.nn.Parameter(torch.ones(1))), "parameter 'lora'"),
        (lambda m: setattr(m.config, "intermediate_size", 60), r"gate_proj\.weight.*\(80, 48\).*\(60, 48\)"),
        (lambda m: m.to("meta"), "meta"),
        (
            lambda m: setattr(m.model.layers[0].mlp.up_proj, "weight", m.model.layers[1].mlp.up_proj.weight),
            "are one",
        ),
    ],
)
def test_what_cannot_be_shared_is_named(change, named, make_model):
    model = make_model("qwen2")
    change(model)
    with pytest.raises(UnsupportedModel, match=named):
        share(model)


Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.2.mlp.down_proj.weight"


def share_fed(model, *fed):
    return share_module(model, ModelConfig.from_hf(model.config), torch.float32, "cpu", fed=fed)


def test_what_is_fed_has_buffers_of_its_own(make_model):
    """q and down are fed, the rest of their groups and all else is shared; each `sync` wants all of it."""
    model = make_model("qwen2")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = share_fed(model, Q, DOWN)
    assert list(tied.fed) == [Q, DOWN]
    assert not tied.shared
    with pytest.raises(ConfigError, match=r"no values yet for 'model\.layers\.1.*and 1 more.*sync_weights"):
        tied.verify()
    given = {name: torch.randn_like(before[name], dtype=torch.float64) for name in tied.fed}
    tied.sync(iter(given.items()))
    tied.verify()
    rows = before[Q].shape[0]
    qkv = tied.weights.layers[1].qkv
    assert torch.equal(qkv[:rows], given[Q].float())
    assert torch.equal(tied.weights.layers[2].down, given[DOWN].float())
    assert qkv[rows:].data_ptr() == model.model.layers[1].self_attn.k_proj.weight.data_ptr()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name
    with pytest.raises(ConfigError, match="without weights"):
        tied.sync()
    with pytest.raises(ConfigError, match="down_proj"):
        tied.sync({Q: given[Q]}.items())
    with pytest.raises(ConfigError, match="no values yet"):
        tied.verify()  # half old, half new: not to be decoded with
    tied.sync(given.items())
    tied.verify()


def test_fed_parameters_may_be_anywhere(make_model):
    model = make_model("qwen2")
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    tied = share_fed(model.to("meta"), *whole)
    tied.sync(whole.items())
    assert torch.equal(tied.weights.lm_head, whole[LM_HEAD])
    assert torch.equal(tied.weights.layers[2].down, whole[DOWN])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model.norm.weight": torch.ones(48)}, "none of the tensors that the engine holds by itself"),
        ({Q: torch.ones(48)}, r"has shape \(48,\), expected \(48, 48\)"),
    ],
)
def test_wrong_weights_are_named(given, named, make_model):
    with pytest.raises(ConfigError, match=named):
        share_fed(make_model("qwen2"), Q).sync(given.items())


def test_what_cannot_be_fed_is_named(make_model):
    with pytest.raises(ConfigError, match=r"lm_head\.weight' cannot be fed.*tied: feed 'model\.embed_tokens"):
        share_fed(make_model("qwen2", tie_word_embeddings=True), LM_HEAD)
    twice = [(Q, torch.zeros(48, 48))] * 2
    with pytest.raises(ConfigError, match="came twice"):
        share_fed(make_model("qwen2"), Q).sync(twice)


def test_named_tensors_are_the_checkpoint(model, tmp_path):
    """A state dict copied into other weights of that shape makes them that checkpoint's."""
    weights = share(model).weights
    config = ModelConfig.from_hf(model.config)
    views = named_tensors(weights, config)
    state = model.state_dict()
    assert views.keys() == state.keys()
    for name, tensor in state.items():
        assert views[name].data_ptr() == tensor.data_ptr()
    other = {name: torch.randn_like(tensor) for name, tensor in model.named_parameters()}
    assert copy_in(views, other.items()) == other.keys()
    assert all(torch.equal(p, other[name]) for name, p in model.named_parameters())
