"""Whose folder it is: what a run may delete there, and what happens when the folder is taken away from it."""

import errno
import fcntl
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import pytest

import issgd_jax
from issgd_jax import InputError
from issgd_jax.errors import FolderLostError
from issgd_jax.run import checkpoint, status, wiring, workdir
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.metrics import MetricsWriter
from issgd_jax.run.supervision import Supervision
from tests import victims
from tests.helpers import small, steps_of, without_time
from tests.run.checkpoint_test import State, made
from tests.run.faults_test import program, wait_for_end, wait_for_rows

ROOT = pathlib.Path(__file__).parents[2]


def contents(folder):
    """Returns {path: bytes} of all files, but the lock, below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {path.relative_to(folder): path.read_bytes() for path in files}


def write(path, text=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("checkpoints/epoch_1.pt", "checkpoints holds epoch_1.pt, which no run here wrote.*choose another --workdir"),
        ("checkpoints/step_1000/model", "checkpoints holds step_1000, which no run here wrote"),
        ("checkpoints/step_0000001000/model", "checkpoints holds step_0000001000, which no run here wrote"),
        ("config.json", "config.json is not the record of a run.*choose another --workdir"),
        ("metrics.jsonl/rows", "metrics.jsonl is a folder, where a run has a file"),
        ("lock/x", "lock is a folder, where a run has a file"),
        ("checkpoints", "checkpoints is a file, where a run has a folder"),
    ],
)
def test_a_folder_of_others_is_refused_and_nothing_is_touched(name, message, overwrite, tmp_path, compilations):
    """Red if checkpoints of another program are deleted, with --overwrite or without."""
    write(tmp_path / name, '{"model_type": "bert"}')
    before = contents(tmp_path)
    with pytest.raises(InputError, match=message):
        issgd_jax.train(small(steps=8), tmp_path, overwrite=overwrite)
    assert contents(tmp_path) == before and not (tmp_path / "lock").is_file() and not compilations


@pytest.mark.parametrize("name", ["events.out.tfevents.1.host", "scores.npz", "heartbeat.json"])
def test_files_that_a_run_would_delete_are_refused_without_overwrite(name, tmp_path):
    write(tmp_path / name, "theirs")
    with pytest.raises(InputError, match=f"holds {name}, but no run: choose another --workdir"):
        workdir.check(tmp_path, small().to_dict(), overwrite=False)
    assert workdir.check(tmp_path, small().to_dict(), overwrite=True) is None


def test_only_files_with_names_of_a_run_are_removed(run):
    """Red if --overwrite deletes what it did not write."""
    theirs = [
        "notes.txt",
        "notes.new",
        "data.npz",
        "checkpoints/epoch_1.pt",
        "checkpoints/step_12",
        "checkpoints/step_0000000012/model",
        "sub/metrics.jsonl",
    ]
    for name in theirs:
        write(run / name, "theirs")
    write(run / "config.json.123abc.new")
    write(run / "checkpoints/making_step_0000000009/arrays/x")
    write(run / "checkpoints/damaged_step_0000000001/state.json")
    workdir.check(run, small().to_dict(), overwrite=True)
    workdir.clear(run)
    assert set(contents(run)) == {pathlib.Path(name) for name in theirs}


def test_checkpoints_behind_a_link_are_removed_too(run, tmp_path):
    """On a larger disk. Red if --overwrite leaves them, and the new run resumes from those of the old one."""
    (run / "checkpoints").rename(tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "large")
    workdir.clear(run)
    assert (run / "checkpoints").is_symlink() and list((tmp_path / "large").iterdir()) == []
    write(tmp_path / "theirs" / "state.json")
    (tmp_path / "large" / "step_0000000007").symlink_to(tmp_path / "theirs")
    workdir.clear(run)
    assert (tmp_path / "theirs" / "state.json").exists() and list((tmp_path / "large").iterdir()) == []


@pytest.mark.parametrize("lost", [("config.json",), ("config.json", "metrics.jsonl"), "emptied"])
def test_checkpoints_alone_are_resumed_from(lost, run, capsys):
    """Red if whole checkpoints are deleted, or refused, as the files beside them are gone or cut off."""
    for name in lost if isinstance(lost, tuple) else ():
        (run / name).unlink()
    if lost == "emptied":
        (run / "config.json").write_text("")
    history = issgd_jax.train(small(steps=21), run)
    assert "resumes from the checkpoint of step 20 of 21" in capsys.readouterr().err
    assert history[-1]["step"] == 21 and {14, 20, 21} <= {*steps_of(run)}
    assert json.loads((run / "config.json").read_text())["config"]["steps"] == 21


def test_rows_whose_checkpoints_were_removed_are_kept(run):
    """Red if a run begins again, and cuts off its rows, as somebody has removed its checkpoints."""
    shutil.rmtree(run / "checkpoints")
    before = contents(run)
    with pytest.raises(InputError, match="holds a run already, and no checkpoint to resume from.*--overwrite"):
        workdir.check(run, wiring.resolve(small(steps=20)).to_dict(), overwrite=False)
    assert contents(run) == before


def test_checkpoints_without_any_config_are_refused(run):
    """As an earlier version wrote them."""
    (run / "config.json").unlink()
    for step in steps_of(run):
        path = run / "checkpoints" / f"step_{step:010d}"
        kept = checkpoint.read(path)
        shutil.rmtree(path)
        checkpoint.write(path, checkpoint.Checkpoint(kept.arrays, kept.state))
    before = contents(run)
    with pytest.raises(InputError, match="holds a run already, but its config cannot be read"):
        issgd_jax.train(small(steps=21), run)
    assert contents(run) == before


def test_a_lost_folder_is_neither_written_nor_cleaned(tmp_path):
    """Another run has begun in its place. Red if anything of that is deleted, renamed or written."""
    folder = tmp_path / "run"
    with workdir.locked(folder) as lock:
        watch = Supervision(folder, watchdog_seconds=60, check_lock=lock.check)
        writer = MetricsWriter(folder, tensorboard=True, check_lock=lock.check)
        checkpoints = Checkpoints(folder / "checkpoints", every_steps=1, keep=1, check_lock=lock.check)
        checkpoints.save(State(1, made))
        checkpoints.wait()
        writer.write({"step": 1})
        shutil.rmtree(folder)
        with workdir.locked(folder):
            with Checkpoints(folder / "checkpoints", every_steps=1, keep=9) as others:
                for step in (1, 2, 3):
                    others.save(State(step, lambda step=step: made(step)))
            write(folder / "metrics.jsonl", '{"step": 5}\n')
            write(folder / "events.out.tfevents.1.host")
            write(folder / "checkpoints/making_step_0000000004/state.json")
            theirs = contents(folder)
            checkpoints.save(State(4, made))
            with pytest.raises(FolderLostError, match="was removed, renamed or replaced while this run was using it"):
                checkpoints.wait()
            with pytest.raises(FolderLostError):
                writer.write({"step": 4})
            with pytest.raises(FolderLostError), watch:
                watch._write("heartbeat.json", {})
                watch.finished(4)
            with pytest.raises(FolderLostError), writer:
                pass
            with checkpoints:
                pass
            assert contents(folder) == theirs


@pytest.mark.parametrize("how", ["removed", "renamed", "lock removed"])
def test_a_folder_that_is_gone_is_lost(how, tmp_path):
    folder = tmp_path / "run"
    with workdir.locked(folder) as lock:
        lock.check()
        if how == "removed":
            shutil.rmtree(folder)
        elif how == "renamed":
            folder.rename(tmp_path / "other")
        else:
            (folder / "lock").unlink()
        with pytest.raises(FolderLostError, match=f"{folder} was removed"):
            lock.check()
    assert not (folder / "metrics.jsonl").exists()


def test_a_run_whose_folder_is_replaced_ends_with_one_error(tmp_path):
    """Real processes. Red if the first writes into the second's folder, or ends with a traceback or status 0."""
    folder = tmp_path / "run"
    first, log = program(folder, "--config.steps=1000000")
    wait_for_rows(folder, 2, first, log)
    folder.rename(tmp_path / "moved")
    issgd_jax.train(victims.config(steps=10), folder)
    before = contents(folder)
    assert wait_for_end(first) == 1
    assert contents(folder) == before
    told = log.read_text()
    assert told.count("error: ") == 1 and f"error: {folder} was removed, renamed or replaced" in told
    assert "Traceback" not in told


def test_a_folder_that_is_taken_while_it_is_locked(tmp_path, monkeypatch):
    """Red if a program locks a file that another has already replaced, so that both run."""
    flock = fcntl.flock

    def replace_and_lock(file, how):
        monkeypatch.undo()
        shutil.rmtree(tmp_path / "run")
        workdir.make_folder(tmp_path / "run")
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", replace_and_lock)
    with pytest.raises(FolderLostError), workdir.locked(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK], ids=errno.errorcode.get)
def test_a_file_system_without_locks_is_told_from_a_folder_in_use(number, tmp_path, monkeypatch):
    """Red if it says that another program runs there."""

    def refuse(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    message = (
        rf"{tmp_path} cannot be locked \({os.strerror(number)}\).*choose a --workdir on a file system that has locks"
    )
    with pytest.raises(InputError, match=message), workdir.locked(tmp_path):
        pass


def test_of_programs_that_begin_at_once_one_gets_the_folder(tmp_path):
    results, together = [], threading.Barrier(8)

    def begin():
        together.wait()
        try:
            with workdir.locked(tmp_path / "new" / "run"):
                results.append("has it")
                together.wait()
        except InputError as error:
            results.append("in use" if " is in use by " in str(error) else error)
            together.wait()

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == ["has it"] + ["in use"] * 7


def test_links(run, tmp_path, finished):
    """A linked folder is one like others; a link that leads nowhere is told. Red if a run begins again behind it."""
    (tmp_path / "link").symlink_to(run)
    assert without_time(issgd_jax.train(small(steps=20), tmp_path / "link")) == without_time(finished[1])
    (tmp_path / "broken").symlink_to(tmp_path / "unmounted")
    with pytest.raises(InputError, match=r"broken cannot be read \(a link to .*unmounted, which does not exist\)"):
        issgd_jax.train(small(steps=8), tmp_path / "broken")
    shutil.move(run / "checkpoints", tmp_path / "large")
    (run / "checkpoints").symlink_to(tmp_path / "unmounted")
    before = contents(run)
    with pytest.raises(InputError, match=r"checkpoints cannot be read \(a link to .*unmounted, which does not exist\)"):
        issgd_jax.train(small(steps=21), run)
    assert contents(run) == before
    (run / "checkpoints").unlink()
    (run / "checkpoints").symlink_to(tmp_path / "large")
    assert issgd_jax.train(small(steps=21), run)[-1]["step"] == 21


READ_ONLY = """
import pathlib, sys
from issgd_jax import InputError
from issgd_jax.run import workdir
folder = pathlib.Path(sys.argv[1])
for path in (folder / "run", folder / "new" / "run"):
    try:
        with workdir.locked(path):
            pass
    except InputError as error:
        print(error)
"""


def test_a_read_only_file_system_is_told(tmp_path):
    (tmp_path / "disk" / "run").mkdir(parents=True)
    mount = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, tmp_path / "disk"]
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a folder")
    done = subprocess.run(
        [*command, sys.executable, "-c", READ_ONLY, tmp_path / "disk"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.count("cannot be written (Read-only file system): choose another --workdir") == 2


FORBIDDEN = """
import os, pathlib, sys
from issgd_jax import InputError
from issgd_jax.run import checkpoint, workdir
folder = pathlib.Path(sys.argv[1])
os.setgid(65534), os.setuid(65534)
for act in (lambda: workdir.holds_run(folder), lambda: checkpoint.steps_in(folder.with_name("open") / "checkpoints")):
    try:
        print("allowed", act())
    except InputError as error:
        print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_read_is_not_an_empty_one(tmp_path):
    """Red if a run begins again, and deletes, where it may not list the folder."""
    write(tmp_path / "closed" / "metrics.jsonl")
    write(tmp_path / "open" / "checkpoints" / "step_0000000007" / "state.json")
    for path in (tmp_path, *tmp_path.parents):
        if path.is_relative_to("/tmp/") and path != pathlib.Path("/tmp"):
            path.chmod(0o755)
    (tmp_path / "closed").chmod(0o700)
    (tmp_path / "open" / "checkpoints").chmod(0o700)
    done = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, tmp_path / "closed"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.count("cannot be read (Permission denied)") == 2, done.stdout + done.stderr


def test_a_clock_that_ran_backwards_shows_no_negative_time(tmp_path):
    write(tmp_path / "config.json", json.dumps({"config": {"steps": 9}}))
    write(tmp_path / "heartbeat.json", json.dumps({"step": 5, "at": 4e9}))
    assert "step 5 of 9, 0.0 s ago" in status.read(tmp_path)


def test_checkpoints_that_are_deleted_during_the_run_are_written_again(tmp_path):
    with workdir.locked(tmp_path) as lock:
        folder = tmp_path / "checkpoints"
        with Checkpoints(folder, every_steps=1, keep=2, check_lock=lock.check) as checkpoints:
            for step in (1, 2, 3):
                checkpoints.save(State(step, lambda step=step: made(step)), test_error=1 / step)
                checkpoints.wait()
                shutil.rmtree(folder) if step == 2 else None
            assert checkpoints.steps == [3] and checkpoint.read(folder / "step_0000000003")


def test_a_removal_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Red if what a kill leaves of a removed checkpoint has the name of a whole one."""
    checkpoints = Checkpoints(tmp_path, every_steps=1, keep=1)
    rmtree = shutil.rmtree

    def remove_one_file(path, **options):
        rmtree(path, **options) if options else next(pathlib.Path(path).rglob("*.json")).unlink()

    monkeypatch.setattr(shutil, "rmtree", remove_one_file)
    for step in (1, 2):
        checkpoints.save(State(step, made))
    checkpoints.wait()
    assert checkpoints.steps == [2] and (tmp_path / "removing_step_0000000001").is_dir()
    monkeypatch.undo()
    with Checkpoints(tmp_path, every_steps=1, keep=1):
        assert [path.name for path in tmp_path.iterdir()] == ["step_0000000002"]


@pytest.mark.parametrize(
    "name", ["step_00000000012", "step_١٢٣٤٥٦٧٨٩٠", "step_-000000001", "step_1", "Step_0000000001"]
)
def test_other_names_are_no_checkpoints(name, tmp_path):
    write(tmp_path / name / "state.json")
    assert checkpoint.names_in(tmp_path) == [] and checkpoint.steps_in(tmp_path) == []
    checkpoint.clear(tmp_path)
    assert (tmp_path / name / "state.json").exists()
