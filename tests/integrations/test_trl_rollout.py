"""BudgetRollout with a stand-in for TRL's trainer: what it returns, weights, seeds, refusals."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from elastic_decode import Budget, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import ConfigError
from elastic_decode.integrations import trl_rollout
from elastic_decode.integrations.trl_rollout import BudgetRollout

CONFIG = EngineConfig(dtype="float32", max_model_len=128, kv_memory="64MiB")


def stand_in(**settings: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    args = {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0,
        "generation_kwargs": None, "max_completion_length": 64,
    }  # fmt: skip
    return SimpleNamespace(
        model=model,
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_path()),
        args=SimpleNamespace(**{**args, **settings}),
        state=SimpleNamespace(global_step=0),
        accelerator=SimpleNamespace(
            unwrap_model=lambda module: module, process_index=0, state=SimpleNamespace()
        ),
    )


def chats(*problems: str) -> list[Any]:
    return [[{"role": "user", "content": problem}] for problem in problems]


def test_a_group_a_prompt_in_order_with_what_was_forced():
    trainer, rollout = stand_in(), BudgetRollout(Budget(7, 3), config=CONFIG)
    a, b = chats("9 1 6 = 3", "9 3 7 = 20")
    prompts = [a] * 4 + [b] * 4 + [a]
    out = rollout(prompts, trainer)
    encode = trainer.processing_class.apply_chat_template
    wanted = [
        encode([prompt], add_generation_prompt=True, return_dict=True)["input_ids"][0] for prompt in prompts
    ]
    assert out["prompt_ids"] == wanted
    close = trainer.processing_class.convert_tokens_to_ids("</think>")
    assert len({tuple(ids) for ids in out["completion_ids"][:4]}) > 1
    assert "forced" in out["think_end"]
    for at, ids in enumerate(out["completion_ids"]):
        mask = out["env_mask"][at]
        forced = [place for place, mine in enumerate(mask) if not mine]
        assert forced == ([7] if out["think_end"][at] == "forced" else [])
        assert all(ids[place] == close for place in forced)
        assert sum(mask) == out["think_tokens"][at] + out["solve_tokens"][at]
        with torch.no_grad():  # the module's own, of the forced token too
            whole = torch.tensor([out["prompt_ids"][at] + ids])
            logits = trainer.model(whole).logits[0, -len(ids) - 1 : -1].float()
        own = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(out["logprobs"][at]), own, atol=1e-4, rtol=1e-4)
    assert {len(values) for values in out.values()} == {9}


def test_it_follows_updates_in_place_and_draws_anew_each_time():
    trainer, rollout = stand_in(), BudgetRollout(lambda prompt: Budget(0, 3), config=CONFIG, sleep=True)
    prompts = chats("9 1 6 = 3") * 4
    first = rollout(prompts, trainer)
    again = rollout(prompts, trainer)
    assert first["completion_ids"] != again["completion_ids"]
    resumed = BudgetRollout(lambda prompt: Budget(0, 3), config=CONFIG)(prompts, stand_in())
    assert resumed["completion_ids"] == first["completion_ids"]
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.mul_(0.0)
    trainer.state.global_step = 1
    flat = rollout(prompts, trainer)
    for logprobs in flat["logprobs"]:  # every token is as likely as any other
        torch.testing.assert_close(torch.tensor(logprobs), torch.full((4,), -torch.tensor(144.0).log()))


def test_sampling_is_that_of_the_trainer():
    trainer = stand_in(temperature=0.5, top_k=2, top_p=0.9)
    rollout = BudgetRollout(Budget(5, 3), config=CONFIG, seed=4)
    prompts = chats("9 1 6 = 3", "9 3 7 = 20")
    out = rollout(prompts, trainer)
    assert rollout.engine is not None
    seeds = [trl_rollout._seed(4, 0, 0, 0, place) for place in range(2)]  # seed, step, call, process, place
    sampling = [SamplingParams(temperature=0.5, top_k=2, top_p=0.9, seed=seed) for seed in seeds]
    same = rollout.engine.generate(prompts, budget=Budget(5, 3), sampling=sampling)
    assert out["completion_ids"] == [generation.completions[0].token_ids for generation in same]
    drawn = [p for p, mine in zip(out["logprobs"][0], out["env_mask"][0], strict=True) if mine]
    want = same[0].completions[0]
    assert drawn == [p for p, f in zip(want.sampling_logprobs, want.forced, strict=True) if not f]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"generation_kwargs": {"min_length": 3}}, "would be ignored"),
        ({"max_completion_length": 5}, "max_completion_length is 5"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(change: dict[str, Any], match: str):
    with pytest.raises(ConfigError, match=match):
        BudgetRollout(Budget(9, 3), config=CONFIG)(chats("9 1 6 = 3"), stand_in(**change))


def test_models_it_cannot_share_are_refused():
    for plugin, value in (("deepspeed_plugin", SimpleNamespace(zero_stage=3)), ("fsdp_plugin", object())):
        trainer = stand_in()
        setattr(trainer.accelerator.state, plugin, value)
        with pytest.raises(ConfigError, match="sharded"):
            BudgetRollout(Budget(3, 3))(chats("9 1 6 = 3"), trainer)
    trainer = stand_in()
    trainer.model.peft_config = {}
    with pytest.raises(ConfigError, match="PEFT"):
        BudgetRollout(Budget(3, 3))(chats("9 1 6 = 3"), trainer)
    with pytest.raises(ConfigError, match="must be a Budget"):
        BudgetRollout(3)  # type: ignore[arg-type]
