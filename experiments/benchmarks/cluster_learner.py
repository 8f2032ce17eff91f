"""Step rate of a learner while its workers score. See `experiments.benchmarks.cluster`."""

import collections
import contextlib
import functools
import itertools
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.cluster_pool import DEVICES, make_work


def measure_overlap() -> dict:
    """Measures the digits experiment on four simulated devices, with workers that only wait."""
    import jax
    import jax.numpy as jnp

    from issgd_jax.scoring.workers import WorkerPool

    seconds_a_chunk, rates, ready_after = 0.05, {}, []
    with tempfile.TemporaryDirectory() as folder:
        for scoring in (False, True, False, True, False, True):
            prepared = _prepared(4)
            pool = None
            if scoring:
                work = make_work(1437, seconds_a_chunk)
                pool = WorkerPool(work.score_fn, (jnp.zeros(1437),), devices=jax.devices()[1:4], chunk_size=100)
                (round_,) = pool.score_next({}, 0)
                jax.block_until_ready(round_.scores)
                begun = time.perf_counter()
                (round_,) = pool.score_next({}, 0)
                ready_after.append((time.perf_counter() - begun, seconds_a_chunk))
                jax.block_until_ready(round_.scores)
            steps = _run_for(prepared, pool, pathlib.Path(folder), seconds=8.0)
            rates.setdefault("scoring" if scoring else "alone", []).append(
                _rate(steps, steps[len(steps) // 4], steps[-1])
            )
    ratio = statistics.median(a / b for a, b in zip(rates["scoring"], rates["alone"]))
    return {
        "steps a second": {name: round(statistics.median(x), 1) for name, x in rates.items()},
        "scoring / alone": round(ratio, 3),
        "milliseconds until dispatched": round(1e3 * statistics.median(x for x, _ in ready_after), 2),
        "milliseconds a chunk takes": 1e3 * seconds_a_chunk,
    }


def measure_network() -> dict:
    """Measures the step rate of a learner whose one worker machine is behind a bad line."""
    from experiments.benchmarks.slow_link import SlowLink
    from issgd_jax.cluster import machines
    from issgd_jax.cluster.pool import ClusterPool

    ray = pathlib.Path(sys.executable).parent / "ray"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    os.environ["RAY_AUTH_MODE"] = "token"  # Ray makes one for a head of this machine, and asks for it
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    plan = [("before", 20), ("delay", 30), ("between", 20), ("cut", 30), ("after", 60)]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(SlowLink())
        head = [ray, "start", "--head", "--block", f"--node-ip-address={link.here}", "--port=6399", "--num-cpus=1"]
        stack.callback(_stop, subprocess.Popen([*head, "--include-dashboard=false"], env=environment, **quiet))
        # As a service would: started again when it ends.
        there = f"while true; do {ray} start --block --address={link.here}:6399 --node-ip-address={link.there}; done"
        stack.callback(_stop, link.popen(["bash", "-c", there], env=environment, **quiet))
        _wait_for_head(link.here, 6399)
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(machines.connected(f"{link.here}:6399"))
        while len(machines.list_machines()) < 2:
            time.sleep(0.5)
        work = functools.partial(make_work, 1437, 0.05)
        pool = ClusterPool(work, num_examples=1437, chunk_size=100, reproducible=False)
        with pool:
            marks, leases = [], []

            def act(now: float) -> None:
                ends = itertools.accumulate([10.0, *(length for _, length in plan)])
                name = plan[min(sum(end <= now for end in ends) - (now >= 10.0), len(plan) - 1)][0]
                if not marks or marks[-1][0] != name:
                    marks.append((name, time.perf_counter()))
                    leases.append(pool.status()["leases_done"])
                    {"delay": lambda: link.delay(0.5), "between": lambda: link.delay(0.0)}.get(name, lambda: None)()
                    {"cut": link.cut, "after": link.mend}.get(name, lambda: None)()

            total = 10.0 + sum(seconds for _, seconds in plan)
            steps = _run_for(_prepared(1), pool, folder, seconds=total, act=act)
            leases.append(pool.status()["leases_done"])
    ends = [mark for _, mark in marks[1:]] + [steps[-1]]
    rates = {name: _rate(steps, begin, end) for (name, begin), end in zip(marks, ends)}
    calm = statistics.median([rates["before"], rates["between"], rates["after"]])
    return {
        "delay, seconds each way": 0.5,
        "cut, seconds": 30,
        "steps a second": {name: round(rate, 1) for name, rate in rates.items()},
        "leases done": {name: after - before for (name, _), before, after in zip(marks, leases, leases[1:])},
        "delay / calm": round(rates["delay"] / calm, 3),
        "cut / calm": round(rates["cut"] / calm, 3),
        "limit": 0.95,
    }


def _stop(process: subprocess.Popen) -> None:
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        for child in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait()


def _wait_for_head(host: str, port: int) -> None:
    import socket

    for _ in range(300):
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=1).close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"no Ray cluster at {host}:{port}")


def _prepared(num_devices: int):
    """Returns the digits experiment, free-running; its own pool is replaced."""
    from experiments.configs import digits
    from issgd_jax.run import wiring

    config = digits.get_config()
    config.devices.host_platform_count = DEVICES + 1
    config.devices.workers = max(1, num_devices - 1)
    config.schedule.name = "free_running"
    config.log.progress = False
    config.steps = config.eval_every = 2**29
    return wiring.prepare(config)


def _run_for(
    prepared, pool, folder: pathlib.Path, *, seconds: float, act=lambda now: None, window: int = 10
) -> list[float]:
    """Returns when each step of the loop began, for so many seconds; the table is rebuilt every `window` steps."""
    import dataclasses

    import jax

    from issgd_jax.run import loop, metrics, wiring
    from issgd_jax.run.progress import Progress

    with jax.default_device(prepared.roles.learner):
        parts = dataclasses.replace(wiring.build(dataclasses.replace(prepared, pool=pool)), window=window)
    own_step, steps, begun = parts.train_step, [], time.perf_counter()

    def train_step(*arguments, **keywords):
        steps.append(time.perf_counter())
        act(steps[-1] - begun)
        if steps[-1] - begun > seconds:
            raise StopIteration
        return own_step(*arguments, **keywords)

    parts = dataclasses.replace(parts, train_step=train_step, train_steps=None, measure=lambda *_: {"train/loss": 0.0})
    plan = loop.Plan(2**29, 2**29, strict=False, progress=Progress(1, shown=False, description=""))
    with contextlib.suppress(StopIteration), metrics.MetricsWriter(folder, tensorboard=False) as writer:
        loop.run(parts, plan, writer)
    (folder / "metrics.jsonl").unlink()
    return steps


def _rate(steps: list[float], begin: float, end: float) -> float:
    """Returns the median over seconds of the steps a second between two times."""
    counts = collections.Counter(int(step - begin) for step in steps if begin <= step < end)
    return statistics.median(counts[second] for second in range(int(end - begin)))
