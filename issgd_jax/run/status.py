"""Status of a run as text, from the files in its folder. Imports no jax."""

import json
import pathlib
import time

from issgd_jax.cluster import status as cluster_status
from issgd_jax.errors import InputError
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.metrics import read_run

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
      InputError: the folder holds no run.

    Example:
      >>> read("runs/none")
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run: name the --workdir of one
    """
    workdir = pathlib.Path(workdir)
    if not workdir_lib.holds_run(workdir):
        raise InputError(f"{workdir} holds no run: name the --workdir of one")
    owner, steps = workdir_lib.owner(workdir), _read(workdir / workdir_lib.CONFIG_FILE).get("config", {}).get("steps")
    heartbeat = _read(workdir / workdir_lib.HEARTBEAT_FILE)
    done = heartbeat.get("step") == steps is not None
    lines = [f"{workdir}: {f'running, {owner}' if owner else 'finished' if done else 'stopped'}"]
    if heartbeat:
        lines.append(f"step {heartbeat['step']:,} of {steps:,}, {max(0.0, time.time() - heartbeat['at']):,.1f} s ago")
    try:
        lines.append(_describe_row(read_run(workdir)[-1]))
    except InputError as error:  # before the first measurement
        lines.append(str(error))
    if (workdir / cluster_status.STATUS_FILE).is_file():
        lines += ["", cluster_status.read(workdir)]
    return "\n".join(lines)


def _read(path: pathlib.Path) -> dict:
    """Returns the content of a file of the run; empty if it is not there yet."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _describe_row(row: dict) -> str:
    values = (f"{name} {form.format(row[name])}" for name, form in _SHOWN.items() if row.get(name) is not None)
    return f"measured at step {row['step']:,}: {', '.join(values)}"
