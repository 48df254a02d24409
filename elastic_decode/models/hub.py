"""A model's local folder, from a folder or a Hugging Face hub id."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

from elastic_decode.errors import CheckpointError

# Only the top folder: other formats of the same weights lie below it. Never code, never pickles.
_ALLOW = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "model*.safetensors"]
_IGNORE = ["*/*"]


def resolve(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder `name`, or the local snapshot of the hub repository `name` ("owner/model") at `revision`.

    Downloads config, tokenizer and safetensors files only, and nothing that is cached already. Raises
    CheckpointError where there is no such folder or repository, access is refused, it is not cached and the
    hub cannot be reached, or a folder is asked for a revision.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{path} is a folder, which has no revision {revision!r}; leave it out, or give a hub id"
            )
        return path
    if path.exists():
        raise CheckpointError(
            f"{path} is a file; give the folder that holds config.json and model.safetensors"
        )
    if not isinstance(name, str) or name.startswith((".", "/", "~", os.sep)) or name.count("/") > 1:
        raise CheckpointError(
            f"{path} does not exist; give a folder with config.json, or a hub id like 'owner/model'"
        )
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=_ALLOW, ignore_patterns=_IGNORE)
    except HFValidationError as error:
        raise CheckpointError(f"{name!r} is neither a folder nor a hub id: {error}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name!r} is no folder and not in the Hugging Face cache, and the hub cannot be reached: {error}"
        ) from error
    except (HTTPError, OSError) as error:  # HTTPError: of the transport, the hub's own errors among them
        raise CheckpointError(f"cannot get {name!r} from the Hugging Face hub: {error}") from error
    return Path(folder)


def generation_config(folder: Path) -> dict[str, Any] | None:
    """generation_config.json, for its EOS ids: its sampling defaults are not applied. None where there is
    none.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


def tokenizer(folder: Path) -> Any:
    """The tokenizer at `folder`. Raises CheckpointError where it is missing or cannot be read."""
    from transformers import AutoTokenizer  # slow to import, and a live module comes with its own

    known = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "tokenizer_config.json")
    if not any((folder / name).is_file() for name in known):
        raise CheckpointError(f"{folder} has no tokenizer: none of {', '.join(known)} is there")
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # every tokenizer class has its own ways to fail on a broken file
        raise CheckpointError(f"the tokenizer in {folder} cannot be read: {error}") from error
