"""Rows of metrics in metrics.jsonl, copied to TensorBoard events and other writers. Imports no jax."""

import functools
import json
import math
import os
import pathlib
import shutil
import warnings
from collections.abc import Callable, Sequence

from issgd_jax import records
from issgd_jax.console import say
from issgd_jax.errors import FolderLostError, InputError
from issgd_jax.files import reading, reason, replace_atomically, sync_to_disk, writing
from issgd_jax.paths import local_path
from issgd_jax.run.events import Events
from issgd_jax.run.histograms import EDGES, HARDEST
from issgd_jax.run.workdir import DAMAGED_METRICS_FILE, METRICS_FILE
from issgd_jax.run.writers import Writer

_REMEDY = "repair or remove that line, or choose another run"
# Numbers of which figures and statistics can be made; those that a run measures are float32.
_LARGEST = 1e100
# Columns of whole numbers.
_LISTS = {HARDEST, *EDGES}


def read_metrics(path: str | pathlib.Path) -> list[dict]:
    """Reads metrics.jsonl.

    Args:
      path: of the file.

    Returns:
      {name: value} for each row. A last line that a crash has cut off is skipped, with a warning.

    Raises:
      InputError: the file cannot be read, any other line is not a row, or steps do not increase.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
      >>> _ = path.write_text('{"step": 0, "train/loss": 2.3}\\n')
      >>> read_metrics(path)
      [{'step': 0, 'train/loss': 2.3}]
    """
    rows: list[dict] = []
    path = local_path(path, "path of metrics")
    with records.parsing(path, _REMEDY):
        *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate([*lines, last] if last else lines, start=1):
        if row := parse_row(line):
            if rows and row["step"] <= rows[-1]["step"]:
                raise InputError(
                    f"{path} line {number} is not a row of metrics that can come next, as step {row['step']} follows "
                    f"{rows[-1]['step']}: {_REMEDY}"
                )
            rows.append(row)
        elif number <= len(lines):
            raise InputError(f"{path} line {number} is not a row of metrics: {line[:60]!r}: {_REMEDY}")
        else:
            warnings.warn(f"{path}: last line {number} is cut off and skipped", stacklevel=2)
    return rows


def read_run(workdir: str | pathlib.Path) -> list[dict]:
    """Reads the rows of a run, finished or running: a last line that is incomplete is skipped.

    Args:
      workdir: folder of the run.

    Raises:
      InputError: the folder holds no run, or a run without a row.

    Example:
      >>> read_run("runs/none")
      Traceback (most recent call last):
      ...
      issgd_jax.errors.InputError: runs/none holds no run (no metrics.jsonl): name the --workdir of one
    """
    path = local_path(workdir, "workdir") / METRICS_FILE
    with reading(path):
        if not path.is_file():
            inner = sorted(path.parent.glob(f"*/{METRICS_FILE}"))
            hint = f"did you mean {inner[0].parent}?" if inner else "name the --workdir of one"
            raise InputError(f"{path.parent} holds no run (no {METRICS_FILE}): {hint}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = read_metrics(path)
    if not rows:
        raise InputError(f"{workdir} has no row of metrics yet: wait for the first measurement")
    return rows


def parse_row(line: str | bytes) -> dict | None:
    """Returns a row: `step`, an int >= 0, numbers or null, and lists of examples and counts; None if the line is none.

    Example:
      >>> parse_row('{"step": 0, "train/loss": 2.3}'), parse_row('{"step": 0, "tra')
      ({'step': 0, 'train/loss': 2.3}, None)
    """
    try:
        row = records.parse(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or row["step"] < 0:
        return None
    return row if all(_is_value(name, value) for name, value in row.items()) else None


def _is_value(name: str, value) -> bool:
    if name in _LISTS:
        return type(value) is list and all(type(x) is int and 0 <= x <= _LARGEST for x in value)
    return value is None or (type(value) in (int, float) and abs(value) <= _LARGEST)


def missing_rows(path: pathlib.Path, position: int) -> str | None:
    """Says which of the rows in the first `position` bytes of metrics.jsonl are lost; None: none.

    Raises:
      InputError: the file cannot be read.
    """
    content = _content(path)[:position]
    if len(content) < position:
        return f"{path} has {len(content):,} bytes and had {position:,}"
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    damaged = [number for number, line in enumerate(lines, start=1) if parse_row(line) is None]
    return f"{path} line {damaged[0]} is not a row of metrics" if damaged else None


def _content(path: pathlib.Path) -> bytes:
    with reading(path):
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return b""


class MetricsWriter:
    """Writes rows of metrics as they are measured; a context manager.

    Rows that a full or broken disk refuses are logged, kept, and written with the next that can be. If the file is
    removed or spoiled while the run writes it, the rows that are left are kept, with a message.

    Attributes:
      path: of metrics.jsonl.
      last: the last row.
      position: bytes of all rows so far.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        tensorboard: bool,
        picture: Callable[[list[int]], bytes] | None = None,
        writers: Sequence[Writer] = (),
        position: int = 0,
        check_lock: Callable[[], None] = lambda: None,
    ):
        """Opens the files.

        Args:
          workdir: folder of the run.
          tensorboard: whether TensorBoard events are written too.
          picture: returns examples as PNG, for the events; None: none are shown.
          writers: others that get every row.
          position: bytes of the rows of a run that is resumed; what comes after them is cut off. Where some are lost,
            the file as it is gets another name, and the others are kept.
          check_lock: called before anything is written; raises FolderLostError if the folder is no longer the run's.

        Raises:
          InputError: the files cannot be read or written.
        """
        self.path, self._waiting, self._check_lock = workdir / METRICS_FILE, b"", check_lock
        with writing(self.path):
            self._check_lock()
            self._open(position)
        rows = read_metrics(self.path)
        self.last: dict | None = rows[-1] if rows else None
        read_rows = functools.partial(read_metrics, self.path)
        self._events = Events(workdir, read_rows, picture) if tensorboard else None
        self._writers = writers

    @property
    def position(self) -> int:
        return self._size + len(self._waiting)

    def write(self, row: dict) -> None:
        """Appends one row: `step` and numbers. JSON has no value for numbers that are not finite: they become null.

        Raises:
          FolderLostError: the folder is no longer that of this run.
        """
        self.last = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._waiting += json.dumps(self.last).encode() + b"\n"
        try:
            self._write_waiting()
        except FolderLostError:
            raise
        except (OSError, InputError) as error:
            say(f"the metrics of step {row['step']:,} cannot be written yet, training continues: {error}")
        if self._events:
            self._events.add(self.last)
        for writer in self._writers:
            writer.add(self.last)

    def _open(self, position: int) -> None:
        """Opens the file with its rows in the first `position` bytes, and nothing else, in it."""
        if why := missing_rows(self.path, position):
            content = _content(self.path)[:position]
            kept = b"".join(line + b"\n" for line in content.split(b"\n")[:-1] if parse_row(line))
            if content:  # a copy first: of a program that is killed here the rows are still where they were
                with replace_atomically(self.path.with_name(DAMAGED_METRICS_FILE)) as copy:
                    shutil.copyfile(self.path, copy)
                why += f"; it is copied to {DAMAGED_METRICS_FILE}"
            say(f"rows of metrics are lost, the run goes on without them: {why}")
            with replace_atomically(self.path) as new:
                new.write_bytes(kept)
            position = len(kept)
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115, closed by __exit__
        self._file.truncate(position)
        self._size = position
        sync_to_disk(self.path.parent)

    def _write_waiting(self) -> None:
        """Writes whole lines or nothing: what a full disk took of a line is cut off again."""
        self._check_lock()
        if self._is_spoiled():
            spoiled = self._file
            self._open(self._size)
            spoiled.close()
        self._file.truncate(self._size)
        taken = 0
        try:
            while taken < len(self._waiting):
                taken += self._file.write(self._waiting[taken:])
        finally:
            whole = self._waiting.rfind(b"\n", 0, taken) + 1
            self._waiting = self._waiting[whole:]
            self._size += whole
            if taken > whole:
                self._file.truncate(self._size)

    def _is_spoiled(self) -> bool:
        """Returns whether the file was removed, replaced or cut off by others."""
        try:
            there, ours = os.stat(self.path), os.fstat(self._file.fileno())
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, ours) or there.st_size < self._size

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        try:
            self._write_waiting()
            sync_to_disk(self.path)
        except FolderLostError:
            if error_type is None:  # else the error that is there already tells why
                raise
        except (OSError, InputError) as problem:
            message = f"{self.path} lacks the last {len(self._waiting)} bytes of metrics ({reason(problem)}): make room"
            if error_type is None:
                raise InputError(message) from problem
            say(message)
        finally:
            self._file.close()
            if self._events:
                self._events.close()
            for writer in self._writers:
                writer.close()
