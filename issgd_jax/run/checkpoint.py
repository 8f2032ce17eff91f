"""Checkpoints: complete or absent, verified before they are read, written by a thread of their own.

A checkpoint is a folder `step_0000001000` with the arrays (`arrays/`, in Orbax's format), the rest of the state
(`state.json`), and the CRC-32 of every file (`files.json`). It is written under another name and renamed when it is on
the disk.
"""

import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import json
import logging
import math
import os
import pathlib
import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from issgd_jax.console import say
from issgd_jax.errors import InputError, brief
from issgd_jax.files import sync_to_disk
from issgd_jax.paths import plainly_named

_ARRAYS, _STATE, _FILES = "arrays", "state.json", "files.json"
_NAME = re.compile(r"step_(\d{10})")


class DamagedError(Exception):
    """A checkpoint differs from what was written; names the file."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
      arrays: {name: host array}.
      state: whatever JSON can hold; `step` is there.
    """

    arrays: dict[str, np.ndarray]
    state: dict


class Readable(Protocol):
    """A state that can become a checkpoint, such as `run_state.Snapshot`."""

    step: int

    def read(self) -> Checkpoint | None:
        """Returns the checkpoint, perhaps after waiting; None if the state must not be kept."""


def write(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint, completely or not at all.

    Raises:
      OSError, ValueError: it cannot be written.
    """
    partial = folder.with_name(f"making_{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        _check_space(partial, checkpoint)
        with plainly_named(partial) as plain:
            _checkpointer().save(plain / _ARRAYS, args=_save_args(checkpoint.arrays))
        _write_synced(partial / _STATE, json.dumps(checkpoint.state))
        _write_synced(partial / _FILES, json.dumps(dict(_checksums(partial))))
        sync_to_disk(partial)
        partial.rename(folder)
        sync_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(folder: pathlib.Path) -> Checkpoint:
    """Reads a checkpoint after verifying every byte.

    Raises:
      DamagedError: a file differs from what was written.
    """
    state = verify(folder)
    with _noticing_damage(folder), plainly_named(folder) as plain:
        return Checkpoint(_checkpointer().restore(plain / _ARRAYS), state)


def verify(folder: pathlib.Path) -> dict:
    """Verifies every byte of a checkpoint, and returns its state without the arrays.

    Raises:
      DamagedError: a file differs from what was written.
    """
    with _noticing_damage(folder):
        expected = json.loads((folder / _FILES).read_text())
        checksums = {name: crc for name, crc in _checksums(folder) if name != _FILES}
        for name in sorted({*dict(expected), *checksums}):
            if expected.get(name) != checksums.get(name):
                raise DamagedError(f"{folder / name} differs from what was written")
        return json.loads((folder / _STATE).read_text())


@contextlib.contextmanager
def _noticing_damage(folder: pathlib.Path) -> Iterator[None]:
    """Turns any error into a DamagedError."""
    try:
        yield
    except DamagedError:
        raise
    except Exception as error:  # of the disk, of what should be JSON, or of another version of Orbax
        raise DamagedError(f"{folder} cannot be read: {brief(error)}") from error


class Checkpoints:
    """Checkpoints of one run; a context manager, whose exit waits for the one that is being written.

    One thread writes, so that the run continues; a full or broken disk costs the checkpoint, with a message.
    """

    def __init__(self, folder: pathlib.Path, *, every_steps: int, keep: int, about: dict | None = None):
        """Removes what an interrupted write has left.

        Args:
          folder: of the checkpoints.
          every_steps: see `is_due`.
          keep: how many of the newest are kept, beside the best by test error.
          about: saved with the state of every checkpoint.
        """
        self._folder, self._every_steps, self._keep, self._about = folder, every_steps, keep, about or {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future | None = None
        self.best_error = self._least_error()
        self._remove_partial()

    def is_intact(self, step: int, obstacle: Callable[[dict], str | None]) -> bool:
        """Returns whether there is a checkpoint of this step that `newest` would return; changes nothing."""
        try:
            return not obstacle(verify(self._path(step)))
        except DamagedError:
            return False

    def is_due(self, step: int) -> bool:
        """Returns whether the state at the beginning of this step is to be saved."""
        return step > 0 and step % self._every_steps == 0

    def save(self, snapshot: Readable, *, test_error: float | None = None) -> None:
        """Starts to write a snapshot, once the one before is written.

        Args:
          snapshot: the thread calls its `read`.
          test_error: of this state, where it was measured.
        """
        self.wait()
        if test_error is not None:
            self.best_error = min(self.best_error, test_error)
        self._writing = self._thread.submit(self._write, snapshot, test_error)

    def wait(self) -> None:
        """Returns once nothing is being written."""
        if self._writing:
            self._writing.result()
            self._writing = None

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self._folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def newest(self, obstacle: Callable[[dict], str | None] = lambda state: None) -> Checkpoint | None:
        """Returns the newest checkpoint that is intact; None if there has never been one.

        Damaged ones are logged and renamed.

        Args:
          obstacle: returns why a state cannot be used; None if it can.

        Raises:
          InputError: there are checkpoints and none can be used.
        """
        for step in reversed(self.steps):
            folder = self._path(step)
            try:
                checkpoint = read(folder)
                if reason := obstacle(checkpoint.state):
                    raise DamagedError(reason)
            except DamagedError as error:
                renamed = folder.with_name(f"damaged_{folder.name}")
                shutil.rmtree(renamed, ignore_errors=True)
                folder.rename(renamed)
                say(f"the checkpoint of step {step:,} cannot be used ({error}): it is renamed, and the one before used")
            else:
                return checkpoint
        if damaged := sorted(self._folder.glob("damaged_*")):
            raise InputError(
                f"none of the {len(damaged)} checkpoint(s) in {self._folder} can be used: repair the disk, or start "
                "again with --overwrite"
            )
        return None

    def _write(self, snapshot: Readable, test_error: float | None) -> None:
        path = self._path(snapshot.step)
        if path.is_dir():
            return
        self._remove_partial()
        try:
            if checkpoint := snapshot.read():
                state = checkpoint.state | self._about | {"test_error": test_error}
                write(path, dataclasses.replace(checkpoint, state=state))
                self._remove_old()
        except Exception as error:  # no failure to save may end the run
            say(f"the checkpoint of step {snapshot.step:,} could not be written, training continues: {brief(error)}")
            self.best_error = self._least_error()

    def _remove_old(self) -> None:
        best = min(self._errors(), key=lambda pair: pair[1], default=(None, None))[0]
        for step in self.steps[: -self._keep]:
            if step != best:
                shutil.rmtree(self._path(step))

    def _remove_partial(self) -> None:
        """Removes what interrupted and failed writes left: threads of Orbax may write for a moment after an error."""
        for partial in self._folder.glob("making_*"):
            shutil.rmtree(partial, ignore_errors=True)

    def _least_error(self) -> float:
        return min((error for _, error in self._errors()), default=math.inf)

    def _errors(self) -> Iterator[tuple[int, float]]:
        """Yields (step, test error) of the checkpoints that have one, ascending."""
        for step in self.steps:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # damage is reported when it is read
                error = json.loads((self._path(step) / _STATE).read_text()).get("test_error")
                if isinstance(error, float):
                    yield step, error

    def _path(self, step: int) -> pathlib.Path:
        return self._folder / f"step_{step:010d}"

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.wait()
        self._thread.shutdown()
        self._remove_partial()


@functools.cache
def _checkpointer():
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_is_not_orbax)
    # Of the processes of a run the first alone writes; the others would never reach a barrier.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    # Noise does not compress, and the time would be taken from the learner.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _is_not_orbax(record: logging.LogRecord) -> bool:
    """Drops Orbax's log, tracebacks included: its errors arrive as exceptions too."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _check_space(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Raises OSError if the disk is too full: interrupted, every thread of Orbax would print a traceback."""
    needed, free = sum(array.nbytes for array in checkpoint.arrays.values()), shutil.disk_usage(folder).free
    if needed > free:
        message = f"{os.strerror(errno.ENOSPC)}: {needed / 1e6:,.1f} MB needed, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, message, str(folder.parent))


def _save_args(arrays: dict[str, np.ndarray]):
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeSave(arrays)


def _checksums(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yields (name, CRC-32) of every file below folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(2**22):
                    crc = zlib.crc32(block, crc)
            yield path.relative_to(folder).as_posix(), crc


def _write_synced(path: pathlib.Path, text: str) -> None:
    path.write_text(text)
    sync_to_disk(path)
