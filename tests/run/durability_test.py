"""Power cuts: what has a name is on the disk, as a whole."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

from issgd_jax import ScoreStore
from issgd_jax.config import default
from issgd_jax.files import make_folder, replace_atomically, write_text_atomically
from issgd_jax.run import checkpoint, workdir
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.metrics import MetricsWriter, read_metrics
from tests.run.checkpoint_test import State, made

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def calls(monkeypatch):
    """What is synced and renamed, in order: ("sync", path), ("rename", from, to). The real functions do it."""
    found, fsync, rename, replace = [], os.fsync, os.rename, os.replace

    def record_sync(handle):
        fsync(handle)
        found.append(("sync", os.readlink(f"/proc/self/fd/{handle}")))

    def record_rename(function):
        def renamed(source, target, **keywords):
            function(source, target, **keywords)
            found.append(("rename", str(source), str(target)))

        return renamed

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename(rename))
    monkeypatch.setattr(os, "replace", record_rename(replace))
    return found


def check_order(calls, final, content):
    """Everything in `content` is synced, then the last rename to `final` follows, then the folder is synced."""
    renamed = max(i for i, (kind, *paths) in enumerate(calls) if kind == "rename" and paths[1] == str(final))
    source = calls[renamed][1]
    synced = [path for kind, path, *_ in calls[:renamed] if kind == "sync"]
    expected = [source + str(path).removeprefix(str(final)) for path in content]
    assert set(expected) <= set(synced)
    assert ("sync", str(final.parent)) in calls[renamed:]
    return synced


def test_everything_in_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, calls):
    """Red if one file, Orbax's among them, or one folder is not synced, or a folder before what is in it."""
    make_folder(tmp_path / "new")
    path = tmp_path / "new" / "checkpoints" / "step_0000000003"
    record = {"config": {"steps": 3}}
    checkpoint.write(path, checkpoint.Checkpoint(made().arrays, made().state, record))
    content = [path, *path.rglob("*")]
    assert {"state.json", "config.json", "files.json", "_METADATA"} <= {each.name for each in content}
    synced = check_order(calls, path, content)
    partial = next(source for kind, source, *rest in calls if rest == [str(path)])
    for folder in (each for each in content if each.is_dir()):
        at = synced.index(partial + str(folder).removeprefix(str(path)))
        for inner in folder.iterdir():
            assert synced.index(partial + str(inner).removeprefix(str(path))) < at, inner
    assert ("sync", str(tmp_path)) in calls and ("sync", str(tmp_path / "new")) in calls  # the new folders' names
    assert checkpoint.record_in(path.parent) == record and checkpoint.read(path).record == record


def test_files_of_a_run_are_on_the_disk_before_they_have_their_names(tmp_path, calls):
    """Red if config.json, scores, figures or results may be empty after a power cut."""
    workdir.write_record(tmp_path, default().to_dict(), {})
    ScoreStore.init(3).save(tmp_path / "scores.npz")
    write_text_atomically(tmp_path / "results.json", "{}")
    for name in ("config.json", "scores.npz", "results.json"):
        check_order(calls, tmp_path / name, [tmp_path / name])


def test_rows_are_on_the_disk_when_a_run_ends(tmp_path, calls):
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        assert ("sync", str(tmp_path)) in calls
        writer.write({"step": 0})
    assert calls[-1] == ("sync", str(tmp_path / "metrics.jsonl"))


def test_a_file_that_cannot_be_synced_keeps_its_old_content(tmp_path, monkeypatch):
    """Red if a name is given to what the disk has refused."""

    def refuse(handle):
        raise OSError(5, "Input/output error")

    path = tmp_path / "a"
    write_text_atomically(path, "old")
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="Input/output error"):
        write_text_atomically(path, "new")
    with pytest.raises(OSError, match="Input/output error"):
        checkpoint.write(tmp_path / "step_0000000003", made())
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Some network file systems sync files and refuse folders."""
    fsync = os.fsync

    def refuse_folders(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(22, "Invalid argument")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    make_folder(tmp_path / "a" / "b")
    checkpoint.write(tmp_path / "a" / "b" / "step_0000000003", made())
    assert checkpoint.read(tmp_path / "a" / "b" / "step_0000000003").state["step"] == 3


def test_processes_with_one_number_do_not_disturb_each_other(tmp_path):
    """Containers on one cache have all the same process number. Red if both write the same incomplete file."""
    with replace_atomically(tmp_path / "a") as first, replace_atomically(tmp_path / "a") as second:
        assert first != second
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and len(list(tmp_path.iterdir())) == 1


# Copies the disk's image as soon as a file or a folder has its name: as if the power had failed then.
POWER_CUT = """
import os, pathlib, shutil, sys
disk, image, copies = map(pathlib.Path, sys.argv[1:])
real = {name: getattr(os, name) for name in ("rename", "replace")}

def cut(name):
    def renamed(source, target, **keywords):
        real[name](source, target, **keywords)
        if pathlib.Path(target).name in ("step_0000000003", "config.json"):
            shutil.copyfile(image, copies / pathlib.Path(target).name)
    return renamed

for name in real:
    setattr(os, name, cut(name))
from issgd_jax.config import default
from issgd_jax.run import workdir
from issgd_jax.run.checkpoints import Checkpoints
from tests.run.checkpoint_test import State, made
run = disk / "runs" / "a"
with workdir.locked(run) as lock:
    record = workdir.write_record(run, default().to_dict(), {})
    with Checkpoints(run / "checkpoints", every_steps=1, keep=9, check_lock=lock.check) as checkpoints:
        checkpoints.record = record
        checkpoints.save(State(3, made))
        checkpoints.wait()
        assert checkpoints.steps == [3]
        shutil.copyfile(image, copies / "end")
os._exit(0)
"""
# What a copy of the disk holds when it is mounted again.
AFTERWARDS = """
import json, pathlib, sys
from issgd_jax.run import checkpoint
run = pathlib.Path(sys.argv[1]) / "runs" / "a"
if sys.argv[2] == "config.json":
    found = [path for path in (run / "config.json", *run.glob("config.json.*")) if path.exists()]
    assert found and all(json.loads(path.read_text())["config"] for path in found), found
else:
    assert json.loads((run / "config.json").read_text())["config"]
    for path in (run / "checkpoints").iterdir():
        assert checkpoint.read(path).state["step"] == 3
        assert all(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert checkpoint.read(path).record["config"]
    assert sys.argv[2] != "end" or checkpoint.steps_in(run / "checkpoints") == [3]
"""


def in_image(image, disk, script, *arguments):
    """Runs a Python script that sees the file system in a file as the folder `disk`."""
    command = 'mount -o loop "$0" "$1" && shift && exec "$@"'
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", command, image, disk, sys.executable, "-c", script, disk, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


def make_image(path):
    path.write_bytes(b"")
    os.truncate(path, 16 * 2**20)
    return subprocess.run(["mkfs.ext4", "-q", path], capture_output=True, check=False).returncode == 0


def can_mount_images(tmp_path):
    if os.geteuid() or not all(map(shutil.which, ("unshare", "mkfs.ext4"))) or not make_image(tmp_path / "trial"):
        return False
    (tmp_path / "there").mkdir()
    return in_image(tmp_path / "trial", tmp_path / "there", "").returncode == 0


def test_a_power_cut_after_a_name_is_given_loses_nothing(tmp_path):
    """Copies of a real ext4 at that moment, mounted again. Red if a file there is empty or cut off."""
    if not can_mount_images(tmp_path):
        pytest.skip("this system lets nobody mount a file as a disk")
    disk, image, copies = tmp_path / "disk", tmp_path / "image", tmp_path / "copies"
    disk.mkdir(), copies.mkdir()
    make_image(image)
    done = in_image(image, disk, POWER_CUT, image, copies)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in copies.iterdir()} == {"step_0000000003", "config.json", "end"}
    for copy in copies.iterdir():
        done = in_image(copy, disk, AFTERWARDS, copy.name)
        assert done.returncode == 0, (copy.name, done.stderr)


def test_rows_written_before_a_checkpoint_are_on_the_disk_with_it(tmp_path, calls):
    """Red if a checkpoint may survive a power cut and the rows before it do not."""
    from issgd_jax.run.run_state import Snapshot

    snapshot = Snapshot(3, ({}, {}), True, None, (), {}, metrics_path=tmp_path / "metrics.jsonl")
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        writer.write({"step": 0})
        snapshot.read()
        assert ("sync", str(tmp_path / "metrics.jsonl")) in calls
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1


def test_the_config_of_a_run_is_in_each_of_its_checkpoints(tmp_path):
    record = workdir.write_record(tmp_path, default().to_dict(), {})
    with Checkpoints(tmp_path / "checkpoints", every_steps=1, keep=9) as checkpoints:
        checkpoints.record = record
        checkpoints.save(State(3, made))
    inside = tmp_path / "checkpoints" / "step_0000000003" / "config.json"
    assert json.loads(inside.read_text()) == json.loads((tmp_path / "config.json").read_text())
