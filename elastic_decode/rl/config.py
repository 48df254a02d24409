"""`GRPOConfig`: everything a training run is made of, as frozen data that checks itself."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elastic_decode.config import EngineConfig
from elastic_decode.errors import ConfigError
from elastic_decode.rl import yaml_files
from elastic_decode.rl.fields import build, flat, plain, positive, require
from elastic_decode.rl.options import (
    DataOptions,
    DistributedOptions,
    EvaluationOptions,
    ModelOptions,
    RolloutOptions,
)

# Of rl/length_rewards.py, tasks/math.py and tasks/code_grader.py.
REWARD_FACTORIES = ("l1_exact", "l1_max", "long2short", "soft_overlong", "math", "code")
LOGS = ("tensorboard", "wandb", "trackio")


@dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """function: "module:function", a function in TRL's signature; "countdown"; or one of REWARD_FACTORIES,
    made with `options`, whose `correct` is such a name again. weight: 0 records it only.
    """

    function: str
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    name: str | None = None

    def __post_init__(self) -> None:
        known = self.function in ("countdown", *REWARD_FACTORIES)
        require(
            known or bool(re.fullmatch(r"[\w.]+:[\w.]+", self.function)),
            "function",
            f"'module:function', countdown or {', '.join(REWARD_FACTORIES)}",
            self.function,
        )
        require(math.isfinite(self.weight), "weight", "finite", self.weight)

    @property
    def label(self) -> str:
        """What metrics and messages call it."""
        return self.name or self.function.rpartition(":")[2]


@dataclass(frozen=True, kw_only=True)
class GradingOptions:
    """workers: processes that score. timeout: seconds for one function on one group. on_error: what a
    function that raises does to the run: end it, or leave the samples unscored.
    """

    workers: int = 2
    timeout: float = 60.0
    on_error: Literal["raise", "none"] = "raise"

    def __post_init__(self) -> None:
        require(self.workers >= 0, "grading.workers", ">= 0", self.workers)
        require(0 < self.timeout < math.inf, "grading.timeout", "seconds > 0", self.timeout)


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """name: one of loss.OBJECTIVES. null means what belongs to that objective in its paper: clip_low,
    clip_high (the ratio stays in [1 - clip_low, 1 + clip_high]), normalisation, advantages (an estimator of
    advantage.ESTIMATORS), drop_flat (groups without a spread are not trained on).

    dynamic_sampling: decode further prompts until the step has prompts_per_step groups with a spread, in at
    most max_sampling_rounds rounds (DAPO; see rl/refill.py). kl, entropy: coefficients of the KL to the
    initial model and of the entropy bonus. importance_cap: of the correction for what log-probabilities of
    rollout and trainer differ by; null = none. constant_length: what Dr. GRPO divides by; null = the longest
    output that the budgets allow.
    """

    name: str = "grpo"
    clip_low: float | None = None
    clip_high: float | None = None
    normalisation: Literal["token", "sequence", "constant", "sum"] | None = None
    advantages: str | None = None
    drop_flat: bool | None = None
    dynamic_sampling: bool = False
    max_sampling_rounds: int = 4
    kl: float = 0.0
    entropy: float = 0.0
    importance_cap: float | None = None
    constant_length: int | None = None

    def __post_init__(self) -> None:
        from elastic_decode.rl.advantage import estimator
        from elastic_decode.rl.loss import objective  # imports torch

        chosen = objective(self.name)
        if self.advantages is not None:
            estimator(self.advantages)
        low, high, cap = self.clip_low, self.clip_high, self.importance_cap
        require(low is None or 0 <= low <= 1, "objective.clip_low", "in [0, 1] or null", low)
        require(high is None or 0 <= high < math.inf, "objective.clip_high", ">= 0 or null", high)
        require(0 <= self.kl < math.inf, "objective.kl", ">= 0", self.kl)
        require(math.isfinite(self.entropy), "objective.entropy", "finite", self.entropy)
        require(cap is None or cap >= 1, "objective.importance_cap", ">= 1 or null", cap)
        length = self.constant_length
        require(length is None or length >= 1, "objective.constant_length", ">= 1 or null", length)
        positive("objective", self, "max_sampling_rounds")
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            why = f"null where objective.name is {self.name!r}, which clips nothing"
            require(chosen.clips or value is None, f"objective.{name}", why, value)
        divides = (self.normalisation or chosen.normalisation) == "constant"
        why = "null unless objective.normalisation is 'constant'"
        require(length is None or divides, "objective.constant_length", why, length)
        drops = self.drop_flat if self.drop_flat is not None else chosen.drop_flat
        if self.dynamic_sampling and not drops:
            raise ConfigError(
                "objective.dynamic_sampling replaces dropped groups: it needs objective.drop_flat"
            )


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """Low-rank adapters through peft; see rl/lora.py.

    targets: names of linear modules as peft matches them (q_proj: in every layer), or "all-linear": all but
    the head. alpha: the adapter's product is scaled by alpha / r. dropout: of the adapter's input, when the
    trainer computes log-probabilities; the engine decodes without it, so the two differ (and old from new
    ones, with optim.updates_per_step > 1).
    """

    r: int = 16
    alpha: float = 32.0
    targets: str | Sequence[str] = "all-linear"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        positive("optim.lora", self, "r")
        require(self.alpha > 0, "optim.lora.alpha", "> 0", self.alpha)
        require(0 <= self.dropout < 1, "optim.lora.dropout", "in [0, 1)", self.dropout)
        require(bool(self.targets), "optim.lora.targets", "module names or 'all-linear'", self.targets)


@dataclass(frozen=True, kw_only=True)
class OptimOptions:
    """AdamW. warmup: steps of rising rate. updates_per_step: a step's samples are cut into so many
    mini-batches, an update each. max_tokens_per_microbatch: prompt + output tokens, and padding, in one
    forward pass. dtype: of the trained parameters; bfloat16 has float32 master weights. forward: what
    computes the trainer's log-probabilities: "hf", the Hugging Face module, or "engine", the kernels that
    decode (docs/on-policy.md).
    """

    lr: float
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    grad_clip: float | None = 1.0
    updates_per_step: int = 1
    max_tokens_per_microbatch: int = 16384
    gradient_checkpointing: bool = False
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    forward: Literal["hf", "engine"] = "hf"
    lora: LoraOptions | None = None

    def __post_init__(self) -> None:
        require(0 < self.lr < math.inf, "optim.lr", "> 0", self.lr)
        require(self.warmup >= 0, "optim.warmup", ">= 0", self.warmup)
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay", ">= 0", self.weight_decay)
        good = len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas)
        require(good, "optim.betas", "two numbers in [0, 1)", list(self.betas))
        require(self.eps > 0, "optim.eps", "> 0", self.eps)
        require(
            self.grad_clip is None or self.grad_clip > 0, "optim.grad_clip", "> 0 or null", self.grad_clip
        )
        positive("optim", self, "updates_per_step", "max_tokens_per_microbatch")
        if self.forward == "engine":
            checkpointing, dropout = self.gradient_checkpointing, self.lora.dropout if self.lora else 0
            why = "where optim.forward is 'engine'"
            require(not checkpointing, "optim.gradient_checkpointing", f"false {why}", checkpointing)
            require(not dropout, "optim.lora.dropout", f"0 {why}", dropout)


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """folder: where metrics and checkpoints go; null = runs/<name>. save_every, eval_every: steps; 0 = never
    (but at the end a checkpoint is saved always). keep: checkpoints. log: of LOGS (rl/trackers.py);
    metrics.jsonl is always written. progress: a display on the terminal.
    """

    name: str
    steps: int
    folder: str | None = None
    seed: int = 0
    save_every: int = 50
    keep: int = 2
    eval_every: int = 0
    log: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    progress: bool = True

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[\w.-]+", self.name)), "run.name", "letters, digits, . _ -", self.name)
        positive("run", self, "steps", "keep")
        require(0 <= self.seed < 2**63, "run.seed", "in [0, 2**63)", self.seed)
        for name in ("save_every", "eval_every"):
            require(getattr(self, name) >= 0, f"run.{name}", ">= 0", getattr(self, name))

    @property
    def path(self) -> Path:
        return Path(self.folder) if self.folder is not None else Path("runs") / self.name


@dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """A training run. Raises ConfigError, with the key's path, for whatever cannot be."""

    model: ModelOptions
    data: DataOptions
    rollout: RolloutOptions
    rewards: tuple[RewardOptions, ...]
    optim: OptimOptions
    run: RunOptions
    engine: EngineConfig = field(default_factory=EngineConfig)
    grading: GradingOptions = field(default_factory=GradingOptions)
    objective: ObjectiveOptions = field(default_factory=ObjectiveOptions)
    evaluation: EvaluationOptions | None = None
    distributed: DistributedOptions = field(default_factory=DistributedOptions)

    def __post_init__(self) -> None:
        require(len(self.rewards) > 0, "rewards", "one or more functions", self.rewards)
        require(any(r.weight for r in self.rewards), "rewards", "not all of weight 0", list(self.rewards))
        if self.run.eval_every and self.evaluation is None:
            raise ConfigError(
                "run.eval_every needs to know what to evaluate: give data and budgets in evaluation"
            )
        known = [reward.label for reward in self.rewards]
        for name in self.evaluation.rewards if self.evaluation is not None else ():
            require(name in known, "evaluation.rewards", f"of {', '.join(known)}", name)
        samples, updates = (
            self.rollout.prompts_per_step * self.rollout.group_size,
            self.optim.updates_per_step,
        )
        if self.optim.forward == "engine":
            self._check_engine_forward()
        require(updates <= samples, "optim.updates_per_step", f"<= the {samples} samples of a step", updates)
        if updates > 1:
            self._check_off_policy()

    def _check_off_policy(self) -> None:
        from elastic_decode.rl.loss import objective

        name, updates = self.objective.name, self.optim.updates_per_step
        why = f"1 where objective.name is {name!r}: it has no ratio, and only the first update is on-policy"
        require(objective(name).clips, "optim.updates_per_step", why, updates)

    def _check_engine_forward(self) -> None:
        engine, why = self.engine, "where optim.forward is 'engine'"
        require(engine.batch_invariant, "engine.batch_invariant", f"true {why}", engine.batch_invariant)
        for name in ("dtype", "kv_dtype"):
            value, allowed = getattr(engine, name), ("auto", self.optim.dtype)
            require(value in allowed, f"engine.{name}", f"'auto' or {self.optim.dtype!r} {why}", value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GRPOConfig:
        """The inverse of `to_dict`; what is left out has its default, what is unknown raises."""
        return build(cls, values)

    def to_dict(self) -> dict[str, Any]:
        """Everything, defaults too, as dicts, lists, strings, numbers, booleans and None."""
        values: dict[str, Any] = plain(self)
        return values

    def to_yaml(self) -> str:
        """`load_config` of this text is equal to the configuration."""
        return yaml_files.dump(self.to_dict())

    def resume_key(self) -> dict[str, Any]:
        """What decides the numbers of a run, by dotted path: what may not differ when it is resumed."""
        # Where bits depend on the batch, so do samples on how batches are made.
        free = (
            set(_FREE) if self.engine.batch_invariant else {p for p in _FREE if not p.startswith("engine.")}
        )
        if self.optim.schedule == "constant":
            free.add("run.steps")  # else the learning rate depends on it
        values = {name: value for name, value in self.to_dict().items() if name != "evaluation"}
        return {path: value for path, value in flat(values).items() if path not in free}

    def fingerprint(self) -> str:
        """A hash of `resume_key`, the same in every process and version of Python."""
        text = json.dumps(self.resume_key(), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


# Neither samples nor updates depend on these.
_FREE = (
    *(f"run.{name}" for name in ("name", "folder", "save_every", "keep", "eval_every", "log", "progress")),
    *(f"engine.{name}" for name in ("max_batch", "kv_memory", "page_size", "horizon", "prefill_tokens")),
    "engine.cuda_graphs",
    "rollout.sleep_in_update",
    "engine.prefix_cache",
    *(f"grading.{name}" for name in ("workers", "timeout", "on_error")),
    *(f"distributed.{name}" for name in ("sharding", "timeout")),
)


def changes(old: GRPOConfig, new: GRPOConfig) -> list[str]:
    """Why `new` cannot resume a run of `old`: a line a key, `optim.lr: 1e-06 -> 1e-05`."""
    before, after = old.resume_key(), new.resume_key()
    absent = "(not there)"
    return [
        f"{path}: {before.get(path, absent)} -> {after.get(path, absent)}"
        for path in dict.fromkeys([*before, *after])
        if path not in before or path not in after or before[path] != after[path]
    ]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> GRPOConfig:
    """A YAML file, then `optim.lr=1e-5`-like overrides, whose values are YAML, one after the other.

    `rewards.0.weight=0.5` goes into a list. Raises ConfigError, naming the file, where anything is wrong.
    """
    values = yaml_files.load(Path(path))
    for override in overrides:
        yaml_files.override(values, override)
    try:
        return GRPOConfig.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
