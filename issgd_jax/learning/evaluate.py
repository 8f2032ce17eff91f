"""Measurements at one set of parameters: loss and error of whole splits, variance of the gradient."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from issgd_jax import sampling
from issgd_jax.gradnorm.mapping import map_examples
from issgd_jax.learning import variance

# Examples in one forward pass.
CHUNK_SIZE = 512


def make_evaluate(functions: dict[str, Callable[..., jax.Array]]) -> Callable[..., dict[str, jax.Array]]:
    """Returns `(params, examples) -> {name: f32[]}`, compiled: means over all examples of a split.

    Args:
      functions: {name: `(params, *example) -> f[]`}, of one example; examples are pytrees with leading axis N.

    Example:
      >>> evaluate = make_evaluate({"sum": lambda params, x: params * jnp.sum(x)})
      >>> {name: float(mean) for name, mean in evaluate(jnp.float32(2), (jnp.ones((5, 3)),)).items()}
      {'sum': 6.0}
    """

    def evaluate(params, examples):
        def measure(example):
            return {name: function(params, *example) for name, function in functions.items()}

        return jax.tree.map(jnp.mean, map_examples(measure, examples, batch_size=CHUNK_SIZE))

    return jax.jit(evaluate)


def make_measure_variance(
    loss_fn: Callable[..., jax.Array], norms_fn: Callable[..., jax.Array]
) -> Callable[..., variance.Variance]:
    """Returns `(params, table, examples, indices, strides=None, window=1) -> Variance`, compiled.

    It is that of draws from the table at these parameters; strides and window as in `variance.measure`.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of one example.
      norms_fn: `(params, *batch) -> f32[B]`, its gradient norms. The indices i32[M] choose the examples to measure on;
        with all of them the result is exact.
    """

    def measure_variance(params, table: sampling.Table, examples, indices, strides=None, window=1):
        sample = jax.tree.map(lambda x: x[indices], examples)

        def mean_loss(params):
            # Recomputed in the backward pass: memory then holds the activations of one chunk only.
            loss = jax.checkpoint(lambda example: loss_fn(params, *example))
            return jnp.mean(map_examples(loss, sample, batch_size=CHUNK_SIZE))

        return variance.measure(
            norms_fn(params, *sample),
            table.v(indices),
            mean_v=table.mean_v,
            mean_gradient_norm=optax.tree.norm(jax.grad(mean_loss)(params)),
            num_examples=table.num_examples,
            strides=strides,
            window=window,
        )

    return jax.jit(measure_variance, static_argnames="window")
