"""Sweeps: thinking shared between budgets gives what each gives alone; nothing is lost or doubled."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from elastic_decode import Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.errors import BudgetError, ConfigError
from elastic_decode.eval.policies import POLICIES, policy
from elastic_decode.eval.records import RECORDS, RecordFile, read
from elastic_decode.eval.sweep import SweepOptions, seed_of, sweep
from elastic_decode.tasks import countdown
from elastic_decode.tasks.task import task

WORDS = {"wait": "check", "final": "", "newline": ""}
CONFIG = EngineConfig(device="cpu", dtype="float32", max_batch=32, max_model_len=256, kv_memory="32MiB")


@pytest.fixture(scope="module")
def engine():
    with Engine.from_pretrained(tiny_model_path(), CONFIG) as engine:
        yield engine


def rows(count: int = 6):
    return task("countdown").rows(limit=count)


def options(*names: str, **more) -> SweepOptions:
    policies = tuple(policy(name, WORDS if name == "s1" else None) for name in names)
    return SweepOptions(
        **{"policies": policies, "think": (0, 7, 15, 40, None), "solve": 3, "samples": 2, **more}
    )


def run(engine, folder, wanted, count=6, on_records=None):
    with RecordFile(folder, {"count": count}) as file:
        sweep(engine, rows(count), countdown.reward, wanted, file, on_records)
        return {record.key: record for record in file.records}


def same(a, b):
    """All but whether the thinking was shared."""
    return a.keys() == b.keys() and all(
        {**asdict(a[key]), "shared": None} == {**asdict(b[key]), "shared": None} for key in a
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_shared_thinking_gives_what_each_budget_gives_alone(engine, tmp_path, temperature):
    wanted = options("elastic", "truncate", sampling=SamplingParams(temperature=temperature))
    shared = run(engine, tmp_path / "shared", wanted)
    fresh = run(
        engine, tmp_path / "fresh", options("elastic", "truncate", sampling=wanted.sampling, share=False)
    )
    assert len(shared) == 2 * 5 * 6 * 2
    assert same(shared, fresh)
    assert {record.shared for record in fresh.values()} == {False}
    assert all(record.shared == (record.think is not None) for record in shared.values())
    ends = {record.think_end for record in shared.values()}
    assert ends == {"natural", "forced", "none"}


def test_six_budgets_cost_little_more_than_one_thought(engine, tmp_path):
    thinks = (5, 10, 15, 20, 25, 30)
    steps = {}
    for share in (True, False):
        before = engine.stats()
        wanted = options(
            "elastic", think=thinks, samples=4, share=share, sampling=SamplingParams(temperature=0.0)
        )
        found = run(engine, tmp_path / str(share), wanted, count=12)
        steps[share] = engine.stats()["decode_steps"] - before["decode_steps"]
        assert len(found) == 6 * 12 * 4
    assert steps[True] <= 0.4 * steps[False]


def test_records_are_graded_and_counted(engine, tmp_path):
    found = run(engine, tmp_path, options("elastic", "truncate", "s1", "no_thinking"))
    assert len(found) == (3 * 5 + 1) * 6 * 2
    problems = countdown.problems("test")
    for record in found.values():
        if record.policy == "elastic" and record.think is not None:
            assert record.think_tokens <= record.think
            assert record.solve_tokens <= 3
            assert record.forced_tokens == (record.think_end == "forced")
        if record.policy == "truncate" and record.think is not None:
            assert record.think_tokens + record.solve_tokens <= record.think + 3
        assert record.score == countdown.grade(
            problems[record.problem], record.text.partition(countdown.CLOSE)[2]
        )
        assert record.seed == seed_of(0, record.problem, record.sample)
    assert sum(record.score for record in found.values() if record.think is None) >= 6


class Stopped(Exception):
    pass


@pytest.mark.parametrize("after", [1, 7, 13, 30])
def test_a_stopped_sweep_goes_on_and_ends_as_if_it_had_not_stopped(engine, tmp_path, after):
    wanted = options("elastic", "truncate", think=(5, 15), samples=2)
    whole = run(engine, tmp_path / "whole", wanted)
    seen = []

    def stop(new):
        seen.extend(new)
        if len(seen) >= after:
            raise Stopped

    with pytest.raises(Stopped):
        run(engine, tmp_path / "cut", wanted, on_records=stop)
    path = tmp_path / "cut" / RECORDS
    path.write_bytes(path.read_bytes()[:-9])  # and killed while it wrote
    kept = len(path.read_text().splitlines()) - 1
    again = []
    with RecordFile(tmp_path / "cut", {"count": 6}) as file:
        assert len(file.notes) == 1
        assert len(file.records) == kept
        sweep(engine, rows(), countdown.reward, wanted, file, again.extend)
    assert len(again) == len(whole) - kept
    found = {record.key: record for record in read(tmp_path / "cut")}
    assert len(path.read_text().splitlines()) == len(found)
    assert same(found, whole)
    assert engine.stats()["running"] == 0


def test_budgets_and_policies_can_be_added_later(engine, tmp_path):
    run(engine, tmp_path, options("elastic", think=(5, 15)))
    new = []
    found = run(engine, tmp_path, options("elastic", "s1", think=(5, 10, 15)), on_records=new.extend)
    assert len(found) == 2 * 3 * 12
    assert {(record.policy, record.think) for record in new} == {
        ("elastic", 10),
        ("s1", 5),
        ("s1", 10),
        ("s1", 15),
    }


def test_another_sweeps_folder_is_refused(engine, tmp_path):
    identity = {"model": "a", "policy.s1": {"waits": 1}, "policy.elastic": {}}
    RecordFile(tmp_path, {"model": "b", "policy.s1": {"waits": 9}}).close()  # it broke off before any record
    with RecordFile(tmp_path, identity) as file:
        sweep(engine, rows(1), countdown.reward, options("elastic", think=(3,), samples=1), file)
    RecordFile(tmp_path, {"model": "a", "policy.s1": {"waits": 2}}).close()  # s1 has no record
    RecordFile(tmp_path, {"model": "a", "policy.truncate": {}}).close()
    kept = json.loads((tmp_path / "sweep.json").read_text())
    assert kept == {"model": "a", "policy.s1": {"waits": 2}, "policy.elastic": {}, "policy.truncate": {}}
    with pytest.raises(ConfigError, match="model: 'a' there, 'b' now"):
        RecordFile(tmp_path, {"model": "b"})
    with pytest.raises(ConfigError, match=r"policy\.elastic"):
        RecordFile(tmp_path, {"model": "a", "policy.elastic": {"x": 2}})
    (tmp_path / "sweep.json").unlink()
    with pytest.raises(ConfigError, match=r"no sweep\.json"):
        RecordFile(tmp_path, {"model": "a"})
    (tmp_path / RECORDS).write_text('{"policy": "elastic"}\n')
    with pytest.raises(ConfigError, match=r"records\.jsonl:1 is no record"):
        RecordFile(tmp_path, {"model": "a"})


def test_a_policy_that_cannot_be_followed_is_refused_before_anything_is_decoded(engine, tmp_path):
    wanted = options("elastic", "s1", think=(3, 5), samples=1)
    refused = policy("s1", {"wait": "no such word"})
    wanted = replace(wanted, policies=(wanted.policies[0], refused))
    with RecordFile(tmp_path, {}) as file:
        with pytest.raises(ValueError, match="cannot spell"):
            sweep(engine, rows(2), lambda **_: [1.0] * 2, wanted, file)
        assert not file.records
    assert engine.stats()["running"] == 0


def test_a_grader_that_fails_gives_none_and_a_short_one_an_error(engine, tmp_path):
    with RecordFile(tmp_path / "none", {}) as file:
        sweep(engine, rows(2), lambda **_: [None] * 2, options("elastic", think=(3, 5), samples=1), file)
        assert [record.score for record in file.records] == [None] * 4
    with RecordFile(tmp_path / "short", {}) as file, pytest.raises(ConfigError, match="1 scores for 2"):
        sweep(engine, rows(2), lambda **_: [1.0], options("elastic", think=(3, 5), samples=1), file)
    assert engine.stats()["running"] == 0


def test_l1_says_the_total_in_the_prompt(engine):
    made = policy("l1_max")
    chat = made.prompt([{"role": "user", "content": "1 2 3 = 6"}], 515)
    assert chat == [{"role": "user", "content": "1 2 3 = 6 Think for maximum 515 tokens."}]
    with pytest.raises(ConfigError, match="says its budget in the prompt"):
        options("l1_exact")


def test_what_cannot_be_is_refused(engine, tmp_path):
    with pytest.raises(ConfigError, match="no policy 'elastics'; there are elastic, truncate"):
        policy("elastics")
    with pytest.raises(ConfigError, match=r"policy s1: .*tries"):
        policy("s1", {"tries": 2})
    with pytest.raises(ConfigError, match=r"wrap_up.*text"):
        policy("wrap_up")
    with pytest.raises(ConfigError, match="a think budget comes twice"):
        options("elastic", think=(5, 5))
    with pytest.raises(ConfigError, match=r"sampling\.seed must be None"):
        options("elastic", sampling=SamplingParams(seed=1))
    with pytest.raises(BudgetError):
        run(engine, tmp_path, options("elastic", think=(5, 5000)))
    assert set(POLICIES) >= {
        "elastic",
        "truncate",
        "s1",
        "soft_landing",
        "wrap_up",
        "no_thinking",
        "l1_exact",
    }


def test_a_task_names_the_columns_it_found(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "1 2 3 = 6", "x": 1, "y": 2, "goal": 6, "z": 3}) + "\n")
    with pytest.raises(ConfigError, match="'target', which the data has not; there are: x, y, goal, z"):
        task("countdown").rows(str(path))
    (row,) = task("countdown").rows(str(path), columns={"target": "goal"})
    assert row.columns["target"] == 6
    assert row.prompt == [{"role": "user", "content": "1 2 3 = 6"}]
    with pytest.raises(ConfigError, match="no task 'aimee'"):
        task("aimee")
