"""Rounds of a pool, also of one that spans processes; imported there before JAX runs anything."""

import os

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.scoring.workers import WorkerPool


def two_rounds(devices):
    """Returns two rounds of four workers, [2, 2, 4, 3]: indices and scores. 14 examples, so that shards are padded."""
    params = jax.device_put(jnp.float32(3), jax.local_devices()[0])
    pool = WorkerPool(lambda p, x: p * x, (np.arange(14, dtype=np.float32),), devices=devices, chunk_size=3)
    with jax.transfer_guard("disallow"):
        rounds = jax.block_until_ready([(x.indices, x.scores) for x in pool.score_next(params, step=0, num_rounds=2)])
    return np.asarray(jax.device_get(rounds))


def two_rounds_of_a_process(port, index, file):
    """Saves what `two_rounds` returns in one of two processes, each with two of the workers."""
    os.environ["JAX_COORDINATOR_BIND_ADDRESS"] = f"127.0.0.1:{port}"
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    np.save(file, two_rounds([device for owner in range(2) for device in jax.local_devices(owner)]))
    jax.distributed.shutdown()
