"""`elastic-decode train`: a GRPO run from its configuration, or its plan."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from elastic_decode.cli import options
from elastic_decode.config import ModelConfig
from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.models import hub

if TYPE_CHECKING:
    from elastic_decode.rl.config import GRPOConfig
    from elastic_decode.rl.estimate import Estimate
    from elastic_decode.rl.evaluation import Evaluation
    from elastic_decode.rl.metrics import Metrics
    from elastic_decode.rl.options import DataOptions
    from elastic_decode.rl.scores import EvaluationResult

_CONFIG = "config.yaml"  # in the run's folder
_EPILOG = """examples:
  elastic-decode train --config recipes/toy.yaml
  elastic-decode train --config recipes/e1_math_1.5b.yaml --dry-run optim.lr=2e-6 rollout.group_size=16
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "train",
        help="train under budgets (GRPO), or print what a run would need",
        description="Train a model by GRPO under think and solve budgets. Metrics and checkpoints go to the "
        "run's folder; a run that was stopped goes on from its newest checkpoint.",
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
        help="print the plan and load no weights: parameters, memory, tokens a step, what is shared",
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="auto: from the newest whole checkpoint, if there is one; never: refuse a folder that holds "
        "a run already; PATH: from that checkpoint, with the run's later ones set aside (default: auto)",
    )
    parser.add_argument(
        "--export",
        metavar="FOLDER",
        help="train nothing: write the newest checkpoint of a run with adapters (or that of --resume PATH) "
        "as a whole Hugging Face model, the adapters merged",
    )
    parser.set_defaults(run=run)


def shape(name: str, revision: str | None) -> ModelConfig:
    """The model's shape; of a hub id only config.json is fetched."""
    folder = Path(options.checkpoint(name))
    if folder.is_dir():
        return ModelConfig.from_hf(hub.resolve(folder, revision))
    from huggingface_hub import hf_hub_download

    try:
        return ModelConfig.from_hf(Path(hf_hub_download(name, "config.json", revision=revision)).parent)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"model.path {name!r}: no folder, and config.json not to be had: {error}"
        ) from error


def _rows(options: DataOptions) -> tuple[int | None, str]:
    """How many rows the data has, and what to say of it; nothing is downloaded."""
    from elastic_decode.rl import data
    from elastic_decode.tasks.data import FILES

    if options.source == "countdown" or Path(options.source).suffix in FILES:
        count = len(data.load(options))
        return count, f"{options.source}, split {options.split}: {count:,} rows"
    return None, f"{options.source}, split {options.split} (of the hub: not read for a plan)"


def _evaluation(config: GRPOConfig) -> str:
    wanted, every = config.evaluation, config.run.eval_every
    if wanted is None or not every:
        return "never"
    when = [f"every {every} steps"]
    when += ["before the first"] * wanted.at_start + ["after the last"] * wanted.at_end
    count, source = _rows(wanted.data)
    limit = "" if wanted.limit is None or (count or math.inf) <= wanted.limit else f"{wanted.limit} of "
    budgets = ", ".join(budget.label for budget in wanted.budgets)
    return f"{', '.join(when)}; {limit}{source}, x {wanted.n} sample{'s' * (wanted.n > 1)}, under {budgets}"


def _rewards(config: GRPOConfig) -> str:
    from elastic_decode.rl.reward_names import resolve

    resolve(config.rewards)
    return ", ".join(f"{reward.weight:g} x {reward.function}" for reward in config.rewards)


def _bytes(count: int) -> str:
    return f"{count / 2**30:,.2f} GiB" if count >= 2**28 else f"{count / 2**20:,.1f} MiB"


def run(arguments: argparse.Namespace) -> int:
    from elastic_decode.rl.config import load_config  # imports torch: not for --help

    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        return _plan(config)
    if arguments.export is not None:
        return _export(config, arguments.resume, Path(arguments.export))
    return _train(config, arguments.resume)


def _export(config: GRPOConfig, resume: str, folder: Path) -> int:
    from elastic_decode.rl.export import export

    if resume == "never":
        raise ConfigError("--export writes a checkpoint: leave --resume never out")
    path = export(config, folder, path=None if resume == "auto" else Path(resume))
    Console(highlight=False, soft_wrap=True).print(f"{path}, merged, is in {folder}", markup=False)
    return 0


def _plan(config: GRPOConfig) -> int:
    from elastic_decode.rl.estimate import estimate

    rewards = _rewards(config)
    rows, data = _rows(config.data)
    plan = estimate(config, shape(config.model.path, config.model.revision), rows)
    show(Console(highlight=False, soft_wrap=True), config, plan, data, rewards)
    return 0


def _train(config: GRPOConfig, resume: str) -> int:
    from elastic_decode.rl import trackers, whole_files
    from elastic_decode.rl.assemble import assemble
    from elastic_decode.rl.checkpoint import path_of
    from elastic_decode.rl.metrics import Metrics

    trackers.require(config.run.log)  # before the model is loaded
    remark = _check_folder(config, resume)
    written: list[Metrics] = []  # made once it is known at which step the run goes on

    def on_step(step: int, values: dict[str, float], groups: Any) -> None:
        for metrics in written:
            metrics.step(step - 1, values)

    def on_evaluation(step: int, result: EvaluationResult) -> None:
        for metrics in written:
            metrics.evaluation(step, result.metrics(), str(result))

    _quieten(after_loading=False)
    with (
        assemble(config, on_step=[on_step], on_evaluation=[on_evaluation]) as parts,
        ExitStack() as held,
    ):
        trainer, run = parts.trainer, config.run
        _quieten(after_loading=True)
        with trainer.world.together("the start"):
            if trainer.world.main:  # after reward workers are forked: they would have it, too
                held.enter_context(whole_files.taken(run.path))
        if resume != "never":
            trainer.resume(None if resume == "auto" else Path(resume))
        if not trainer.world.main:  # of several processes one writes and shows
            trainer.train()
            return 0
        whole_files.write(run.path / _CONFIG, config.to_yaml().encode())
        with Metrics(
            run.path,
            name=run.name,
            steps=run.steps,
            first_step=trainer.step,
            evaluated=trainer.evaluated,
            log=run.log,
            config=config.to_dict(),
            progress=run.progress,
        ) as metrics:
            written.append(metrics)
            done = trainer.step >= run.steps
            where = f"from step {trainer.step}" if trainer.step else "from the start"
            said = f"{run.steps} of {run.steps} steps are done" if done else f"{run.steps} steps {where}"
            more = "; a larger run.steps goes on" if done else ""
            metrics.say(f"{run.name}: {said}, in {run.path}{more}")
            if remark is not None:
                metrics.say(remark)
            if trainer.evaluation is not None:
                trainer.evaluation = _announced(trainer.evaluation, metrics)
            trainer.train()
            if not done:
                metrics.say(
                    f"{run.name}: done; the model is in {path_of(run.path / 'checkpoints', trainer.step)}"
                )
    return 0


def _announced(evaluation: Evaluation, metrics: Metrics) -> Evaluation:
    def run(step: int) -> EvaluationResult:
        metrics.busy("evaluating")
        return evaluation.run(step)

    return replace(evaluation, run=run)


def _quieten(*, after_loading: bool) -> None:
    """No progress bars of transformers: not beside ours, and none for loading where nobody is watching."""
    from transformers.utils import logging

    if after_loading or not sys.stderr.isatty():
        logging.disable_progress_bar()


def _check_folder(config: GRPOConfig, resume: str) -> str | None:
    """What there is to say of the run in the folder. Raises ConfigError where this one must not touch it, and
    says why.
    """
    from elastic_decode.rl.config import changes, load_config
    from elastic_decode.rl.metrics import FILE

    folder = config.run.path
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"run.folder: {folder} is no folder; give another run.folder")
    if resume == "never" and any((folder / name).exists() for name in (_CONFIG, FILE, "checkpoints")):
        raise ConfigError(f"{folder} holds a run already; give another run.folder, or --resume auto")
    if resume != "never" and (folder / _CONFIG).exists() and (folder / "checkpoints").exists():
        old = load_config(folder / _CONFIG)
        differences = changes(old, config)
        if differences:
            raise ConfigError(
                f"the run in {folder} cannot go on under another configuration; give another run.folder, or "
                "undo:\n  " + "\n  ".join(differences)
            )
        was, now = old.evaluation, config.evaluation
        if was and now and replace(was, at_start=now.at_start, at_end=now.at_end) != now:
            return f"{config.run.name}: evaluation has changed: figures under eval/ so far are of the old one"
    return None


_FORWARD = {
    "hf": "the Hugging Face module: its log-probabilities and a rollout's differ in their last bits",
    "engine": "the engine's own kernels: log-probabilities equal a rollout's bit for bit",
}


def show(console: Console, config: GRPOConfig, plan: Estimate, data: str, rewards: str) -> None:
    rollout, optim = config.rollout, config.optim
    most = "" if plan.tokens_a_step is None else f", at most {plan.tokens_a_step:,} sampled tokens"
    if config.objective.dynamic_sampling:
        most += f"; dynamic sampling: up to {config.objective.max_sampling_rounds} times as many"
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
        "evaluation": _evaluation(config),
        "weights": plan.sharing,
        "forward": _FORWARD[optim.forward],
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
