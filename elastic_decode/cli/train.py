"""`elastic-decode train`: the plan of a GRPO run from its configuration."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from elastic_decode.cli import options
from elastic_decode.config import ModelConfig
from elastic_decode.errors import CheckpointError

if TYPE_CHECKING:
    from elastic_decode.rl.config import GRPOConfig
    from elastic_decode.rl.estimate import Estimate

_EPILOG = """examples:
  elastic-decode train --config recipes/toy.yaml --dry-run
  elastic-decode train --config recipes/e1_math_1.5b.yaml --dry-run optim.lr=2e-6 rollout.group_size=16
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="check a training configuration and print what its run would need",
        description="Check the configuration of a GRPO run and print its plan: parameters, memory, tokens a "
        "step, what trainer and engine share. Loads no weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="a YAML file: see recipes/")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="replaces a value of the file: optim.lr=1e-5"
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        required=True,
        help="print the plan; the only thing that this command does so far",
    )
    parser.set_defaults(run=run)


def shape(name: str, revision: str | None) -> ModelConfig:
    """The model's shape; of a hub id only config.json is fetched."""
    folder = Path(options.checkpoint(name))
    if folder.is_dir():
        return ModelConfig.from_hf(folder)
    from huggingface_hub import hf_hub_download

    try:
        return ModelConfig.from_hf(Path(hf_hub_download(name, "config.json", revision=revision)).parent)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.path {name!r}: no folder, and config.json not to be had: {error}"
        ) from error


def _rows(config: GRPOConfig) -> tuple[int | None, str]:
    """How many rows the data has, and what to say of it; nothing is downloaded."""
    from elastic_decode.rl import data

    options = config.data
    if options.source == "countdown" or Path(options.source).suffix in data.FILES:
        dataset = data.load(options, seed=config.run.seed)
        return len(dataset), f"{options.source}, split {options.split}: {len(dataset):,} rows"
    return None, f"{options.source}, split {options.split} (of the hub: not read for a plan)"


def _rewards(config: GRPOConfig) -> str:
    from elastic_decode.rl.reward_names import resolve

    resolve(config.rewards)
    return ", ".join(f"{reward.weight:g} x {reward.function}" for reward in config.rewards)


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"


def run(arguments: argparse.Namespace) -> int:
    from elastic_decode.rl.config import load_config  # imports torch: not for --help
    from elastic_decode.rl.estimate import estimate

    config = load_config(arguments.config, arguments.overrides)
    rewards = _rewards(config)
    rows, data = _rows(config)
    plan = estimate(config, shape(config.model.path, config.model.revision), rows)
    show(Console(highlight=False, soft_wrap=True), config, plan, data, rewards)
    return 0


def show(console: Console, config: GRPOConfig, plan: Estimate, data: str, rewards: str) -> None:
    rollout, optim = config.rollout, config.optim
    most = "" if plan.tokens_a_step is None else f", at most {plan.tokens_a_step:,} sampled tokens"
    if plan.microbatches is None:
        packing = (
            f"samples may have {plan.longest_sample:,} tokens, more than fit a micro-batch of "
            f"{optim.max_tokens_per_microbatch:,}: a run would refuse them"
        )
    else:
        packing = f"at most {plan.microbatches} of {optim.max_tokens_per_microbatch:,} tokens a step"
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    budgets = ", ".join(f"{key} {value}" for key, value in rollout.budgets.items())
    rate = f"lr {optim.lr:g}, {optim.schedule}"
    lines = {
        "run": f"{config.run.name}, in {config.run.path}; fingerprint {config.fingerprint()}",
        "model": f"{config.model.path}: {plan.parameters:,} parameters, {plan.trained:,} trained",
        "data": data,
        "rewards": rewards,
        "budgets": budgets,
        "a step": f"{rollout.prompts_per_step} prompts x {rollout.group_size} = {plan.samples} samples{most}",
        "micro-batches": packing,
        "updates": f"{optim.updates_per_step} a step, {config.objective.name}, {rate}",
        "steps": f"{config.run.steps}{epochs}",
        "weights": plan.sharing,
    }
    for name, text in lines.items():
        console.print(f"{name:14}{text}", markup=False)
    table = Table(title="memory, in one process", title_justify="left")
    table.add_column("what")
    table.add_column("bytes", justify="right")
    for name, count in plan.memory.items():
        table.add_row(name, _bytes(count))
    table.add_section()
    table.add_row("together", _bytes(plan.total))
    console.print(table)
