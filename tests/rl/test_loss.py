"""Losses on numbers worked out by hand, and what must change nothing: masked tokens, micro-batches."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from elastic_decode.errors import ConfigError
from elastic_decode.rl.loss import (
    OBJECTIVES,
    Objective,
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

EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.05, "correction_cap": 1.1, "constant_length": 16}


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


def made(seed: int = 0, samples: int = 7, dtype: torch.dtype = torch.float64) -> Tokens:
    """Random tokens of every kind: masked, forced, clipped at both ends, a sample that is not trained on."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(count, generator=generator, dtype=torch.float64) * scale).to(dtype)

    lengths = torch.randint(1, 9, (samples,), generator=generator)
    sample_of = torch.repeat_interleave(torch.arange(samples), lengths)
    count = len(sample_of)
    old = -normal(count).abs() - 0.1
    mask = torch.rand(count, generator=generator) < 0.7
    mask[sample_of == samples - 1] = False
    return Tokens(
        logprobs=(old + normal(count, 0.3)).requires_grad_(),
        old_logprobs=old,
        mask=mask,
        advantages=normal(samples),
        sample_of=sample_of,
        sampling_logprobs=old + normal(count, 0.2),
        forced=torch.rand(count, generator=generator) < 0.1,
        ref_logprobs=old + normal(count, 0.4),
        entropy=normal(count).abs().requires_grad_(),
    )


def totals(tokens: Tokens) -> dict[str, int]:
    masks = [tokens.mask[tokens.sample_of == s].tolist() for s in range(len(tokens.advantages))]
    return denominators(masks)._asdict()


def chosen_by(name: str) -> Objective:
    """The objective; GSPO with epsilons that let some of `made` through."""
    found = objective(name)
    return dataclasses.replace(found, eps_low=0.1, eps_high=0.15) if name == "gspo" else found


def gradients(loss: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
    assert tokens.entropy is not None
    found = torch.autograd.grad(loss, (tokens.logprobs, tokens.entropy), allow_unused=True)
    return found[0], found[1] if found[1] is not None else torch.zeros_like(tokens.entropy)


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-12, atol=1e-14)


# Hand-computed.


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


# What must change nothing.


@pytest.mark.parametrize("name", OBJECTIVES)
def test_masked_tokens_change_nothing(name: str):
    tokens = made()
    assert 0 < tokens.mask.sum() < len(tokens.mask)
    loss, metrics = policy_loss(chosen_by(name), tokens, **totals(tokens), **EVERYTHING)
    gradient, entropy_gradient = gradients(loss, tokens)

    def spoiled(values: Tensor) -> Tensor:
        return torch.where(tokens.mask, values.detach(), math.nan)

    untrained = [s for s in range(len(tokens.advantages)) if not tokens.mask[tokens.sample_of == s].any()]
    assert untrained
    advantages = tokens.advantages.clone()
    advantages[untrained] = math.nan
    poisoned = dataclasses.replace(
        tokens,
        **{
            field: spoiled(getattr(tokens, field))
            for field in ("old_logprobs", "sampling_logprobs", "ref_logprobs")
        },
        logprobs=spoiled(tokens.logprobs).requires_grad_(),
        entropy=spoiled(tokens.entropy).requires_grad_(),
        advantages=advantages,
    )
    again, same_metrics = policy_loss(chosen_by(name), poisoned, **totals(poisoned), **EVERYTHING)
    assert torch.equal(again, loss)
    assert all(torch.equal(same_metrics[key], value) for key, value in metrics.items())
    for found, expected in zip(gradients(again, poisoned), (gradient, entropy_gradient), strict=True):
        assert torch.equal(found, expected)
        assert torch.equal(found[~tokens.mask], torch.zeros_like(found[~tokens.mask]))

    # The same tokens without the masked ones at all, as if never forced or padded.
    keep = tokens.mask
    without = Tokens(
        **{
            field.name: getattr(tokens, field.name)
            if field.name == "advantages"
            else getattr(tokens, field.name).detach()[keep]
            for field in dataclasses.fields(Tokens)
        }
    )
    without.logprobs.requires_grad_()
    left, left_metrics = policy_loss(chosen_by(name), without, **totals(without), **EVERYTHING)
    assert close(left, loss)
    assert all(close(left_metrics[key], value) for key, value in metrics.items())
    assert close(torch.autograd.grad(left, without.logprobs)[0], gradient[keep])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_add_up_to_the_whole_batch(name: str, dtype: torch.dtype):
    tokens = made(seed=1, samples=9, dtype=dtype)
    whole, metrics = policy_loss(chosen_by(name), tokens, **totals(tokens), **EVERYTHING)
    gradient, entropy_gradient = gradients(whole, tokens)
    parts, part_metrics = [], []
    for members in ([4, 0, 8], [1], [2, 3, 7], [6, 5]):  # samples in another order, of other sizes
        place = {sample: index for index, sample in enumerate(members)}
        rows = [i for sample in members for i in (tokens.sample_of == sample).nonzero()[:, 0].tolist()]
        part = Tokens(
            **{
                field.name: getattr(tokens, field.name)[rows]
                for field in dataclasses.fields(Tokens)
                if field.name not in ("advantages", "sample_of")
            },
            advantages=tokens.advantages[members],
            sample_of=torch.tensor([place[s] for s in tokens.sample_of[rows].tolist()]),
        )
        loss, found = policy_loss(chosen_by(name), part, **totals(tokens), **EVERYTHING)
        parts.append(loss)
        part_metrics.append(found)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if dtype == torch.float64 else {"rtol": 3e-6, "atol": 3e-7}
    torch.testing.assert_close(sum(parts), whole, **tolerance)
    for key, value in metrics.items():
        torch.testing.assert_close(sum(found[key] for found in part_metrics), value, **tolerance)
    for found, expected in zip(gradients(sum(parts), tokens), (gradient, entropy_gradient), strict=True):
        torch.testing.assert_close(found, expected, **tolerance)


def plain(name: str, tokens: Tokens) -> Tensor:
    """The objective as the papers write it: sample by sample, token by token, nothing packed or masked."""
    rule = chosen_by(name)
    assert tokens.sampling_logprobs is not None
    assert tokens.ref_logprobs is not None
    assert tokens.entropy is not None
    assert tokens.forced is not None
    per_sample: list[list[Tensor]] = []
    for sample, advantage in enumerate(tokens.advantages):
        rows = [
            i for i, owner in enumerate(tokens.sample_of.tolist()) if owner == sample and bool(tokens.mask[i])
        ]
        if not rows:
            continue
        lp, old = tokens.logprobs[rows], tokens.old_logprobs[rows]
        terms = []
        for place, row in enumerate(rows):
            ratio = (lp[place] - old[place]).exp()
            if name == "gspo":
                ratio = (lp - old).mean().exp()
            bound = max(1 - rule.eps_low, min(1 + rule.eps_high, ratio.item()))
            if name == "rloo":
                term = -advantage * lp[place]
            elif name == "cispo":
                term = -bound * advantage * lp[place]
            elif (ratio * advantage).item() <= bound * advantage.item():
                term = -ratio * advantage
            else:
                term = -bound * advantage  # no gradient
            if not tokens.forced[row]:
                weight = math.exp(float(old[place] - tokens.sampling_logprobs[row]))
                term = term * min(weight, EVERYTHING["correction_cap"])
            delta = tokens.ref_logprobs[row] - lp[place]
            term = term + EVERYTHING["kl_coef"] * (delta.exp() - delta - 1)
            terms.append(term - EVERYTHING["entropy_coef"] * tokens.entropy[row])
        per_sample.append(terms)
    sums = [torch.stack(list(terms)).sum() for terms in per_sample]
    if rule.normalisation == "token":
        return sum(sums) / sum(map(len, per_sample))
    if rule.normalisation == "sequence":
        return sum(s / len(terms) for s, terms in zip(sums, per_sample, strict=True)) / len(sums)
    length = EVERYTHING["constant_length"] if rule.normalisation == "constant" else 1
    return sum(sums) / (len(sums) * length)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_and_plain_agree(name: str, seed: int):
    tokens = made(seed)
    packed, metrics = policy_loss(chosen_by(name), tokens, **totals(tokens), **EVERYTHING)
    expected = plain(name, tokens)
    assert torch.allclose(packed, expected, rtol=1e-11, atol=1e-13)
    for found, wanted in zip(gradients(packed, tokens), gradients(expected, tokens), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-11, atol=1e-13)
    if name in ("grpo", "dapo", "gspo"):
        assert metrics["clip_low"] + metrics["clip_high"] > 0  # both branches were there


@pytest.mark.parametrize("name", OBJECTIVES)
def test_on_policy_the_gradient_is_the_policy_gradient(name: str):
    """With pi = pi_old every objective has the gradient of -A log pi, in its normalisation."""
    tokens = made(3)
    tokens = dataclasses.replace(tokens, old_logprobs=tokens.logprobs.detach().clone())
    loss, metrics = policy_loss(chosen_by(name), tokens, **totals(tokens), constant_length=16)
    (gradient,) = torch.autograd.grad(loss, tokens.logprobs)
    weight = weights(
        objective(name).normalisation,
        tokens.mask,
        tokens.sample_of,
        len(tokens.advantages),
        **totals(tokens),
        constant_length=16,
        dtype=torch.float64,
    )
    assert close(gradient, -weight * tokens.advantages[tokens.sample_of])
    assert (metrics["ratio"], metrics["kl_old"]) == (1, 0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_micro_batch_with_nothing_to_train_on_adds_nothing(name: str):
    tokens = made()
    counts = {"total_tokens": 5, "total_samples": 2}
    masked = dataclasses.replace(tokens, mask=torch.zeros_like(tokens.mask))
    empty = Tokens(
        **{
            field.name: getattr(tokens, field.name).detach()[:0].requires_grad_(field.name == "logprobs")
            for field in dataclasses.fields(Tokens)
        }
    )
    for batch in (masked, empty):
        loss, metrics = policy_loss(chosen_by(name), batch, **counts, **EVERYTHING)
        assert {loss.item(), *(value.item() for value in metrics.values())} == {0.0}
        (gradient,) = torch.autograd.grad(loss, batch.logprobs)
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_low_precision_is_computed_in_float32():
    tokens = made(2, dtype=torch.bfloat16)
    loss, metrics = policy_loss(objective("dapo"), tokens, **totals(tokens), **EVERYTHING)
    assert {loss.dtype, *(value.dtype for value in metrics.values())} == {torch.float32}
    wide = dataclasses.replace(
        tokens,
        **{
            field: getattr(tokens, field).detach().float()
            for field in ("logprobs", "old_logprobs", "sampling_logprobs", "ref_logprobs", "entropy")
        },
        advantages=tokens.advantages.float(),
    )
    assert torch.equal(policy_loss(objective("dapo"), wide, **totals(tokens), **EVERYTHING)[0], loss)


# What raises.


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
