"""LoRA (Hu et al., arXiv 2106.09685) through peft: adapters are trained, the engine decodes with them merged.

peft wraps the module: y = W x + (alpha / r) B A x, W frozen, A and B in float32. The engine has buffers of
its own for the adapted matrices and shares all else with the module; after every update `merged` computes
W + (alpha / r) B A in float32, a matrix at a time, and the engine casts each once into its buffer. W itself
is never written to, so nothing drifts, and with the adapters switched off the module is the initial one: the
KL's reference needs no copy.

With a base in bfloat16 the trainer adds two products where the engine rounds their sum into one matrix: their
log-probabilities differ by more than float32 noise, which the mismatch metrics show and
`objective.importance_cap` corrects for; with `optim.forward: engine` the trainer computes with the merged
matrices, too. So it is with dropout, which only the trainer has.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from elastic_decode.errors import CheckpointError, ConfigError, UnsupportedModel
from elastic_decode.rl import seeds
from elastic_decode.rl.config import LoraOptions

ALL = "all-linear"
_ADAPTER = "default"  # peft's name for the only one
_WEIGHTS = "adapter_model.safetensors"


class Adapters:
    """A module's adapters. `model`: peft's wrapper, to train; `base`: the Hugging Face module below it."""

    def __init__(self, model: Any) -> None:
        """model: peft's PeftModel with one LoRA adapter on linear layers."""
        self.model = model
        self.base = model.get_base_model()
        layers = [
            (name.replace(".base_layer", ""), layer)
            for name, layer in self.base.named_modules()
            if hasattr(layer, "lora_A") and hasattr(layer, "base_layer")
        ]
        for name, layer in layers:
            plain = isinstance(layer.base_layer, torch.nn.Linear) and not layer.lora_variant
            if not plain or list(layer.lora_A) != [_ADAPTER] or layer.lora_bias[_ADAPTER]:
                raise UnsupportedModel(
                    f"{name}: only one plain LoRA adapter on a linear layer can be merged, not "
                    f"{type(layer.base_layer).__name__} with {', '.join(layer.lora_A)}, DoRA or a bias"
                )
        self._layers = {f"{name}.weight": layer for name, layer in layers}

    @property
    def names(self) -> tuple[str, ...]:
        """The adapted matrices, by their names in a checkpoint: what an engine is to be fed."""
        return tuple(self._layers)

    def factors(self, name: str) -> tuple[torch.nn.Parameter, torch.nn.Parameter, float]:
        """A [r, in], B [out, r] and alpha / r of an adapted matrix."""
        layer = self._layers[name]
        return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight, layer.scaling[_ADAPTER]

    @torch.no_grad()
    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each adapted matrix W + (alpha / r) B A as a new float32 tensor, made when it is asked for; W alone
        where the adapters are switched off (peft's `disable_adapter`).

        Raises ConfigError where peft has merged an adapter into W itself.
        """
        for name, layer in self._layers.items():
            if layer.merged:
                raise ConfigError(f"{name} holds its adapter already: call unmerge_adapter(), and train so")
            whole = layer.base_layer.weight.to(torch.float32, copy=True)
            if not layer.disable_adapters:
                down, up, scale = self.factors(name)
                whole.addmm_(up.float(), down.float(), alpha=scale)
            yield name, whole

    def save_pretrained(self, folder: Path) -> None:
        """A folder as peft writes it: adapter_config.json and adapter_model.safetensors."""
        # Whether embeddings were resized need not be looked up on the hub: they are not trained.
        self.model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, folder: Path) -> None:
        """The adapters in `folder` into these, in place. Raises CheckpointError where they are of another
        shape or of other layers, with nothing changed.
        """
        from safetensors.torch import load_file

        saved, own = load_file(folder / _WEIGHTS), self._state()
        wrong = sorted(saved.keys() ^ own.keys()) or [n for n in own if own[n].shape != saved[n].shape]
        if wrong:
            raise CheckpointError(
                f"{folder} holds other adapters: {', '.join(wrong[:3])} differ; they were not loaded"
            )
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(saved[name])

    def _state(self) -> dict[str, torch.Tensor]:
        from peft import get_peft_model_state_dict

        state: dict[str, torch.Tensor] = get_peft_model_state_dict(
            self.model, adapter_name=_ADAPTER, save_embedding_layers=False
        )
        return state


def require_peft() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"optim.lora needs peft, which cannot be imported ({error}): pip install 'elastic-decode[train]'"
        ) from error
    return peft


def attach(model: Any, options: LoraOptions, *, run_seed: int, base_name: str) -> Adapters:
    """Wrap `model` in place, freeze it and give each target a new adapter: A at random from `run_seed`,
    B = 0, so that the first step starts from the model itself.

    base_name: what adapter_config.json says the adapters belong to, a hub id or a folder. Raises ConfigError
    for targets that are not there or cannot be adapted, and where peft is not installed.
    """
    peft = require_peft()
    output = model.get_output_embeddings()
    linears = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    head = next(name for name, module in linears.items() if module is output)
    tied = output.weight is model.get_input_embeddings().weight
    chosen = adapted(options, list(linears), head=head, tied=tied)
    # For all of them their last names are enough, and easier to read in adapter_config.json.
    ends = sorted({name.rpartition(".")[2] for name in chosen}) if options.targets == ALL else chosen
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.default_generator.manual_seed(seeds.derive("lora", run_seed))
        # peft 0.21 asks transformers 5.23 by the old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped = peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=options.r,
                lora_alpha=options.alpha,
                lora_dropout=options.dropout,
                target_modules=ends,
                bias="none",
                task_type="CAUSAL_LM",
            ),
            adapter_name=_ADAPTER,
            autocast_adapter_dtype=True,
        )
    wrapped.peft_config[_ADAPTER].base_model_name_or_path = base_name
    return Adapters(wrapped)


def adapted(options: LoraOptions, linears: Sequence[str], *, head: str, tied: bool) -> list[str]:
    """Which of a model's linear modules, by their whole names, get an adapter; head: the output's.

    A target is a module's whole name, or its end from a dot on, as in peft. Raises ConfigError for one that
    is none of them, and for a head that is tied to the embeddings.
    """
    if options.targets == ALL:
        return [name for name in linears if name != head]
    wanted = [options.targets] if isinstance(options.targets, str) else list(options.targets)
    for target in wanted:
        found = [name for name in linears if f".{name}".endswith(f".{target}")]
        if not found:
            there = dict.fromkeys(name.rpartition(".")[2] for name in linears)
            raise ConfigError(
                f"optim.lora.targets: the model has no linear module {target!r}; it has {', '.join(there)}, "
                f"and {ALL!r} means all but {head}"
            )
        if tied and head in found:
            raise ConfigError(
                f"optim.lora.targets: {target!r} is tied to the embeddings, which would not be adapted with "
                "it: checkpoint and engine have one matrix for both; leave it out"
            )
    return [name for name in linears if any(f".{name}".endswith(f".{target}") for target in wanted)]


def export(checkpoint: Path, folder: Path, *, base: Any, tokenizer: Any) -> None:
    """Write the module with the adapters of `checkpoint` merged, as a Hugging Face folder that any stack
    loads: with the weights that the run's engine decodes with, bit for bit.

    base: the module that the adapters were trained on, in the dtype to write; it is used up. Raises
    ConfigError where the folder is not empty.
    """
    peft = require_peft()
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty; give a new folder to export to")
    wrapped = peft.PeftModel.from_pretrained(base, str(checkpoint), adapter_name=_ADAPTER)
    adapters = Adapters(wrapped)
    with torch.no_grad():  # in place: this base is not trained on any further
        for name, tensor in adapters.merged():
            adapters._layers[name].base_layer.weight.copy_(tensor)
    wrapped.unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
