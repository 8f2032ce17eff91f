"""Status of a run as text, from the files in its folder. Imports no jax."""

import dataclasses
import pathlib
import time
import warnings

from issgd_jax import records
from issgd_jax.cluster import status as cluster_status
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
    workdir_lib.check_run(workdir)
    owner, at = workdir_lib.owner(workdir), progress(workdir)
    metrics_file = workdir / workdir_lib.METRICS_FILE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a last line that is still being written
        rows = read_metrics(metrics_file) if metrics_file.exists() else []
    measured = rows[-1]["step"] if rows else 0
    done = at is not None and measured >= at.steps
    lines = [f"{workdir}: {f'running, {owner}' if owner else 'finished' if done else 'stopped'}"]
    if at:
        lines.append(f"step {max(at.step, measured):,} of {at.steps:,}, {at.seconds:,.1f} s ago")
    if not owner and not done and (why := failure(workdir)):
        lines.append(why)
    if rows:
        lines.append(_describe_row(rows[-1]))
    else:
        lines.append(f"no row of metrics yet: {'wait for the first measurement' if owner else 'start the run again'}")
    if (workdir / cluster_status.STATUS_FILE).is_file():
        lines += ["", cluster_status.read(workdir)]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is.

    Attributes:
      step: the last finished one.
      steps: of the whole run.
      at: when that step was finished, in seconds since the epoch.
      process, host: of the program; None: an earlier version wrote the heartbeat.
    """

    step: int
    steps: int
    at: float
    process: int | None
    host: str | None

    @property
    def seconds(self) -> float:
        """Seconds since the step was finished."""
        return max(0.0, time.time() - self.at)


def progress(workdir: pathlib.Path) -> Progress | None:
    """Returns how far a run is; None before its first step.

    Raises:
      InputError: a file is malformed or cannot be read.
    """
    config_file, heartbeat_file = workdir / workdir_lib.CONFIG_FILE, workdir / workdir_lib.HEARTBEAT_FILE
    if not config_file.exists() or not heartbeat_file.exists():
        return None
    with records.parsing(config_file, "name another run, or start it again with --overwrite"):
        steps = records.whole_number(records.read(config_file)["config"]["steps"])
    with records.parsing(heartbeat_file, "remove it: a run that is running writes it again"):
        beat = records.read(heartbeat_file)
        return Progress(
            records.whole_number(beat["step"]), steps, beat["at"] + 0.0, beat.get("process"), beat.get("host")
        )


def failure(workdir: pathlib.Path) -> str | None:
    """Returns why a run stopped, where it left a record of that; None: it did not, or went on afterwards.

    Raises:
      InputError: a file is malformed or cannot be read.
    """
    path, last = workdir / workdir_lib.NONFINITE_FILE, progress(workdir)
    with records.parsing(path, "remove it"):
        if last is None or not path.is_file() or path.stat().st_mtime < last.at:
            return None
        step = records.whole_number(records.read(path)["step"])
    return f"it stopped at step {step:,}, as a loss or gradient is not finite: see {path.name}"


def _describe_row(row: dict) -> str:
    values = (f"{name} {form.format(row[name])}" for name, form in _SHOWN.items() if row.get(name) is not None)
    return f"measured at step {row['step']:,}: {', '.join(values)}"
