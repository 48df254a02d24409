"""The plan of a run, against what is really there."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from elastic_decode.assets import tiny_model_path
from elastic_decode.config import ModelConfig, RopeConfig
from elastic_decode.errors import ConfigError
from elastic_decode.rl.config import load_config
from elastic_decode.rl.estimate import activations, count_parameters, estimate

TOY = Path(__file__).parents[2] / "recipes" / "toy.yaml"
TINY = ModelConfig.from_hf(tiny_model_path())
# DeepScaleR-1.5B-Preview's shape, which is R1-Distill-Qwen-1.5B's: 1,777,088,000 parameters by its card.
QWEN2 = ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_layers=28,
    num_heads=12,
    num_kv_heads=2,
    head_dim=128,
    max_position_embeddings=131072,
    rope=RopeConfig(),
    attention_bias=True,
    dtype="bfloat16",
)


def of(*overrides, model=TINY, rows=None):
    return estimate(load_config(TOY, overrides), model, rows)


def test_parameters_are_counted_right():
    module = AutoModelForCausalLM.from_pretrained(tiny_model_path())
    assert count_parameters(TINY) == sum(parameter.numel() for parameter in module.parameters())
    assert count_parameters(QWEN2) == 1_777_088_000
    tied = dataclasses.replace(QWEN2, tie_embeddings=True)
    assert count_parameters(QWEN2) - count_parameters(tied) == 151936 * 1536


def test_shared_or_copied():
    count = count_parameters(QWEN2)
    same = of("optim.dtype=bfloat16", "engine.dtype=auto", model=QWEN2)
    assert "nothing is copied" in same.sharing
    assert same.memory["master weights (float32)"] == 4 * count
    assert same.memory["AdamW's moments (float32)"] == 8 * count
    assert same.memory["gradients (bfloat16)"] == same.memory["weights (bfloat16)"] == 2 * count
    assert not any("copy" in name for name in same.memory)
    other = of("engine.dtype=bfloat16", model=QWEN2)
    assert "cast and copied" in other.sharing
    assert other.memory["the engine's copy (bfloat16)"] == 2 * count
    assert "master weights (float32)" not in other.memory
    assert other.total == sum(other.memory.values())


def test_a_reference_and_lora():
    assert "reference model" in of("objective.kl=0.1").memory
    lora = of("objective.kl=0.1", "optim.lora.r=4")
    assert "reference model" not in lora.memory
    layers = AutoModelForCausalLM.from_pretrained(tiny_model_path()).modules()
    linears = [m for m in layers if isinstance(m, torch.nn.Linear) and m.out_features != TINY.vocab_size]
    assert lora.trained == sum(4 * (m.in_features + m.out_features) for m in linears)
    assert "merged" in lora.sharing
    assert of("optim.lora={r: 4, targets: [q_proj]}").trained < lora.trained
    with pytest.raises(ConfigError, match=r"optim.lora.targets: .* no linear module 'q'; it has q_proj"):
        of("optim.lora.targets=[q]")


def test_tokens_and_steps():
    plan = of("rollout.max_prompt_tokens=10", "optim.max_tokens_per_microbatch=58", rows=3200)
    assert (plan.samples, plan.longest_output, plan.tokens_a_step) == (256, 18, 256 * 18)
    assert plan.longest_sample == 10 + 18 + 1
    assert plan.microbatches == 128
    assert plan.epochs == 4.0
    assert of("optim.updates_per_step=2", "optim.max_tokens_per_microbatch=25600").microbatches == 4
    unlimited = of("rollout.budgets.think=null", "optim.max_tokens_per_microbatch=100")
    assert (unlimited.tokens_a_step, unlimited.epochs, unlimited.microbatches) == (None, None, None)


def test_checkpointing_keeps_less_and_nothing_less_than_the_inputs():
    full, less = (activations(QWEN2, 4096, 2, checkpointing=on) for on in (False, True))
    assert 28 * 4096 * 1536 * 2 < less < full / 5


def test_an_engine_that_sleeps_in_updates():
    kv, update = 2**30, of(model=QWEN2).memory["activations (estimate)"]
    update += of(model=QWEN2).memory["gradients (float32)"]
    asleep = of("rollout.sleep_in_update=true", "engine.kv_memory=1GiB", model=QWEN2)
    assert update > kv
    assert asleep.total == of("engine.kv_memory=1GiB", model=QWEN2).total - kv
