"""The plots: accuracy against tokens a policy, and against the think budget an arm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from report import Measured

STYLE = {"elastic": "-", "truncate": "--", "s1": ":"}


def draw(protocol: Mapping[str, Any], measured: Measured, out: Path) -> None:
    """accuracy-tokens and accuracy-think, each as PNG and SVG, of what was measured."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "elastic_decode"  # the same file for the same figures
    arms = list(protocol["arms"])
    _by_tokens(protocol, measured, [arm for arm in ("base", arms[0]) if arm in measured.found], out)
    rivals = [arm for arm in ("base", *arms) if arm in measured.found]
    _by_think(protocol, measured, rivals, out)


def _by_tokens(protocol: Mapping[str, Any], measured: Measured, arms: Sequence[str], out: Path) -> None:
    from matplotlib import pyplot
    from report import estimate

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for number, arm in enumerate(arms):
        for policy, line in STYLE.items():
            thinks = [
                t for t in protocol["evaluate"]["think"] if t is not None and measured.has(arm, policy, t)
            ]
            if not thinks:
                continue
            points = [
                (estimate(measured.tokens(arm, policy, t)), estimate(measured.accuracy(arm, policy, t)))
                for t in thinks
            ]
            axes.errorbar(
                [x.mean for x, _ in points],
                [y.mean for _, y in points],
                xerr=[x.half for x, _ in points],
                yerr=[y.half for _, y in points],
                linestyle=line,
                color=f"C{number}",
                marker=".",
                capsize=2,
                label=f"{arm}, {policy}",
            )
        if measured.has(arm, "elastic", None):
            x = estimate(measured.tokens(arm, "elastic", None))
            y = estimate(measured.accuracy(arm, "elastic", None))
            label = f"{arm}, no budget"
            axes.errorbar(
                x.mean,
                y.mean,
                xerr=x.half,
                yerr=y.half,
                color=f"C{number}",
                marker="*",
                markersize=12,
                label=label,
            )
    axes.set(xlabel="sampled tokens, mean", ylabel="accuracy", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, out / "accuracy-tokens")


def _by_think(protocol: Mapping[str, Any], measured: Measured, arms: Sequence[str], out: Path) -> None:
    from matplotlib import pyplot
    from report import estimate

    ablation = [arm for arm in arms if arm == "base" or arm.startswith("elastic_")]
    others = [arm for arm in arms if arm not in ablation or arm in ("base", next(iter(protocol["arms"])))]
    figure, both = pyplot.subplots(1, 2, figsize=(11, 4.5), sharey=True)
    thinks = protocol["evaluate"]["think"]
    for axes, listed, title in zip(
        both, (ablation, others), ("t* of training", "rivals and stages"), strict=True
    ):
        for number, arm in enumerate(listed):
            there = [t for t in thinks if measured.has(arm, "elastic", t)]
            points = [estimate(measured.accuracy(arm, "elastic", t)) for t in there]
            axes.errorbar(
                [thinks.index(t) for t in there],
                [point.mean for point in points],
                yerr=[point.half for point in points],
                color="black" if arm == "base" else f"C{number}",
                marker=".",
                capsize=2,
                label=arm,
            )
        axes.set(title=title, xlabel="think budget (elastic)")
        axes.set_xticks(range(len(thinks)), ["none" if t is None else str(t) for t in thinks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    both[0].set_ylabel("accuracy")
    _save(figure, out / "accuracy-think")


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    figure.savefig(path.with_suffix(".png"), dpi=130, metadata={"Software": None})
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pyplot.close(figure)
