"""Sizes of decoders to measure with; weights are random, so speed is real and text is not."""

from __future__ import annotations

from typing import Any

from elastic_decode.model_config import ModelConfig

# Keyword arguments of transformers' Qwen2Config.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
        "vocab_size": 2048,
        "tie_word_embeddings": False,
    },
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1024,
        "vocab_size": 4096,
        "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "1.5B": {  # DeepSeek-R1-Distill-Qwen-1.5B
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}

# Query heads / key-value heads a query head, by how many query heads share one: as in models in use.
HEADS: dict[int, tuple[int, int]] = {1: (12, 12), 4: (32, 8), 6: (12, 2), 8: (16, 2)}


def hf_config(name: str, max_positions: int = 4096) -> dict[str, Any]:
    """What the shape's config.json holds."""
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "max_position_embeddings": max_positions,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **SHAPES[name],
    }


def config(name: str, max_positions: int = 4096) -> ModelConfig:
    return ModelConfig.from_hf(hf_config(name, max_positions))
