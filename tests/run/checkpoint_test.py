"""Checkpoints that are cut off, flipped, half written or too large for the disk."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from issgd_jax import InputError
from issgd_jax.run import checkpoint
from issgd_jax.run.checkpoint import Checkpoint, DamagedError
from issgd_jax.run.checkpoints import Checkpoints


def made(step=3, size=1000):
    rng = np.random.default_rng(step)
    arrays = {
        "params.kernel": rng.normal(size=(size, 3)).astype(np.float32),
        "params.half": rng.normal(size=5).astype(ml_dtypes.bfloat16),
        "step": np.array(step, np.int32),
        "flags": np.array([True, False]),
        "key": np.array([1, 2**32 - 1], np.uint32),
    }
    return Checkpoint(arrays, {"step": step, "gains": [1.5, float("nan")], "nothing": None})


class State(NamedTuple):
    """What becomes a checkpoint."""

    step: int
    read: Callable[[], Checkpoint | None]


def check_equal(found, expected):
    assert found.arrays.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert found.arrays[name].dtype == array.dtype
        np.testing.assert_array_equal(found.arrays[name], array)
    assert repr(found.state) == repr(expected.state)


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(tmp_path):
    checkpoint.write(tmp_path / "a", made())
    check_equal(checkpoint.read(tmp_path / "a"), made())


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written") / "step"
    checkpoint.write(folder, made())
    return folder


@settings(max_examples=60, deadline=None)
@given(
    choice=st.integers(0, 10**6), place=st.floats(0, 1, exclude_max=True), how=st.sampled_from(["flip", "cut", "gone"])
)
def test_one_changed_byte_anywhere_is_found(written, tmp_path_factory, choice, place, how):
    """Red if bytes reach the parsers of a checkpoint's files before they are checked."""
    copy = tmp_path_factory.mktemp("copy") / "step"
    shutil.copytree(written, copy)
    path = files_of(copy)[choice % len(files_of(copy))]
    text = bytearray(path.read_bytes())
    at = int(place * len(text))
    if how == "flip":
        text[at] ^= 1 << (choice % 8)
    path.write_bytes(text[:at] if how == "cut" else text)
    if how == "gone":
        path.unlink()
    with pytest.raises(DamagedError):
        checkpoint.read(copy)
    shutil.rmtree(copy.parent)


@settings(max_examples=40, deadline=None)
@given(text=st.binary(max_size=200))
@example(text=b"3")
@example(text=b"{}")
@example(text=b'["arrays"]')
def test_random_bytes_are_no_checkpoint(written, tmp_path_factory, text):
    copy = tmp_path_factory.mktemp("copy") / "step"
    shutil.copytree(written, copy)
    for name in ("files.json", "state.json"):
        (copy / name).write_bytes(text)
        with pytest.raises(DamagedError):
            checkpoint.read(copy)
    shutil.rmtree(copy.parent)


def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_is_taken(tmp_path, capsys):
    with Checkpoints(tmp_path, every_steps=1, keep=5) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(State(step, lambda step=step: made(step)))
    for step in (2, 3):
        os.truncate(max(files_of(tmp_path / f"step_{step:010d}"), key=lambda path: path.stat().st_size), 5)
    with Checkpoints(tmp_path, every_steps=1, keep=5) as checkpoints:
        assert checkpoints.newest().state["step"] == 1
        told = capsys.readouterr().err
        assert re.search("step 3 cannot be used .*differs from what was written.*it is renamed, and", told)
        assert "step 2 cannot be used" in told
        checkpoints.save(State(3, lambda: made(3)))  # the place is free
        checkpoints.wait()
        assert checkpoints.steps == [1, 3]


def test_with_all_damaged_nothing_begins_anew_by_itself(tmp_path, capsys):
    with Checkpoints(tmp_path, every_steps=1, keep=5) as checkpoints:
        checkpoints.save(State(1, made))
    (tmp_path / "step_0000000001" / "state.json").write_text("{}")
    with Checkpoints(tmp_path, every_steps=1, keep=5) as checkpoints:
        for _ in range(2):
            with pytest.raises(InputError, match=r"none of the 1 checkpoint\(s\) in .* can be used.*--overwrite"):
                checkpoints.newest()


def test_what_is_half_written_has_no_name(tmp_path):
    """Red if a checkpoint that a kill has cut off is taken for one, or its rest stays for ever."""
    (tmp_path / "making_step_0000000007" / "arrays").mkdir(parents=True)
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        assert checkpoints.steps == [] and checkpoints.newest() is None
    assert list(tmp_path.iterdir()) == []


def test_the_newest_and_the_best_are_kept(tmp_path):
    def errors():
        return dict(zip(range(1, 8), (0.5, 0.2, 0.3, None, 0.2, 0.4, None), strict=True))

    with Checkpoints(tmp_path, every_steps=1, keep=2) as checkpoints:
        for step, error in errors().items():
            checkpoints.save(State(step, lambda step=step: made(step, size=2)), test_error=error)
        checkpoints.wait()
        assert checkpoints.steps == [2, 6, 7] and checkpoints.best_error == 0.2
    assert Checkpoints(tmp_path, every_steps=1, keep=2).best_error == 0.2  # also for who comes later


def test_the_best_is_kept_where_its_error_is_known_after_it_was_written(tmp_path):
    """Red if a run that is stopped before a measurement, and measures when it resumes, loses its best checkpoint."""
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        for step, error in ((1, None), (1, 0.1), (2, 0.3), (3, 0.2)):
            checkpoints.save(State(step, lambda step=step: made(step, size=2)), test_error=error)
        checkpoints.wait()
        assert checkpoints.steps == [1, 3] and checkpoints.best_error == 0.1
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:  # in another process too
        assert checkpoints.best_error == 0.1
        checkpoints.save(State(4, lambda: made(4, size=2)), test_error=0.3)
        checkpoints.wait()
        assert checkpoints.steps == [1, 4] and checkpoints.is_intact(1)


def test_an_error_that_is_not_a_number_is_not_the_best(tmp_path):
    """Red if it stays the least of all, as no number is less, and the best checkpoint is removed."""
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        for step, error in enumerate((float("nan"), 0.2, 0.3, float("nan")), 1):
            checkpoints.save(State(step, lambda step=step: made(step, size=2)), test_error=error)
        checkpoints.wait()
        assert checkpoints.steps == [2, 4]
    assert Checkpoints(tmp_path, every_steps=1, keep=1).best_error == 0.2


def test_an_error_costs_the_checkpoint_and_not_the_run(tmp_path, capsys):
    def fails():
        raise ValueError("no\nroom\nhere")

    with Checkpoints(tmp_path, every_steps=1, keep=2) as checkpoints:
        checkpoints.save(State(1, fails))
        checkpoints.save(State(2, lambda: None))  # not worth keeping
        checkpoints.save(State(3, made))
        checkpoints.wait()
        assert checkpoints.steps == [3]
    told = "the checkpoint of step 1 could not be written, training continues: ValueError: no … here"
    assert told in capsys.readouterr().err


def test_what_comes_late_of_a_failed_write_is_removed(tmp_path):
    """Orbax's threads may write on after the error. Red if their files stay for as long as the run."""

    def comes_late():
        (tmp_path / "making_step_0000000001" / "arrays").mkdir(parents=True)
        return made(2)

    with Checkpoints(tmp_path, every_steps=1, keep=2) as checkpoints:
        checkpoints.save(State(1, lambda: 1 / 0))
        checkpoints.save(State(2, comes_late))
        checkpoints.save(State(3, made))
        checkpoints.wait()
        assert [path.name for path in sorted(tmp_path.iterdir())] == ["step_0000000002", "step_0000000003"]
        (tmp_path / "making_step_0000000004" / "arrays").mkdir(parents=True)
    assert checkpoints.steps == [2, 3] and list(tmp_path.glob("making_*")) == []


TORN_OFF = """
import pathlib, resource, signal, sys
from tests.run.checkpoint_test import State, made
from issgd_jax.run.checkpoints import Checkpoints

with Checkpoints(pathlib.Path(sys.argv[1]), every_steps=1, keep=9) as checkpoints:
    checkpoints.save(State(1, lambda: made(1)))
    checkpoints.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    checkpoints.save(State(2, lambda: made(2, size=10**6)))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoints.save(State(3, lambda: made(3)))
    checkpoints.wait()
    assert checkpoints.steps == [1, 3], checkpoints.steps
"""


def test_a_write_that_fails_in_the_middle_costs_that_checkpoint(tmp_path):
    """There was room when it began. Red if half a checkpoint has a name, or those after it fail too."""
    done = subprocess.run(
        [sys.executable, "-c", TORN_OFF, tmp_path / "checkpoints"],
        cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the checkpoint of step 2 could not be written, training continues: " in done.stderr
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if "making" in path.name] == []


FULL_DISK = """
import os, pathlib, sys
from tests.run.checkpoint_test import State, made, check_equal
from issgd_jax.run import checkpoint
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.metrics import MetricsWriter, read_metrics

folder = pathlib.Path(sys.argv[1])
with Checkpoints(folder / "checkpoints", every_steps=1, keep=9) as checkpoints:
    with MetricsWriter(folder, tensorboard=True) as writer:
        writer.write({"step": 0, "loss": 1.0})
        checkpoints.save(State(1, lambda: made(1)))
        checkpoints.save(State(2, lambda: made(2, size=10**6)))  # does not fit
        checkpoints.wait()
        assert checkpoints.steps == [1], checkpoints.steps
        with open(folder / "filler", "wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(100))
            except OSError:
                pass
        for step in range(1, 200):
            writer.write({"step": step, "loss": 1 / step})
        checkpoints.save(State(3, lambda: made(3)))
        checkpoints.wait()
        rows = read_metrics(folder / "metrics.jsonl")
        assert rows[0]["step"] == 0 and len(rows) < 200, len(rows)
        os.unlink(folder / "filler")
        writer.write({"step": 200, "loss": 0.0})
        checkpoints.save(State(4, lambda: made(4)))
        checkpoints.wait()
        assert checkpoints.steps == [1, 4], checkpoints.steps
        check_equal(checkpoint.read(folder / "checkpoints" / "step_0000000001"),
                    checkpoint.Checkpoint(made(1).arrays, made(1).state | {"test_error": None}))
    assert [row["step"] for row in read_metrics(folder / "metrics.jsonl")] == list(range(201))
    from tests.helpers import read_events
    (events,) = folder.glob("events.out.tfevents.*")
    assert [step for step, _ in read_events(events)["loss"]] == list(range(201))
print("survived")
"""


def in_small_disk(folder, size, script, *arguments):
    """Runs a Python script in a process that has a disk of its own at `folder`, of so many bytes."""
    folder.mkdir()
    command = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command, folder, sys.executable, "-c", script,
         folder, *arguments],
        cwd=pathlib.Path(__file__).parents[2], capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def can_have_a_small_disk():
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", "mount -t tmpfs tmpfs /tmp"]
    return shutil.which("unshare") and subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not can_have_a_small_disk(), reason="this system lets nobody mount a small disk")
def test_a_full_disk_costs_checkpoints_and_no_row(tmp_path):
    done = in_small_disk(tmp_path / "disk", 1_000_000, FULL_DISK)
    assert done.stdout == "survived\n", done.stderr
    assert "the checkpoint of step 2 could not be written, training continues: OSError: [Errno 28]" in done.stderr
    assert " MB free" in done.stderr
    assert "No space left on device" in done.stderr and "Traceback" not in done.stderr
