"""TRL's own GRPOTrainer trains over BudgetRollout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.integrations.trl_rollout import BudgetRollout
from elastic_decode.tasks import countdown

CONFIG = EngineConfig(dtype="float32", max_model_len=128, kv_memory="64MiB")
PROBLEMS = ["9 1 6 = 3", "9 3 7 = 20", "2 2 2 = 8", "7 5 3 = 38"]


def trainer_of(folder: Path, seen: list[dict[str, Any]], **settings: Any) -> tuple[Any, BudgetRollout]:
    rollout = BudgetRollout(Budget(think=12, solve=3), config=CONFIG)

    def reward(
        completions: Any, completion_ids: Any, think_end: Any, solution_text: Any, **columns: Any
    ) -> list[float]:
        seen.append({"ids": completion_ids, "think_end": think_end, "solution": solution_text})
        return [float("+" in solution) for solution in solution_text]

    defaults = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "max_steps": 3, "num_generations": 4,
        "per_device_train_batch_size": 16, "max_completion_length": 16, "learning_rate": 1e-3,
        "lr_scheduler_type": "constant", "gradient_checkpointing": False, "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "shuffle_dataset": False,
        "beta": 0.0, "top_k": 0, "seed": 0,
    }  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32),
        reward_funcs=reward,
        args=trl.GRPOConfig(**{**defaults, **settings}),
        train_dataset=Dataset.from_list(
            [{"prompt": [{"role": "user", "content": problem}]} for problem in PROBLEMS * 4]
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_path()),
        rollout_func=rollout,
    )
    return trainer, rollout


def test_it_trains_what_the_engine_decodes_with(tmp_path: Path):
    seen: list[dict[str, Any]] = []
    trainer, rollout = trainer_of(tmp_path, seen)
    losses: list[dict[str, torch.Tensor]] = []
    compute = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        losses.append({name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return compute(model, inputs)

    trainer._compute_loss = spy
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())

    close = trainer.processing_class.convert_tokens_to_ids("</think>")
    ends = [end for call in seen for end in call["think_end"]]
    assert {"forced", "natural"} <= set(ends)
    masked = 0
    for inputs in losses:
        ids, mask = inputs["completion_ids"], inputs["tool_mask"]
        assert (ids[mask == 0] == close).all()  # of forced closes only
        masked += int((mask == 0).sum())
    assert masked == ends.count("forced")

    # The rollouts followed the weights: another engine over the trained module decodes the same.
    assert rollout.engine is not None
    rollout.engine.sync_weights()
    chats = [[{"role": "user", "content": problem}] for problem in PROBLEMS]
    greedy = SamplingParams(temperature=0)
    ours = rollout.engine.generate(chats, budget=Budget(12, 3), sampling=greedy)
    trainer.save_model(str(tmp_path / "saved"))
    trainer.processing_class.save_pretrained(tmp_path / "saved")
    with Engine.from_pretrained(tmp_path / "saved", CONFIG) as other:
        theirs = other.generate(chats, budget=Budget(12, 3), sampling=greedy)
    assert [g.completions[0].token_ids for g in ours] == [g.completions[0].token_ids for g in theirs]


def test_logprobs_are_those_of_trl(tmp_path: Path):
    trainer, _ = trainer_of(tmp_path, [], max_steps=1, temperature=0.7)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    compute = trainer._compute_loss

    def spy(model: Any, inputs: Any) -> Any:
        whole = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keep = inputs["completion_ids"].shape[1]
        with torch.no_grad():
            theirs, *_ = trainer._get_per_token_logps_and_entropies(model, whole, mask, keep)
        real = inputs["completion_mask"].bool()
        found.append((inputs["sampling_per_token_logps"][real], theirs[real]))
        return compute(model, inputs)

    trainer._compute_loss = spy
    trainer.train()
    ((ours, theirs),) = found
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)  # the forced tokens' too


def test_the_task_of_the_package_as_reward(tmp_path: Path):
    """Rewards read the solution's text; nothing has to be cut out of the completion."""
    seen: list[dict[str, Any]] = []
    trainer, _ = trainer_of(tmp_path, seen, max_steps=1)
    trainer.train()
    (call,) = seen
    for ids, solution in zip(call["ids"], call["solution"], strict=True):
        text = trainer.processing_class.decode(ids)
        assert text.split(countdown.CLOSE)[-1].replace("<eos>", "").strip() == solution.strip()


def test_what_trl_would_drop_is_refused(tmp_path: Path):
    trainer, _ = trainer_of(tmp_path, [], max_completion_length=8)
    with pytest.raises(ValueError, match="max_completion_length is 8"):
        trainer.train()
