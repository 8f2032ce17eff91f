"""The command line: its commands, and what they print of runs."""

import fcntl
import json
import os
import pathlib
import subprocess
import sys

import matplotlib.image
import pytest

from issgd_jax import __main__ as command

ROOT = pathlib.Path(__file__).parents[1]
# ml_collections reads the config file so.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")


def write_run(folder, *, cut=False, steps=(0, 10, 20)):
    folder.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "step_seconds": 0.1 * step,
            "train/loss": 2.0 / (1 + step),
            "test/error": 0.5,
            "wall_seconds": 9.0,
        }
        | {f"variance/{kind}": 1.0 for kind in ("uniform", "actual", "ideal", "gain")}
        for step in steps
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text[:-30] if cut else text)
    (folder / "config.json").write_text(json.dumps({"config": {"steps": 20}}))
    (folder / "heartbeat.json").write_text(json.dumps({"step": steps[-1], "at": 0.0}))
    return folder


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_without_arguments_the_commands_are_listed(arguments, run_command):
    code, text = run_command(*arguments)
    assert code == 0 and text.startswith("usage: issgd-jax COMMAND")
    assert all(f"\n  {name} " in text for name in command._COMMANDS)


def test_the_modules_and_the_installed_program_are_one(run_command):
    done = subprocess.run([sys.executable, "-m", "issgd_jax"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == run_command()[1] and not done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "error: issgd-jax has no command 'trian': did you mean train?\n"),
        (
            ["--workdir=x"],
            "no command '--workdir=x': choose one of train, compare, potential, plot, status, watch, report, hardest\n",
        ),
        (["train"], "error: --workdir is empty: name a folder for the run, as in --workdir=runs/digits\n"),
        (["compare"], "error: --workdir is empty: name a folder for the run, as in --workdir=runs/digits\n"),
        (["train", "--workdri=x"], "error: Unknown command line flag 'workdri'. Did you mean: workdir ?\n"),
        (["plot", "none"], "error: none holds no run (no metrics.jsonl): name the --workdir of one\n"),
        (["status", "none"], "error: none holds no run: name the --workdir of one\n"),
        (["watch", "none"], "error: none holds no run: name the --workdir of one\n"),
        (["report", "none"], "error: none holds no run (no metrics.jsonl): name the --workdir of one\n"),
        (["hardest", "none"], "error: none holds no run: name the --workdir of one\n"),
    ],
)
def test_a_mistake_is_one_readable_line(arguments, message, run_command):
    code, text = run_command(*arguments)
    assert code == 1 and text.endswith(message) and text.count("\n") == 1


def test_a_reader_that_ends_early_sees_no_traceback():
    """Red if `issgd-jax ... | head` prints one."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "issgd_jax"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writer)
    assert done.returncode == 141 and not done.stderr


def test_train_runs_the_program(tmp_path, run_command):
    """Red if the flags of the command are not those of `issgd_jax.main`, or its config not the default."""
    arguments = ["steps=1", "eval_every=1", "proposal.name=uniform", "log.progress=False", "log.tensorboard=False"]
    code, text = run_command("train", f"--workdir={tmp_path}", *(f"--config.{argument}" for argument in arguments))
    assert code == 0, text
    assert json.loads((tmp_path / "config.json").read_text())["config"]["data"]["name"] == "digits"


def test_runs_are_drawn_by_the_names_of_their_folders(tmp_path, run_command, monkeypatch):
    """Red if a run that is still writing its last row cannot be drawn, or --output is ignored."""
    monkeypatch.chdir(tmp_path)
    folders = [write_run(tmp_path / "a", steps=(0,)), write_run(tmp_path / "b", cut=True), write_run(tmp_path / "c")]
    assert run_command("plot", *folders) == (0, "runs.png\n")
    assert run_command("plot", folders[0], "--output=one.png") == (0, "one.png\n")
    assert matplotlib.image.imread("runs.png").shape == matplotlib.image.imread("one.png").shape


def test_what_cannot_be_drawn_or_written_is_named(tmp_path, run_command):
    one, empty = write_run(tmp_path / "arms" / "importance-0"), write_run(tmp_path / "empty", steps=(0,), cut=False)
    (empty / "metrics.jsonl").write_text("")
    assert f"did you mean {one}?" in run_command("plot", tmp_path / "arms")[1]
    assert "has no row of metrics yet: wait for the first measurement" in run_command("plot", empty)[1]
    for output in ("none/runs.png", "runs.txt"):
        code, text = run_command("plot", one, f"--output={tmp_path / output}")
        assert code == 1 and text.count("\n") == 1 and "cannot be written" in text


def test_status_of_a_run_that_is_running_stopped_and_finished(tmp_path, run_command):
    """Red if the lock is not read, or is left behind."""
    folder = write_run(tmp_path / "run", steps=(0, 10))
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        print("process 12 on node-1", file=file, flush=True)
        assert f"{folder}: running, process 12 on node-1\nstep 10 of 20, " in run_command("status", folder)[1]
    text = run_command("status", folder)[1]
    assert f"{folder}: stopped\n" in text and "measured at step 10: train/loss 0.18182, test/error 50.00%" in text
    assert f"{write_run(tmp_path / 'done')}: finished\nstep 20 of 20, " in run_command("status", tmp_path / "done")[1]
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
