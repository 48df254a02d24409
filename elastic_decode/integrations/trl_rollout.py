"""TRL's GRPOTrainer with rollouts under budgets: an engine over the trainer's own weights as its
`rollout_func`.

What TRL's contract asks for (trl 1.16, `rollout_func(prompts, trainer)`, experimental there): prompt_ids,
completion_ids and logprobs, a list a prompt, and env_mask with 0 at what the policy did not choose, which
TRL leaves out of the loss, of its denominators and of completion lengths.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from elastic_decode.budgets import Policy
from elastic_decode.config import EngineConfig
from elastic_decode.core import Budget, Completion, SamplingParams
from elastic_decode.errors import ConfigError
from elastic_decode.llm import AnyBudget, Engine

BudgetOf = Callable[[Any], AnyBudget]
_SHARDED = "its parameters are sharded, and the engine decodes with whole ones"


class BudgetRollout:
    """`GRPOTrainer(…, rollout_func=BudgetRollout(Budget(think=1024, solve=1024)))`.

    budget: for all prompts, or a function of the prompt. config: the engine's; its device and dtype are the
    model's unless set. sleep: release the engine's KV pages while the trainer updates. chat_template_kwargs
    go to the chat template. seed: samples depend on it, trainer.state.global_step, the process and the
    prompt's place alone, so a run that is resumed draws what it would have drawn.

    The engine is made at the first rollout, over `trainer.model`'s parameters without a copy where dtype and
    device agree, and follows each update. Temperature, top_p, top_k, min_p and repetition_penalty are those
    of `trainer.args`. Equal prompts side by side, as TRL sends a group, are computed once.

    Beside what TRL asks for, each completion brings think_tokens, solve_tokens (sampled), think_end,
    finish_reason, thinking_text and solution_text, which TRL hands to reward functions as arguments. logprobs
    are those of the distribution drawn from; at a forced token, which nothing was drawn for, the model's own.

    TRL knows an end by EOS only: outputs that the solution's budget ends count in its clipped_ratio, and are
    dropped by mask_truncated_completions. Raises ConfigError for models it cannot share weights with (PEFT,
    ZeRO-3, FSDP), for generation settings it would ignore, and where an output is longer than
    max_completion_length.
    """

    def __init__(
        self,
        budget: AnyBudget | BudgetOf,
        *,
        config: EngineConfig | None = None,
        seed: int = 0,
        sleep: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        think_open: str | Sequence[int] | None = None,
        think_close: str | Sequence[int] | None = None,
    ) -> None:
        if not (isinstance(budget, (Budget, Policy)) or callable(budget)):
            raise ConfigError(f"budget must be a Budget, a policy or a function of a prompt, got {budget!r}")
        self._budget = budget
        self._config = config
        self._seed = seed
        self._sleep = sleep
        self._template_kwargs = chat_template_kwargs
        self._delimiters: dict[str, Any] = {"think_open": think_open, "think_close": think_close}
        self._at: tuple[int, int] = (-1, 0)  # global_step, calls within it so far
        self.engine: Engine | None = None  # after the first rollout

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """prompts: strings or chats, a prompt as often as it is to be sampled. Lists in their order."""
        sampling = _sampling(trainer.args)
        engine = self._ready(trainer)
        runs = [(prompt, len(list(equal))) for prompt, equal in itertools.groupby(prompts)]
        place = self._place(trainer)
        outputs: list[tuple[list[int], Completion] | None] = [None] * len(prompts)
        firsts = list(itertools.accumulate((count for _, count in runs), initial=0))
        for count in sorted({count for _, count in runs}):  # as a rule there is one
            chosen = [at for at, run in enumerate(runs) if run[1] == count]
            generations = engine.rollout(
                [runs[at][0] for at in chosen],
                n=count,
                budget=[self._budget_of(runs[at][0]) for at in chosen],
                sampling=[replace(sampling, seed=_seed(self._seed, *place, at)) for at in chosen],
                chat_template_kwargs=self._template_kwargs,
            )
            for generation in generations:
                first = firsts[chosen[generation.index]]
                for sample, completion in enumerate(generation.completions):
                    outputs[first + sample] = (generation.prompt_token_ids, completion)
        if self._sleep:
            engine.sleep()
        done = [output for output in outputs if output is not None]
        assert len(done) == len(prompts)
        _check_lengths([completion for _, completion in done], trainer.args)
        return _as_trl_wants(done)

    def _budget_of(self, prompt: Any) -> AnyBudget:
        if isinstance(self._budget, (Budget, Policy)):
            return self._budget
        return self._budget(prompt)

    def _place(self, trainer: Any) -> tuple[int, int, int]:
        step = int(trainer.state.global_step)
        self._at = (step, self._at[1] + 1 if self._at[0] == step else 0)
        return (*self._at, int(trainer.accelerator.process_index))

    def _ready(self, trainer: Any) -> Engine:
        """The engine, with the weights of now."""
        if self.engine is None:
            self.engine = self._make(trainer)
            return self.engine
        self.engine.wake()
        self.engine.sync_weights()
        return self.engine

    def _make(self, trainer: Any) -> Engine:
        model = trainer.accelerator.unwrap_model(trainer.model)
        plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ConfigError(f"BudgetRollout cannot share a model under DeepSpeed ZeRO-3: {_SHARDED}")
        if getattr(trainer.accelerator.state, "fsdp_plugin", None) is not None:
            raise ConfigError(f"BudgetRollout cannot share a model under FSDP: {_SHARDED}")
        if hasattr(model, "peft_config"):
            raise ConfigError(
                "BudgetRollout cannot share a model with PEFT adapters, which the engine would not see; "
                "`elastic-decode train` trains LoRA under budgets"
            )
        device = str(next(model.parameters()).device)
        config = self._config or EngineConfig(device=device)
        if config.device.split(":")[0] != device.split(":")[0]:
            raise ConfigError(
                f"EngineConfig.device is {config.device!r}, the trainer's model is on {device!r}"
            )
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        return Engine.from_model(model, tokenizer, config, **self._delimiters)


def _sampling(args: Any) -> SamplingParams:
    """The sampling that TRL's configuration asks for, without a seed. Raises ConfigError."""
    if getattr(args, "generation_kwargs", None):
        raise ConfigError(
            f"GRPOConfig.generation_kwargs={args.generation_kwargs!r} would be ignored by BudgetRollout; use "
            "temperature, top_p, top_k, min_p and repetition_penalty"
        )
    return SamplingParams(
        temperature=float(args.temperature),
        top_p=float(args.top_p),
        top_k=int(args.top_k or 0),
        min_p=float(args.min_p or 0.0),
        repetition_penalty=float(args.repetition_penalty),
    )


def _seed(*parts: int) -> int:
    said = "/".join(map(str, ("trl", *parts)))
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 1


def _check_lengths(completions: Sequence[Completion], args: Any) -> None:
    longest = max(len(completion.token_ids) for completion in completions)
    limit = getattr(args, "max_completion_length", None)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"an output has {longest} tokens, GRPOConfig.max_completion_length is {limit}: budgets bound the "
            "outputs here, and nothing cuts them; raise it to think + close + solve, or lower the budgets"
        )
    if any(not completion.token_ids for completion in completions):
        raise ConfigError("an output has no token at all, which TRL cannot train on: its budget is 0")


def _as_trl_wants(done: Sequence[tuple[list[int], Completion]]) -> dict[str, list[Any]]:
    def logprobs(completion: Completion) -> list[float]:
        drawn = zip(completion.logprobs, completion.sampling_logprobs, completion.forced, strict=True)
        return [own if forced else sampled for own, sampled, forced in drawn]

    completions = [completion for _, completion in done]
    return {
        "prompt_ids": [list(prompt_ids) for prompt_ids, _ in done],
        "completion_ids": [completion.token_ids for completion in completions],
        "logprobs": [logprobs(completion) for completion in completions],
        "env_mask": [[int(not forced) for forced in completion.forced] for completion in completions],
        "think_tokens": [completion.think_tokens for completion in completions],
        "solve_tokens": [completion.solve_tokens for completion in completions],
        "think_end": [completion.think_end for completion in completions],
        "finish_reason": [completion.finish_reason for completion in completions],
        "thinking_text": [completion.thinking for completion in completions],
        "solution_text": [completion.solution for completion in completions],
    }
