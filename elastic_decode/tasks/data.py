"""Rows of prompts from files, the hub or memory, in TRL's conventions: `prompt`, and columns for graders.

`prompt` is a string or a chat (a list of {"role", "content"}); every other column is passed through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from elastic_decode.core import Prompt
from elastic_decode.errors import ConfigError
from elastic_decode.tasks import countdown
from elastic_decode.tasks.l1 import Wish

FILES = (".jsonl", ".json", ".parquet")
TARGET = "target_tokens"  # the column of the number of tokens that a prompt asks for


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a dataset: its place there, its prompt, and its other columns."""

    index: int
    prompt: Prompt
    columns: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Where the prompts come from.

    source: "countdown" (bundled), a .jsonl, .json or .parquet file (all of it: a file has no splits), or the
    id of a Hugging Face dataset, of which `name` is the configuration and `revision` the version. columns:
    the name a reward function knows -> the name found in the data; the prompt is `prompt`. prefix, suffix:
    put around prompts that are strings. chat: these become a user's message for the chat template, behind
    `system` if there is one. duplicates: what to do with rows that are equal in everything. limit: only the
    first so many rows. shuffle: another order each epoch, by run.seed. wish: a number of tokens that each
    prompt asks for (see tasks/l1.py), for the rewards l1_exact and l1_max.
    """

    source: str
    split: str = "train"
    name: str | None = None
    revision: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    suffix: str = ""
    chat: bool = False
    system: str | None = None
    duplicates: Literal["error", "keep", "drop"] = "error"
    limit: int | None = None
    shuffle: bool = True
    wish: Wish | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise ConfigError(f"data.source must be a name, got {self.source!r}")
        if self.limit is not None and self.limit < 1:
            raise ConfigError(f"data.limit must be >= 1 or null, got {self.limit!r}")
        if self.system is not None and not self.chat:
            raise ConfigError(f"data.system must be null unless data.chat is true, got {self.system!r}")
        in_a_file = Path(self.source).suffix in FILES
        if in_a_file or self.source == "countdown":
            for name in ("name", "revision"):
                if (value := getattr(self, name)) is not None:
                    raise ConfigError(
                        f"data.{name} is for a dataset of the hub, which {self.source} is not: {value!r}"
                    )
        if in_a_file and self.split != "train":
            raise ConfigError(
                f"data.split: the file {self.source} has no splits, so not {self.split!r}: leave it out (or "
                "say train), and give each split a file"
            )


def load_rows(options: DataOptions) -> list[Row]:
    """What the options name. Raises ConfigError for what is missing, empty or of a wrong type."""
    return rows_from(_read(options), options)


def rows_from(records: Sequence[Mapping[str, Any]], options: DataOptions) -> list[Row]:
    """The same of records that are in memory (a list of dicts, a `datasets.Dataset`)."""
    source = options.source
    if len(records) == 0:
        raise ConfigError(f"{source} (split {options.split}) has no rows")
    count = len(records) if options.limit is None else min(options.limit, len(records))
    rows: list[Row] = []
    seen: dict[str, int] = {}
    repeated: list[tuple[int, int]] = []
    names: list[str] | None = None
    for index in range(count):
        record = records[index]
        where = f"{source}, row {index}"
        if not isinstance(record, Mapping):
            raise ConfigError(f"{where}: expected an object with a prompt, got {type(record).__name__}")
        renamed = _renamed(record, options.columns, where)
        names = list(renamed) if names is None else names
        if renamed.keys() != set(names):
            odd = sorted(renamed.keys() ^ set(names), key=str)
            raise ConfigError(f"{where}: column {odd[0]!r} is in some rows and not in others")
        prompt = _prompt(renamed.pop("prompt"), options, where)
        key = json.dumps([prompt, renamed], sort_keys=True, default=repr)
        if key in seen:
            repeated.append((seen[key], index))
            if options.duplicates == "drop":
                continue
        seen.setdefault(key, index)
        if options.wish is not None:
            if TARGET in renamed:
                raise ConfigError(f"{where}: data.wish makes a column {TARGET!r}, and there is one already")
            renamed[TARGET] = options.wish.of(index)
            prompt = options.wish.said(prompt, renamed[TARGET])
        rows.append(Row(len(rows), prompt, renamed))
    if repeated and options.duplicates == "error":
        first, second = repeated[0]
        raise ConfigError(
            f"{source}: {len(repeated)} of {count} rows repeat another one in everything (row {second} is "
            f"row {first}); say data.duplicates: drop, or keep"
        )
    return rows


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str], where: str) -> dict[str, Any]:
    wanted = {"prompt": "prompt", **columns}
    for name, found in wanted.items():
        if found not in record:
            hint = f"data.columns.{name} says which one it is"
            there = ", ".join(map(str, record)) or "none"
            raise ConfigError(f"{where} has no column {found!r} ({hint}); there are: {there}")
    sources = set(wanted.values())
    taken = {name: record[found] for name, found in wanted.items()}
    rest = {name: value for name, value in record.items() if name not in sources}
    clash = sorted(taken.keys() & rest.keys())
    if clash:
        raise ConfigError(f"{where}: data.columns makes a column {clash[0]!r}, and there is one already")
    return {**taken, **rest}


def _prompt(prompt: Any, options: DataOptions, where: str) -> Prompt:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ConfigError(f"{where}: the prompt is empty")
        text = f"{options.prefix}{prompt}{options.suffix}"
        if not options.chat:
            return text
        system = [] if options.system is None else [{"role": "system", "content": options.system}]
        return [*system, {"role": "user", "content": text}]
    if not isinstance(prompt, Sequence) or not prompt:
        raise ConfigError(f"{where}: a prompt is a string or a chat, got {prompt!r:.80}")
    for message in prompt:
        good = isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message
        if not good:
            raise ConfigError(f"{where}: a chat's messages have 'role' and 'content', got {message!r:.80}")
        if message["content"] is None and message["role"] != "assistant":  # which may only call a tool
            raise ConfigError(f"{where}: the content of a {message['role']}'s message is None")
    if options.prefix or options.suffix or options.chat:
        raise ConfigError(f"{where} is a chat: data.prefix, suffix and chat are for prompts that are strings")
    return [dict(message) for message in prompt]


def _read(options: DataOptions) -> Sequence[Mapping[str, Any]]:
    source, path = options.source, Path(options.source).expanduser()
    if source == "countdown":
        return _countdown(options.split)
    if path.suffix in FILES:
        if not path.is_file():
            raise ConfigError(f"data.source: there is no file {path}")
        readers = {".jsonl": _jsonl, ".json": _json, ".parquet": _parquet}
        return readers[path.suffix](path)
    if path.exists() or source.startswith((".", "/", "~", os.sep)):
        raise ConfigError(f"data.source: {path} must be a file that ends in {', '.join(FILES)}")
    return _hub(options)


def _countdown(split: str) -> list[dict[str, Any]]:
    if split not in ("train", "test"):
        raise ConfigError(f"data.split of countdown must be train or test, got {split!r}")
    return [
        {"prompt": p.chat, "x": p.x, "y": p.y, "z": p.z, "target": p.target}
        for p in countdown.problems(split)
    ]


def _jsonl(path: Path) -> list[Any]:
    records = []
    # Only \n ends a record: JSON strings may hold U+2028.
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise ConfigError(f"{path}:{number}: not JSON: {error}") from None
    return records


def _json(path: Path) -> list[Any]:
    try:
        records = json.loads(_text(path))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise ConfigError(f"{path} must hold a list of objects, got {type(records).__name__}")
    return records


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def _parquet(path: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ConfigError(f"{path}: parquet files need pyarrow: pip install pyarrow") from error
    records: list[dict[str, Any]] = parquet.read_table(path).to_pylist()
    return records


def _hub(options: DataOptions) -> Sequence[Mapping[str, Any]]:
    source = options.source
    try:
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"data.source {source!r} is no file, so the id of a Hugging Face dataset, and that needs the "
            "package datasets: pip install datasets"
        ) from error
    try:
        found = datasets.load_dataset(source, options.name, split=options.split, revision=options.revision)
    except Exception as error:  # datasets has a way to fail for every file format and hub state
        raise ConfigError(f"the dataset {source!r}, split {options.split!r}: {error}") from error
    return found
