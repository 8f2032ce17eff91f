"""The runs that a sweep has left: which are finished, what they measured. Imports no jax."""

import json
import math
import pathlib
import statistics
import warnings

from ml_collections import ConfigDict

from issgd_jax.errors import InputError
from issgd_jax.run import metrics
from issgd_jax.run import workdir as workdir_lib

# Nats: with less every example is fitted, and how much less would drown how fast it came.
LEAST_LOSS = 1e-3


def read_rows(folder: pathlib.Path) -> list[dict]:
    """The rows of a run, none if it has not begun. A last line that was cut off is left out, with a warning."""
    file = folder / workdir_lib.METRICS_FILE
    return metrics.read_metrics(file) if file.is_file() else []


def read_config(folder: pathlib.Path) -> dict:
    """The config of a run, {} if it has not begun or its file is cut off."""
    try:
        return json.loads((folder / workdir_lib.CONFIG_FILE).read_text())["config"]
    except (OSError, json.JSONDecodeError, KeyError):
        return {}


def is_finished(folder: pathlib.Path) -> bool:
    """Whether the run has been measured after its last step."""
    config = read_config(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run that was cut off is simply not finished
        rows = read_rows(folder)
    return bool(config and rows) and rows[-1]["step"] == config["steps"]


def check_same(folder: pathlib.Path, config: ConfigDict) -> None:
    """Raises InputError if the run that lies there is of another experiment than `config`."""
    for name, (found, wanted) in workdir_lib.changes(read_config(folder), config.to_dict()).items():
        raise InputError(
            f"{folder} holds a run with {name} = {found}, but {wanted} is asked for: choose another --workdir"
        )


def final(rows: list[dict], name: str) -> float:
    """Mean over the last tenth of the measurements (the paper's table 1); inf if training diverged there."""
    last = rows[-max(1, len(rows) // 10) :]
    values = [row.get(name) for row in last]
    return math.inf if None in values else statistics.fmean(values)


def finished(workdir: pathlib.Path, study: str, data: str, arm: str) -> dict[float, dict[int, list[dict]]]:
    """{learning rate: {seed: rows}} of the finished runs of an arm."""
    found = {}
    for folder in sorted((workdir / study / data / arm).glob("lr=*/seed=*")):
        if is_finished(folder):
            rate, seed = float(folder.parent.name.removeprefix("lr=")), int(folder.name.removeprefix("seed="))
            found.setdefault(rate, {})[seed] = read_rows(folder)
    return found


def mean_log_loss(rows: list[dict]) -> float:
    """Mean over the measurements of the logarithm of the training loss; inf if training diverged.

    What a rate is chosen by: it sees how fast the loss falls and how low it ends, and no single measurement decides.
    All below LEAST_LOSS counts as that.
    """
    losses = [row.get("train/loss") for row in rows]
    return math.inf if None in losses else statistics.fmean(math.log(max(loss, LEAST_LOSS)) for loss in losses)


def best_rate(workdir: pathlib.Path, study: str, data: str, arm: str) -> float:
    """The rate with the least median `mean_log_loss` on the seeds that all rates have.

    Raises: InputError if nothing is finished, or the rates have no seed in common.
    """
    found = finished(workdir, study, data, arm)
    common = set.intersection(*(set(of_rate) for of_rate in found.values())) if found else set()
    if not common:
        raise InputError(
            f"arm {arm} of {study} on {data} has no finished runs with one seed at all rates in {workdir}: sweep first"
        )
    return min(found, key=lambda rate: statistics.median(mean_log_loss(found[rate][seed]) for seed in common))
