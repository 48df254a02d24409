"""What must change nothing about a loss: masked tokens, micro-batches, packing, chunks of logits."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen2Config

from elastic_decode.rl.logprobs import pack, plan, token_logprobs
from elastic_decode.rl.loss import (
    OBJECTIVES,
    Objective,
    Tokens,
    denominators,
    objective,
    policy_loss,
    weights,
)

EVERYTHING = {"kl_coef": 0.1, "entropy_coef": 0.05, "correction_cap": 1.1, "constant_length": 16}


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
            bound = ratio.detach().clamp(1 - rule.eps_low, 1 + rule.eps_high)
            if name == "rloo":
                term = -advantage * lp[place]
            elif name == "cispo":
                term = -bound * advantage * lp[place]
            elif (ratio > bound and advantage > 0) or (ratio < bound and advantage < 0):
                term = -bound * advantage  # no gradient
            else:
                term = -ratio * advantage
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


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).float()


def through_whole_logits(model, prompt: list[int], output: list[int]) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one sample by itself, its logits whole."""
    logits = model(torch.tensor([[*prompt, *output]])).logits[0, len(prompt) - 1 : -1]
    logprobs = torch.log_softmax(logits, -1)
    chosen = logprobs.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)
    return chosen, -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_through_packed_chunks_equal_those_through_whole_logits(name: str, model):
    """From parameters to loss: packed micro-batches and logits in chunks against lone samples, logits
    whole, and the objective in its plain form.
    """
    generator = torch.Generator().manual_seed(4)

    def ids(count: int) -> list[int]:
        return torch.randint(0, 61, (count,), generator=generator).tolist()

    samples = [(ids(p), ids(o)) for p, o in ((3, 5), (1, 9), (4, 1), (2, 7), (6, 4))]
    with torch.no_grad():
        now = torch.cat([through_whole_logits(model, *sample)[0] for sample in samples])
    count = len(now)

    def near(scale: float) -> Tensor:
        return now + scale * torch.randn(count, generator=generator)

    old, ref, sampling = near(0.3), near(0.3), near(0.2)
    mask = torch.rand(count, generator=generator) < 0.8
    forced = torch.rand(count, generator=generator) < 0.1
    advantages = torch.randn(5, generator=generator)
    sample_of = torch.repeat_interleave(torch.arange(5), torch.tensor([len(o) for _, o in samples]))

    def tokens(members: list[int], logprobs: Tensor, entropy: Tensor, owner: Tensor) -> Tokens:
        rows = torch.cat([(sample_of == sample).nonzero()[:, 0] for sample in members])
        return Tokens(
            logprobs=logprobs,
            old_logprobs=old[rows],
            mask=mask[rows],
            advantages=advantages[members],
            sample_of=owner,
            sampling_logprobs=sampling[rows],
            forced=forced[rows],
            ref_logprobs=ref[rows],
            entropy=entropy,
        )

    one_by_one = [through_whole_logits(model, *sample) for sample in samples]
    whole = tokens(
        [0, 1, 2, 3, 4], *(torch.cat(each) for each in zip(*one_by_one, strict=True)), owner=sample_of
    )
    counts = totals(whole)
    expected = plain(name, whole)
    wanted = torch.autograd.grad(expected, list(model.parameters()))

    batches = plan([len(p) + len(o) for p, o in samples], 22)
    assert len(batches) > 1
    model.zero_grad()
    total = 0.0
    for members in batches:
        packed = pack(samples, members, [1.0] * 5)
        logprobs, entropy = token_logprobs(model, packed, chunk=4, entropy=True)
        batch = tokens(members, logprobs, entropy, packed.sample_of)
        loss, _ = policy_loss(chosen_by(name), batch, **counts, **EVERYTHING)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(expected.item(), rel=2e-5, abs=2e-6)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-6)
