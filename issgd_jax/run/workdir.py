"""The folder of a run: who has it, which experiment lies there, and whether that may go on. Imports no jax."""

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

from issgd_jax.config import default, flatten
from issgd_jax.errors import InputError
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
    "events.out.tfevents.*",
)

# Fields that change nothing of what a run computes, but perhaps whether it can go on, or where its data lies.
HARMLESS = ("log.", "checkpoint.", "data.dir", "watchdog_seconds", "on_nonfinite")
# Fields that change it by rounding, and the order in which examples are scored.
_NEARLY_HARMLESS = ("devices.workers", "devices.host_platform_count", "distributed.", "cluster.")


@contextlib.contextmanager
def locked(workdir: str | pathlib.Path) -> Iterator[pathlib.Path]:
    """Makes the folder if there is none, and keeps all other programs out of it while the context lasts.

    The lock belongs to the process: however that ends, it is free again.

    Raises: InputError if another program has it, naming that; or if the folder cannot be written.
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
            owner = file.read().strip() or "another program"
            raise InputError(
                f"{workdir} is in use by {owner}: wait until that ends, or choose another --workdir"
            ) from None
        with contextlib.suppress(OSError):  # who has it is only told; a full disk must not matter
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        yield workdir


def holds_run(workdir: str | pathlib.Path) -> bool:
    """Whether a run has begun there; writes nothing.

    Raises: InputError if the folder cannot be read.
    """
    workdir = pathlib.Path(workdir)
    try:
        return workdir.is_dir() and any((workdir / name).exists() for name in (METRICS_FILE, CONFIG_FILE))
    except OSError as error:
        raise InputError(f"workdir {workdir} cannot be read ({error.strerror}): choose another --workdir") from error


def check(workdir: str | pathlib.Path, config: dict, *, overwrite: bool) -> dict | None:
    """The record of the run that may go on there, None if a new one begins; writes nothing.

    Raises: InputError if the run that lies there is of another experiment, naming the fields; or if it cannot go on.
    """
    if overwrite or not holds_run(workdir):
        return None
    workdir = pathlib.Path(workdir)
    remedy = "choose another --workdir, or replace the run with --overwrite"
    try:
        record = json.loads((workdir / CONFIG_FILE).read_text())
        found = record["config"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{workdir} holds a run already, but no config of it that can be read: {remedy}") from error
    changed = {name: x for name, x in changes(found, config).items() if not name.startswith(_NEARLY_HARMLESS)}
    if config["learner"]["lr_schedule"] == "constant":
        changed.pop("steps", None)  # more of the same
    if changed:
        fields = ", ".join(f"{name} was {old!r}, now {new!r}" for name, (old, new) in changed.items())
        raise InputError(f"{workdir} holds a run of another experiment ({fields}): {remedy}")
    if not _ever_saved(workdir) and (_last_step(workdir) == found.get("steps") or not _saves(found)):
        raise InputError(f"{workdir} holds a run already, and no checkpoint to go on from: {remedy}")
    return record


def changes(found: dict, wanted: dict) -> dict[str, tuple]:
    """{dotted field: (found, wanted)} where two configs differ in what a run computes."""
    old, new = (_flat(config) for config in (found, wanted))
    names = sorted(name for name in old.keys() | new.keys() if not name.startswith(HARMLESS))
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def _flat(config: dict) -> dict:
    """As JSON has it; a config of an earlier version gets the defaults of fields that are newer than it."""
    return json.loads(json.dumps(flatten(default()) | flatten(config)))


def _ever_saved(workdir: pathlib.Path) -> bool:
    return any(path.is_dir() for path in (workdir / CHECKPOINTS).glob("*"))


def _saves(config: dict) -> bool:
    return config.get("checkpoint", {}).get("every_steps", 0) > 0


def _last_step(workdir: pathlib.Path) -> int | None:
    try:
        return json.loads((workdir / METRICS_FILE).read_text().splitlines()[-1])["step"]
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None


def clear(workdir: pathlib.Path) -> None:
    """Removes an earlier run's files, and leaves all others."""
    for pattern in (*_RUN_FILES, f"*{LEFTOVER}"):
        for file in workdir.glob(pattern):
            file.unlink()
    shutil.rmtree(workdir / CHECKPOINTS, ignore_errors=True)


def write_record(
    workdir: pathlib.Path, config: dict, devices: dict[str, list[str]], before: dict | None = None
) -> None:
    """Writes config.json: the experiment, what is needed to repeat it, and when and with what it went on.

    before: the record of the run that goes on.
    """
    now = {"command": sys.argv, "versions": versions(), "devices": devices, "git_commit": git_commit()}
    record = {"config": config, **now}
    if before:
        at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        record = before | {"config": config, "resumed": [*before.get("resumed", []), {"at": at, **now}]}
    with writing(workdir / CONFIG_FILE):
        write_text_atomically(workdir / CONFIG_FILE, json.dumps(record, indent=2) + "\n")


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Turns an error of the disk into one that says what to do."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another --workdir"
        ) from error
