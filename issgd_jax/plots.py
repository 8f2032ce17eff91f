"""Figures from rows of metrics; imports no jax."""

import itertools
import math
import pathlib
import statistics
import warnings

from matplotlib.figure import Figure

from issgd_jax.errors import InputError
from issgd_jax.files import reason, replace_atomically
from issgd_jax.history import seconds_per_step
from issgd_jax.paths import local_path

# Colour-blind safe (Okabe and Ito 2008).
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_NOISE = (
    ("uniform", "of uniform draws", ":"),
    ("actual", "of the draws made", "-"),
    ("ideal", "the least possible", "--"),
)
_NOISE_LABEL = r"$\sqrt{\mathrm{Tr}\,\Sigma}$ of one example"

Rows = list[dict]


def summary_figure(runs: dict[str, list[Rows]], *, title: str) -> Figure:
    """Draws loss over steps and over seconds, test error or else test loss, and the noise of the gradient.

    Args:
      runs: {label: [rows of metrics of each seed]}, importance sampling first; its noise is drawn. Lines are medians
        over seeds, bands reach from the least to the largest.
      title: of the figure.

    Raises:
      ValueError: there is no run, or one without rows.

    Example:
      >>> row = {"step": 0, "train/loss": 2.3, "test/error": 0.9, "variance/uniform": 1.0}
      >>> [axis.get_title() for axis in summary_figure({"a": [[row]]}, title="digits").axes]
      ['Training loss', 'Training loss', 'Test error', 'Noise of the gradient, a']
    """
    if not runs or not all(histories and all(histories) for histories in runs.values()):
        raise ValueError(f"every run needs at least one row of metrics, got runs {list(runs)}")
    test = next((name for name in ("test/error", "test/loss") if _is_measured(runs, name)), None)
    figure = Figure(figsize=(18 if test else 13.5, 4.6), layout="constrained")
    by_step, by_second, *others, noise = figure.subplots(1, 4 if test else 3)
    figure.suptitle(_literal(title))
    runs = {_literal(label): histories for label, histories in runs.items()}
    for colour, (label, histories) in zip(itertools.cycle(_COLOURS), runs.items()):
        style = {"color": colour, "label": label}
        _plot(by_step, histories, "train/loss", **style)
        _plot(by_second, histories, "train/loss", scale=seconds_per_step(histories), **style)
        for axis in others:
            _plot(axis, histories, test, **style)
    label, histories = next(iter(runs.items()))
    for (name, meaning, line), colour in zip(_NOISE, ("#555555", _COLOURS[0], "#009E73")):
        _plot(noise, histories, f"variance/{name}", color=colour, linestyle=line, label=f"{name}: {meaning}")
    loss = {"title": "Training loss", "yscale": "log", "ylabel": "mean loss, whole split"}
    by_step.set(**loss, xlabel="learner steps")
    by_second.set(**loss, xlabel="seconds of training, without compilation")
    for axis in others:
        name = test.removeprefix("test/")
        axis.set(title=f"Test {name}", ylabel=f"mean {name}, whole split", xlabel="learner steps")
        axis.set(**({"ylim": (0, _error_limit(runs))} if name == "error" else {"yscale": "log"}))
    noise.set(
        title=f"Noise of the gradient, {label}",
        yscale="log",
        ylabel=_NOISE_LABEL,
        xlabel="learner steps",
    )
    _decorate(figure)
    return figure


def runs_figure(runs: dict[str, Rows]) -> Figure:
    """Draws loss, error and the noise of the gradient of runs, over steps and over seconds.

    Args:
      runs: {label: rows of metrics}; what a run has not measured is left out.

    Raises:
      ValueError: there is no run, or one without rows.

    Example:
      >>> row = {"step": 0, "train/loss": 2.3, "test/error": 0.9, "variance/actual": 1.0}
      >>> [axis.get_title() for axis in runs_figure({"a": [row]}).axes[:3]]
      ['Training loss', 'Test error', 'Noise of the gradient']
    """
    if not runs or not all(runs.values()):
        raise ValueError(f"every run needs at least one row of metrics, got runs {list(runs)}")
    figure = Figure(figsize=(15, 8), layout="constrained")
    axes = figure.subplots(2, 3, sharey="col")
    for colour, (label, rows) in zip(itertools.cycle(_COLOURS), runs.items()):
        for line, scale in zip(axes, (1.0, seconds_per_step([rows]))):
            for axis, name in zip(line, ("train/loss", "test/error", "variance/actual")):
                _plot(axis, [rows], name, scale=scale, color=colour, label=_literal(label))
    for line, unit in zip(axes, ("learner steps", "seconds of training, without compilation")):
        loss, error, noise = line
        loss.set(title="Training loss", yscale="log", ylabel="mean loss, whole split", xlabel=unit)
        error.set(title="Test error", ylabel="mean error, whole split", xlabel=unit)
        noise.set(title="Noise of the gradient", yscale="log", ylabel=_NOISE_LABEL, xlabel=unit)
    error.set_ylim(0, _error_limit({label: [rows] for label, rows in runs.items()}))
    _decorate(figure)
    return figure


def save(figure: Figure, path: str | pathlib.Path) -> None:
    """Writes the figure, in the format that the ending of its name tells, else as PNG.

    Raises:
      InputError: it cannot be written, or as `local_path`.
    """
    path = local_path(path, "path of the figure")
    try:
        with replace_atomically(path) as new, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)  # of a run's name
            figure.savefig(new, dpi=120, format=path.suffix[1:] or "png")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({reason(error)}): make room, or choose another file") from error


def _is_measured(runs: dict[str, list[Rows]], name: str) -> bool:
    return any(row.get(name) is not None for histories in runs.values() for rows in histories for row in rows)


def _literal(text: str) -> str:
    """Returns text for a figure that shows it as it is: no formula, not hidden, and what UTF-8 lacks escaped.

    Example:
      >>> _literal("_cost in $"), _literal("\\udcff")
      (' _cost in \\\\$', '\\\\udcff')
    """
    text = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # matplotlib leaves such names out of legends


def _decorate(figure: Figure) -> None:
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)


def _plot(axis, histories: list[Rows], name: str, *, scale: float = 1.0, **style) -> None:
    values: dict[int, list[float]] = {}
    for row in itertools.chain.from_iterable(histories):
        if row.get(name) is not None:
            values.setdefault(row["step"], []).append(row[name])
    if not values or not math.isfinite(scale):  # the time of a step is not known yet
        return
    steps = sorted(values)
    xs = [scale * step for step in steps]
    axis.plot(xs, [statistics.median(values[step]) for step in steps], **style)
    if len(histories) > 1:
        low, high = ([pick(values[step]) for step in steps] for pick in (min, max))
        axis.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _error_limit(runs: dict[str, list[Rows]]) -> float:
    """Leaves out the first steps, where every run guesses: the axis shows where the runs differ."""
    late = [
        row["test/error"]
        for histories in runs.values()
        for rows in histories
        for row in rows[len(rows) // 4 :]
        if row.get("test/error") is not None
    ]
    return max(0.01, 1.3 * max(late, default=1))
