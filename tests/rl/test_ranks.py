"""Two processes train as one: the same samples, and weights and metrics up to the order of float32 sums.

tests/rl/ranks.py makes the runs, all in one go: what costs is starting Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastic_decode.errors import ConfigError, RankError
from elastic_decode.rl.distributed import World, joined, own_device
from elastic_decode.rl.parallel import Parallel

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="its processes are forks")
CASES = ("one", "ddp", "fsdp", "fsdp_from_one", "fsdp_bf16", "error", "raises", "transfer")
RATE = 1e-4  # the recipe's
# An update moves a weight by about RATE. Adding gradients up in another order changes them by some 1e-8,
# which against Adam's eps of 1e-5 is a thousandth of an update's length, and there are six.
APART = RATE / 100


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("ranks.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *CASES],
        capture_output=True,
        text=True,
        env=environment,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "output.txt").write_text(done.stderr)
    return folder


def told(runs, case, rank=0):
    codes = json.loads((runs / case / "codes.json").read_text())["codes"]
    assert set(codes) == {0}, (runs / "output.txt").read_text()[-3000:]
    return json.loads((runs / case / f"told-{rank}.json").read_text())


def checkpoint(runs, case, step):
    folder = runs / case / "checkpoints" / f"step-{step:06d}"
    return load_file(folder / "model.safetensors"), torch.load(folder / "trainer.pt", weights_only=True)


@pytest.mark.parametrize("case", ["ddp", "fsdp", "fsdp_from_one"])
def test_two_ranks_equal_one(runs, case):
    """Also where the run was taken up by another number of ranks after two of its four steps. What they save
    is the same, too, so one rank takes it up as it would its own.
    """
    alone = told(runs, "one")
    together = told(runs, case)
    assert [step["step"] for step in together] == ([3, 4] if "_from_" in case else [1, 2, 3, 4])
    spreads = set()
    for own, step in zip(alone[-len(together) :], together, strict=True):
        assert step["tokens"] == own["tokens"], "the same samples, in the same order"
        assert step["metrics"].keys() == own["metrics"].keys()
        for name, value in own["metrics"].items():
            if "second" not in name:
                noise = 1e-5 if name.startswith("mismatch") else 1e-6
                assert step["metrics"][name] == pytest.approx(value, rel=1e-4, abs=noise, nan_ok=True), name
        spreads.add(own["metrics"]["groups_with_spread"])
    assert 0 in spreads, "a step without anything to train on"
    assert max(spreads) > 0
    mine, theirs = checkpoint(runs, "one", 4), checkpoint(runs, case, 4)
    assert mine[0].keys() == theirs[0].keys(), "what is tied is saved once"
    moved = max(float((mine[0][n] - checkpoint(runs, "one", 2)[0][n]).abs().max()) for n in mine[0])
    assert moved > 20 * APART, "it would be seen if an update were left out"
    for name, weight in mine[0].items():
        assert (weight - theirs[0][name]).abs().max() <= APART, name
    states = [state["optimizer"]["adamw"]["state"] for _, state in (mine, theirs)]
    assert states[0].keys() == states[1].keys()
    for number, moments in states[0].items():
        for name, value in moments.items():
            torch.testing.assert_close(states[1][number][name], value, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("case", ["ddp", "fsdp"])
def test_every_rank_knows_the_same(runs, case):
    first, second = told(runs, case), told(runs, case, rank=1)
    for one, other in zip(first, second, strict=True):
        assert one["tokens"] == other["tokens"]
        clock = {name for name in one["metrics"] if "second" in name}
        for name in one["metrics"].keys() - clock:
            assert one["metrics"][name] == pytest.approx(other["metrics"][name], rel=0, abs=0, nan_ok=True)


def test_bfloat16_shards_have_float32_masters(runs):
    steps = told(runs, "fsdp_bf16")
    assert steps[0]["metrics"]["grad_norm"] == pytest.approx(
        told(runs, "one")[0]["metrics"]["grad_norm"], rel=0.1
    )
    weights, state = checkpoint(runs, "fsdp_bf16", 1)
    masters = state["optimizer"]["masters"]
    assert len(masters) == len(weights)
    assert all(master.dtype == torch.float32 for master in masters)
    rounded = torch.cat([master.bfloat16().flatten() for master in masters])
    assert torch.equal(
        rounded.sort().values, torch.cat([w.flatten() for w in weights.values()]).sort().values
    )
    moments = state["optimizer"]["adamw"]["state"].values()
    assert all(values["exp_avg"].dtype == torch.float32 for values in moments)


def test_an_error_on_one_rank_ends_all(runs):
    outcome = json.loads((runs / "error" / "codes.json").read_text())
    assert outcome["codes"] == [1, 1]
    said = [(runs / "error" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[1].startswith("RewardError: ")
    assert "the grader is out of order" in said[1]
    assert said[0].startswith("RankError: the rollout of step 0 failed on rank 1: RewardError: ")
    assert "the grader is out of order" in said[0]


def test_an_error_in_the_middle_of_an_update_ends_all(runs):
    assert json.loads((runs / "raises" / "codes.json").read_text())["codes"] == [1, 1]
    said = [(runs / "raises" / f"error-{rank}.txt").read_text() for rank in (0, 1)]
    assert said[1] == "MemoryError: no room for activations"
    assert said[0].startswith("RankError: rank 0 cannot reach the others any more (the update of step 0: ")


def test_weights_go_to_an_engine_in_another_process(runs):
    trainer, worker = told(runs, "transfer"), told(runs, "transfer", rank=1)
    assert trainer["before"] == worker["before"] != trainer["after"]
    assert worker["after"] == trainer["after"]
    assert (worker["epoch"], worker["epochs"]) == (7, 1)
    refusal = "the engine has no tensor 'bias': they hold other models"
    assert worker["refused"] == refusal
    assert worker["untouched"] == worker["after"], "refused before anything was overwritten"
    assert trainer["Linear"] == f"CheckpointError: no weights were sent: rank 1: {refusal}"
    assert trainer["Broken"] == "OSError: a shard is gone"
    assert "broke off" in worker["broken"]
    assert "broke off" in worker["incomplete"]
    assert worker["again"] == trainer["after"]


def test_samples_are_dealt_out_by_length():
    ranks = Parallel(None, World(1, 3))
    shares = ranks.share([5, 9, 1, 7, 3])
    assert shares == [[1], [2, 3], [0, 4]]
    assert Parallel(None).share([3, 1, 2]) == [[0, 1, 2]]
    assert [list(World(rank, 3).mine(5)) for rank in range(3)] == [[0, 3], [1, 4], [2]]


def test_a_world_of_one_says_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined("cpu") as world:
        assert world.main
        assert world.gather(3) == [3]
        assert torch.equal(world.concat(torch.arange(2)), torch.arange(2))
        with pytest.raises(ValueError, match="as it is"), world.together("a test"):
            raise ValueError("as it is")
    assert own_device("cuda:1") == "cuda:1"
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="say 'cuda'"):
        own_device("cuda:1")


def test_once_broken_always_broken():
    world = World(0, 2)
    world._broken = "the checkpoint failed on rank 1: OSError"
    with pytest.raises(RankError, match="the run has ended: the checkpoint failed"):
        world.gather(1)
