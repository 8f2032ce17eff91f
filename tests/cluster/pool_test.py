"""A real Ray cluster on this machine: workers killed, machines that come and go, and whatever does not fit."""

import asyncio
import contextlib
import dataclasses
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

import issgd_jax
from issgd_jax import InputError
from issgd_jax.cluster import channel, dispatcher, link, machines
from issgd_jax.cluster.dispatcher import Dispatcher
from issgd_jax.cluster.leases import Layout
from issgd_jax.cluster.pool import ClusterPool
from issgd_jax.cluster.worker import Work
from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.run import loop, metrics, wiring
from issgd_jax.run.progress import Progress
from issgd_jax.task.losses import example_loss
from issgd_jax.task.models import MODELS
from tests import victims
from tests.helpers import arrays_of, check_same, scores, smoke, soak, steps_of, without_time

ROOT = pathlib.Path(__file__).parents[2]
WORKERS = soak(2, 3)
# Ray has its workers give way to all else; here they are what is tested, beside other tests on as many cores.
os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112


@pytest.fixture(scope="module")
def cluster():
    """A cluster of this machine alone, which all tests share."""
    with machines.connected("local"):
        yield


def small(**overrides):
    fixed = {
        "cluster__address": "local",
        "cluster__workers": WORKERS,
        "devices__workers": 1,
        "devices__host_platform_count": 1,
        "model__mlp__hidden_sizes": (16,),
        "schedule__steps_per_round": 4,
        "schedule__score_delay": 8,
    }
    return smoke(**fixed | overrides)


def ray_processes(name, of=None):
    """Of the cluster that this process, or another, has started."""
    for process in psutil.Process(of).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.name().startswith(name):
                yield process


def wait_for_end(processes):
    """Returns when all have ended; a zombie has."""
    for _ in range(600):
        if not any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in processes):
            return
        time.sleep(0.1)
    raise TimeoutError(processes)


def children():
    return set(psutil.Process().children())


def workers(of=None):
    return {process.pid for process in ray_processes("ray::Worker", of)}


def wait_for_status(pool, condition):
    """Returns the first status that fulfils the condition; it is up to a second old."""
    for _ in range(600):
        if condition(status := pool.status()):
            return status
        time.sleep(0.05)
    raise TimeoutError(status)


class Killer:
    """Stands between the loop and its step, and kills workers with signal 9: so many at each of these steps."""

    def __init__(self, train_step, plan, others, seed=0):
        """others: workers of another run, about to end."""
        self._others = others
        self._train_step, self._plan, self._rng = train_step, dict(plan), random.Random(seed)
        self.step, self.killed = 0, []

    def __call__(self, *arguments, **keywords):
        number = self._plan.get(self.step, 0)
        if number:
            # Not only between two rounds.
            time.sleep(self._rng.uniform(0, 0.05))
            for process in self._rng.sample(self._workers(at_least=number), number):
                os.kill(process, signal.SIGKILL)
                self.killed.append(process)
        self.step += 1
        return self._train_step(*arguments, **keywords)

    def _workers(self, at_least):
        for _ in range(600):
            if len(found := list(workers() - self._others - set(self.killed))) >= at_least:
                return sorted(found)
            time.sleep(0.1)
        raise TimeoutError(f"{at_least} workers")


def make_work(num_examples, size=8):
    """A ConvNet on noise, the same on every machine."""

    def loss_fn(params, image, label):
        return example_loss(model.apply(params, image), label)

    def load(first, last):
        rng = np.random.default_rng(0)
        images = rng.normal(size=(num_examples, size, size, 1)).astype(np.float32)
        labels = rng.integers(0, 3, num_examples).astype(np.int32)
        return images[first:last], labels[first:last]

    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", 2)
    model = MODELS["convnet"](3, channels=(4, 4), dense_size=8)
    return Work(per_example_grad_norms(loss_fn), load, num_examples, tuple(jax.local_devices()[:2]))


def test_a_cluster_run_goes_on_from_its_checkpoint_and_ends_by_a_signal(tmp_path):
    """The program itself, with a cluster of its own; what it leaves behind is no process, also if it is killed."""
    logs = [tmp_path.with_name(f"{tmp_path.name}-{number}.log") for number in range(2)]
    arguments = [
        f"--config={ROOT}/experiments/configs/digits.py:smoke", f"--workdir={tmp_path}", "--config.steps=1000000",
        "--config.cluster.address=local", "--config.cluster.workers=1", "--config.devices.host_platform_count=1",
        "--config.devices.workers=1", "--config.schedule.name=free_running",
    ]  # fmt: skip
    process = victims.start_command(arguments, logs[0], without=machines._PATIENT)
    while not (tmp_path / "metrics.jsonl").exists() or not (tmp_path / "metrics.jsonl").read_text():
        assert process.is_alive(), logs[0].read_text()
        time.sleep(0.05)
    processes = psutil.Process(process.pid).children(recursive=True)
    places = {place.laddr for one in processes for place in one.net_connections() if place.status == "LISTEN"}
    assert places and all(place.ip.endswith("127.0.0.1") for place in places), places
    while not (tmp_path / "cluster.json").exists():
        assert process.is_alive(), logs[0].read_text()
        time.sleep(0.05)
    status_command = [sys.executable, "-m", "issgd_jax", "status", str(tmp_path)]
    status = subprocess.run(status_command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert status.returncode == 0 and all(x in status.stdout for x in ("running, ", "worker 0", "leases:")), status
    raylet = next(one for one in processes if one.name() == "raylet")
    assert raylet.environ()["RAY_worker_register_timeout_seconds"] == "3600"  # a worker that starts is left alone
    assert raylet.nice() == 0 and {os.getpriority(os.PRIO_PROCESS, pid) for pid in workers(process.pid)} == {15}
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    told = logs[0].read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "stopped by SIGTERM" in told and "Traceback" not in told, told
    wait_for_end(processes)
    step = max(int(path.name.removeprefix("step_")) for path in (tmp_path / "checkpoints").glob("step_*"))
    rows = len((tmp_path / "metrics.jsonl").read_text().splitlines())
    again = victims.start_command(arguments, logs[1], without=machines._PATIENT)
    while len((tmp_path / "metrics.jsonl").read_text().splitlines()) < rows + 1:
        assert again.is_alive(), logs[1].read_text()
        time.sleep(0.05)
    processes = psutil.Process(again.pid).children(recursive=True)
    again.kill()
    again.join()
    assert f"resumes from the checkpoint of step {step:,}" in logs[1].read_text()
    assert len(processes) > 3
    wait_for_end(processes)


ENDS = {psutil.Process.kill: "status -9", psutil.Process.suspend: "has sent nothing for 5 s"}


def test_scores_of_machines_with_two_devices_each_equal_those_of_this_process(cluster, monkeypatch, capsys):
    """Also after the process that speaks with Ray has been killed."""
    num_examples, others = 37, children()
    work = make_work(num_examples)
    images, labels = work.load(0, num_examples)
    params = MODELS["convnet"](3, channels=(4, 4), dense_size=8).init(jax.random.key(0), jnp.asarray(images[0]))
    expected = np.asarray(work.score_fn(params, images, labels))
    pool = ClusterPool(
        lambda: make_work(num_examples), num_examples=num_examples, chunk_size=5, num_workers=2, params_bytes=1000
    )
    with pool:
        found, times = np.full(num_examples, np.nan), np.zeros(num_examples, int)
        for round_ in pool.score_next(params, 7, num_rounds=pool.rounds_per_sweep):
            assert round_.step == 7 and round_.num_examples == 10
            np.add.at(times, round_.indices, 1)
            found[round_.indices] = round_.scores
        status = wait_for_status(pool, lambda status: status["leases_done"] >= 2 * pool.rounds_per_sweep)
        monkeypatch.setattr(link, "SILENT_SECONDS", soak(120.0, 5.0))
        for end, reason in soak(list(ENDS.items())[:1], ENDS.items()):
            (driver,) = children() - others
            end(driver)
            rounds = pool.score_next(params, 8, num_rounds=pool.rounds_per_sweep)
            again = {int(i): score for round_ in rounds for i, score in zip(round_.indices, round_.scores)}
            assert pool.status()["drivers_lost"] > 0 and reason in capsys.readouterr().err
            np.testing.assert_array_equal([again[i] for i in range(num_examples)], found)
        # Red if what cannot be started for a moment, as where Ray has taken all memory, ends the run.
        lost = pool.status()["drivers_lost"]
        with monkeypatch.context() as without_python:
            without_python.setattr(sys, "executable", "/no/python")
            (driver,) = children() - others
            driver.kill()
            wait_for_status(pool, lambda status: status["drivers_lost"] >= lost + 2)
        rounds = pool.score_next(params, 9, num_rounds=pool.rounds_per_sweep)
        again = {int(i): score for round_ in rounds for i, score in zip(round_.indices, round_.scores)}
        np.testing.assert_array_equal([again[i] for i in range(num_examples)], found)
        assert "cannot be started: FileNotFoundError" in capsys.readouterr().err
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert times.min() >= 1
    assert status["leases_done"] == 2 * pool.rounds_per_sweep and status["results_discarded"] == 0
    assert status["bytes_in"] == 4 * times.sum()
    assert [worker["devices"] for worker in status["workers"]] == [["cpu", "cpu"]] * 2


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """A run whose workers live: its folder and rows."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, issgd_jax.train(equal_run(), folder)


def equal_run():
    return small(steps=40, eval_every=20, checkpoint__every_steps=20)


def check_equal(folder, rows, undisturbed):
    assert without_time(rows) == without_time(undisturbed[1])
    np.testing.assert_array_equal(scores(folder), scores(undisturbed[0]))
    check_same(folder, 40, arrays_of(undisturbed[0], 40))


def between_steps(monkeypatch, wrap):
    """Puts what `wrap` makes of the step in its place, in the next run, which calls it once a step."""
    build = wiring.build

    def build_with(prepared):
        parts = build(prepared)
        return dataclasses.replace(parts, train_steps=wrap(parts.train_steps))

    monkeypatch.setattr(wiring, "build", build_with)
    monkeypatch.setattr(loop, "MAX_STEPS_A_CALL", 1)


def test_a_run_whose_workers_are_killed_equals_one_whose_workers_live(undisturbed, tmp_path, monkeypatch):
    """Bit by bit: red if a chunk is lost, scored twice, or entered with the parameters of another step."""
    plan, killers, others = soak({11: 1}, {7: 1, 18: 2, 30: 3}), [], workers()
    between_steps(monkeypatch, lambda step: killers.append(Killer(step, plan, others)) or killers[0])
    check_equal(tmp_path, issgd_jax.train(equal_run(), tmp_path), undisturbed)
    assert len(set(killers[0].killed)) == sum(plan.values())


def test_a_run_whose_ray_is_killed_equals_one_whose_ray_lives(undisturbed, tmp_path, monkeypatch, capsys):
    """Killed with signal 9. Red if one of Ray's processes ends the learner, or a round is lost with it.

    The cluster that the other tests share is another local one on this machine: red if the two disturb each other.
    """
    monkeypatch.setattr(machines, "address_of_this_process", lambda address: address)
    others = children()
    plan, step, killed = soak({11: "raylet"}, {7: "raylet", 18: "gcs_server", 30: ""}), [0], []

    def wrap(train_step):
        def kill(*arguments, **keywords):
            if (name := plan.get(step[0])) is not None:
                (ended,) = children() - others
                victim = next(ray_processes(name, ended.pid)) if name else ended
                victim.kill()
                wait_for_end([ended])
                killed.append(name)
            step[0] += 1
            return train_step(*arguments, **keywords)

        return kill

    between_steps(monkeypatch, wrap)
    check_equal(tmp_path, issgd_jax.train(equal_run(), tmp_path), undisturbed)
    assert killed == list(plan.values())
    told = capsys.readouterr().err
    assert told.count("Ray is lost with all its workers, and restarts in") == told.count("Ray runs again") == len(plan)
    assert told.count("Ray's logs are in ") == len(plan), told
    assert len(machines.list_machines()) == 1


def test_training_continues_without_workers_where_ray_cannot_be_had_again(tmp_path, monkeypatch, capsys):
    """Red if the run ends, or waits for workers that can never come; or for a minute, as Ray does without its GCS."""
    monkeypatch.setattr(machines, "address_of_this_process", lambda address: address)
    others, step = children(), [0]

    def wrap(train_step):
        def kill(*arguments, **keywords):
            if step[0] == 11:
                monkeypatch.setattr(link, "_PROGRAM", "raise SystemExit('no Ray any more')")
                monkeypatch.setattr(link, "BACKOFF_SECONDS", 0.01)
                (driver,) = children() - others
                next(ray_processes("gcs_server", driver.pid)).kill()
                wait_for_end([driver])
            step[0] += 1
            return train_step(*arguments, **keywords)

        return kill

    between_steps(monkeypatch, wrap)
    rows = issgd_jax.train(small(steps=40, eval_every=20, checkpoint__every_steps=20, cluster__workers=1), tmp_path)
    told = capsys.readouterr().err
    assert rows[-1]["step"] == 40 and told.count("training continues without workers") == 1, told
    assert all(
        x in told for x in ("Ray's gcs_server has ended", "drivers of Ray in a row are lost (", "no Ray any more")
    )
    assert steps_of(tmp_path)[-1] == 40


def test_workers_make_a_problem_by_its_name(cluster, tmp_path):
    """Red if a worker looks for images and labels where config.problem names something else."""
    config = small(
        problem="tests.own_problem:make_problem", steps=24, eval_every=12, learner__batch_size=8, workers__chunk_size=8,
        cluster__workers=1,
    )  # fmt: skip
    rows = issgd_jax.train(config, tmp_path)
    assert rows[-1]["worker_examples"] > 0 and rows[-1]["failed_rounds"] == rows[-1]["scores/rejected"] == 0
    assert rows[-1]["train/loss"] < rows[0]["train/loss"]


def test_free_running_goes_on_while_workers_die_and_come_back(cluster, tmp_path):
    """Red if the learner waits for the dead, nobody comes back, or an importance weight is not the time waited."""
    others, (number, plan) = workers(), soak((1, {40: 1}), (WORKERS, {40: 1, 80: 2, 120: 3}))
    prepared = wiring.prepare(small(steps=10**6, schedule__name="free_running", cluster__workers=number))
    with prepared.pool as pool, metrics.MetricsWriter(tmp_path, tensorboard=False) as writer:
        parts = wiring.build(prepared)
        killer = Killer(parts.train_step, plan, others)
        entered, last = [], {}

        def train_step(state, sampler_state, sampler, examples, *, uniform):
            with jax.transfer_guard("allow"):  # what a test reads between two steps, the loop itself must not
                now, visited_at = int(sampler_state.visits.now), np.asarray(sampler_state.visits.visited_at)
                scored_at = np.asarray(sampler_state.store.scored_at)
                state, sampler_state, found = killer(state, sampler_state, sampler, examples, uniform=uniform)
                times = now + np.arange(sampler.batch_size)
                waited = (times - visited_at[np.asarray(found.minibatch.indices)]) / sampler.num_examples
                np.testing.assert_allclose(np.asarray(found.minibatch.importance_weights), waited, rtol=1e-6)
                entered.append(int(scored_at.max()))
                last["params"] = jax.device_get(state.params)
            status = pool.status()
            restarts = sum(worker["restarts"] for worker in status["workers"])
            if restarts == sum(plan.values()) and all(worker["alive"] for worker in status["workers"]):
                last.setdefault("back", (status["leases_done"], len(entered)))
            if "back" in last and status["leases_done"] > last["back"][0] + 5 * number:
                raise StopIteration
            return state, sampler_state, found

        steps = loop.Plan(10**6, 10**6, strict=True, progress=Progress(10**6, shown=False, description=""))
        checked = dataclasses.replace(parts, train_step=train_step, measure=lambda *_: {"train/loss": 0.0})
        with pytest.raises(StopIteration):
            loop.run(checked, steps, writer)
        status = wait_for_status(
            pool, lambda x: x["leases_done"] + x["leases_running"] + x["leases_waiting"] == pool._next_lease
        )
    dead, back = entered.index(entered[-1]), last["back"][1]
    assert sum(worker["restarts"] for worker in status["workers"]) == sum(plan.values())
    assert back - max(plan) > 40 and dead > back  # steps without anybody, and scores after that
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(last["params"]))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster can be reached at cluster.address '127.0.0.1:1'"),
        ("nowhere.invalid:6379", "no Ray cluster can be reached at cluster.address 'nowhere.invalid:6379'"),
        ("127.0.0.1:99999", "no Ray cluster can be reached"),
        ("locale", "cluster.address must be local, auto or HOST:PORT, got 'locale'"),
    ],
)
def test_an_address_that_cannot_be_reached(address, message, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(InputError, match=message):
        issgd_jax.train(small(cluster__address=address), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_without_ray(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"cluster.address is 'local', which needs Ray .* 'issgd-jax\[cluster\]'"):
        issgd_jax.train(small(), tmp_path)


def start(make, **arguments):
    fixed = {"num_examples": 37, "chunk_size": 5, "num_workers": 2}
    return ClusterPool(make, **fixed | arguments)


def without_data():
    raise InputError("fashion_mnist is not at /data as array_record")


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (without_data, {}, "machine .* cannot do the work: InputError: fashion_mnist is not at /data"),
        (
            lambda: make_work(36),
            {},
            "machine .* has 36 training examples where the learner has 37: give it",
        ),
        (make_work, {"params_bytes": 10**15}, "object store of machine .* has .* bytes, but two copies .* need"),
    ],
)
def test_a_machine_that_does_not_fit_is_named_before_training(cluster, make, arguments, message):
    with pytest.raises(InputError, match=message), start(make, num_workers=soak(1, 2), **arguments):
        pass


def test_a_chunk_that_does_not_fit():
    with pytest.raises(ValueError, match=r"chunk_size must be between 1 and 37 \(all examples\), got 38"):
        start(make_work, chunk_size=38)
    with pytest.raises(InputError, match=r"\(all examples\), got 1201 \(see --config.workers.chunk_size"):
        wiring.prepare(small(workers__chunk_size=1201))


def test_a_worker_whose_code_fails_is_told_of_and_others_do_it(cluster, capsys):
    """Red if an error in a worker's own code ends the run, or is not told."""

    def make():
        work = make_work(37)
        first = []

        def load(*rows):
            if rows[0] == 0 and not first:
                first.append(rows)
                raise OSError("the disk\nis gone")
            return work.load(*rows)

        return dataclasses.replace(work, load=load)

    params = MODELS["convnet"](3, channels=(4, 4), dense_size=8).init(jax.random.key(0), jnp.zeros((8, 8, 1)))
    with start(make) as pool:
        for round_ in pool.score_next(params, 0, num_rounds=pool.rounds_per_sweep):
            assert np.isfinite(round_.scores).all()
    assert "has failed to score, others try: OSError: the disk … is gone" in capsys.readouterr().err


def make_dispatcher(make, told, *, cluster=None, num_workers=1, start_seconds=60.0):
    layout = Layout.create(37, chunk_size=5, num_workers=1)
    work, here = channel.pack(make), cluster or machines.list_machines()
    return Dispatcher(work, layout, here, num_workers, send=told.append, start_seconds=start_seconds)


@pytest.mark.timeout(120)
def test_the_end_comes_also_with_news_or_a_death_at_the_same_moment(cluster, monkeypatch):
    """Red if a worker that is told to end while it learns something else goes on, and is waited for forever."""
    import ray

    async def dies_at_the_end(*_):
        try:
            await asyncio.sleep(3600)
        finally:
            raise ray.exceptions.ActorDiedError

    async def ends_with_news():
        dispatcher = make_dispatcher(lambda: make_work(37), [])
        running = asyncio.create_task(dispatcher.run())
        await dispatcher.wait_for_workers()
        worker = object()
        dispatcher._leases.add_worker(worker)
        waiting = asyncio.create_task(dispatcher._acquire(worker))
        await asyncio.sleep(0.01)
        dispatcher._notify()
        waiting.cancel()
        await asyncio.wait([waiting], timeout=10)
        running.cancel()
        await asyncio.wait([running])
        return waiting.cancelled()

    monkeypatch.setattr(Dispatcher, "_serve", dies_at_the_end)
    assert asyncio.run(ends_with_news())


def test_ray_that_ends_while_workers_start_ends_in_one_error_that_names_the_log(cluster, monkeypatch):
    others = children()
    receive = link.Link._receive

    def kill_when_joined(self, kind, *values):
        receive(self, kind, *values)
        if kind == "joined":
            (driver,) = children() - others
            driver.kill()

    monkeypatch.setattr(link.Link, "_receive", kill_when_joined)
    with pytest.raises(InputError, match="has ended with status -9.*Ray's logs are in .*/logs"), start(make_work):
        pass


def dies_while_it_starts(file, times):
    """The work of a worker that is killed with signal 9 before it has started, so many times."""

    def make():
        with open(file, "a") as deaths:
            deaths.write("x")
        if file.stat().st_size <= times:
            os.kill(os.getpid(), signal.SIGKILL)
        from tests.cluster import pool_test  # noqa: PLW0406, takes seconds, which those that die save

        return pool_test.make_work(37)

    return make


def test_a_worker_that_is_killed_while_it_starts_is_started_again(cluster, tmp_path, capsys):
    """Red if the run ends with the first death, or goes on with them without end."""
    with start(dies_while_it_starts(tmp_path / "twice", 2), num_workers=1) as pool:
        assert pool.status()["workers"][0]["restarts"] == 2
    assert "worker 0 on" in (told := capsys.readouterr().err) and told.count("its process has died") == 2
    message = "worker 0 on .* cannot start: its process has died; see the newest worker-.* in .*/logs"
    with pytest.raises(InputError, match=message), start(dies_while_it_starts(tmp_path / "ever", 99), num_workers=1):
        pass
    assert (tmp_path / "ever").stat().st_size == dispatcher.MAX_FAILURES


@pytest.mark.parametrize("has_started", [False, True], ids=["before training", "during"])
def test_a_worker_that_never_starts_is_told_of_and_not_waited_for_without_limit(has_started, cluster, monkeypatch):
    """Red if such a wait is silent or endless. (`COME_AND_GO` has one that Ray gives no process.)"""
    monkeypatch.setattr(dispatcher, "TELL_SECONDS", (0.5, 1.0))
    monkeypatch.setattr(dispatcher, "_WATCH_SECONDS", 0.1)
    told = []

    async def wait():
        one = make_dispatcher(lambda: time.sleep(3600), told, start_seconds=4.0)
        running = asyncio.create_task(one.run())
        try:
            if has_started:
                one.submit(dispatcher.Parameters(0, 0, None, 0), [0], True)
                await running
            else:
                await one.wait_for_workers()
        finally:
            running.cancel()
            await asyncio.wait([running])

    missing = r"worker 0 on .* \(\d+ s: (Ray has not started its process: PENDING|its process runs, and is loading)"
    message = f"none of the 1 worker.* has started within 4 s: {missing}.*; see .*, and Ray's logs in .*/logs"
    with pytest.raises(InputError, match=message):
        asyncio.run(wait())
    assert any(re.search(f"waiting for {missing}", text) for _, text in told), told


COME_AND_GO = """
import os, pathlib, sys, time
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
import numpy as np, ray
from ray.cluster_utils import Cluster
from issgd_jax.cluster import machines
from issgd_jax.cluster import pool as pool_lib
from issgd_jax.errors import InputError
from tests.cluster.pool_test import make_work, start

class Node:
    def __init__(self, **options):
        self.node = cluster.add_node(num_cpus=1, **options)

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
ray.init(cluster.address, namespace=machines.NAMESPACE, log_to_driver=False, logging_level="ERROR")
other = cluster.add_node(num_cpus=1, env_vars={"PYTHONPATH": sys.argv[1]})
cluster.wait_for_nodes()
try:
    with start(lambda: make_work(37), num_workers=None):
        raise AssertionError("another version of jax is accepted")
except InputError as error:
    print(error)
cluster.remove_node(other)
first = cluster.add_node(num_cpus=1, num_gpus=1)
cluster.wait_for_nodes()

@ray.remote(num_cpus=0, num_gpus=1)
class Other:
    def wait(self):
        pass

other = Other.remote()
ray.get(other.wait.remote())
pool_lib.START_SECONDS = 2.0
try:
    with start(lambda: make_work(37), num_workers=None):
        raise AssertionError("a worker has started without the GPU that it needs")
except InputError as error:
    print(error)
pool_lib.START_SECONDS = 300.0
ray.kill(other)

def score(pool, sweeps):
    for _ in range(sweeps):
        for round_ in pool.score_next(params, 0, num_rounds=pool.rounds_per_sweep):
            assert np.isfinite(round_.scores).all()

import jax, jax.numpy as jnp
from issgd_jax.task.models import MODELS
params = MODELS["convnet"](3, channels=(4, 4), dense_size=8).init(jax.random.key(0), jnp.zeros((8, 8, 1)))
with start(lambda: make_work(37), num_workers=None, reproducible=False) as pool:
    score(pool, 1)
    assert len(pool.status()["workers"]) == 1
    second = cluster.add_node(num_cpus=1)
    while sum(worker["leases"] > 0 for worker in pool.status()["workers"]) < 2:
        score(pool, 1)
    cluster.remove_node(first)
    while len(pool.status()["workers"]) > 1:
        score(pool, 1)
    score(pool, 2)
    assert [worker["worker"] for worker in pool.status()["workers"]] == ["worker 1"]
print("survived")
ray.shutdown()
cluster.shutdown()
"""


def test_machines_come_and_go_and_one_with_another_jax_is_refused(tmp_path):
    """Each a Ray node of its own. Red if one that joins is not used, or one that leaves is waited for."""
    (tmp_path / "jax-0.0.1.dist-info").mkdir()
    (tmp_path / "jax-0.0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: jax\nVersion: 0.0.1\n")
    done = subprocess.run(
        [sys.executable, "-c", COME_AND_GO, tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0 and done.stdout.endswith("survived\n"), done
    assert f"has jax 0.0.1 where the learner has {jax.__version__}: install the same on all machines" in done.stdout
    assert re.search(r"started within 2 s: worker 0 .*has not started its process.*, 0 of 1 GPU are free", done.stdout)
    assert "is lost: its machine has left the cluster" in done.stderr
