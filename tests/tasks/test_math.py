"""The math task: sets, gold answers, the pool's limits, and the reward as a function of columns."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from elastic_decode.errors import ConfigError
from elastic_decode.eval.sweep import grade_cells
from elastic_decode.rl.config import RewardOptions
from elastic_decode.rl.reward_names import resolve
from elastic_decode.tasks import math_grader
from elastic_decode.tasks.math import SETS, SUFFIX, MathReward, gold_answers
from elastic_decode.tasks.math_answers import extract
from elastic_decode.tasks.math_grader import Grader, compare, explosive
from elastic_decode.tasks.task import task

pytest.importorskip("math_verify")
HANGS = [r"\binom{10^{9}}{500000}", r"\binom{10^{9}}{600000}"]  # one call into C, for hours


def test_gold_answers():
    assert gold_answers("025") == ["025"]
    assert gold_answers(7) == ["7"]
    assert gold_answers(142.0) == ["142"]
    assert gold_answers(0.5) == ["0.5"]
    assert gold_answers([1.0, "x"]) == ["1", "x"]
    assert gold_answers("so 6 x 7 = 42.\n#### 42", "hash") == ["42"]
    assert gold_answers(r"hence $\boxed{\frac{1}{2}}$", "boxed") == [r"\frac{1}{2}"]
    for nothing in (None, "", " ", [], float("nan")):
        assert gold_answers(nothing) == []
    for wrong in ({"a": 1}, True, b"5"):
        with pytest.raises(TypeError, match="a text, a number, or a list"):
            gold_answers(wrong)


SAMPLES = {
    "aime": {"problem": "Q?", "solution": "long", "answer": "025"},
    "amc": {"problem": "Q?", "answer": 25.0, "url": "u"},
    "math500": {"problem": "Q?", "answer": "25", "solution": "s"},
    "math": {"problem": "Q?", "solution": r"hence $\boxed{25}$"},
    "minerva": {"question": "Q?", "answer": "25"},
    "olympiadbench": {"question": "Q?", "final_answer": ["$25$"], "solution": ["s"]},
    "gsm8k": {"question": "Q?", "answer": "5 x 5\n#### 25"},
    "deepscaler": {"problem": "Q?", "answer": "25", "solution": "s"},
}


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_a_task(name, tmp_path):
    data = tmp_path / "data.json"
    data.write_text(json.dumps([SAMPLES[name]]))
    (row,) = task(name).rows(str(data))
    assert row.prompt == [{"role": "user", "content": f"Q?{SUFFIX}"}]
    found = [Completion(solution) for solution in (r"\boxed{25}", r"\boxed{52}", r"\boxed{\sqrt{625}}")]
    with task(name).grader() as grade:
        assert grade_cells(grade, row, [(None, completion, True) for completion in found]) == [1.0, 0.0, 1.0]
    data.write_text(json.dumps([{"problem": "Q?", "question": "Q?", "gold": "3"}]))
    with pytest.raises(ConfigError, match=f"task {name} grades by the column '(final_)?(answer|solution)'"):
        task(name).rows(str(data))


class Completion:
    text = "…"
    token_ids = ()
    thinking = "hm"
    think_end = "forced"
    finish_reason = "eos"

    def __init__(self, solution: str) -> None:
        self.solution = solution


GOLD_FORMS = [
    r"\boxed{%s}",
    r"Therefore $m + n = \boxed{%s}$.",
    r"\[\boxed{\displaystyle %s}\]",
    r"\boxed{\text{%s}}",
    r"\boxed{%s \text{ minutes}}",
    r"\boxed{\dfrac{%s}{1}}",
    r"\boxed{x = %s.0}",
    r"\boxed{%s^\circ}",
]


@pytest.mark.parametrize("form", GOLD_FORMS)
def test_gold_answers_as_models_write_them(form):
    for gold in ("204", "025", "0", 142.0, -4.0, 8178.0):
        written = form % int(float(gold))
        assert compare(gold_answers(gold), extract(written)) is True
        assert compare(gold_answers(gold), extract(form % (int(float(gold)) + 1))) is False


def test_a_hang_costs_its_own_answer_only():
    with Grader(workers=1, limit=0.5) as grader:
        start = time.monotonic()
        answers = [r"\sqrt{12}", HANGS[0], r"\sqrt{12}", HANGS[0]]
        assert grader.grade(answers, [r"2\sqrt{3}", "5", r"3\sqrt{2}", "5"]) == [1.0, None, 0.0, None]
        assert dict(grader.failures) == {"limit": 1}, "equal questions are asked once"
        assert time.monotonic() - start < 60
        assert grader.grade(["7", None, "8", "3"], [[8, 7], 7, None, ["", "3"]]) == [1.0, 0.0, None, 1.0]


def test_patience_is_for_all_of_them():
    with Grader(workers=1, limit=20) as grader:
        start = time.monotonic()
        assert grader.grade([HANGS[0], HANGS[1], "5"], [5, 5, 5], patience=0.5) == [None, None, 1.0]
        assert grader.failures["patience"] == 2
        assert time.monotonic() - start < 60


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_bounded(monkeypatch):
    def equal(gold, answer, tolerance):
        return len(bytearray(int(answer.removesuffix("x")))) > 0

    monkeypatch.setattr(math_grader, "_equal", equal)  # before the processes are forked
    with Grader(workers=1, limit=20) as grader:
        assert grader.grade([f"{2**34}x", f"{2**24}x"], ["5", "5"]) == [None, 1.0]
        assert dict(grader.failures) == {"error": 1}


def test_what_is_refused_before_it_is_parsed():
    for text in ("10^{10^{10}}", "9!!", "(9!)!", "2^{20000}", "2^3^4", "12345!", "2**(10**10)", "1" * 401):
        assert explosive(text), text
    for text in ("e^{x^2}", "2^{2024}", "10!", "x^{2n+1}", r"\binom{20}{10}", "10^{-8}", "(x^2)^{3}", "n!"):
        assert not explosive(text), text


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_nothing_is_left_behind():
    def counted() -> tuple[int, int]:
        children = sum(
            len(task.read_text().split()) for task in Path(f"/proc/{os.getpid()}/task").glob("*/children")
        )
        return children, len(os.listdir("/proc/self/fd"))

    before = counted()
    for _ in range(3):
        with Grader(workers=2, limit=0.2) as grader:
            assert grader.grade([HANGS[0], r"\sqrt{12}"], ["5", r"2\sqrt{3}"])[0] is None
    assert counted() == before


def test_bad_settings():
    for settings, message in (
        ({"workers": 0}, "workers must be an int >= 1"),
        ({"limit": 0}, "limit must be a number of seconds > 0"),
        ({"tolerance": 1}, r"tolerance must be in \[0, 1\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            Grader(**settings)
    with Grader(workers=1) as grader, pytest.raises(ValueError, match="1 answers, and 2 gold"):
        grader.grade(["1"], ["1", "2"])


def test_without_math_verify(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    for make in (MathReward, Grader):
        with pytest.raises(ConfigError, match=r"pip install 'elastic-decode\[math\]'"):
            make()


def columns(*texts: str, **changes) -> dict:
    given = {
        "solution": list(texts),
        "thinking": ["hm"] * len(texts),
        "think_end": ["natural"] * len(texts),
        "answer": ["5"] * len(texts),
    }
    return given | changes


def test_the_reward():
    reward = MathReward()
    texts = (r"\boxed{5}", r"\boxed{6}", "5", r"\boxed{5} or \boxed{6}", r"\boxed{\sqrt{25}}", "")
    assert reward(**columns(*texts)) == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    for end, value in (("natural", 1.0), ("forced", 1.0), ("eos", 1.0), ("none", 0.0)):
        assert reward(**columns(r"\boxed{5}", think_end=[end])) == [value]
    assert reward(**columns(r"\boxed{5}", think_end=["none"], thinking=[""])) == [1.0], "it never began"
    assert reward(**columns("", thinking=[r"\boxed{5}"])) == [0.0], "the solution segment only"
    assert reward(**columns(r"\boxed{5}", r"\boxed{5}", answer=[[4, 5.0], None])) == [1.0, None]
    assert MathReward(where=("boxed", "answer"))(**columns("Answer: 5")) == [1.0]
    assert MathReward(answer="gold", gold="hash")(**columns(r"\boxed{5}", gold=["so\n#### 5"])) == [1.0]


def test_the_datasets_solution_is_not_ours():
    ours = columns(r"\boxed{6}")
    renamed = {
        "completion_solution": ours["solution"],
        "thinking": ours["thinking"],
        "think_end": ours["think_end"],
        "answer": ["5"],
        "solution": [r"so \boxed{5}"],
    }
    assert MathReward()(**renamed) == [0.0]
    with pytest.raises(ConfigError, match="needs the engine's columns"):
        MathReward()(solution=[r"\boxed{5}"], answer=["5"])


def test_the_reward_by_name():
    for options, message in (
        ({"gold": "last"}, "gold must be one of as_is, boxed, hash"),
        ({"where": ["box"]}, "where must be of boxed, answer, hash"),
        ({"answer": "a b"}, "answer must be the name of a column"),
        ({"limit": "5"}, "limit must be a number"),
        ({"gild": 1}, "unexpected keyword argument 'gild'"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve([RewardOptions(function="math", options=options)])
    found = resolve([RewardOptions(function="math", options={"answer": "gold"})])
    assert found["math"] == MathReward(answer="gold")
    length = resolve([RewardOptions(function="l1_max", options={"correct": "math", "target": 9})])["l1_max"]
    ids = [[1] * 9, [1] * 9]
    assert length(completion_ids=ids, **columns(r"\boxed{5}", r"\boxed{6}")) == [0.5, 0.0]
