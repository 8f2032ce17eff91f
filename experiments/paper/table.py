"""The table of a study, in Markdown: medians over seeds, each arm at its own best rate. Imports no jax.

    python -m experiments.paper.table --study=fair --data=fashion_mnist --workdir=runs/paper

With --workdir the finished runs in it are summarized and saved under experiments/paper/results; without, the saved
results are shown. --baseline=ARM compares all arms with that arm, and not each with its own baseline.
"""

import math
import statistics

from experiments.paper import command, cost, results
from issgd_jax.config import nearest, parsers
from issgd_jax.errors import InputError
from issgd_jax.history import steps_to

_BASELINE = parsers.define_optional(
    "baseline", str, "Arm that all are compared with; None: each with its own baseline.", command.FLAGS
)

_COLUMNS = (
    "arm", "n", "rate", "final training loss", "ratio", "test error", "steps", "cost", "time", "loss at equal time",
    "mean staleness", "gain", "√Tr actual/ideal", "√Tr window/uniform", "max actual/uniform", "spikes", "diverged",
)  # fmt: skip
_TYPICAL = {"mean staleness": "scores/staleness_mean", "gain": "variance/gain"}


def make_rows(record: dict, costs: dict[str, float], baseline: str | None = None) -> list[dict[str, str]]:
    """Returns one row an arm, {column: text}.

    Columns: ratio is the final loss over the baseline's. steps: until the baseline's final loss, as a fraction of the
    study's steps, the median over seeds. time: steps times the measured cost of a step. loss at equal time: after as
    many steps as fit into the baseline's time, over the baseline's final loss. gain: Tr uniform / Tr actual.

    Args:
      record: of `results.summarize`.
      costs: {arm: cost of a step}; columns of time are missing for arms without it.
      baseline: the arm that all are compared with; None: each with its own, if the record has that.

    Raises:
      InputError: there is no such baseline; names the nearest.
    """
    arms = record["arms"]
    if baseline is not None and baseline not in arms:
        raise InputError(f"no arm {baseline!r} to compare with: {nearest(baseline, list(arms))}")
    rows = []
    for name, arm in arms.items():
        base = baseline or arm["baseline"]
        step_cost = costs[name] / costs[base] if name in costs and base in costs else None
        rows.append(_row(arm, arms.get(base), step_cost, record["steps"]))
    return rows


def _row(arm: dict, baseline: dict | None, step_cost: float | None, steps: int) -> dict[str, str]:
    losses = [math.inf if x is None else x for x in arm["final"]["train/loss"]]
    row = {
        "arm": arm["label"],
        "n": str(arm["n"]),
        "rate": f"{arm['learning_rate']:g}",
        "final training loss": f"{_median(losses):.3g} ({min(losses):.2g} to {max(losses):.2g})",
        "test error": f"{_median(arm['final']['test/error']):.2%}",
        "√Tr actual/ideal": f"{arm['actual_over_ideal_median']:.2f}",
        "max actual/uniform": f"{arm['actual_over_uniform_max']:.2f}",
        "spikes": f"{arm['with_spikes']} of {arm['n']}",
        "diverged": f"{arm['diverged']} of {arm['n']}",
    }
    for column, curve in _TYPICAL.items():
        if (typical := results.typical(arm, curve)) is not None:
            row[column] = f"{typical:.3g}"
    window, uniform = (results.typical(arm, f"variance/{kind}") for kind in ("window", "uniform"))
    if window is not None and uniform:
        row["√Tr window/uniform"] = f"{window / uniform:.2f}"
    if baseline is None:
        return row
    target = _median(baseline["final"]["train/loss"])
    needed = statistics.median(steps_to(target, arm["step"], losses_by_step) for losses_by_step in arm["loss_by_seed"])
    row |= {
        "ratio": f"{_median(losses) / target:.3g}",
        "steps": "never" if needed == math.inf else f"{needed / steps:.2f}",
    }
    if step_cost is not None:
        at_equal_time = [
            results.loss_at(steps / step_cost, arm["step"], losses_by_step) for losses_by_step in arm["loss_by_seed"]
        ]
        row |= {
            "cost": f"{step_cost:.2f}",
            "time": "never" if needed == math.inf else f"{step_cost * needed / steps:.2f}",
            "loss at equal time": f"{_median(at_equal_time) / target:.3g}",
        }
    return row


def _median(values) -> float:
    return statistics.median(math.inf if x is None else x for x in values)


def markdown(rows: list[dict[str, str]]) -> str:
    """Returns the rows as a table of the columns that any row has.

    Example:
      >>> print(markdown([{"arm": "SGD", "n": "5"}]))
      | arm | n |
      | --- | --- |
      | SGD | 5 |
    """
    columns = [column for column in _COLUMNS if any(column in row for row in rows)]
    lines = [columns, ["---"] * len(columns), *([row.get(column, "–") for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main():
    record = command.record()
    print(f"{record['study']} on {record['data']}, {record['network']}, {record['steps']:,} steps\n")
    print(markdown(make_rows(record, cost.load(record["study"], record["data"], record["network"]), _BASELINE.value)))


if __name__ == "__main__":
    command.run(main, without=command.OF_RUNS)
