"""What a sweep found: an append-only JSONL file, a record a completion, each once whatever is killed when.

OUT/sweep.json       what decides the records; a sweep goes on only where it is the same
OUT/records.jsonl    a line a completion
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from elastic_decode.errors import ConfigError

RECORDS, SWEEP = "records.jsonl", "sweep.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A graded completion.

    think, solve: the budgets of its cell, None = unlimited. problem: the row in the data; sample: 0..n-1.
    think_tokens, solve_tokens: sampled; forced_tokens: the others. think_end, finish_reason: as in
    Completion. score: None where grading failed, which is not the same as 0. shared: its thinking was decoded
    once for several budgets (or its tokens cut from a longer output).
    """

    policy: str
    think: int | None
    solve: int | None
    problem: int
    sample: int
    seed: int
    think_tokens: int
    solve_tokens: int
    forced_tokens: int
    think_end: str
    finish_reason: str
    score: float | None
    shared: bool
    text: str

    @property
    def key(self) -> tuple[str, int | None, int, int]:
        """What there is one record of."""
        return self.policy, self.think, self.problem, self.sample


class RecordFile:
    """The records of a folder, read once and appended to. A context manager.

    notes: what was found and taken out when it was opened.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Raises ConfigError where the folder holds another sweep's records, or a file that is none."""
        self.folder = folder
        self.notes: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORDS
        whole, cut = _whole_lines(path)
        self.records = [_record(line, path, number) for number, line in enumerate(whole, 1)]
        seen: set[tuple[str, int | None, int, int]] = set()
        for record in self.records:
            if record.key in seen:
                raise ConfigError(f"{path} has the record {record.key} twice; it was not written by a sweep")
            seen.add(record.key)
        self.keys = seen
        self._check(identity)
        if cut:
            self.notes.append(f"{path}: a last line of {cut} bytes, cut off when writing it, was taken out")
            os.truncate(path, path.stat().st_size - cut)
        self._file = path.open("a", encoding="utf-8")

    def _check(self, identity: Mapping[str, Any]) -> None:
        """What records were made under must be the same now. Keys "policy.NAME" are of the records of that
        policy alone: one without records can change, or come later.
        """
        path = self.folder / SWEEP
        wanted = json.loads(json.dumps(identity))
        if self.records and not path.exists():
            raise ConfigError(f"{self.folder} has {RECORDS} and no {SWEEP}; give another folder")
        found = json.loads(path.read_text(encoding="utf-8")) if self.records else {}
        used = {record.policy for record in self.records}
        common = {key for key in {**found, **wanted} if not key.startswith("policy.")} if found else set()
        of_policies = {f"policy.{name}" for name in used} & found.keys() & wanted.keys()
        lines = [
            f"{key}: {found.get(key)!r:.80} there, {wanted.get(key)!r:.80} now"
            for key in sorted(common | of_policies)
            if found.get(key) != wanted.get(key)
        ]
        if lines:
            raise ConfigError(
                f"{self.folder} holds the records of another sweep; give another folder, or undo:\n  "
                + "\n  ".join(lines)
            )
        beside = path.with_name(f".{SWEEP}.writing")
        both = json.dumps({**found, **wanted}, indent=1, ensure_ascii=False)
        beside.write_text(both + "\n", encoding="utf-8")
        beside.replace(path)

    def append(self, records: Iterable[Record]) -> list[Record]:
        """Writes those that are not there yet, in one piece; them."""
        new = [record for record in records if record.key not in self.keys]
        if new:
            self._file.write("".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in new))
            self._file.flush()
            self.records += new
            self.keys.update(record.key for record in new)
        return new

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read(folder: Path) -> Iterator[Record]:
    """The whole records of a folder. Raises ConfigError where there are none."""
    path = folder / RECORDS
    if not path.exists():
        raise ConfigError(f"{folder} has no {RECORDS}: no sweep has written there")
    for number, line in enumerate(_whole_lines(path)[0], 1):
        yield _record(line, path, number)


def _whole_lines(path: Path) -> tuple[list[bytes], int]:
    """Lines that end, and how many bytes of one that does not."""
    data = path.read_bytes() if path.exists() else b""
    end = data.rfind(b"\n") + 1
    return [line for line in data[:end].split(b"\n") if line.strip()], len(data) - end


_FIELDS = {field.name for field in fields(Record)}


def _record(line: bytes, path: Path, number: int) -> Record:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{path}:{number} is not JSON: {error}") from None
    if not isinstance(values, dict) or values.keys() != _FIELDS:
        raise ConfigError(f"{path}:{number} is no record: expected the fields {', '.join(sorted(_FIELDS))}")
    return Record(**values)
