"""`elastic-decode eval` as it is called."""

from __future__ import annotations

import json

from elastic_decode.cli import main

ENGINE = ["--dtype", "float32", "--max-model-len", "256", "--kv-memory", "32MiB"]


def run(out, *more):
    sweep = ["--task", "countdown", "--limit", "4", "--solve", "3", "--n", "2", "--out", str(out)]
    return main(["eval", *sweep, *ENGINE, *more])


def test_a_sweep_its_table_and_going_on(tmp_path, capsys):
    words = ["--policy-option", "s1.wait=check", "--policy-option", 's1.final=""']
    s1 = [*words, "--policy-option", 's1.newline=""']
    assert run(tmp_path, "--policies", "elastic,s1", *s1, "--think", "5,15,none", "--pass-at", "1,2") == 0
    shown = capsys.readouterr().out
    for text in ("pass@2", "elastic", "s1", "± s.e.", "accuracy.png"):
        assert text in shown
    lines = (tmp_path / "records.jsonl").read_text().splitlines()
    assert len(lines) == 2 * 3 * 4 * 2
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 1 + 2 * 3
    # A budget and a policy more: only those are decoded.
    assert run(tmp_path, "--policies", "elastic,s1,no-thinking", *s1, "--think", "5,10,15,none") == 0
    after = (tmp_path / "records.jsonl").read_text().splitlines()
    assert after[: len(lines)] == lines
    assert len(after) == len(lines) + 2 * 8 + 8
    assert json.loads((tmp_path / "sweep.json").read_text())["policy.s1"]["wait"] == "check"


def test_what_is_wrong_is_said(tmp_path, capsys):
    def refused(*more):
        assert run(tmp_path / "x", *more) == 1
        return capsys.readouterr().err

    assert "no policy 'elastics'" in refused("--policies", "elastics", "--think", "5")
    assert "--think: 'many' is neither" in refused("--think", "many")
    assert "--pass-at 1,4: each must be in 1..2" in refused("--think", "5", "--pass-at", "1,4")
    assert "expected POLICY.OPTION=VALUE" in refused("--think", "5", "--policy-option", "s1.waits=2")
    assert "no file" in refused("--think", "5", "--data", "nowhere.jsonl")
    assert not (tmp_path / "x").exists()
    assert run(tmp_path / "y", "--think", "5") == 0
    assert "temperature: 1.0 there, 0.0 now" in _refused_again(tmp_path / "y", capsys)


def _refused_again(out, capsys):
    assert run(out, "--think", "5", "--temperature", "0") == 1
    return capsys.readouterr().err
