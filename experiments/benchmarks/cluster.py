"""What the cluster costs the learner, and what it carries.

    python -m experiments.benchmarks.cluster [--only=round,overlap,database,scaling,network]

- `round`: the learner's Python time for a round of 8 simulated devices: broadcast, dispatch, collect; and of a round of
  a cluster, which its own thread does for the learner;
- `overlap`: learner steps a second while three simulated devices score, against those without any, the table of all
  examples being made once in both (more than 1 on two cores, which is not understood: not less is all that it shows);
  and how long it takes to dispatch a round;
- `database`: scores a second from workers in other processes into the store and its table, and bytes of parameters a
  second from the learner to all of them, over loopback;
- `scaling`: leases a second of 1, 2, 4, 8 machines, each a process that takes as long for a chunk as was measured, and
  does nothing meanwhile, as these two cores have no others: so the cost of the cluster alone is seen;
- `network`: learner steps a second while the line to a machine takes 500 ms each way, and while it is cut for 30 s,
  against those before and after. Needs the right to make network namespaces.

Medians. Writes results/cluster.json.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

from experiments.benchmarks.environment import hardware
from issgd_jax.workdir import versions

RESULTS = pathlib.Path(__file__).parent / "results" / "cluster.json"
DEVICES = 8


def make_work(num_examples: int, seconds: float, host_platform_count: int = 1):
    """Scores that cost nothing but time: a chunk takes `seconds`."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from issgd_jax.cluster.worker import Work

    jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", host_platform_count)

    def wait(scores):
        time.sleep(seconds)
        return scores

    def score_fn(params, example):
        del params
        scores = 1 + example
        return jax.pure_callback(wait, jax.ShapeDtypeStruct(scores.shape, jnp.float32), scores) if seconds else scores

    return Work(score_fn, lambda first, last: (np.zeros(last - first, np.float32),), num_examples, (jax.devices()[0],))


def make_params(num_bytes: int):
    """Parameters of about so many bytes, in the ten arrays of a network of five layers."""
    import jax
    import jax.numpy as jnp

    side = max(1, round((num_bytes / 20) ** 0.5))
    return jax.device_put(
        {f"layer {i}": {"kernel": jnp.zeros((side, side)), "bias": jnp.zeros(side)} for i in range(5)}
    )


def measure_round() -> dict:
    """Milliseconds of Python in the learner's thread."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from issgd_jax import learner, proposal
    from issgd_jax.calibrated import Calibrated
    from issgd_jax.cluster import machines
    from issgd_jax.cluster.pool import ClusterPool
    from issgd_jax.workers import WorkerPool

    num_examples, chunk_size = 60_000, 250
    device = jax.devices()[0]
    params = jax.device_put(make_params(1_000_000), device)
    calibrated = jax.device_put(proposal.Mixture(Calibrated()), device)
    sampler = learner.init_sampler(calibrated, num_examples)

    def seconds_of(pool) -> dict:
        nonlocal sampler
        seconds = collections.defaultdict(list)
        for step in range(60):
            begun = time.perf_counter()
            (round_,) = pool.score_next(params, step)
            dispatched = time.perf_counter()
            jax.block_until_ready((round_.indices, round_.scores))
            ready = time.perf_counter()
            found = (round_.indices, round_.scores, np.int32(round_.step), np.int32(step))
            indices, scores, scored_at, now = jax.device_put(found, device)
            sampler = learner.take_in(calibrated, sampler, indices, scores, scored_at=scored_at, step=now)
            seconds["broadcast and dispatch"].append(dispatched - begun)
            seconds["collect"].append(time.perf_counter() - ready)
            jax.block_until_ready(sampler)
        return {name: round(1e3 * statistics.median(x[10:]), 3) for name, x in seconds.items()}

    examples = (jnp.zeros(num_examples),)
    devices = jax.devices()[1 : DEVICES + 1]
    local = seconds_of(WorkerPool(lambda p, x: 1 + x, examples, devices=devices, chunk_size=chunk_size))
    work = functools.partial(make_work, num_examples, 0.0)
    with (
        machines.connected("local"),
        ClusterPool(work, num_examples=num_examples, chunk_size=DEVICES * chunk_size, num_workers=2) as pool,
    ):
        cluster = seconds_of(pool)
    return {
        "devices": DEVICES,
        "milliseconds a round, devices": local | {"sum": round(sum(local.values()), 3)},
        "milliseconds a round, cluster": cluster | {"sum": round(sum(cluster.values()), 3)},
        "limit of the sum": 5.0,
    }


def measure_overlap() -> dict:
    """The digits experiment on four simulated devices, with workers that only wait."""
    import jax
    import jax.numpy as jnp

    from issgd_jax.workers import WorkerPool

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


def measure_database() -> dict:
    """Scores in and parameters out, between processes on this machine."""
    import jax
    import numpy as np

    from issgd_jax import learner, proposal
    from issgd_jax.calibrated import Calibrated
    from issgd_jax.cluster import machines
    from issgd_jax.cluster.pool import ClusterPool

    num_examples, chunk_size, num_workers = 10_000_000, 1_000_000, 2
    calibrated = jax.device_put(proposal.Mixture(Calibrated()))
    sampler = learner.init_sampler(calibrated, num_examples)
    params, large = make_params(1000), make_params(100_000_000)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(large))
    work = functools.partial(make_work, num_examples, 0.0)
    options = {"num_examples": num_examples, "num_workers": num_workers}
    per_second, gigabytes = [], []
    with machines.connected("local"):
        with ClusterPool(work, chunk_size=chunk_size, reproducible=False, **options) as pool:
            for step in range(9):
                begun, rounds = time.perf_counter(), pool.score_next(params, step, num_rounds=pool.rounds_per_sweep)
                for round_ in rounds:
                    arrays = jax.device_put((round_.indices, round_.scores, np.int32(step), np.int32(step)))
                    indices, scores, scored_at, now = arrays
                    sampler = learner.take_in(
                        calibrated, sampler, indices, scores, scored_at=scored_at, step=now, renewing=False
                    )
                jax.block_until_ready(sampler)
                per_second.append(num_examples / (time.perf_counter() - begun))
        renewals = []
        for step in range(7):
            begun = time.perf_counter()
            sampler = jax.block_until_ready(
                learner.renew(calibrated, sampler, step=jax.device_put(np.int32(step + 20)))
            )
            renewals.append(time.perf_counter() - begun)
        with ClusterPool(work, chunk_size=1000, reproducible=False, **options) as pool:
            flying, done, begun = collections.deque(), 0, None
            while done < 6000:
                flying.extend(pool.score_next(params, 0, num_rounds=pool.rounds_ahead - len(flying)))
                flying.popleft().scores  # noqa: B018, waits for it
                done += 1
                begun = time.perf_counter() if done == 1000 else begun
            leases = 5000 / (time.perf_counter() - begun)
        with ClusterPool(work, chunk_size=1, **options) as pool:
            for step in range(15):
                begun = time.perf_counter()
                (round_,) = pool.score_next(large, step)
                np.asarray(round_.scores)  # once every worker has read the parameters
                gigabytes.append(num_workers * num_bytes / 1e9 / (time.perf_counter() - begun))
    return {
        "workers": num_workers,
        "examples": num_examples,
        "scores a second into store and table": round(statistics.median(per_second[2:])),
        "limit, scores a second": 10**7,
        "seconds to make the table anew": round(statistics.median(renewals[2:]), 3),
        "leases a second": round(leases),
        "bytes of parameters": num_bytes,
        "gigabytes a second to all workers": round(statistics.median(gigabytes[3:]), 2),
        "limit, gigabytes a second": 1.0,
    }


def measure_scaling() -> dict:
    """Leases a second against the number of machines."""
    from issgd_jax.cluster import machines
    from issgd_jax.cluster.pool import ClusterPool

    gradnorm = json.loads(RESULTS.with_name("gradnorm.json").read_text())["results"]["mlp"]["ours_norms"]
    num_examples, chunk_size = 60_000, 2048
    seconds = chunk_size / 256 * 1e-3 * gradnorm["ms"]  # of the paper's network on these cores
    params, rates = make_params(1_000_000), {}
    work = functools.partial(make_work, num_examples, seconds)
    with machines.connected("local"):
        for num_workers in (1, 2, 4, 8):
            options = {"num_examples": num_examples, "chunk_size": chunk_size, "num_workers": num_workers}
            with ClusterPool(work, reproducible=False, **options) as pool:
                flying, done, step, begun = collections.deque(), 0, 0, None
                while done < 35 * num_workers:
                    flying.extend(pool.score_next(params, step, num_rounds=pool.rounds_ahead - len(flying)))
                    ready = [round_ for round_ in flying if round_.is_ready()]
                    flying = collections.deque(round_ for round_ in flying if round_ not in ready)
                    done, step = done + len(ready), step + 1
                    if begun is None and done >= 5 * num_workers:  # all are compiled
                        begun, before = time.perf_counter(), done
                    time.sleep(0.002)
                rates[num_workers] = (done - before) / (time.perf_counter() - begun)
    return {
        "seconds a chunk": round(seconds, 3),
        "leases a second": {str(k): round(x, 3) for k, x in rates.items()},
        "of linear in one machine": {str(k): round(x / k / rates[1], 3) for k, x in rates.items()},
        "of what the machines could do": {str(k): round(x * seconds / k, 3) for k, x in rates.items()},
        "limit of linear": 0.95,
    }


def measure_network() -> dict:
    """Steps a second of a learner whose one worker machine is at the end of a bad line."""
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
        while len(machines.machines()) < 2:
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
    """The digits experiment, free-running; its own pool is replaced."""
    from experiments.configs import digits
    from issgd_jax import wiring

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
    """When each step of the loop began, for so many seconds. window: steps between renewals of the table."""
    import dataclasses

    import jax

    from issgd_jax import loop, metrics, wiring

    with jax.default_device(prepared.roles.learner):
        parts = wiring.build(dataclasses.replace(prepared, pool=pool))
    own_step, steps, begun = parts.train_step, [], time.perf_counter()

    def train_step(*arguments, **keywords):
        steps.append(time.perf_counter())
        act(steps[-1] - begun)
        if steps[-1] - begun > seconds:
            raise StopIteration
        return own_step(*arguments, **keywords)

    parts = dataclasses.replace(parts, train_step=train_step, measure=lambda *_: {"train/loss": 0.0})
    plan = loop.Plan(2**29, 2**29, window, strict=False, progress=metrics.Progress(1, shown=False, description=""))
    with contextlib.suppress(StopIteration), metrics.MetricsWriter(folder, tensorboard=False) as writer:
        loop.run(parts, plan, writer)
    (folder / "metrics.jsonl").unlink()
    return steps


def _rate(steps: list[float], begin: float, end: float) -> float:
    """Median over seconds of the steps a second between two times."""
    counts = collections.Counter(int(step - begin) for step in steps if begin <= step < end)
    return statistics.median(counts[second] for second in range(int(end - begin)))


MEASURES = {
    "round": measure_round,
    "overlap": measure_overlap,
    "database": measure_database,
    "scaling": measure_scaling,
    "network": measure_network,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default=",".join(MEASURES))
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        import jax

        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", DEVICES + 1)
        measured = MEASURES[name]()
        print(json.dumps({name: measured}, indent=2), flush=True)
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        kept |= {
            name: measured,
            "command": "python -m experiments.benchmarks.cluster",
            "hardware": hardware(),
            "versions": versions(),
        }
        RESULTS.write_text(json.dumps(kept, indent=2) + "\n")


if __name__ == "__main__":
    main()
