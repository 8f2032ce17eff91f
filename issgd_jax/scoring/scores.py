"""Score functions, as values: each is `(params, *batch) -> f32[B]`."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm import el2n, example_keys, per_example_grad_norms
from issgd_jax.gradnorm.caching import cached, remember
from issgd_jax.gradnorm.mapping import map_examples

# Of the keys of scores, see `example_keys`; losses have another one.
_SCORE_STREAM = 2**32 - 2


@dataclasses.dataclass(frozen=True)
class GradientNorm:
    """Norm of each example's gradient: with it, and no staleness, the variance is the least possible (Theorem 1).

    Attributes:
      loss_fn: `(params, *example) -> f[]`.
      microbatch_size: see `per_example_grad_norms`.

    Example:
      >>> score_fn = GradientNorm(lambda params, x: jnp.sum(params * x))
      >>> score_fn(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """

    loss_fn: Callable[..., jax.Array]
    microbatch_size: int | None = None

    def __call__(self, params, *batch) -> jax.Array:
        return per_example_grad_norms(self.loss_fn, microbatch_size=self.microbatch_size)(params, *batch)


@dataclasses.dataclass(frozen=True)
class PerExample:
    """Any function of one example as a score.

    Attributes:
      function: `(params, *example) -> f[]`, finite and >= 0; else the example keeps its old score.
      microbatch_size: examples whose activations are in memory together; None: all.

    Example:
      >>> PerExample(lambda params, x: jnp.max(x))(None, jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [4.0, 1.0]
    """

    function: Callable[..., jax.Array]
    microbatch_size: int | None = None

    def __call__(self, params, *batch) -> jax.Array:
        return _map_examples(self.function, self.microbatch_size)(params, *batch)


@cached
def _map_examples(function, microbatch_size):
    def scores(params, *batch):
        return map_examples(
            lambda example: function(params, *example).astype(jnp.float32), batch, batch_size=microbatch_size
        )

    return scores


def loss(loss_fn: Callable[..., jax.Array], microbatch_size: int | None = None) -> PerExample:
    """Returns the loss as a score, of one forward pass: the importance of much of the literature. It must be >= 0."""
    return PerExample(loss_fn, microbatch_size)


def last_layer(logits_fn: Callable[..., jax.Array], microbatch_size: int | None = None) -> PerExample:
    """Returns the score `||softmax(logits) - onehot(label)||`, the gradient's norm at the logits, of one forward pass.

    Up to a factor that hardly depends on the example, an upper bound of the gradient norm (Katharopoulos and Fleuret
    2018, arXiv:1803.00942, equation 20).

    Args:
      logits_fn: `(params, *inputs) -> f[C]` of one example; the last batch argument of the score is its label, i32[],
        in [0, C); of another the score is nan.
      microbatch_size: examples whose activations are in memory together; None: all.

    Example:
      >>> score_fn = last_layer(lambda params, x: x)
      >>> [round(x, 3) for x in score_fn(None, jnp.zeros((1, 2)), jnp.array([0])).tolist()]
      [0.707]
    """

    return PerExample(_last_layer_bound(logits_fn), microbatch_size)


@remember
def _last_layer_bound(logits_fn: Callable) -> Callable:
    def bound(params, *example):
        *inputs, label = example
        return el2n(logits_fn(params, *inputs), label)

    return bound


@remember
def without_key(function: Callable) -> Callable:
    """Returns the function of one example, or of a batch, for arguments that end with keys, which it does not take."""
    return lambda *args: function(*args[:-1])


@dataclasses.dataclass(frozen=True)
class InPrecision:
    """Score computed in another floating-point type; draws by it are as unbiased as by any score.

    Parameters and examples are cast. A loss that brings in arrays of a wider type, as constants, computes in that type
    from there on.

    Attributes:
      score_fn: `(params, *batch) -> f32[B]`.
      dtype: name of the type, such as "bfloat16".

    Example:
      >>> score_fn = PerExample(lambda params, x: params * x)
      >>> batch = jnp.float32(1), jnp.array([1.0, 1.001])
      >>> score_fn(*batch).tolist() == InPrecision(score_fn, "bfloat16")(*batch).tolist()
      False
    """

    score_fn: Callable[..., jax.Array]
    dtype: str

    def __call__(self, params, *batch) -> jax.Array:
        def cast(x):
            return x.astype(self.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return self.score_fn(*jax.tree.map(cast, (params, *batch)))


@dataclasses.dataclass(frozen=True)
class Keyed:
    """Score with new random keys at every step, one for each example; `((params, step), *batch) -> f32[B]`.

    Attributes:
      score_fn: `(params, *batch, keys) -> f32[B]`.
      seed: of the keys.

    Example:
      >>> score_fn = Keyed(PerExample(lambda params, x, key: x * jax.random.uniform(key)), seed=0)
      >>> score_fn((None, jnp.int32(7)), jnp.ones(3)).shape
      (3,)
    """

    score_fn: Callable[..., jax.Array]
    seed: int

    def __call__(self, params_and_step, *batch) -> jax.Array:
        params, step = params_and_step
        keys = example_keys(self.seed, _SCORE_STREAM, step, jax.tree.leaves(batch)[0].shape[0])
        return self.score_fn(params, *batch, keys)
