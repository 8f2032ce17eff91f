"""The figures of a study: medians and quartiles over seeds, each arm at its own best rate. Imports no jax.

    python -m experiments.paper.figures --study=fair --data=fashion_mnist --workdir=runs/paper

With --workdir the finished runs there are summarized and kept under experiments/paper/results; without, what is kept
there is drawn. Figures go to experiments/paper/figures/STUDY-DATA-*.png.
"""

import pathlib

from matplotlib.figure import Figure

from experiments.paper import command, cost
from issgd_jax import plots

FOLDER = pathlib.Path(__file__).parent / "figures"
# Colour-blind safe (Okabe and Ito 2008), the first for the arm that all are compared with.
_COLOURS = (
    "#555555",
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#8C510A",
    "#999900",
)
_VARIANCES = (("uniform", ":"), ("actual", "-"), ("ideal", "--"))


def figures_of(record: dict, costs: dict[str, float]) -> dict[str, Figure]:
    """{name: figure} of a study's results."""
    made = {"loss": curves_figure(record, ("train/loss", "train/error", "test/error"))}
    if costs:
        made["cost"] = curves_figure(record, ("train/loss", "test/error"), costs=costs)
    made["variance"] = variance_figure(record)
    return made


def curves_figure(record: dict, names, *, costs: dict[str, float] | None = None) -> Figure:
    """One panel a metric over the learner's steps; with costs, over time in steps of the first arm."""
    figure = Figure(figsize=(6.2 * len(names), 4.8), layout="constrained")
    axes = figure.subplots(1, len(names))
    figure.suptitle(_title(record))
    arms = {name: arm for name, arm in record["arms"].items() if costs is None or name in costs}
    for axis, name in zip(axes, names):
        for colour, (arm_name, arm) in zip(_COLOURS, arms.items()):
            step = [s * (costs[arm_name] if costs else 1) for s in arm["step"]]
            _band(
                axis, step, arm["curves"][name], color=colour, label=f"{arm['label']} (rate {arm['learning_rate']:g})"
            )
        axis.set(title=_TITLES[name], xlabel="time, in steps of SGD on the same device" if costs else "learner steps")
        if name == "train/loss":
            axis.set(yscale="log", ylabel="cross-entropy (nats)")
        else:
            axis.set(
                ylabel="fraction misclassified", ylim=(0 if name == "train/error" else None, _error_limit(arms, name))
            )
        if costs:
            axis.set_xlim(0, record["steps"])
        _finish(axis)
    axes[0].legend(frameon=False, fontsize=8)
    return figure


def variance_figure(record: dict) -> Figure:
    """Figure 4 of the paper: one panel an arm that does not draw uniformly, on one scale."""
    arms = {name: arm for name, arm in record["arms"].items() if "scores/staleness_mean" in arm["curves"]}
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    figure.suptitle(_title(record) + ": noise of the gradient")
    for axis, arm in zip(axes, arms.values()):
        for (kind, style), colour in zip(_VARIANCES, ("#555555", "#0072B2", "#009E73")):
            _band(axis, arm["step"], arm["curves"][f"variance/{kind}"], color=colour, linestyle=style, label=kind)
        axis.set(yscale="log", title=f"{arm['label']} (rate {arm['learning_rate']:g})")
        axis.title.set_fontsize(9)
        _finish(axis)
    for axis in axes[len(arms) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel(r"$\sqrt{\mathrm{Tr}\,\Sigma}$ of one example")
    axes[0].legend(frameon=False)
    return figure


_TITLES = {"train/loss": "Training loss", "train/error": "Training error", "test/error": "Test error"}


def _band(axis, step, curve, *, color, **style):
    """Median and quartiles; from where a quartile diverged there is nothing to draw."""
    low, middle, high = ([float("nan") if x is None else x for x in curve[q]] for q in ("q1", "median", "q3"))
    axis.plot(step, middle, color=color, **style)
    axis.fill_between(step, low, high, color=color, alpha=0.18, linewidth=0)


def _error_limit(arms, name) -> float:
    """Leaves out the guessing of the first steps: the axis shows where the arms differ."""
    late = [x for arm in arms.values() for x in arm["curves"][name]["q3"][len(arm["step"]) // 5 :] if x is not None]
    return 1.1 * max(late, default=1)


def _finish(axis):
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _title(record: dict) -> str:
    smallest, largest = (f(arm["n"] for arm in record["arms"].values()) for f in (min, max))
    seeds = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
    return f"{record['data']}, {record['network']}: medians and quartiles over {seeds} seeds"


def main():
    record = command.record()
    FOLDER.mkdir(exist_ok=True)
    for name, figure in figures_of(record, cost.load(record["study"], record["data"])).items():
        path = FOLDER / f"{record['study']}-{record['data']}-{name}.png"
        plots.save(figure, path)
        print(path)


if __name__ == "__main__":
    command.run(main)
