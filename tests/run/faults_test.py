"""Real processes, killed at random moments, stopped by signals, stalled, or two where one belongs."""

import fcntl
import json
import os
import pathlib
import random
import signal
import time

import numpy as np
import pytest

import issgd_jax
from issgd_jax import InputError
from issgd_jax.run import checkpoint, metrics
from issgd_jax.run import workdir as workdir_lib
from issgd_jax.run.supervision import Supervision
from issgd_jax.run.workdir import locked, owner
from tests import victims
from tests.helpers import arrays_of, check_same, read_events, scores, soak, soak_seed, steps_of, without_time

ROOT = pathlib.Path(__file__).parents[2]
# Tests that run side by side, and kills in each.
CHAINS, KILLS = soak((1, 6), (4, 25))


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A run that was never stopped."""
    workdir = tmp_path_factory.mktemp("reference")
    history = issgd_jax.train(victims.config(), workdir)
    return without_time(history), scores(workdir), arrays_of(workdir, 200)


def check_whole(workdir, reference):
    """Bit by bit the run that was never stopped: rows, events, scores, parameters; and nothing left over."""
    history, known, last = reference
    rows = metrics.read_metrics(workdir / "metrics.jsonl")
    assert without_time(rows) == history
    (events,) = workdir.glob("events.out.tfevents.*")
    assert [step for step, _ in read_events(events)["train/loss"]] == [row["step"] for row in rows]
    np.testing.assert_array_equal(scores(workdir), known)
    check_same(workdir, 200, last)
    assert len(steps_of(workdir)) <= 3 and not list(workdir.rglob("making_*")) and not list(workdir.rglob("*.new"))


@pytest.mark.parametrize("chain", range(CHAINS))
def test_killed_at_random_moments_and_resumed_bit_by_bit(chain, reference, tmp_path):
    """kill -9; red if anything is lost, doubled or differs in a bit afterwards."""
    rng, context = random.Random(soak_seed() + chain), victims.server()
    runs, kills, during_a_write = 0, 0, 0
    while kills < KILLS or not during_a_write:
        workdir = tmp_path / str(runs)
        begun = context.Event()
        process = context.Process(target=victims.train, args=(workdir, begun, {}))
        process.start()
        moment = rng.random() if kills < KILLS else 0.3
        if moment < 0.2:  # while it starts
            process.join(rng.uniform(0, 2.5))
        else:
            assert begun.wait(120)
            if moment < 0.4:  # while it writes
                while process.is_alive() and not any((workdir / "checkpoints").glob("making_*")):
                    time.sleep(0.001)
            else:
                process.join(rng.uniform(0, 1.5))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            during_a_write += any((workdir / "checkpoints").glob("making_*"))
        else:
            assert process.exitcode == 0
        if process.exitcode == 0 or (kills >= KILLS and during_a_write):
            issgd_jax.train(victims.config(), workdir)
            check_whole(workdir, reference)
            runs += 1


def program(workdir, *arguments):
    """Starts the program of `make run`'s config at smoke size. Returns the process and the path of its output."""
    log = workdir.with_name(f"{workdir.name}-{time.monotonic_ns()}.log")
    config = ROOT / "experiments" / "configs" / "digits.py:smoke"
    return victims.start_command([f"--config={config}", f"--workdir={workdir}", *arguments], log), log


def wait_for_rows(workdir, number, process, log):
    """Waits until so many rows of metrics are written: from the first on the run is in its loop."""
    metrics_file = workdir / "metrics.jsonl"
    while not (metrics_file.exists() and metrics_file.read_text().count("\n") >= number):
        assert process.is_alive(), log.read_text()
        time.sleep(0.05)


def wait_for_end(process, timeout=120):
    process.join(timeout)
    assert process.exitcode is not None, "still runs"
    return process.exitcode


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_stops_between_two_steps_and_the_same_command_goes_on(number, tmp_path):
    workdir = tmp_path / "run"
    arguments = ("--config.steps=1000000", "--config.checkpoint.every_steps=1000000", "--config.eval_every=100")
    process, log = program(workdir, *arguments)
    wait_for_rows(workdir, 2, process, log)
    os.kill(process.pid, number)
    assert wait_for_end(process) == 128 + number, log.read_text()
    step = steps_of(workdir)[-1]
    assert f"stopped by {number.name} at step {step:,}; the same command resumes from the checkpoint" in log.read_text()
    assert "Traceback" not in log.read_text() and step > 0
    again, log = program(workdir, *arguments[1:], f"--config.steps={step + 10}")
    assert wait_for_end(again) == 0, log.read_text()
    assert f"resumes from the checkpoint of step {step:,} of {step + 10:,}" in log.read_text()


def test_a_program_that_looks_who_runs_keeps_none_from_starting(tmp_path, monkeypatch):
    """Red if a run is refused, in the name of one that has ended, as `status` has the lock for a moment."""
    with locked(tmp_path):
        pass
    with open(tmp_path / "lock") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(workdir_lib.time, "sleep", lambda seconds: looking.close())
        with locked(tmp_path):
            assert owner(tmp_path)


def test_two_programs_on_one_folder(tmp_path):
    """The lock dies with its owner, also by kill -9."""
    workdir = tmp_path / "run"
    first, log = program(workdir, "--config.steps=1000000")
    wait_for_rows(workdir, 1, first, log)
    second, log = program(workdir)
    assert wait_for_end(second) == 1
    assert f"is in use by process {first.pid} on " in log.read_text() and "Traceback" not in log.read_text()
    with pytest.raises(InputError, match=f"is in use by process {first.pid}"), locked(workdir):
        pass
    assert first.is_alive()
    first.kill()
    first.join()
    third, log = program(workdir, "--overwrite", "--config.steps=10")
    assert wait_for_end(third) == 0, log.read_text()


def test_the_heartbeat_tells_the_last_finished_step(tmp_path):
    before = time.time()
    issgd_jax.train(victims.config(steps=20), tmp_path)
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert beat["step"] == 20 and beat["process"] == os.getpid() and before < beat["at"] <= time.time()


def test_a_stall_is_logged_with_the_stacks_of_all_threads(tmp_path, capsys):
    def stalled_in_here(seconds):
        time.sleep(seconds)

    with Supervision(tmp_path, watchdog_seconds=0.2) as watch:
        watch.finished(41)
        stalled_in_here(1.0)
        log = capsys.readouterr().err
        assert f"no step has finished for 0.2 s since step 41; stacks of all threads: {tmp_path}/watchdog.txt" in log
        assert log.count("no step has finished") == 1  # once a stall
        assert (tmp_path / "watchdog.txt").read_text().count("stalled_in_here") == 1
        for step in range(42, 50):
            watch.finished(step)
            time.sleep(0.1)
        assert "no step" not in capsys.readouterr().err
        stalled_in_here(0.5)
        assert "since step 49" in capsys.readouterr().err


def test_signals_are_given_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Supervision(tmp_path, watchdog_seconds=60) as watch:
        os.kill(os.getpid(), signal.SIGINT)
        assert watch.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_flipped_bit_in_the_newest_checkpoint_costs_only_its_steps(reference, tmp_path, capsys):
    issgd_jax.train(victims.config(), tmp_path)
    newest = tmp_path / "checkpoints" / "step_0000000200"
    path = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    text = bytearray(path.read_bytes())
    text[len(text) // 2] ^= 4
    path.write_bytes(text)
    issgd_jax.train(victims.config(), tmp_path)
    told = capsys.readouterr().err
    assert "checkpoint of step 200 cannot be used" in told and "resumes from the checkpoint of step 196" in told
    check_whole(tmp_path, reference)
    assert checkpoint.read(newest).state["step"] == 200
