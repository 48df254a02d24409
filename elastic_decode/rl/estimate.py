"""What a run will need, before anything is loaded: parameters, memory, tokens, what is shared, steps.

Sizes of tensors are exact; of activations, a count of what the backward pass keeps, without the allocator's
losses. Everything is of one process that holds the whole model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from elastic_decode.config import ModelConfig, parse_size
from elastic_decode.rl.budget_options import longest
from elastic_decode.rl.config import GRPOConfig, LoraOptions
from elastic_decode.rl.lora import adapted

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
CHUNK = 1024  # positions whose logits exist at a time: the default of rl/update.py


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """parameters, trained: counts. memory: what -> bytes, in the order to show. sharing: of trainer and
    engine, a sentence. longest_sample: prompt and output. Tokens and micro-batches are the most that the
    budgets allow: None where they set no bound, or where a sample may be longer than a micro-batch.
    """

    parameters: int
    trained: int
    memory: dict[str, int]
    sharing: str
    samples: int
    longest_output: int | None
    longest_sample: int
    tokens_a_step: int | None
    microbatches: int | None
    epochs: float | None

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def count_parameters(model: ModelConfig) -> int:
    """Of the whole module, a tied head once."""
    hidden = model.hidden_size
    layer = sum(rows * columns for rows, columns in _linears(model).values()) + 2 * hidden
    layer += model.qkv_rows * model.attention_bias + hidden * model.o_bias
    layer += (2 * model.intermediate_size + hidden) * model.mlp_bias + 2 * model.head_dim * model.qk_norm
    head = 0 if model.tie_embeddings else model.vocab_size * hidden
    return model.num_layers * layer + model.vocab_size * hidden + head + hidden


def _linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """A layer's matrices by Hugging Face's names: (rows, columns)."""
    hidden, inner = model.hidden_size, model.intermediate_size
    attended, kept = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    return {
        "q_proj": (attended, hidden),
        "k_proj": (kept, hidden),
        "v_proj": (kept, hidden),
        "o_proj": (hidden, attended),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def _adapted(lora: LoraOptions, model: ModelConfig) -> list[tuple[int, int]]:
    """(rows, columns) of every matrix that gets an adapter."""
    shapes = {
        f"model.layers.{index}.{'self_attn' if name in _ATTENTION else 'mlp'}.{name}": shape
        for index in range(model.num_layers)
        for name, shape in _linears(model).items()
    }
    shapes["lm_head"] = (model.vocab_size, model.hidden_size)
    return [shapes[name] for name in adapted(lora, list(shapes), head="lm_head", tied=model.tie_embeddings)]


def activations(model: ModelConfig, tokens: int, element: int, *, checkpointing: bool) -> int:
    """Bytes that a micro-batch of `tokens` keeps for its backward pass, and its largest chunk of logits.

    A layer keeps its two norms' inputs and outputs, q, k and v before and after the rotation, attention's
    output, gate, up, their activation and their product; with checkpointing its input, and one layer all.
    """
    hidden, inner = model.hidden_size, model.intermediate_size
    layer = (
        tokens * (6 * hidden + 2 * model.qkv_rows + model.num_heads * model.head_dim + 4 * inner) * element
    )
    kept = tokens * hidden * element * model.num_layers + layer if checkpointing else layer * model.num_layers
    logits = 3 * min(tokens, CHUNK) * model.vocab_size * 4  # logits, their softmax, their gradient
    return kept + logits


def estimate(config: GRPOConfig, model: ModelConfig, rows: int | None) -> Estimate:
    """rows: of the dataset, None where that is not known."""
    count, optim = count_parameters(model), config.optim
    matrices = [] if optim.lora is None else _adapted(optim.lora, model)
    trained = count if optim.lora is None else sum(optim.lora.r * sum(shape) for shape in matrices)
    element = _BYTES[optim.dtype]
    engine_dtype = optim.dtype if config.engine.dtype == "auto" else config.engine.dtype
    shared = engine_dtype == optim.dtype
    memory = {f"weights ({optim.dtype})": count * element}
    if not shared:
        memory[f"the engine's copy ({engine_dtype})"] = count * _BYTES[engine_dtype]
    elif matrices:
        own = sum(rows * columns for rows, columns in matrices)
        memory[f"the engine's merged matrices ({engine_dtype})"] = own * element
    if matrices:
        memory["a matrix while it is merged (float32)"] = 4 * max(rows * cols for rows, cols in matrices)
        memory["adapters (float32)"] = trained * 4
    trained_dtype = "float32" if matrices else optim.dtype
    memory[f"gradients ({trained_dtype})"] = trained * _BYTES[trained_dtype]
    if trained_dtype != "float32":
        memory["their sums over micro-batches (float32)"] = trained * 4
        memory["master weights (float32)"] = trained * 4
    memory["AdamW's moments (float32)"] = trained * 8
    if config.objective.kl and optim.lora is None:
        memory["reference model"] = count * element
    memory["KV pages"] = parse_size(config.engine.kv_memory)
    memory["activations (estimate)"] = activations(
        model, optim.max_tokens_per_microbatch, element, checkpointing=optim.gradient_checkpointing
    )
    if matrices and element < 4 and not optim.gradient_checkpointing:
        inputs = sum(columns for _, columns in matrices)
        memory["the adapters' inputs (float32)"] = 4 * optim.max_tokens_per_microbatch * inputs
    rollout = config.rollout
    if rollout.sleep_in_update:
        kept = ("gradients", "their sums", "activations", "the adapters' inputs")
        update = sum(count for name, count in memory.items() if name.startswith(kept))
        memory["KV pages or the update's, never both"] = -min(memory["KV pages"], update)
    samples = rollout.prompts_per_step * rollout.group_size
    think, solve = longest(rollout.budgets)
    output = None if think is None or solve is None else think + solve
    limit = config.engine.max_model_len or model.max_position_embeddings
    whole = limit
    if output is not None and rollout.max_prompt_tokens is not None:
        whole = min(limit, rollout.max_prompt_tokens + output + 1)  # + a forced close of one token
    return Estimate(
        parameters=count,
        trained=trained,
        memory=memory,
        sharing=_sharing(shared, lora=optim.lora is not None, engine=engine_dtype, trainer=optim.dtype),
        samples=samples,
        longest_output=output,
        longest_sample=whole,
        tokens_a_step=None if output is None else samples * output,
        microbatches=_microbatches(samples, whole, optim.max_tokens_per_microbatch, optim.updates_per_step),
        epochs=None if rows is None else config.run.steps * rollout.prompts_per_step / rows,
    )


def _sharing(shared: bool, *, lora: bool, engine: str, trainer: str) -> str:
    if lora:
        rest = "shares the rest" if shared else f"has a copy of the rest ({engine}, not {trainer})"
        return (
            "the engine has the adapted matrices for itself, into which the adapters are merged after every "
            f"step, and {rest}"
        )
    if shared:
        return f"trainer and engine hold the same storage ({trainer}): nothing is copied after an update"
    return (
        f"the trainer holds {trainer}, the engine {engine}: all weights are cast and copied after every step"
    )


def _microbatches(samples: int, longest_sample: int, most: int, updates: int) -> int | None:
    """At most so many a step: samples of the longest kind, packed; None where one does not fit."""
    if longest_sample > most:
        return None
    return updates * math.ceil(math.ceil(samples / updates) / (most // longest_sample))
