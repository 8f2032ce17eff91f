"""Writers of rows of metrics to Weights & Biases, MLflow, and functions of the caller's own. Imports no jax."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Sequence

from issgd_jax import records
from issgd_jax.console import say
from issgd_jax.errors import InputError, brief
from issgd_jax.extras import check_extra
from issgd_jax.files import write_text_atomically, writing
from issgd_jax.run.histograms import EDGES
from issgd_jax.run.workdir import WRITERS_FILE

Write = Callable[[int, dict], None]
# Rows that are tried while a writer takes none: each may take as long as a network does to give up.
_TRIES = 2


class Writer:
    """Passes rows of metrics to a function, whose errors never stop a run.

    Rows are written in their order. One at which the function raises waits, and is tried again before the next and at
    the end; if then a later one is taken, or none at the end, metrics.jsonl alone has it, which is logged.
    """

    def __init__(self, name: str, write: Write):
        """Opens nothing.

        Args:
          name: of the writer, in messages.
          write: `(step, row)`, where row is {name: number, None or list of numbers} without the step.
        """
        self._name, self._write_row = name, write
        self._waiting: list[dict] = []
        self._num_lost = 0

    def add(self, row: dict) -> None:
        """Writes the rows that wait, and one that metrics.jsonl has already."""
        is_first = not self._waiting
        self._waiting.append(row)
        error = self._write_waiting(_TRIES)
        if error and is_first:
            say(
                f"{self._name} cannot write the metrics of step {row['step']:,} yet, training continues: {brief(error)}"
            )

    def close(self) -> None:
        """Writes the rows that wait, and logs how many could not be written."""
        self._write_waiting(len(self._waiting))
        if num_lost := self._num_lost + len(self._waiting):
            say(f"{self._name} lacks {num_lost:,} row(s) of metrics, which metrics.jsonl has")

    def _write_waiting(self, tries: int) -> Exception | None:
        """Writes rows until so many after each other are refused, which wait on; returns the error of the last."""
        rows, self._waiting, error = self._waiting, [], None
        while rows and len(self._waiting) < tries:
            row, *rows = rows
            try:
                self._write_row(row["step"], {name: value for name, value in row.items() if name != "step"})
            except Exception as refusal:  # of the network, of a library, of the caller's own code
                self._waiting.append(row)
                error = refusal
            else:  # it works: what it refused before, it would refuse again
                self._num_lost += len(self._waiting)
                self._waiting, error = [], None
        self._waiting += rows
        return error


@dataclasses.dataclass(frozen=True)
class _Remote:
    """An open run of a library.

    Attributes:
      run_id: by which the library continues it.
      write: see `Writer`.
      close: `(failed)`, ends it.
    """

    run_id: str
    write: Write
    close: Callable[[bool], None]


def _open_wandb(run_id: str | None, workdir: pathlib.Path, fields: dict) -> _Remote:
    import wandb

    run = wandb.init(
        id=run_id, resume="allow", reinit="create_new", dir=workdir, name=workdir.resolve().name, config=fields
    )

    def histogram(name, values):
        return wandb.Histogram(np_histogram=(values, EDGES[name])) if name in EDGES else wandb.Histogram(values)

    def write(step, row):
        known = {name: value for name, value in row.items() if value is not None}
        run.log({k: histogram(k, v) if isinstance(v, list) else v for k, v in known.items()}, step=step)

    return _Remote(run.id, write, lambda failed: run.finish(exit_code=int(failed)))


def _open_mlflow(run_id: str | None, workdir: pathlib.Path, fields: dict) -> _Remote:
    import mlflow

    run = mlflow.start_run(run_id, run_name=None if run_id else workdir.resolve().name, nested=True)
    if run_id is None:
        mlflow.log_params({name: value for name, value in fields.items() if value is not None})

    def write(step, row):
        numbers = {name: float(value) for name, value in row.items() if isinstance(value, int | float)}
        mlflow.log_metrics(numbers, step=step, run_id=run.info.run_id)

    return _Remote(run.info.run_id, write, lambda failed: mlflow.end_run("FAILED" if failed else "FINISHED"))


_OPEN = {"wandb": _open_wandb, "mlflow": _open_mlflow}
_REMEDY = {
    "wandb": "log in with `wandb login`, or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a store that can be reached, such as sqlite:///mlflow.db",
}


def check(names: Sequence[str], functions: Sequence[Write]) -> None:
    """Checks writers before a run.

    Args:
      names: libraries, see `log.writers`.
      functions: of the caller's own.

    Raises:
      MissingExtraError: a library is not installed.
      InputError: a function is none.

    Example:
      >>> check((), [print])
    """
    for name in names:
        check_extra(f"log.writers={name}", name, extra=name)
    for function in functions:
        if not callable(function):
            raise InputError(
                f"writers must be functions (step, row), got {function!r}; libraries are named by --config.log.writers"
            )


@contextlib.contextmanager
def opened(
    names: Sequence[str], functions: Sequence[Write], workdir: pathlib.Path, fields: dict
) -> Iterator[list[Writer]]:
    """Opens the writers of a run while the context lasts; a run that is resumed continues those of the libraries.

    Args:
      names, functions: as in `check`.
      workdir: folder of the run; its name becomes that of the run in a library.
      fields: flat config, which libraries record.

    Raises:
      InputError: a library cannot start, or the workdir cannot be written.
    """
    remotes: dict[str, _Remote] = {}
    failed = True
    try:
        ids = _read_ids(workdir) if names else {}
        for name in names:
            try:
                remotes[name] = _OPEN[name](ids.get(name), workdir, fields)
            except Exception as error:  # of the library
                raise InputError(
                    f"log.writers={name} cannot start ({brief(error)}): {_REMEDY[name]}, or leave it out"
                ) from error
        if names:
            _write_ids(workdir, ids | {name: remote.run_id for name, remote in remotes.items()})
        own = [Writer(getattr(function, "__name__", repr(function)), function) for function in functions]
        yield [*(Writer(name, remote.write) for name, remote in remotes.items()), *own]
        failed = False
    finally:
        for name, remote in remotes.items():
            try:
                remote.close(failed)
            except Exception as error:  # the run itself has ended
                say(f"{name} cannot end its run: {brief(error)}")


def _read_ids(workdir: pathlib.Path) -> dict[str, str]:
    """Returns {library: id} of the runs to continue; those that cannot be read begin again."""
    path = workdir / WRITERS_FILE
    if not path.exists():
        return {}
    try:
        with records.parsing(path, "new ones begin"):
            return {name: str(run_id) for name, run_id in records.read(path).items()}
    except records.MalformedError as error:
        say(f"runs of {', '.join(_OPEN)} are not continued: {error}")
        return {}


def _write_ids(workdir: pathlib.Path, ids: dict[str, str]) -> None:
    path = workdir / WRITERS_FILE
    with writing(path):
        write_text_atomically(path, json.dumps(ids) + "\n")
