"""What a run leaves and shows: metrics.jsonl, TensorBoard events, config.json, a progress bar. Imports no jax."""

import importlib.metadata
import json
import math
import pathlib
import platform
import subprocess
import sys
import warnings

from tqdm import tqdm

from issgd_jax.errors import InputError

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
SCORES_FILE = "scores.npz"
_RUN_FILES = (METRICS_FILE, CONFIG_FILE, SCORES_FILE, "events.out.tfevents.*")
_PACKAGES = ("issgd-jax", "jax", "jaxlib", "flax", "optax", "numpy")


def check_workdir(workdir: str | pathlib.Path, *, overwrite: bool) -> list[pathlib.Path]:
    """The files of an earlier run in workdir; writes nothing.

    Raises: InputError if there are any and overwrite is False, or if workdir cannot be read.
    """
    workdir = pathlib.Path(workdir)
    try:
        old = [file for pattern in _RUN_FILES for file in workdir.glob(pattern)] if workdir.is_dir() else []
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be read ({error.strerror}): choose another --workdir") from error
    if old and not overwrite:
        raise InputError(f"{workdir} holds a run already: choose another --workdir, or replace it with --overwrite")
    return old


def claim_workdir(workdir: str | pathlib.Path, *, overwrite: bool) -> pathlib.Path:
    """Makes the folder of a run, empty of any earlier run's files.

    Raises: InputError if it cannot be written, and as `check_workdir`.
    """
    old, workdir = check_workdir(workdir, overwrite=overwrite), pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for file in old:
            file.unlink()
        (workdir / METRICS_FILE).touch()
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from error
    return workdir


def write_config(workdir: pathlib.Path, config: dict, device_kinds: dict[str, list[str]]) -> None:
    """Writes config.json: the experiment and what is needed to repeat it."""
    record = {
        "config": config,
        "command": sys.argv,
        "versions": versions(),
        "devices": device_kinds,
        "git_commit": _git_commit(),
    }
    (workdir / CONFIG_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """Reads metrics.jsonl, {name: value} a row. A last line cut off by a crash is left out, with a warning."""
    rows = []
    lines = pathlib.Path(path).read_text(errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise InputError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
            warnings.warn(f"{path}: last line {number} is cut off and left out", stacklevel=2)
    return rows


class MetricsWriter:
    """Writes rows of metrics as they are measured; a context manager.

    rows: all rows written so far.
    """

    def __init__(self, workdir: pathlib.Path, *, tensorboard: bool):
        self.rows: list[dict] = []
        # Line-buffered: a row is on its way to the disk once written.
        self._file = open(workdir / METRICS_FILE, "w", buffering=1)  # noqa: SIM115, closed by __exit__
        self._tensorboard = None
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._tensorboard = SummaryWriter(str(workdir), write_to_disk=True)

    def write(self, row: dict) -> None:
        """Appends one row: `step` and numbers. Values that are not finite cannot be JSON and are written as null."""
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self.rows.append(row)
        self._file.write(json.dumps(row) + "\n")
        if self._tensorboard:
            for name, value in row.items():
                if name != "step" and value is not None:
                    self._tensorboard.add_scalar(name, value, row["step"])

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()


class Progress:
    """A progress bar over learner steps: rate, minibatch loss and the variance gain last measured."""

    def __init__(self, steps: int, *, shown: bool, description: str):
        self._bar = tqdm(
            total=steps, desc=description, unit="step", disable=not shown, dynamic_ncols=True, smoothing=0.1
        )
        self._gain = ""

    def step(self, loss: float) -> None:
        """One step is done, with this minibatch loss."""
        self._bar.set_postfix_str(f"loss={loss:.4f}{self._gain}", refresh=False)
        self._bar.update()

    def measured(self, row: dict) -> None:
        """A row of metrics is there."""
        if row.get("variance/gain") is not None:
            self._gain = f", gain={row['variance/gain']:.2f}"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._bar.close()


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a result; None for one that is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Commit of the code that runs, with `-dirty` if it has been changed; None outside a checkout."""
    folder = pathlib.Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
