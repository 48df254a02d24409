"""Samples and groups, and that the room's public names are there."""

import dataclasses
import pickle

import pytest

import elastic_decode.rl as rl
from elastic_decode.rl.advantage import ESTIMATORS, advantages
from elastic_decode.rl.batch import Group, Sample

SAMPLE = Sample(
    prompt_ids=(1, 2),
    token_ids=(3, 4, 5),
    logprobs=(-0.1, -2.0, -0.3),
    sampling_logprobs=(-0.1, 0.0, -0.3),
    forced=(False, True, False),
    loss_mask=(True, False, True),
    text="a b",
    thinking="a",
    solution="b",
    think_tokens=1,
    solve_tokens=1,
    think_end="forced",
    finish_reason="eos",
    think_budget=1,
    solve_budget=None,
    seed=7,
    weight_epoch=0,
)


def test_a_sample_starts_unscored_and_is_scored_by_replacing():
    assert SAMPLE.reward is None
    scored = dataclasses.replace(SAMPLE, rewards={"exact": 1.0, "slow": None}, reward=1.0)
    group = Group(index=3, step=5, samples=(scored, SAMPLE, dataclasses.replace(SAMPLE, reward=0.0)))
    assert group.rewards == (1.0, None, 0.0)
    assert advantages([group.rewards], "dr_grpo").values == ((0.5, None, -0.5),)
    assert pickle.loads(pickle.dumps(group)) == group  # workers get it


@pytest.mark.parametrize("name", ["logprobs", "sampling_logprobs", "forced", "loss_mask"])
def test_parallel_tuples_of_different_lengths_raise(name: str):
    with pytest.raises(ValueError, match=f"{name} 2"):
        dataclasses.replace(SAMPLE, **{name: getattr(SAMPLE, name)[:2]})


def test_every_export_is_there():
    assert {name: getattr(rl, name) for name in rl.__all__}
    assert sorted(rl._HOMES) == sorted(rl.__all__) == dir(rl)
    assert rl.ESTIMATORS is ESTIMATORS
    with pytest.raises(AttributeError, match="nothing"):
        _ = rl.nothing
