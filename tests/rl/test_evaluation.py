"""Evaluation: what is decoded and how it is counted; that training does not notice; that none is lost."""

import json
import logging
import math
from pathlib import Path

import pytest
import torch

from elastic_decode import Budget, Engine, EngineConfig, SamplingParams
from elastic_decode.assets import tiny_model_path
from elastic_decode.budgets import truncate
from elastic_decode.cli import main
from elastic_decode.errors import BudgetError, ConfigError, RewardError
from elastic_decode.rl.assemble import assemble
from elastic_decode.rl.batch import Row
from elastic_decode.rl.config import load_config
from elastic_decode.rl.distributed import World
from elastic_decode.rl.evaluation import Evaluation, Evaluator, evaluate, rows_of
from elastic_decode.rl.options import DataOptions, EvaluationBudget, EvaluationOptions
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.scores import clustered
from elastic_decode.rl.seeds import derive
from elastic_decode.tasks import countdown

TOY = Path(__file__).parents[2] / "recipes" / "toy.yaml"
ROWS = [
    Row(7 + place, problem.chat, {"problem": problem})
    for place, problem in enumerate(countdown.sample("test", 6, 0))
]
BUDGETS = (
    EvaluationBudget(think=0, solve=3),
    EvaluationBudget(think=10, solve=3),
    EvaluationBudget(think=None, solve=3),
    EvaluationBudget(think=10, solve=1, name="short"),
    EvaluationBudget(truncate=12),
)
POLICIES = (Budget(0, 3), Budget(10, 3), Budget(None, 3), Budget(10, 1), truncate(12))


def right(solution, problem):
    return [countdown.grade(p, text) for p, text in zip(problem, solution, strict=True)]


def length(completion_ids):
    return [float(len(ids)) for ids in completion_ids]


def make_engine(**changes):
    fields = {"dtype": "float32", "max_batch": 16, "max_model_len": 96, "kv_memory": "16MiB"}
    return Engine.from_pretrained(tiny_model_path(), EngineConfig(**{**fields, **changes}))


@pytest.fixture(scope="module")
def engine():
    with make_engine() as made:
        yield made


@pytest.fixture(scope="module")
def rewards():
    with Rewards([right, length], weights=[1, 0], workers=0) as made:
        yield made


def test_every_budget_is_what_generate_gives(engine, rewards):
    result = evaluate(engine, ROWS, BUDGETS, 3, rewards, 5, 40)
    assert (result.step, result.rows, result.skipped) == (40, tuple(row.index for row in ROWS), 0)
    labels = [score.budget.label for score in result.budgets]
    assert labels == ["t0_s3", "t10_s3", "tinf_s3", "short", "truncate12"]
    for policy, score in zip(POLICIES, result.budgets, strict=True):
        completions = []
        for row, scores in zip(ROWS, score.scores, strict=True):
            for sample, scored in enumerate(scores):
                sampling = SamplingParams(seed=derive("evaluation", 5, row.index, sample))
                (made,) = engine.generate([row.prompt], budget=policy, sampling=sampling)
                (completion,) = made.completions
                completions.append(completion)
                assert scored == countdown.grade(row.columns["problem"], completion.solution)
        count = len(completions)
        assert count == 18
        for name in ("think_tokens", "solve_tokens"):
            assert getattr(score, name) == pytest.approx(sum(getattr(c, name) for c in completions) / count)
        for name in ("forced", "natural"):
            assert getattr(score, name) == sum(c.think_end == name for c in completions) / count
        assert score.cut == sum(c.finish_reason == "budget" for c in completions) / count
        assert score.accuracy == pytest.approx(sum(map(sum, score.scores)) / count)
    assert result.budgets[0].forced == 1
    assert result.budgets[2].natural == 1
    assert result.budgets[3].cut == 1


def test_evaluations_are_paired_across_steps_and_not_across_runs(engine, rewards):
    def scores(seed, step, rows=ROWS, budgets=BUDGETS, other=engine):
        counted = {"counted": ("length",)}
        return [s.scores for s in evaluate(other, rows, budgets, 2, rewards, seed, step, **counted).budgets]

    found = scores(5, 0)
    assert scores(5, 9) == found
    assert scores(6, 0) != found
    assert [s[::-1] for s in scores(5, 0, rows=ROWS[::-1])] == found, "a row's samples are its own"
    assert scores(5, 0, budgets=BUDGETS[1:2]) == found[1:2], "with others or alone"
    with make_engine(
        kv_memory="36KiB", page_size=4, max_model_len=24
    ) as small:  # a fork's branches do not fit together
        evaluator = Evaluator(small, ROWS, BUDGETS[:2], rewards=rewards)
        assert not any(shared.fork for shared in evaluator._plan)
        assert scores(5, 0, budgets=BUDGETS[:2], other=small) == found[:2]


def test_names_and_numbers(engine, rewards):
    result = evaluate(engine, ROWS, BUDGETS[1:3], 1, rewards, 5, 3, counted=("right", "length"))
    metrics = result.metrics()
    assert all(name.startswith("eval/") for name in metrics)
    figures = [
        "accuracy",
        "standard_error",
        "think_tokens",
        "solve_tokens",
        "forced",
        "natural",
        "cut",
        "unscorable",
    ]
    assert {name.rpartition("/")[2] for name in metrics} == {*figures, "problems", "skipped", "seconds"}
    assert metrics["eval/t10_s3/accuracy"] > 10, "right and length together"
    assert metrics["eval/problems"] == 6
    line = str(result)
    assert "\n" not in line
    first = f"t10 {metrics['eval/t10_s3/accuracy']:.3f}"
    assert line.startswith(f"evaluation after 3 steps, s3  {first}  tinf ")
    assert "tokens)  (6 prompts, ±" in line
    assert "t0_s3" in str(evaluate(engine, ROWS, BUDGETS, 1, rewards, 5, 3)), "not all with 3 tokens to solve"


class Half(World):
    """One of two processes; the other one's part is made here, too."""

    def __init__(self, rank, other):
        super().__init__(rank, 2)
        self._other = other

    def gather(self, value):
        return sorted([value, self._other(value)], key=str)


def test_processes_share_the_rows(engine, rewards):
    alone = evaluate(engine, ROWS, BUDGETS, 2, rewards, 5, 0)

    def made(rank):
        return Evaluator(engine, ROWS, BUDGETS, rewards=rewards, n=2, run_seed=5, world=World(rank, 2))

    parts = [made(rank)._outcomes(0) for rank in (0, 1)]
    assert [len(part) for part in parts] == [3 * len(BUDGETS)] * 2
    other = Half(0, lambda value: None if value is None else parts[1])
    shared = Evaluator(engine, ROWS, BUDGETS, rewards=rewards, n=2, run_seed=5, world=other)(0)
    assert (shared.budgets, shared.rows) == (alone.budgets, alone.rows)


def test_unscorable_samples_are_in_no_mean(engine):
    def sometimes(completion_ids, problem):
        return [None if p.x % 2 else 1.0 for p in problem]

    odd = sum(row.columns["problem"].x % 2 for row in ROWS)
    with Rewards(sometimes, workers=0) as rewards:
        (score,) = evaluate(engine, ROWS, BUDGETS[:1], 2, rewards, 5, 0).budgets
    assert 0 < odd < len(ROWS)
    assert (score.accuracy, score.unscorable) == (1, odd / len(ROWS))


def test_the_clustered_error_by_hand():
    assert clustered([[0, 1], [1, 1], [0, 0]]) == (0.5, pytest.approx(math.sqrt(2 * 3 / 2) / 6))
    mean, error = clustered([[1.0], [0.0], [0.0], [1.0]])
    assert (mean, error) == (0.5, pytest.approx(math.sqrt(1 / 3 / 4)))  # of four independent ones
    assert clustered([[1.0, None], [None], [0.0, 0.0]])[0] == pytest.approx(1 / 3)
    assert math.isnan(clustered([[1.0, 0.0]])[1])
    assert all(map(math.isnan, clustered([[None]])))


def test_rows_that_do_not_fit(engine, rewards, caplog):
    long = Row(99, " ".join(["1"] * 90), {"problem": ROWS[0].columns["problem"]})
    with caplog.at_level(logging.WARNING):
        result = evaluate(engine, [long, *ROWS], BUDGETS[:2], 1, rewards, 5, 0)
    assert (result.skipped, len(result.rows)) == (1, 6)
    assert "1 of 7 prompts are left out" in caplog.text
    assert result.budgets == evaluate(engine, ROWS, BUDGETS[:2], 1, rewards, 5, 0).budgets
    with pytest.raises(BudgetError):
        Evaluator(engine, ROWS, [EvaluationBudget(think=900, solve=3)], rewards=rewards)
    with pytest.raises(ConfigError, match="names 'rihgt'; there are right, length"):
        Evaluator(engine, ROWS, BUDGETS, rewards=rewards, counted=["rihgt"])
    with pytest.raises(ConfigError, match="different indices"):
        Evaluator(engine, [ROWS[0], ROWS[0]], BUDGETS, rewards=rewards)


def test_an_error_of_a_reward_aborts_what_runs(engine):
    with Rewards(lambda prompts: 1 / 0, workers=0) as rewards:
        evaluator = Evaluator(engine, ROWS, BUDGETS, rewards=rewards)
        with pytest.raises(RewardError, match=r"in the evaluation: .* dataset row \d+ raised\n"):
            evaluator(0)
    assert not engine.has_work


def test_when():
    def steps(**how):
        return [s for s in range(8) if Evaluation(run=lambda step: None, **how).due(s, 7)]

    assert steps(every=3) == [0, 3, 6, 7]
    assert steps(every=3, at_start=False, at_end=False) == [3, 6]
    assert steps(every=9) == [0, 7]


def test_limited_rows_are_the_same_in_every_run():
    options = EvaluationOptions(data=DataOptions(source="countdown", split="test"), budgets=BUDGETS, limit=50)
    rows = rows_of(options)
    assert [row.index for row in rows] == sorted({row.index for row in rows})
    assert len({(row.columns["x"], row.columns["y"], row.columns["z"]) for row in rows}) > 25
    assert rows == rows_of(options)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluation=null"], "run.eval_every needs to know what to evaluate"),
        (["evaluation.lmit=3"], "unknown key 'evaluation.lmit'; did you mean 'evaluation.limit'?"),
        (["evaluation.budgets=[]"], "evaluation.budgets must be one or more"),
        (["evaluation.budgets.0.thnk=1"], "did you mean 'evaluation.budgets.0.think'?"),
        (["evaluation.budgets.0.truncate=5"], "evaluation.budgets.0: truncate must be without think"),
        (
            ["evaluation.budgets.0.think=5"],
            "evaluation.budgets must be of different names, got ['t5_s3', 't5_s3'",
        ),
        (["evaluation.budgets.0.solve=-1"], "evaluation.budgets.0: solve must be a number of tokens >= 0"),
        (["evaluation.rewards=[rihgt]"], "evaluation.rewards must be of countdown, got 'rihgt'"),
        (["evaluation.n=0"], "evaluation.n must be >= 1"),
        (["evaluation.sampling.seed=1"], "evaluation.sampling.seed must be null"),
        (["evaluation.data.split=3"], "evaluation.data.split must be a string"),
    ],
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ConfigError) as raised:
        load_config(TOY, overrides)
    assert message in str(raised.value)


SMALL = (
    "rollout.prompts_per_step=2",
    "rollout.group_size=4",
    "grading.workers=0",
    "run.save_every=2",
    "run.eval_every=1",
    "evaluation.limit=3",
    "evaluation.budgets=[{think: 0, solve: 3}, {think: 5, solve: 3}]",
    "run.progress=false",
)


def toy(folder, *overrides):
    return load_config(TOY, [f"run.folder={folder}", *SMALL, *overrides])


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_training_does_not_notice(tmp_path):
    def trained(name, *overrides):
        told, evaluations = [], []
        with assemble(
            toy(tmp_path / name, "run.steps=2", *overrides),
            on_step=[lambda step, metrics, groups: told.append((metrics, groups))],
            on_evaluation=[lambda step, result: evaluations.append(step)],
        ) as parts:
            parts.trainer.train()
            timeless = [{k: v for k, v in metrics.items() if "second" not in k} for metrics, _ in told]
            return weights(parts.model), timeless, [groups for _, groups in told], evaluations

    plain = trained("plain", "run.eval_every=0")
    watched = trained("watched", "engine.prefix_cache=true")
    assert torch.equal(plain[0], watched[0])
    assert plain[1:3] == watched[1:3]
    assert (plain[3], watched[3]) == ([], [0, 1, 2])


def train(folder, *overrides):
    arguments = ["train", "--config", str(TOY), f"run.folder={folder}", *SMALL, "run.steps=4", *overrides]
    assert main(arguments) == 0


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


class Killed(Exception):
    pass


def test_no_evaluation_is_lost_or_doubled(tmp_path):
    train(tmp_path / "whole")
    whole = records(tmp_path / "whole")
    places = [(record["step"], any(name.startswith("eval/") for name in record)) for record in whole]
    both = [(step, evaluation) for step in range(4) for evaluation in (True, False)]
    assert places == [*both, (4, True)]

    # Killed after the third step, whose evaluation is not made; two steps are in a checkpoint.
    folder = tmp_path / "cut"
    train(folder, "run.steps=2")
    written = folder / "metrics.jsonl"
    written.write_text("".join(json.dumps(record) + "\n" for record in [*whole[:6], {**whole[6], "lost": 1}]))
    train(folder)
    assert records(folder) == whole

    # A checkpoint of one's own, written before the evaluation of its step.
    folder = tmp_path / "own"

    def save(step, metrics, groups):
        if step == 3:
            parts.trainer.save()
            raise Killed

    with (
        pytest.raises(Killed),
        assemble(toy(folder, "run.steps=4", "run.save_every=9"), on_step=[save]) as parts,
    ):
        parts.trainer.train()
    written = folder / "metrics.jsonl"
    written.write_text("".join(json.dumps(record) + "\n" for record in whole[:6]))
    train(folder)
    assert records(folder) == whole
