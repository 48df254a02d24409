"""A checkpoint of adapters as a whole Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from elastic_decode.errors import CheckpointError, ConfigError
from elastic_decode.models import hub
from elastic_decode.rl import checkpoint, lora
from elastic_decode.rl.assemble import load_model, model_folder
from elastic_decode.rl.config import GRPOConfig


def export(config: GRPOConfig, folder: Path, *, path: Path | None = None) -> Path:
    """Write `path`, or the newest whole checkpoint of `config`'s run, with the adapters merged; the
    checkpoint's path.

    In `optim.dtype`, merged on `engine.device`: an engine with the run's settings that loads the folder has
    the weights that the run's engine had, bit for bit. Raises ConfigError for a run without adapters, whose
    checkpoints are such folders already, and CheckpointError where there is none.
    """
    if config.optim.lora is None:
        raise ConfigError(
            f"this run has no adapters to merge: each folder under {config.run.path / 'checkpoints'} is a "
            "Hugging Face model as it is"
        )
    lora.require_peft()
    found = path or checkpoint.latest(config.run.path / "checkpoints")
    if found is None:
        raise CheckpointError(f"there is no whole checkpoint under {config.run.path / 'checkpoints'}")
    checkpoint.load_state(found)  # raises where it is not whole
    base = load_model(model_folder(config), config)
    lora.export(found, folder, base=base, tokenizer=hub.tokenizer(found))
    return found
