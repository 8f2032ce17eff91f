"""Scoring of the models: gradient norms, beside a plain step."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from experiments.benchmarks.accelerator.roofline import Rates, program, time_programs
from experiments.benchmarks.accelerator.sizes import Size
from experiments.benchmarks.gradnorm_models import MODELS, batch_loss
from issgd_jax.gradnorm import value_grad_and_norms
from issgd_jax.scoring.scores import GradientNorm, InPrecision


def parts(size: Size) -> dict[str, Callable[[Size, Rates], dict]]:
    """Returns a part for each model."""
    return {f"scoring, {model}": functools.partial(measure, model) for model in size.models}


def measure(model: str, size: Size, rates: Rates) -> dict:
    """Returns a row of each program; examples a second, and the share of the matrix rate that it reaches."""
    params, batch, loss_fn = MODELS[model](**size.models[model])
    params, batch = jax.device_put((params, batch))
    num_examples = batch[0].shape[0]
    norms = GradientNorm(loss_fn)
    programs = {
        "plain step": program(jax.value_and_grad(batch_loss(loss_fn)), params, *batch),
        "norms": program(norms, params, *batch),
        "norms, bfloat16": program(InPrecision(norms, "bfloat16"), params, *batch, dtype="bfloat16"),
        "losses, gradient and norms": program(value_grad_and_norms(loss_fn), params, jnp.ones(num_examples), *batch),
    }
    rows = time_programs(programs, size, rates)
    for name, found in rows.items():
        per_second = 1e3 / found["ms"]
        found["examples_a_second"] = num_examples * per_second
        found["share_of_matrix_rate"] = found["operations"] * per_second / rates.matrix[programs[name].dtype]
    return rows
