"""Statistics of a run's rows of metrics. Imports no jax."""

import itertools
import math
import statistics
from collections.abc import Sequence


def seconds_per_step(histories: list[list[dict]]) -> float:
    """Returns the seconds of a step, without compilation and measurements; NaN with fewer than three rows.

    Args:
      histories: rows of metrics of each seed. The first interval between rows, in which the step is compiled, is left
        out; the median over the others leaves out those after a resumption.

    Example:
      >>> rows = [{"step": 0, "step_seconds": 0.0}, {"step": 10, "step_seconds": 9.0}]
      >>> rows += [{"step": 20 + 10 * i, "step_seconds": 9.5 + 0.5 * i} for i in range(3)]
      >>> seconds_per_step([rows])
      0.05
    """
    seconds = [
        ((after.get("step_seconds") or 0) - (before.get("step_seconds") or 0)) / (after["step"] - before["step"])
        for rows in histories
        for before, after in itertools.pairwise(rows[1:])
    ]
    return statistics.median(seconds) if seconds else float("nan")


def steps_of_seeds(loss: float, histories: list[list[dict]], *, ends_there: bool) -> list[float]:
    """Returns the steps of each seed until the training loss is first as low as `loss`; inf if never.

    Args:
      loss: the target.
      histories: rows of metrics of each seed.
      ends_there: whether the target is the median of these seeds' own final losses: a seed that ends above it has then
        used its steps up.

    Example:
      >>> histories = [[{"step": 0, "train/loss": 1.0}, {"step": 8, "train/loss": last}] for last in (0.25, 0.5, 0.75)]
      >>> steps_of_seeds(0.5, histories, ends_there=False), steps_of_seeds(0.5, histories, ends_there=True)
      ([4.0, 8.0, inf], [4.0, 8.0, 8.0])
    """
    needed = [steps_to(loss, [r["step"] for r in rows], [r.get("train/loss") for r in rows]) for rows in histories]
    return [min(steps, float(rows[-1]["step"])) for steps, rows in zip(needed, histories)] if ends_there else needed


def steps_to(loss: float, step: Sequence[int], losses: Sequence[float | None]) -> float:
    """Returns the steps until the training loss is first as low as `loss`; inf if never.

    Args:
      loss: the target.
      step: of the measurements.
      losses: of the measurements, interpolated log-linearly; None after divergence.

    Example:
      >>> steps_to(0.1, [0, 10, 20], [1.0, 1.0, 0.01])
      15.0
    """
    previous = None
    for now, x in zip(step, losses):
        if x is not None and x <= loss:
            if previous is None or x <= 0:
                return float(now)
            last, y = previous
            return last + (now - last) * math.log(y / loss) / math.log(y / x) if y > x else float(now)
        previous = None if x is None else (now, x)
    return math.inf
