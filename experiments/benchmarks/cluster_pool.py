"""Measures cost and throughput of a pool of workers alone. See `experiments.benchmarks.cluster`."""

import collections
import contextlib
import functools
import json
import statistics
import time

from experiments.benchmarks.environment import RESULTS

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
    """Measures the milliseconds of Python that a round takes in the learner's thread."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from issgd_jax.cluster.pool import ClusterPool
    from issgd_jax.sampling import Sampler
    from issgd_jax.scoring.workers import WorkerPool

    num_examples, chunk_size = 60_000, 250
    device = jax.devices()[0]
    params = jax.device_put(make_params(1_000_000), device)
    sampler = jax.device_put(Sampler(num_examples, 128), device)
    state = sampler.init(0)

    def time_rounds(pool) -> dict:
        nonlocal state
        seconds = collections.defaultdict(list)
        for step in range(60):
            begun = time.perf_counter()
            (round_,) = pool.score_next(params, step)
            dispatched = time.perf_counter()
            jax.block_until_ready((round_.indices, round_.scores))
            ready = time.perf_counter()
            arrays = jax.device_put((round_.indices, round_.scores, np.int32(round_.step)), device)
            state = sampler.ingest(state, *arrays)
            seconds["broadcast and dispatch"].append(dispatched - begun)
            seconds["collect"].append(time.perf_counter() - ready)
            jax.block_until_ready(state)
        return {name: round(1e3 * statistics.median(x[10:]), 3) for name, x in seconds.items()}

    examples = (jnp.zeros(num_examples),)
    devices = jax.devices()[1 : DEVICES + 1]
    local = time_rounds(WorkerPool(lambda p, x: 1 + x, examples, devices=devices, chunk_size=chunk_size))
    work = functools.partial(make_work, num_examples, 0.0)
    with ClusterPool(work, num_examples=num_examples, chunk_size=DEVICES * chunk_size, num_workers=2) as pool:
        cluster = time_rounds(pool)
    return {
        "devices": DEVICES,
        "milliseconds a round, devices": local | {"sum": round(sum(local.values()), 3)},
        "milliseconds a round, cluster": cluster | {"sum": round(sum(cluster.values()), 3)},
        "limit of the sum": 5.0,
    }


def measure_database() -> dict:
    """Measures scores in and parameters out, between processes on this machine."""
    import jax
    import numpy as np

    from issgd_jax.cluster.pool import ClusterPool
    from issgd_jax.sampling import Sampler

    num_examples, chunk_size, num_workers = 10_000_000, 1_000_000, 2
    sampler = jax.device_put(Sampler(num_examples, 128))
    state = sampler.init(0)
    params, large = make_params(1000), make_params(100_000_000)
    num_bytes = sum(x.nbytes for x in jax.tree.leaves(large))
    work = functools.partial(make_work, num_examples, 0.0)
    options = {"num_examples": num_examples, "num_workers": num_workers}
    per_second, gigabytes = [], []
    with ClusterPool(work, chunk_size=chunk_size, reproducible=False, **options) as pool:
        for step in range(9):
            begun, rounds = time.perf_counter(), pool.score_next(params, step, num_rounds=pool.rounds_per_sweep)
            for round_ in rounds:
                arrays = jax.device_put((round_.indices, round_.scores, np.int32(step)))
                state = sampler.ingest(state, *arrays, rebuild=False)
            jax.block_until_ready(state)
            per_second.append(num_examples / (time.perf_counter() - begun))
    rebuilds = []
    for _ in range(7):
        begun = time.perf_counter()
        state = jax.block_until_ready(sampler.rebuild(state))
        rebuilds.append(time.perf_counter() - begun)
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
        "seconds to rebuild the table": round(statistics.median(rebuilds[2:]), 3),
        "leases a second": round(leases),
        "bytes of parameters": num_bytes,
        "gigabytes a second to all workers": round(statistics.median(gigabytes[3:]), 2),
        "limit, gigabytes a second": 1.0,
    }


def measure_scaling() -> dict:
    """Measures leases a second against the number of machines."""
    from issgd_jax.cluster.pool import ClusterPool

    gradnorm = json.loads((RESULTS / "gradnorm.json").read_text())["results"]["mlp"]["ours_norms"]
    num_examples, chunk_size = 60_000, 2048
    seconds = chunk_size / 256 * 1e-3 * gradnorm["ms"]  # of the paper's network on these cores
    params, rates = make_params(1_000_000), {}
    work = functools.partial(make_work, num_examples, seconds)
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
