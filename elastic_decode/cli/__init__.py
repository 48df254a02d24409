"""The command line: `elastic-decode generate|demo|train|eval|serve|info`.

Exit codes: 0 done, 1 failed (a message says why), 2 arguments that do not parse, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from elastic_decode.cli import demo, eval, generate, info, serve, train
from elastic_decode.errors import ElasticDecodeError

_DESCRIPTION = """Decode reasoning models under separate budgets: at most --think sampled tokens of thinking,
then the model's own close or a forced one, then at most --solve sampled tokens of solution.
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="elastic-decode", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--traceback", action="store_true", help="show where an error came from")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (generate, demo, train, eval, serve, info):
        command.add_parser(commands)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        print("elastic-decode: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone; keep Python from failing again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    # OSError: files that are missing, not allowed, no folder; FloatingPointError: training that diverged.
    except (ElasticDecodeError, OSError, FloatingPointError) as error:
        if arguments.traceback:
            raise
        print(f"elastic-decode: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
