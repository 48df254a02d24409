"""`elastic-decode eval`: accuracy against tokens, policy against policy, in one resumable command."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elastic_decode.cli import options
from elastic_decode.errors import ConfigError

if TYPE_CHECKING:
    from elastic_decode.eval.policies import EvalPolicy
    from elastic_decode.eval.records import Record
    from elastic_decode.eval.sweep import SweepOptions

_EPILOG = """examples:
  elastic-decode eval --task countdown --policies elastic,truncate --think 0,5,10,15 --solve 3 --out runs/eval
  elastic-decode eval --model agentica-org/DeepScaleR-1.5B-Preview --task aime --data aime.json \\
      --device cuda --policies elastic,truncate,s1 --think 512,1024,2048 --solve 1024 --n 16 \\
      --out runs/aime
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="accuracy against tokens over policies and budgets",
        description="Decode a task's problems under every policy and think budget, grade the solutions, and "
        "write a record a completion, a table, a CSV and a plot. Run again, it goes on where it was stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny", help="checkpoint folder, hub id or 'tiny' (default: tiny)")
    parser.add_argument("--task", required=True, help="what is asked and how it is graded: see docs/eval.md")
    parser.add_argument(
        "--data", metavar="FILE|ID", help="JSON, JSONL, parquet or a data set's id (default: the task's own)"
    )
    parser.add_argument("--split", help="of the data set")
    parser.add_argument(
        "--column", action="append", default=[], metavar="NAME=FOUND", help="what the data calls a column"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    parser.add_argument("--policies", default="elastic", help="with commas between them (default: elastic)")
    parser.add_argument(
        "--policy-option",
        action="append",
        default=[],
        metavar="POLICY.OPTION=VALUE",
        help="s1.waits=2; repeatable",
    )
    parser.add_argument("--think", required=True, help="think budgets: 512,1024,none")
    parser.add_argument("--solve", type=options.token_count, default=None, metavar="S", help="default: none")
    parser.add_argument("--n", type=int, default=1, help="samples a problem (default: 1)")
    parser.add_argument("--pass-at", default="", metavar="K,…", help="also pass@K, each at most --n")
    parser.add_argument("--no-fork", action="store_true", help="decode every budget afresh")
    parser.add_argument("--out", type=Path, required=True, help="folder of records and results")
    parser.add_argument("--seed", type=int, default=0, help="of all samples (default: 0)")
    parser.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (default: 1)")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--min-p", type=float, default=0.0)
    parser.add_argument("--quiet", action="store_true", help="no progress display")
    options.add_delimiters(parser)
    options.add_engine(parser, max_batch=64)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from elastic_decode import Engine  # imports torch: not for --help
    from elastic_decode.eval.records import RecordFile
    from elastic_decode.eval.summary import as_table, summarize, write_csv
    from elastic_decode.eval.sweep import sweep
    from elastic_decode.tasks.task import task

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 160  # a table in a file is not cut
    wanted = sweep_options(arguments)
    pass_at = _numbers(arguments.pass_at, "--pass-at") if arguments.pass_at else ()
    if any(k is None or not 1 <= k <= arguments.n for k in pass_at):
        raise ConfigError(
            f"--pass-at {arguments.pass_at}: each must be in 1..{arguments.n}, the samples a problem"
        )
    chosen = task(arguments.task)
    more = {name: value for name in ("split", "limit") if (value := getattr(arguments, name)) is not None}
    rows = chosen.rows(arguments.data, columns=dict(_pair(text) for text in arguments.column), **more)
    with RecordFile(arguments.out, _identity(arguments, wanted, rows)) as file:
        for note in file.notes:
            console.print(note, markup=False)
        total = len(wanted.cells()) * len(rows) * wanted.samples
        if len(file.records) < total:
            with (
                chosen.grader() as grade,
                Engine.from_pretrained(
                    options.checkpoint(arguments.model),
                    options.engine_of(arguments),
                    **_delimiters(arguments),
                ) as engine,
                _Display(console, total, file.records, quiet=arguments.quiet) as display,
            ):
                sweep(engine, rows, grade, wanted, file, display.records)
        cells = summarize(file.records, pass_at=[k for k in pass_at if k is not None])
    write_csv(cells, arguments.out / "results.csv")
    console.print(as_table(cells, f"{arguments.task}, {arguments.model}"))
    try:
        from elastic_decode.eval.plots import plot

        written = plot(cells, arguments.out / "accuracy", title=f"{arguments.task}, {arguments.model}")
        console.print(f"records, results.csv, {', '.join(path.name for path in written)}: {arguments.out}")
    except ConfigError as error:
        console.print(f"records and results.csv: {arguments.out}; no plot: {error}", markup=False)
    return 0


def sweep_options(arguments: argparse.Namespace) -> SweepOptions:
    from elastic_decode.core import SamplingParams
    from elastic_decode.eval.sweep import SweepOptions

    sampling = SamplingParams(
        temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k, min_p=arguments.min_p
    )
    return SweepOptions(
        policies=tuple(_policies(arguments)),
        think=_numbers(arguments.think, "--think"),
        solve=arguments.solve,
        samples=arguments.n,
        sampling=sampling,
        seed=arguments.seed,
        share=not arguments.no_fork,
    )


def _policies(arguments: argparse.Namespace) -> list[EvalPolicy]:
    from elastic_decode.eval.policies import policy

    names = [name.strip().replace("-", "_") for name in arguments.policies.split(",") if name.strip()]
    given: dict[str, dict[str, Any]] = {name: {} for name in names}
    for text in arguments.policy_option:
        path, value = _pair(text)
        name, _, option = path.partition(".")
        if name.replace("-", "_") not in given or not option:
            raise ConfigError(
                f"--policy-option {text}: expected POLICY.OPTION=VALUE of one of {', '.join(names)}"
            )
        try:
            given[name.replace("-", "_")][option] = json.loads(value)
        except ValueError:
            given[name.replace("-", "_")][option] = value  # a word without quotes is text
    return [policy(name, given[name]) for name in names]


def _numbers(text: str, flag: str) -> tuple[int | None, ...]:
    try:
        return tuple(options.token_count(part.strip()) for part in text.split(",") if part.strip())
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"{text!r} is not of the form NAME=VALUE")
    return name, value


def _identity(arguments: argparse.Namespace, wanted: SweepOptions, rows: Sequence[Any]) -> dict[str, Any]:
    """What the records depend on. Policies and budgets may be added to: a record says its own."""
    import zlib

    digest = 0
    for row in rows:
        text = json.dumps([row.index, row.prompt, dict(row.columns)], sort_keys=True, default=repr)
        digest = zlib.crc32(text.encode(), digest)
    sampling = wanted.sampling
    return {
        "model": str(arguments.model),
        "dtype": arguments.dtype,
        "kv_dtype": arguments.kv_dtype,
        "max_model_len": arguments.max_model_len,  # where a budget is unlimited
        "task": arguments.task,
        "problems": f"{len(rows)}-{digest:08x}",
        "solve": wanted.solve,
        "seed": wanted.seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "delimiters": _delimiters(arguments),
        **{f"policy.{policy.name}": dict(policy.options) for policy in wanted.policies},
    }


def _delimiters(arguments: argparse.Namespace) -> dict[str, Any]:
    return {
        "think_open": arguments.think_open,
        "think_close": arguments.think_close,
        "eos_ids": arguments.eos_id,
    }


class _Display:
    """Progress with the time left and the accuracy so far; plain lines where there is no terminal."""

    def __init__(self, console: Console, total: int, done: Sequence[Record], *, quiet: bool) -> None:
        self._scores = [record.score for record in done if record.score is not None]
        self._total, self._done = total, len(done)
        self._console, self._quiet = console, quiet
        self._said = time.monotonic()
        self._bar = Progress(
            TextColumn("eval"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("accuracy {task.fields[accuracy]}"),
            TimeRemainingColumn(),
            console=console,
            disable=quiet or not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=total, completed=self._done, accuracy=self._accuracy())

    def _accuracy(self) -> str:
        return f"{100 * sum(self._scores) / len(self._scores):.1f} %" if self._scores else "–"

    def records(self, new: Sequence[Record]) -> None:
        self._done += len(new)
        self._scores += [record.score for record in new if record.score is not None]
        self._bar.update(self._task, completed=self._done, accuracy=self._accuracy())
        if not self._console.is_terminal and not self._quiet and time.monotonic() - self._said > 30:
            self._said = time.monotonic()
            self._console.print(f"{self._done} of {self._total} completions, accuracy {self._accuracy()}")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
