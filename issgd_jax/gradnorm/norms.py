"""Per-example gradient norms, alone or together with the gradient of a minibatch, in one pass."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from issgd_jax.gradnorm import algebra, cost, gram
from issgd_jax.gradnorm.factors import Factored, Gradient
from issgd_jax.gradnorm.tracing import TracedLoss, trace_loss

# Gradients of one parameter, where they must be formed, that are held at one time: small enough for a CPU's cache, and
# enough to keep an accelerator busy.
CPU_BYTES, ACCELERATOR_BYTES = 4 * 2**20, 256 * 2**20
# The same for gradients that no rule covers: the whole pass then goes in microbatches.
UNCOVERED_BYTES = 64 * 2**20

# What must be left of the absolute sum of inner products for a norm to come from them. With less, more of its digits
# would be rounding errors than the 1e-5 that is promised in float32.
LEAST_SHARE = 1 / 128


def per_example_grad_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """Returns `(params, *batch) -> f32[B]`, the Euclidean norm of each example's own gradient.

    Equal to a Python loop of `jax.grad` up to rounding, for every loss that JAX can differentiate, and without forming
    the gradients wherever algebra allows (`explain` shows where): less than a training step for most networks.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example. Any JAX code, any pytree of floating-point
        parameters. Whatever is random takes a key of its own as one more batch argument.
      argnums: which arguments of loss_fn are parameters, as in `jax.grad`; all others are batch arguments.
      has_aux: whether loss_fn returns `(loss, aux)`; then the result is `(norms, aux)`, aux with a leading axis B.
      squared: give the square of the norm.
      per_leaf: give a pytree like the parameters, of f32[B], the norm of each parameter's own gradient.
      microbatch_size: examples whose activations are held in memory together, at most. By default all, unless gradients
        that no rule covers would take more than 64 MiB.

    The returned function takes `batch` as pytrees whose leaves share the leading axis B. Sums are kept in float32 or
    better. It may stand under `jit`, `pmap`, `vmap` and `grad`; at a norm of 0 the gradient is taken to be 0.
    Where the uses of a parameter nearly cancel, its gradients are formed at run time: an inner product would have lost
    their digits. Under `vmap` both are computed.

    A loss that mixes examples cannot be written so, and that is meant: BatchNorm in training mode makes every output
    depend on every example, so that there is no gradient of one example. Use its running averages, or LayerNorm or
    GroupNorm.

    Raises:
      ValueError: when called, before anything is compiled: the batch is empty or its leaves differ in B,
        microbatch_size < 1, or the loss of one example is not a scalar.
      TypeError: when called: a parameter is not floating-point.

    Source: Goodfellow 2015 (arXiv:1510.01799) for a dense layer used once; Li et al. 2022 (arXiv:2110.05679) for one
    used many times.

    Example:
      >>> norms = per_example_grad_norms(lambda params, x: jnp.sum(params * x))
      >>> norms(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    _check_microbatch_size(microbatch_size)

    def norms(*args):
        loss = trace_loss(loss_fn, args, argnums, has_aux)
        (_, aux, squares), _ = _in_microbatches(
            lambda batch: _one_pass(loss, batch, None), loss.batch, microbatch_size or _default_size(loss)
        )
        result = _finish(squares, loss, squared, per_leaf)
        return (result, aux) if has_aux else result

    return jax.jit(norms)


def value_grad_and_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
) -> Callable[..., Any]:
    """Returns `(params, importance_weights, *batch) -> (losses f32[B], gradient, norms f32[B])`, all from one pass.

    The gradient is of `mean(importance_weights * losses)`, like the parameters; losses and norms are of each example,
    without its importance weight. The importance weights f32[B] are always the second argument, whatever argnums. With
    has_aux the first result is `(losses, aux)`.

    Args:
      loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size: see `per_example_grad_norms`.

    Raises:
      ValueError: importance_weights is not of shape [B], or as `per_example_grad_norms`.
      TypeError: as `per_example_grad_norms`.

    Example:
      >>> grad_fn = value_grad_and_norms(lambda params, x: jnp.sum(params * x))
      >>> x, importance_weights = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([0.5, 2.0])
      >>> losses, gradient, norms = grad_fn(jnp.ones(2), importance_weights, x)
      >>> losses.tolist(), gradient.tolist(), norms.tolist()
      ([7.0, 1.0], [0.75, 2.0], [5.0, 1.0])
    """
    _check_microbatch_size(microbatch_size)

    def value_grad_and_norms(params, importance_weights, *batch):
        loss = trace_loss(loss_fn, (params, *batch), argnums, has_aux)
        importance_weights = jnp.asarray(importance_weights)
        if importance_weights.shape != (loss.batch_size,):
            raise ValueError(
                f"importance_weights must have shape ({loss.batch_size},), one for each example of the batch, got "
                f"{importance_weights.shape}"
            )
        coefficients = importance_weights / loss.batch_size
        (losses, aux, squares), gradient = _in_microbatches(
            lambda batch: _one_pass(loss, *batch),
            (loss.batch, coefficients),
            microbatch_size or _default_size(loss),
        )
        gradient = [g.astype(dtype) for g, dtype in zip(gradient, loss.dtypes)]
        return (
            (losses, aux) if has_aux else losses,
            jax.tree.unflatten(loss.params_tree, gradient),
            _finish(squares, loss, squared, per_leaf),
        )

    return jax.jit(value_grad_and_norms)


def _one_pass(loss: TracedLoss, batch, coefficients: jax.Array | None):
    """((losses, aux, squared norms of each leaf), the gradients' sums with the coefficients, if given)."""
    losses, aux, gradients = loss.factored_gradients(loss.params, batch)
    squares, sums = zip(*(_norms_and_sum(g, coefficients, losses.size) for g in gradients)) if gradients else ((), ())
    return (losses, aux, squares), sums


def _norms_and_sum(gradient: Gradient, coefficients: jax.Array | None, num_examples: int):
    """Squared norms [B] of a batch of gradients of one leaf, and their sum with coefficients."""
    if isinstance(gradient, Factored) and not gradient.terms:
        return jnp.zeros(num_examples), jnp.zeros(gradient.shape)
    of_one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gradient)
    if not isinstance(gradient, Factored):
        return _form_all(gradient, coefficients)
    size = max(1, _formed_bytes() // cost.bytes_of_forming(of_one))
    if not cost.by_gram(of_one):
        return _in_microbatches(lambda chunk: _form_all(*chunk), (gradient, coefficients), size)
    return _gram_norms(gradient, of_one, size), _weighted_sum(gradient, coefficients)


def _gram_norms(gradient: Factored, of_one: Factored, formed_size: int) -> jax.Array:
    """Squared norms [B] from pairs of uses; where those cancel, from the gradients themselves."""
    size = max(1, ACCELERATOR_BYTES // max(1, cost.cost_of_gram(of_one).bytes))
    (squares, absolute), _ = _in_microbatches(
        lambda chunk: (jax.vmap(gram.norm_squared)(chunk), None), gradient, size, has_sums=False
    )
    if not gram.can_cancel(of_one):
        return squares

    def formed():
        formed, _ = _in_microbatches(lambda chunk: _form_all(chunk, None), gradient, formed_size, has_sums=False)
        return formed.astype(squares.dtype)

    return lax.cond(jnp.all(squares >= LEAST_SHARE * absolute), lambda: squares, formed)


def _form_all(gradient: Gradient, coefficients: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    products = jax.vmap(algebra.multiply_out)(gradient)
    total = None
    if coefficients is not None:
        sums = [jnp.tensordot(coefficients.astype(product.dtype), product, 1) for product in products]
        total = algebra.lay_out(gradient, sums)
    return jax.vmap(algebra.sum_squares)(products), total


def _weighted_sum(gradient: Factored, coefficients: jax.Array | None) -> jax.Array | None:
    """The examples become uses of one gradient."""
    if coefficients is None:
        return None
    total = algebra.sum_leading(jax.vmap(algebra.scale)(gradient, coefficients))
    return algebra.lay_out(total, algebra.multiply_out(total))


def _in_microbatches(function: Callable, batch, size: int | None, *, has_sums: bool = True):
    """`function(batch) -> (outputs with leading axis B, sums or None)`, called on at most `size` examples at a time."""
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if size is None or size >= num_examples:
        return function(batch)
    # Chunks that leave no rest need no copy of the batch and no second program.
    size = next((n for n in range(size, size // 2, -1) if num_examples % n == 0), size)
    whole = num_examples - num_examples % size
    chunks = jax.tree.map(lambda x: x[:whole].reshape(-1, size, *x.shape[1:]), batch)

    def one_chunk(totals, chunk):
        outputs, sums = function(chunk)
        return jax.tree.map(jnp.add, totals, sums) if has_sums else None, outputs

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], chunks))[1] if has_sums else None
    sums, outputs = lax.scan(one_chunk, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), chunks)
    outputs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outputs)
    if whole == num_examples:
        return outputs, sums
    last_outputs, last_sums = function(jax.tree.map(lambda x: x[whole:], batch))
    return (
        jax.tree.map(lambda x, y: jnp.concatenate([x, y]), outputs, last_outputs),
        jax.tree.map(jnp.add, sums, last_sums) if has_sums else None,
    )


def _finish(squares, loss: TracedLoss, squared: bool, per_leaf: bool):
    if not per_leaf:
        total = sum(squares, start=jnp.zeros(loss.batch_size, jnp.float32))
        return total if squared else _root(total)
    return jax.tree.unflatten(loss.params_tree, squares if squared else [_root(x) for x in squares])


def _root(x: jax.Array) -> jax.Array:
    """√x, whose derivative at 0 is taken to be 0 instead of infinite."""
    is_zero = x == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, x)))


def _default_size(loss: TracedLoss) -> int | None:
    return max(1, UNCOVERED_BYTES // loss.uncovered_bytes) if loss.uncovered_bytes else None


def _formed_bytes() -> int:
    return CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES


def _check_microbatch_size(microbatch_size: int | None) -> None:
    if microbatch_size is not None and not (isinstance(microbatch_size, numbers.Integral) and microbatch_size >= 1):
        raise ValueError(f"microbatch_size must be >= 1, and a whole number, got {microbatch_size!r}")
