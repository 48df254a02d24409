"""Safetensors checkpoints, single or sharded, into the decoder's fused tensors. Nothing is ever unpickled."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from elastic_decode.errors import CheckpointError, ConfigError, UnsupportedModel
from elastic_decode.model_config import ModelConfig
from elastic_decode.models.layout import (
    EMBED,
    LM_HEAD,
    LayerWeights,
    Weights,
    assemble,
    empty,
    layer_layout,
    outer_layout,
)
from elastic_decode.models.sharing import SharedWeights, share_module

__all__ = [
    "LayerWeights",
    "SharedWeights",
    "Weights",
    "checkpoint_files",
    "choose_dtype",
    "load_checkpoint",
    "share_module",
    "stored_dtype",
]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Buffers that old transformers versions saved; they are computed from the configuration.
_COMPUTED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def choose_dtype(requested: str, stored: str | None, device: torch.device | str) -> torch.dtype:
    """The dtype that `EngineConfig.dtype` or `kv_dtype` = `requested` means for a checkpoint or module of
    dtype `stored`.

    "auto" takes the stored one (None: float32), but bfloat16 for float16 on the CPU, which has no kernels for
    it. Raises ConfigError where float16 is requested on the CPU.
    """
    name = (stored or "float32") if requested == "auto" else requested
    on_cpu = torch.device(device).type == "cpu"
    if name == "float16" and on_cpu:
        if requested == "float16":
            raise ConfigError("dtype 'float16' is not supported on the CPU; use 'bfloat16' or 'float32'")
        name = "bfloat16"
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    return {str(dtype).removeprefix("torch."): dtype for dtype in dtypes}[name]


def stored_dtype(folder: str | Path) -> str:
    """The dtype of the embeddings in the files at `folder`, for a config.json that names none."""
    path = checkpoint_files(folder).get(EMBED)
    if path is None:
        raise CheckpointError(f"{folder} lacks tensor {EMBED!r}")
    with _open(path) as file:
        kind = file.get_slice(EMBED).get_dtype()
    if kind not in _DTYPES:
        raise UnsupportedModel(
            f"tensor {EMBED!r} in {path} has dtype {kind}; supported: {', '.join(_DTYPES)}"
        )
    return str(_DTYPES[kind]).removeprefix("torch.")


def checkpoint_files(folder: str | Path) -> dict[str, Path]:
    """The file of each tensor of the checkpoint at `folder`: `model.safetensors`, or the shards of its index.

    Raises CheckpointError where there is no such file, a shard is absent, or index and shards disagree.
    """
    folder = Path(folder)
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if not index.is_file():
        raise CheckpointError(_no_safetensors(folder))
    listed = _read_index(index)
    held: dict[str, Path] = {}
    for path in sorted(set(listed.values())):
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; {index.name} lists it")
        for name in _names(path):
            if name in held:
                raise CheckpointError(
                    f"tensor {name!r} is in both {held[name].name} and {path.name} of {folder}"
                )
            held[name] = path
    for name, path in listed.items():
        if held.get(name) != path:
            raise CheckpointError(f"{index} places tensor {name!r} in {path.name}, which does not hold it")
    return held


def load_checkpoint(
    folder: str | Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Weights:
    """The checkpoint at `folder` (float32, bfloat16 or float16 safetensors) as `dtype` on `device`.

    Files are memory-mapped and copied tensor by tensor into the fused buffers, so the peak is about one copy.
    Raises CheckpointError naming the tensor or file that is missing, surplus, misshapen, truncated or
    unreadable.
    """
    files = checkpoint_files(folder)
    layouts = [outer_layout(config), *(layer_layout(config, index) for index in range(config.num_layers))]
    shapes = {name: (rows, *t.shape[1:]) for layout in layouts for t in layout for name, rows in t.parts}
    tied_head = config.tie_embeddings and LM_HEAD in files
    if tied_head:
        shapes[LM_HEAD] = shapes[EMBED]
    _check_names(folder, set(files), set(shapes))
    _check_shapes(files, shapes)

    targets: dict[str, torch.Tensor] = {}
    groups: list[dict[str, torch.Tensor]] = []
    for layout in layouts:
        fields = {t.field: empty(t.shape, dtype, device) for t in layout}
        for t in layout:
            targets.update(t.views(fields[t.field]))
        groups.append(fields)
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name, target in targets.items():
                if files[name] == path:
                    target.copy_(_tensor(file, path, name))
    if tied_head and not _same(files, EMBED, LM_HEAD):
        raise CheckpointError(f"{folder}: tie_word_embeddings is true, but {LM_HEAD} differs from {EMBED}")
    return assemble(groups[0], groups[1:])


def _check_names(folder: str | Path, found: set[str], expected: set[str]) -> None:
    missing = sorted(expected - found)
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder} lacks tensor {missing[0]!r}{more}, which its config.json calls for")
    surplus = sorted(name for name in found - expected if not _COMPUTED.fullmatch(name))
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise CheckpointError(
            f"{folder} holds tensor {surplus[0]!r}{more}, for which its config.json has no place"
        )


def _check_shapes(files: dict[str, Path], shapes: dict[str, tuple[int, ...]]) -> None:
    for path in sorted(set(files.values())):
        with _open(path) as file:
            for name, shape in shapes.items():
                if files[name] != path:
                    continue
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != shape:
                    found = tuple(stored.get_shape())
                    raise CheckpointError(
                        f"tensor {name!r} in {path} has shape {found}, config.json calls for {shape}"
                    )
                if stored.get_dtype() not in _DTYPES:
                    kind, known = stored.get_dtype(), ", ".join(_DTYPES)
                    raise UnsupportedModel(f"tensor {name!r} in {path} has dtype {kind}; supported: {known}")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _tensor(file: safe_open, path: Path, name: str) -> torch.Tensor:
    try:
        return file.get_tensor(name)
    except SafetensorError as error:
        raise CheckpointError(f"cannot read tensor {name!r} from {path}: {error}") from error


def _same(files: dict[str, Path], first: str, second: str) -> bool:
    with _open(files[first]) as one, _open(files[second]) as other:
        return torch.equal(_tensor(one, files[first], first), _tensor(other, files[second], second))


def _read_index(index: Path) -> dict[str, Path]:
    """Tensor name -> shard path; shards lie beside the index."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in listed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{index} is corrupt: expected JSON with a 'weight_map' object ({error!r})"
        ) from error
    for name, shard in shards.items():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index} places tensor {name!r} in {shard!r}, which is not a safetensors file beside it"
            )
    if not shards:
        raise CheckpointError(f"{index} is corrupt: its 'weight_map' is empty")
    return {name: index.parent / shard for name, shard in shards.items()}


def _no_safetensors(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder} is not a folder"
    message = f"{folder} has neither model.safetensors nor model.safetensors.index.json"
    pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in folder.glob(pattern))
    if pickled:
        message += (
            f", only {pickled[0]}. Pickled weights can run code and are never loaded. To convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder) writes safetensors"
        )
    return message
