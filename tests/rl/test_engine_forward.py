"""The trainer's forward pass by the engine's kernels: values are a rollout's to the last bit, gradients those
of the Hugging Face module."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import AutoTokenizer, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError, WeightsRebound
from elastic_decode.rl import lora
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.config import LoraOptions, load_config
from elastic_decode.rl.engine_forward import EngineForward
from elastic_decode.rl.logprobs import pack, plan, token_logprobs

TOKENIZER = AutoTokenizer.from_pretrained(tiny_model_path())
SHAPE = {
    "vocab_size": len(TOKENIZER),
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": TOKENIZER.eos_token_id,
}
FAMILIES = {
    "qwen2": Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SHAPE, head_dim=16),
    "llama": LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=9),
}


def made(family, dtype):
    """A random model whose biases and norms are no zeros and ones."""
    torch.manual_seed(0)
    model = Auto.from_config(FAMILIES[family], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
            else:
                parameter.mul_(4)
    # Not .to(dtype) of the whole: that would round the rotary frequencies, too.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model.eval()


def engine_of(model, **changes):
    return Engine.from_model(
        model, TOKENIZER, EngineConfig(**{"max_model_len": 96, "kv_memory": "8MiB", **changes})
    )


def rollouts(engine, temperature, *, n=8, prompts=3, think=9, solve=4):
    """(prompt ids, output ids) and the engine's log-probabilities, forced tokens' too."""
    rng = random.Random(0)
    asked = [[rng.randrange(len(TOKENIZER)) for _ in range(17 + 9 * i)] for i in range(prompts)]
    generations = engine.generate(
        asked,
        n=n,
        budget=[Budget(think=think + 5 * i, solve=solve) for i in range(prompts)],
        sampling=SamplingParams(temperature=temperature, seed=3),
    )
    outputs = [(g.prompt_token_ids, c) for g in generations for c in g.completions]
    assert any(any(c.forced) for _, c in outputs)
    return [(p, c.token_ids) for p, c in outputs], torch.tensor([x for _, c in outputs for x in c.logprobs])


def recomputed(forward, model, samples, temperature, *, max_tokens=150, chunk=1024):
    """Log-probabilities in the samples' order, computed in micro-batches; gradients by parameter."""
    found = {}
    model.zero_grad()
    for chosen in plan([len(p) + len(o) for p, o in samples], max_tokens):
        packed = pack(samples, chosen, [temperature] * len(samples))
        logprobs, entropies = forward(model, packed, chunk=chunk, entropy=True)
        weights = torch.linspace(-1, 1.5, len(logprobs))
        (logprobs * weights + 0.3 * entropies).sum().backward()
        own = logprobs.detach().split([len(samples[i][1]) for i in chosen])
        found |= dict(zip(chosen, own, strict=True))
    return torch.cat([found[i] for i in range(len(samples))]), {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_to_the_last_bit(family, dtype):
    model = made(family, dtype)
    with engine_of(model, max_batch=5, prefill_tokens=7, horizon=3) as engine:
        samples, theirs = rollouts(engine, 0.7)
        mine, _ = recomputed(EngineForward(engine).token_logprobs, model, samples, 0.7, chunk=30)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    ("temperature", "changes"),
    [
        (1.0, {"horizon": 4, "prefix_cache": True, "max_batch": 64}),
        (0.0, {"page_size": 5, "max_batch": 1}),
        (0.6, {"page_size": 32, "prefill_tokens": 1, "prefix_cache": True}),
        (1.3, {"max_batch": 24, "prefill_tokens": 512}),
    ],
)
def test_however_the_engine_decodes(temperature, changes):
    model = Auto.from_pretrained(tiny_model_path(), dtype=torch.float32)
    with engine_of(model, **changes) as engine:
        forward = EngineForward(engine).token_logprobs
        samples, theirs = rollouts(engine, temperature)
        again, same = rollouts(engine, temperature)  # where prefixes are kept, from them
        assert (again, same.tolist()) == (samples, theirs.tolist())
        for max_tokens in (60, 1000):
            mine, _ = recomputed(forward, model, samples, temperature, max_tokens=max_tokens)
            assert torch.equal(mine, theirs)
        with torch.no_grad():
            (whole, none) = forward(model, pack(samples, range(len(samples)), [temperature] * len(samples)))
    assert torch.equal(whole, theirs)
    assert none is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_backend_too(dtype):
    model = made("qwen3", dtype)
    with engine_of(model, backend="reference", max_batch=3) as engine:
        samples, theirs = rollouts(engine, 0.7, n=2, prompts=2, think=3, solve=2)
        mine, _ = recomputed(EngineForward(engine).token_logprobs, model, samples, 0.7)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_modules(family):
    model = made(family, torch.float32)
    with engine_of(model) as engine:
        samples, _ = rollouts(engine, 0.7, n=3)
        mine, grads = recomputed(EngineForward(engine).token_logprobs, model, samples, 0.7, chunk=30)
    theirs, wanted = recomputed(token_logprobs, copy.deepcopy(model), samples, 0.7)
    torch.testing.assert_close(mine, theirs, atol=3e-5, rtol=0)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


def test_gradients_in_bfloat16_are_as_good_as_the_modules():
    """Both against the same model in float32: rounding is as large for one as for the other."""
    model = made("qwen3", torch.bfloat16)
    exact = made("qwen3", torch.float32)
    with torch.no_grad():
        for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            parameter.copy_(rounded)
    with engine_of(model) as engine:
        samples, _ = rollouts(engine, 0.7, n=3)
        _, mine = recomputed(EngineForward(engine).token_logprobs, model, samples, 0.7)
    _, theirs = recomputed(token_logprobs, copy.deepcopy(model), samples, 0.7)
    _, wanted = recomputed(token_logprobs, exact, samples, 0.7)

    def error(grads):
        return torch.stack([(grads[k].float() - wanted[k]).norm() / wanted[k].norm() for k in wanted])

    assert (error(mine) <= 1.5 * error(theirs) + 1e-3).all()


def test_a_copy_of_the_module_is_computed_by_its_own_weights():
    """The frozen reference of a KL: equal to the policy until the policy is trained, then as it was."""
    model = made("qwen2", torch.float32)
    with engine_of(model) as engine:
        forward = EngineForward(engine).token_logprobs
        samples, theirs = rollouts(engine, 1.0, n=2)
        packed = pack(samples, range(len(samples)), [1.0] * len(samples))
        reference = copy.deepcopy(model).requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        assert torch.equal(forward(reference, packed)[0], theirs)
        assert not torch.equal(forward(model, packed)[0].detach(), theirs)
        model.model.norm.weight.data = model.model.norm.weight.data.clone()
        with pytest.raises(WeightsRebound):
            forward(model, packed)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "up_proj"]])
def test_adapters_are_computed_as_they_are_merged(targets):
    pytest.importorskip("peft")
    model = made("qwen2", torch.float32)
    plain = copy.deepcopy(model)
    adapters = lora.attach(model, LoraOptions(r=3, targets=targets), run_seed=1, base_name="x")
    with torch.no_grad():
        for name in adapters.names:
            adapters.factors(name)[1].normal_(0, 0.1)
    config = EngineConfig(max_model_len=96, kv_memory="8MiB")
    with Engine.from_model(model, TOKENIZER, config, fed=adapters.names) as engine:
        engine.sync_weights(adapters.merged())
        samples, theirs = rollouts(engine, 0.7, n=3)
        forward = EngineForward(engine, adapters).token_logprobs
        mine, grads = recomputed(forward, adapters.model, samples, 0.7)
        assert torch.equal(mine, theirs)
        packed = pack(samples, range(len(samples)), [0.7] * len(samples))
        with torch.no_grad(), adapters.model.disable_adapter():
            base, _ = forward(adapters.model, packed)
        with engine_of(plain) as other:
            assert torch.equal(base, EngineForward(other).token_logprobs(plain, packed)[0].detach())
        with torch.no_grad():
            adapters.factors(adapters.names[0])[1].mul_(2)
            changed, _ = forward(adapters.model, packed)
            engine.sync_weights(adapters.merged())
            assert torch.equal(changed, forward(adapters.model, packed)[0])
            assert not torch.equal(changed, theirs)
            adapters.factors(adapters.names[0])[1].div_(2)
    _, wanted = recomputed(token_logprobs, adapters.model, samples, 0.7)
    assert grads.keys() == wanted.keys()
    for name, grad in grads.items():
        assert (grad - wanted[name]).norm() <= 2e-5 * wanted[name].norm(), name


SMALL = (
    *(
        "run.steps=3",
        "run.save_every=0",
        "run.eval_every=0",
        "grading.workers=0",
        "rollout.prompts_per_step=6",
    ),
    *("rollout.group_size=8", "optim.updates_per_step=2", "optim.lr=1e-3", "objective.kl=0.01"),
    *("objective.entropy=0.001", "engine.horizon=2", "engine.max_batch=16", "run.progress=false"),
)


def trained(tmp_path, *overrides):
    told = []
    config = load_config("recipes/toy.yaml", [f"run.folder={tmp_path}", *SMALL, *overrides])
    with assemble(config, on_step=[lambda step, metrics, groups: told.append(metrics)]) as parts:
        parts.trainer.train()
    return told


@pytest.mark.parametrize(
    ("dtype", "more"), [("float32", ()), ("bfloat16", ()), ("bfloat16", ("optim.lora={r: 4}",))]
)
def test_a_run_has_no_mismatch(tmp_path, dtype, more):
    if more:
        pytest.importorskip("peft")
    both = ("optim.dtype=" + dtype, "engine.dtype=" + dtype, *more)
    engine = trained(tmp_path / "engine", "optim.forward=engine", *both)
    module = trained(tmp_path / "hf", *both)
    for metrics in engine:
        for name in ("p95", "max", "outside", "kl"):
            assert metrics["mismatch_" + name] == 0, name
    assert all(metrics["mismatch_max"] > 0 for metrics in module)
    # The first step's rollouts are the same; after it the weights differ by rounding, and samples may.
    tolerance = 1e-5 if dtype == "float32" else 0.05
    for name in ("loss", "grad_norm", "reward", "entropy"):
        assert engine[0][name] == pytest.approx(module[0][name], rel=tolerance, abs=tolerance * 1e-2), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lora={r: 4, dropout: 0.1}", "optim.lora.dropout"),
        ("optim.gradient_checkpointing=true", "optim.gradient_checkpointing"),
        ("engine.batch_invariant=false", "engine.batch_invariant"),
        ("engine.dtype=bfloat16", "engine.dtype"),
        ("engine.kv_dtype=bfloat16", "engine.kv_dtype"),
    ],
)
def test_what_it_cannot_go_with_is_refused(override, message):
    load_config("recipes/toy.yaml", [override])
    with pytest.raises(ConfigError, match=f"{message}.* where optim.forward is 'engine'"):
        load_config("recipes/toy.yaml", [override, "optim.forward=engine"])


def test_an_engine_whose_decoding_it_cannot_repeat_is_refused():
    model = made("qwen2", torch.float32)
    with (
        engine_of(model, batch_invariant=False) as engine,
        pytest.raises(ConfigError, match="batch_invariant=true"),
    ):
        EngineForward(engine)
    packed = pack([([1] * 90, [2] * 10)], [0], [1.0])
    with (
        engine_of(model, kv_dtype="bfloat16", max_model_len=100) as engine,
        pytest.raises(ConfigError, match="kv_dtype='bfloat16'"),
    ):
        EngineForward(engine).token_logprobs(model, packed)
    short = pack([([1], [2])], [0], [1.0])
    mixed = copy.deepcopy(model)
    mixed.model.norm.weight.data = mixed.model.norm.weight.data.bfloat16()
    with engine_of(model) as engine:
        forward = EngineForward(engine).token_logprobs
        with pytest.raises(ConfigError, match="100 tokens, the engine's sequences at most 96"):
            forward(model, packed)
        with pytest.raises(ConfigError, match=r"not all torch\.float32"):
            forward(mixed, short)
