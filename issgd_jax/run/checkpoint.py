"""Checkpoints: complete or absent, verified before they are read, written by a thread of their own.

A checkpoint is a folder `step_0000001000` with the arrays (`arrays/`, in Orbax's format), the rest of the state
(`state.json`), the record of the run (`config.json`), and the CRC-32 of every file (`files.json`). It is written under
another name and renamed when all of it is on the disk.
"""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import re
import shutil
import uuid
import zlib
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from issgd_jax.console import say
from issgd_jax.errors import FolderLostError, InputError, brief
from issgd_jax.files import list_folder, make_folder, reading, sync_to_disk, sync_tree_to_disk, writing
from issgd_jax.run import orbax

_ARRAYS, _STATE, _RECORD, _FILES = "arrays", "state.json", "config.json", "files.json"
_NAME = re.compile(r"step_([0-9]{10})")
# Also of what is being written or removed, and of what was found damaged.
_MAKING, _REMOVING, _DAMAGED = "making_", "removing_", "damaged_"
_OUR_NAME = re.compile(rf"{_MAKING}step_[0-9]{{10}}(\.[0-9a-f]+)?|({_REMOVING}|{_DAMAGED})?step_[0-9]{{10}}")


class DamagedError(Exception):
    """A file of a checkpoint differs from what was written, or is missing; names it. Never an error of reading."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
      arrays: {name: host array}.
      state: whatever JSON can hold; `step` is there.
      record: content of the run's config.json; None: an earlier version wrote the checkpoint.
    """

    arrays: dict[str, np.ndarray]
    state: dict
    record: dict | None = None


class Readable(Protocol):
    """A state that can become a checkpoint, such as `run_state.Snapshot`."""

    step: int

    def read(self) -> Checkpoint | None:
        """Returns the checkpoint, perhaps after waiting; None if the state must not be kept."""


def _unlocked() -> None:
    """Checks no lock."""


def write(folder: pathlib.Path, checkpoint: Checkpoint, *, check_lock: Callable[[], None] = _unlocked) -> None:
    """Writes a checkpoint, completely or not at all: also if the power fails.

    Args:
      folder: the name it gets; created with the folder that it is in, but not with that one's.
      checkpoint: its content.
      check_lock: called before anything is written, renamed or removed; raises if that must not be.

    Raises:
      OSError, ValueError: it cannot be written.
    """
    # A name of its own: Orbax creates the folders above it too, even if they are another run's by now.
    partial = folder.with_name(f"{_MAKING}{folder.name}.{uuid.uuid4().hex[:12]}")
    check_lock()
    try:
        make_folder(folder.parent, parents=False)
        partial.mkdir()
        orbax.save(partial / _ARRAYS, checkpoint.arrays)
        (partial / _STATE).write_text(json.dumps(checkpoint.state))
        if checkpoint.record is not None:
            (partial / _RECORD).write_text(json.dumps(checkpoint.record))
        (partial / _FILES).write_text(json.dumps(dict(_checksums(partial))))
        sync_tree_to_disk(partial)
        check_lock()
        partial.rename(folder)
        sync_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def read(folder: pathlib.Path) -> Checkpoint:
    """Reads a checkpoint after verifying every byte.

    Raises:
      DamagedError: a file differs from what was written, or is missing.
      InputError: it cannot be read now, which may pass.
    """
    return _restore(folder, verify(folder))


def verify(folder: pathlib.Path) -> dict:
    """Verifies every byte of a checkpoint, and returns its state without the arrays.

    Raises:
      DamagedError: a file differs from what was written, or is missing.
      InputError: it cannot be read now, which may pass.
    """
    with reading(folder):
        os.listdir(folder)  # of a folder that is gone nothing is known to be damaged
        expected = _expected(folder)
        for name in sorted(expected):
            with _noticing_missing(folder / name):
                crc = _checksum(folder / name)
            if crc != expected[name]:
                raise DamagedError(f"{folder / name} differs from what was written")
        return _parsed(folder / _STATE)


def record_in(folder: pathlib.Path) -> dict | None:
    """Returns the record of the run in the newest checkpoint that has a good one; None if there is none.

    Args:
      folder: of the checkpoints.

    Raises:
      InputError: it cannot be read now, which may pass.
    """
    for step in reversed(steps_in(folder)):
        path = _path(folder, step)
        with reading(path), contextlib.suppress(DamagedError):
            expected = _expected(path)
            if _RECORD in expected:
                with _noticing_missing(path / _RECORD):
                    if _checksum(path / _RECORD) == expected[_RECORD]:
                        return _parsed(path / _RECORD)
    return None


def steps_in(folder: pathlib.Path) -> list[int]:
    """Returns the steps of the complete checkpoints in a folder, ascending; raises InputError if it cannot be read."""
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names_in(folder)) if match)


def names_in(folder: pathlib.Path) -> list[str]:
    """Returns the names in a folder that are of checkpoints, whole or not; raises InputError if it cannot be read."""
    with reading(folder):
        return [name for name in list_folder(folder) if _OUR_NAME.fullmatch(name)]


def written_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of checkpoints that were once complete, and not of others' folders with such a name.

    Raises:
      InputError: the folder cannot be read.
    """
    with reading(folder):
        return [name for name in names_in(folder) if not _is_leftover(name) and _was_complete(folder / name)]


def leftovers_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of what an interrupted write or removal left; raises InputError if it cannot be read."""
    return [name for name in names_in(folder) if _is_leftover(name)]


def _is_leftover(name: str) -> bool:
    return name.startswith((_MAKING, _REMOVING))


def _was_complete(path: pathlib.Path) -> bool:
    is_folder = path.is_dir() or path.is_symlink()
    return is_folder and not {_STATE, _FILES}.isdisjoint(list_folder(path))


def clear(folder: pathlib.Path) -> None:
    """Removes all checkpoints in a folder, whole or not, and the folder if nothing else is in it.

    Raises:
      InputError: one cannot be removed.
    """
    for name in written_in(folder):
        with writing(folder / name):
            _remove(folder / name)
    for name in leftovers_in(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is a link, or something else is in it
        folder.rmdir()


def _path(folder: pathlib.Path, step: int) -> pathlib.Path:
    return folder / f"step_{step:010d}"


def _remove(path: pathlib.Path) -> None:
    """Removes a checkpoint; of a killed process nothing stays that has the name of a checkpoint."""
    removing = path.with_name(f"{_REMOVING}{path.name.removeprefix(_DAMAGED)}")
    shutil.rmtree(removing, ignore_errors=True)
    path = path.rename(removing)
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _expected(folder: pathlib.Path) -> dict[str, int]:
    """Returns {name: CRC-32} of the files that were written."""
    with _noticing_missing(folder / _FILES):
        expected = _parsed(folder / _FILES)
    if _STATE not in expected or not any(name.startswith(f"{_ARRAYS}/") for name in expected):
        raise DamagedError(f"{folder / _FILES} differs from what was written")
    return expected


def _parsed(path: pathlib.Path) -> dict:
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DamagedError(f"{path} differs from what was written")
    return values


@contextlib.contextmanager
def _noticing_missing(path: pathlib.Path) -> Iterator[None]:
    """Turns the errors of a file that is not there, or no file, into a DamagedError."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if path.is_symlink():  # to a disk that is not mounted now
            raise
        raise DamagedError(f"{path} is missing") from error


def _restore(folder: pathlib.Path, state: dict) -> Checkpoint:
    """Reads a verified checkpoint."""
    try:
        arrays = orbax.load(folder / _ARRAYS)
        record = _parsed(folder / _RECORD) if (folder / _RECORD).is_file() else None
    except Exception as error:  # of the disk, of too many open files, or of another version of Orbax
        raise InputError(
            f"{folder} is as it was written, but cannot be read now ({brief(error)}). Nothing was changed: run the "
            f"same command again, with the versions that wrote it ({state.get('versions')})"
        ) from error
    return Checkpoint(arrays, state, record)


class Checkpoints:
    """Checkpoints of one run; a context manager, whose exit waits for the one that is being written.

    One thread writes, so that the run continues; a full or broken disk costs the checkpoint, with a message. Only of
    the last one it is an error.

    Attributes:
      best_error: the least test error of those there are; inf without one.
      record: content of config.json, saved with every checkpoint; None: not yet known.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        every_steps: int,
        keep: int,
        about: dict | None = None,
        check_lock: Callable[[], None] = _unlocked,
    ):
        """Removes what an interrupted write has left.

        Args:
          folder: of the checkpoints.
          every_steps: see `is_due`.
          keep: how many of the newest are kept, beside the best by test error.
          about: saved with the state of every checkpoint.
          check_lock: called before anything is written, renamed or removed; a FolderLostError of it is raised by the
            next call of `save` or `wait`.

        Raises:
          InputError: the folder cannot be read.
        """
        self._folder, self._every_steps, self._keep, self._about = folder, every_steps, keep, about or {}
        self._check_lock = check_lock
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._writing: concurrent.futures.Future | None = None
        self._test_errors = dict(_test_errors(folder))
        self.best_error = self._least_error()
        self.record: dict | None = None
        self._remove_partial()

    def is_intact(self, step: int) -> bool:
        """Returns whether there is a checkpoint of this step that `newest` would return; changes nothing.

        Raises:
          InputError: it cannot be read now.
        """
        try:
            return step in self.steps and bool(verify(self._path(step)))
        except DamagedError:
            return False

    def is_due(self, step: int) -> bool:
        """Returns whether the state at the beginning of this step is to be saved."""
        return step > 0 and step % self._every_steps == 0

    def save(self, snapshot: Readable, *, test_error: float | None = None, is_last: bool = False) -> None:
        """Starts to write a snapshot, once the one before is written.

        Args:
          snapshot: the thread calls its `read`.
          test_error: of this state, where it was measured.
          is_last: whether no other follows, so that it is an error if this one cannot be written.

        Raises:
          FolderLostError: the folder is no longer that of this run.
        """
        self.wait()
        if test_error is not None:
            self.best_error = min(self.best_error, test_error)
        self._writing = self._thread.submit(self._write, snapshot, test_error, is_last)

    def wait(self) -> None:
        """Returns once nothing is being written.

        Raises:
          FolderLostError: the folder is no longer that of this run.
          InputError: the last checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing:
            writing.result()

    @property
    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending."""
        return steps_in(self._folder)

    def newest(self, obstacle: Callable[[dict], str | None] = lambda state: None) -> Checkpoint | None:
        """Returns the newest checkpoint that is intact, or one of the `keep` newest without an obstacle; None if none.

        Damaged ones are logged and renamed. What cannot be read is not damaged: it ends the run and changes nothing.

        Args:
          obstacle: returns why one before had better be used, if one has no obstacle; else None. May raise InputError.

        Raises:
          InputError: a checkpoint cannot be read now, or all are damaged.
        """
        hindered: list[tuple[pathlib.Path, dict]] = []
        for step in reversed(self.steps):
            path = self._path(step)
            try:
                state = verify(path)
            except DamagedError as error:
                self._put_aside(step)
                say(f"the checkpoint of step {step:,} cannot be used ({error}): it is renamed, and the one before used")
                continue
            why = obstacle(state)
            if state.get("step") != step:
                raise InputError(
                    f"{path} holds the state of step {state.get('step')!r}: give the folder its own name, or remove it"
                )
            if why:
                say(f"the checkpoint of step {step:,} cannot be used ({why}): the one before is tried")
                hindered.append((path, state))
                if len(hindered) == self._keep:  # from one still older too many steps would be done again
                    break
            else:
                return _restore(path, state)
        if hindered:
            path, state = hindered[0]
            say(f"nor can those before it: the newest is used all the same, of step {state['step']:,}")
            return _restore(path, state)
        if damaged := [name for name in names_in(self._folder) if name.startswith(_DAMAGED)]:
            raise InputError(
                f"none of the {len(damaged)} checkpoint(s) in {self._folder} can be used, as their files differ from "
                f"what was written: replace one by a copy without {_DAMAGED!r} in its name, or choose another "
                "--workdir; --overwrite deletes them all"
            )
        return None

    def _put_aside(self, step: int) -> None:
        path = self._path(step)
        with writing(path):
            self._check_lock()
            renamed = path.with_name(f"{_DAMAGED}{path.name}")
            shutil.rmtree(renamed, ignore_errors=True)
            path.rename(renamed)
        self._test_errors.pop(step, None)

    def _write(self, snapshot: Readable, test_error: float | None, is_last: bool) -> None:
        path = self._path(snapshot.step)
        if path.is_dir():
            return
        try:
            self._remove_partial()
            if not (checkpoint := snapshot.read()):
                return
            state = checkpoint.state | self._about | {"test_error": test_error}
            complete = dataclasses.replace(checkpoint, state=state, record=self.record)
            write(path, complete, check_lock=self._check_lock)
        except FolderLostError:
            raise
        except Exception as error:  # no failure to save may end the run before its end
            self.best_error = self._least_error()
            if is_last:
                raise InputError(self._loss(snapshot.step, error)) from error
            say(f"the checkpoint of step {snapshot.step:,} could not be written, training continues: {brief(error)}")
            return
        if test_error is not None:
            self._test_errors[snapshot.step] = test_error
        try:
            self._remove_old()
        except FolderLostError:
            raise
        except (InputError, OSError) as error:
            say(f"old checkpoints cannot be removed, training continues: {error}")

    def _loss(self, step: int, error: Exception) -> str:
        """Returns what is lost where the last checkpoint cannot be written."""
        steps = self.steps
        again = f"repeats the steps from {steps[-1]:,} on" if steps else "with --overwrite starts again"
        return (
            f"the last checkpoint, of step {step:,}, could not be written, so that the run's last parameters are not "
            f"saved ({brief(error)}): make room in {self._folder}, and the same command {again}"
        )

    def _remove_old(self) -> None:
        best = min(self._test_errors, key=self._test_errors.get, default=None)
        for step in self.steps[: -self._keep]:
            if step != best and _was_complete(self._path(step)):
                self._check_lock()
                _remove(self._path(step))
                self._test_errors.pop(step, None)

    def _remove_partial(self) -> None:
        """Removes what interrupted and failed writes left: threads of Orbax may write for a moment after an error."""
        for name in leftovers_in(self._folder):
            with writing(self._folder):
                self._check_lock()
            shutil.rmtree(self._folder / name, ignore_errors=True)

    def _least_error(self) -> float:
        return min(self._test_errors.values(), default=math.inf)

    def _path(self, step: int) -> pathlib.Path:
        return _path(self._folder, step)

    def __enter__(self):
        return self

    def __exit__(self, error_type, *error):
        try:
            self.wait()
        except InputError:
            if error_type is None:  # else the error that is there already tells why
                raise
        finally:
            self._thread.shutdown()
            with contextlib.suppress(InputError):
                self._remove_partial()


def _test_errors(folder: pathlib.Path) -> Iterator[tuple[int, float]]:
    """Yields (step, test error) of the checkpoints that have one, ascending."""
    for step in steps_in(folder):
        path = _path(folder, step) / _STATE
        # Damage is reported when the checkpoint is used.
        with reading(path), contextlib.suppress(DamagedError), _noticing_missing(path):
            error = _parsed(path).get("test_error")
            if isinstance(error, float):
                yield step, error


def _checksums(folder: pathlib.Path) -> Iterator[tuple[str, int]]:
    """Yields (name, CRC-32) of every file below folder."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), _checksum(path)


def _checksum(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while block := file.read(2**22):
            crc = zlib.crc32(block, crc)
    return crc
