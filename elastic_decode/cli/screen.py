"""How tokens look on a terminal: thinking dim, solution bright, forced tokens marked."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from elastic_decode.core import Phase, TokenEvent

THINKING = "dim"
SOLUTION = "bold"
FORCED = "bold black on yellow"


def styled(event: TokenEvent, text: str | None = None) -> Text:
    style = FORCED if event.forced else THINKING if event.phase is Phase.THINK else SOLUTION
    return Text(event.text if text is None else text, style=style)


def show(console: Console, event: TokenEvent) -> None:
    """Print what one token adds; nothing is wrapped or interpreted as markup."""
    if event.text:
        console.print(styled(event), end="", soft_wrap=True, highlight=False)


def legend(console: Console) -> None:
    console.print(
        Text.assemble(("thinking", THINKING), "  ", ("solution", SOLUTION), "  ", (" forced ", FORCED)),
        highlight=False,
    )
