"""Plain data that crosses the library: what a user asks for and what comes back.

No behaviour beyond checking itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from elastic_decode.errors import ConfigError

if TYPE_CHECKING:
    from elastic_decode.budgets import Policy
    from elastic_decode.delimiters import Delimiters

ChatMessage = Mapping[str, Any]
Prompt = str | Sequence[int] | Sequence[ChatMessage]
FinishReason = Literal["eos", "budget", "stop", "length", "abort"]
ThinkEnd = Literal["natural", "forced", "eos", "none"]


class Phase(StrEnum):
    """Which segment a token belongs to. The open and close delimiters are THINK, EOS is SOLVE."""

    THINK = "think"
    SOLVE = "solve"


def _is_int(value: object) -> bool:
    """An integer of any kind (numpy's too), but no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_budget(name: str, value: int | None) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} must be an int or None, got {value!r}")
    if value < 0:
        raise ConfigError(f"{name} must be >= 0 or None (unlimited), got {value}")


@dataclass(frozen=True)
class Budget:
    """The elastic policy (arXiv 2505.05315): at most `think` sampled tokens, then `solve` of solution.

    None = unlimited. Forced tokens count in neither. The other policies of `elastic_decode.budgets` go in the
    same place.
    """

    think: int | None = None
    solve: int | None = None

    def __post_init__(self) -> None:
        _check_budget("Budget.think", self.think)
        _check_budget("Budget.solve", self.solve)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a token is drawn. The order: penalties, logit_bias, min_tokens, temperature, top_k, top_p, min_p.

    temperature 0 is greedy. `seed=None` draws one and reports it in `Completion.seed`. Stops act in SOLVE
    unless `stop_in_thinking`; output ends with the token that completes a stop and `text` ends before it.
    `min_tokens` bans EOS and stop ids until that many output tokens exist. Penalties are those of the OpenAI
    API (presence, frequency: over output tokens) and of CTRL (repetition: over prompt and output).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    stop_in_thinking: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        def require(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ConfigError(f"SamplingParams.{name} must be {expected}, got {getattr(self, name)!r}")

        penalties = ("presence_penalty", "frequency_penalty", "repetition_penalty")
        for name in ("temperature", "top_p", "min_p", *penalties):
            value = getattr(self, name)
            require(isinstance(value, (int, float)) and not isinstance(value, bool), name, "a number")
            require(value == value and abs(value) != float("inf"), name, "finite")
        for name in ("top_k", "min_tokens"):
            value = getattr(self, name)
            require(isinstance(value, int) and not isinstance(value, bool), name, "an int")
        require(self.temperature == 0 or self.temperature >= 1e-5, "temperature", "0 (greedy) or >= 1e-5")
        require(self.temperature <= 1e6, "temperature", "at most 1e6")
        require(0 <= self.top_k < 2**31, "top_k", "in [0, 2**31) (0 = off)")
        require(0 < self.top_p <= 1, "top_p", "in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", "in [0, 1]")
        for name in ("presence_penalty", "frequency_penalty"):
            require(abs(getattr(self, name)) <= 1e6, name, "within ±1e6")
        require(1e-6 <= self.repetition_penalty <= 1e6, "repetition_penalty", "in [1e-6, 1e6] (1 = off)")
        require(0 <= self.min_tokens < 2**30, "min_tokens", "in [0, 2**30)")
        if self.seed is not None:
            require(isinstance(self.seed, int) and not isinstance(self.seed, bool), "seed", "an int or None")
            require(0 <= self.seed < 2**63, "seed", "in [0, 2**63)")
        require(self.stop is None or isinstance(self.stop, (str, Sequence)), "stop", "a string or strings")
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        require(all(isinstance(s, str) and s for s in stops), "stop", "non-empty strings")
        object.__setattr__(self, "stop", stops)
        ids = () if self.stop_token_ids is None else self.stop_token_ids
        require(isinstance(ids, Sequence) and all(_is_int(i) for i in ids), "stop_token_ids", "token ids")
        object.__setattr__(self, "stop_token_ids", tuple(int(i) for i in ids))
        if self.logit_bias is not None:
            good = isinstance(self.logit_bias, Mapping) and all(
                _is_int(token) and (abs(value) <= 1e6 or value == -float("inf"))
                for token, value in self.logit_bias.items()
            )
            require(good, "logit_bias", "token ids -> numbers within ±1e6 (or -inf)")
            object.__setattr__(self, "logit_bias", {int(k): float(v) for k, v in self.logit_bias.items()})


@dataclass(kw_only=True)
class Request:
    """One prompt to decode `n` times. `prompt` may be given by position: `Request(prompt, budget=…)`."""

    prompt: Prompt
    budget: Budget | Policy = field(default_factory=Budget)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    n: int = 1
    start_phase: Phase | None = None
    delimiters: Delimiters | None = None
    request_id: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    def __init__(
        self,
        prompt: Prompt,
        *,
        budget: Budget | Policy | None = None,
        sampling: SamplingParams | None = None,
        n: int = 1,
        start_phase: Phase | str | None = None,
        delimiters: Delimiters | None = None,
        request_id: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ConfigError(f"n must be an int >= 1, got {n!r}")
        if sampling is not None and not isinstance(sampling, SamplingParams):
            raise ConfigError(f"Request.sampling must be a SamplingParams, got {sampling!r}")
        self.prompt = prompt
        self.budget = budget if budget is not None else Budget()
        self.sampling = sampling if sampling is not None else SamplingParams()
        self.n = n
        self.start_phase = None if start_phase is None else Phase(start_phase)
        self.delimiters = delimiters
        self.request_id = request_id
        self.chat_template_kwargs = chat_template_kwargs


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One token of one sample. `text` is what this token adds to the printable text (never half a UTF-8
    character; "" while one is incomplete). `finish_reason` is set on a sample's last event, and so is
    `completion`, the whole sample; an aborted sample ends with an event whose token_id is None.
    """

    request_id: str
    index: int  # which prompt of the call
    sample: int  # which of its n samples (for `fork`, which budget)
    token_id: int | None
    text: str
    phase: Phase
    forced: bool
    logprob: float
    finish_reason: FinishReason | None = None
    completion: Completion | None = field(default=None, repr=False)


@dataclass(slots=True)
class Completion:
    """A finished sample. The lists are parallel: an entry a token, a final EOS included (not in `text`).

    `logprobs`: the model's own, log_softmax(logits / T) with T = 1 when greedy, forced tokens included.
    `sampling_logprobs`: under the distribution the token was drawn from; 0 where forced. `think_tokens` and
    `solve_tokens` count sampled tokens only.
    """

    token_ids: list[int]
    logprobs: list[float]
    sampling_logprobs: list[float]
    forced: list[bool]
    phases: list[Phase]
    text: str
    thinking: str
    solution: str
    think_tokens: int
    solve_tokens: int
    think_end: ThinkEnd
    finish_reason: FinishReason
    seed: int
    weight_epoch: int


@dataclass(slots=True)
class Generation:
    """All completions of one prompt, in sample order (for `fork`, in the order of `think_at`)."""

    request_id: str
    index: int
    prompt_token_ids: list[int]
    completions: list[Completion]
