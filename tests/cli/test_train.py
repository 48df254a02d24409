"""`elastic-decode train`: runs that stop and go on, the plan, mistakes with exit code 1."""

import json
import sys
from pathlib import Path

import pytest

from elastic_decode.cli import main
from elastic_decode.rl import assemble

TOY = str(Path(__file__).parents[2] / "recipes" / "toy.yaml")


def test_the_plan(capsys):
    assert main(["train", "--config", TOY, "--dry-run", "optim.lr=2e-4", "run.steps=10"]) == 0
    said = capsys.readouterr().out
    for part in (
        "tiny: 461,888 parameters",
        "countdown, split train: 4,146 rows",
        "32 prompts x 8 = 256 samples, at most 4,608 sampled tokens",
        "lr 0.0002, constant",
        "10 = 0.08 epochs",
        "hold the same storage",
        "the Hugging Face module: its log-probabilities",
        "AdamW's moments",
        "every 100 steps, before the first, after the last; 100 of countdown, split test: 628 rows, x 1",
    ):
        assert part in said


def test_the_plan_of_a_forward_pass_by_the_engine(capsys):
    assert main(["train", "--config", TOY, "--dry-run", "optim.forward=engine"]) == 0
    assert "log-probabilities equal a rollout's bit for bit" in capsys.readouterr().out


def test_the_plan_of_dynamic_sampling(capsys):
    assert main(["train", "--config", TOY, "--dry-run", "objective.dynamic_sampling=true"]) == 0
    assert "sampled tokens; dynamic sampling: up to 4 times as many" in capsys.readouterr().out


def test_another_evaluation_of_the_same_run_is_said(tmp_path, capsys):
    evaluated = (
        "evaluation={data: {source: countdown, split: test}, limit: %d, budgets: [{think: 0, solve: 3}]}"
    )
    assert train(tmp_path, "run.steps=1", "run.eval_every=1", evaluated % 2) == 0
    said = capsys.readouterr().err
    assert "evaluation after 1 step  t0_s3 " in said
    assert "evaluation has changed" not in said
    assert train(tmp_path, "run.steps=1", "run.eval_every=1", evaluated % 3) == 0
    said = capsys.readouterr().err
    assert "evaluation has changed: figures under eval/ so far are of the old one" in said
    assert "1 of 1 steps are done" in said


def test_a_sample_that_fits_no_micro_batch_is_said(capsys):
    assert main(["train", "--config", TOY, "--dry-run", "optim.max_tokens_per_microbatch=100"]) == 0
    assert "more than fit a micro-batch of 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
        ("model.path=/absent", "'/absent'"),
        ("data.source=absent.jsonl", "there is no file absent.jsonl"),
        ("evaluation.data={source: away.jsonl}", "there is no file away.jsonl"),
        ("rewards.0.function=absent:f", "absent:f cannot be imported"),
    ],
)
def test_mistakes(capsys, override, message):
    assert main(["train", "--config", TOY, "--dry-run", override]) == 1
    assert message in capsys.readouterr().err


def train(folder, *arguments):
    small = ["rollout.prompts_per_step=2", "rollout.group_size=2", "grading.workers=0", "run.save_every=2"]
    small += ["run.eval_every=0"]
    return main(["train", "--config", TOY, f"run.folder={folder}", *small, *arguments])


def records(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]


def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(whole, "run.steps=4") == 0
    assert train(parts, "run.steps=2", "run.log=[tensorboard]") == 0
    with (parts / "metrics.jsonl").open("a") as file:  # killed when step 3 was done and not saved
        file.write('{"step": 2, "reward": 7.0}\n')
    assert train(parts, "run.steps=4", "run.log=[tensorboard]") == 0
    assert "4 steps from step 2" in capsys.readouterr().err
    assert [record["step"] for record in records(whole)] == [0, 1, 2, 3]
    assert records(parts) == records(whole)
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(parts / "tensorboard"))
    events.Reload()
    for name in ("reward", "think_tokens"):
        shown = [(event.step, event.value) for event in events.Scalars(name)]
        assert shown == [(r["step"], pytest.approx(r[name])) for r in records(whole)]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert train(whole, "run.steps=4", "optim.lr=3e-4") == 1
    assert "optim.lr: 0.0001 -> 0.0003" in capsys.readouterr().err
    assert train(whole, "run.steps=4", "--resume", "never") == 1
    assert "holds a run already" in capsys.readouterr().err


def test_one_process_at_a_time_is_at_a_run(tmp_path, capsys):
    from elastic_decode.rl import whole_files

    folder = tmp_path / "run"
    with whole_files.taken(folder):
        assert train(folder, "run.steps=1") == 1
        assert f"another process is at the run in {folder}" in capsys.readouterr().err
        assert not list(folder.iterdir())
    assert train(folder, "run.steps=1") == 0


def test_what_is_not_installed_is_said_before_anything_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(assemble, "assemble", None)
    assert train(tmp_path / "run", "run.log=[wandb]") == 1
    assert "run.log asks for wandb" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_adapters_are_trained_and_exported_whole(tmp_path, capsys):
    pytest.importorskip("peft")
    run, lora = tmp_path / "run", "optim.lora={r: 2, alpha: 4}"
    assert train(run, lora, "run.steps=2") == 0
    assert (run / "checkpoints" / "step-000002" / "adapter_config.json").is_file()
    assert train(run, lora, "run.steps=2", "--export", str(tmp_path / "whole")) == 0
    assert f"step-000002, merged, is in {tmp_path / 'whole'}" in capsys.readouterr().out
    assert (
        main(["generate", str(tmp_path / "whole"), "--prompt", "9 1 6 = 3", "--think", "5", "--solve", "3"])
        == 0
    )
    for arguments, message in (
        ([lora, "--export", str(tmp_path / "whole")], "is not empty"),
        (["--export", str(tmp_path / "other")], "no adapters to merge"),
        ([lora, "--export", str(tmp_path / "other"), "--resume", str(tmp_path)], "not a whole checkpoint"),
        ([lora, "run.folder=absent", "--export", str(tmp_path / "other")], "no whole checkpoint"),
    ):
        assert train(run, *arguments) == 1
        assert message in capsys.readouterr().err
