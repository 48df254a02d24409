"""Packed, chunked log-probabilities against each sample by itself, and against the engine's."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError, UnsupportedModel
from elastic_decode.rl.logprobs import attends_in_rows, pack, plan, token_logprobs

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def made(kind):
    torch.manual_seed(0)
    extra = {"sliding_window": 5} if kind is MistralConfig else {}
    return AutoModelForCausalLM.from_config(kind(**SHAPE, **extra)).float()


def random_samples(count, seed=0):
    rng = random.Random(seed)

    def ids(least):
        return [rng.randrange(97) for _ in range(rng.randint(least, 12))]

    return [(ids(1), ids(0)) for _ in range(count)]


def alone(model, prompt, output, temperature):
    logits = model(torch.tensor([[*prompt, *output]])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1) if output else logits[:0]
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, torch.tensor(output, dtype=torch.int64).unsqueeze(1)).squeeze(1), entropy


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("kind", [Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig])
def test_packed_equals_one_by_one(kind, rows):
    model = made(kind)
    samples = random_samples(9)
    temperatures = [1.0, 0.6, 0.0] * 3
    chosen = [0, 2, 3, 5, 8]
    packed = pack(samples, chosen, temperatures, rows=rows)
    assert len(packed.input_ids) == (5 if rows else 1)
    with torch.no_grad():
        logprobs, entropy = token_logprobs(model, packed, chunk=7, entropy=True)
        want = [alone(model, *samples[i], temperatures[i] or 1.0) for i in chosen]
    torch.testing.assert_close(logprobs, torch.cat([w[0] for w in want]), atol=2e-6, rtol=0)
    torch.testing.assert_close(entropy, torch.cat([w[1] for w in want]), atol=5e-6, rtol=0)
    assert packed.sample_of.bincount(minlength=5).tolist() == [len(samples[i][1]) for i in chosen]


def test_gradients_equal_one_by_one_whatever_the_chunk():
    samples = random_samples(6, seed=1)
    grads = []
    for chunk, rows in ((None, False), (1, False), (5, False), (1000, False), (5, True), (1000, True)):
        model = made(Qwen2Config)
        weights = torch.linspace(0.5, 1.5, sum(len(output) for _, output in samples))
        if chunk is None:
            logprobs = torch.cat([alone(model, *sample, 0.7)[0] for sample in samples])
        else:
            packed = pack(samples, range(6), [0.7] * 6, rows=rows)
            logprobs, none = token_logprobs(model, packed, chunk=chunk)
            assert none is None
        (logprobs * weights).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    for grad in grads[1:]:
        torch.testing.assert_close(grad, grads[0], atol=2e-5, rtol=1e-4)


def test_no_more_than_a_chunk_of_logits_exists_at_a_time():
    model = made(Qwen2Config)
    widest = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: widest.append(len(output)))
    logprobs, _ = token_logprobs(model, pack(random_samples(8), range(8), [1.0] * 8), chunk=4)
    logprobs.sum().backward()
    assert max(widest) == 4
    assert len(widest) == 2 * -(-len(logprobs) // 4), "made again in the backward pass"


def test_plan_fills_and_never_overflows():
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    batches = plan(lengths, 64)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert all(sum(lengths[index] for index in batch) <= 64 for batch in batches)
    assert len(batches) <= 1.25 * sum(lengths) / 64
    assert plan([], 64) == []
    with pytest.raises(ConfigError, match=r"sample 1 has 65 tokens .*max_tokens_per_microbatch=64"):
        plan([3, 65], 64)


def test_plan_of_rows_pads_little_and_never_overflows():
    rng = random.Random(0)
    lengths = [rng.randint(1, 60) for _ in range(200)]
    batches = plan(lengths, 240, rows=True)
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    padded = [len(batch) * max(lengths[index] for index in batch) for batch in batches]
    assert max(padded) <= 240
    assert sum(padded) <= 1.1 * sum(lengths)
    for batch in batches:
        assert max(lengths[index] for index in batch) <= 2 * min(lengths[index] for index in batch)
    assert plan([30, 1, 29, 2], 240, rows=True) == [[0, 2], [1, 3]]
    assert plan([], 64, rows=True) == []
    with pytest.raises(ConfigError, match=r"sample 1 has 65 tokens"):
        plan([3, 65], 64, rows=True)


def test_rows_are_for_attention_that_would_get_a_mask():
    model = made(Qwen2Config)
    assert attends_in_rows(model)  # SDPA
    model.config._attn_implementation = "flash_attention_2"
    assert not attends_in_rows(model)


def test_the_engines_logprobs_are_these():
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    with Engine.from_pretrained(
        tiny_model_path(), EngineConfig(dtype="float32", max_model_len=256, kv_memory="16MiB")
    ) as engine:
        generations = engine.generate(
            [[{"role": "user", "content": "9 1 6 = 3"}]],
            n=4,
            budget=Budget(think=12, solve=3),
            sampling=SamplingParams(temperature=0.7, seed=1),
        )
    (generation,) = generations
    samples = [(generation.prompt_token_ids, c.token_ids) for c in generation.completions]
    with torch.no_grad():
        mine, _ = token_logprobs(model, pack(samples, range(4), [0.7] * 4))
    theirs = torch.tensor([p for c in generation.completions for p in c.logprobs])
    assert (mine - theirs).abs().max() <= 1e-5


def test_bad_input():
    with pytest.raises(ValueError, match="no prompt"):
        pack([([], [1])], [0], [1.0])
    with pytest.raises(UnsupportedModel, match="Linear has no base model"):
        token_logprobs(torch.nn.Linear(2, 2), pack([([1], [1])], [0], [1.0]))
