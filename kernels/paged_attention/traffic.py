"""Bytes of keys and values that attention has to read: the floor of a decode step's attention."""

from collections.abc import Sequence


def kv_bytes(seq_lens: Sequence[int], num_kv_heads: int, head_dim: int, itemsize: int) -> int:
    """Of one layer, for rows with these lengths: every key and every value once a row."""
    return 2 * sum(seq_lens) * num_kv_heads * head_dim * itemsize


def shared_kv_bytes(
    groups: Sequence[tuple[int, Sequence[int]]],
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
    split: int = 1,
) -> int:
    """The same where the rows of a group, (length of the prefix, seq_lens of its rows), read their prefix
    once, rounded down to whole splits. Rows with seq_len 0 are idle; a group of one has nothing to share."""
    tokens = 0
    for length, lens in groups:
        running = [n for n in lens if n > 0]
        shared = length // split * split if len(running) > 1 else 0
        tokens += sum(running) - shared * max(0, len(running) - 1)
    return 2 * tokens * num_kv_heads * head_dim * itemsize
