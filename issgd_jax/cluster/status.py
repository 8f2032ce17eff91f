"""Status of the workers as text, from the file that a run keeps beside its heartbeat. Imports no jax and no Ray."""

import pathlib
import time

from issgd_jax import records
from issgd_jax.paths import local_path

STATUS_FILE = "cluster.json"


def read(workdir: str | pathlib.Path) -> str:
    """Returns the last status that a run has written, as text.

    Args:
      workdir: folder of the run.

    Raises:
      MalformedError: the folder holds no status, or one that is malformed.
      InputError: it cannot be read now.

    Example:
      >>> read("runs/none")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      issgd_jax.records.MalformedError: runs/none/cluster.json cannot be read (No such file or directory): ...
    """
    path = local_path(workdir, "workdir") / STATUS_FILE
    with records.parsing(path, "name a run with workers on a cluster"):
        status, age = records.read(path), max(0.0, time.time() - path.stat().st_mtime)
        return f"status of {age:,.1f} s ago\n{describe(status)}"


def describe(status: dict) -> str:
    """Returns the text of a status.

    Args:
      status: see `ClusterPool.status`.

    Example:
      >>> worker = {"worker": "worker 0", "machine": "node-1", "process": 12, "devices": ["cpu"], "alive": True,
      ...           "leases": 8, "restarts": 0, "seconds_since_last_result": 0.1, "problem": None}
      >>> status = {"seconds": 4.0, "workers": [worker], "broadcasts": 3, "broadcast_step": 80,
      ...           "leases_done": 8,
      ...           "leases_waiting": 1, "leases_running": 2, "leases_reissued": 0, "results_discarded": 0,
      ...           "typical_lease_seconds": None, "bytes_out": 1e6, "bytes_in": 2e5}
      >>> print(describe(status))
      4 s; latest parameters of step 80, 3 broadcasts, 1.0 MB sent, 0.2 MB of scores received
      leases: 8 done, 2 running, 1 waiting, 0 reissued, 0 results discarded; typical time unknown
      worker      machine              process  state     leases restarts   age s  devices
      worker 0    node-1                    12  alive          8        0     0.1  cpu
    """
    typical, lost = status["typical_lease_seconds"], status.get("drivers_lost", 0)
    since = f" since Ray was last lost, {lost} times in all" if lost else ""
    lines = [
        f"{status['seconds']:,.0f} s{since}; latest parameters of step {status['broadcast_step']}, "
        f"{status['broadcasts']:,} broadcasts, {status['bytes_out'] / 1e6:,.1f} MB sent, "
        f"{status['bytes_in'] / 1e6:,.1f} MB of scores received",
        f"leases: {status['leases_done']:,} done, {status['leases_running']} running, {status['leases_waiting']} "
        f"waiting, {status['leases_reissued']} reissued, {status['results_discarded']} results discarded; "
        f"typical time {'unknown' if typical is None else f'{typical:.3f} s'}",
        f"{'worker':<12}{'machine':<20}{'process':>8}  {'state':<8}{'leases':>8}{'restarts':>9}{'age s':>8}  devices",
        *map(_describe_worker, status["workers"]),
    ]
    return "\n".join(lines)


def _describe_worker(worker: dict) -> str:
    state = "alive" if worker["alive"] else "refused" if worker["problem"] else "lost"
    age = worker["seconds_since_last_result"]
    return (
        f"{worker['worker']:<12}{worker['machine'] or '-':<20}{worker['process'] or '-':>8}  {state:<8}"
        f"{worker['leases']:>8,}{worker['restarts']:>9}{'-' if age is None else f'{age:.1f}':>8}  "
        f"{', '.join(worker['devices'])}{worker['problem'] or ''}"
    )
