"""A dataset of prompts and its order: rows as tasks/data.py reads them, in a permutation by (seed, epoch).

Where a run stands in it is one int, so that resuming it skips nothing and repeats nothing.
"""

from __future__ import annotations

import functools
import json
import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from elastic_decode.errors import ConfigError
from elastic_decode.tasks.data import DataOptions, Row, load_rows, rows_from


class Dataset:
    """Rows, and an order of them for ever."""

    def __init__(self, rows: Sequence[Row], *, seed: int = 0, shuffle: bool = True) -> None:
        if not rows:
            raise ConfigError("the dataset has no rows")
        self.rows = tuple(rows)
        self.seed, self.shuffle = seed, shuffle
        self._permutation = functools.lru_cache(maxsize=2)(self._permuted)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def columns(self) -> list[str]:
        """The columns beside the prompt."""
        return list(self.rows[0].columns)

    def fingerprint(self) -> str:
        """Of all rows in their order: a run that is resumed must find the same."""
        digest = 0
        for row in self.rows:
            text = json.dumps([row.prompt, dict(row.columns)], sort_keys=True, default=repr)
            digest = zlib.crc32(text.encode(), digest)
        return f"{len(self.rows)}-{digest:08x}"

    def batch(self, position: int, size: int) -> tuple[list[Row], int]:
        """`size` rows from `position` on, and the position behind them.

        Positions count rows over all epochs: n of them, the next permutation of the same rows, and so on. A
        batch may cross from one epoch to the next, and then hold a row twice.
        """
        if position < 0 or size < 1:
            raise ValueError(f"position must be >= 0 and size >= 1, got {position} and {size}")
        return [self._at(place) for place in range(position, position + size)], position + size

    def epoch(self, position: int) -> float:
        """How many epochs `position` is."""
        return position / len(self.rows)

    def _at(self, position: int) -> Row:
        epoch, place = divmod(position, len(self.rows))
        return self.rows[self._permutation(epoch)[place] if self.shuffle else place]

    def _permuted(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows)))
        random.Random(f"order {self.seed} {epoch}").shuffle(order)  # seeded by the string's SHA-512
        return order


def load(options: DataOptions, *, seed: int = 0) -> Dataset:
    """The dataset a configuration names. Raises ConfigError for what is missing, empty or of a wrong type."""
    return Dataset(load_rows(options), seed=seed, shuffle=options.shuffle)


def from_records(
    records: Sequence[Mapping[str, Any]], options: DataOptions | None = None, *, seed: int = 0
) -> Dataset:
    """The same of rows that are in memory (a list of dicts, a `datasets.Dataset`)."""
    options = options or DataOptions(source="the list given")
    return Dataset(rows_from(records, options), seed=seed, shuffle=options.shuffle)
