"""`elastic-decode train --dry-run`: the plan on a screen, mistakes with exit code 1."""

from pathlib import Path

import pytest

from elastic_decode.cli import main

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
        "AdamW's moments",
    ):
        assert part in said


def test_a_sample_that_fits_no_micro_batch_is_said(capsys):
    assert main(["train", "--config", TOY, "--dry-run", "optim.max_tokens_per_microbatch=100"]) == 0
    assert "more than fit a micro-batch of 100" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
        ("model.path=/absent", "'/absent'"),
        ("data.source=absent.jsonl", "there is no file absent.jsonl"),
        ("rewards.0.function=absent:f", "absent:f cannot be imported"),
    ],
)
def test_mistakes(capsys, override, message):
    assert main(["train", "--config", TOY, "--dry-run", override]) == 1
    assert message in capsys.readouterr().err
