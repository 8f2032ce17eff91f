"""Compiles the kernels and whole programs for a TPU or an H100 on a machine that has neither.

    python -m tests.compiled_elsewhere tpu
    python -m tests.compiled_elsewhere cuda

The first needs `libtpu`, the second `jax-cuda13-plugin`, `jax-cuda13-pjrt`, `nvidia-cuda-nvcc` and `nvidia-nvvm`, of
`jax[tpu]` and `jax[cuda13]`. Each program is compiled by the compiler of the device: nothing is run.
"""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from experiments.benchmarks import gradnorm_models
from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.gradnorm.gram_sums import SWITCH, gram_sums
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler
from issgd_jax.scoring import workers
from tests.learning.helpers import BATCH_SIZE, NUM_EXAMPLES, problem, quadratic_loss

TPUS = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "7x": "tpu7x:2x2x1"}
# What XLA wants to know of an H100.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 13 }
"""
KERNEL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}
# [B, T], I, J: of the benchmark; ragged; several chunks; one number.
SHAPES = (((64, 512), 1024, 1024), ((2, 300), 70, 1300), ((1, 1000), 3000, 17), ((3, 128), 1, 5))


def devices_of(platform: str) -> dict:
    """Returns {name: devices that can be compiled for}."""
    if platform == "cuda":
        topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
        return {"H100": topology.devices}
    # There is no machine to ask, no device to lock, and nothing to log.
    os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_WORKER_HOSTNAMES="localhost")
    os.environ.update(ALLOW_MULTIPLE_LIBTPU_LOAD="1", TPU_LOG_DIR="disabled")
    return {name: topologies.get_topology_desc(topology, "tpu").devices for name, topology in TPUS.items()}


def on(device, tree):
    """Returns the shapes of arrays, on a device, or of no place."""
    place = device and SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)


def programs(devices):
    """Yields (name, lowered program, whether it holds a kernel)."""
    device = devices[0]
    for dtype in (jnp.float32, jnp.bfloat16):
        for shape, *sides in SHAPES:
            factors = [jax.ShapeDtypeStruct((*shape, side), dtype) for side in sides]
            yield f"kernel {shape} {sides} {dtype.__name__}", jax.jit(gram_sums).lower(*on(device, factors)), True
    for name, (params, batch, loss_fn), has_kernel in (
        ("norms of the MLP", gradnorm_models.mlp(batch_size=4), False),
        ("norms of the transformer", gradnorm_models.transformer(batch_size=2, length=128, depth=1), True),
    ):
        yield name, jax.jit(per_example_grad_norms(loss_fn)).lower(*on(device, (params, *batch))), has_kernel
    params, examples = problem()
    learner, sampler = Learner(quadratic_loss, optax.sgd(0.1), moments=True), Sampler(NUM_EXAMPLES, BATCH_SIZE)
    states = TrainState.init(params, learner.optimizer), sampler.init(0)
    lowered = learner.compile().lower(*on(device, states), sampler, on(device, examples))
    yield "step of the learner", lowered, False
    norms_fn, size = per_example_grad_norms(quadratic_loss), -(-NUM_EXAMPLES // len(devices))
    score = workers._compiled(norms_fn, tuple(devices), size, 3, False)
    shards = tuple(jax.ShapeDtypeStruct((len(devices), size, *x.shape[1:]), x.dtype) for x in examples)
    if len(devices) == 1:  # a single worker's data has no axis of workers
        shards = tuple(x.update(shape=x.shape[1:]) for x in shards)
    arguments = params, shards, np.zeros(len(devices), np.int32), np.int32(0)
    yield "workers", score.lower(*on(None, arguments)), False


def main(platform: str) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.devices()
    # Which GPU it will be, nothing here can tell.
    os.environ[SWITCH] = "hopper" if platform == "cuda" else "auto"
    for device, devices in devices_of(platform).items():
        for name, lowered, has_kernel in programs(devices):
            compiled = lowered.compile()
            assert (KERNEL[platform] in compiled.as_text()) == has_kernel, name
            print(f"{device}: {name}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
