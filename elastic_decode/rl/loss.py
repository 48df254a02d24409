"""Policy-gradient losses as pure functions of per-token log-probabilities, and the registry of them.

Tensors are packed: one entry an output token, samples end to end in any order, a sample whole in one
micro-batch. A masked token (forced, padding, or of a sample that is not trained on) may hold anything, NaN
included: it enters no loss, gradient, ratio, KL, entropy, metric or denominator. The denominators count over
all micro-batches and ranks, so losses of micro-batches *add up* to the loss of the whole batch; so do the
metrics. Where gradients are averaged over ranks (DDP), multiply the loss by the number of ranks.
Nothing here reads a tensor on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elastic_decode.errors import ConfigError

Normalisation = Literal["token", "sequence", "constant", "sum"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """N output tokens of S samples. Log-probabilities are float [N] on one device; ValueError where not.

    logprobs: of the policy that is trained, with its gradient. old_logprobs: of the trainer's policy before
    this step's first update. mask bool [N]: trained on. advantages float [S]. sample_of int64 [N]: which
    sample a token belongs to. sampling_logprobs: of the distribution the rollout drew from, for the
    correction. forced bool [N]: nothing drew this token, so the correction leaves it alone (forced tokens are
    trained on under train_on_forced only). ref_logprobs: of the reference, for the KL. entropy: of the
    policy's distribution at each position, with its gradient, for the bonus.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    mask: Tensor
    advantages: Tensor
    sample_of: Tensor
    sampling_logprobs: Tensor | None = None
    forced: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None

    def __post_init__(self) -> None:
        count = self.logprobs.shape
        if len(count) != 1 or self.advantages.dim() != 1:
            raise ValueError(
                "logprobs must be [tokens] and advantages [samples], got "
                f"{list(count)} and {list(self.advantages.shape)}"
            )
        for name in _PER_TOKEN:
            value = getattr(self, name)
            if value is not None and value.shape != count:
                raise ValueError(f"{name} must be {list(count)} like logprobs, got {list(value.shape)}")
        for name, dtype in (("mask", torch.bool), ("forced", torch.bool), ("sample_of", torch.int64)):
            value = getattr(self, name)
            if value is not None and value.dtype != dtype:
                raise ValueError(f"{name} must be {dtype}, got {value.dtype}")


_PER_TOKEN = ("old_logprobs", "mask", "sample_of", "sampling_logprobs", "forced", "ref_logprobs", "entropy")


class Denominators(NamedTuple):
    """total_tokens: tokens trained on. total_samples: samples with at least one of them."""

    total_tokens: int
    total_samples: int


def denominators(masks: Iterable[Sequence[bool]]) -> Denominators:
    """Counted from the loss masks of all samples that are trained on: all micro-batches, this rank."""
    counts = [sum(map(bool, mask)) for mask in masks]
    return Denominators(sum(counts), sum(count > 0 for count in counts))


class PerToken(NamedTuple):
    """What an objective says of each token. loss: to be minimised, [N]. low, high: bool [N], where clipping
    took effect at that end. ratio [N]: the importance ratio used.
    """

    loss: Tensor
    low: Tensor
    high: Tensor
    ratio: Tensor


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """pi / pi_old of each token."""
    return torch.exp(logprobs - old_logprobs.detach())


def sequence_ratio(
    logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, sample_of: Tensor, samples: int
) -> Tensor:
    """(pi / pi_old of the sample) ^ (1 / its length), at each of its tokens; both over tokens in the mask.

    GSPO, arXiv 2507.18071: a geometric mean of token ratios.
    """
    delta = torch.where(mask, logprobs - old_logprobs.detach(), 0.0)
    length = _per_sample(mask.to(delta.dtype), sample_of, samples).clamp(min=1)
    return torch.exp(_per_sample(delta, sample_of, samples) / length)[sample_of]


def clipped(ratio: Tensor, advantages: Tensor, eps_low: float, eps_high: float) -> PerToken:
    """-min(ratio A, clip(ratio, 1 - eps_low, 1 + eps_high) A): no gradient where the clipped side is chosen.

    PPO, arXiv 1707.06347; two epsilons: DAPO's clip-higher, arXiv 2503.14476, section 3.1.
    """
    bounded = ratio.clamp(1 - eps_low, 1 + eps_high)
    loss = -torch.minimum(ratio * advantages, bounded * advantages)
    low = (ratio < 1 - eps_low) & (advantages < 0)
    high = (ratio > 1 + eps_high) & (advantages > 0)
    return PerToken(loss, low, high, ratio)


def grpo(tokens: Tokens, advantages: Tensor, eps_low: float, eps_high: float) -> PerToken:
    """The clipped surrogate over token ratios. GRPO, arXiv 2402.03300; also Dr. GRPO's and DAPO's, which
    differ from it in normalisation, advantages and epsilons.
    """
    return clipped(token_ratio(tokens.logprobs, tokens.old_logprobs), advantages, eps_low, eps_high)


def gspo(tokens: Tokens, advantages: Tensor, eps_low: float, eps_high: float) -> PerToken:
    """The clipped surrogate over the sequence's ratio, the same at each of its tokens: averaged over them it
    is the sequence's. GSPO, arXiv 2507.18071.
    """
    samples = len(tokens.advantages)
    ratio = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.mask, tokens.sample_of, samples)
    return clipped(ratio, advantages, eps_low, eps_high)


def cispo(tokens: Tokens, advantages: Tensor, eps_low: float, eps_high: float) -> PerToken:
    """-stop_gradient(clip(ratio, 1 - eps_low, 1 + eps_high)) A log pi: the weight is clipped, no token loses
    its gradient. CISPO, MiniMax-M1, arXiv 2506.13585.
    """
    ratio = token_ratio(tokens.logprobs, tokens.old_logprobs).detach()
    loss = -ratio.clamp(1 - eps_low, 1 + eps_high) * advantages * tokens.logprobs
    return PerToken(loss, ratio < 1 - eps_low, ratio > 1 + eps_high, ratio)


def reinforce(tokens: Tokens, advantages: Tensor, eps_low: float, eps_high: float) -> PerToken:
    """-A log pi, with no ratio and nothing clipped: on-policy only, so one update a rollout. REINFORCE as in
    RLOO, arXiv 2402.14740.
    """
    ratio = token_ratio(tokens.logprobs, tokens.old_logprobs).detach()
    never = torch.zeros_like(tokens.mask)
    return PerToken(-advantages * tokens.logprobs, never, never, ratio)


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """The k3 estimate of KL(pi || reference) at tokens drawn from pi: exp(d) - d - 1 with d = ref - log pi.

    Schulman, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), and eq. 4 of GRPO's paper, arXiv
    2402.03300. Never negative.
    """
    delta = ref_logprobs - logprobs
    return torch.expm1(delta) - delta


def truncated_correction(old_logprobs: Tensor, sampling_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old of the trainer / the distribution the rollout drew from, cap), without a gradient.

    Truncated importance sampling for rollout engines that disagree with the trainer: Yao et al., "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training" (fengyao.notion.site/off-policy-rl).
    """
    return torch.exp(old_logprobs - sampling_logprobs).clamp(max=cap).detach()


@dataclass(frozen=True, slots=True)
class Objective:
    """A surrogate and what belongs to it in its paper. `dataclasses.replace` makes variants.

    normalisation: how per-token losses become one number. "token": their mean over all tokens (DAPO).
    "sequence": over a sample's tokens, then over samples (GRPO). "constant": their sum over samples times a
    constant length (Dr. GRPO). "sum": their sum over samples. estimator: of advantage.ESTIMATORS.
    eps_low, eps_high: what the paper used. drop_flat: groups without a spread are left out.
    """

    name: str
    surrogate: Callable[[Tokens, Tensor, float, float], PerToken]
    normalisation: Normalisation
    estimator: str
    eps_low: float
    eps_high: float
    drop_flat: bool
    source: str

    @property
    def clips(self) -> bool:
        """Whether it has a ratio that is clipped: else it takes no epsilons, and one update a rollout."""
        return self.surrogate is not reinforce


OBJECTIVES: dict[str, Objective] = {
    row.name: row
    for row in (
        Objective("grpo", grpo, "sequence", "grpo", 0.2, 0.2, False, "arXiv 2402.03300"),
        Objective("dr_grpo", grpo, "constant", "dr_grpo", 0.2, 0.2, False, "arXiv 2503.20783"),
        Objective("dapo", grpo, "token", "grpo", 0.2, 0.28, True, "arXiv 2503.14476"),
        Objective("gspo", gspo, "sequence", "grpo", 3e-4, 4e-4, False, "arXiv 2507.18071"),
        # MiniMax-M1 has no lower bound and does not say its upper one: weights up to 5, as TRL has it for
        # ScaleRL (arXiv 2510.13786).
        Objective("cispo", cispo, "token", "grpo", 1.0, 4.0, False, "arXiv 2506.13585"),
        Objective("rloo", reinforce, "sum", "rloo", 0.0, 0.0, False, "arXiv 2402.14740"),
    )
}


def objective(name: str) -> Objective:
    """The objective of that name; ConfigError with the names there are."""
    if name not in OBJECTIVES:
        raise ConfigError(f"no objective {name!r}; there are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def weights(
    normalisation: Normalisation,
    mask: Tensor,
    sample_of: Tensor,
    samples: int,
    *,
    total_tokens: int,
    total_samples: int,
    constant_length: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """What each token's loss is multiplied by before all are added up, [N]; 0 outside the mask."""
    taken = mask.to(dtype)
    if normalisation == "token":
        return taken / total_tokens
    if normalisation == "sum":
        return taken / total_samples
    if normalisation == "sequence":
        length = _per_sample(taken, sample_of, samples).clamp(min=1)
        return taken / (length[sample_of] * total_samples)
    if normalisation == "constant":
        if constant_length is None or constant_length < 1:
            raise ConfigError(
                'normalisation "constant" needs constant_length, the most tokens a completion can have '
                f"(Dr. GRPO); got {constant_length!r}"
            )
        return taken / (total_samples * constant_length)
    raise ConfigError(f"no normalisation {normalisation!r}; there are token, sequence, constant, sum")


def policy_loss(
    chosen: Objective,
    tokens: Tokens,
    *,
    total_tokens: int,
    total_samples: int,
    eps_low: float | None = None,
    eps_high: float | None = None,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    correction_cap: float | None = None,
    constant_length: int | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Surrogate (times the truncated correction, where `correction_cap` is given) + kl_coef KL - entropy_coef
    entropy, all three normalised alike; and metrics, detached.

    total_tokens, total_samples: `denominators` of the whole batch, over all ranks. eps_low, eps_high: None =
    the objective's. Loss and metrics of micro-batches add up to the whole batch's. The metrics `loss` and
    `surrogate` are parts of the objective; `ratio`, `clip_low`, `clip_high`, `kl_old` (k3 to old_logprobs),
    `kl`, `entropy`, `correction` and `correction_capped` are means over tokens. In float32 at least. Raises
    ConfigError where a term lacks its tensor or its denominator.
    """
    if total_tokens < 1 or total_samples < 1:
        raise ConfigError(
            f"nothing to train on: {total_tokens} tokens of {total_samples} samples; skip this update"
        )
    for value, name, needed in (
        (kl_coef, "kl_coef", "ref_logprobs"),
        (entropy_coef, "entropy_coef", "entropy"),
        (correction_cap, "correction_cap", "sampling_logprobs"),
    ):
        if value and getattr(tokens, needed) is None:
            raise ConfigError(f"{name}={value} needs Tokens.{needed}, which is None")
    if correction_cap is not None and correction_cap <= 0:
        raise ConfigError(f"correction_cap must be > 0, or None (off), got {correction_cap}")

    tokens = _clean(tokens)
    mask, logprobs, samples = tokens.mask, tokens.logprobs, len(tokens.advantages)
    per_token = chosen.surrogate(
        tokens,
        torch.where(mask, tokens.advantages[tokens.sample_of], 0.0),
        chosen.eps_low if eps_low is None else eps_low,
        chosen.eps_high if eps_high is None else eps_high,
    )
    weight = weights(
        chosen.normalisation,
        mask,
        tokens.sample_of,
        samples,
        total_tokens=total_tokens,
        total_samples=total_samples,
        constant_length=constant_length,
        dtype=logprobs.dtype,
    )

    def mean(values: Tensor) -> Tensor:
        return torch.where(mask, values.detach().to(logprobs.dtype), 0.0).sum() / total_tokens

    metrics = {
        "ratio": mean(per_token.ratio),
        "clip_low": mean(per_token.low),
        "clip_high": mean(per_token.high),
        "kl_old": mean(kl_k3(tokens.old_logprobs, logprobs.detach())),
    }
    surrogate = per_token.loss
    if correction_cap is not None and tokens.sampling_logprobs is not None:
        correction = truncated_correction(tokens.old_logprobs, tokens.sampling_logprobs, correction_cap)
        if tokens.forced is not None:
            correction = torch.where(tokens.forced, 1.0, correction)
        surrogate = surrogate * correction
        metrics["correction"] = mean(correction)
        metrics["correction_capped"] = mean(correction >= correction_cap)
    loss = (weight * surrogate).sum()
    metrics["surrogate"] = loss.detach()
    if tokens.ref_logprobs is not None:
        kl = kl_k3(logprobs, tokens.ref_logprobs)
        metrics["kl"] = mean(kl)
        loss = loss + kl_coef * (weight * kl).sum()
    if tokens.entropy is not None:
        metrics["entropy"] = mean(tokens.entropy)
        loss = loss - entropy_coef * (weight * tokens.entropy).sum()
    return loss, {"loss": loss.detach(), **metrics}


def mismatch(trainer: Tensor, rollout: Tensor, mask: Tensor) -> dict[str, float]:
    """How far two log-probabilities of the same tokens are apart, over the tokens in the mask ([N] each).

    delta = trainer - rollout: p95 and max of |delta|, the share of ratios exp(delta) outside [0.9, 1.1], and
    the k3 estimate of KL(rollout || trainer). Means of delta hide a mismatch: they are near 0. Leave forced
    tokens out of the mask when rollout is `sampling_logprobs` (0 there). No token: an empty dict. Reads the
    device; once a step, not once a micro-batch, since percentiles do not add up.
    """
    delta = (_wide(trainer.detach()) - _wide(rollout.detach()))[mask]
    if not len(delta):
        return {}
    size, ratio = delta.abs(), torch.exp(delta)
    outside = (ratio < 0.9) | (ratio > 1.1)
    # The k-th smallest, not torch.quantile: that refuses more than 16M values.
    p95 = size.kthvalue(max(1, -(-len(size) * 95 // 100))).values
    return {
        "mismatch_p95": float(p95),
        "mismatch_max": float(size.max()),
        "mismatch_outside": float(outside.double().mean()),
        "mismatch_kl": float(kl_k3(_wide(rollout.detach())[mask], _wide(trainer.detach())[mask]).mean()),
    }


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _clean(tokens: Tokens) -> Tokens:
    """In float32 at least, and 0 outside the mask: where() keeps a NaN there out of gradients, too."""

    def clean(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.where(tokens.mask, _wide(values), 0.0)

    logprobs, old_logprobs = clean(tokens.logprobs), clean(tokens.old_logprobs.detach())
    assert logprobs is not None
    assert old_logprobs is not None
    ref, sampling = tokens.ref_logprobs, tokens.sampling_logprobs
    return Tokens(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        mask=tokens.mask,
        advantages=tokens.advantages.to(logprobs.dtype).detach(),
        sample_of=tokens.sample_of,
        sampling_logprobs=clean(None if sampling is None else sampling.detach()),
        forced=tokens.forced,
        ref_logprobs=clean(None if ref is None else ref.detach()),
        entropy=clean(tokens.entropy),
    )


def _per_sample(values: Tensor, sample_of: Tensor, samples: int) -> Tensor:
    """Sums over each sample's tokens, [S]."""
    return values.new_zeros(samples).index_add(0, sample_of, values)
