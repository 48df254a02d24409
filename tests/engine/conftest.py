"""A scripted model under the real engine: every law can be put to the test with tokens chosen by hand.

The stand-in for the decoder keeps each token's id in the first element of its key, so a row's whole history
is read back through its page table: a wrong page, position or slot shows as a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import elastic_decode.engine.build as engine_build
from elastic_decode import Engine, EngineConfig, ModelConfig
from elastic_decode.delimiters import Delimiters, resolve
from elastic_decode.models.decoder import ForwardBatch

EOS, OPEN, CLOSE = 256, 257, 258
VOCAB = 259

Script = Callable[[list[int]], "int | torch.Tensor"]


def make_byte_tokenizer(*, close_as_text: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, ids 0-255 in byte order, then EOS, <think>, </think> (unless the close is plain
    text).
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocab = {character: byte for byte, character in bytes_to_unicode().items()}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    if not close_as_text:
        tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


class ScriptedDecoder:
    """Has the interface of models.decoder.Decoder; its logits are what `script(history)` says: a token id or
    a row of logits.
    """

    def __init__(self, config: ModelConfig, script: Script) -> None:
        self.config = config
        self.script = script
        self.prefill_tokens = 0
        self.steps = 0

    def forward(
        self,
        input_ids: torch.Tensor,
        batch: ForwardBatch,
        kv_pages: Sequence[tuple[torch.Tensor, torch.Tensor]],
        *,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        keys = kv_pages[0][0]
        page_size = keys.shape[1]
        flat = keys.view(-1, *keys.shape[2:])
        for token, slot in zip(input_ids.tolist(), batch.slot_mapping.tolist(), strict=True):
            if slot >= 0:
                flat[slot, 0, 0] = token
        self.steps += 1
        self.prefill_tokens += len(input_ids)
        hidden = torch.full((len(input_ids), 4096), -1.0)
        starts = batch.query_start.tolist()
        for row, length in enumerate(batch.seq_lens.tolist()):
            first, last = starts[row], starts[row + 1]
            pages = batch.page_table[row].tolist()
            history = [int(keys[pages[p // page_size], p % page_size, 0, 0]) for p in range(length)]
            for offset, index in enumerate(range(first, last)):
                seen = history[: length - (last - first) + offset + 1] if length else []
                hidden[index, : len(seen)] = torch.tensor(seen, dtype=torch.float32)
        return hidden if rows is None else hidden[rows.long()]

    def logits(self, hidden: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        logits = out.zero_()
        for row, values in enumerate(hidden.tolist()):
            history = [int(value) for value in values if value >= 0]
            if not history:
                continue
            said = self.script(history)
            if isinstance(said, torch.Tensor):
                logits[row] = said
            else:
                logits[row, said] = 20.0
        return logits


@dataclass
class Scripted:
    engine: Engine
    decoder: ScriptedDecoder


def at_position(prompt_len: int, tokens: Sequence[int], then: int = ord(".")) -> Script:
    """Says tokens[i] at output position i, whatever was sampled or forced before, then `then` for ever."""

    def script(history: list[int]) -> int:
        index = len(history) - prompt_len
        return tokens[index] if index < len(tokens) else then

    return script


def shape(vocab_size: int = VOCAB, max_positions: int = 4096) -> ModelConfig:
    return ModelConfig.from_hf(
        {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": vocab_size,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "max_position_embeddings": max_positions,
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
    )


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Scripted]:
    """`scripted(script, tokenizer=…, **EngineConfig)` -> an engine that decodes by the script."""

    def make(
        script: Script,
        *,
        tokenizer: Any = None,
        delimiters: Delimiters | None = None,
        vocab_size: int = VOCAB,
        prefix_cache: bool = True,
        **options: Any,
    ) -> Scripted:
        model = shape(vocab_size)
        decoder = ScriptedDecoder(model, script)
        monkeypatch.setattr(engine_build, "Decoder", lambda *args, **kwargs: decoder)
        tokenizer = tokenizer or make_byte_tokenizer()
        options = {"page_size": 4, "kv_memory": "1MiB", "max_batch": 8, "max_model_len": 512, **options}
        engine = Engine(
            model,
            SimpleNamespace(dtype=torch.float32),  # type: ignore[arg-type]
            tokenizer,
            delimiters or resolve(tokenizer),
            EngineConfig(dtype="float32", **options),
            prefix_cache=prefix_cache,
        )
        return Scripted(engine, decoder)

    return make


@pytest.fixture
def byte_tokenizer() -> PreTrainedTokenizerFast:
    return make_byte_tokenizer()
