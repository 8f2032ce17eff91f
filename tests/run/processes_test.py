"""A learner that spans two real processes: equal to one, stopped, killed; red if one waits for the other forever."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import issgd_jax
from issgd_jax import InputError, devices
from issgd_jax.run.workdir import flatten
from tests import victims
from tests.helpers import arrays_of, check_close, check_same, rewind, scores, small, smoke, soak, steps_of, without_time

ROOT = pathlib.Path(__file__).parents[2]
# Shards of unequal size, and rounds in flight at every checkpoint.
FIELDS = {
    "steps": 24,
    "devices__learners": 2,
    "devices__workers": 2,
    "learner__batch_size": 16,
    "schedule__score_delay": 9,
    "data__train_split": "train[:1199]",
}
ENDLESS = {"steps": 10**6, "eval_every": 10**6, "checkpoint__every_steps": 50, "workers__enabled": False}


class Pair:
    """Two processes that run one learner of the fields; `differ` are the second's."""

    def __init__(self, workdir, differ=None, **overrides):
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        self.logs = [workdir.with_name(f"{workdir.name}-{port}-{index}.log") for index in range(2)]
        self.processes = []
        for index, log in enumerate(self.logs):
            more = {"coordinator": f"127.0.0.1:{port}", "num_processes": 2, "process_id": index}
            fields = overrides | {f"distributed__{name}": value for name, value in more.items()}
            config = small(**FIELDS | fields | {"devices__host_platform_count": 2} | (differ or {} if index else {}))
            flags = [f"--config.{name}={value}" for name, value in flatten(config).items() if value is not None]
            file = ROOT / "experiments" / "configs" / "digits.py"
            arguments = [f"--config={file}", f"--workdir={workdir}", *flags]
            self.processes.append(victims.start_command(arguments, log))

    def end(self, timeout=90):
        """Exit statuses."""
        for process in self.processes:
            process.join(timeout)
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in statuses, [log.read_text() for log in self.logs]
        return statuses

    def wait_for_checkpoint(self, workdir, after=0):
        for _ in range(1800):
            if (steps_of(workdir) or [0])[-1] > after:
                return
            assert all(process.is_alive() for process in self.processes), [log.read_text() for log in self.logs]
            time.sleep(0.05)
        raise TimeoutError(workdir)


@pytest.mark.parametrize("overrides", soak([{}], [{}, {"workers__enabled": False}]), ids=str)
def test_two_processes_are_one_with_two_learners_and_go_on_bit_by_bit(overrides, tmp_path):
    """Red if a replica misses a score or the other's share, or goes on from anything but what the first has."""
    workdir = tmp_path / "two"
    one = issgd_jax.train(small(**FIELDS | overrides), tmp_path / "one")
    pair = Pair(workdir, **overrides)
    assert pair.end() == [0, 0]
    first, second = (json.loads(log.with_suffix(".json").read_text()) for log in pair.logs)
    assert without_time(first) == without_time(second)
    check_close(first, one)
    np.testing.assert_allclose(scores(workdir)[0], scores(tmp_path / "one")[0], rtol=2e-3, atol=1e-6)
    assert first[-1]["learner_examples"] == 24 * 32
    assert len(list(workdir.glob("metrics*"))) == 1 and not list(tmp_path.rglob("*.new"))
    if overrides:
        return
    known, last = scores(workdir), arrays_of(workdir, 24)
    rewind(workdir, 14)
    pair = Pair(workdir, **overrides)
    assert pair.end() == [0, 0]
    first_again, second_again = (json.loads(log.with_suffix(".json").read_text()) for log in pair.logs)
    assert without_time(first_again) == without_time(first)
    assert without_time(second_again) == without_time(second[-2:])  # since step 14
    np.testing.assert_array_equal(scores(workdir), known)
    check_same(workdir, 24, last)


def test_a_signal_to_one_stops_both_and_a_death_ends_the_other(tmp_path):
    workdir = tmp_path / "two"
    pair = Pair(workdir, **ENDLESS)
    pair.wait_for_checkpoint(workdir)
    os.kill(pair.processes[1].pid, signal.SIGTERM)
    assert pair.end() == [128 + signal.SIGTERM] * 2
    stopped_at = steps_of(workdir)[-1]
    told = [log.read_text() for log in pair.logs]
    assert f"stopped by SIGTERM at step {stopped_at:,}; the same command resumes from the checkpoint" in told[0]
    assert f"stopped by SIGTERM at step {stopped_at:,}; process 0 has the checkpoints" in told[1]

    pair = Pair(workdir, **ENDLESS)
    pair.wait_for_checkpoint(workdir, after=stopped_at)
    pair.processes[1].kill()
    assert pair.end(timeout=60) == [1, -signal.SIGKILL]
    told = pair.logs[0].read_text()
    assert f"resumes from the checkpoint of step {stopped_at:,}" in told
    assert "error: process 0 of 2 cannot continue, most likely as another is lost" in told and "Traceback" not in told


@pytest.mark.parametrize("differ", [None, {"learner__learning_rate": 0.1}], ids=["killed", "another config"])
def test_whatever_ends_one_ends_the_other(differ, tmp_path):
    workdir = tmp_path / "two"
    pair = Pair(workdir, differ, **ENDLESS)
    if not differ:
        pair.wait_for_checkpoint(workdir)
        pair.processes[0].kill()
    statuses = pair.end(timeout=120)
    assert 0 not in statuses
    if differ:
        assert (
            "runs another config than process 0: learner.learning_rate is 0.1, there 0.05" in pair.logs[1].read_text()
        )


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((1,), "devices.learners must be a multiple of the 2 processes.*, got 1: set --config.devices.learners=2"),
        ((5,), r"between 1 and 4 with 4 device\(s\) of 2 processes, got 5: .*host_platform_count=3"),
        ((2, 1), "devices.workers must be a multiple of the 2 processes.*, got 1: set --config.devices.workers=2"),
        ((2, 3), "devices.workers must be between 1 and 2 with 4 .* 2 of them learners, got 3"),
    ],
)
def test_processes_have_equal_parts(numbers, message, monkeypatch):
    here = jax.devices()
    monkeypatch.setattr(devices, "_devices", lambda count: [here[:2], here[2:]])
    with pytest.raises(InputError, match=message):
        devices.assign_roles(*numbers)
    assert devices.assign_roles(2).learners == (here[0], here[2])
    assert devices.assign_roles(2).workers == (here[1], here[3])
    monkeypatch.setattr(devices, "_devices", lambda count: [here[:1], here[2:]])
    with pytest.raises(InputError, match="the processes have 1, 2 devices"):
        devices.assign_roles(2)


ADDRESS = {"distributed__coordinator": "127.0.0.1:45619", "distributed__num_processes": 2, "distributed__process_id": 0}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"distributed__num_processes": 2},
            "distributed.coordinator must be host:port .* or auto, got None, 2 and None",
        ),
        (ADDRESS | {"distributed__coordinator": "here"}, "distributed.coordinator must be host:port .*, got 'here'"),
        (ADDRESS | {"distributed__coordinator": "auto"}, "coordinator is auto, which finds .*, but they are 2 and 0"),
        (ADDRESS | {"distributed__process_id": 2}, "distributed.process_id must be below num_processes, got 2 of 2"),
        (ADDRESS | {"schedule__name": "free_running"}, "schedule.name is free_running, .*: use relaxed or exact"),
        (ADDRESS | {"proposal__when": "auto"}, "measures the cost of a step.*: give it by --config.proposal.cost"),
        (ADDRESS, "distributed.coordinator is 127.0.0.1:45619, but the processes cannot be joined there .*start a new"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_first(overrides, message, tmp_path):
    jax.devices()
    with pytest.raises(InputError, match=message):
        issgd_jax.train(smoke(**overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


LISTEN = """
import socket, sys
import jax, psutil
from issgd_jax import processes
from issgd_jax.errors import InputError
jax.config.update("jax_platforms", "cpu")
for coordinator in sys.argv[1:]:
    try:
        processes.join(coordinator, 1, 0)
    except InputError as error:
        print(error)
jax.devices()
print({place.laddr for place in psutil.Process().net_connections() if place.status == "LISTEN"})
"""


def test_the_coordinator_listens_at_the_host_that_is_given_and_nowhere_else():
    """Red if a stranger on another network can reach it, or if JAX aborts the process where it cannot listen."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = server.getsockname()[1]
        with socket.create_server(("127.0.0.2", 0)) as other:
            port = other.getsockname()[1]
        addresses = [f"127.0.0.1:{taken}", "203.0.113.5:45618", "nowhere.invalid:45618", f"127.0.0.2:{port}"]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COORDINATOR_BIND_ADDRESS"}
        command = [sys.executable, "-c", LISTEN, *addresses]
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert done.returncode == 0, done
    *refused, places = done.stdout.splitlines()
    for address, message in zip(addresses, refused, strict=False):
        assert message.startswith(f"distributed.coordinator is {address}, but process 0 cannot listen at {address} (")
    assert len(refused) == 3 and f"port={port})" in places
    # The other places are those of Gloo, which passes arrays between processes.
    assert places.count("127.0.0.2") == 1 and "'::'" not in places and "0.0.0.0" not in places
