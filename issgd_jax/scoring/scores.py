"""Score functions: what the workers find out about every example, as values. Each is `(params, *batch) -> f32[B]`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import per_example_grad_norms


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    """The norm of each example's gradient: with it, and no staleness, the variance is the least possible (Theorem 1).

    loss_fn: `(params, *example) -> f[]`. microbatch_size: see `per_example_grad_norms`.
    """

    loss_fn: Callable[..., jax.Array]
    microbatch_size: int | None = None

    def __call__(self, params, *batch) -> jax.Array:
        return per_example_grad_norms(self.loss_fn, microbatch_size=self.microbatch_size)(params, *batch)


@dataclasses.dataclass(frozen=True)
class PerExample:
    """Any function of one example, `(params, *example) -> f[]`: finite and >= 0, or its examples keep their old score.

    microbatch_size: examples whose activations are held in memory together; None = all.
    """

    function: Callable[..., jax.Array]
    microbatch_size: int | None = None

    def __call__(self, params, *batch) -> jax.Array:
        return jax.lax.map(
            lambda example: self.function(params, *example).astype(jnp.float32),
            batch,
            batch_size=self.microbatch_size or jax.tree.leaves(batch)[0].shape[0],
        )


def loss(loss_fn: Callable[..., jax.Array], microbatch_size: int | None = None) -> PerExample:
    """The loss itself, of one forward pass: what much of the literature calls importance. It must be >= 0."""
    return PerExample(loss_fn, microbatch_size)


def last_layer(logits_fn: Callable[..., jax.Array], microbatch_size: int | None = None) -> PerExample:
    """`||softmax(logits) - onehot(label)||`, the gradient's norm at the logits, of one forward pass.

    Up to a factor that hardly depends on the example, an upper bound of the gradient norm (Katharopoulos and Fleuret
    2018, arXiv:1803.00942, equation 20). logits_fn: `(params, *inputs) -> f[C]`; the last batch argument is the label,
    i32[].
    """

    def bound(params, *example):
        *inputs, label = example
        probabilities = jax.nn.softmax(logits_fn(params, *inputs).astype(jnp.float32))
        difference = probabilities - jax.nn.one_hot(label, probabilities.shape[-1])
        return jnp.sqrt(jnp.sum(jnp.square(difference)))

    return PerExample(bound, microbatch_size)
