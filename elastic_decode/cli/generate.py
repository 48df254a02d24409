"""`elastic-decode generate`: prompts or JSONL in, streamed text or JSONL out."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from elastic_decode.cli import options, screen
from elastic_decode.core import Budget, Completion, Generation, Phase, SamplingParams, TokenEvent
from elastic_decode.errors import ConfigError

if TYPE_CHECKING:
    from elastic_decode.budgets import Policy

_EPILOG = """examples:
  elastic-decode generate tiny --chat -p "4 4 8 = 24" --think 15 --solve 8
  elastic-decode generate Qwen/Qwen3-0.6B --chat -p "Why is the sky blue?" --think 256 --solve 256
  elastic-decode generate ./model -i problems.jsonl -o answers.jsonl --chat --think 1024 --solve 1024 -n 8

JSONL input: one object a line with "prompt" (a string or token ids) or "messages" (a chat); "id", "think",
"solve" and "seed" are optional and override the flags. JSONL output: one object a prompt, as it finishes,
with all its completions.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="decode prompts under think and solve budgets",
        description="Decode prompts under think and solve budgets. On a terminal thinking is dim, the "
        "solution bright, forced tokens are marked.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="a checkpoint folder, a hub id, or 'tiny' for the bundled model")
    parser.add_argument(
        "-p", "--prompt", action="append", default=[], metavar="TEXT", help="a prompt; repeatable"
    )
    parser.add_argument(
        "-i", "--input", default=None, metavar="FILE", help="JSONL prompts; '-' reads standard input"
    )
    parser.add_argument(
        "-o", "--output", default=None, metavar="FILE", help="write JSONL here instead of text to the screen"
    )
    parser.add_argument(
        "--jsonl", action="store_true", help="JSONL on standard output instead of streamed text"
    )
    parser.add_argument(
        "--chat", action="store_true", help="each --prompt is a user's message for the chat template"
    )
    parser.add_argument("--system", default=None, metavar="TEXT", help="with --chat: a system message")
    parser.add_argument("-n", type=int, default=1, metavar="N", help="completions a prompt (default: 1)")
    parser.add_argument(
        "--tokens", action="store_true", help="JSONL: every token with phase, provenance and logprobs"
    )
    parser.add_argument("--no-progress", action="store_true", help="no progress bar on standard error")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing --output file")
    options.add_budget(parser)
    options.add_sampling(parser)
    options.add_delimiters(parser)
    options.add_engine(parser)
    parser.set_defaults(run=run)


@dataclasses.dataclass(slots=True)
class Job:
    """One prompt to decode, as asked for on the command line or in a line of JSONL."""

    name: Any
    prompt: Any
    budget: Policy | Budget
    sampling: SamplingParams


def _jobs(arguments: argparse.Namespace) -> list[Job]:
    policy, sampling = options.policy_of(arguments), options.sampling_of(arguments)
    if arguments.system is not None and not arguments.chat:
        raise ConfigError("--system goes with --chat")
    jobs: list[Job] = []
    for text in arguments.prompt:
        prompt: Any = text
        if arguments.chat:
            system = [{"role": "system", "content": arguments.system}] if arguments.system is not None else []
            prompt = [*system, {"role": "user", "content": text}]
        jobs.append(Job(len(jobs), prompt, policy, sampling))
    if arguments.input is not None:
        piped = arguments.input == "-"
        data = sys.stdin.read() if piped else _read(Path(arguments.input))
        for number, line in enumerate(data.split("\n"), 1):  # only these end a record: JSON may hold U+2028
            if line.strip():
                where = f"{'standard input' if piped else arguments.input}:{number}"
                jobs.append(_job(line, where, len(jobs), arguments, policy, sampling))
    if not jobs:
        raise ConfigError("nothing to do: give --prompt TEXT or --input FILE.jsonl")
    return jobs


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from None


def _job(
    line: str, where: str, index: int, arguments: argparse.Namespace, policy: Policy, sampling: SamplingParams
) -> Job:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not a JSON object: {error}") from None
    if not isinstance(record, dict):
        raise ConfigError(
            f"{where}: expected an object with 'prompt' or 'messages', got {type(record).__name__}"
        )
    unknown = set(record) - {"prompt", "messages", "id", "think", "solve", "seed"}
    if unknown:
        raise ConfigError(
            f"{where}: unknown field {sorted(unknown)[0]!r}; known: prompt, messages, id, think, solve, seed"
        )
    if ("prompt" in record) == ("messages" in record):
        raise ConfigError(f"{where}: needs either 'prompt' or 'messages'")
    if "messages" in record and not isinstance(record["messages"], list):
        raise ConfigError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    budget: Policy | Budget = policy
    try:
        if "think" in record or "solve" in record:
            if arguments.policy != "elastic":
                raise ConfigError("'think' and 'solve' in a record go with --policy elastic")
            budget = Budget(record.get("think", arguments.think), record.get("solve", arguments.solve))
        if "seed" in record:
            sampling = dataclasses.replace(sampling, seed=record["seed"])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    prompt = record.get("messages", record.get("prompt"))
    if arguments.chat and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return Job(record.get("id", index), prompt, budget, sampling)


def _record(job: Job, generation: Generation, with_tokens: bool) -> dict[str, Any]:
    def one(completion: Completion) -> dict[str, Any]:
        fields = [
            "text",
            "thinking",
            "solution",
            "think_tokens",
            "solve_tokens",
            "think_end",
            "finish_reason",
            "seed",
        ]
        if with_tokens:
            fields += ["token_ids", "logprobs", "sampling_logprobs", "forced", "phases"]
        return {name: getattr(completion, name) for name in fields}

    return {"id": job.name, "prompt": job.prompt, "completions": [one(c) for c in generation.completions]}


@contextmanager
def _progress(total: int, hidden: bool) -> Iterator[Any]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Progress(*columns, console=Console(stderr=True), disable=hidden, transient=True) as bar:
        task = bar.add_task("decoding", total=total, rate="")
        yield lambda rate: bar.update(task, advance=1, rate=rate)


def run(arguments: argparse.Namespace) -> int:
    if arguments.n < 1:
        raise ConfigError(f"-n must be >= 1, got {arguments.n}")
    jobs = _jobs(arguments)
    from elastic_decode.llm import Engine  # imports torch: not for --help

    with Engine.from_pretrained(
        options.checkpoint(arguments.model),
        options.engine_of(arguments),
        think_open=arguments.think_open,
        think_close=arguments.think_close,
        eos_ids=arguments.eos_id,
    ) as engine:
        if arguments.output is not None or arguments.jsonl:
            return _write_jsonl(engine, jobs, arguments)
        return _stream_text(engine, jobs, arguments)


def _write_jsonl(engine: Any, jobs: list[Job], arguments: argparse.Namespace) -> int:
    started, tokens = time.perf_counter(), 0
    rollout = engine.rollout(
        [job.prompt for job in jobs],
        n=arguments.n,
        budget=[j.budget for j in jobs],
        sampling=[j.sampling for j in jobs],
    )
    hidden = arguments.no_progress or not sys.stderr.isatty()
    with _out(arguments) as out, closing(rollout), _progress(len(jobs), hidden) as advance:
        for generation in rollout:
            record = _record(jobs[generation.index], generation, arguments.tokens)
            out.write(json.dumps(record, ensure_ascii=False) + "\n")
            out.flush()
            tokens += sum(len(c.token_ids) for c in generation.completions)
            advance(f"{tokens / (time.perf_counter() - started):.0f} tokens/s")
    return 0


def _out(arguments: argparse.Namespace) -> AbstractContextManager[IO[str]]:
    if arguments.output is None:
        return nullcontext(sys.stdout)
    path = Path(arguments.output)
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder; name a file")
    if path.exists() and path.stat().st_size > 0 and not arguments.overwrite:
        raise ConfigError(f"{path} exists; choose another --output, or pass --overwrite to replace it")
    return path.open("w", encoding="utf-8")


def _stream_text(engine: Any, jobs: list[Job], arguments: argparse.Namespace) -> int:
    """All samples are decoded together; the first unfinished one is shown as it comes, the others wait their
    turn.
    """
    console = Console(highlight=False)
    order = [(index, sample) for index in range(len(jobs)) for sample in range(arguments.n)]
    waiting: dict[tuple[int, int], list[TokenEvent]] = {key: [] for key in order}
    shown = 0
    events = engine.stream(
        [job.prompt for job in jobs],
        n=arguments.n,
        budget=[j.budget for j in jobs],
        sampling=[j.sampling for j in jobs],
    )
    if len(order) > 1:
        _rule(console, jobs, order[0])
    printed: list[TokenEvent] = []
    for event in events:
        waiting[event.index, event.sample].append(event)
        while shown < len(order) and waiting[order[shown]]:
            for ready in waiting[order[shown]]:
                screen.show(console, ready)
                printed.append(ready)
            waiting[order[shown]] = []
            if printed[-1].finish_reason is None:
                break
            _summary(console, printed)
            printed, shown = [], shown + 1
            if shown < len(order):
                _rule(console, jobs, order[shown])
    return 0


def _rule(console: Console, jobs: list[Job], key: tuple[int, int]) -> None:
    console.rule(f"prompt {jobs[key[0]].name}, sample {key[1]}", style="dim")


def _summary(console: Console, events: list[TokenEvent]) -> None:
    sampled = [event for event in events if not event.forced and event.token_id is not None]
    think = sum(event.phase is Phase.THINK for event in sampled)
    forced = sum(event.forced for event in events)
    console.print()
    console.print(
        f"[dim]{think} thinking + {len(sampled) - think} solution tokens, {forced} forced; "
        f"ended by {events[-1].finish_reason}[/dim]"
    )
