"""Rows of a decode batch that begin with the same pages: samples of a group, branches of a fork, prefix hits.

Attention may read those pages once for all of them (kernels.paged_attention.SharedPrefixes).
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

from elastic_decode.engine.sequence import Sequence

WORTHWHILE = 128  # shared positions: Triton's split of the keys; less saves no reading


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """`sequences` in an order in which groups are adjacent. Group g has `sizes[g]` rows, which share their
    first `lengths[g]` positions."""

    sequences: list[Sequence]
    sizes: list[int]
    lengths: list[int]

    def rows(self, num_rows: int) -> tuple[list[int], list[int]]:
        """group_start [num_rows + 1] and shared_len [num_rows] of a batch of that many rows; those past the
        sequences idle, in no group."""
        starts, at = [0], 0
        for size in self.sizes:
            at += size
            starts.append(at)
        starts += [num_rows] * (num_rows + 1 - len(starts))
        return starts, self.lengths + [0] * (num_rows - len(self.lengths))


def group_by_prefix(sequences: SequenceOf[Sequence], page_size: int) -> PrefixGroups | None:
    """None where no rows share enough to be worth it."""
    by_page: dict[int, list[Sequence]] = {}
    for sequence in sequences:
        by_page.setdefault(sequence.pages[0], []).append(sequence)
    ordered: list[Sequence] = []
    sizes, lengths = [], []
    for rows in by_page.values():
        length = 0
        if len(rows) > 1:
            length = _common(rows) * page_size
        if length < WORTHWHILE:
            ordered += rows
            sizes += [1] * len(rows)
            lengths += [0] * len(rows)
        else:
            ordered += rows
            sizes.append(len(rows))
            lengths.append(length)
    return PrefixGroups(ordered, sizes, lengths) if any(lengths) else None


def _common(rows: list[Sequence]) -> int:
    """How many pages all of `rows` begin with."""
    pages = [row.pages for row in rows]
    first, last = min(pages), max(pages)  # what these two share, all in between share
    return next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
