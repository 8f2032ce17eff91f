"""Checkpoints: whole or not there, checked before they are read, written by a thread of their own.

A checkpoint is a folder `step_0000001000` with the arrays (`arrays/`, as Orbax writes them), what else the run knows
(`state.json`), and the CRC-32 of every file (`files.json`). It is made under another name and renamed when it is on the
disk, so that whatever has the name is complete.
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

import numpy as np

from issgd_jax.console import say
from issgd_jax.errors import InputError, brief

_ARRAYS, _STATE, _FILES = "arrays", "state.json", "files.json"
_NAME = re.compile(r"step_(\d{10})")


class DamagedError(Exception):
    """A checkpoint is not what was written: names the file."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """arrays: {name: host array}. state: whatever JSON can hold; `step` is there."""

    arrays: dict[str, np.ndarray]
    state: dict


def write(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint that is there as a whole or not at all. Raises OSError or ValueError if it cannot."""
    making = folder.with_name(f"making_{folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        _check_room(making, checkpoint)
        _checkpointer().save(making.absolute() / _ARRAYS, args=_save_args(checkpoint.arrays))
        _write_file(making / _STATE, json.dumps(checkpoint.state))
        _write_file(making / _FILES, json.dumps(dict(_checksums(making))))
        _to_disk(making)
        making.rename(folder)
        _to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise


def read(folder: pathlib.Path) -> Checkpoint:
    """Reads a checkpoint, after every byte of it has been checked. Raises DamagedError if one is not as written."""
    try:
        expected = json.loads((folder / _FILES).read_text())
        found = {name: crc for name, crc in _checksums(folder) if name != _FILES}
        for name in sorted({*dict(expected), *found}):
            if expected.get(name) != found.get(name):
                raise DamagedError(f"{folder / name} is not as it was written")
        state = json.loads((folder / _STATE).read_text())
        return Checkpoint(_checkpointer().restore(folder.absolute() / _ARRAYS), state)
    except DamagedError:
        raise
    except Exception as error:  # of the disk, of what should be JSON, or of another version of Orbax
        raise DamagedError(f"{folder} cannot be read: {brief(error)}") from error


class Checkpoints:
    """The checkpoints of one run; a context manager, whose end waits for what is still being written.

    One thread writes, so that the run goes on; a disk that is full or broken is told of, and costs the checkpoint.
    """

    def __init__(self, folder: pathlib.Path, *, every_steps: int, keep: int, about: dict | None = None):
        """about: is kept with every checkpoint's state."""
        self._folder, self._every_steps, self._keep, self._about = folder, every_steps, keep, about or {}
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future | None = None
        self.best_error = self._least_error()
        self._remove_rests()

    def is_due(self, step: int) -> bool:
        """Whether the state at the beginning of this step is to be kept."""
        return step > 0 and step % self._every_steps == 0

    def save(self, step: int, make: Callable[[], Checkpoint | None], *, test_error: float | None = None) -> None:
        """Begins to write what `make`, called by the thread, returns, and returns once the one before is written.

        make: returns None if its state is not worth keeping. test_error: of this state, where it was measured.
        """
        self.wait()
        if test_error is not None:
            self.best_error = min(self.best_error, test_error)
        self._writing = self._thread.submit(self._write, step, make, test_error)

    def wait(self) -> None:
        """Returns once nothing is being written."""
        if self._writing:
            self._writing.result()
            self._writing = None

    @property
    def steps(self) -> list[int]:
        """Of the complete checkpoints, ascending."""
        names = (_NAME.fullmatch(path.name) for path in self._folder.glob("step_*"))
        return sorted(int(name[1]) for name in names if name)

    def newest(self, fits: Callable[[dict], str | None] = lambda state: None) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there has never been one.

        Newer ones that are damaged are told of, and put aside under another name. fits: what hinders a state, if
        anything.

        Raises: InputError if there are checkpoints and none can be used.
        """
        for step in reversed(self.steps):
            folder = self._path(step)
            try:
                checkpoint = read(folder)
                if hindrance := fits(checkpoint.state):
                    raise DamagedError(hindrance)
            except DamagedError as error:
                aside = folder.with_name(f"damaged_{folder.name}")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                say(f"the checkpoint of step {step:,} cannot be used ({error}): put aside, the one before is taken")
            else:
                return checkpoint
        if damaged := sorted(self._folder.glob("damaged_*")):
            raise InputError(
                f"none of the {len(damaged)} checkpoint(s) in {self._folder} can be used: mend the disk, or begin anew "
                "with --overwrite"
            )
        return None

    def _write(self, step: int, make: Callable[[], Checkpoint | None], test_error: float | None) -> None:
        if self._path(step).is_dir():
            return
        self._remove_rests()
        try:
            if checkpoint := make():
                more = self._about | {"test_error": test_error}
                write(self._path(step), dataclasses.replace(checkpoint, state=checkpoint.state | more))
                self._remove_old()
        except Exception as error:  # whatever hinders it must not end the run
            say(f"the checkpoint of step {step:,} could not be written, training goes on: {brief(error)}")
            self.best_error = self._least_error()

    def _remove_old(self) -> None:
        best = min(self._errors(), key=lambda pair: pair[1], default=(None, None))[0]
        for step in self.steps[: -self._keep]:
            if step != best:
                shutil.rmtree(self._path(step))

    def _remove_rests(self) -> None:
        """Of writes that did not end; and of those that failed: threads of Orbax may write on for a moment."""
        for rest in self._folder.glob("making_*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _least_error(self) -> float:
        return min((error for _, error in self._errors()), default=math.inf)

    def _errors(self) -> Iterator[tuple[int, float]]:
        """(step, test error) of the checkpoints that have one, ascending."""
        for step in self.steps:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a damaged one is told of when it is read
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
        self._remove_rests()


@functools.cache
def _checkpointer():
    import orbax.checkpoint as ocp

    logging.getLogger("absl").addFilter(_not_of_orbax)
    # Of the processes of a run the first alone writes; the others would not come to a barrier.
    alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
    # Noise does not compress, and the time would be taken from the learner.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, use_zarr3=True, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    """What Orbax logs, tracebacks among it, comes as an exception too."""
    return f"{os.sep}orbax{os.sep}" not in record.pathname


def _check_room(folder: pathlib.Path, checkpoint: Checkpoint) -> None:
    """What a full disk interrupts is told by every thread of the library underneath: better not begun."""
    wanted, free = sum(array.nbytes for array in checkpoint.arrays.values()), shutil.disk_usage(folder).free
    if wanted > free:
        told = f"{os.strerror(errno.ENOSPC)}: {wanted / 1e6:,.1f} MB wanted, {free / 1e6:,.1f} MB free"
        raise OSError(errno.ENOSPC, told, str(folder.parent))


def _save_args(arrays: dict[str, np.ndarray]):
    import orbax.checkpoint as ocp

    return ocp.args.PyTreeSave(arrays)


def _checksums(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """(name, CRC-32) of every file below folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            crc = 0
            with open(path, "rb") as file:
                while block := file.read(2**22):
                    crc = zlib.crc32(block, crc)
            yield path.relative_to(folder).as_posix(), crc


def _write_file(path: pathlib.Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _to_disk(folder: pathlib.Path) -> None:
    """What a folder holds is settled, also if the power fails."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
