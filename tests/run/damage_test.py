"""What is damage and what is not: errors of reading that pass, rows and fields that are lost, full disks."""

import errno
import functools
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

import issgd_jax
from issgd_jax import InputError
from issgd_jax.errors import StoppedError
from issgd_jax.run import checkpoint, loop, orbax, run_state
from issgd_jax.run.checkpoint import DamagedError
from issgd_jax.run.checkpoints import Checkpoints
from issgd_jax.run.metrics import MetricsWriter, read_metrics
from tests.helpers import arrays_of, check_same, path_of, small, steps_of
from tests.run.checkpoint_test import State, can_have_a_small_disk, in_small_disk, made

ROOT = pathlib.Path(__file__).parents[2]


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def write_three(folder):
    with Checkpoints(folder, every_steps=1, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(State(step, lambda step=step: made(step)))


def make_unreadable(path):
    """Opens, and then gives a real EIO: the memory of this process has nothing at address 0."""
    path.rename(path.with_name(f"away_{path.name}"))
    path.symlink_to("/proc/self/mem")


def mend(path):
    path.unlink()
    path.with_name(f"away_{path.name}").rename(path)


@pytest.mark.parametrize("name", ["files.json", "state.json", "arrays/_METADATA", "arrays/manifest.ocdbt"])
def test_an_error_of_reading_ends_the_run_and_condemns_nothing(name, tmp_path):
    """Red if a disk that fails for a moment costs a checkpoint, or an older one is taken in its place."""
    write_three(tmp_path)
    path = tmp_path / "step_0000000003" / name
    make_unreadable(path)
    with pytest.raises(InputError, match="cannot be read .Input/output error.. Nothing was changed"):
        Checkpoints(tmp_path, every_steps=1, keep=9).newest()
    assert names(tmp_path) == [f"step_000000000{step}" for step in (1, 2, 3)]
    mend(path)
    assert Checkpoints(tmp_path, every_steps=1, keep=9).newest().state["step"] == 3


def test_too_many_open_files_condemn_nothing(tmp_path):
    write_three(tmp_path)
    checkpoints = Checkpoints(tmp_path, every_steps=1, keep=9)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 8, limits[1]))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        with pytest.raises(InputError, match="cannot be read .Too many open files"):
            checkpoints.newest()
    finally:
        for handle in opened:
            os.close(handle)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert names(tmp_path) == [f"step_000000000{step}" for step in (1, 2, 3)]
    assert checkpoints.newest().state["step"] == 3


@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.ESTALE, os.strerror(errno.ESTALE)), PermissionError(errno.EACCES, "denied")]
)
@pytest.mark.parametrize("where", [(checkpoint, "_checksum"), (orbax, "load")], ids=["checksum", "arrays"])
def test_other_errors_that_pass_condemn_nothing(where, error, tmp_path, monkeypatch):
    """Those that this machine cannot be brought to; also while the arrays are restored, after all bytes were right."""
    write_three(tmp_path)

    def fail(*arguments):
        raise error

    monkeypatch.setattr(*where, fail)
    with pytest.raises(InputError, match="cannot be read.*Nothing was changed"):
        Checkpoints(tmp_path, every_steps=1, keep=9).newest()
    monkeypatch.undo()
    assert Checkpoints(tmp_path, every_steps=1, keep=9).newest().state["step"] == 3


@pytest.mark.parametrize("how", ["gone", "cut", "flipped", "a folder"])
def test_damage_is_named(how, tmp_path):
    checkpoint.write(tmp_path / "step", made())
    path = tmp_path / "step" / "arrays" / "_METADATA"
    content = path.read_bytes()
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how != "gone":
        path.write_bytes(content[:-1] if how == "cut" else bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(DamagedError, match="_METADATA (differs from what was written|is missing)"):
        checkpoint.read(tmp_path / "step")


def test_files_of_others_in_a_checkpoint_are_no_damage(tmp_path):
    """A file manager's, or an NFS server's. Red if they condemn it."""
    checkpoint.write(tmp_path / "step", made())
    for name in (".DS_Store", "arrays/.nfs0001"):
        (tmp_path / "step" / name).write_text("theirs")
    assert checkpoint.read(tmp_path / "step").state["step"] == 3


def test_a_link_to_a_disk_that_is_not_mounted_is_no_damage(tmp_path):
    write_three(tmp_path / "checkpoints")
    shutil.move(tmp_path / "checkpoints" / "step_0000000003", tmp_path / "large")
    (tmp_path / "checkpoints" / "step_0000000003").symlink_to(tmp_path / "large")
    with Checkpoints(tmp_path / "checkpoints", every_steps=1, keep=9) as checkpoints:
        assert checkpoints.newest().state["step"] == 3
        (tmp_path / "large").rename(tmp_path / "unmounted")
        with pytest.raises(InputError, match="step_0000000003 cannot be read"):
            checkpoints.newest()
    assert names(tmp_path / "checkpoints") == [f"step_000000000{step}" for step in (1, 2, 3)]


def test_the_best_checkpoint_is_kept_where_it_cannot_be_read_for_a_moment(tmp_path, capsys):
    """Red if an error of reading its test error has it deleted as an old one."""
    with Checkpoints(tmp_path, every_steps=1, keep=1) as checkpoints:
        checkpoints.save(State(1, made), test_error=0.1)
        checkpoints.wait()
        make_unreadable(tmp_path / "step_0000000001" / "state.json")
        for step in (2, 3):
            checkpoints.save(State(step, made), test_error=0.5)
        checkpoints.wait()
        assert checkpoints.steps == [1, 3]


# Runs with missing rows and fields.


@pytest.mark.parametrize("how", ["missing", "emptied", "garbage", "first line"])
def test_damaged_metrics_hide_no_parameters(how, run, capsys):
    """Red if a run begins again, is refused, or uses older parameters as its rows are lost."""
    path, last = run / "metrics.jsonl", arrays_of(run, 20)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes({"garbage": b"\0" * 4000, "first line": b"#" + b"".join(lines)[1:]}.get(how, b""))
    if how == "missing":
        path.unlink()
    history = issgd_jax.train(small(steps=21), run)
    told = capsys.readouterr().err
    assert "resumes from the checkpoint of step 20 of 21" in told and "rows of metrics are lost" in told
    assert [row["step"] for row in history] == ([10, 20, 21] if how == "first line" else [20, 21])
    check_same(run, 20, last)
    assert steps_of(run) == [7, 10, 14, 20, 21] or steps_of(run) == [7, 14, 20, 21]
    if how in ("garbage", "first line"):
        assert (run / "damaged_metrics.jsonl").exists()
    assert issgd_jax.train(small(steps=21), run) == history
    assert "has done its 21 steps" in capsys.readouterr().err


def test_for_lost_rows_no_checkpoint_is_used_that_is_too_old(tmp_path, capsys):
    """Red if a run does nearly all its steps again, from its best checkpoint, as that alone has all its rows."""
    with Checkpoints(tmp_path, every_steps=1, keep=2) as checkpoints:
        for step, error in ((1, 0.1), (8, 0.5), (9, 0.5)):
            checkpoints.save(State(step, lambda step=step: made(step)), test_error=error)
        checkpoints.wait()
        assert checkpoints.steps == [1, 8, 9]
        assert checkpoints.newest(lambda state: "no rows" if state["step"] > 1 else None).state["step"] == 9
        assert checkpoints.steps == [1, 8, 9]
        assert checkpoints.newest(lambda state: "no rows" if state["step"] > 8 else None).state["step"] == 8
        # Red if the run that goes on from 8 keeps, as its own of step 9, a state that it never had.
        assert checkpoints.steps == [1, 8] and (tmp_path / "damaged_step_0000000009").is_dir()


def test_a_metrics_file_that_is_taken_away_is_begun_again(tmp_path, capsys):
    """Red if a run writes for hours into a file that is deleted, or makes no checkpoint any more."""
    with MetricsWriter(tmp_path, tensorboard=False) as writer:
        for step in range(8):
            writer.write({"step": step})
            if step == 1:
                (tmp_path / "metrics.jsonl").unlink()
            elif step == 3:  # as an editor saves it
                shutil.copy(tmp_path / "metrics.jsonl", tmp_path / "copy")
                (tmp_path / "copy").replace(tmp_path / "metrics.jsonl")
            elif step == 5:
                os.truncate(tmp_path / "metrics.jsonl", 13)
            assert writer.position >= (tmp_path / "metrics.jsonl").stat().st_size if step not in (1, 5) else True
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [2, 6, 7]
    assert writer.position == (tmp_path / "metrics.jsonl").stat().st_size
    assert capsys.readouterr().err.count("rows of metrics are lost") == 2


def test_unreadable_metrics_end_the_run_and_stay(run):
    """Red if an error of reading makes a run begin again."""
    make_unreadable(run / "metrics.jsonl")
    before = names(run / "checkpoints")
    with pytest.raises(InputError, match="metrics.jsonl cannot be read .Input/output error"):
        issgd_jax.train(small(steps=21), run)
    assert names(run / "checkpoints") == before and (run / "metrics.jsonl").is_symlink()


def test_an_unreadable_config_ends_the_run_and_names_no_overwriting(run):
    make_unreadable(run / "config.json")
    with pytest.raises(InputError, match="config.json cannot be read .Input/output error") as error:
        issgd_jax.train(small(steps=21), run)
    assert "--overwrite" not in str(error.value)


def change(run, change_state=None, change_arrays=None):
    """Writes the newest checkpoint again with another state or other arrays, and right checksums."""
    path = path_of(run, 20)
    kept = checkpoint.read(path)
    (change_state or change_arrays)(kept.state if change_state else kept.arrays)
    shutil.rmtree(path)
    checkpoint.write(path, kept)


STATE_FIELDS = (
    "step", "cursor", "rebuilt_at", "worker_examples", "failed_rounds", "skipped", "step_seconds", "window_seconds",
    "wall_seconds", "payoff_state", "pending_step", "metrics_bytes", "rounds", "devices", "versions", "test_error",
)  # fmt: skip


def test_every_field_of_a_checkpoint_is_known_here(finished):
    state = checkpoint.read(path_of(finished[0], 20)).state
    assert set(state) == set(STATE_FIELDS)
    run_state.check_fields(state, ("devices", "versions", "test_error"))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        *(((name,), KeyError, f"has no '{name}': an earlier version") for name in STATE_FIELDS),
        (("payoff_state", "gains"), KeyError, "has no 'payoff_state.gains': an earlier version"),
        (("cursor", "item"), KeyError, "has no 'cursor.item'"),
        (("rounds", 0, "num_examples"), KeyError, "has no 'rounds.0.num_examples'"),
        (("moment",), 1, "has the unknown field 'moment': a later version"),
        (("payoff_state", "x"), 1, "has the unknown field 'payoff_state.x': a later version"),
        (("step",), "20", "has step = '20', where this version has an integer >= 0"),
        (("metrics_bytes",), -1, "has metrics_bytes = -1, where this version has an integer >= 0"),
        (("skipped",), True, "has skipped = True, where this version has an integer"),
        (("wall_seconds",), None, "has wall_seconds = None, where this version has a number"),
        (("payoff_state", "moments"), [1.0], "has payoff_state.moments = .1.0., where this version has three numbers"),
        (("payoff_state", "active"), 1, "has payoff_state.active = 1, where this version has true or false"),
        (("rounds",), {}, "has rounds = {}, where this version has a list"),
        (("cursor",), 5, "has cursor = 5, where this version has fields"),
    ],
)
def test_another_state_is_refused_naming_the_field(path, value, message, finished):
    """Red at a KeyError or TypeError, or if what is missing is made up."""
    state = checkpoint.read(path_of(finished[0], 20)).state
    state["rounds"] = state["rounds"] or [{"step": 19, "num_examples": 5}]
    *outer, name = path
    inner = functools.reduce(lambda values, key: values[key], outer, state)
    if value is KeyError:
        del inner[name]
    else:
        inner[name] = value
    with pytest.raises(InputError, match=f"{message}.*choose another --workdir, or start again with --overwrite"):
        run_state.check_fields(state, ("devices", "versions", "test_error"))


def test_a_checkpoint_of_another_version_is_refused_and_stays(run):
    change(run, lambda state: state.pop("payoff_state"))
    before = names(run / "checkpoints")
    with pytest.raises(InputError, match="of step 20 has no 'payoff_state': an earlier version"):
        issgd_jax.train(small(steps=21), run)
    assert names(run / "checkpoints") == before


def test_a_checkpoint_under_another_name_is_refused(run):
    path_of(run, 20).rename(path_of(run, 21))
    with pytest.raises(InputError, match="step_0000000021 holds the state of step 20: give the folder its own name"):
        issgd_jax.train(small(steps=22), run)


PARAMETER = "train_state.params.params.Dense_0.kernel"


@pytest.mark.parametrize(
    ("change_arrays", "message"),
    [
        (lambda arrays: arrays.pop("sampler_state.score"), "has no such array where this run has sampler_state.score"),
        (lambda arrays: arrays.update(extra=np.zeros(3)), "has the array extra, which this run does not have"),
        (
            lambda arrays: arrays.update({"train_state.step": np.zeros((), np.float32)}),
            r"has float32\(\) where this run has train_state.step: int32\(\)",
        ),
        (
            lambda arrays: arrays.update({"train_state.step": np.zeros(2, np.int32)}),
            r"has int32\(2,\) where this run has train_state.step: int32\(\)",
        ),
    ],
)
def test_other_arrays_are_refused_naming_one(change_arrays, message, run):
    change(run, change_arrays=change_arrays)
    with pytest.raises(InputError, match=f"checkpoint of step 20 {message}"):
        issgd_jax.train(small(steps=21), run)


# Full disks.

TORN_OFF_AT_THE_END = """
import pathlib, resource, signal, sys
from issgd_jax import InputError
from tests.run.checkpoint_test import State, made
from issgd_jax.run.checkpoints import Checkpoints

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
with Checkpoints(pathlib.Path(sys.argv[1]), every_steps=1, keep=9) as checkpoints:
    checkpoints.save(State(1, lambda: made(1)))
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
    arrays = {f"{i}": made(i, size=10**5).arrays["params.kernel"] for i in range(60)}
    big = made(2).__class__(arrays, {"step": 2})
    checkpoints.save(State(2, lambda: big), is_last=True)
    try:
        checkpoints.wait()
    except InputError as error:
        print(error)
    assert checkpoints.steps == [1]
"""


def test_a_last_checkpoint_that_is_torn_off_is_an_error_without_noise(tmp_path):
    """The space checked out, and the disk refused in the middle. Red if Orbax's threads print their tracebacks."""
    done = subprocess.run(
        [sys.executable, "-c", TORN_OFF_AT_THE_END, tmp_path / "checkpoints"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the last checkpoint, of step 2, could not be written" in done.stdout
    assert "File too large" in done.stdout and "the same command repeats the steps from 1 on" in done.stdout
    assert not done.stderr, done.stderr


FULL_AT_THE_END = """
import sys
import jax
jax.config.update("jax_platforms", "cpu")
from issgd_jax import main
sys.argv = ["issgd-jax", "--config=experiments/configs/digits.py:smoke", f"--workdir={sys.argv[1]}/run",
    "--config.steps=6", "--config.checkpoint.every_steps=1000", "--config.eval_every=6", "--config.log.progress=False",
    *sys.argv[2:]]
main.run()
"""


@pytest.mark.skipif(not can_have_a_small_disk(), reason="this system lets nobody mount a small disk")
def test_a_disk_too_full_for_the_last_checkpoint_is_an_error(tmp_path):
    """Red if a run ends with status 0 and its parameters are nowhere."""
    done = in_small_disk(tmp_path / "disk", 200_000, FULL_AT_THE_END, "--config.model.mlp.hidden_sizes=(256,256)")
    assert done.returncode == 1, done.stderr
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the last checkpoint, of step 6, could not be written, so that the run's last parameters are not" in line
    assert "No space left on device" in line and "make room in" in line and "--overwrite starts again" in line
    assert "Traceback" not in done.stderr and "Event loop" not in done.stderr


@pytest.mark.skipif(not can_have_a_small_disk(), reason="this system lets nobody mount a small disk")
def test_a_disk_too_full_for_anything_is_an_error(tmp_path):
    done = in_small_disk(tmp_path / "disk", 4096, FULL_AT_THE_END)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("error: ") == 1 and "cannot be written (No space left on device)" in done.stderr


def test_a_stop_whose_checkpoint_fails_says_so(tmp_path, monkeypatch):
    """Red if a signal's message promises the parameters of a step that were not saved."""

    def refuse(folder, checkpoint, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "write", refuse)
    monkeypatch.setattr(loop.supervision.Supervision, "finished", lambda watch, step: signal.raise_signal(15))
    with pytest.raises(
        StoppedError, match="stopped by SIGTERM at step 0; .*, of step 0, could not be written"
    ) as error:
        issgd_jax.train(small(steps=8), tmp_path)
    assert "No space left on device" in str(error.value)


def test_a_last_checkpoint_that_fails_ends_the_run_with_an_error(tmp_path, monkeypatch):
    """Its parameters would be nowhere. Red if the run returns its rows as if all were well."""

    def refuse(folder, checkpoint, **options):
        if checkpoint.state["step"] == 8:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        write(folder, checkpoint, **options)

    write = checkpoint.write
    monkeypatch.setattr(checkpoint, "write", refuse)
    message = "last checkpoint, of step 8, could not be written.*Disk quota exceeded.*repeats the steps from 7 on"
    with pytest.raises(InputError, match=message):
        issgd_jax.train(small(steps=8), tmp_path)
    monkeypatch.undo()
    history = issgd_jax.train(small(steps=8), tmp_path)
    assert [row["step"] for row in history] == [0, 8] and steps_of(tmp_path) == [7, 8]
