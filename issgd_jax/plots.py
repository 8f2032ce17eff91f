"""Figures from metrics files; imports no jax."""

import itertools
import pathlib

from matplotlib.figure import Figure

# Colour-blind safe (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def summary_figure(runs: dict[str, list[dict]], *, title: str) -> Figure:
    """What the method does, in three panels over the learner's steps: loss, error, and the noise of the gradient.

    runs: {label: rows of metrics}, the run with importance sampling first; its variances are shown.

    Raises: ValueError if runs is empty or a run has no rows.
    """
    if not runs or not all(runs.values()):
        raise ValueError(f"every run needs at least one row of metrics, got {{label: rows}} {_lengths(runs)}")
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    figure.suptitle(title)
    for colour, (label, rows) in zip(itertools.cycle(_COLOURS), runs.items()):
        _plot(axes[0], rows, "train/loss", color=colour, label=label)
        _plot(axes[1], rows, "test/error", color=colour, label=f"{label}, test")
        _plot(axes[1], rows, "train/error", color=colour, label=f"{label}, training", linestyle="--")
    axes[0].set(title="Training loss", yscale="log", ylabel="cross-entropy (nats), whole split")
    axes[1].set(title="Error", ylabel="fraction misclassified", ylim=(0, _error_limit(runs)))

    label, rows = next(iter(runs.items()))
    curves = (
        ("uniform", "of uniform draws", ":"),
        ("actual", "of the draws made", "-"),
        ("ideal", "the least possible", "--"),
    )
    for (name, meaning, style), colour in zip(curves, ("#555555", _COLOURS[0], "#009E73")):
        _plot(axes[2], rows, f"variance/{name}", color=colour, linestyle=style, label=f"{name}: {meaning}")
    axes[2].set(
        title=f"Noise of the gradient, {label}", yscale="log", ylabel=r"$\sqrt{\mathrm{Tr}\,\Sigma}$ of one example"
    )
    for axis in axes:
        axis.set_xlabel("learner steps")
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes the figure as PNG."""
    figure.savefig(path, dpi=120)


def _plot(axis, rows, name, **style):
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    if points:
        axis.plot(*zip(*points), **style)


def _error_limit(runs):
    """Leaves out the guessing of the first steps: the axis shows where the runs differ."""
    late = [row["test/error"] for rows in runs.values() for row in rows[len(rows) // 4 :] if "test/error" in row]
    return max(0.01, 1.3 * max(late, default=1))


def _lengths(runs):
    return {label: len(rows) for label, rows in runs.items()}
