"""What whoever runs a server decides, and what that makes of a request's budgets."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from elastic_decode.budgets import Elastic, NoThinking, Policy, Truncate, elastic, truncate
from elastic_decode.core import SamplingParams
from elastic_decode.errors import BudgetError, ConfigError


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """model_name: what requests call the model. api_key: what they must bring, None lets everybody in.

    policy: for requests that name no budgets; one with `think` and `solve`, which requests replace. sampling:
    what a request does not say. max_waiting: samples taken on beyond the engine's `max_batch` rows; what
    would exceed it is answered with 429.
    """

    model_name: str
    api_key: str | None = None
    policy: Policy = field(default_factory=elastic)
    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_waiting: int = 128

    def __post_init__(self) -> None:
        if isinstance(self.policy, Truncate) or not {"think", "solve"} <= set(vars(self.policy)):
            raise ConfigError(
                f"a server's policy needs a think and a solve budget, got {self.policy}; a request's "
                "max_tokens alone is what truncate does"
            )
        if isinstance(self.max_waiting, bool) or self.max_waiting < 0:
            raise ConfigError(f"max_waiting must be >= 0, got {self.max_waiting!r}")
        if not self.model_name:
            raise ConfigError("model_name must not be empty")
        if self.api_key == "":
            raise ConfigError("api_key must not be empty; leave it out to let everybody in")


def policy_for(default: Policy, *, think: int | None, solve: int | None, total: int | None) -> Policy:
    """The policy of a request that asks for these budgets, all in sampled tokens; None is not said.

    `total` (max_tokens) bounds think and solve together. What the request says is kept or refused with
    BudgetError, never changed; only the default's budgets give way to `total`, the thinking's first. `total`
    alone, where the default has no budgets either, is `truncate(total)`.
    """
    if isinstance(default, NoThinking) and think is not None:
        default = Elastic(None, default.solve)
    usual_think: int | None = vars(default)["think"]
    usual_solve: int | None = vars(default)["solve"]
    if total is None:
        return replace(
            default,
            think=usual_think if think is None else think,
            solve=usual_solve if solve is None else solve,
        )  # type: ignore[call-arg]
    if think is None and solve is None and usual_think is None and usual_solve is None:
        if type(default) is not Elastic:
            raise BudgetError(
                f"max_tokens alone does not say how much of it the policy {default.name} may think; send "
                "thinking_token_budget or solution_token_budget"
            )
        return truncate(total)
    left = total - vars(default).get("grace", 0)
    if solve is None:
        # The solution comes first among what is not said, but a thinking budget that was said is kept.
        room = left if think is None else left - think
        solve = room if usual_solve is None else min(usual_solve, room)
        if think is None and usual_solve is None and usual_think is not None:
            solve = room - usual_think
        if solve < 1:
            raise BudgetError(
                f"max_tokens {total} leaves no token for the solution behind a thinking budget of "
                f"{(usual_think if think is None else think) or total - left}; raise it, or send a smaller "
                "thinking_token_budget"
            )
    if think is None:
        think = left - solve if usual_think is None else min(usual_think, left - solve)
    if think < 0 or think + solve > left:
        raise BudgetError(
            f"max_tokens {total} is less than the budgets within it: {max(think, 0)} for thinking"
            f"{f' with a grace of {total - left}' if left != total else ''} and {solve} for the solution"
        )
    return replace(default, think=think, solve=solve)  # type: ignore[call-arg]
