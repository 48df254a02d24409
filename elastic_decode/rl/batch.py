"""What a trainer's step is made of, as plain data: a sample of a dataset's row, their group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic_decode.core import Completion, FinishReason, ThinkEnd
from elastic_decode.tasks.data import Row as Row


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One completion with what a loss needs. Raises ValueError where its parallel tuples differ in length.

    token_ids, logprobs, sampling_logprobs, forced, loss_mask: an entry an output token, a final EOS included;
    the first four as in `Completion`. loss_mask: the token is trained on (False where forced, unless
    train_on_forced). think_tokens and solve_tokens count sampled tokens. think_budget, solve_budget: what the
    sample was decoded under, None = unlimited. rewards: by reward function. reward: their weighted sum over
    those that are not None; None = unscorable, or not scored yet: never a 0, and never in a mean.
    """

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    sampling_logprobs: tuple[float, ...]
    forced: tuple[bool, ...]
    loss_mask: tuple[bool, ...]
    text: str
    thinking: str
    solution: str
    think_tokens: int
    solve_tokens: int
    think_end: ThinkEnd
    finish_reason: FinishReason
    think_budget: int | None
    solve_budget: int | None
    seed: int
    weight_epoch: int
    rewards: Mapping[str, float | None] = field(default_factory=dict)
    reward: float | None = None

    def __post_init__(self) -> None:
        parallel = ("token_ids", "logprobs", "sampling_logprobs", "forced", "loss_mask")
        lengths = {name: len(getattr(self, name)) for name in parallel}
        if len(set(lengths.values())) > 1:
            said = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"a sample's parallel tuples must be of one length, got {said}")

    @classmethod
    def of(
        cls,
        completion: Completion,
        prompt_ids: Sequence[int],
        think_budget: int | None,
        solve_budget: int | None,
        *,
        train_on_forced: bool = False,
    ) -> Sample:
        """A completion that was decoded under these budgets, not scored yet."""
        return cls(
            prompt_ids=tuple(prompt_ids),
            token_ids=tuple(completion.token_ids),
            logprobs=tuple(completion.logprobs),
            sampling_logprobs=tuple(completion.sampling_logprobs),
            forced=tuple(completion.forced),
            loss_mask=tuple(train_on_forced or not forced for forced in completion.forced),
            text=completion.text,
            thinking=completion.thinking,
            solution=completion.solution,
            think_tokens=completion.think_tokens,
            solve_tokens=completion.solve_tokens,
            think_end=completion.think_end,
            finish_reason=completion.finish_reason,
            think_budget=think_budget,
            solve_budget=solve_budget,
            seed=completion.seed,
            weight_epoch=completion.weight_epoch,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """All samples of one prompt in one step: what a group-relative advantage is relative to.

    index: the dataset's row. step: the trainer's step. columns: the row without its prompt, as the reward
    functions saw it.
    """

    index: int
    step: int
    samples: tuple[Sample, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rewards(self) -> tuple[float | None, ...]:
        """Of every sample, in order; None where unscorable."""
        return tuple(sample.reward for sample in self.samples)

    @property
    def has_spread(self) -> bool:
        """Whether its samples were worth different rewards: all that an advantage is made of."""
        return len({reward for reward in self.rewards if reward is not None}) > 1
