"""What the folders of runs hold, and which runs are seeds of one arm. Imports no jax."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Sequence

from issgd_jax.config import default, flatten
from issgd_jax.errors import InputError
from issgd_jax.paths import local_path
from issgd_jax.run import status, workdir
from issgd_jax.run.metrics import read_run
from issgd_jax.view import glance

IMPORTANCE, UNIFORM = "importance sampling", "uniform (SGD)"
# Fields in a name that tells arms of one kind apart.
_FIELDS_IN_NAME = 2


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, finished or not.

    Attributes:
      name: of its folder.
      folder: of the run.
      rows: of metrics, at least one.
      record: content of config.json; {} where it cannot be read.
      config: flat, the defaults of this version where an earlier one had no such field; {} likewise.
      state: see `glance.state`.
      failure: why the run stopped, where it says so itself; None: it does not.
      problem: why a file cannot be read; None: all could.
    """

    name: str
    folder: pathlib.Path
    rows: list[dict]
    record: dict
    config: dict
    state: str
    failure: str | None = None
    problem: str | None = None

    @property
    def kind(self) -> str | None:
        """IMPORTANCE or UNIFORM; None: not known."""
        if not self.config:
            return None
        return UNIFORM if self.config["proposal.name"] == "uniform" else IMPORTANCE

    @property
    def essence(self) -> dict:
        """Fields of the config that decide what is computed, but for the seed."""
        return {k: v for k, v in self.config.items() if k != "seed" and not k.startswith(workdir.HARMLESS)}


@dataclasses.dataclass(frozen=True)
class Arm:
    """Runs that differ in their seed alone.

    Attributes:
      name: for legends.
      runs: at least one.
    """

    name: str
    runs: tuple[Run, ...]

    @property
    def kind(self) -> str | None:
        """As that of its runs."""
        return self.runs[0].kind

    @property
    def essence(self) -> dict:
        """As that of its runs."""
        return self.runs[0].essence

    @property
    def histories(self) -> list[list[dict]]:
        """Rows of metrics of each run."""
        return [run.rows for run in self.runs]

    def last(self, column: str) -> list[float]:
        """Returns the last known value of a column in each run that has one."""
        known = ([row[column] for row in rows if row.get(column) is not None] for rows in self.histories)
        return [values[-1] for values in known if values]


def read(folders: Sequence[str | pathlib.Path]) -> list[Run]:
    """Returns the runs in folders.

    Args:
      folders: of runs, or of folders of runs.

    Raises:
      InputError: a folder holds no run, or one without rows of metrics; a row before the last is malformed.

    Example:
      >>> read(["runs/none"])
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run (no metrics.jsonl): name the --workdir of one
    """
    found = workdir.runs_in([local_path(folder, "WORKDIR") for folder in folders])
    names = [_printable(folder.resolve().name) for folder in found]
    labels = names if len({*names}) == len(names) else [_printable(folder) for folder in found]
    return [_read(folder, name) for folder, name in zip(found, labels)]


def _printable(name: object) -> str:
    return str(name).encode(errors="backslashreplace").decode()


def _read(folder: pathlib.Path, name: str) -> Run:
    rows = read_run(folder)
    record: dict = {}
    config: dict = {}
    progress = failure = problem = None
    try:
        record = workdir.read_record(folder)
        config = json.loads(json.dumps(flatten(default()) | flatten(record["config"])))
        progress = status.progress(folder)
        failure = status.failure(folder)
    except InputError as error:
        problem = str(error)
    state = glance.state(rows, progress)
    return Run(name, folder, rows, record, config, state, failure if state == "stopped" else None, problem)


def arms(runs: Sequence[Run]) -> list[Arm]:
    """Returns the arms, importance sampling first; runs whose config is not known are arms of their own."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(run.essence, sort_keys=True) if run.config else str(run.folder)
        groups.setdefault(key, []).append(run)
    kinds = (IMPORTANCE, UNIFORM, None)
    ordered = sorted(groups.values(), key=lambda group: kinds.index(group[0].kind))
    names = [group[0].kind or group[0].name for group in ordered]
    unnamed = [Arm(name, tuple(group)) for name, group in zip(names, ordered)]
    return [dataclasses.replace(arm, name=_name(arm, unnamed)) for arm in unnamed]


def _name(arm: Arm, all_arms: list[Arm]) -> str:
    """Returns a name that no other arm has: its kind, and what differs between arms of that kind."""
    alike = [other for other in all_arms if other.name == arm.name]
    if len(alike) == 1:
        return arm.name
    fields = list(differences(alike))[:_FIELDS_IN_NAME]
    names = [", ".join(f"{name.rpartition('.')[2]} {other.essence.get(name)}" for name in fields) for other in alike]
    name = names[alike.index(arm)]
    return f"{arm.name}, {name if names.count(name) == 1 else arm.runs[0].name}"


def differences(some: Sequence[Arm]) -> dict[str, list]:
    """Returns {field: [value in each arm]} of the fields that are not the same in all."""
    essences = [arm.essence for arm in some]
    fields = sorted({*itertools.chain.from_iterable(essences)})
    values = {field: [essence.get(field) for essence in essences] for field in fields}
    return {field: of_arms for field, of_arms in values.items() if any(value != of_arms[0] for value in of_arms)}
