"""The reproduction: statistics on numbers by hand, cells against the grader, order of jobs, resuming."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path

import measure
import pytest
import report
import run

from elastic_decode import Engine
from elastic_decode.assets import tiny_model_path
from elastic_decode.tasks import countdown

PROTOCOL = measure.load_protocol()


def test_an_interval_adds_problems_and_seeds_in_squares():
    found = report.estimate([[1.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    assert found.by_seed == (0.75, 0.5)
    assert found.mean == 0.625
    # Means over seeds: 1, .5, .5, .5: variance 1/16 over 4 problems. Seeds: variance 1/32 over 2.
    problems, seeds = math.sqrt(1 / 16 / 4), math.sqrt(1 / 32 / 2)
    assert found.half == pytest.approx(math.hypot(1.960 * problems, 12.706 * seeds))
    assert found.low == pytest.approx(0.625 - found.half)


def test_one_seed_has_the_problems_error_only():
    found = report.estimate([[1.0, 0.0, 1.0, 1.0]])
    assert found.half == pytest.approx(1.960 * 0.5 / math.sqrt(4))


def test_an_interval_holds_the_truth_as_often_as_it_says():
    draw = random.Random(1)
    held = 0
    for _ in range(300):
        problems = [draw.gauss(0, 1) for _ in range(40)]
        rows = [[0.3 + p + s for p in problems] for s in (draw.gauss(0, 0.2) for _ in range(4))]
        found = report.estimate(rows)
        held += abs(found.mean - 0.3) < found.half
    assert held / 300 > 0.93


def test_a_fall_of_means_and_its_error():
    base = [10.0, 20.0, 30.0]
    found = report.fall([[5.0, 10.0, 15.0]], base)
    assert found.mean == pytest.approx(0.5)
    assert found.half == pytest.approx(0)  # every problem fell by the same share
    assert report.fall([[5.0, 10.0, 30.0]], base).mean == pytest.approx(0.25)
    assert report.fall([[5.0, 10.0, 30.0]], base).half > 0.1


def _record(policy: str, think: int | None, right: list[int], tokens: list[int]) -> str:
    cell = {"policy": policy, "think": think, "wish": None, "samples": 4, "right": right, "forced": 0.5}
    return json.dumps(cell | {"think_tokens": tokens, "solve_tokens": [0] * 4, "cut": 0.0}) + "\n"


def _write(out: Path, right: dict[str, list[int]], tokens: dict[str, list[int]]) -> None:
    for name in right:
        (out / "arms" / name).mkdir(parents=True)
        cells = measure.cells(PROTOCOL, PROTOCOL["evaluate"]["policies"])
        lines = [_record(p, t, [0] * 4 if p == "truncate" else right[name], tokens[name]) for p, t in cells]
        (out / "arms" / name / "cells.jsonl").write_text("".join(lines) + '{"policy": "cut off by a ki')


def test_claims_and_tables_of_made_up_results(tmp_path):
    better, base = [4, 4, 3, 4], [2, 3, 1, 2]
    right = {"base": base, "elastic_15-11": better, "elastic_15-12": better}
    tokens = {"base": [40, 80, 40, 60], "elastic_15-11": [20, 40, 20, 30], "elastic_15-12": [20, 40, 20, 30]}
    _write(tmp_path, right, tokens)
    report.write(PROTOCOL, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    gain, fall, change, truncate, s1 = found["claims"]
    assert gain["mean"] == pytest.approx(7 / 16)
    assert gain["holds"]
    assert (fall["mean"], fall["holds"]) == (pytest.approx(0.5), True)
    assert change["mean"] == pytest.approx(7 / 16)
    assert truncate["mean"] == pytest.approx(15 / 16)
    assert (s1["mean"], s1["holds"]) == (0.0, False)
    (row,) = [
        c for c in found["cells"] if (c["arm"], c["policy"], c["think"]) == ("elastic_15", "elastic", 5)
    ]
    assert row["seeds"] == 2
    assert row["tokens"]["mean"] == pytest.approx(110 / 16)
    table = (tmp_path / "table.md").read_text()
    assert "| base | – | 50.0 ± " in table
    for name in ("accuracy-tokens", "accuracy-think"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_a_run_that_was_cut_is_in_no_figure(tmp_path):
    right = {"base": [2, 3, 1, 2], "elastic_15-11": [4, 4, 3, 4], "elastic_15-12": [0, 0, 0, 0]}
    _write(tmp_path, right, {name: [40, 80, 40, 60] for name in right})
    cut = tmp_path / "arms" / "elastic_15-12" / "cells.jsonl"
    cut.write_text("".join(cut.read_text().splitlines(keepends=True)[:5]))
    report.write(PROTOCOL, tmp_path)
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["claims"][0]["by_seed"] == [pytest.approx(7 / 16)]
    assert {row["seeds"] for row in found["cells"]} == {1}
    (tmp_path / "arms" / "base" / "cells.jsonl").unlink()
    report.write(PROTOCOL, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["claims"] == []


def test_a_cell_counts_what_the_grader_counts(monkeypatch):
    problems = countdown.problems("test")[:12]
    monkeypatch.setattr(countdown, "problems", lambda split: problems)
    with Engine.from_pretrained(tiny_model_path(), measure.ENGINE) as engine:
        found = measure.measure(engine, ("elastic", 5), PROTOCOL, None)
        again = measure.measure(engine, ("elastic", 5), PROTOCOL, None)
        free = measure.measure(engine, ("elastic", None), PROTOCOL, None)
        cut = measure.measure(engine, ("truncate", 5), PROTOCOL, None)
        wished = measure.measure(engine, ("wish", 10), PROTOCOL, (5, 50))
    assert found == again
    assert len(found["right"]) == 12
    assert all(0 <= right <= 4 for right in found["right"])
    assert found["think_tokens"] == [20] * 12  # no thought of the bundled model ends within 5 tokens
    assert found["forced"] == 1.0
    assert sum(free["right"]) > sum(found["right"])
    assert free["forced"] == 0.0
    assert max(t + s for t, s in zip(cut["think_tokens"], cut["solve_tokens"], strict=True)) <= 4 * 8
    assert wished["wish"] == 13


def test_every_arm_is_a_configuration_and_sources_come_first(tmp_path):
    from elastic_decode.rl.config import load_config

    jobs = run.jobs_of(PROTOCOL, list(PROTOCOL["arms"]), None, tmp_path)
    assert jobs[0].arm == "base"
    names = [job.name for job in jobs]
    assert len(set(names)) == len(names)
    plain = {arm: options for arm, options in PROTOCOL["arms"].items() if "from" not in options}
    for job in jobs[1:]:
        if job.arm in plain:
            command = run.train_command(PROTOCOL, job, tmp_path)
            config = load_config(command[3], command[4:])
            assert config.run.seed == job.seed
            assert config.run.steps == 300
        else:
            source = PROTOCOL["arms"][job.arm]["from"]
            assert names.index(f"{source}, seed {job.seed}") < names.index(job.name)
            with pytest.raises(RuntimeError, match=f"{source}, seed {job.seed}: no checkpoint of step 300"):
                run.train_command(PROTOCOL, job, tmp_path)
    main = load_config(run.ROOT / PROTOCOL["train"])
    assert dict(main.rollout.budgets) == {"plan": "fixed", "think": 15, "solve": 3}


def test_wishes_are_the_tasks_problems(tmp_path):
    rows = [json.loads(line) for line in run.wishes(PROTOCOL, (5, 50), tmp_path).read_text().splitlines()]
    problems = countdown.problems("train")
    assert len(rows) == len(problems)
    assert rows[7]["prompt"] == f"{problems[7].prompt} {rows[7]['target_tokens']}"
    assert {row["target_tokens"] for row in rows} == set(range(5, 51))


def test_jobs_wait_for_their_source_and_fall_with_it(tmp_path, monkeypatch):
    order = []

    def do(protocol, job, out, path):
        order.append(job.name)
        if job.name == "elastic_15, seed 12":
            raise RuntimeError("no")
        return "done"

    monkeypatch.setattr(run, "do", do)
    arms = ["stage2_30", "elastic_15"]  # not in the order they can be done in
    jobs = run.jobs_of(PROTOCOL, arms, [11, 12], tmp_path)
    failed = run.run_all(PROTOCOL, jobs, tmp_path, measure.PROTOCOL, 2)
    assert sorted(failed) == ["elastic_15, seed 12", "stage2_30, seed 12"]
    assert order.index("elastic_15, seed 11") < order.index("stage2_30, seed 11")
    assert "stage2_30, seed 12" not in order


def test_what_is_there_is_not_done_again(tmp_path, monkeypatch):
    (job, *_) = run.jobs_of(PROTOCOL, ["elastic_15"], [11], tmp_path)
    job.folder.mkdir(parents=True)
    cells = measure.cells(PROTOCOL, PROTOCOL["evaluate"]["policies"])
    lines = [_record(policy, think, [0] * 4, [0] * 4) for policy, think in cells]
    called = []
    monkeypatch.setattr(run, "call", lambda command, log: called.append(command))
    (job.folder / "cells.jsonl").write_text("".join(lines[:-1]))
    run.do(PROTOCOL, job, tmp_path, measure.PROTOCOL)
    assert len(called) == 1
    (job.folder / "cells.jsonl").write_text("".join(lines))
    assert run.do(PROTOCOL, job, tmp_path, measure.PROTOCOL) == "was there"
    assert len(called) == 1


def test_another_protocol_in_the_folder_is_refused(tmp_path, monkeypatch):
    other = copy.deepcopy(PROTOCOL) | {"steps": 7}
    (tmp_path / "protocol.yaml").write_text(json.dumps(other))
    monkeypatch.setattr("sys.argv", ["run.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="another protocol"):
        run.main()
