"""Small studies, and runs written by hand as a sweep leaves them."""

import json
import pathlib

from experiments.paper import results, runs
from experiments.paper.sweep import sweep
from issgd_jax.run import workdir as workdir_lib
from tests.helpers import soak

SMALL = {"steps": 100, "data.train_split": "train[:200]", "model.mlp.hidden_sizes": (8,), "workers.chunk_size": 60}
_VARIANCES = {"variance/uniform": 4.0, "variance/actual": 2.0, "variance/ideal": 1.0, "variance/gain": 4.0}


def small_sweep(workdir: pathlib.Path, **changes):
    """Sweeps two arms of study `fair` on a few digits."""
    arms = ["uniform", soak("shuffled", "calibrated_refresh")]
    options = {"study": "fair", "data": "digits", "num_seeds": 3, "arms": arms}
    sweep(workdir, **options | {"overrides": SMALL, "at_once": 8, "shown": False} | changes)


def run_files(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the metrics files of all runs below a folder."""
    return sorted(workdir.rglob(workdir_lib.METRICS_FILE))


def write_run(
    workdir: pathlib.Path,
    arm: str,
    rate: float,
    seed: int,
    losses: list[float | None],
    *,
    study: str = "fair",
    data: str = "digits",
    steps: list[int] | None = None,
    cut: bool = False,
    **metrics,
):
    """Writes a finished run.

    Args:
      losses: training losses, one a measurement; None after divergence.
      steps: of the measurements; None: 0, 10, 20, ...
      cut: whether the last line of the metrics is cut off.
      **metrics: further columns, the same in all rows.
    """
    folder = runs.folder_of(workdir, study, data, arm, rate, seed)
    folder.mkdir(parents=True, exist_ok=True)
    steps = steps or [10 * i for i in range(len(losses))]
    model = {"name": "mlp", "mlp": {"hidden_sizes": [4]}}
    config = {"steps": steps[-1], "data": {"train_split": "train"}, "model": model}
    record = {"config": config, "devices": {}, "versions": {}, "git_commit": "abc"}
    (folder / workdir_lib.CONFIG_FILE).write_text(json.dumps(record))
    errors = {"train/error": 0.1, "test/error": 0.2, "test/loss": 1.0}
    rows = [
        {"step": step, "train/loss": loss} | errors | _VARIANCES | metrics
        for step, loss in zip(steps, losses, strict=True)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / workdir_lib.METRICS_FILE).write_text(text[:-15] if cut else text)


def summarize(workdir: pathlib.Path, **options) -> dict:
    """Summarizes the runs of study `fair` on digits."""
    return results.summarize(workdir, "fair", "digits", **options)
