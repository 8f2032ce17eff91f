"""Folder of a run: its lock, the experiment that is there, and whether that can be resumed. Imports no jax."""

import contextlib
import datetime
import fcntl
import json
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator

from issgd_jax import records
from issgd_jax.cluster.status import STATUS_FILE
from issgd_jax.config import default, flatten
from issgd_jax.errors import InputError, brief
from issgd_jax.files import LEFTOVER, write_text_atomically
from issgd_jax.provenance import git_commit, versions

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
SCORES_FILE = "scores.npz"
HEARTBEAT_FILE = "heartbeat.json"
WATCHDOG_FILE = "watchdog.txt"
NONFINITE_FILE = "nonfinite.json"
CHECKPOINTS = "checkpoints"
_LOCK_FILE = "lock"
_RUN_FILES = (
    METRICS_FILE,
    CONFIG_FILE,
    SCORES_FILE,
    HEARTBEAT_FILE,
    WATCHDOG_FILE,
    NONFINITE_FILE,
    STATUS_FILE,
    "events.out.tfevents.*",
)

# Fields that do not change what a run computes.
HARMLESS = ("log.", "checkpoint.", "data.dir", "watchdog_seconds", "on_nonfinite")
# Fields that change it by rounding, or the order in which examples are scored.
_NEARLY_HARMLESS = ("devices.workers", "devices.host_platform_count", "distributed.", "cluster.")


@contextlib.contextmanager
def locked(workdir: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Creates the folder if it is missing, and locks it against other programs while the context lasts.

    The lock belongs to the process: however that ends, the folder is free again.

    Raises:
      InputError: another program has the lock, naming it; or the folder cannot be written.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = open(workdir / _LOCK_FILE, "a+")  # noqa: SIM115, closed below
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be written ({error.strerror}): choose another --workdir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            program = file.read().strip() or "another program"
            raise InputError(
                f"{workdir} is in use by {program}: wait until that ends, or choose another --workdir"
            ) from None
        with contextlib.suppress(OSError):  # the owner is only for the message; a full disk must not matter
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield workdir


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
    workdir = pathlib.Path(workdir)
    try:
        return workdir.is_dir() and any((workdir / name).exists() for name in (METRICS_FILE, CONFIG_FILE))
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be read ({error.strerror}): choose another --workdir") from error


def check(workdir: str | pathlib.Path, config: dict, *, overwrite: bool) -> dict | None:
    """Returns the record (config.json) of the run to resume; None if a new one starts. Writes nothing.

    Args:
      workdir: folder of the run.
      config: as nested dicts.
      overwrite: whether a run that is there is to be replaced.

    Raises:
      InputError: the run there is of another experiment, naming the fields; or it cannot be resumed.
    """
    if overwrite or not holds_run(workdir):
        return None
    workdir = pathlib.Path(workdir)
    remedy = "choose another --workdir, or replace the run with --overwrite"
    try:
        record = read_record(workdir)
    except InputError as error:
        raise InputError(
            f"{workdir} holds a run already, but its config cannot be read ({brief(error.__cause__)}): {remedy}"
        ) from error
    saved = record["config"]
    changed = {name: x for name, x in changes(saved, config).items() if not name.startswith(_NEARLY_HARMLESS)}
    if config["learner"]["lr_schedule"] == "constant":
        changed.pop("steps", None)  # more of the same
    if changed:
        fields = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise InputError(f"{workdir} holds a run of another experiment ({fields}): {remedy}")
    if not _ever_saved(workdir) and (last_step(workdir) == saved.get("steps") or not _saves(saved)):
        raise InputError(f"{workdir} holds a run already, and no checkpoint to resume from: {remedy}")
    return record


def read_record(workdir: pathlib.Path) -> dict:
    """Returns config.json: `config` in groups, and a list of those that resumed the run.

    Raises:
      InputError: it is missing or malformed.
    """
    path = workdir / CONFIG_FILE
    with records.reading(path, "repair it"):
        record = records.read(path)
        config = record["config"]
        flatten(config)
        records.whole_number(config.get("steps", 0))
        records.whole_number(config.get("checkpoint", {}).get("every_steps", 0))
        if not isinstance(record.get("resumed", []), list):
            raise TypeError("resumed is no list")
    return record


def changes(saved: dict, config: dict) -> dict[str, tuple]:
    """Returns {dotted field: (saved, now)} where two configs differ in what a run computes."""
    old, new = (_flat(values) for values in (saved, config))
    names = sorted(name for name in old.keys() | new.keys() if not name.startswith(HARMLESS))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _flat(config: dict) -> dict:
    """Flattens a config as JSON has it; an earlier version gets the defaults of newer fields."""
    return json.loads(json.dumps(flatten(default()) | flatten(config)))


def _ever_saved(workdir: pathlib.Path) -> bool:
    return any(path.is_dir() for path in (workdir / CHECKPOINTS).glob("*"))


def _saves(config: dict) -> bool:
    return config.get("checkpoint", {}).get("every_steps", 0) > 0


def last_step(workdir: pathlib.Path) -> int | None:
    """Returns the step of the last row of metrics; None if there is none, or it is cut off."""
    try:
        return records.parse((workdir / METRICS_FILE).read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def clear(workdir: pathlib.Path) -> None:
    """Removes an earlier run's files, and no others."""
    for pattern in (*_RUN_FILES, f"*{LEFTOVER}"):
        for file in workdir.glob(pattern):
            file.unlink()
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)


def write_record(
    workdir: pathlib.Path, config: dict, devices: dict[str, list[str]], resumed: dict | None = None
) -> None:
    """Writes config.json: the config, command, versions, devices and commit, and those of every resumption.

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


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns an OSError into an InputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another --workdir"
        ) from error
