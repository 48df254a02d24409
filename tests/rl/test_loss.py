"""Losses on numbers worked out by hand, and what raises."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from elastic_decode.errors import ConfigError
from elastic_decode.rl.loss import (
    OBJECTIVES,
    Tokens,
    cispo,
    clipped,
    denominators,
    gspo,
    kl_k3,
    mismatch,
    objective,
    policy_loss,
    reinforce,
    sequence_ratio,
    token_ratio,
    truncated_correction,
    weights,
)


def values(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def of_ratios(*ratios: float, advantages: tuple[float, ...], sample_of: tuple[int, ...]) -> Tokens:
    """Tokens whose pi / pi_old are `ratios`, with pi_old = 1/2."""
    old = torch.full((len(ratios),), math.log(0.5), dtype=torch.float64)
    return Tokens(
        logprobs=(old + values(*ratios).log()).requires_grad_(),
        old_logprobs=old,
        mask=torch.ones(len(ratios), dtype=torch.bool),
        advantages=values(*advantages),
        sample_of=torch.tensor(sample_of),
    )


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-14)


def test_the_clip_really_clips():
    ratio = values(1.5, 1.5, 0.5, 0.5, 1.1, 0.9).requires_grad_()
    found = clipped(ratio, values(2.0, -2.0, 2.0, -2.0, 2.0, -2.0), 0.2, 0.28)
    # min(3, 1.28 · 2); min(-3, -2.56); min(1, 1.6); min(-1, -1.6); inside; inside
    assert close(found.loss, -values(2.56, -3.0, 1.0, -1.6, 2.2, -1.8))
    assert found.high.tolist() == [True, False, False, False, False, False]
    assert found.low.tolist() == [False, False, False, True, False, False]
    (gradient,) = torch.autograd.grad(found.loss.sum(), ratio)
    # Nothing where the clipped side was chosen, -A elsewhere.
    assert gradient.tolist() == [0.0, 2.0, -2.0, 0.0, -2.0, 2.0]


def test_grpo_is_a_mean_over_tokens_then_over_samples():
    tokens = of_ratios(1.1, 1.5, 0.9, advantages=(1.0, -2.0), sample_of=(0, 0, 1))
    loss, metrics = policy_loss(objective("grpo"), tokens, total_tokens=3, total_samples=2)
    # sample 0: -(1.1 + 1.2) / 2; sample 1: 0.9 · 2
    assert loss.item() == pytest.approx((-1.15 + 1.8) / 2, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    # d ratio / d logprob = ratio; the second token is clipped
    assert close(gradient, values(-1.1 / 4, 0.0, 0.9 * 2 / 2))
    assert metrics["clip_high"].item() == pytest.approx(1 / 3)
    assert metrics["clip_low"].item() == 0
    assert metrics["ratio"].item() == pytest.approx(3.5 / 3)


def test_dapo_is_a_mean_over_tokens_and_clips_higher():
    tokens = of_ratios(1.1, 1.5, 0.7, advantages=(1.0, -2.0), sample_of=(0, 0, 1))
    loss, metrics = policy_loss(objective("dapo"), tokens, total_tokens=3, total_samples=2)
    # -1.1, -1.28, and max(0.7, 0.8) · 2
    assert loss.item() == pytest.approx((-1.1 - 1.28 + 1.6) / 3, rel=1e-12)
    assert metrics["clip_low"].item() == pytest.approx(1 / 3)
    assert objective("dapo").drop_flat


def test_dr_grpo_divides_by_a_constant():
    tokens = of_ratios(1.1, 1.5, 0.9, advantages=(1.0, -2.0), sample_of=(0, 0, 1))
    arguments = {"total_tokens": 3, "total_samples": 2}
    loss, _ = policy_loss(objective("dr_grpo"), tokens, **arguments, constant_length=10)
    assert loss.item() == pytest.approx((-1.1 - 1.2 + 1.8) / (2 * 10), rel=1e-12)
    for length in (None, 0):
        with pytest.raises(ConfigError, match="constant_length"):
            policy_loss(objective("dr_grpo"), tokens, **arguments, constant_length=length)


def test_gspo_takes_the_geometric_mean_of_ratios():
    tokens = of_ratios(2.0, 0.5, 1.21, 1.0, 1.1, advantages=(3.0, 1.0, -1.0), sample_of=(0, 0, 1, 1, 2))
    ratio = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.mask, tokens.sample_of, 3)
    assert close(ratio, values(1.0, 1.0, 1.1, 1.1, 1.1))  # sqrt(2 · 0.5), sqrt(1.21 · 1), 1.1
    loss, metrics = policy_loss(
        objective("gspo"), tokens, total_tokens=5, total_samples=3, eps_low=0.2, eps_high=0.05
    )
    # -3; min(1.1, 1.05) · 1; 1.1 · 1, the negative side's high end being unbounded
    assert loss.item() == pytest.approx((-3 - 1.05 + 1.1) / 3, rel=1e-12)
    assert metrics["clip_high"].item() == pytest.approx(2 / 5)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    # -A s / (|o| · 3) at every token of a sample; nothing for the clipped one
    assert close(gradient, values(-0.5, -0.5, 0.0, 0.0, 1.1 / 3))


def test_gspo_counts_only_tokens_in_the_mask():
    tokens = of_ratios(1.21, 7.0, 1.0, advantages=(1.0,), sample_of=(0, 0, 0))
    tokens = dataclasses.replace(tokens, mask=torch.tensor([True, False, True]))
    found = gspo(tokens, values(1.0, 1.0, 1.0), 0.5, 0.5)
    assert close(found.ratio, values(1.1, 1.1, 1.1))


def test_gspo_of_one_token_sequences_is_grpo():
    ratios = (0.5, 0.9, 1.1, 1.5, 1.5)
    tokens = of_ratios(*ratios, advantages=(1.0, -2.0, 0.5, 1.0, -1.0), sample_of=(0, 1, 2, 3, 4))
    one = sequence_ratio(tokens.logprobs, tokens.old_logprobs, tokens.mask, tokens.sample_of, 5)
    assert close(one, token_ratio(tokens.logprobs, tokens.old_logprobs))
    found = [
        policy_loss(objective(name), tokens, total_tokens=5, total_samples=5, eps_low=0.2, eps_high=0.28)[0]
        for name in ("gspo", "grpo")
    ]
    assert close(*found)
    assert close(*(torch.autograd.grad(loss, tokens.logprobs)[0] for loss in found))


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    tokens = of_ratios(0.5, 1.5, 9.0, advantages=(1.0, -2.0), sample_of=(0, 0, 1))
    per_token = values(1.0, 1.0, -2.0)
    found = cispo(tokens, per_token, 1.0, 1.0)
    # The weight is capped at 2, from below at 0; log pi = log(ratio / 2)
    expected = [0.5 * -math.log(0.25), 1.5 * -math.log(0.75), 2 * 2 * math.log(4.5)]
    assert found.loss.tolist() == pytest.approx(expected, rel=1e-12)
    (gradient,) = torch.autograd.grad(found.loss.sum(), tokens.logprobs)
    assert close(gradient, values(-0.5, -1.5, 4.0))  # -weight A, also where capped
    assert (found.low.tolist(), found.high.tolist()) == ([False] * 3, [False, False, True])
    low = cispo(tokens, per_token, 0.25, 1.0)
    assert (low.low.tolist(), low.ratio.requires_grad) == ([True, False, False], False)


def test_rloo_is_reinforce_summed_over_a_sample():
    tokens = of_ratios(1.0, 1.0, 1.0, advantages=(1.0, -2.0), sample_of=(0, 0, 1))
    assert close(reinforce(tokens, values(1.0, 1.0, -2.0), 0, 0).loss, math.log(2) * values(1.0, 1.0, -2.0))
    loss, metrics = policy_loss(objective("rloo"), tokens, total_tokens=3, total_samples=2)
    assert loss.item() == pytest.approx(0.0, abs=1e-15)  # log 2 (1 + 1 - 2) / 2
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    assert close(gradient, values(-0.5, -0.5, 1.0))
    assert metrics["clip_low"] == metrics["clip_high"] == 0
    assert (objective("rloo").estimator, objective("rloo").normalisation) == ("rloo", "sum")


def test_k3():
    found = kl_k3(values(math.log(0.5), math.log(0.5), -1.0), values(math.log(0.25), math.log(1.0), -1.0))
    # r = ref / pi = 1/2, 2, 1: r - 1 - log r
    assert close(found, values(-0.5 + math.log(2), 1 - math.log(2), 0.0))


def test_kl_and_entropy_are_normalised_like_the_surrogate():
    tokens = of_ratios(1.0, 1.0, 1.0, advantages=(0.0, 0.0), sample_of=(0, 0, 1))
    tokens = dataclasses.replace(
        tokens,
        ref_logprobs=values(math.log(0.25), math.log(0.5), math.log(1.0)),
        entropy=values(1.0, 2.0, 4.0),
    )
    kl = (-0.5 + math.log(2), 0.0, 1 - math.log(2))
    totals = {"total_tokens": 3, "total_samples": 2}
    loss, metrics = policy_loss(objective("grpo"), tokens, **totals, kl_coef=0.5)
    assert loss.item() == pytest.approx(0.5 * ((kl[0] + kl[1]) / 2 + kl[2]) / 2, rel=1e-12)
    assert metrics["kl"].item() == pytest.approx(sum(kl) / 3)
    loss, metrics = policy_loss(objective("dapo"), tokens, **totals, entropy_coef=0.5)
    assert loss.item() == pytest.approx(-0.5 * 7 / 3, rel=1e-12)
    assert metrics["entropy"].item() == pytest.approx(7 / 3)
    assert metrics["surrogate"].item() == 0


def test_truncated_correction():
    old = values(math.log(0.5), math.log(0.2), math.log(0.3)).requires_grad_()
    found = truncated_correction(old, values(math.log(0.25), math.log(0.4), math.log(0.3)), 1.5)
    assert close(found, values(1.5, 0.5, 1.0))
    assert not found.requires_grad


def test_the_correction_weighs_the_surrogate_but_no_forced_token():
    tokens = of_ratios(1.0, 1.0, 1.0, advantages=(1.0,), sample_of=(0, 0, 0))
    # pi_old = 1/2: ratios 2 (capped at 1.5), 1/2, and a forced token, whose 0 is no log-probability
    tokens = dataclasses.replace(
        tokens,
        sampling_logprobs=values(math.log(0.25), 0.0, 0.0),
        forced=torch.tensor([False, False, True]),
    )
    loss, metrics = policy_loss(
        objective("dapo"), tokens, total_tokens=3, total_samples=1, correction_cap=1.5
    )
    assert loss.item() == pytest.approx(-(1.5 + 0.5 + 1.0) / 3, rel=1e-12)
    assert metrics["correction"].item() == pytest.approx(1.0)
    assert metrics["correction_capped"].item() == pytest.approx(1 / 3)


def test_mismatch():
    rollout = torch.zeros(21, dtype=torch.float64)
    trainer = torch.zeros(21, dtype=torch.float64)
    trainer[3], trainer[7], trainer[20] = math.log(1.25), math.log(0.95), math.nan
    mask = torch.ones(21, dtype=torch.bool)
    mask[20] = False
    found = mismatch(trainer, rollout, mask)
    # 20 tokens: the 19th smallest of |delta| is |log 0.95|, the largest log 1.25, which alone is outside
    kl = (1.25 - 1 - math.log(1.25) + 0.95 - 1 - math.log(0.95)) / 20
    assert found == pytest.approx(
        {
            "mismatch_p95": -math.log(0.95),
            "mismatch_max": math.log(1.25),
            "mismatch_outside": 1 / 20,
            "mismatch_kl": kl,
        },
        rel=1e-9,
    )
    assert mismatch(trainer, rollout, torch.zeros(21, dtype=torch.bool)) == {}
    same = mismatch(rollout, rollout, mask)
    assert set(same.values()) == {0.0}


def test_weights_and_denominators():
    mask = torch.tensor([True, False, True, True, False])
    sample_of = torch.tensor([1, 1, 0, 1, 2])
    counted = denominators([[True], [True, False, True], [False], []])
    assert counted == (3, 2)
    arguments = {**counted._asdict(), "dtype": torch.float64}
    for normalisation, expected in {
        "token": (1 / 3, 0.0, 1 / 3, 1 / 3, 0.0),
        "sequence": (1 / 4, 0.0, 1 / 2, 1 / 4, 0.0),
        "sum": (1 / 2, 0.0, 1 / 2, 1 / 2, 0.0),
        "constant": (1 / 20, 0.0, 1 / 20, 1 / 20, 0.0),
    }.items():
        found = weights(normalisation, mask, sample_of, 3, **arguments, constant_length=10)
        assert close(found, values(*expected))
    with pytest.raises(ConfigError, match="'mean'; there are token"):
        weights("mean", mask, sample_of, 3, **arguments)


def test_what_is_missing_or_wrong_raises():
    tokens = of_ratios(1.0, 1.0, advantages=(1.0,), sample_of=(0, 0))
    for option, needed in {
        "kl_coef": "ref_logprobs",
        "entropy_coef": "entropy",
        "correction_cap": "sampling_logprobs",
    }.items():
        with pytest.raises(ConfigError, match=f"{option}=0.5 needs Tokens.{needed}"):
            policy_loss(objective("grpo"), tokens, total_tokens=2, total_samples=1, **{option: 0.5})
    for counts in ((0, 0), (0, 1)):
        with pytest.raises(ConfigError, match="nothing to train on"):
            policy_loss(objective("grpo"), tokens, total_tokens=counts[0], total_samples=counts[1])
    with pytest.raises(ConfigError, match="correction_cap must be > 0"):
        policy_loss(objective("grpo"), tokens, total_tokens=2, total_samples=1, correction_cap=0.0)
    for wrong, message in (
        ({"old_logprobs": values(1.0)}, r"old_logprobs must be \[2\]"),
        ({"mask": torch.ones(2)}, "mask must be torch.bool"),
        ({"sample_of": torch.zeros(2, dtype=torch.int32)}, "sample_of must be torch.int64"),
        ({"advantages": torch.ones(1, 2)}, r"advantages \[samples\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tokens, **wrong)


def test_unknown_objectives_raise_with_the_list():
    with pytest.raises(ConfigError, match="'ppo'; there are grpo, dr_grpo, dapo, gspo, cispo, rloo"):
        objective("ppo")
    assert [found.name for found in OBJECTIVES.values()] == list(OBJECTIVES)
