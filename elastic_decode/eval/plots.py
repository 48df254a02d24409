"""The figure of a sweep: accuracy against mean sampled tokens, a line a policy, with error bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from elastic_decode.errors import ConfigError
from elastic_decode.eval.summary import CellSummary


def plot(cells: Sequence[CellSummary], path: Path, *, title: str = "", log: bool = False) -> list[Path]:
    """Writes `path` as .png and .svg; both paths. Bars are one standard error, clustered by problem; cells
    without a budget are stars. Raises ConfigError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("plots need matplotlib: pip install 'elastic-decode[plot]'") from error
    figure = Figure(figsize=(7, 4.5))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for number, policy in enumerate(dict.fromkeys(cell.policy for cell in cells)):
        mine = [cell for cell in cells if cell.policy == policy]
        for unlimited in (False, True):
            shown = [cell for cell in mine if (cell.think is None) == unlimited]
            if not shown:
                continue
            axes.errorbar(
                [cell.tokens for cell in shown],
                [cell.accuracy for cell in shown],
                xerr=[cell.tokens_error for cell in shown],
                yerr=[cell.error for cell in shown],
                color=f"C{number}",
                capsize=2,
                marker="*" if unlimited else ".",
                markersize=12 if unlimited else 6,
                linestyle="none" if unlimited else "-",
                label=f"{policy}, no budget" if unlimited else policy,
            )
    axes.set(xlabel="sampled tokens, mean", ylabel="accuracy", title=title)
    if log:
        axes.set_xscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    written = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(written[0], dpi=130)
    figure.savefig(written[1], metadata={"Date": None})
    return written
