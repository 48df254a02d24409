"""KV pages: the tensors that hold them, who holds which page, and which full pages begin a known token
sequence.

A page is free, held (reference count > 0), or idle: nobody holds it, but it is in the prefix index and may be
found again. Idle pages are taken back, least recently used first, when no free page is left. Evicting the
tail of a prefix before its head keeps what remains reachable, so holders release their pages from the end.
"""

from __future__ import annotations

import array
import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from elastic_decode.config import ModelConfig
from elastic_decode.engine.device import Device
from elastic_decode.errors import CapacityError, ConfigError


def prefix_keys(
    token_ids: Sequence[int], page_size: int, epoch: int, known: Sequence[bytes] = ()
) -> list[bytes]:
    """A key for every full page of `token_ids`: a hash of all tokens up to its end and of the weight epoch
    they were computed in.

    `known` are the keys of the first pages, if already at hand.
    """
    keys = list(known)
    key = keys[-1] if keys else f"epoch {epoch}".encode()
    for page in range(len(keys), len(token_ids) // page_size):
        tokens = array.array("q", token_ids[page * page_size : (page + 1) * page_size]).tobytes()
        key = hashlib.blake2b(key + tokens, digest_size=16).digest()
        keys.append(key)
    return keys


class PagePool:
    """Reference counts, the free list and the prefix index of `num_pages` pages of `page_size` tokens."""

    def __init__(self, num_pages: int, page_size: int, *, index_prefixes: bool) -> None:
        self.num_pages = num_pages
        self.page_size = page_size
        self.index_prefixes = index_prefixes
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        """Pages that `allocate` could hand out now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        return self.num_pages - self.available

    @property
    def indexed(self) -> int:
        """Pages in the prefix index, held or idle."""
        return len(self._key_of)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def allocate(self, count: int) -> list[int]:
        """`count` pages held once each. Raises CapacityError, taking nothing, when fewer are available."""
        if count > self.available:
            raise CapacityError(
                f"{count} KV pages asked for, {self.available} of {self.num_pages} are available"
            )
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                self._forget(page)
            self._holders[page] = 1
            pages.append(page)
        return pages

    def hold(self, pages: Iterable[int]) -> None:
        """One more holder for each page; the pages are held or idle already."""
        for page in pages:
            if self._holders[page] == 0:
                del self._idle[page]
            self._holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One holder fewer for each page, the last page first."""
        for page in reversed(pages):
            assert self._holders[page] > 0, f"page {page} released more often than held"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def find(self, keys: Sequence[bytes]) -> list[int]:
        """The longest run of indexed pages that `keys` begins with, now held once more each."""
        pages: list[int] = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        self.hold(pages)
        return pages

    def index(self, pages: Sequence[int], keys: Sequence[bytes]) -> None:
        """Make full pages findable. A key that another page already answers for keeps that page."""
        if not self.index_prefixes:
            return
        for page, key in zip(pages, keys, strict=True):
            if key not in self._page_of and page not in self._key_of:
                self._page_of[key] = page
                self._key_of[page] = key

    def clear_index(self) -> None:
        """Forget every prefix: the weights that computed these pages are gone."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._page_of.clear()
        self._key_of.clear()

    def _forget(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


class KVPages:
    """The tensors: per layer `(k_cache, v_cache)`, each [num_pages, page_size, num_kv_heads, head_dim]."""

    def __init__(
        self, config: ModelConfig, *, num_pages: int, page_size: int, dtype: torch.dtype, device: Device
    ) -> None:
        self._shape = (config.num_layers, 2, num_pages, page_size, config.num_kv_heads, config.head_dim)
        self._dtype = dtype
        self._device = device
        self.take()

    def take(self) -> None:
        """Allocate the tensors: at first, or again after `release`."""
        # Left uninitialised: no kernel reads a position that no token has been written to.
        self._storage = torch.empty(self._shape, dtype=self._dtype, device=self._device.device)
        self.layers = [(layer[0], layer[1]) for layer in self._storage.unbind(0)]

    def release(self) -> None:
        """Let go of the tensors, and of all they hold."""
        self.layers = []
        self._storage = self._storage.new_empty(0)

    @property
    def nbytes(self) -> int:
        return self._storage.nbytes

    def copy(self, source: Sequence[int], target: Sequence[int]) -> None:
        """Copy whole pages, all layers."""
        if source:
            # As integers of their size: copying needs no arithmetic, and torch has not all of it for float8.
            storage = self._storage.view(_BITS[self._storage.itemsize])
            to, of = self._device.upload(target, np.int64), self._device.upload(source, np.int64)
            self._device.launch(lambda: storage.index_copy_(2, to, storage.index_select(2, of)))


def page_nbytes(config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
    return 2 * config.num_layers * page_size * config.num_kv_heads * config.head_dim * dtype.itemsize


def plan_pages(
    config: ModelConfig,
    *,
    page_size: int,
    dtype: torch.dtype,
    kv_bytes: int,
    max_batch: int,
    max_model_len: int | None,
    index_prefixes: bool,
) -> tuple[int, int]:
    """(num_pages, max_model_len) for a memory budget of `kv_bytes`.

    `max_model_len=None` takes the model's own limit, or what the pages can hold if that is less. An explicit
    one that no sequence could ever reach raises ConfigError with the numbers.
    """
    per_page = page_nbytes(config, page_size, dtype)
    num_pages = kv_bytes // per_page
    if num_pages < 1:
        raise ConfigError(
            f"kv_memory of {kv_bytes} bytes holds no page: one page of {page_size} tokens takes {per_page} "
            f"bytes ({config.num_layers} layers, {config.num_kv_heads} KV heads of {config.head_dim}); "
            "raise kv_memory"
        )
    holds = num_pages * page_size
    rope = config.rope
    reach = config.max_position_embeddings
    if rope.type != "default":
        reach = max(reach, int(rope.original_length * rope.factor))
    if max_model_len is None:
        max_model_len = min(reach, holds)
    elif max_model_len > reach:
        raise ConfigError(
            f"max_model_len={max_model_len} is more than the {reach} positions the model was made for "
            f"(max_position_embeddings, rope type {rope.type}); lower it, or extend rope in config.json"
        )
    elif max_model_len > holds:
        raise ConfigError(
            f"max_model_len={max_model_len} needs {-(-max_model_len // page_size)} KV pages for one "
            f"sequence, kv_memory holds {num_pages} ({holds} tokens); raise kv_memory to "
            f"{-(-max_model_len // page_size) * per_page} bytes or lower max_model_len"
        )
    # More than every row at full length (twice that where finished prefixes are worth keeping) would never be
    # used.
    useful = max_batch * -(-max_model_len // page_size) * (2 if index_prefixes else 1)
    return min(num_pages, useful), max_model_len
