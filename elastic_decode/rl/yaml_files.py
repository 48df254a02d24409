"""YAML in and out for configurations: what YAML 1.1 gets wrong is put right or refused."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic_decode.errors import ConfigError


@functools.cache
def _yaml() -> tuple[Any, Any]:
    """The module, and a safe loader that reads 1e-6 as a number and refuses a key that comes twice."""
    try:
        import yaml
    except ImportError as error:
        raise ConfigError(
            "configuration files need PyYAML: pip install 'elastic-decode[train]', or pip install pyyaml"
        ) from error

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {twice!r} comes twice", node.start_mark
                )
            return dict(super().construct_mapping(node, deep=deep))

    # PyYAML asks for a point and a sign: it takes 1e-6 for a string.
    number = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return yaml, Loader


def parse(text: str, source: str) -> Any:
    """Raises ConfigError, naming the source, where the text is not YAML."""
    yaml, loader = _yaml()
    try:
        return yaml.load(text, Loader=loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from None


def dump(values: Mapping[str, Any]) -> str:
    yaml, _ = _yaml()
    text: str = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=100)
    return text


def load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    values = parse(text, str(path))
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of keys, got {type(values).__name__}")
    return values


def override(values: dict[str, Any], text: str) -> None:
    """Sets `a.b=value` in nested mappings and lists; what is between is made where it is missing or null."""
    path, equals, written = text.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"{text!r} is not of the form key.key=value, like optim.lr=1e-5")
    if not written.strip():
        raise ConfigError(f"{text!r} has no value; null is written out, and an empty string is \"''\"")
    value = parse(written, repr(text))
    place: Any = values
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(place, list):
            if not key.isdigit() or int(key) >= len(place):
                where = ".".join(keys[:depth])
                raise ConfigError(
                    f"{text!r}: {where} is a list of {len(place)}, and {key!r} is none of its places"
                )
            index: Any = int(key)
        elif isinstance(place, dict):
            index = key
        else:
            raise ConfigError(f"{text!r}: {'.'.join(keys[:depth])} is {place!r}: it has no keys")
        if last:
            place[index] = value
        else:
            if isinstance(place, dict) and place.get(index) is None:
                place[index] = {}
            place = place[index]
