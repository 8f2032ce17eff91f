"""Per-example gradient norms, alone or together with the gradient of a minibatch, in one pass."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from issgd_jax.gradnorm import algebra, cost, gram
from issgd_jax.gradnorm.arguments import check_weights
from issgd_jax.gradnorm.caching import cached
from issgd_jax.gradnorm.factors import Factored, Gradient
from issgd_jax.gradnorm.lengths import Squares, length, root, squares
from issgd_jax.gradnorm.tracing import TracedLoss, positions_of_params, trace_loss, with_keys

# Memory for the gradients of one parameter that are formed together: fits a CPU's cache, and keeps an accelerator busy.
CPU_BYTES, ACCELERATOR_BYTES = 4 * 2**20, 256 * 2**20
# Gradients that are small enough to be kept until the norms of all parameters are checked together.
SMALL_BYTES = 2**20
# Memory for gradients that no rule covers; above it, the whole pass runs in microbatches.
UNCOVERED_BYTES = 64 * 2**20
# Memory for formed gradients that are kept until their coefficients are known, those of all parameters together.
KEPT_BYTES = 64 * 2**20


def per_example_grad_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns per-example gradient norms.

    Gradients are formed only where no cheaper exact rule applies; `explain` shows the rule of each parameter.

    Args:
      loss_fn: `(params, *example) -> f[]`, the loss of ONE example, with any pytree of floating-point parameters.
        See `per_example` for the loss of a batch. What examples share, such as frozen weights, it closes over.
      argnums: Positions of the parameters among the arguments of loss_fn, as in `jax.grad`. All other arguments are
        batch arguments.
      has_aux: Whether loss_fn returns `(loss, aux)`.
      squared: Whether to return squared norms.
      per_leaf: Whether to return one norm per parameter leaf, as a pytree of f32[B] like the parameters.
      microbatch_size: Largest number of examples whose activations are held in memory together. By default all of
        them, unless the gradients that no rule covers would take more than 64 MiB.
      keyed: Whether loss_fn takes a random key, `loss_fn(params, *example, key=key)`, as dropout does. The returned
        function then takes `key=`, one key, and splits it into one for each example.

    Returns:
      A compiled function `(params, *batch) -> f32[B]`, the same one for the same loss and options: the Euclidean norm
      of each example's gradient. Batch arguments are pytrees whose leaves share the leading axis B. With has_aux it
      returns `(norms, aux)`, aux with a leading axis B.

    Raises:
      ValueError: microbatch_size is not a whole number >= 1. When called: the batch is empty, its leaves differ in B,
        argnums is out of range, loss_fn does not return a scalar, or key is not one key.
      TypeError: When called: a leaf is neither an array nor a number, a parameter is not floating-point, params hold
        running averages of flax, or a key is missing or not expected.

    Guarantees:
      - The norms equal those of a loop over `jax.grad` up to rounding (about 1e-5 relative in float32), for every loss
        that JAX can differentiate. Sums are kept in float32 or wider.
      - A norm that is a normal number of its type (in float32 from 1e-38 to 3e38) keeps its digits, though its square
        is none. A gradient that is not finite has a norm that is not.
      - Where contributions of one parameter's uses nearly cancel, or inner products of its factors overflow or
        underflow, its gradients are formed at run time. Under `vmap` both branches are computed.
      - A loss that JAX cannot batch, such as one with `jax.lax.ragged_dot`, is computed one example at a time.
      - The function works under `jit`, `pmap`, `vmap` and `grad`. The derivative of a norm at 0 is defined as 0.

    BatchNorm in training mode has no gradient of one example: use its running averages, LayerNorm or GroupNorm.

    Source: Goodfellow 2015 (arXiv:1510.01799) for dense layers used once; Li et al. 2022 (arXiv:2110.05679) for others.

    Example:
      >>> norms = per_example_grad_norms(lambda params, x: jnp.sum(params * x))
      >>> norms(jnp.ones(2), jnp.array([[3.0, 4.0], [0.0, 1.0]])).tolist()
      [5.0, 1.0]
    """
    return _norms(loss_fn, *hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed))


@cached
def _norms(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed):
    def norms(*args, key=None):
        loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
        (_, aux, norms), _ = _in_microbatches(
            lambda batch: _one_pass(loss, batch, None), loss.batch, microbatch_size or _default_size(loss)
        )
        result = combine(norms, loss, squared, per_leaf)
        return (result, aux) if has_aux else result

    return norms


def value_grad_and_norms(
    loss_fn: Callable[..., Any],
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    squared: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
    keyed: bool = False,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns losses, gradient and norms of a minibatch.

    One forward and one backward pass compute all three.

    Args:
      loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed: See `per_example_grad_norms`.

    Returns:
      A compiled function `(params, importance_weights, *batch) -> (losses, gradient, norms)`; with keyed, it also takes
      `key=`. The importance weights f32[B] are the second argument whatever argnums is. losses f32[B] and norms f32[B]
      are those of each example without its importance weight. gradient is that of `mean(importance_weights * losses)`,
      like the parameters. With has_aux the first result is `(losses, aux)`.

    Raises:
      ValueError: When called: importance_weights does not have shape [B]. Otherwise as `per_example_grad_norms`.
      TypeError: As `per_example_grad_norms`.

    Guarantees:
      Those of `per_example_grad_norms`.

    Example:
      >>> grad_fn = value_grad_and_norms(lambda params, x: jnp.sum(params * x))
      >>> x, importance_weights = jnp.array([[3.0, 4.0], [0.0, 1.0]]), jnp.array([0.5, 2.0])
      >>> losses, gradient, norms = grad_fn(jnp.ones(2), importance_weights, x)
      >>> losses.tolist(), gradient.tolist(), norms.tolist()
      ([7.0, 1.0], [0.75, 2.0], [5.0, 1.0])

      With a random key for each example, here for noise on the parameters:

      >>> def noisy_loss(params, x, key):
      ...     return jnp.sum((params + jax.random.normal(key, params.shape)) * x)
      >>> grad_fn = value_grad_and_norms(noisy_loss, keyed=True)
      >>> losses, _, norms = grad_fn(jnp.ones(2), importance_weights, x, key=jax.random.key(0))
      >>> len(set(losses.tolist())), norms.tolist()
      (2, [5.0, 1.0])
    """
    return _value_grad_and_norms(loss_fn, *hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed))


@cached
def _value_grad_and_norms(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed):
    def value_grad_and_norms(params, importance_weights, *batch, key=None):
        args = params, *batch
        positions = positions_of_params(argnums, len(args))
        check_weights(importance_weights, [x for i, x in enumerate(args) if i not in positions])
        loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
        importance_weights = jnp.asarray(importance_weights)
        coefficients = importance_weights / loss.batch_size
        (losses, aux, norms), gradient = _in_microbatches(
            lambda batch: _one_pass(loss, *batch),
            (loss.batch, coefficients),
            microbatch_size or _default_size(loss),
        )
        gradient = [g.astype(dtype) for g, dtype in zip(gradient, loss.dtypes)]
        return (
            (losses, aux) if has_aux else losses,
            jax.tree.unflatten(loss.params_tree, gradient),
            combine(norms, loss, squared, per_leaf),
        )

    return value_grad_and_norms


def _one_pass(loss: TracedLoss, batch, coefficients: jax.Array | None):
    """Returns (losses, aux, norms of each leaf), and each leaf's gradient summed with the coefficients."""
    losses, aux, gradients = loss.factored_gradients(loss.params, batch)
    norms, sums = zip(*(_norms_and_sum(g, coefficients, losses.size) for g in gradients)) if gradients else ((), ())
    return (losses, aux, _checked(norms)), sums


def sums_by_norms(loss: TracedLoss, find_coefficients: Callable, mask: jax.Array | None, microbatch_size: int | None):
    """Sums gradients with coefficients that follow from their norms, in one forward and one backward pass.

    The factors of all leaves are kept until the norms are known, so each leaf may have coefficients of its own.

    Args:
      loss: The traced loss, with its batch.
      find_coefficients: `(norms of each leaf, mask) -> coefficients of each leaf`, lists of f32[B]. An example of
        coefficient 0 adds nothing, whatever its gradient is.
      mask: bool[B], passed on, or None.
      microbatch_size: See `per_example_grad_norms`.

    Returns:
      (losses, aux, norms of each leaf), and the sum of each leaf in float32 or wider.
    """

    def one_pass(batch):
        examples, mask = batch
        losses, aux, gradients = loss.factored_gradients(loss.params, examples)
        kept = _keep(gradients, losses.size)
        norms = _checked([_norms_and_sum(gradient, None, losses.size)[0] for gradient in kept])
        coefficients = find_coefficients(norms, mask)
        return (losses, aux, norms), [_sum_kept(*leaf) for leaf in zip(gradients, kept, coefficients)]

    return _in_microbatches(one_pass, (loss.batch, mask), microbatch_size or _default_size(loss))


def _keep(gradients: Sequence[Gradient], num_examples: int) -> list[Gradient]:
    """Returns the batches of gradients, those formed that would else be formed twice, if KEPT_BYTES hold them."""
    kept, free = [], KEPT_BYTES
    for gradient in gradients:
        size = _formed_size(gradient)
        num_bytes = 4 * num_examples * math.prod(gradient.shape)
        is_kept = size is not None and num_bytes <= free
        free -= num_bytes if is_kept else 0
        kept.append(_formed(gradient, size) if is_kept else gradient)
    return kept


def _formed_size(gradient: Gradient) -> int | None:
    """Returns how many gradients of a leaf are formed together, None where they need not be formed."""
    if not isinstance(gradient, Factored) or not gradient.terms:
        return None
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gradient)
    return None if cost.by_gram(example) else max(1, _formed_bytes() // cost.bytes_of_forming(example))


def _formed(gradient: Factored, size: int) -> jax.Array:
    """Returns a batch of formed gradients [B, K, I, J], not laid out."""

    def form(chunk):
        return jnp.concatenate(jax.vmap(algebra.multiply_out)(chunk), axis=2), None

    return _in_microbatches(form, gradient, size, has_sums=False)[0]


def _sum_kept(gradient: Gradient, kept: Gradient, coefficients: jax.Array) -> jax.Array:
    """Returns the sum of one leaf's gradients with the coefficients, of what is kept of them."""
    kept = _without(kept, coefficients == 0)
    if not isinstance(kept, Factored):
        return algebra.lay_out(gradient, [_weighted_sum(kept, coefficients)])
    size = _formed_size(gradient)
    return _in_microbatches(lambda chunk: (chunk[1], _weighted_sum(*chunk)), (kept, coefficients), size)[1]


def _without(gradient: Gradient, left_out: jax.Array) -> Gradient:
    """Returns a batch of gradients with zeros for the examples bool[B] that are left out: 0 times nan is nan."""
    return jax.tree.map(
        lambda x: jnp.where(left_out.reshape(-1, *(1 for _ in x.shape[1:])), jnp.zeros((), x.dtype), x), gradient
    )


class _Unchecked(NamedTuple):
    """Norms of one leaf by one pass over unscaled numbers.

    Attributes:
      factors: Each f32[B, K]; the squared norm is the sum over K of the product of the factors.
      scaled: `(scales) -> factors` of numbers that are multiplied with the scales of each factor, f32[B, K].
      has_zeros: Returns whether the factors hold zeros, each bool[B, K].
    """

    factors: tuple[Squares, ...]
    scaled: Callable[[tuple[jax.Array, ...]], tuple[Squares, ...]]
    has_zeros: Callable[[], tuple[jax.Array, ...]]

    def norms(self) -> jax.Array:
        return _sum_of_products([root(factor.sums) for factor in self.factors])

    def scaled_norms(self) -> jax.Array:
        """Returns the norms by another pass, whatever the size of the numbers."""
        scales = tuple(factor.scales() for factor in self.factors)
        lengths = [root(factor.sums) / scale for factor, scale in zip(self.scaled(scales), scales)]
        if len(lengths) > 1:  # 0 · ∞ somewhere in the gradient
            for zeros, other in zip(self.has_zeros(), reversed(range(2))):
                lengths[other] = jnp.where(zeros & jnp.isinf(lengths[other]), jnp.nan, lengths[other])
        return _sum_of_products(lengths)


def _sum_of_products(lengths: Sequence[jax.Array]) -> jax.Array:
    """Returns the norms f32[B] of products of lengths [B, K]."""
    product = math.prod(lengths)
    return product[:, 0] if product.shape[1] == 1 else length([product], axis=1)


def _checked(norms: Sequence[jax.Array | _Unchecked]) -> list[jax.Array]:
    """Returns norms f32[B], by another pass over scaled numbers unless every square is exact.

    One condition for all, on all squares side by side: on a CPU each small array takes as long as a small layer, and so
    do some in the branch that is not taken.
    """
    unchecked = [x for x in norms if isinstance(x, _Unchecked)]
    if not unchecked:
        return list(norms)
    factors = [factor for x in unchecked for factor in x.factors]
    sums = jnp.concatenate([factor.sums for factor in factors], axis=1)
    least = np.repeat([factor.least for factor in factors], [factor.sums.shape[1] for factor in factors])
    all_exact = jnp.all(jnp.isfinite(sums) & (sums >= least.astype(sums.dtype)))
    rows = iter(
        lax.cond(
            all_exact,
            lambda: jnp.stack([x.norms() for x in unchecked]),
            lambda: jnp.stack([x.scaled_norms() for x in unchecked]),
        )
    )
    return [next(rows).astype(x.factors[0].sums.dtype) if isinstance(x, _Unchecked) else x for x in norms]


def _norms_and_sum(gradient: Gradient, coefficients: jax.Array | None, num_examples: int):
    """Returns the norms [B] of one leaf's gradients, to be checked, and their sum with the coefficients, if given."""
    if isinstance(gradient, Factored) and not gradient.terms:
        return jnp.zeros(num_examples), jnp.zeros(gradient.shape)
    example = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), gradient)
    if not isinstance(gradient, Factored):
        is_small = sum(x.nbytes for x in jax.tree.leaves(gradient)) <= SMALL_BYTES
        return (_form_all if is_small else _form_and_check)(gradient, coefficients)
    bytes_of_forming = cost.bytes_of_forming(example)
    size = max(1, _formed_bytes() // bytes_of_forming)
    if cost.by_gram(example):
        return _gram_norms(gradient, example, size), _weighted_sum(gradient, coefficients)
    if num_examples * bytes_of_forming <= SMALL_BYTES:
        return _form_all(gradient, coefficients)
    return _in_microbatches(lambda chunk: _form_and_check(*chunk), (gradient, coefficients), size)


def _gram_norms(gradient: Factored, example: Factored, formed_size: int) -> jax.Array | _Unchecked:
    """Returns norms [B] from pairs of uses; where those lose their digits, from formed gradients."""
    size = max(1, ACCELERATOR_BYTES // max(1, cost.cost_of_gram(example).bytes))

    def by_example(function, *args):
        return _in_microbatches(lambda chunk: (jax.vmap(function)(*chunk), None), args, size, has_sums=False)[0]

    if not gram.can_cancel(example):
        return _Unchecked(
            by_example(gram.factor_squares, gradient),
            lambda scales: by_example(gram.factor_squares, gradient, scales),
            lambda: by_example(gram.has_zeros, gradient),
        )

    norms, exact = by_example(gram.norm, gradient)

    def formed():
        formed, _ = _in_microbatches(lambda chunk: _form_and_check(chunk, None), gradient, formed_size, has_sums=False)
        return formed.astype(norms.dtype)

    # Zeros look like underflow, and are looked for only where there is one or the other.
    all_exact = jnp.all(exact)
    all_exact = lax.cond(all_exact, lambda: all_exact, lambda: jnp.all(exact | jax.vmap(gram.is_zero)(gradient)))
    return lax.cond(all_exact, lambda: norms, formed)


def _form_all(gradient: Gradient, coefficients: jax.Array | None) -> tuple[_Unchecked, jax.Array | None]:
    """Returns norms [B] of formed gradients, to be checked, and their sum with the coefficients, if given."""
    products = jax.vmap(algebra.multiply_out)(gradient)
    total = None
    if coefficients is not None:
        sums = [jnp.tensordot(coefficients.astype(product.dtype), product, 1) for product in products]
        total = algebra.lay_out(gradient, sums)

    def factors(scales=(None,)):
        axes = 0, None if scales[0] is None else 0
        return (jax.vmap(lambda parts, scale: squares([part[None] for part in parts], scale), axes)(products, *scales),)

    return _Unchecked(factors(), factors, has_zeros=tuple), total


def _form_and_check(gradient: Gradient, coefficients: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Returns norms [B] of formed gradients, and their sum, and lets go of the gradients."""
    norms, total = _form_all(gradient, coefficients)
    return _checked([norms])[0], total


def _weighted_sum(gradient: Factored, coefficients: jax.Array | None) -> jax.Array | None:
    """Returns the sum with the coefficients: the examples become uses of one gradient."""
    if coefficients is None:
        return None
    total = algebra.sum_leading(jax.vmap(algebra.scale)(gradient, coefficients))
    return algebra.lay_out(total, algebra.multiply_out(total))


def _in_microbatches(function: Callable, batch, size: int | None, *, has_sums: bool = True):
    """Calls `function(batch) -> (outputs with leading axis B, sums or None)` on at most `size` examples at a time."""
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    if size is None or size >= num_examples:
        return function(batch)
    # A chunk size that divides B avoids a copy of the batch and a second compilation of `function`.
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


def combine(norms, loss: TracedLoss, squared: bool, per_leaf: bool):
    """Returns the norms of all leaves as a pytree, or as those of the whole gradients, f32[B]."""
    if per_leaf:
        return jax.tree.unflatten(loss.params_tree, [jnp.square(x) if squared else x for x in norms])
    norm = length([jnp.stack([jnp.zeros(loss.batch_size), *norms])], axis=0)
    return jnp.square(norm) if squared else norm


def _default_size(loss: TracedLoss) -> int | None:
    return max(1, UNCOVERED_BYTES // loss.uncovered_bytes) if loss.uncovered_bytes else None


def _formed_bytes() -> int:
    return CPU_BYTES if jax.default_backend() == "cpu" else ACCELERATOR_BYTES


def hashable(argnums, has_aux, squared, per_leaf, microbatch_size, keyed) -> tuple:
    """Returns the options in a form that can be hashed."""
    if microbatch_size is not None and not (isinstance(microbatch_size, numbers.Integral) and microbatch_size >= 1):
        raise ValueError(f"microbatch_size must be >= 1, and a whole number, got {microbatch_size!r}")
    argnums = argnums if isinstance(argnums, numbers.Integral) else tuple(argnums)
    return argnums, has_aux, squared, per_leaf, microbatch_size, keyed
