"""Whole programs lowered for TPU and CUDA, ahead of time, on a machine that has neither."""

import functools
import re

import jax
import numpy as np
import optax
import pytest

from experiments.benchmarks import gradnorm_models
from issgd_jax.gradnorm import per_example_grad_norms
from issgd_jax.gradnorm.gram_sums import SWITCH
from issgd_jax.learning.learner import Learner, TrainState
from issgd_jax.sampling import Sampler
from issgd_jax.scoring.workers import WorkerPool
from tests.learning.helpers import BATCH_SIZE, NUM_EXAMPLES, problem, quadratic_loss

KERNEL = {"tpu": "tpu_custom_call", "cuda": "mosaic_gpu_v2"}


def custom_calls(function, *args, platform):
    """Returns the names of the custom calls of a program; JAX refuses to export those that may change."""
    exported = jax.export.export(function, platforms=(platform,))(*args)
    return set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module()))


@pytest.mark.parametrize("platform", KERNEL)
def test_norms_of_the_benchmark_are_lowered(monkeypatch, platform):
    """Red if a platform refuses part of the norms, or long sequences go without the kernel."""
    # Which GPU it will be, nothing here can tell.
    monkeypatch.setenv(SWITCH, "hopper" if platform == "cuda" else "auto")
    transformer = gradnorm_models.transformer(batch_size=2, length=128, depth=1, vocabulary=64)
    for (params, batch, loss_fn), expected in (
        (gradnorm_models.mlp(batch_size=4), set()),
        (transformer, {KERNEL[platform]}),
    ):
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, *batch))
        # A loss of its own: what was traced before is not traced again when the switch is another.
        norms_fn = jax.jit(per_example_grad_norms(functools.partial(loss_fn)))
        assert custom_calls(norms_fn, *shapes, platform=platform) == expected


@pytest.mark.parametrize("platform", KERNEL)
def test_the_learner_and_the_workers_are_lowered(platform):
    """Red if the step or the scoring program calls what only a CPU has, or what another version may not read."""
    params, examples = problem()
    learner = Learner(quadratic_loss, optax.sgd(0.1), moments=True)
    sampler = Sampler(NUM_EXAMPLES, BATCH_SIZE)
    state = TrainState.init(params, learner.optimizer)
    assert not custom_calls(learner.compile(), state, sampler.init(0), sampler, examples, platform=platform)

    norms_fn = per_example_grad_norms(quadratic_loss)
    pool = WorkerPool(norms_fn, examples, devices=jax.devices()[:2], chunk_size=3)
    arguments = params, pool._shards, pool._worker, np.int32(0)
    assert not custom_calls(jax.jit(pool._score), *arguments, platform=platform)
