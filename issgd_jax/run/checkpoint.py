"""Checkpoint on disk: complete or absent, and verified before it is read.

It is a folder `step_0000001000` with the arrays (`arrays/`, in Orbax's format), the rest of the state (`state.json`),
the record of the run (`config.json`), and the CRC-32 of every file (`files.json`). It is written under another name and
renamed when all of it is on the disk.
"""

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

import numpy as np

from issgd_jax.errors import InputError, brief
from issgd_jax.files import (
    list_folder,
    make_folder,
    reading,
    sync_to_disk,
    sync_tree_to_disk,
    write_text_atomically,
    writing,
)
from issgd_jax.run import orbax

_ARRAYS, _STATE, _RECORD, _FILES = "arrays", "state.json", "config.json", "files.json"
# Of a test error that was measured after the checkpoint was complete; beside what is verified.
_LATE_ERROR = "test_error.json"
_NAME = re.compile(r"step_([0-9]{10})")
# Also of what is being written or removed, and of what was found damaged.
_MAKING, _REMOVING, DAMAGED = "making_", "removing_", "damaged_"
_OUR_NAME = re.compile(rf"{_MAKING}step_[0-9]{{10}}(\.[0-9a-f]+)?|({_REMOVING}|{DAMAGED})?step_[0-9]{{10}}")


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


def write(folder: pathlib.Path, checkpoint: Checkpoint, *, check_lock: Callable[[], None] = lambda: None) -> None:
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
    return restore(folder, verify(folder))


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


def restore(folder: pathlib.Path, state: dict) -> Checkpoint:
    """Reads the rest of a checkpoint that `verify` has found intact.

    Args:
      folder: of the checkpoint.
      state: what `verify` has returned.

    Raises:
      InputError: it cannot be read now, which may pass.
    """
    try:
        arrays = orbax.load(folder / _ARRAYS)
        record = _parsed(folder / _RECORD) if (folder / _RECORD).is_file() else None
    except Exception as error:  # of the disk, of too many open files, or of another version of Orbax
        raise InputError(
            f"{folder} is as it was written, but cannot be read now ({brief(error)}). Nothing was changed: run the "
            f"same command again, with the versions that wrote it ({state.get('versions')})"
        ) from error
    return Checkpoint(arrays, state, record)


def test_error_of(folder: pathlib.Path) -> float | None:
    """Returns the test error of a checkpoint; None if it has none, or is damaged, which is reported when it is used.

    Raises:
      InputError: it cannot be read now, which may pass.
    """
    for name in (_STATE, _LATE_ERROR):
        path = folder / name
        with reading(path), contextlib.suppress(DamagedError), _noticing_missing(path):
            error = _parsed(path).get("test_error")
            if isinstance(error, float) and math.isfinite(error):
                return error
    return None


def note_test_error(folder: pathlib.Path, error: float) -> None:
    """Adds a test error to a checkpoint that was written before it was known; raises OSError if it cannot be."""
    write_text_atomically(folder / _LATE_ERROR, json.dumps({"test_error": error}))


def record_in(folder: pathlib.Path) -> dict | None:
    """Returns the record of the run in the newest checkpoint that has a good one; None if there is none.

    Args:
      folder: of the checkpoints.

    Raises:
      InputError: it cannot be read now, which may pass.
    """
    for step in reversed(steps_in(folder)):
        path = path_of(folder, step)
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
        return [name for name in names_in(folder) if not _is_leftover(name) and was_complete(folder / name)]


def leftovers_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of what an interrupted write or removal left; raises InputError if it cannot be read."""
    return [name for name in names_in(folder) if _is_leftover(name)]


def damaged_in(folder: pathlib.Path) -> list[str]:
    """Returns the names of checkpoints that were found damaged; raises InputError if the folder cannot be read."""
    return [name for name in names_in(folder) if name.startswith(DAMAGED)]


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Returns the path of the checkpoint of a step.

    Example:
      >>> path_of(pathlib.Path("checkpoints"), 1000).as_posix()
      'checkpoints/step_0000001000'
    """
    return folder / f"step_{step:010d}"


def was_complete(path: pathlib.Path) -> bool:
    """Returns whether a checkpoint was written completely; False for another's folder with such a name.

    Raises:
      OSError: it cannot be read.
    """
    is_folder = path.is_dir() or path.is_symlink()
    return is_folder and not {_STATE, _FILES}.isdisjoint(list_folder(path))


def put_aside(path: pathlib.Path) -> None:
    """Renames a damaged checkpoint, in place of an earlier one of that step; raises OSError if it cannot be renamed."""
    renamed = path.with_name(f"{DAMAGED}{path.name}")
    shutil.rmtree(renamed, ignore_errors=True)
    path.rename(renamed)


def remove(path: pathlib.Path) -> None:
    """Removes a checkpoint; of a killed process nothing stays that has the name of a checkpoint.

    Raises:
      OSError: it cannot be removed.
    """
    removing = path.with_name(f"{_REMOVING}{path.name.removeprefix(DAMAGED)}")
    shutil.rmtree(removing, ignore_errors=True)
    path = path.rename(removing)
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def clear(folder: pathlib.Path) -> None:
    """Removes all checkpoints in a folder, whole or not, and the folder if nothing else is in it.

    Raises:
      InputError: one cannot be removed.
    """
    for name in written_in(folder):
        with writing(folder / name):
            remove(folder / name)
    for name in leftovers_in(folder):
        shutil.rmtree(folder / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # it is a link, or something else is in it
        folder.rmdir()


def _is_leftover(name: str) -> bool:
    return name.startswith((_MAKING, _REMOVING))


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
