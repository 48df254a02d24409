"""A model's shape, read from its config.json in either form: hub files and transformers 5."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elastic_decode.errors import CheckpointError, UnsupportedModel

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings"),
    *("partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    *("truncate", "low_freq_factor", "high_freq_factor", "finetuned"),
}
_ARCHITECTURES = {
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
}
_FAMILIES = {family: architecture for architecture, family in _ARCHITECTURES.items()}
# What transformers assumes where a file leaves a key out.
_COMMON: dict[str, Any] = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "num_key_value_heads": None,
    "head_dim": None,
    "attention_bias": False,
    "mlp_bias": False,
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary position embedding of one model, with every default filled in.

    type: one of `ROPE_TYPES`. theta: the base. factor: the stretch (1 for default). original_length:
    positions of the unscaled model; the rest is of yarn (attention_factor None: from the factor and the
    mscales) and llama3.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 32768
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.type not in ROPE_TYPES:
            raise UnsupportedModel(
                f"rope type {self.type!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        for name in ("theta", "factor", "original_length"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise CheckpointError(f"rope {name} must be a positive number, got {value!r}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], max_position_embeddings: int) -> RopeConfig:
        """From `rope_scaling` and `rope_theta` (hub files) or `rope_parameters` (transformers 5)."""
        values: dict[str, Any] = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
        kind = values.get("rope_type") or values.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise UnsupportedModel(f"rope type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
        unknown = sorted(set(values) - _ROPE_KEYS)
        if unknown:
            raise UnsupportedModel(f"rope parameter {unknown[0]!r} is not supported: {values}")
        rotated = values.get("partial_rotary_factor", config.get("partial_rotary_factor"))
        if rotated not in (None, 1, 1.0):
            raise UnsupportedModel(f"partial_rotary_factor {rotated} is not supported; only 1 is")
        theta = values.get("rope_theta", config.get("rope_theta"))
        fields: dict[str, Any] = {
            "type": kind,
            "theta": 10000.0 if theta is None else theta,
            "original_length": max_position_embeddings,
        }
        if kind in ("yarn", "llama3"):
            original = config.get(
                "original_max_position_embeddings", values.get("original_max_position_embeddings")
            )
            fields["original_length"] = max_position_embeddings if original is None else original
        if kind != "default":
            fields["factor"] = values.get("factor")
            if fields["factor"] is None and kind == "yarn":
                fields["factor"] = max_position_embeddings / fields["original_length"]
        if kind == "yarn":
            fields.update({k: values.get(k) for k in ("attention_factor", "mscale", "mscale_all_dim")})
            fields.update(
                beta_fast=values.get("beta_fast") or 32.0,
                beta_slow=values.get("beta_slow") or 1.0,
                truncate=bool(values.get("truncate", True)),
            )
        if kind == "llama3":
            fields.update({k: values.get(k) for k in ("low_freq_factor", "high_freq_factor")})
        missing = [
            k for k in ("factor", "low_freq_factor", "high_freq_factor") if k in fields and fields[k] is None
        ]
        if missing:
            raise CheckpointError(
                f"rope type {kind!r} needs {missing[0]!r}, which the configuration does not give"
            )
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one decoder-only model; the families differ in these fields and in nothing else.

    attention_bias: q, k and v have one (o: `o_bias`). qk_norm: RMS norm of each query and key head before the
    rotation. sliding_window: a layer's window (query p sees keys p - w < j <= p) or None, a value a layer.
    dtype: that of the files, None where config.json does not say. architecture: the Hugging Face class name.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope: RopeConfig
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    attention_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: tuple[int | None, ...] = ()
    dtype: str | None = None

    def __post_init__(self) -> None:
        sizes = "vocab_size hidden_size intermediate_size num_layers num_heads num_kv_heads head_dim"
        for name in (*sizes.split(), "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise CheckpointError(f"{name} must be a positive int, got {value!r}")
        if self.num_heads % self.num_kv_heads:
            raise CheckpointError(
                f"num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim must be even, got {self.head_dim}")
        if not self.sliding_window:
            object.__setattr__(self, "sliding_window", (None,) * self.num_layers)
        if len(self.sliding_window) != self.num_layers:
            raise CheckpointError(
                f"sliding_window has {len(self.sliding_window)} entries for {self.num_layers} layers"
            )
        if self.dtype not in (None, "float32", "bfloat16", "float16"):
            raise UnsupportedModel(
                f"dtype {self.dtype!r} is not supported; supported: float32, bfloat16, float16"
            )

    @property
    def qkv_rows(self) -> int:
        """Rows of the fused query, key and value weight."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @classmethod
    def from_hf(cls, source: Any) -> ModelConfig:
        """From a folder with config.json, that file's content as a dict, or a transformers PretrainedConfig.

        Raises UnsupportedModel, naming it, for an architecture or feature that is not covered,
        CheckpointError for a file that is absent, not JSON, or inconsistent.
        """
        if isinstance(source, (str, Path)):
            return cls._from_dict(_read_config(Path(source)))
        if isinstance(source, Mapping):
            return cls._from_dict(source)
        if hasattr(source, "to_dict"):
            return cls._from_dict(source.to_dict())
        raise TypeError(f"expected a folder, a dict or a PretrainedConfig, got {type(source).__name__}")

    @classmethod
    def _from_dict(cls, config: Mapping[str, Any]) -> ModelConfig:
        family = _family(config)
        values = {**_COMMON, **_DEFAULTS[family], **config}
        required = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [name for name in required if values.get(name) is None]
        if missing:
            raise CheckpointError(f"config.json has no {missing[0]!r}")
        for name in required:
            if isinstance(values[name], bool) or not isinstance(values[name], int) or values[name] < 1:
                raise CheckpointError(f"config.json: {name!r} must be a positive int, got {values[name]!r}")
        if values["hidden_act"] != "silu":
            raise UnsupportedModel(f"hidden_act {values['hidden_act']!r} is not supported; only 'silu' is")
        if values.get("quantization_config"):
            method = dict(values["quantization_config"]).get("quant_method", "unknown")
            raise UnsupportedModel(f"quantized checkpoints are not supported (quantization_config: {method})")
        heads, hidden = values["num_attention_heads"], values["hidden_size"]
        kv_heads = heads if values["num_key_value_heads"] is None else values["num_key_value_heads"]
        head_dim = hidden // heads if values["head_dim"] is None else values["head_dim"]
        bias = bool(values["attention_bias"]) and family in ("qwen3", "llama")
        dtype = values.get("dtype") or values.get("torch_dtype")
        return cls(
            architecture=_FAMILIES[family],
            vocab_size=values["vocab_size"],
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=values["max_position_embeddings"],
            rope=RopeConfig.from_hf(values, values["max_position_embeddings"]),
            rms_norm_eps=float(values["rms_norm_eps"]),
            tie_embeddings=bool(values["tie_word_embeddings"]),
            attention_bias=bias or family == "qwen2",
            o_bias=bias,
            mlp_bias=bool(values["mlp_bias"]) and family == "llama",
            qk_norm=family == "qwen3",
            sliding_window=_windows(family, values),
            dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        )


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _family(config: Mapping[str, Any]) -> str:
    supported = ", ".join(_ARCHITECTURES)
    named = config.get("architectures")
    if named:
        if named[0] not in _ARCHITECTURES:
            raise UnsupportedModel(f"architecture {named[0]!r} is not supported; supported: {supported}")
        return _ARCHITECTURES[named[0]]
    if config.get("model_type") not in _FAMILIES:
        raise UnsupportedModel(
            f"model_type {config.get('model_type')!r} is not supported; supported: {supported}"
        )
    return str(config["model_type"])


def _windows(family: str, values: Mapping[str, Any]) -> tuple[int | None, ...]:
    """The sliding window a layer, as the family's transformers code applies it; raises where unclear."""
    layers = values["num_hidden_layers"]
    window, kinds = values.get("sliding_window"), values.get("layer_types")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise CheckpointError(f"sliding_window must be a positive int or null, got {window!r}")
    if kinds is not None:
        strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if strange:
            raise UnsupportedModel(f"layer type {strange[0]!r} is not supported")
        if len(kinds) != layers:
            raise CheckpointError(f"layer_types has {len(kinds)} entries for {layers} layers")
    sliding = [kind == "sliding_attention" for kind in kinds] if kinds is not None else None
    if family == "llama":
        if window is not None or (sliding and any(sliding)):
            raise UnsupportedModel("sliding_window of a Llama model is not supported")
        return (None,) * layers
    if family == "mistral":
        if sliding is not None and (any(sliding) != all(sliding) or any(sliding) != (window is not None)):
            raise UnsupportedModel(
                "layer_types that differ from sliding_window are not supported for Mistral"
            )
        return (window,) * layers
    if not values.get("use_sliding_window", False):
        if sliding and any(sliding):
            raise UnsupportedModel("layer_types has 'sliding_attention' but use_sliding_window is false")
        return (None,) * layers
    window = values.get("sliding_window", 4096)
    if sliding is None:
        first = values.get("max_window_layers", 28)
        sliding = [index >= first for index in range(layers)]
    if window is None and any(sliding):
        raise UnsupportedModel("layer_types has 'sliding_attention' but sliding_window is null")
    return tuple(window if slides else None for slides in sliding)
