"""Finished runs of a sweep and their measurements. Imports no jax."""

import math
import pathlib
import statistics
import warnings

from ml_collections import ConfigDict

from issgd_jax.errors import InputError
from issgd_jax.records import MalformedError
from issgd_jax.run import metrics
from issgd_jax.run import workdir as workdir_lib

# Nats. Below it every example is fitted, and the logarithm of what is left would outweigh how fast the loss fell.
LEAST_LOSS = 1e-3


def folder_of(workdir: pathlib.Path, study: str, data: str, arm: str, learning_rate: float, seed: int) -> pathlib.Path:
    """Returns the folder of one run, `WORKDIR/STUDY/DATA/ARM/lr=RATE/seed=SEED`."""
    return workdir / study / data / arm / f"lr={learning_rate:g}" / f"seed={seed}"


def read_rows(folder: pathlib.Path) -> list[dict]:
    """Returns the rows of a run, [] if it has not started; skips a last line that is cut off, with a warning."""
    file = folder / workdir_lib.METRICS_FILE
    return metrics.read_metrics(file) if file.is_file() else []


def read_config(folder: pathlib.Path) -> dict:
    """Returns the config of a run, {} if it has not started or its file is cut off or malformed.

    Raises:
      InputError: it cannot be read now.
    """
    try:
        return workdir_lib.read_record(folder)["config"]
    except MalformedError:  # one that cannot be read now may be of a finished run, which is not to be trained again
        return {}


def is_finished(folder: pathlib.Path) -> bool:
    """Returns True if the run was measured after its last step."""
    config = read_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run that was cut off is not finished
        rows = read_rows(folder)
    return bool(config and rows) and rows[-1]["step"] == config.get("steps")


def check_same(folder: pathlib.Path, config: ConfigDict) -> None:
    """Checks that a run is of the experiment `config`.

    Raises:
      InputError: a field differs.
    """
    for name, (saved, wanted) in workdir_lib.changes(read_config(folder), config.to_dict()).items():
        raise InputError(
            f"{folder} holds a run with {name} = {saved}, but {wanted} is asked for: choose another --workdir"
        )


def final(rows: list[dict], name: str) -> float:
    """Returns the mean over the last tenth of the measurements (the paper's table 1); inf where training diverged."""
    last = rows[-max(1, len(rows) // 10) :]
    values = [row.get(name) for row in last]
    return math.inf if None in values else statistics.fmean(values)


def finished(workdir: pathlib.Path, study: str, data: str, arm: str) -> dict[float, dict[int, list[dict]]]:
    """Returns {learning rate: {seed: rows}} of the finished runs of an arm."""
    rows = {}
    for folder in sorted((workdir / study / data / arm).glob("lr=*/seed=*")):
        if is_finished(folder):
            rate, seed = float(folder.parent.name.removeprefix("lr=")), int(folder.name.removeprefix("seed="))
            rows.setdefault(rate, {})[seed] = read_rows(folder)
    return rows


def mean_log_loss(rows: list[dict]) -> float:
    """Returns the mean over the measurements of the logarithm of the training loss; inf if training diverged.

    Learning rates are chosen by it: it depends on how fast the loss falls and on how low it ends, and no single
    measurement decides. Losses below LEAST_LOSS count as LEAST_LOSS.

    Example:
      >>> mean_log_loss([{"train/loss": 1.0}, {"train/loss": None}])
      inf
    """
    losses = [row.get("train/loss") for row in rows]
    return math.inf if None in losses else statistics.fmean(math.log(max(loss, LEAST_LOSS)) for loss in losses)


def best_rate(workdir: pathlib.Path, study: str, data: str, arm: str) -> float:
    """Returns the rate with the least median `mean_log_loss` on the seeds that all rates have.

    Raises:
      InputError: nothing is finished, or the rates have no seed in common.
    """
    by_rate = finished(workdir, study, data, arm)
    common = set.intersection(*(set(by_seed) for by_seed in by_rate.values())) if by_rate else set()
    if not common:
        raise InputError(
            f"arm {arm} of {study} on {data} has no finished runs with one seed at all rates in {workdir}: sweep first"
        )
    return min(by_rate, key=lambda rate: statistics.median(mean_log_loss(by_rate[rate][seed]) for seed in common))
