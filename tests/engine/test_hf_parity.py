"""Greedy decoding equals Hugging Face `generate`, and a sequence's tokens depend on nothing but itself
(float32).
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams, budgets

EOS, VOCAB = 256, 300
NEW = 24
NEAR_TIE = 1e-4
# More than one EOS id, as many real checkpoints have: random models would seldom hit a single one.
EOS_IDS = [EOS, *range(262, 282)]

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": EOS_IDS,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 10000.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3-wide-heads": ("qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "llama3": ("llama", {"rope_parameters": LLAMA3, "num_key_value_heads": 1}),
    "llama-linear-bias": (
        "llama",
        {
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
            "max_position_embeddings": 48,
        },
    ),
    "mistral-window": ("mistral", {"sliding_window": 16, "head_dim": 24}),
}


def random_model(family: str, changes: dict[str, Any]) -> transformers.PreTrainedModel:
    """Random weights with decided logits, so that greedy paths are long and varied."""
    torch.manual_seed(sum(map(ord, family)))
    config = transformers.AutoConfig.for_model(family, **{**BASE, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                spread = 1.0 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5
                parameter.normal_(0, spread)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.2)
    model.generation_config.eos_token_id = EOS_IDS
    model.generation_config.pad_token_id = 0
    return model.eval()


def mixed_prompts(count: int, longest: int = 40) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(200) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def hf_greedy(model: Any, prompt: list[int]) -> tuple[list[int], torch.Tensor]:
    """(new tokens, the gap between the two best logits at each)."""
    out = model.generate(
        torch.tensor([prompt]),
        # else HF masks the pad id within prompts
        attention_mask=torch.ones((1, len(prompt)), dtype=torch.long),
        max_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    best = torch.stack([logits[0] for logits in out.logits]).topk(2).values
    return out.sequences[0, len(prompt) :].tolist(), best[:, 0] - best[:, 1]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_equal_hugging_face(case, byte_tokenizer):
    family, changes = CASES[case]
    model = random_model(family, changes)
    # HF rotates a prompt past the trained length by its whole length, a decode step by its position: stay
    # below.
    prompts = mixed_prompts(64)
    config = EngineConfig(dtype="float32", max_batch=64, page_size=5, kv_memory="64MiB", max_model_len=64)
    expected = [hf_greedy(model, prompt) for prompt in prompts]
    with Engine.from_model(model, byte_tokenizer, config) as engine:
        generations = engine.generate(
            prompts, budget=budgets.truncate(NEW), sampling=SamplingParams(temperature=0)
        )
    ended = ties = 0
    for (tokens, gaps), generation in zip(expected, generations, strict=True):
        ours = generation.completions[0].token_ids
        ended += tokens[-1] in EOS_IDS
        if ours == tokens:
            assert (generation.completions[0].finish_reason == "eos") == (tokens[-1] in EOS_IDS)
            continue
        split = next(i for i, (a, b) in enumerate(zip(ours, tokens, strict=False)) if a != b)
        assert gaps[split] < NEAR_TIE, (case, split, gaps[split])
        ties += 1
    assert ended > 3, "EOS must be part of what is compared"
    assert ties <= 2


@pytest.mark.slow
def test_a_sequence_depends_on_nothing_but_itself(byte_tokenizer):
    """Seeded sampling in float32: batch, arrival order, page size, chunk size, prefix hits and horizon change
    no token.
    """
    model = random_model("qwen3", {"head_dim": 32})
    prompts = mixed_prompts(24)
    prompts[7] = prompts[3] + [5, 6]
    prompts[9] = prompts[3][:]
    sampling = [SamplingParams(temperature=0.9, top_p=0.95, seed=i) for i in range(24)]
    budget = Budget(think=12, solve=8)

    def run(order: list[int], **options: Any) -> dict[int, Any]:
        config = EngineConfig(dtype="float32", kv_memory="64MiB", max_model_len=96, **options)
        with Engine.from_model(model, byte_tokenizer, config) as engine:
            generations = engine.generate(
                [prompts[i] for i in order], budget=budget, sampling=[sampling[i] for i in order]
            )
        return {
            i: (g.completions[0].token_ids, g.completions[0].logprobs)
            for i, g in zip(order, generations, strict=True)
        }

    straight = list(range(24))
    expected = run(straight, max_batch=1)
    for options in (
        {"max_batch": 24, "page_size": 16},
        {"max_batch": 5, "page_size": 1, "prefill_tokens": 7},
        {"max_batch": 24, "page_size": 8, "prefill_tokens": 3, "prefix_cache": True, "horizon": 4},
        {"max_batch": 9, "page_size": 33, "prefix_cache": True, "horizon": 32},
    ):
        order = straight[:]
        random.Random(str(options)).shuffle(order)
        assert run(order, **options) == expected, options


@pytest.mark.slow
def test_rollout_logprobs_are_the_models_own(byte_tokenizer):
    model = random_model("qwen2", {})
    config = EngineConfig(dtype="float32", kv_memory="64MiB", max_model_len=96)
    with Engine.from_model(model, byte_tokenizer, config) as engine:
        generations = engine.generate(
            mixed_prompts(8),
            n=2,
            budget=Budget(think=9, solve=7),
            sampling=SamplingParams(temperature=0.7, top_k=20),
        )
    worst = 0.0
    for generation in generations:
        for c in generation.completions:
            ids = torch.tensor([generation.prompt_token_ids + c.token_ids])
            logits = model(ids).logits[0, len(generation.prompt_token_ids) - 1 : -1].float() / 0.7
            recomputed = logits.log_softmax(-1).gather(1, ids[0, len(generation.prompt_token_ids) :, None])[
                :, 0
            ]
            worst = max(worst, (recomputed - torch.tensor(c.logprobs)).abs().max().item())
            assert all(p <= 0 for p in c.sampling_logprobs)
    assert worst < 2e-5


@pytest.mark.slow
def test_training_in_place_is_seen_after_sync(byte_tokenizer):
    model = random_model("qwen2", {"tie_word_embeddings": True})
    config = EngineConfig(dtype="float32", kv_memory="64MiB", max_model_len=96)
    with Engine.from_model(model, byte_tokenizer, config) as engine:
        greedy = {"budget": budgets.truncate(NEW), "sampling": SamplingParams(temperature=0)}
        before = engine.generate(mixed_prompts(4), **greedy)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
        model(torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
        optimizer.step()
        assert engine.sync_weights() == 1
        after = engine.generate(mixed_prompts(4), **greedy)
        assert [g.completions[0].token_ids for g in before] != [g.completions[0].token_ids for g in after]
        for prompt, generation in zip(mixed_prompts(4), after, strict=True):
            tokens, gaps = hf_greedy(model, prompt)
            assert generation.completions[0].token_ids == tokens or gaps.min() < NEAR_TIE
            assert generation.completions[0].weight_epoch == 1


@pytest.mark.slow
def test_a_saved_checkpoint_decodes_like_its_module(tmp_path, byte_tokenizer):
    model = random_model("llama", {"rope_parameters": LLAMA3})
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    byte_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = EngineConfig(dtype="float32", kv_memory="64MiB", max_model_len=96)
    greedy = {"budget": Budget(think=9, solve=7), "sampling": SamplingParams(temperature=0, seed=0)}
    with Engine.from_pretrained(tmp_path, config) as engine:
        from_disk = engine.generate(mixed_prompts(8), **greedy)
    with Engine.from_model(model, byte_tokenizer, config) as engine:
        from_module = engine.generate(mixed_prompts(8), **greedy)
    assert from_disk == from_module
