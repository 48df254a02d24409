"""One step's samples into this trainer and into TRL's: are the gradients the same?"""

from __future__ import annotations

from typing import Any, NamedTuple

from elastic_decode.rl.config import GRPOConfig
from peers import grpo_trl


class Apart(NamedTuple):
    """norms: of the gradients before clipping, ours and TRL's. apart: |ours - theirs| / |ours|. turned: the
    same without what a common factor explains.
    """

    norms: tuple[float, float]
    apart: float
    turned: float


def compare(config: GRPOConfig, folder: str) -> Apart:
    """Rollouts of a first step of `config`, decoded here, with their rewards and masks."""
    import torch

    groups, ours = _ours(config)
    theirs = _theirs(config, groups, folder)
    mine = torch.cat([gradient.flatten() for gradient in ours.values()])
    other = torch.cat([theirs[name].flatten() for name in ours])
    factor = (mine @ other) / (other @ other)
    norm = mine.norm()
    return Apart(
        (float(norm), float(other.norm())),
        float((mine - other).norm() / norm),
        float((mine - factor * other).norm() / norm),
    )


def _ours(config: GRPOConfig) -> tuple[list[Any], dict[str, Any]]:
    from elastic_decode.rl.assemble import assemble

    found: dict[str, Any] = {}
    with assemble(config) as parts:
        optimizer = parts.trainer.optimizer
        clip = optimizer.clip

        def noted(limit: float) -> Any:
            for name, parameter in parts.model.named_parameters():
                found[name] = parameter.grad.detach().clone()
            return clip(limit)

        optimizer.clip = noted  # type: ignore[method-assign]
        _, groups = parts.trainer.train_step()
    return groups, found


def _theirs(config: GRPOConfig, groups: list[Any], folder: str) -> dict[str, Any]:
    import torch
    import transformers
    import trl
    from datasets import Dataset

    from elastic_decode.assets import tiny_model_path
    from elastic_decode.rl import data

    samples = [sample for group in groups for sample in group.samples]
    rows, _ = data.load(config.data, seed=config.run.seed).batch(0, len(groups))
    found: dict[str, Any] = {}

    class Noted(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *arguments: Any, model: Any, **more: Any) -> None:
            found.update((name, p.grad.detach().clone()) for name, p in model.named_parameters())

    def roll(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [list(sample.prompt_ids) for sample in samples],
            "completion_ids": [list(sample.token_ids) for sample in samples],
            "logprobs": None,
            "env_mask": [[int(kept) for kept in sample.loss_mask] for sample in samples],
        }

    settings = grpo_trl.settings(config, folder)
    settings.max_steps, settings.max_grad_norm = 1, 1e9
    trainer = trl.GRPOTrainer(
        model=transformers.AutoModelForCausalLM.from_pretrained(tiny_model_path(), dtype=torch.float32),
        reward_funcs=lambda **_: [sample.reward for sample in samples],
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": row.prompt} for row in rows]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tiny_model_path()),
        callbacks=[Noted()],
        rollout_func=roll,
    )
    trainer.train()
    return found
