"""Status of a run as text, from the files in its folder. Imports no jax."""

import pathlib
import time
import warnings

from issgd_jax import records
from issgd_jax.cluster import status as cluster_status
from issgd_jax.errors import InputError
from issgd_jax.paths import local_path
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.metrics import read_metrics

# Of a row of metrics; those that a run does not measure are left out.
_SHOWN = {
    "train/loss": "{:.5f}",
    "train/error": "{:.2%}",
    "test/loss": "{:.5f}",
    "test/error": "{:.2%}",
    "variance/gain": "{:.2f}",
    "scores/scored_fraction": "{:.0%}",
    "wall_seconds": "{:,.1f}",
}


def read(workdir: str | pathlib.Path) -> str:
    """Returns whether a run is running, its last step, its last row of metrics, and the status of its workers.

    Args:
      workdir: folder of the run.

    Raises:
      InputError: the folder holds no run, or a file of it is malformed or cannot be read.

    Example:
      >>> read("runs/none")
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run: name the --workdir of one
    """
    workdir = local_path(workdir, "workdir")
    if not workdir_lib.holds_run(workdir):
        raise InputError(f"{workdir} holds no run: name the --workdir of one")
    owner, (progress, done) = workdir_lib.owner(workdir), _progress(workdir)
    lines = [f"{workdir}: {f'running, {owner}' if owner else 'finished' if done else 'stopped'}", *progress]
    metrics_file = workdir / workdir_lib.METRICS_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a last line that is still being written
        rows = read_metrics(metrics_file) if metrics_file.exists() else []
    lines.append(_describe_row(rows[-1]) if rows else "no row of metrics yet: wait for the first measurement")
    if (workdir / cluster_status.STATUS_FILE).is_file():
        lines += ["", cluster_status.read(workdir)]
    return "\n".join(lines)


def _progress(workdir: pathlib.Path) -> tuple[list[str], bool]:
    """Returns lines about the last finished step, and whether it is the last of the run; none before the first."""
    config_file, heartbeat_file = workdir / workdir_lib.CONFIG_FILE, workdir / workdir_lib.HEARTBEAT_FILE
    if not config_file.exists() or not heartbeat_file.exists():
        return [], False
    with records.parsing(config_file, "name another run, or start it again with --overwrite"):
        steps = records.whole_number(records.read(config_file)["config"]["steps"])
    with records.parsing(heartbeat_file, "remove it: a run that is running writes it again"):
        heartbeat = records.read(heartbeat_file)
        step, seconds = records.whole_number(heartbeat["step"]), max(0.0, time.time() - heartbeat["at"])
    return [f"step {step:,} of {steps:,}, {seconds:,.1f} s ago"], step == steps


def _describe_row(row: dict) -> str:
    values = (f"{name} {form.format(row[name])}" for name, form in _SHOWN.items() if row.get(name) is not None)
    return f"measured at step {row['step']:,}: {', '.join(values)}"
