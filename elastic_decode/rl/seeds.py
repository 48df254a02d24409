"""Random numbers as a function of where they are used: no generator has a state that a resumed run would
need.
"""

from __future__ import annotations

import hashlib


def derive(purpose: str, *parts: int) -> int:
    """A seed in [0, 2**63) for `purpose` at `parts` (run seed, step, prompt …): BLAKE2b of all of them."""
    said = "/".join([purpose, *(str(int(part)) for part in parts)])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 1
