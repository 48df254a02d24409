"""Parts of a configuration: which model, which prompts, how they are decoded, what is evaluated."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from elastic_decode.core import SamplingParams
from elastic_decode.errors import ConfigError
from elastic_decode.rl.budget_options import check_budgets, stages
from elastic_decode.rl.fields import positive, require
from elastic_decode.tasks.data import DataOptions as DataOptions

# What the engine gives to apply_chat_template.
_OURS = frozenset({"conversation", "tokenize", "add_generation_prompt", "continue_final_message"})


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """path: a checkpoint folder, a hub id, or "tiny" for the bundled model. revision: a
    branch, tag or commit of a hub id, of weights and tokenizer. think_open, think_close: the
    delimiters, found in the tokenizer and chat template unless given.
    """

    path: str
    revision: str | None = None
    think_open: str | None = None
    think_close: str | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """A step decodes prompts_per_step x group_size samples.

    budgets: {plan: fixed, think: 1024, solve: 1024} or another plan of rl/budgets.py, with its fields; null
    is unlimited. sampling: its seed must be null, seeds derive from run.seed, step, prompt and sample.
    train_on_forced: forced tokens are in the loss (the paper), or not (on-policy). too_long: what to do with
    prompts that leave no room for their budgets. max_prompt_tokens: a longer prompt is too long, too.
    chat_template_kwargs: what the chat template is given besides the chat ({enable_thinking: true}, say); one
    that it does not look at does nothing, as in transformers. sleep_in_update: the engine gives its KV pages
    and recorded graphs back while the trainer updates; samples are the same, each step records graphs anew.
    """

    prompts_per_step: int
    group_size: int
    budgets: Mapping[str, Any]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    train_on_forced: bool = False
    too_long: Literal["skip", "raise"] = "skip"
    max_prompt_tokens: int | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sleep_in_update: bool = False

    def __post_init__(self) -> None:
        positive("rollout", self, "prompts_per_step")
        require(self.group_size >= 2, "rollout.group_size", ">= 2: a group is compared", self.group_size)
        check_budgets(self.budgets, "rollout.budgets")
        seed = self.sampling.seed
        require(seed is None, "rollout.sampling.seed", "null (seeds derive from run.seed)", seed)
        limit = self.max_prompt_tokens
        require(limit is None or limit >= 1, "rollout.max_prompt_tokens", ">= 1 or null", limit)
        for name in _OURS.intersection(self.chat_template_kwargs):
            raise ConfigError(f"rollout.chat_template_kwargs.{name}: the engine decides on this itself")
        for plan in stages(self.budgets):
            branches = len(plan["think_at"]) if plan["plan"] == "fork" else 1
            expected = f"a multiple of the {branches} budgets of a forked thought"
            require(self.group_size % branches == 0, "rollout.group_size", expected, self.group_size)


@dataclass(frozen=True, kw_only=True)
class EvaluationBudget:
    """Think and solve budgets, null = unlimited; or `truncate`, one budget for the whole output in which
    nothing is forced. name: in metrics; from the budgets unless given.
    """

    think: int | None = None
    solve: int | None = None
    truncate: int | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("think", "solve", "truncate"):
            value = getattr(self, name)
            require(value is None or value >= 0, name, "a number of tokens >= 0 or null", value)
        alone = self.truncate is None or (self.think is None and self.solve is None)
        require(alone, "truncate", "without think and solve: it is one budget", self.truncate)
        good = self.name is None or re.fullmatch(r"[\w.-]+", self.name)
        require(bool(good), "name", "letters, digits, . _ -, or null", self.name)

    @property
    def label(self) -> str:
        """`t15_s3`, `tinf_s3`, `truncate18`."""
        if self.name is not None:
            return self.name
        if self.truncate is not None:
            return f"truncate{self.truncate}"
        think, solve = ("inf" if value is None else value for value in (self.think, self.solve))
        return f"t{think}_s{solve}"


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What rl/evaluation.py does every run.eval_every steps, and before the first (at_start) and after the
    last (at_end); never where run.eval_every is 0.

    data: as for training, though never shuffled by run.seed. limit: only so many of its rows, the same
    random ones in every run (the first ones where data.shuffle is false). n: samples a prompt. sampling: its
    seed must be null. rewards: names of reward functions whose sum is the accuracy; none = the reward that is
    trained on. Prompts and chat template are as in the rollout.
    """

    data: DataOptions
    budgets: tuple[EvaluationBudget, ...]
    n: int = 1
    limit: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    rewards: tuple[str, ...] = ()
    at_start: bool = True
    at_end: bool = True

    def __post_init__(self) -> None:
        positive("evaluation", self, "n")
        require(self.limit is None or self.limit >= 1, "evaluation.limit", ">= 1 or null", self.limit)
        require(len(self.budgets) > 0, "evaluation.budgets", "one or more", self.budgets)
        seed = self.sampling.seed
        require(seed is None, "evaluation.sampling.seed", "null (seeds derive from run.seed)", seed)
        labels = [budget.label for budget in self.budgets]
        require(len(set(labels)) == len(labels), "evaluation.budgets", "of different names", labels)


@dataclass(frozen=True, kw_only=True)
class DistributedOptions:
    """How processes share a run, where torchrun started several (docs/scale-out.md); one does without.

    sharding: ddp, every process holds all weights; fsdp (FSDP2), it holds a part of weights, gradients and
    optimizer state, and the engine a copy of the weights. timeout: seconds that a process waits for the
    slowest, in a rollout for one, before the run ends.
    """

    sharding: Literal["ddp", "fsdp"] = "ddp"
    timeout: float = 1800.0

    def __post_init__(self) -> None:
        limit = self.timeout
        require(0 < limit < math.inf, "distributed.timeout", "seconds > 0", limit)
