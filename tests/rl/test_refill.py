"""Dynamic sampling: what is drawn and kept, of made-up groups; cut and resumed, of the bundled model."""

import logging
from pathlib import Path

import pytest
import torch

from elastic_decode.errors import CapacityError, ConfigError
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.batch import Group, Row, Sample
from elastic_decode.rl.config import load_config
from elastic_decode.rl.refill import DynamicSampling, one_batch

TOY = Path(__file__).parents[2] / "recipes" / "toy.yaml"


def group(index, *rewards):
    empty = {"token_ids": (), "logprobs": (), "sampling_logprobs": (), "forced": (), "loss_mask": ()}
    texts = {"text": "", "thinking": "", "solution": "", "think_end": "none", "finish_reason": "eos"}
    numbers = {"think_tokens": 0, "solve_tokens": 0, "think_budget": 0, "solve_budget": 0, "seed": 0}
    samples = [
        Sample(prompt_ids=(1,), weight_epoch=0, reward=reward, **empty, **texts, **numbers)
        for reward in rewards
    ]
    return Group(index=index, step=0, samples=tuple(samples))


class Data:
    """Rows 0, 1, 2 … `size`, over and over; those in `spread` make groups with a spread."""

    def __init__(self, spread, size=10**6, fits=lambda index: True):
        self.spread, self.size, self.fits = spread, size, fits
        self.rounds = []

    def next_rows(self, position, count):
        return [Row(i % self.size, "", {}) for i in range(position, position + count)], position + count

    def roll(self, rows):
        self.rounds.append([row.index for row in rows])
        fitting = [row.index for row in rows if self.fits(row.index)]
        if not fitting:
            raise CapacityError("too long")
        return [group(i, 0.0, 1.0 if self.spread(i) else 0.0) for i in fitting]

    def gather(self, how, position=0, wanted=4):
        return how(self.next_rows, self.roll, position=position, wanted=wanted)


def rounds(count=4, *, skips=True):
    return DynamicSampling(count, too_long_skips=skips)


def kept(gathered):
    return [group.index for group, kept in zip(gathered.groups, gathered.kept, strict=True) if kept]


def test_a_spread():
    assert group(0, 0.0, None, 1.0).has_spread
    for rewards in ((1.0, 1.0), (1.0, None), (None, None)):
        assert not group(0, *rewards).has_spread


def test_the_first_groups_with_a_spread_are_kept_and_all_rows_are_passed():
    data = Data(lambda i: i % 2)
    gathered = data.gather(rounds(), position=10)
    assert data.rounds == [[10, 11, 12, 13], [14, 15, 16, 17]], (
        "2 of 4 were good: 2 more of 4, twice that, capped"
    )
    assert kept(gathered) == [11, 13, 15, 17]
    assert gathered.position == 18
    assert gathered.metrics == {
        "sampling_rounds": 2,
        "prompts_decoded": 8,
        "groups_kept": 0.5,
        "groups_missing": 0,
    }


def test_a_later_round_is_as_large_as_it_has_to_be_and_surplus_is_not_kept():
    data = Data(lambda i: i != 2)
    gathered = data.gather(rounds(), wanted=6)
    assert [len(drawn) for drawn in data.rounds] == [6, 4]  # 1 missing, 5 of 6 good: 2 rows, twice
    assert kept(gathered) == [0, 1, 3, 4, 5, 6]
    assert gathered.position == 10
    assert len(gathered.groups) == 10


def test_one_batch_keeps_everything():
    data = Data(lambda i: False)
    gathered = data.gather(one_batch)
    assert (data.rounds, gathered.kept, gathered.position) == ([[0, 1, 2, 3]], [True] * 4, 4)


def test_rounds_are_used_up(caplog):
    data, how = Data(lambda i: i == 5), rounds(3)
    with caplog.at_level(logging.WARNING):
        gathered = data.gather(how)
        assert kept(gathered) == [5]
        assert (gathered.metrics["sampling_rounds"], gathered.metrics["groups_missing"]) == (3, 3)
        nothing = data.gather(how, position=100)
    assert (kept(nothing), nothing.position) == ([], 112)
    assert [record.message for record in caplog.records] == [
        "dynamic sampling: 1 of 12 groups decoded in 3 rounds have samples with different rewards, 4 are "
        "wanted: the step trains on those it has. Change the budgets, the prompts or the rewards, or raise "
        "objective.max_sampling_rounds (said once; see groups_missing)"
    ]


def test_no_row_is_decoded_in_two_rounds():
    data = Data(lambda i: False, size=6)
    gathered = data.gather(rounds())
    assert data.rounds == [[0, 1, 2, 3], [4, 5]]
    assert gathered.position == 16
    assert gathered.metrics["sampling_rounds"] == 4


def test_rows_that_do_not_fit():
    data = Data(lambda i: False, fits=lambda i: i < 4)
    assert len(data.gather(rounds()).groups) == 4
    for how, position in ((rounds(), 4), (rounds(skips=False), 0)):
        with pytest.raises(CapacityError):
            data.gather(how, position=position)
    with pytest.raises(ConfigError, match="rounds >= 1"):
        rounds(0)


def toy(folder, *overrides):
    small = ("run.save_every=1", "rollout.prompts_per_step=4", "rollout.group_size=4", "grading.workers=0")
    dynamic = ("objective.dynamic_sampling=true", "engine.max_batch=16", f"run.folder={folder}")
    small += ("run.eval_every=0",)
    return load_config(TOY, [*small, *dynamic, *overrides])


def test_a_run_that_is_cut_draws_what_it_would_have_drawn(tmp_path):
    told = []

    def note(step, metrics, groups):
        told.append((step, {k: v for k, v in metrics.items() if "second" not in k}))

    def trained(folder, steps):
        with assemble(toy(folder, f"run.steps={steps}"), on_step=[note]) as parts:
            parts.trainer.resume()
            parts.trainer.train()
            weights = torch.cat([p.detach().flatten() for p in parts.model.parameters()])
            return weights, parts.trainer.position

    straight = trained(tmp_path / "straight", 2)
    said, told[:] = list(told), []
    trained(tmp_path / "cut", 1)
    cut = trained(tmp_path / "cut", 2)
    assert torch.equal(cut[0], straight[0])
    assert cut[1] == straight[1] > 2 * 4, "some round was a second one"
    assert told == said
    for _, metrics in said:
        assert metrics["groups_missing"] == 0
        assert metrics["groups_kept"] * metrics["prompts_decoded"] == pytest.approx(4)


def test_a_step_without_a_spread_changes_nothing(tmp_path):
    with assemble(toy(tmp_path, "rollout.budgets={plan: fixed, think: 0, solve: 0}")) as parts:
        before = [p.detach().clone() for p in parts.model.parameters()]
        metrics, groups = parts.trainer.train_step()
        assert all(torch.equal(a, b) for a, b in zip(before, parts.model.parameters(), strict=True))
    assert len(groups) == 16
    assert (metrics["groups_missing"], metrics["groups_kept"], metrics["reward"]) == (4, 0, 0)
    assert "loss" not in metrics
