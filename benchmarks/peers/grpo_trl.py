"""TRL's GRPOTrainer over the same configuration, in two ways.

"truncated": TRL by itself. It knows one limit, `max_completion_length`: that of an output under the budgets,
t + close + s. "budgets": TRL with a `rollout_func` of two `generate` calls (peers/hf_budgets.py) and an
`env_mask` of 0 at a forced close, so that, as with us, it is in no loss and no denominator.

TRL's own defaults are kept where they decide no numbers (fused AdamW); those that cost time and buy nothing
here are off (gradient checkpointing, bfloat16, logging).
"""

from __future__ import annotations

import importlib.util
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from elastic_decode.rl.config import GRPOConfig
from elastic_decode.tasks import countdown
from peers import grpo, hf_budgets
from peers.grpo import Step, Tell

# An optimizer step is of all samples; so many are in one forward pass. The best of 32, 64, 128 and 256.
SAMPLES_A_PASS = 64


def why_unavailable() -> str:
    if importlib.util.find_spec("trl") is None:
        return "trl is not installed: see the top of bench_grpo.py"
    return ""


def versions() -> dict[str, str]:
    import accelerate
    import trl

    return {"trl": trl.__version__, "accelerate": accelerate.__version__}


def train(config: GRPOConfig, tell: Tell, *, way: str) -> None:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    from elastic_decode.assets import tiny_model_path
    from elastic_decode.rl import data

    rollout = config.rollout
    think, solve = grpo.budgets(config)
    rows, _ = data.load(config.data, seed=config.run.seed).batch(
        0, config.run.steps * rollout.prompts_per_step
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model_path())
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32)
    ids = hf_budgets.Ids.of(tokenizer, countdown.CLOSE)
    now: dict[str, float] = {}  # figures of the step under way
    clock = _Clock()

    class Timed(trl.GRPOTrainer):
        def _generate(self, prompts: list[Any]) -> Any:
            with clock.part("generation"):
                return super()._generate(prompts)

        def _calculate_rewards(self, *arguments: Any) -> Any:
            with clock.part("rewards"):
                return super()._calculate_rewards(*arguments)

    def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
        found = grpo.graded([_solution(tokenizer, output, ids) for output in completion_ids], columns)
        now["reward"] = sum(found) / len(found)
        now["tokens"] = sum(map(len, completion_ids)) / len(found)
        now["closed"] = sum(ids.close in output for output in completion_ids) / len(found)
        return found

    def roll(prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        encoded = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        policy = trainer.accelerator.unwrap_model(trainer.model)
        policy.eval()
        temperature = rollout.sampling.temperature
        outputs = hf_budgets.generate(
            policy, encoded, think=think, solve=solve, ids=ids, temperature=temperature
        )
        policy.train()
        now["forced"] = sum(output.forced is not None for output in outputs) / len(outputs)
        return {
            "prompt_ids": encoded,
            "completion_ids": [output.ids for output in outputs],
            "logprobs": None,  # nothing uses them: the old policy is the policy
            "env_mask": [
                [int(place != output.forced) for place in range(len(output.ids))] for output in outputs
            ],
        }

    class Report(transformers.TrainerCallback):
        def on_step_end(self, *arguments: Any, **more: Any) -> None:
            seconds, cpu = clock.whole()
            (generation, generation_cpu), (rewards, rewards_cpu) = (
                clock.take("generation"),
                clock.take("rewards"),
            )
            tell(
                Step(
                    seconds=seconds,
                    rollout=generation + rewards,
                    rewards=rewards,
                    update=seconds - generation - rewards,
                    cpu=cpu,
                    rollout_cpu=generation_cpu + rewards_cpu,
                    **{"forced": 0.0, **now},
                )
            )
            clock.start()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Timed(
            model=model,
            reward_funcs=reward,
            args=settings(config, folder),
            train_dataset=Dataset.from_list([{"prompt": row.prompt, **row.columns} for row in rows]),
            processing_class=tokenizer,
            callbacks=[Report()],
            rollout_func=roll if way == "budgets" else None,
        )
        clock.start()
        trainer.train()


def settings(config: GRPOConfig, folder: str) -> Any:
    """TRL's GRPOConfig of a configuration."""
    import trl

    rollout, optim, objective = config.rollout, config.optim, config.objective
    samples = rollout.prompts_per_step * rollout.group_size
    passed = min(SAMPLES_A_PASS, samples)
    if samples % passed:
        raise SystemExit(f"TRL: {samples} samples a step are no multiple of {passed} in a pass")
    return trl.GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        seed=config.run.seed,
        max_steps=config.run.steps,
        per_device_train_batch_size=passed,
        gradient_accumulation_steps=samples // passed,
        num_generations=rollout.group_size,
        max_completion_length=sum(grpo.budgets(config)) + 1,
        shuffle_dataset=False,
        temperature=rollout.sampling.temperature,
        top_p=1.0,
        top_k=0,
        loss_type="dapo",
        scale_rewards="group",
        epsilon=objective.clip_low,
        epsilon_high=objective.clip_high,
        beta=objective.kl,
        num_iterations=1,
        learning_rate=optim.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        adam_epsilon=optim.eps,
        weight_decay=optim.weight_decay,
        max_grad_norm=optim.grad_clip,
        gradient_checkpointing=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )


def _solution(tokenizer: Any, output: list[int], ids: hf_budgets.Ids) -> str:
    """What stands behind the close; nothing where there is none."""
    if ids.close not in output:
        return ""
    answer = output[output.index(ids.close) + 1 :]
    return str(tokenizer.decode([token for token in answer if token != ids.eos]))


class _Clock:
    """Seconds, of wall and of processor, since `start` and of parts of that time."""

    def __init__(self) -> None:
        self._parts: dict[str, tuple[float, float]] = {}
        self.start()

    def start(self) -> None:
        self._began = _now()

    def whole(self) -> tuple[float, float]:
        return _since(self._began)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = _now()
        yield
        self._parts[name] = _since(began)

    def take(self, name: str) -> tuple[float, float]:
        """A part's seconds, once."""
        return self._parts.pop(name)


def _now() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _since(began: tuple[float, float]) -> tuple[float, float]:
    wall, cpu = _now()
    return wall - began[0], cpu - began[1]
