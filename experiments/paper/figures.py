"""Figures of a study: medians and quartiles over seeds, each arm at its own best rate. Imports no jax.

    python -m experiments.paper.figures --study=fair --data=fashion_mnist --workdir=runs/paper

With --workdir the finished runs in it are summarized and saved under experiments/paper/results; without, the saved
results are drawn. Figures go to experiments/paper/figures/STUDY-DATA-*.png:

- `loss`: training loss, training error and test error over the learner's steps (the paper's figures 2 and 3);
- `cost`: the same over the time on one device, where the cost of a step was measured;
- `variance`: noise of the gradient with uniform, actual and ideal draws (figure 4);
- `staleness`: of study `staleness`, variance gain against staleness of the scores;
- `asgd`: of study `asgd`, loss over updates and over charged time (see `cost.charged`), and the noise of the gradient;
- `summary`: of study `fair`, loss where other devices score, loss where one device does everything, and noise.
"""

import math
import pathlib
import statistics

from matplotlib.figure import Figure

from experiments.paper import command, cost, results
from issgd_jax import plots

FOLDER = pathlib.Path(__file__).parent / "figures"
# Colour-blind safe (Okabe and Ito 2008), grey for the arm that the others are compared with; dashed, then dotted
# once they repeat.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BASELINE = "#777777"
_METRICS = {
    "train/loss": ("Training loss", "cross-entropy (nats)"),
    "train/error": ("Training error", "fraction misclassified"),
    "test/error": ("Test error", "fraction misclassified"),
}
_VARIANCES = {"uniform": (":", "#555555"), "actual": ("-", "#0072B2"), "ideal": ("--", "#009E73")}
# Largest number of arms whose legend fits into a panel.
_LEGEND_WITHIN = 6
# Line styles of the two kinds of arms of study `asgd`.
_PEERS = {"uniform": ":", "calibrated": "-"}
# Arms of study `fair` in its summary.
_SEVEN, _ONE_DEVICE = "calibrated_7", ("uniform", "calibrated_refresh", "stride_limited")


def make_figures(record: dict, costs: dict[str, float]) -> dict[str, Figure]:
    """Returns {name: figure}, see the module.

    Args:
      record: of `results.summarize`.
      costs: {arm: cost of a step}; {} if it was not measured.
    """
    made = {"loss": curves_figure(record, list(_METRICS))}
    if record["study"] == "asgd":
        made["asgd"] = asgd_figure(record, costs)
    elif costs:
        made["cost"] = curves_figure(record, ["train/loss", "test/error"], costs=costs)
    if sampled := {name: arm for name, arm in record["arms"].items() if "scores/staleness_mean" in arm["curves"]}:
        made["variance"] = variance_figure(record, sampled)
    if record["study"] == "staleness":
        made["staleness"] = staleness_figure(record, sampled)
    if costs.keys() >= {_SEVEN, *_ONE_DEVICE} and record["arms"].keys() >= {_SEVEN, *_ONE_DEVICE}:
        made["summary"] = summary_figure(record, costs)
    return made


def summary_figure(record: dict, costs: dict[str, float]) -> Figure:
    """Draws three panels: loss over the learner's steps, loss over time on one device, noise of the gradient."""
    figure = Figure(figsize=(16.5, 4.8), layout="constrained")
    axes = figure.subplots(1, 3)
    baseline, arms = _ONE_DEVICE[0], record["arms"]
    figure.suptitle(_title(record | {"arms": {n: arms[n] for n in (*_ONE_DEVICE, _SEVEN)}}), fontsize=10)
    draw_curves(axes[0], {n: arms[n] for n in (baseline, _SEVEN)}, baseline, "train/loss", dict.fromkeys(arms, 1))
    draw_curves(axes[1], {n: arms[n] for n in _ONE_DEVICE}, baseline, "train/loss", costs)
    draw_variance(axes[2], arms[_SEVEN])
    axes[0].set_title("Training loss, scored by other devices")
    axes[1].set_title("Training loss, all on one device")
    _set_time(axes[1], record["steps"])
    axes[2].set_title("Noise of the gradient, scored by other devices")
    for axis in axes:
        axis.legend(frameon=False)
    return figure


def asgd_figure(record: dict, costs: dict[str, float]) -> Figure:
    """Draws loss over updates, with costs of all arms also over charged time, and noise. One colour for each k."""
    arms = {tuple(name.split("_")): arm for name, arm in record["arms"].items()}
    if not record["arms"].keys() <= costs.keys():
        costs = {}
    colours = dict(zip(sorted({number for _, number in arms}, key=int), _COLOURS))
    num_panels = 3 if costs else 2
    figure = Figure(figsize=(5.5 * num_panels, 4.8), layout="constrained")
    over_updates, *over_time, noise = figure.subplots(1, num_panels)
    figure.suptitle(_title(record), fontsize=10)
    for (kind, number), arm in arms.items():
        style = {"color": colours[number], "linestyle": _PEERS[kind]}
        losses, gain = arm["curves"]["train/loss"], arm["curves"]["variance/gain"]
        _band(over_updates, arm["step"], losses, label=_label(arm), **style)
        for axis in over_time:
            _band(axis, [costs[f"{kind}_{number}"] * step for step in arm["step"]], losses, **style)
        if kind != "uniform":
            _band(noise, arm["step"], {q: [x and x**-0.5 for x in curve] for q, curve in gain.items()}, **style)
    over_updates.set(title="Training loss over updates", xlabel="updates", ylabel="cross-entropy (nats)", yscale="log")
    for axis in over_time:
        axis.set(title="Training loss over charged time", ylabel="cross-entropy (nats)", yscale="log")
        axis.set(xlabel="owner + gradient / learners, in steps of SGD", xlim=(0, record["steps"]))
    noise.set(title="Noise of the gradient", xlabel="updates", ylabel=r"$\sqrt{\mathrm{Tr}\,\Sigma}$, actual / uniform")
    noise.axhline(1, color=_BASELINE, linestyle=":")
    for axis in (over_updates, *over_time, noise):
        _finish(axis)
    handles = over_updates.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2 * (num_panels - 1), fontsize=9, frameon=False)
    return figure


def curves_figure(record: dict, metrics: list[str], *, costs: dict[str, float] | None = None) -> Figure:
    """Draws a panel for each metric and each baseline, with the arms that are compared with it.

    Args:
      record: of `results.summarize`.
      metrics: names of curves.
      costs: {arm: cost of a step}; draws these arms over time, in steps of the baseline. None: all over steps.
    """
    groups = {}
    for name, arm in record["arms"].items():
        if costs is None or name in costs:
            groups.setdefault(arm["baseline"], {})[name] = arm
    shape = (len(metrics), len(groups)) if len(groups) > 1 else (1, len(metrics))
    figure = Figure(figsize=(5.8 * shape[1], 4.4 * shape[0] + 0.4), layout="constrained")
    axes = figure.subplots(*shape, squeeze=False)
    figure.suptitle(_title(record), fontsize=10)
    for i, metric in enumerate(metrics):
        for j, (baseline, arms) in enumerate(groups.items()):
            axis = axes[i, j] if len(groups) > 1 else axes[0, i]
            paid = costs or dict.fromkeys(arms, 1)
            draw_curves(axis, arms, baseline, metric, paid)
            if costs:
                _set_time(axis, record["steps"])
            if i == 0 and len(arms) <= _LEGEND_WITHIN:
                axis.legend(frameon=False, fontsize=8)
    if len(groups) == 1 and len(arms) > _LEGEND_WITHIN:
        columns = {"ncols": len(metrics), "fontsize": 9}
        figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", frameon=False, **columns)
    return figure


def draw_curves(axis, arms: dict, baseline: str, metric: str, paid: dict[str, float]) -> None:
    """Draws the metric of each arm over steps times the cost `paid` for a step."""
    others = 0
    for name, arm in arms.items():
        colour, style = _BASELINE, "-"
        if name != baseline:
            colour, style = _COLOURS[others % len(_COLOURS)], ("-", "--", ":")[others // len(_COLOURS) % 3]
            others += 1
        step = [paid[name] * s for s in arm["step"]]
        _band(axis, step, arm["curves"][metric], color=colour, linestyle=style, label=_label(arm))
    title, unit = _METRICS[metric]
    axis.set(title=title, xlabel="learner steps", ylabel=unit)
    if metric == "train/loss":
        axis.set_yscale("log")
    else:  # the high errors of the first steps would hide where the arms differ
        late = [
            x for arm in arms.values() for x in arm["curves"][metric]["q3"][len(arm["step"]) // 5 :] if x is not None
        ]
        early = [x for arm in arms.values() for x in arm["curves"][metric]["q1"] if x is not None]
        axis.set_ylim(0.95 * min(early, default=0), 1.05 * max(late, default=1))
    _finish(axis)


def _set_time(axis, steps: int) -> None:
    """Limits the axis of time to where the baseline ends, and the values to those reached by then."""
    shown = [y for line in axis.lines for x, y in zip(*line.get_data()) if x <= steps and math.isfinite(y)]
    axis.set(xlabel="time on one device, in steps of SGD", xlim=(0, steps))
    if axis.get_yscale() == "log" and shown:
        axis.set_ylim(bottom=0.8 * min(shown))


def variance_figure(record: dict, arms: dict) -> Figure:
    """Draws one panel an arm, all with the same scale."""
    columns = min(4, len(arms))
    rows = -(-len(arms) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 3.6 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    figure.suptitle(_title(record), fontsize=10)
    for axis, arm in zip(axes, arms.values()):
        draw_variance(axis, arm)
        axis.title.set_fontsize(9)
    for axis in axes[len(arms) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(arms) - columns) : len(arms)]:  # the lowest of each column
        axis.tick_params(labelbottom=True)
    axes[0].legend(frameon=False)
    return figure


def draw_variance(axis, arm: dict) -> None:
    """Draws the noise of the gradient with uniform, actual and ideal draws."""
    for kind, (style, colour) in _VARIANCES.items():
        _band(axis, arm["step"], arm["curves"][f"variance/{kind}"], color=colour, linestyle=style, label=kind)
    axis.set(
        yscale="log", title=_label(arm), xlabel="learner steps", ylabel=r"$\sqrt{\mathrm{Tr}\,\Sigma}$ of one example"
    )
    _finish(axis)


def staleness_figure(record: dict, arms: dict) -> Figure:
    """Draws the variance gain of arms against the mean staleness of their scores, as medians over seeds and steps."""
    figure = Figure(figsize=(7, 5.6), layout="constrained")
    axis = figure.subplots()
    figure.suptitle(_title(record), fontsize=10)
    for i, arm in enumerate(arms.values()):
        staleness, gain = (results.typical(arm, name) for name in ("scores/staleness_mean", "variance/gain"))
        if staleness and gain:
            marker = "o" if i < len(_COLOURS) else "s"
            axis.plot(staleness, gain, marker, color=_COLOURS[i % len(_COLOURS)], label=arm["label"])
    pairs = [[results.typical(arm, f"variance/{kind}") for kind in ("uniform", "ideal")] for arm in arms.values()]
    if gains := [(uniform / ideal) ** 2 for uniform, ideal in pairs if uniform and ideal]:
        style, colour = _VARIANCES["ideal"]
        axis.axhline(statistics.median(gains), linestyle=style, color=colour, label="ideal: scores without age")
    axis.axhline(1, color=_BASELINE, linestyle=":", label="uniform")
    axis.set(
        title="Gain against staleness", xscale="log", xlabel="mean staleness of the scores (learner steps)",
        ylabel="variance gain, Tr uniform / Tr actual",
    )  # fmt: skip
    axis.set_ylim(bottom=0)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    _finish(axis)
    return figure


def _band(axis, step, curve, *, color, **style):
    """Draws median and quartiles, with gaps where a quartile diverged."""
    low, middle, high = ([math.nan if x is None else x for x in curve[q]] for q in ("q1", "median", "q3"))
    axis.plot(step, middle, color=color, **style)
    axis.fill_between(step, low, high, color=color, alpha=0.18, linewidth=0)


def _label(arm: dict) -> str:
    rate = f"{arm['learning_rate']:g}"
    return arm["label"] if rate in arm["label"] else f"{arm['label']} (rate {rate})"


def _finish(axis):
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def _title(record: dict) -> str:
    counts = sorted({arm["n"] for arm in record["arms"].values()})
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"{record['data']}, {record['network']}: medians and quartiles over {seeds} seeds"


def main():
    record = command.record()
    FOLDER.mkdir(exist_ok=True)
    for name, figure in make_figures(record, cost.load(record["study"], record["data"], record["network"])).items():
        path = FOLDER / f"{record['study']}-{record['data']}-{name}.png"
        plots.save(figure, path)
        print(path)


if __name__ == "__main__":
    command.run(main, without=command.OF_RUNS)
