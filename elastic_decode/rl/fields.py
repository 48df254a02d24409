"""Mappings (of a YAML file, say) into frozen dataclasses and back: every key known, every type right.

A mistake raises ConfigError with the key's path, what was found, what was expected, and for an unknown key
the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from elastic_decode.errors import ConfigError

T = TypeVar("T")


def build(kind: type[T], values: Any, path: str = "") -> T:
    """The dataclass `kind` from a mapping of its fields; nested dataclasses from nested mappings."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping of keys, got {values!r}")
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(values, fields, path)
    hints = get_type_hints(kind)
    made = {name: _convert(value, hints[name], join(path, name)) for name, value in values.items()}
    required = [name for name, field in fields.items() if name not in made and _is_required(field)]
    if required:
        raise ConfigError(f"{join(path, required[0])} is missing: it has no default")
    try:
        return kind(**made)
    except ConfigError as error:
        raise ConfigError(
            str(error) if not path or f"{path}." in str(error) else f"{path}: {error}"
        ) from None


def check_keys(values: Mapping[str, Any], known: Iterable[str], path: str) -> None:
    """Raises ConfigError for the first key that is not one of `known`."""
    known = list(known)
    for key in values:
        if key in known:
            continue
        near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
        hint = f"did you mean {join(path, near[0])!r}?" if near else f"known here: {', '.join(known)}"
        raise ConfigError(f"unknown key {join(path, str(key))!r}; {hint}")


def require(ok: bool, path: str, expected: str, value: object) -> None:
    """Raises ConfigError unless ok."""
    if not ok:
        raise ConfigError(f"{path} must be {expected}, got {value!r}")


def positive(path: str, config: Any, *names: str) -> None:
    """Raises ConfigError unless these fields of `config`, which is at `path`, are >= 1."""
    for name in names:
        value = getattr(config, name)
        require(value >= 1, f"{path}.{name}", ">= 1", value)


def plain(value: Any) -> Any:
    """The dataclass, and all in it, as dicts, lists, strings, numbers, booleans and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def flat(values: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings as one of dotted paths. Lists stay whole."""
    if not isinstance(values, Mapping) or not values:
        return {path: values}
    return {
        key: leaf for name, item in values.items() for key, leaf in flat(item, join(path, str(name))).items()
    }


def join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(value: Any, kind: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _one_of(value, kind, arguments, path)
    if origin is Literal:
        if value in arguments and not isinstance(value, bool):
            return value
    elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return value if isinstance(value, kind) else build(kind, value, path)
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif origin in (tuple, Sequence):
        if isinstance(value, (list, tuple)):
            return tuple(_convert(item, arguments[0], f"{path}.{i}") for i, item in enumerate(value))
    elif origin is Mapping:
        if isinstance(value, Mapping):
            key_kind, item_kind = arguments
            return {
                _convert(key, key_kind, path): _convert(item, item_kind, f"{path}.{key}")
                for key, item in value.items()
            }
    elif isinstance(value, kind):
        return value
    raise ConfigError(f"{path} must be {_said(kind)}, got {value!r}{_remark(value, kind)}")


def _one_of(value: Any, kind: Any, arguments: tuple[Any, ...], path: str) -> Any:
    if value is None and type(None) in arguments:
        return None
    # A mapping or list can only be meant as the one member that is one: its own error says more.
    structured = [
        a for a in arguments if dataclasses.is_dataclass(a) or get_origin(a) in (tuple, Sequence, Mapping)
    ]
    if len(structured) == 1 and isinstance(value, (Mapping, list, tuple)):
        return _convert(value, structured[0], path)
    for argument in arguments:
        if argument is type(None):
            continue
        try:
            return _convert(value, argument, path)
        except ConfigError:
            continue
    raise ConfigError(f"{path} must be {_said(kind)}, got {value!r}{_remark(value, kind)}")


def _said(kind: Any) -> str:
    """A type in the words of a configuration file."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_said(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin in (tuple, Sequence):
        return f"a list (each {_said(arguments[0])})"
    if origin is Mapping or dataclasses.is_dataclass(kind):
        return "a mapping"
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return "null" if kind is type(None) else names.get(kind, getattr(kind, "__name__", str(kind)))


def _remark(value: Any, kind: Any) -> str:
    if isinstance(value, bool) and kind is not bool and "string" in _said(kind):
        return " (YAML reads on, off, yes and no as true and false: put it in quotes)"
    if isinstance(value, str) and re.fullmatch(r"[-+.\deE_]+", value) and "number" in _said(kind):
        return " (a string: leave the quotes out)"
    return ""
