"""Measurements at one parameter version: whole splits, and the variance of the gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from issgd_jax import sampling
from issgd_jax.learning import variance

# Examples in the forward pass at one time.
CHUNK_SIZE = 512


def make_evaluate(outcome_fn: Callable[..., tuple[jax.Array, jax.Array]]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns `(params, examples) -> (loss f32[], error f32[])`, compiled: means over every example of a split.

    outcome_fn: `(params, *example) -> (loss f[], error f[])` of one example. examples: pytrees with leading axis N.
    """

    def evaluate(params, examples):
        losses, errors = jax.lax.map(lambda example: outcome_fn(params, *example), examples, batch_size=CHUNK_SIZE)
        return jnp.mean(losses), jnp.mean(errors)

    return jax.jit(evaluate)


def make_measure_variance(
    loss_fn: Callable[..., jax.Array], norms_fn: Callable[..., jax.Array]
) -> Callable[..., variance.Variance]:
    """Returns `(params, table, examples, indices) -> Variance`, compiled: of the v drawn from, at these parameters.

    loss_fn: loss of one example. norms_fn: `(params, *batch) -> f32[B]`, its gradient norms. indices: i32[M], which of
    the examples to measure on; all of them for an exact result.
    """

    def measure_variance(params, table: sampling.Table, examples, indices):
        sample = jax.tree.map(lambda x: x[indices], examples)

        def mean_loss(params):
            # Recomputed in the backward pass, so that memory holds the activations of one chunk.
            loss = jax.checkpoint(lambda example: loss_fn(params, *example))
            return jnp.mean(jax.lax.map(loss, sample, batch_size=CHUNK_SIZE))

        return variance.measure(
            norms_fn(params, *sample),
            table.v(indices),
            mean_v=table.mean_v,
            mean_gradient_norm=optax.tree.norm(jax.grad(mean_loss)(params)),
            num_examples=table.num_examples,
        )

    return jax.jit(measure_variance)
