"""What users get wrong, through the command line: exit code 1 and a message without a traceback, or a run
that goes on as documented. Each module's own tests have the details.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest

from elastic_decode.assets import tiny_model_path
from elastic_decode.cli import main

CONFIG = """
model: {path: tiny}
data: {source: countdown}
engine: {device: cpu, dtype: float32, max_batch: 16, max_model_len: 128, kv_memory: 16MiB}
rollout: {prompts_per_step: 4, group_size: 2, budgets: {plan: fixed, think: 5, solve: 3}}
rewards: [{function: "graders:length"}]
grading: {workers: 1}
optim: {lr: 1e-3, dtype: float32, max_tokens_per_microbatch: 512}
run: {name: bad, steps: 2}
"""
GRADERS = """
import time

def length(completions, **columns):
    return [float(len(str(text)) % 5) for text in completions]
def wants_answer(completions, answer):
    return length(completions)
def answer_is_given(completions, answer):
    return [None if given is None else value for given, value in zip(answer, length(completions))]
def raises(completions, **columns):
    raise KeyError("no such thing")
def nan(completions, **columns):
    return [float("nan")] * len(completions)
def infinite(completions, **columns):
    return [0.0, float("inf")][:len(completions)]
def too_few(completions, **columns):
    return [1.0]
def words(completions, **columns):
    return ["good"] * len(completions)
def nothing(completions, **columns):
    pass
def unscorable(completions, **columns):
    return [None] * len(completions)
def equal(completions, **columns):
    return [1.0] * len(completions)
def hangs_on_one(completions, number, **columns):
    if number[0] == 1:
        time.sleep(600)
    return length(completions)
"""
GOOD = [{"prompt": f"{number} 1 6 = 3", "number": number} for number in range(4)]


@pytest.fixture
def train(tmp_path, monkeypatch, capsys, caplog):
    """Runs the command; (exit code, what it said on stderr or logged, its training records)."""
    (tmp_path / "graders.py").write_text(GRADERS)
    (tmp_path / "run.yaml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "graders", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*overrides, rows=GOOD, flags=()):
        with open("data.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        arguments = ["--config", "run.yaml", *flags, "data.source=data.jsonl", "run.folder=run", *overrides]
        code = main(["train", *arguments])
        said = capsys.readouterr().err + caplog.text
        caplog.clear()
        assert "Traceback" not in said or "graders.py" in said
        lines = Path("run/metrics.jsonl")
        records = [json.loads(line) for line in lines.read_text().splitlines()] if lines.is_file() else []
        return code, said, records

    return run


def grader(name: str) -> str:
    return f"rewards=[{{function: 'graders:{name}'}}]"


def chat(content):
    return {"prompt": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([], (), "data.jsonl (split train) has no rows"),
        ([{"question": "1", "n": 1}], (), "row 0 has no column 'prompt' (data.columns.prompt says which one"),
        ([{"question": "1", "n": 1}], (), "there are: question, n"),
        (GOOD, ("data.columns={answer: solution}",), "no column 'solution' (data.columns.answer says"),
        (
            GOOD,
            (grader("wants_answer"),),
            "'wants_answer' needs the column answer; the dataset and the engine give",
        ),
        ([*GOOD, {"prompt": None, "number": 1}], (), "row 4: a prompt is a string or a chat, got None"),
        ([chat(None)], (), "row 0: the content of a user's message is None"),
        ([{"prompt": 7}], (), "row 0: a prompt is a string or a chat, got 7"),
        ([{"prompt": " "}], (), "row 0: the prompt is empty"),
        (GOOD, (grader("absent"),), "graders:absent cannot be imported"),
        (GOOD, ("engine.device=cuda:77",), "device 'cuda:77'"),
        (GOOD, ("engine.max_model_len=100000",), "more than the 4096 positions the model was made for"),
        (GOOD, ("engine.kv_memory=100KiB",), "raise kv_memory to"),
        (GOOD, ("model.think_open=<nope>",), "think_open='<nope>' has no known close"),
        (GOOD, ("run.folder=run.yaml",), "run.folder: run.yaml is no folder"),
        (GOOD, ("run.folder=run.yaml/below",), "Not a directory: 'run.yaml/below'"),
        (
            GOOD,
            (
                "run.eval_every=1",
                "evaluation={data: {source: countdown}, budgets: [{}]}",
                grader("hangs_on_one"),
            ),
            "needs the column number; evaluation.data and the engine give",
        ),
    ],
)
def test_said_before_anything_is_decoded(train, rows, overrides, message):
    code, said, records = train(*overrides, rows=rows)
    assert code == 1
    assert message in said
    assert not records


LONG = {"prompt": "1 " * 200, "number": 9}


@pytest.mark.parametrize(
    ("rows", "overrides", "message"),
    [
        ([LONG], (), "dataset row 0: the prompt has 201 tokens, max_model_len is 128"),
        (
            [*GOOD, LONG],
            ("rollout.too_long=raise", "rollout.prompts_per_step=5"),
            "dataset row 4: the prompt has 201",
        ),
        (GOOD, ("engine.max_model_len=12",), "Lower the budgets, shorten the prompt or raise max_model_len"),
        (GOOD, ("optim.max_tokens_per_microbatch=10",), "more than max_tokens_per_microbatch=10"),
        (GOOD, (grader("raises"),), "'raises', step 0, dataset row"),
        (GOOD, (grader("raises"),), "KeyError: 'no such thing'"),
        (GOOD, (grader("nan"),), "returned nan, expected a finite number or None"),
        (GOOD, (grader("infinite"),), "sample 1: returned inf, expected a finite number or None"),
        (GOOD, (grader("too_few"),), "returned 1 rewards, expected 2, one a sample"),
        (GOOD, (grader("words"),), "returned 'good' (a str), expected a finite number or None"),
        (GOOD, (grader("nothing"),), "returned None (a NoneType), expected a list of 2 numbers or None"),
    ],
)
def test_said_at_the_step_that_meets_it(train, rows, overrides, message):
    code, said, records = train(*overrides, rows=rows)
    assert code == 1
    assert message in said
    assert not records


def test_a_model_without_delimiters(train, tmp_path):
    folder = shutil.copytree(tiny_model_path(), tmp_path / "plain")
    for path in folder.glob("*.json*"):
        path.write_text(path.read_text().replace("think>", "muse>"))
    code, said, _ = train("model.path=plain", "data.source=countdown")
    assert code == 1
    assert "think_close" in said


def test_prompts_that_do_not_fit_are_skipped_and_said(train):
    code, said, records = train("rollout.prompts_per_step=5", rows=[*GOOD, LONG])
    assert code == 0
    assert "1 of 5 prompts skipped" in said
    assert "dataset row 4: the prompt has 201 tokens" in said
    assert len(records) == 2


@pytest.mark.parametrize("content", ["数学 🧮", "é\u2028\u0000x", "</think> <|im_end|> {% raw %}"])
def test_text_of_any_kind(train, content):
    code, _, records = train(
        "rollout.prompts_per_step=2", rows=[{"prompt": content, "n": None}, chat(content) | {"n": 1}]
    )
    assert code == 0
    assert all(math.isfinite(record["reward"]) for record in records)


def test_fewer_rows_than_a_step_has_prompts(train):
    """They come again, with other seeds."""
    code, _, records = train("rollout.prompts_per_step=6", "run.steps=1", rows=GOOD[:2])
    assert code == 0
    assert records[0]["groups_with_spread"] > 0


def test_values_that_are_none_reach_the_rewards(train):
    rows = [{**row, "answer": None if row["number"] else 3} for row in GOOD]
    code, _, records = train(grader("answer_is_given"), "run.steps=1", rows=rows)
    assert code == 0
    assert records[0]["unscorable"] == 0.75
    assert math.isfinite(records[0]["reward"])


def test_rewards_that_are_all_equal_make_no_update(train):
    """Metrics say so, a warning too, and the weights stay, momentum or not."""
    for name in ("grpo", "dapo"):
        shutil.rmtree("run", ignore_errors=True)
        code, said, records = train(grader("equal"), f"objective={{name: {name}}}")
        assert code == 0
        assert "0 of 4 groups have samples with different rewards" in said
        for record in records:
            assert (record["updates"], record["groups_with_spread"], record["reward"]) == (0, 0, 1)
            assert not any(isinstance(value, str) for value in record.values()), "NaN is written as a string"


def test_rewards_that_are_all_none_make_no_update(train):
    for overrides in ((grader("unscorable"),), (grader("nan"), "grading.on_error=none")):
        shutil.rmtree("run", ignore_errors=True)
        code, _, records = train(*overrides)
        assert code == 0
        assert [(record["updates"], record["unscorable"], record["reward"]) for record in records] == [
            (0, 1, "nan")
        ] * 2


def test_a_reward_that_hangs_is_killed_and_the_run_goes_on(train):
    started = time.monotonic()
    code, said, records = train(grader("hangs_on_one"), "grading.timeout=0.2")
    assert code == 0
    assert time.monotonic() - started < 30
    assert "timeout: no answer within 0.2 s; its rewards are None" in said
    assert [record["unscorable"] for record in records] == [0.25, 0.25]


def test_a_run_that_is_another_ones_or_damaged(train):
    assert train("run.steps=1")[0] == 0
    kept = Path("run/metrics.jsonl").read_bytes()
    newest = Path("run/checkpoints/step-000001")

    code, said, _ = train("optim.lr=2e-3")
    assert (code, "optim.lr: 0.001 -> 0.002" in said) == (1, True)
    code, said, _ = train(rows=[*GOOD, {"prompt": "8 1 6 = 3", "number": 8}])
    assert (code, "another configuration or other data" in said) == (1, True)
    code, said, _ = train(flags=("--resume", "run"))
    assert (code, "run is not a whole checkpoint" in said) == (1, True)

    state = newest / "trainer.pt"
    whole = state.read_bytes()
    state.write_bytes(b"x" * len(whole))
    code, said, _ = train()
    assert (code, "trainer.pt cannot be read" in said) == (1, True)
    state.unlink()
    code, said, _ = train()
    assert (code, "step-000001, and none is whole" in said) == (1, True)
    state.write_bytes(whole)

    folder = newest.parent.rename("run/aside")
    newest.parent.write_text("")
    code, said, _ = train()
    assert (code, "run/checkpoints cannot be read: Not a directory" in said) == (1, True)
    assert Path("run/metrics.jsonl").read_bytes() == kept, "nothing is lost by what is refused"
    newest.parent.unlink()
    folder.rename("run/checkpoints")
    code, _, records = train()
    assert (code, [record["step"] for record in records]) == (0, [0, 1])


def test_training_that_diverges(train):
    code, said, _ = train("optim.lr=1e30", "run.steps=4")
    assert code == 1
    assert "no update was made" in said
    assert "a lower learning rate" in said
