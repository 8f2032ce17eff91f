"""Sum or mean of per-example gradients that are clipped, with the noise of differentially private SGD if wanted."""

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm.arguments import check_key
from issgd_jax.gradnorm.caching import cached
from issgd_jax.gradnorm.lengths import of_wholes
from issgd_jax.gradnorm.norms import assemble, hashable
from issgd_jax.gradnorm.sharding import in_auto_axes, like_arguments
from issgd_jax.gradnorm.sums import sums_by_norms
from issgd_jax.gradnorm.tracing import trace_loss, with_keys

# Folded into noise_key, so that a key that is also the loss's, which is split into one for each example, does no harm.
NOISE_STREAM = 2**31


def clipped_grad(
    loss_fn: Callable[..., Any],
    max_norm: float | jax.Array,
    *,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    per_leaf: bool = False,
    microbatch_size: int | None = None,
    keyed: bool = False,
    normalize_by: float | jax.Array | None = None,
    nonfinite: str = "zero",
    noise_multiplier: float | jax.Array | None = None,
) -> Callable[..., Any]:
    """Transforms the loss of one example into a function that returns losses, clipped gradient and norms.

    The gradient of each example is scaled by `min(1, max_norm / norm)` before it is added. One forward and one backward
    pass compute everything, per leaf too: the norms come first, then the sums from the same factors. Gradients that are
    formed are kept in between, as far as 64 MiB hold them, and else formed twice.

    Clipping BIASES the gradient: its mean is no longer that of the loss wherever a norm exceeds max_norm.

    Args:
      loss_fn, argnums, has_aux, microbatch_size, keyed: See `per_example_grad_norms`.
      max_norm: Largest norm of an example's gradient in the sum, > 0; infinity clips nothing. An array or a traced
        value may change from call to call and compiles nothing anew.
      per_leaf: Whether to clip the gradient of each parameter leaf by itself, each to max_norm.
      normalize_by: Number by which the sum is divided, > 0. By default the size B of the batch, examples that the mask
        leaves out included: the mean. 1 gives the sum.
      nonfinite: What an example adds whose gradient is not finite: "zero", so that no example adds more than max_norm
        whatever it holds, or "keep", so that the gradient is nan. Its norm is not finite in either case:
        `jnp.sum(~jnp.isfinite(norms))` counts them.
      noise_multiplier: Standard deviation of the Gaussian noise added to every element of the sum, divided by the most
        that one example adds: max_norm, or with per_leaf `max_norm * sqrt(number of leaves)`. None adds no noise.

    Returns:
      A function `(params, *batch, mask=None) -> (losses, gradient, norms)`; with keyed, it also takes `key=`, with
      noise_multiplier `noise_key=`, a new random key at every step. mask is bool[B], False for padding, which adds
      nothing, nan or not. losses f32[B] and norms f32[B], with per_leaf a pytree of f32[B], are those of all examples
      before clipping. With has_aux the first result is `(losses, aux)`.

    Raises:
      ValueError: max_norm, normalize_by, noise_multiplier or nonfinite is out of range, or noise is asked for without
        a bound: with nonfinite="keep", or an infinite max_norm. When called: mask does not have shape [B].
        Otherwise as `per_example_grad_norms`.
      TypeError: When called: noise_key is missing or not expected, or mask is not boolean. Otherwise as
        `per_example_grad_norms`.

    Guarantees:
      - With nonfinite="zero", adding or removing one example changes the sum by at most max_norm (per leaf: as above),
        up to rounding; replacing one, by twice that. Losses, aux and norms are not private.
      - A traced max_norm that is not > 0 gives a gradient of nan.
      - The noise is that of `jax.random.normal`, independent for every element, added once, in float32 or wider.
        On several devices, add the sums first and the noise once.
      - Norms are those of `per_example_grad_norms`.

    Source: Abadi et al. 2016 (arXiv:1607.00133), Algorithm 1; per leaf McMahan et al. 2018 (arXiv:1710.06963). Without
    forming gradients, for dense layers: Goodfellow 2015 (arXiv:1510.01799), Lee and Kifer 2021 (arXiv:2009.03106).

    Example:
      >>> grad_fn = clipped_grad(lambda params, x: jnp.sum(params * x), max_norm=1.0, normalize_by=1)
      >>> losses, gradient, norms = grad_fn(jnp.zeros(2), jnp.array([[3.0, 4.0], [0.5, 0.0]]))
      >>> norms.tolist(), [round(float(g), 3) for g in gradient]
      ([5.0, 0.5], [1.1, 0.8])
      >>> private = clipped_grad(lambda params, x: jnp.sum(params * x), max_norm=1.0, noise_multiplier=1.1)
      >>> _, gradient, _ = private(jnp.zeros(2), jnp.ones((8, 2)), noise_key=jax.random.key(0))
      >>> gradient.shape
      (2,)
    """
    options = hashable(argnums, has_aux, False, per_leaf, microbatch_size, keyed)
    _check_options(max_norm, normalize_by, nonfinite, noise_multiplier)
    compiled = _clipped_grad(loss_fn, *options, nonfinite)
    amounts = [float(x) if isinstance(x, numbers.Real) else x for x in (max_norm, normalize_by, noise_multiplier)]

    def clipped(*args, key=None, noise_key=None, mask=None):
        _check_noise_key(noise_key, noise_multiplier)
        mask = None if mask is None else jnp.asarray(mask)
        return compiled(*args, amounts=amounts, key=key, noise_key=noise_key, mask=mask)

    return clipped


@cached
def _clipped_grad(loss_fn, argnums, has_aux, squared, per_leaf, microbatch_size, keyed, nonfinite):
    def run(args, amounts, key, noise_key, mask):
        max_norm, normalize_by, noise_multiplier = amounts
        loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
        _check_mask(mask, loss.batch_size)
        divisor = loss.batch_size if normalize_by is None else normalize_by

        def find_coefficients(norms, mask):
            whole = of_wholes(norms, 1)
            adds = jnp.isfinite(whole) | (nonfinite == "keep")
            adds = adds if mask is None else adds & mask
            limited = norms if per_leaf else [whole] * len(norms)
            return [jnp.where(adds, _shrinkage(norm, max_norm) / divisor, 0).astype(norm.dtype) for norm in limited]

        outputs, sums = sums_by_norms(loss, find_coefficients, mask, microbatch_size, per_leaf, zero_leaves_out=True)
        if noise_multiplier is not None:
            sensitivity = max_norm * math.sqrt(len(sums)) if per_leaf else max_norm
            sums = _with_noise(sums, noise_multiplier * sensitivity / divisor, noise_key)
        return assemble(loss, outputs, sums, has_aux, squared, per_leaf)

    def clipped_grad(*args, amounts, key, noise_key, mask):
        return in_auto_axes(run, (args, amounts, key, noise_key, mask), argnums, like_arguments)

    return clipped_grad


def _shrinkage(norm: jax.Array, max_norm: jax.Array) -> jax.Array:
    """Returns min(1, max_norm / norm), nan where the norm is not finite or max_norm not > 0."""
    is_long = norm > max_norm
    shrinkage = jnp.where(is_long, max_norm / jnp.where(is_long, norm, 1), 1)
    return jnp.where(jnp.isfinite(norm) & (max_norm > 0), shrinkage, jnp.nan)


def _with_noise(sums: list[jax.Array], std: jax.Array, key: jax.Array) -> list[jax.Array]:
    """Returns the sums with Gaussian noise of standard deviation std on every element."""
    keys = jax.random.split(jax.random.fold_in(key, jnp.uint32(NOISE_STREAM)), len(sums))
    noise = [jax.random.normal(key, total.shape, total.dtype) for total, key in zip(sums, keys)]
    return [total + (std * sample).astype(total.dtype) for total, sample in zip(sums, noise)]


def _check_options(max_norm, normalize_by, nonfinite, noise_multiplier) -> None:
    _check_number("max_norm", max_norm, "> 0", lambda x: x > 0, "clip to the median norm, or to infinity for none")
    if normalize_by is not None:
        _check_number("normalize_by", normalize_by, "> 0", lambda x: 0 < x < math.inf, "None divides by the batch size")
    if nonfinite not in ("zero", "keep"):
        raise ValueError(f'nonfinite must be "zero" or "keep", got {nonfinite!r}')
    if noise_multiplier is None:
        return
    _check_number("noise_multiplier", noise_multiplier, ">= 0", lambda x: 0 <= x < math.inf, "None adds no noise")
    if nonfinite == "keep":
        raise ValueError('noise_multiplier needs nonfinite="zero": one example could make the sum nan, got "keep"')
    if not isinstance(max_norm, jax.core.Tracer) and math.isinf(max_norm):
        raise ValueError("noise_multiplier needs a finite max_norm: noise is in proportion to it, got inf")


def _check_number(name: str, value, allowed: str, is_allowed: Callable[[float], bool], remedy: str) -> None:
    """Raises ValueError unless value is one number that is allowed; of a traced one the shape alone is known."""
    is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not is_number or not (isinstance(value, jax.core.Tracer) or is_allowed(float(value))):
        raise ValueError(f"{name} must be one number {allowed}, got {value!r}: {remedy}")


def _check_noise_key(noise_key, noise_multiplier) -> None:
    if (noise_key is None) != (noise_multiplier is None):
        wrong = "missing: pass one random key, a new one at every step" if noise_key is None else "given"
        raise TypeError(f"noise_key= is {wrong}, but noise_multiplier is {noise_multiplier}")
    if noise_key is not None:
        check_key("noise_key", noise_key)


def _check_mask(mask, num_examples: int) -> None:
    if mask is None:
        return
    if mask.shape != (num_examples,):
        raise ValueError(f"mask must have shape ({num_examples},), one for each example, got {mask.shape}")
    if mask.dtype != bool:
        raise TypeError(f"mask must be boolean, True for the examples that count, got {mask.dtype}: pass mask > 0")
