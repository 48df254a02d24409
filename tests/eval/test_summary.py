"""Summaries on numbers by hand."""

from __future__ import annotations

import csv
import math

import pytest

from elastic_decode.eval.plots import plot
from elastic_decode.eval.records import Record
from elastic_decode.eval.summary import pass_at_k, summarize, write_csv


def record(problem, sample, score, **more):
    fields = {
        "policy": "elastic",
        "think": 10,
        "solve": 3,
        "seed": 0,
        "think_tokens": 8,
        "solve_tokens": 2,
        "forced_tokens": 1,
        "think_end": "forced",
        "finish_reason": "eos",
        "shared": False,
        "text": "",
    }
    return Record(**{**fields, **more}, problem=problem, sample=sample, score=score)


def test_the_error_is_clustered_by_problem():
    # Two problems of four samples: means 1 and 1/2. Over samples as if independent it would be smaller.
    records = [record(0, i, 1.0) for i in range(4)] + [record(1, i, i % 2) for i in range(4)]
    (cell,) = summarize(records, pass_at=[1, 2, 4])
    assert cell.accuracy == 0.75
    assert cell.error == pytest.approx(math.sqrt(0.125) / math.sqrt(2))
    assert cell.pass_at == {1: 0.75, 2: pytest.approx((1 + 5 / 6) / 2), 4: 1.0}
    assert (cell.tokens, cell.tokens_error, cell.forced, cell.natural) == (10, 0, 1.0, 0.0)


def test_ungraded_completions_are_in_no_accuracy():
    (cell,) = summarize([record(0, 0, 1.0), record(0, 1, None), record(1, 0, None), record(2, 0, 0.0)])
    assert (cell.accuracy, cell.ungraded, cell.completions, cell.problems) == (0.5, 2, 4, 3)
    (none,) = summarize([record(0, 0, None)], pass_at=[1])
    assert math.isnan(none.accuracy)
    assert none.pass_at == {}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    assert pass_at_k(5, 0, 3) == 0
    assert pass_at_k(5, 3, 3) == pytest.approx(1 - 0 / 10)
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    with pytest.raises(ValueError, match="pass@6 needs 6 samples"):
        pass_at_k(5, 1, 6)


def test_cells_come_in_order_and_go_to_csv_and_plots(tmp_path):
    records = [
        record(p, 0, float(p), policy=policy, think=think)
        for policy in ("truncate", "elastic")
        for think in (None, 20, 5)
        for p in (0, 1)
    ]
    cells = summarize(records, pass_at=[1])
    assert [(c.policy, c.think) for c in cells] == [
        (policy, think) for policy in ("truncate", "elastic") for think in (5, 20, None)
    ]
    write_csv(cells, tmp_path / "x.csv")
    with (tmp_path / "x.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [row["think"] for row in table] == ["5", "20", ""] * 2
    assert {row["pass_at_1"] for row in table} == {"0.5"}
    assert float(table[0]["error"]) == pytest.approx(0.5)
    written = plot(cells, tmp_path / "accuracy", title="t")
    assert [path.name for path in written] == ["accuracy.png", "accuracy.svg"]
    assert written[0].read_bytes().startswith(b"\x89PNG")
    assert "elastic, no budget" in written[1].read_text()
