"""All that is seen of a run at one moment, from the files in its folder. Imports no jax; takes no lock."""

import dataclasses
import itertools
import pathlib
import socket
import statistics
import time

import psutil

from issgd_jax import records
from issgd_jax.cluster.status import STATUS_FILE
from issgd_jax.errors import InputError
from issgd_jax.run import status
from issgd_jax.view import examples
from issgd_jax.view.tail import Tail

# A heartbeat comes every second while steps are finished.
_FRESH_SECONDS = 3.0
# Intervals between rows of which rates are medians: those in which something is compiled are left out.
_INTERVALS = 8
# Rows that are enough for any curve: one of 20,000 would cost a third of a core.
_MOST_ROWS = 1000


@dataclasses.dataclass(frozen=True)
class Glance:
    """A run at one moment.

    Attributes:
      folder: of the run.
      rows: of metrics; of a long run evenly some, and the last.
      progress: how far it is; None: not known yet.
      cluster: status of the workers on a cluster, see `cluster.status.describe`; None without one.
      cluster_seconds: age of that status.
      classes: final scores of each class; () where they are not known.
      failure: why the run stopped, where it says so itself; None: it does not.
      problem: why a file cannot be read, or what of it is left out; None: nothing.
    """

    folder: pathlib.Path
    rows: list[dict] = dataclasses.field(default_factory=list)
    progress: status.Progress | None = None
    cluster: dict | None = None
    cluster_seconds: float = 0.0
    classes: tuple[examples.ClassScores, ...] = ()
    failure: str | None = None
    problem: str | None = None

    @property
    def step(self) -> int:
        """The last step that is known to be done."""
        return max(self.progress.step if self.progress else 0, self.rows[-1]["step"] if self.rows else 0)

    @property
    def steps(self) -> int | None:
        """Steps of the whole run; None: not known yet."""
        return self.progress.steps if self.progress else None

    @property
    def state(self) -> str:
        """See `state`."""
        return state(self.rows, self.progress)

    def rate(self, column: str = "step") -> float | None:
        """Returns what a column of counts grows by in a second, measurements included; None: not known yet.

        Example:
          >>> rows = [{"step": 10 * i, "wall_seconds": 5.0 * i} for i in range(3)]
          >>> Glance(pathlib.Path("runs/a"), rows).rate()
          2.0
        """
        rates = [
            ((after.get(column) or 0) - (before.get(column) or 0)) / seconds
            for before, after in itertools.pairwise(self.rows[-_INTERVALS - 1 :])
            if (seconds := (after.get("wall_seconds") or 0) - (before.get("wall_seconds") or 0)) > 0
        ]
        return statistics.median(rates) if rates else None

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of a run that is running; None: not known, or not running."""
        rate = self.rate()
        return (self.steps - self.step) / rate if self.state == "running" and rate else None


def state(rows: list[dict], progress: status.Progress | None) -> str:
    """Returns `no run yet`, `running`, `stopped`, or `finished`: all steps are done, and the last is measured.

    Args:
      rows: of metrics.
      progress: how far the run is; None: not known.
    """
    if progress is None:
        return "stopped" if rows else "no run yet"
    if rows and rows[-1]["step"] >= progress.steps:
        return "finished"
    return "running" if _is_alive(progress) else "stopped"


def look(folder: pathlib.Path, tail: Tail) -> Glance:
    """Returns what is seen of a run now; a file that cannot be read is a `problem`.

    Args:
      folder: of the run; may be missing.
      tail: of its metrics.jsonl.
    """
    seen = Glance(folder)
    try:
        seen = dataclasses.replace(seen, rows=_thinned(tail.read()))
        seen = dataclasses.replace(seen, progress=status.progress(folder))
        seen = dataclasses.replace(seen, failure=status.failure(folder) if seen.state == "stopped" else None)
        cluster, seconds = _cluster(folder)
        seen = dataclasses.replace(seen, cluster=cluster, cluster_seconds=seconds)
        seen = dataclasses.replace(seen, classes=examples.at_end_by_class(folder))
        if tail.malformed:
            problem = f"{tail.malformed:,} lines of metrics.jsonl are no rows that can come next, and left out"
            seen = dataclasses.replace(seen, problem=problem)
        return seen
    except (InputError, OSError) as error:
        return dataclasses.replace(seen, problem=str(error))


def _thinned(rows: list[dict]) -> list[dict]:
    last = rows[-_INTERVALS - 1 :]
    return rows[: -len(last) : 1 + len(rows) // _MOST_ROWS] + last if rows else []


def _cluster(folder: pathlib.Path) -> tuple[dict | None, float]:
    path = folder / STATUS_FILE
    if not path.is_file():
        return None, 0.0
    with records.parsing(path, "remove it: a run that is running writes it again"):
        return records.read(path), max(0.0, time.time() - path.stat().st_mtime)


def _is_alive(progress: status.Progress) -> bool:
    """Returns whether the program that wrote the heartbeat is there; of another machine its last step decides.

    The lock is not tried: a run that starts at that moment would be refused.
    """
    if progress.seconds < _FRESH_SECONDS:
        return True
    if progress.host != socket.gethostname():
        return progress.seconds < 60
    try:
        return psutil.Process(progress.process).create_time() <= progress.at
    except (psutil.Error, ArithmeticError, TypeError, ValueError):
        return False
