"""Rewards of groups into advantages, one a sample. Plain floats: groups are small, and nothing here is tuned.

A reward of None could not be scored: it is in no mean and no spread, and its sample is not trained on (None
again). A group with fewer than two scorable samples has nothing to compare and is not trained on either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from elastic_decode.errors import ConfigError

# (scorable rewards of one group, at least two and not all equal; eps) -> advantages
Estimator = Callable[[Sequence[float], float], list[float]]


def grpo(rewards: Sequence[float], eps: float = 1e-6) -> list[float]:
    """(r - mean) / (std + eps), std unbiased (n - 1).

    GRPO, arXiv 2402.03300, section 4.1.2. The paper does not say which standard deviation; the unbiased one
    with eps = 1e-6 is that of the code of Elastic Reasoning (arXiv 2505.05315).
    """
    centred = dr_grpo(rewards)
    spread = math.sqrt(math.fsum(value * value for value in centred) / (len(rewards) - 1))
    return [value / (spread + eps) for value in centred]


def dr_grpo(rewards: Sequence[float], eps: float = 0.0) -> list[float]:
    """r - mean. Dr. GRPO, arXiv 2503.20783: dividing by the std weighs questions by how easy they are."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def rloo(rewards: Sequence[float], eps: float = 0.0) -> list[float]:
    """r - mean of the others. RLOO, arXiv 2402.14740: n / (n - 1) times Dr. GRPO's."""
    total, others = math.fsum(rewards), len(rewards) - 1
    return [reward - (total - reward) / others for reward in rewards]


ESTIMATORS: dict[str, Estimator] = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo}


@dataclass(frozen=True, slots=True, kw_only=True)
class Advantages:
    """`values[g][i]`: the advantage of sample i of group g; None = not trained on.

    groups, samples: how many were given. unscorable: samples without a reward. too_few: groups with fewer
    than two scorable samples. flat: other groups whose rewards are all equal. dropped: those of `flat` that
    were dropped (0 unless drop_flat).
    """

    values: tuple[tuple[float | None, ...], ...]
    groups: int
    samples: int
    unscorable: int
    too_few: int
    flat: int
    dropped: int

    @property
    def spread(self) -> int:
        """Groups that say which of their samples were better: all that moves the policy."""
        return self.groups - self.too_few - self.flat


def estimator(name: str) -> Estimator:
    """The estimator of that name; ConfigError with the names there are."""
    if name not in ESTIMATORS:
        raise ConfigError(f"no advantage estimator {name!r}; there are {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def advantages(
    groups: Sequence[Sequence[float | None]],
    kind: str = "grpo",
    *,
    eps: float = 1e-6,
    drop_flat: bool = False,
) -> Advantages:
    """Advantages of every group by the estimator `kind` of ESTIMATORS.

    A group without a spread gets 0 (it still feels KL and entropy, and counts in the denominators), or with
    `drop_flat`, the filter of DAPO's dynamic sampling (arXiv 2503.14476, section 3.2), is not trained on; to
    sample others in its place is the caller's. ConfigError for an unknown kind, ValueError for a reward that
    is not finite.
    """
    estimate = estimator(kind)
    values: list[tuple[float | None, ...]] = []
    unscorable = too_few = flat = 0
    for index, rewards in enumerate(groups):
        scored = [reward for reward in rewards if reward is not None]
        if not all(math.isfinite(reward) for reward in scored):
            raise ValueError(
                f"group {index} has rewards {list(rewards)}; a reward must be finite, or None where a sample "
                "cannot be scored"
            )
        unscorable += len(rewards) - len(scored)
        if len(scored) < 2:
            too_few += 1
            values.append((None,) * len(rewards))
            continue
        if min(scored) == max(scored):  # exactly 0, where a rounded mean would leave noise
            flat += 1
            if drop_flat:
                values.append((None,) * len(rewards))
                continue
            own = [0.0] * len(scored)
        else:
            own = estimate(scored, eps)
        rest = iter(own)
        values.append(tuple(None if reward is None else next(rest) for reward in rewards))
    return Advantages(
        values=tuple(values),
        groups=len(groups),
        samples=sum(len(rewards) for rewards in groups),
        unscorable=unscorable,
        too_few=too_few,
        flat=flat,
        dropped=flat if drop_flat else 0,
    )
