"""The fused tensors a decoder reads, and which checkpoint tensors are the rows of each."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from elastic_decode.model_config import ModelConfig

EMBED = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"


@dataclass(slots=True)
class LayerWeights:
    """One layer. Matrices are [out, in] as in `nn.Linear`; q, k, v rows are fused, so are gate and up."""

    input_norm: torch.Tensor
    qkv: torch.Tensor
    o: torch.Tensor
    post_norm: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    qkv_bias: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_norm: torch.Tensor | None = None
    o_bias: torch.Tensor | None = None
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None


@dataclass(slots=True)
class Weights:
    """A model's tensors, of one dtype on one device; `lm_head` [V, H] is `embed` where they are tied."""

    embed: torch.Tensor
    lm_head: torch.Tensor
    final_norm: torch.Tensor
    layers: list[LayerWeights]

    @property
    def dtype(self) -> torch.dtype:
        return self.embed.dtype

    @property
    def device(self) -> torch.device:
        return self.embed.device


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """As `torch.empty`; on a Linux CPU the memory of large tensors asks for huge pages.

    Every decoded token reads all weights once, and address translation takes a share of that: matrices at
    batch 1 were read 4 to 10 % faster from huge pages (two cores of a virtual machine, bfloat16).
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or size < 4 << 20 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel built without them; ordinary pages then
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Fused(NamedTuple):
    """One tensor of the decoder: its field, shape, and the checkpoint tensors that are its rows, in order."""

    field: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]

    def views(self, buffer: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Each checkpoint name with its rows of `buffer`."""
        start = 0
        for name, rows in self.parts:
            yield name, buffer[start : start + rows]
            start += rows


def layer_layout(config: ModelConfig, index: int) -> list[Fused]:
    """The tensors of layer `index`."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    attention, mlp = f"model.layers.{index}.self_attn.", f"model.layers.{index}.mlp."

    def single(field: str, name: str, *shape: int) -> Fused:
        return Fused(field, shape, ((name, shape[0]),))

    def qkv(kind: str) -> tuple[tuple[str, int], ...]:
        return tuple(
            (f"{attention}{part}_proj.{kind}", rows) for part, rows in (("q", q), ("k", kv), ("v", kv))
        )

    def gate_up(kind: str) -> tuple[tuple[str, int], ...]:
        return ((f"{mlp}gate_proj.{kind}", inner), (f"{mlp}up_proj.{kind}", inner))

    tensors = [
        single("input_norm", f"model.layers.{index}.input_layernorm.weight", hidden),
        Fused("qkv", (config.qkv_rows, hidden), qkv("weight")),
        single("o", f"{attention}o_proj.weight", hidden, q),
        single("post_norm", f"model.layers.{index}.post_attention_layernorm.weight", hidden),
        Fused("gate_up", (2 * inner, hidden), gate_up("weight")),
        single("down", f"{mlp}down_proj.weight", hidden, inner),
    ]
    if config.attention_bias:
        tensors.append(Fused("qkv_bias", (config.qkv_rows,), qkv("bias")))
    if config.qk_norm:
        tensors.append(single("q_norm", f"{attention}q_norm.weight", config.head_dim))
        tensors.append(single("k_norm", f"{attention}k_norm.weight", config.head_dim))
    if config.o_bias:
        tensors.append(single("o_bias", f"{attention}o_proj.bias", hidden))
    if config.mlp_bias:
        tensors.append(Fused("gate_up_bias", (2 * inner,), gate_up("bias")))
        tensors.append(single("down_bias", f"{mlp}down_proj.bias", hidden))
    return tensors


def outer_layout(config: ModelConfig) -> list[Fused]:
    """The tensors outside the layers; `lm_head` only where it is a tensor of its own."""
    table = (config.vocab_size, config.hidden_size)
    tensors = [
        Fused("embed", table, ((EMBED, config.vocab_size),)),
        Fused("final_norm", table[1:], (("model.norm.weight", config.hidden_size),)),
    ]
    if not config.tie_embeddings:
        tensors.append(Fused("lm_head", table, ((LM_HEAD, config.vocab_size),)))
    return tensors


def assemble(outer: dict[str, torch.Tensor], layers: list[dict[str, torch.Tensor]]) -> Weights:
    """Weights from tensors by field; without `lm_head` it is tied to `embed`."""
    return Weights(
        embed=outer["embed"],
        lm_head=outer.get("lm_head", outer["embed"]),
        final_norm=outer["final_norm"],
        layers=[LayerWeights(**fields) for fields in layers],
    )


def named_tensors(weights: Weights, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Each checkpoint tensor as rows of `weights`; a tied head is the embeddings."""
    found: dict[str, torch.Tensor] = {}
    for t in outer_layout(config):
        found.update(t.views(getattr(weights, t.field)))
    for index, layer in enumerate(weights.layers):
        for t in layer_layout(config, index):
            found.update(t.views(getattr(layer, t.field)))
    found.setdefault(LM_HEAD, weights.lm_head)
    return found
