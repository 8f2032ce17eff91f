"""Folder of a run: its lock, the experiment that is there, and whether that can be resumed. Imports no jax."""

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TextIO

from issgd_jax import records
from issgd_jax.cluster.status import STATUS_FILE
from issgd_jax.config import default, flatten
from issgd_jax.errors import FolderLostError, InputError, brief
from issgd_jax.files import LEFTOVER, list_folder, make_folder, reading, reason, write_text_atomically, writing
from issgd_jax.provenance import git_commit, versions
from issgd_jax.run import checkpoint

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
SCORES_FILE = "scores.npz"
HEARTBEAT_FILE = "heartbeat.json"
WATCHDOG_FILE = "watchdog.txt"
NONFINITE_FILE = "nonfinite.json"
WRITERS_FILE = "writers.json"
DAMAGED_METRICS_FILE = "damaged_metrics.jsonl"
CHECKPOINTS = "checkpoints"
_LOCK_FILE = "lock"
_FILES = (
    METRICS_FILE,
    CONFIG_FILE,
    SCORES_FILE,
    HEARTBEAT_FILE,
    WATCHDOG_FILE,
    NONFINITE_FILE,
    DAMAGED_METRICS_FILE,
    WRITERS_FILE,
    STATUS_FILE,
)
_RUN_FILE = re.compile(rf"({'|'.join(map(re.escape, _FILES))}|events\.out\.tfevents\..+)")
_LEFTOVER_FILE = re.compile(rf"({'|'.join(map(re.escape, _FILES))})\.[0-9a-f]+{re.escape(LEFTOVER)}")

# Fields that do not change what a run computes.
HARMLESS = ("log.", "checkpoint.", "data.dir", "watchdog_seconds")
# Those that change it by rounding, or the order in which examples are scored, or where a run would have ended.
_NEARLY_HARMLESS = ("on_nonfinite", "devices.workers", "devices.host_platform_count", "distributed.", "cluster.")


@dataclasses.dataclass(frozen=True)
class Lock:
    """Lock of a run on its folder.

    Attributes:
      folder: of the run.
    """

    folder: pathlib.Path
    _file: TextIO

    def check(self) -> None:
        """Returns if the folder still is the one that was locked; to be called before anything there is changed.

        Raises:
          FolderLostError: the lock in the folder is missing, or that of another run.
          OSError: the folder cannot be read now.
        """
        try:
            is_held = os.path.samestat(os.stat(self.folder / _LOCK_FILE), os.fstat(self._file.fileno()))
        except (FileNotFoundError, NotADirectoryError):
            is_held = False
        if not is_held:
            raise FolderLostError(
                f"{self.folder} was removed, renamed or replaced while this run was using it: the run ends, and "
                "touches nothing that is there now"
            )


@contextlib.contextmanager
def locked(workdir: str | pathlib.Path) -> Iterator[Lock]:
    """Creates the folder if it is missing, and locks it against other programs while the context lasts.

    The lock belongs to the process: however that ends, the folder is free again.

    Raises:
      InputError: another program has the lock, naming it; or the folder cannot be written or locked.
      FolderLostError: another program has just replaced the folder.
    """
    workdir = pathlib.Path(workdir)
    try:
        list_folder(workdir)  # says where a link leads
        make_folder(workdir)
        file = open(workdir / _LOCK_FILE, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written ({reason(error)}): choose another --workdir") from error
    with file:
        try:
            _lock(file)
        except BlockingIOError:
            file.seek(0)
            program = file.read().strip() or "another program"
            raise InputError(
                f"{workdir} is in use by {program}: wait until that ends, or choose another --workdir"
            ) from None
        except OSError as error:  # ENOSYS, ENOTSUP, ENOLCK, ...
            raise InputError(
                f"workdir {workdir} cannot be locked ({reason(error)}), so that two programs could write there at "
                "once: choose a --workdir on a file system that has locks, such as a local disk"
            ) from error
        lock = Lock(workdir, file)
        with writing(workdir):
            lock.check()
        with contextlib.suppress(OSError):  # the owner is only for the message; a full disk must not matter
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield lock


def _lock(file: TextIO) -> None:
    """Locks a file; waits for programs that only look who has locked it. Raises BlockingIOError if one keeps it."""
    for _ in range(20):
        with contextlib.suppress(BlockingIOError):
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        time.sleep(0.01)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def owner(workdir: pathlib.Path) -> str | None:
    """Returns the program that has the folder locked; None if none has."""
    try:
        with open(workdir / _LOCK_FILE) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # for the moment until the file is closed
            except BlockingIOError:
                return file.read().strip() or "another program"
    except OSError:
        return None
    return None


def holds_run(workdir: str | pathlib.Path) -> bool:
    """Returns whether a run has begun there; writes nothing.

    Raises:
      InputError: the folder cannot be read.
    """
    names = _names(pathlib.Path(workdir))
    return METRICS_FILE in names or CONFIG_FILE in names or _has_checkpoints(pathlib.Path(workdir))


def runs_in(folders: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the folders, and in place of one that is no run itself the runs in it, if there are any."""
    found = []
    for folder in folders:
        try:
            inner = [] if holds_run(folder) else _inside(folder)
        except (OSError, InputError):
            inner = []
        found += inner or [folder]
    return found


def check_run(workdir: pathlib.Path) -> None:
    """Raises InputError if a folder holds no run; names one that is in it."""
    if not holds_run(workdir):
        inner = _inside(workdir)
        hint = f"name one of those in it, such as {inner[0]}" if inner else "name the --workdir of one"
        raise InputError(f"{workdir} holds no run: {hint}")


def _inside(folder: pathlib.Path) -> list[pathlib.Path]:
    """Returns the folders of the runs in a folder, sorted."""
    return sorted(file.parent for file in folder.glob(f"*/{METRICS_FILE}"))


def check(workdir: str | pathlib.Path, config: dict, *, overwrite: bool, is_done: bool = False) -> dict | None:
    """Returns the record (config.json) of the run to resume; None if a new one starts. Writes nothing.

    Where config.json is damaged or missing, the record is that of the newest checkpoint.

    Args:
      workdir: folder of the run.
      config: as nested dicts.
      overwrite: whether a run that is there is to be replaced.
      is_done: whether the run that is there has nothing left to do, and needs no checkpoint.

    Raises:
      InputError: the folder is not that of a run, or cannot be read; the run there is of another experiment, naming the
        fields; or it cannot be resumed.
    """
    workdir = pathlib.Path(workdir)
    _check_ours(workdir)
    if overwrite:
        return None
    if not holds_run(workdir):
        if strange := [name for name in _names(workdir) if _RUN_FILE.fullmatch(name)]:
            raise InputError(
                f"{workdir} holds {strange[0]}, but no run: choose another --workdir, or delete it by --overwrite"
            )
        return None
    remedy = "choose another --workdir, or replace the run with --overwrite"
    record = _find_record(workdir, remedy)
    saved = record["config"]
    changed = {name: x for name, x in changes(saved, config).items() if not name.startswith(_NEARLY_HARMLESS)}
    if config["learner"]["lr_schedule"] == "constant":
        changed.pop("steps", None)  # more of the same
    if changed:
        fields = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise InputError(
            f"{workdir} holds a run of another experiment ({fields}): give the old values to go on with it, {remedy}"
        )
    if not is_done and not _ever_saved(workdir) and not _was_before_checkpoints(workdir, _flat(saved)):
        raise InputError(f"{workdir} holds a run already, and no checkpoint to resume from: {remedy}")
    return record


def read_record(workdir: pathlib.Path) -> dict:
    """Returns config.json: `config` in groups, and a list of those that resumed the run.

    Raises:
      MalformedError: it is missing or malformed.
      InputError: it cannot be read now, which may pass.
    """
    path = workdir / CONFIG_FILE
    with records.parsing(path, "repair it"):
        record = records.read(path)
        config = record["config"]
        flatten(config)
        records.whole_number(config.get("steps", 0))
        records.whole_number(config.get("checkpoint", {}).get("every_steps", 0))
        if not isinstance(record.get("resumed", []), list):
            raise TypeError("resumed is no list")
    return record


def _find_record(workdir: pathlib.Path, remedy: str) -> dict:
    """Returns the content of config.json, or else that in the newest checkpoint; InputError if neither can be used."""
    try:
        return read_record(workdir)
    except records.MalformedError as error:  # what only cannot be read now may be good
        if record := checkpoint.record_in(workdir / CHECKPOINTS):
            return record
        raise InputError(
            f"{workdir} holds a run already, but its config cannot be read ({brief(error.__cause__)}): {remedy}"
        ) from error


def _names(workdir: pathlib.Path) -> list[str]:
    """Returns the names in the folder, sorted; [] if there is none. Raises InputError if it cannot be read."""
    try:
        return list_folder(workdir)
    except NotADirectoryError as error:
        raise InputError(f"workdir {workdir} is no folder ({reason(error)}): choose another --workdir") from error
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be read ({reason(error)}): choose another --workdir") from error


def _check_ours(workdir: pathlib.Path) -> None:
    """Raises InputError if what a run would write or delete is there and of another kind."""
    remedy = "this is not the folder of a run: choose another --workdir"
    for name in _names(workdir):
        path = workdir / name
        if (_RUN_FILE.fullmatch(name) or name == _LOCK_FILE) and path.is_dir():
            raise InputError(f"{path} is a folder, where a run has a file: {remedy}")
        if name == CHECKPOINTS and path.is_file():
            raise InputError(f"{path} is a file, where a run has a folder: {remedy}")
    if _has_checkpoints(workdir):
        return
    record = _read_json(workdir / CONFIG_FILE)
    if record is not None and not _is_record(record):
        raise InputError(f"{workdir / CONFIG_FILE} is not the record of a run: {remedy}")
    others = {*_names(workdir / CHECKPOINTS)} - {*checkpoint.leftovers_in(workdir / CHECKPOINTS)}
    if not holds_run(workdir) and (strange := sorted(others)):
        raise InputError(f"{workdir / CHECKPOINTS} holds {strange[0]}, which no run here wrote: {remedy}")


def _read_json(path: pathlib.Path) -> object:
    """Returns the content of a JSON file; None if it is missing or damaged. Raises InputError if it cannot be read."""
    with reading(path):
        try:
            return json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError, RecursionError):
            return None


def _is_record(values: object) -> bool:
    return isinstance(values, dict) and "config" in values


def changes(saved: dict, config: dict) -> dict[str, tuple]:
    """Returns {dotted field: (saved, now)} where two configs differ in what a run computes."""
    old, new = (_flat(values) for values in (saved, config))
    names = sorted(name for name in old.keys() | new.keys() if not name.startswith(HARMLESS))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _flat(config: dict) -> dict:
    """Flattens a config as JSON has it; an earlier version gets the defaults of newer fields."""
    return json.loads(json.dumps(flatten(default()) | flatten(config)))


def _has_checkpoints(workdir: pathlib.Path) -> bool:
    """Returns whether there are checkpoints, whole or damaged."""
    return bool(checkpoint.written_in(workdir / CHECKPOINTS))


def _ever_saved(workdir: pathlib.Path) -> bool:
    return bool(checkpoint.names_in(workdir / CHECKPOINTS))


def _was_before_checkpoints(workdir: pathlib.Path, saved: dict) -> bool:
    """Returns whether a run may have stopped before its first checkpoint; `saved`: its flattened config."""
    last, every_steps = last_step(workdir) or 0, saved["checkpoint.every_steps"]
    # Rows after the second are written only when the first was complete, or could not be.
    return every_steps > 0 and last < saved["steps"] and last <= 2 * every_steps


def last_step(workdir: pathlib.Path) -> int | None:
    """Returns the step of the last row of metrics; None if there is none, or it is cut off.

    Raises:
      InputError: the metrics cannot be read.
    """
    path = workdir / METRICS_FILE
    with reading(path):
        try:
            step = records.parse(path.read_text().splitlines()[-1])["step"]
            return step if isinstance(step, int) else None
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, KeyError, TypeError, IndexError):
            return None


def clear(workdir: pathlib.Path) -> None:
    """Removes an earlier run's files and checkpoints, and no others.

    Raises:
      InputError: one cannot be removed.
    """
    checkpoint.clear(workdir / CHECKPOINTS)  # first: a run without its metrics could no longer be resumed
    for name in _names(workdir):
        if _RUN_FILE.fullmatch(name):
            with writing(workdir / name):
                (workdir / name).unlink()
    clear_leftovers(workdir)


def clear_leftovers(workdir: pathlib.Path) -> None:
    """Removes incomplete files of a run that was killed."""
    for name in _names(workdir):
        if _LEFTOVER_FILE.fullmatch(name):
            with writing(workdir / name):
                (workdir / name).unlink()


def write_record(
    workdir: pathlib.Path, config: dict, devices: dict[str, list[str]], resumed: dict | None = None
) -> dict:
    """Writes and returns config.json: config, command, versions, devices and commit, and those of every resumption.

    Args:
      workdir: folder of the run.
      config: as nested dicts.
      devices: kinds of learner and worker devices.
      resumed: the record of the run that is resumed.
    """
    now = {"command": sys.argv, "versions": versions(), "devices": devices, "git_commit": git_commit()}
    record = {"config": config, **now}
    if resumed:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = resumed | {"config": config, "resumed": [*resumed.get("resumed", []), {"at": at, **now}]}
    with writing(workdir / CONFIG_FILE):
        write_text_atomically(workdir / CONFIG_FILE, json.dumps(record, indent=2) + "\n")
    return record
