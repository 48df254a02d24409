"""What the host knows of a sequence and of the group of samples it belongs to. Data only; the scheduler and
the engine act on it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any

import numpy as np

from elastic_decode.core import FinishReason, Phase, SamplingParams, ThinkEnd
from elastic_decode.delimiters import Delimiters

if TYPE_CHECKING:
    from elastic_decode.automata import CompiledProgram
    from elastic_decode.engine.text import StopScanner, TextStream


class Stage(Enum):
    WAITING = auto()  # no slot yet
    PREFILL = auto()  # has slot and pages; prompt tokens are still to be computed
    DECODE = auto()  # a row of the decode step
    DONE = auto()


@dataclass(slots=True, eq=False)
class Source:
    """Pages, held once more, whose keys and values are final for positions below `length`."""

    pages: list[int]
    length: int


@dataclass(slots=True, eq=False)
class Sequence:
    """One sample. `token_ids` and its parallel lists hold the output so far, `known_output` of which it
    started with.
    """

    group: Group
    sample: int
    program: CompiledProgram
    state_row: np.ndarray  # int32 [STATE_WORDS]: the row to write at admission
    bound: int  # positions it may ever have: prompt + output
    stage: Stage = Stage.WAITING
    slot: int = -1
    pages: list[int] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)  # pages a fork's root reserved for this branch
    source: Source | None = None
    computed: int = 0  # positions whose keys and values are in the pages
    known_output: int = 0
    draws: int = 0  # launched for it: a row that still runs has num_known + draws positions
    end_requested: bool = False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampling_logprobs: list[float] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    think_tokens: int = 0
    solve_tokens: int = 0
    think_end: ThinkEnd = "none"
    finish_reason: FinishReason | None = None
    weight_epoch: int = 0
    text: TextStream | None = None  # where text is wanted before the end: streaming, stop strings
    scanner: StopScanner | None = None
    pieces: list[str] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Positions it has: prompt and output so far."""
        return len(self.group.prompt_ids) + len(self.token_ids)

    @property
    def num_known(self) -> int:
        """Positions whose tokens were known when it was admitted."""
        return len(self.group.prompt_ids) + self.known_output

    @property
    def draws_left(self) -> int:
        """How many more it can use: each emits a token or ends it."""
        return self.bound - self.num_known - self.draws

    def known_ids(self, start: int, stop: int) -> list[int]:
        prompt = self.group.prompt_ids
        if stop <= len(prompt):
            return prompt[start:stop]
        return (prompt + self.token_ids[: self.known_output])[start:stop]


@dataclass(slots=True, eq=False)
class Group:
    """One prompt with all its samples (or, for `fork`, one sample at several think budgets)."""

    request_id: str
    index: int
    prompt_ids: list[int]
    sampling: SamplingParams
    seed: int
    delimiters: Delimiters
    start_phase: Phase
    tail: list[int]  # the prompt's end, as far as it may hold delimiters
    ban_ids: tuple[int, ...]
    sink: Any  # where events or the finished generation go: llm.py
    streams: bool  # whether each token becomes an event with its text
    keys: list[bytes] = field(default_factory=list)  # of the prompt's full pages
    epoch: int = 0
    sequences: list[Sequence] = field(default_factory=list)
    siblings: list[Sequence] = field(default_factory=list)  # wait for the first sample's prompt
    branches: list[Sequence] = field(
        default_factory=list
    )  # wait for the root's thought to reach their budget
    source: Source | None = None  # what siblings or branches start from
    sharers: int = 0  # how many of them are still to be admitted
    unfinished: int = 0
    think_at: tuple[int, ...] = ()  # `fork` only: the think budgets, in the order asked for
