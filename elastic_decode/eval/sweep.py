"""One model, one task, many policies and budgets: every completion decoded, graded and recorded once.

Where budgets share their thinking it is decoded once: `elastic` thinks up to the largest budget and is
forked at every smaller one; of `truncate` the longest output is decoded, and the others are its beginnings.
Both give, token for token, what each cell would have given by itself. Seeds derive from (sweep seed, problem,
sample), so cells are compared on the same noise.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_decode.core import Completion, Generation, Phase, SamplingParams, ThinkEnd
from elastic_decode.engine.text import split_text, text_of
from elastic_decode.errors import ConfigError
from elastic_decode.eval.policies import EvalPolicy, total_of
from elastic_decode.eval.records import Record, RecordFile
from elastic_decode.llm import Engine
from elastic_decode.tasks.data import Row
from elastic_decode.tasks.task import Grade

Progress = Callable[[Sequence[Record]], None]
Unit = tuple[int, int]  # place among the rows, sample


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """policies x think budgets (None = unlimited) x samples a problem. share: thinking is decoded once for
    several budgets. sampling: its seed must be None.
    """

    policies: tuple[EvalPolicy, ...]
    think: tuple[int | None, ...]
    solve: int | None
    samples: int = 1
    sampling: SamplingParams = field(default_factory=SamplingParams)
    seed: int = 0
    share: bool = True
    chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not self.policies or not self.think:
            raise ConfigError("a sweep needs one policy and one think budget, or more")
        for name, values in (("policy", [p.name for p in self.policies]), ("think budget", list(self.think))):
            if len(set(values)) != len(values):
                raise ConfigError(f"a {name} comes twice: {', '.join(map(str, values))}")
        if self.samples < 1:
            raise ConfigError(f"samples must be >= 1, got {self.samples}")
        if self.sampling.seed is not None:
            raise ConfigError("sampling.seed must be None: seeds derive from the sweep's seed")
        for policy in self.policies:
            if policy.prompt is not None and any(total_of(t, self.solve) is None for t in self.think):
                raise ConfigError(
                    f"policy {policy.name} says its budget in the prompt: think and solve budgets must be "
                    "finite"
                )

    def thinks(self, policy: EvalPolicy) -> tuple[int | None, ...]:
        """The think budgets of a policy's cells; a policy that takes none has one cell, 0."""
        return self.think if policy.budgeted else (0,)

    def cells(self) -> list[tuple[str, int | None]]:
        return [(policy.name, think) for policy in self.policies for think in self.thinks(policy)]


def seed_of(seed: int, problem: int, sample: int) -> int:
    """64 bits, the same in every process."""
    text = f"elastic_decode eval {seed} {problem} {sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def sweep(
    engine: Engine,
    rows: Sequence[Row],
    grade: Grade,
    options: SweepOptions,
    file: RecordFile,
    on_records: Progress | None = None,
) -> None:
    """Fills `file` with every record that is not there yet. on_records: called with what was just written.

    A sweep that is stopped at any moment goes on with the same call. Raises BudgetError and CapacityError,
    before anything is decoded for a cell, where a budget cannot fit a prompt; and what a policy raises that
    the engine cannot follow (a text that the vocabulary cannot spell), before anything is decoded at all.
    """
    longest = max(range(len(rows)), key=lambda place: len(str(rows[place].prompt)))
    for policy in options.policies:
        for think in options.thinks(policy):
            _start(engine, rows, options, policy, [(longest, 0)], think).close()
    for policy in options.policies:
        for unit, cells in _decode(engine, rows, options, policy, file):
            row = rows[unit[0]]
            scores = grade_cells(grade, row, cells)
            records = [
                _record(policy, think, options, row, unit, completion, score, shared)
                for (think, completion, shared), score in zip(cells, scores, strict=True)
            ]
            new = file.append(records)
            if on_records is not None and new:
                on_records(new)


Cell = tuple[int | None, Completion, bool]  # think budget, completion, decoded together with others


def _decode(
    engine: Engine, rows: Sequence[Row], options: SweepOptions, policy: EvalPolicy, file: RecordFile
) -> Iterator[tuple[Unit, list[Cell]]]:
    """Completions of a policy's cells, a (row, sample) at a time, as they are complete."""
    thinks = options.thinks(policy)
    together = [think for think in thinks if think is not None]
    cuttable = policy.sharing == "fork" or (policy.sharing == "cut" and options.solve is not None)
    if not options.share or not cuttable or len(together) < 2:
        together = []
    if together:
        units = _missing(rows, options, policy, file, together)
        if units:
            yield from _SHARED[policy.sharing](engine, rows, options, policy, units, sorted(together))
    for think in thinks:
        if think not in together:
            units = _missing(rows, options, policy, file, [think])
            if units:
                yield from _fresh(engine, rows, options, policy, units, think)


def _missing(
    rows: Sequence[Row],
    options: SweepOptions,
    policy: EvalPolicy,
    file: RecordFile,
    thinks: Sequence[int | None],
) -> list[Unit]:
    return [
        (place, sample)
        for place, row in enumerate(rows)
        for sample in range(options.samples)
        if any((policy.name, think, row.index, sample) not in file.keys for think in thinks)
    ]


def _sampling(rows: Sequence[Row], options: SweepOptions, units: Sequence[Unit]) -> list[SamplingParams]:
    return [
        replace(options.sampling, seed=seed_of(options.seed, rows[place].index, sample))
        for place, sample in units
    ]


def _fresh(
    engine: Engine,
    rows: Sequence[Row],
    options: SweepOptions,
    policy: EvalPolicy,
    units: Sequence[Unit],
    think: int | None,
) -> Iterator[tuple[Unit, list[Cell]]]:
    with closing(_start(engine, rows, options, policy, units, think)) as generations:
        for generation in generations:
            yield units[generation.index], [(think, generation.completions[0], False)]


def _start(
    engine: Engine,
    rows: Sequence[Row],
    options: SweepOptions,
    policy: EvalPolicy,
    units: Sequence[Unit],
    think: int | None,
) -> Generator[Generation, None, None]:
    """Checks everything now, decodes when asked."""
    prompts = [rows[place].prompt for place, _ in units]
    if policy.prompt is not None:
        total = total_of(think, options.solve)
        assert total is not None
        prompts = [policy.prompt(prompt, total) for prompt in prompts]
    return engine.rollout(
        prompts,
        budget=policy.budget(think, options.solve),
        sampling=_sampling(rows, options, units),
        chat_template_kwargs=options.chat_template_kwargs,
    )


def _forked(
    engine: Engine,
    rows: Sequence[Row],
    options: SweepOptions,
    policy: EvalPolicy,
    units: Sequence[Unit],
    thinks: Sequence[int],
) -> Iterator[tuple[Unit, list[Cell]]]:
    with closing(
        engine.fork_rollout(
            [rows[place].prompt for place, _ in units],
            think_at=thinks,
            solve=options.solve,
            sampling=_sampling(rows, options, units),
            chat_template_kwargs=options.chat_template_kwargs,
        )
    ) as generations:
        for generation in generations:
            pairs = zip(thinks, generation.completions, strict=True)
            yield units[generation.index], [(think, completion, True) for think, completion in pairs]


def _cut(
    engine: Engine,
    rows: Sequence[Row],
    options: SweepOptions,
    policy: EvalPolicy,
    units: Sequence[Unit],
    thinks: Sequence[int],
) -> Iterator[tuple[Unit, list[Cell]]]:
    for unit, ((_, longest, _),) in _fresh(engine, rows, options, policy, units, thinks[-1]):
        cells: list[Cell] = []
        for think in thinks:
            total = total_of(think, options.solve)
            assert total is not None
            cells.append((think, beginning(longest, total, engine), True))
        yield unit, cells


_SHARED: dict[str, Callable[..., Iterator[tuple[Unit, list[Cell]]]]] = {"fork": _forked, "cut": _cut}


def beginning(completion: Completion, total: int, engine: Engine) -> Completion:
    """What `truncate(total)` gives, of a completion under a larger total with the same seed."""
    if len(completion.token_ids) <= total:
        return completion
    ids, phases = completion.token_ids[:total], completion.phases[:total]
    think_tokens = phases.count(Phase.THINK)
    # Tokens of the close are THINK: it is whole where all of them are there.
    closed = completion.think_end != "none" and think_tokens == completion.phases.count(Phase.THINK)
    think_end: ThinkEnd = completion.think_end if closed else "none"
    thinking, solution = split_text(engine.tokenizer, ids, phases, think_end, engine.delimiters)
    return replace(
        completion,
        token_ids=ids,
        logprobs=completion.logprobs[:total],
        sampling_logprobs=completion.sampling_logprobs[:total],
        forced=completion.forced[:total],
        phases=phases,
        text=text_of(engine.tokenizer, ids),
        thinking=thinking,
        solution=solution,
        think_tokens=think_tokens,
        solve_tokens=total - think_tokens,
        think_end=think_end,
        finish_reason="budget",
    )


def grade_cells(grade: Grade, row: Row, cells: Sequence[Cell]) -> list[float | None]:
    """Scores of one row's completions. A column of the data keeps its name: the completion's is then called
    `completion_solution`, and so on, as in training. Raises ConfigError where the grader gives another number
    of scores.
    """
    found = [completion for _, completion, _ in cells]
    columns = {name: [value] * len(found) for name, value in row.columns.items()}
    ours: dict[str, list[Any]] = {
        "thinking": [completion.thinking for completion in found],
        "solution": [completion.solution for completion in found],
        "think_end": [completion.think_end for completion in found],
        "finish_reason": [completion.finish_reason for completion in found],
    }
    scores = list(
        grade(
            prompts=[row.prompt] * len(found),
            completions=[completion.text for completion in found],
            completion_ids=[completion.token_ids for completion in found],
            **{f"completion_{name}" if name in columns else name: values for name, values in ours.items()},
            **columns,
        )
    )
    if len(scores) != len(found):
        raise ConfigError(f"the grader gave {len(scores)} scores for {len(found)} completions")
    return scores


def _record(
    policy: EvalPolicy,
    think: int | None,
    options: SweepOptions,
    row: Row,
    unit: Unit,
    completion: Completion,
    score: float | None,
    shared: bool,
) -> Record:
    return Record(
        policy=policy.name,
        think=think,
        solve=options.solve,
        problem=row.index,
        sample=unit[1],
        seed=completion.seed,
        think_tokens=completion.think_tokens,
        solve_tokens=completion.solve_tokens,
        forced_tokens=sum(completion.forced),
        think_end=completion.think_end,
        finish_reason=completion.finish_reason,
        score=None if score is None else float(score),
        shared=shared,
        text=completion.text,
    )
