"""A configuration into a trainer with everything it stands on: model, engine, data, rewards, optimizer."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from elastic_decode.assets import tiny_model_path
from elastic_decode.engine.build import check_device
from elastic_decode.errors import ConfigError
from elastic_decode.llm import Engine
from elastic_decode.models import hub
from elastic_decode.rl import data, lora, reward_names
from elastic_decode.rl.batch import Row
from elastic_decode.rl.budget_options import longest
from elastic_decode.rl.budgets import plan_of
from elastic_decode.rl.config import GRPOConfig, ObjectiveOptions
from elastic_decode.rl.distributed import World, joined, own_device, started
from elastic_decode.rl.engine_forward import EngineForward
from elastic_decode.rl.evaluation import Evaluation, Evaluator, rows_of
from elastic_decode.rl.logprobs import TokenLogprobs, token_logprobs
from elastic_decode.rl.loss import objective
from elastic_decode.rl.optim import MasterAdamW
from elastic_decode.rl.parallel import parallel
from elastic_decode.rl.rewards import Rewards
from elastic_decode.rl.trainer import GRPOTrainer, OnEvaluation, OnStep, TrainerOptions
from elastic_decode.rl.update import UpdateOptions


@dataclass(frozen=True, slots=True)
class Parts:
    """What a run is made of."""

    trainer: GRPOTrainer
    engine: Engine
    model: Any
    dataset: data.Dataset


@contextmanager
def assemble(
    config: GRPOConfig, *, on_step: Sequence[OnStep] = (), on_evaluation: Sequence[OnEvaluation] = ()
) -> Iterator[Parts]:
    """The parts of `config`'s run; engine and reward workers are closed at the end.

    Raises ConfigError for what the configuration asks and this trainer does not do, and whatever loading
    model, data and rewards raises.
    """
    _refuse(config)
    folder = model_folder(config)
    dataset = data.load(config.data, seed=config.run.seed)
    held_out = rows_of(config.evaluation) if config.evaluation is not None and config.run.eval_every else []
    functions = reward_names.resolve(config.rewards)
    grading = config.grading
    device = own_device(config.engine.device)
    with ExitStack() as stack:
        # Before the model and the process group: workers are forked, and should not hold what they never use.
        rewards = stack.enter_context(
            Rewards(
                functions,
                weights=[reward.weight for reward in config.rewards],
                workers=grading.workers,
                timeout=grading.timeout,
                on_error=grading.on_error,
            )
        )
        rewards.check_columns(dataset.columns)
        if held_out:
            rewards.check_columns(held_out[0].columns, of="evaluation.data")
        check_device(device)  # with the workers forked: asking may wake CUDA
        world = stack.enter_context(joined(device, timeout=config.distributed.timeout))
        with world.together("the start"):
            tokenizer = hub.tokenizer(folder)
            model = module = load_model(folder, config, device=device, world=world)
            adapters = _adapters(model, config)
            reference = _reference(model, adapters) if config.objective.kl else None
        if adapters is not None:
            model = adapters.model
        ranks = parallel(model, world, config.distributed.sharding)
        stack.callback(ranks.close)
        if isinstance(reference, torch.nn.Module):
            reference = ranks.frozen(reference)
        engine = stack.enter_context(
            Engine.from_model(
                module,
                tokenizer,
                replace(config.engine, device=device),
                think_open=config.model.think_open,
                think_close=config.model.think_close,
                fed=ranks.names if adapters is None else adapters.names,
            )
        )
        trainer = GRPOTrainer(
            engine=engine,
            model=model,
            next_rows=dataset.batch,
            rewards=rewards,
            budgets=plan_of(config.rollout.budgets),
            optimizer=MasterAdamW(
                model.parameters(),
                lr=config.optim.lr,
                betas=(config.optim.betas[0], config.optim.betas[1]),
                eps=config.optim.eps,
                weight_decay=config.optim.weight_decay,
            ),
            options=_options(config, dataset, _logprobs(config, engine, adapters)),
            reference=reference,
            adapters=adapters,
            folder=config.run.path,
            on_step=on_step,
            on_evaluation=on_evaluation,
            parallel=ranks,
        )
        trainer.evaluation = _evaluation(config, engine, rewards, held_out, world)
        yield Parts(trainer, engine, model, dataset)


def _refuse(config: GRPOConfig) -> None:
    """What a configuration may say and cannot be done here."""
    if config.optim.lora is not None:
        lora.require_peft()
    if started() and config.distributed.sharding == "fsdp":
        for path, value, off in (
            ("optim.lora", config.optim.lora, None),
            ("optim.forward", config.optim.forward, "hf"),
        ):
            if value != off:
                raise ConfigError(f"{path}={value!r} does not go with distributed.sharding=fsdp; use ddp")
    if started() and config.optim.lora is not None and config.optim.lora.dropout:
        raise ConfigError(
            "optim.lora.dropout draws by the order of samples, which several processes do not share: set it "
            "to 0, or run one process"
        )


def model_folder(config: GRPOConfig) -> Path:
    """Where the model to start from lies, downloaded if need be."""
    wanted = config.model
    return hub.resolve(tiny_model_path() if wanted.path == "tiny" else wanted.path, wanted.revision)


def load_model(
    folder: Any, config: GRPOConfig, *, device: str | None = None, world: World | None = None
) -> Any:
    """The module in `folder`, as the configuration wants it for training, without adapters."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    if world is not None and not world.main:
        logging.disable_progress_bar()
    dtype = torch.bfloat16 if config.optim.dtype == "bfloat16" else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    if world is None or world.size == 1 or config.distributed.sharding == "ddp":
        model = model.to(device or config.engine.device)  # FSDP takes it there part by part
    if config.optim.gradient_checkpointing:
        enable_checkpointing(model)
    return model


def enable_checkpointing(model: Any) -> None:
    """Keep only the layers' inputs for the backward pass (its name in transformers changed within 5)."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def _adapters(model: Any, config: GRPOConfig) -> lora.Adapters | None:
    wanted, name = config.optim.lora, config.model.path
    if wanted is None:
        return None
    base_name = str(tiny_model_path()) if name == "tiny" else name
    return lora.attach(model, wanted, run_seed=config.run.seed, base_name=base_name)


def _reference(model: Any, adapters: lora.Adapters | None) -> Any:
    """The initial model, for the KL: a frozen copy, or the module with its adapters switched off."""
    if adapters is not None:
        return adapters.model.disable_adapter
    return copy.deepcopy(model).requires_grad_(False).eval()


def _evaluation(
    config: GRPOConfig, engine: Engine, rewards: Rewards, rows: Sequence[Row], world: World
) -> Evaluation | None:
    wanted = config.evaluation
    if wanted is None or not config.run.eval_every:
        return None
    run = Evaluator(
        engine,
        rows,
        wanted.budgets,
        rewards=rewards,
        n=wanted.n,
        run_seed=config.run.seed,
        sampling=wanted.sampling,
        counted=wanted.rewards,
        chat_template_kwargs=config.rollout.chat_template_kwargs,
        world=world,
    )
    return Evaluation(run=run, every=config.run.eval_every, at_start=wanted.at_start, at_end=wanted.at_end)


def _logprobs(config: GRPOConfig, engine: Engine, adapters: lora.Adapters | None) -> TokenLogprobs:
    wants_engine = config.optim.forward == "engine"
    return EngineForward(engine, adapters).token_logprobs if wants_engine else token_logprobs


def _options(config: GRPOConfig, dataset: data.Dataset, logprobs: TokenLogprobs) -> TrainerOptions:
    optim, rollout, run = config.optim, config.rollout, config.run
    return TrainerOptions(
        steps=run.steps,
        prompts_per_step=rollout.prompts_per_step,
        group_size=rollout.group_size,
        update=_update_options(config, logprobs),
        lr=optim.lr,
        schedule=optim.schedule,
        warmup=optim.warmup,
        sampling=rollout.sampling,
        train_on_forced=rollout.train_on_forced,
        too_long=rollout.too_long,
        max_prompt_tokens=rollout.max_prompt_tokens,
        sleep_in_update=rollout.sleep_in_update,
        chat_template_kwargs=rollout.chat_template_kwargs,
        sampling_rounds=config.objective.max_sampling_rounds if config.objective.dynamic_sampling else None,
        run_seed=run.seed,
        save_every=run.save_every or run.steps,
        keep=run.keep,
        identity=f"{config.fingerprint()} {dataset.fingerprint()}",
    )


def _update_options(config: GRPOConfig, logprobs: TokenLogprobs) -> UpdateOptions:
    wanted, optim = config.objective, config.optim
    chosen = objective(wanted.name)
    chosen = replace(
        chosen,
        normalisation=wanted.normalisation or chosen.normalisation,
        estimator=wanted.advantages or chosen.estimator,
        drop_flat=chosen.drop_flat if wanted.drop_flat is None else wanted.drop_flat,
    )
    return UpdateOptions(
        objective=chosen,
        max_tokens=optim.max_tokens_per_microbatch,
        updates=optim.updates_per_step,
        eps_low=wanted.clip_low,
        eps_high=wanted.clip_high,
        kl_coef=wanted.kl,
        entropy_coef=wanted.entropy,
        correction_cap=wanted.importance_cap,
        constant_length=_constant_length(wanted, config) if chosen.normalisation == "constant" else None,
        grad_clip=optim.grad_clip,
        logprobs=logprobs,
    )


def _constant_length(wanted: ObjectiveOptions, config: GRPOConfig) -> int:
    if wanted.constant_length is not None:
        return wanted.constant_length
    think, solve = longest(config.rollout.budgets)
    if think is None or solve is None:
        raise ConfigError(
            "objective.constant_length: the budgets are unlimited, so there is no longest output to divide "
            "by; give a number of tokens"
        )
    return think + solve
