"""Updates against the same mathematics written out sample by sample with whole logits."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from elastic_decode.errors import ConfigError
from elastic_decode.rl import update as module
from elastic_decode.rl.batch import Sample
from elastic_decode.rl.loss import objective
from elastic_decode.rl.optim import MasterAdamW, learning_rate
from elastic_decode.rl.update import Trained, UpdateOptions, update


def made(dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype)


def rows(count, *, seed=0, model=None):
    """Random samples; their logprobs are the model's own, so that the mismatch is known to be none."""
    rng = random.Random(seed)
    found = []
    for index in range(count):
        prompt = tuple(rng.randrange(61) for _ in range(rng.randint(1, 6)))
        output = tuple(rng.randrange(61) for _ in range(rng.randint(1, 9)))
        forced = tuple(rng.random() < 0.2 for _ in output)
        logprobs = tuple(rng.uniform(-3, 0) for _ in output)
        if model is not None:
            logprobs = tuple(whole(model, prompt, output, 0.8).detach().tolist())
        sample = Sample(
            prompt_ids=prompt,
            token_ids=output,
            logprobs=logprobs,
            sampling_logprobs=tuple(0.0 if f else p for f, p in zip(forced, logprobs, strict=True)),
            forced=forced,
            loss_mask=tuple(not f for f in forced),
            text="",
            thinking="",
            solution="",
            think_tokens=0,
            solve_tokens=0,
            think_end="natural",
            finish_reason="eos",
            think_budget=4,
            solve_budget=4,
            seed=index,
            weight_epoch=0,
        )
        found.append(Trained(sample=sample, advantage=rng.uniform(-1, 1), temperature=0.8))
    return found


def whole(model, prompt, output, temperature):
    logits = model(torch.tensor([[*prompt, *output]])).logits[0].float() / temperature
    logprobs = torch.log_softmax(logits[len(prompt) - 1 : -1], -1)
    return logprobs.gather(1, torch.tensor(output).unsqueeze(1)).squeeze(1)


def options(**changes):
    return UpdateOptions(objective=objective(changes.pop("name", "grpo")), max_tokens=40, **changes)


def parameters(model):
    return torch.cat([p.detach().flatten().float() for p in model.parameters()])


def test_an_update_equals_the_formula_written_out():
    """GRPO on-policy: the mean over samples of the mean over unmasked tokens of -A log pi, in gradient."""
    mine, naive = made(), made()
    batch = rows(9)
    metrics = update(mine, MasterAdamW(mine.parameters(), lr=1.0), batch, options(grad_clip=None), lr=1e-3)

    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in naive.parameters() if p.dim() > 1]},
            {"params": [p for p in naive.parameters() if p.dim() <= 1]},
        ],
        lr=1e-3,
        weight_decay=0.0,
    )
    losses = []
    for row in batch:
        keep = torch.tensor(row.sample.loss_mask)
        if keep.any():
            logprobs = whole(naive, row.sample.prompt_ids, row.sample.token_ids, 0.8)
            losses.append((-row.advantage * torch.exp(logprobs - logprobs.detach()))[keep].mean())
    (sum(losses) / len(losses)).backward()
    norm = torch.nn.utils.clip_grad_norm_(naive.parameters(), float("inf"))
    optimizer.step()
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
    torch.testing.assert_close(parameters(mine), parameters(naive), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["grpo", "dapo", "gspo", "cispo", "dr_grpo", "rloo"])
def test_micro_batches_change_nothing(name, monkeypatch):
    gradients = []
    for max_tokens, in_rows in ((15, False), (15, True), (40, True), (1000, False), (1000, True)):
        monkeypatch.setattr(module, "attends_in_rows", lambda model, in_rows=in_rows: in_rows)
        model = made()
        optimizer = MasterAdamW(model.parameters(), lr=1.0)
        seen = []
        optimizer.step = lambda lr, model=model, seen=seen: seen.append(  # type: ignore[method-assign]
            torch.cat([p.grad.flatten() for p in model.parameters()])
        )
        chosen = UpdateOptions(
            objective=objective(name), max_tokens=max_tokens, constant_length=20, grad_clip=None
        )
        update(model, optimizer, rows(12), chosen, lr=1e-3)
        gradients.append(seen[0])
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], atol=1e-6, rtol=1e-4)


def test_several_updates_go_by_the_policy_before_the_first():
    model = made()
    metrics = update(
        model,
        MasterAdamW(model.parameters(), lr=1.0),
        rows(12, model=model),
        options(updates=3, eps_low=0.2, eps_high=0.2),
        lr=5e-3,
    )
    assert metrics["kl_old"] > 0, "later mini-batches are off-policy"
    assert metrics["mismatch_max"] < 1e-5, "and yet the rollout's logprobs are compared with the old policy's"


def test_kl_to_a_frozen_copy_and_to_an_adapter_switched_off():
    model = made()
    frozen = copy.deepcopy(model).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    moved = parameters(model)

    @contextlib.contextmanager
    def switched_off():
        mine = copy.deepcopy(model.state_dict())
        model.load_state_dict(frozen.state_dict())
        try:
            yield
        finally:
            model.load_state_dict(mine)

    results = []
    for reference in (frozen, switched_off):
        with torch.no_grad():
            torch.nn.utils.vector_to_parameters(moved.clone(), model.parameters())
        optimizer = MasterAdamW(model.parameters(), lr=1.0)
        metrics = update(
            model, optimizer, rows(6), options(kl_coef=0.1, entropy_coef=0.01), lr=1e-3, reference=reference
        )
        assert metrics["kl"] > 1e-4
        assert metrics["entropy"] > 1
        results.append(parameters(model))
    assert torch.equal(results[0], results[1])
    with pytest.raises(ConfigError, match="needs a reference"):
        update(model, optimizer, rows(2), options(kl_coef=0.1), lr=1e-3)


def test_bfloat16_learns_through_its_float32_masters():
    """A rate at which every single update of a bfloat16 weight would be rounded away."""
    model = made(torch.bfloat16)
    before = parameters(model)
    address = [p.data_ptr() for p in model.parameters()]
    optimizer = MasterAdamW(model.parameters(), lr=1.0)
    for _ in range(30):
        update(model, optimizer, rows(4), options(), lr=2e-5)
    masters = torch.cat([m.flatten() for m in optimizer.state_dict()["masters"]])
    assert 1e-4 < (masters - before).abs().max() < 2e-3
    assert torch.equal(masters.bfloat16().float(), parameters(model))
    assert (parameters(model) != before).float().mean() > 0.01
    assert [p.data_ptr() for p in model.parameters()] == address, "an engine sharing them sees the update"


def test_bfloat16_gradients_are_added_up_in_float32():
    """In bfloat16 the sum of ones stays at 256."""
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([parameter], lr=1.0)
    for _ in range(512):
        parameter.grad = torch.ones_like(parameter)
        optimizer.take_gradients()
        assert parameter.grad is None
    assert optimizer.clip(math.inf) == 1024.0  # |(512, 512, 512, 512)|
    optimizer.clip(1.0)
    assert optimizer.clip(math.inf) == pytest.approx(1.0)
    optimizer.zero_grad()
    assert optimizer.clip(math.inf) == 0.0


def test_many_small_bfloat16_micro_batches_make_the_gradient_of_one():
    """Each has bfloat16's rounding, and their sum no more: added up in bfloat16 they would be 1.4 % apart."""
    gradients = []
    for max_tokens in (15, 1000):
        model = made(torch.bfloat16)
        optimizer = MasterAdamW(model.parameters(), lr=1.0)
        seen = []
        optimizer.step = lambda lr, optimizer=optimizer, seen=seen: seen.append(  # type: ignore[method-assign]
            torch.cat([master.grad.flatten() for master in optimizer._masters])
        )
        chosen = UpdateOptions(objective=objective("dapo"), max_tokens=max_tokens, grad_clip=None)
        update(model, optimizer, rows(256), chosen, lr=1e-3)
        gradients += seen
    many, one = gradients
    assert (many - one).norm() < 0.005 * one.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_optimizer_goes_on_bit_for_bit(dtype):
    straight = made(dtype)
    optimizer = MasterAdamW(straight.parameters(), lr=1.0, weight_decay=0.1)
    for step in range(3):
        update(straight, optimizer, rows(5, seed=step), options(), lr=1e-3)
    saved = copy.deepcopy((straight.state_dict(), optimizer.state_dict()))
    update(straight, optimizer, rows(5, seed=9), options(), lr=1e-3)

    resumed = made(dtype)
    resumed.load_state_dict(saved[0])
    again = MasterAdamW(resumed.parameters(), lr=1.0, weight_decay=0.1)
    again.load_state_dict(saved[1])
    update(resumed, again, rows(5, seed=9), options(), lr=1e-3)
    assert torch.equal(parameters(straight), parameters(resumed))
    other = MasterAdamW(torch.nn.Linear(3, 3).to(torch.bfloat16).parameters(), lr=1.0)
    with pytest.raises(ConfigError, match="another model"):
        other.load_state_dict(saved[1])


def test_a_gradient_that_is_not_finite_changes_nothing():
    model = made()
    before = parameters(model)
    batch = rows(3)
    batch[1] = Trained(sample=batch[1].sample, advantage=float("inf"), temperature=0.8)
    with pytest.raises(FloatingPointError, match="no update was made"):
        update(model, MasterAdamW(model.parameters(), lr=1.0), batch, options(), lr=1e-3)
    assert torch.equal(parameters(model), before)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nothing_to_train_on():
    model = made()
    before = parameters(model)
    optimizer = MasterAdamW(model.parameters(), lr=1.0)
    assert update(model, optimizer, [], options(), lr=1e-3) == {"updates": 0}
    assert torch.equal(parameters(model), before)
    # AdamW goes on by its last steps where the gradient is 0: rewards that are all equal must not do that.
    assert update(model, optimizer, rows(4), options(updates=2), lr=1e-3)["updates"] == 2
    before = parameters(model)
    flat = [replace(row, advantage=0.0) for row in rows(4)]
    assert update(model, optimizer, flat, options(), lr=1e-3) == {"updates": 0}
    assert torch.equal(parameters(model), before)
    assert update(model, optimizer, flat, options(entropy_coef=0.1), lr=1e-3)["updates"] == 1
    assert not torch.equal(parameters(model), before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="nothing to train"):
        MasterAdamW(model.parameters(), lr=1.0)


def test_learning_rates():
    def rates(schedule, warmup=2, steps=6):
        return [
            learning_rate(step, lr=1.0, schedule=schedule, warmup=warmup, steps=steps)
            for step in range(steps)
        ]

    assert rates("constant") == [0.5, 1, 1, 1, 1, 1]
    assert rates("linear") == [0.5, 1, 1, 0.75, 0.5, 0.25]
    assert rates("cosine") == pytest.approx([0.5, 1, 1, 0.8535534, 0.5, 0.1464466])
    with pytest.raises(ConfigError, match="no schedule 'step'"):
        learning_rate(3, lr=1.0, schedule="step", warmup=0, steps=6)
