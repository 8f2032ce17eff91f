"""Sums over all pairs of uses of a dense term, in the form that suits the platform."""

import functools
import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from issgd_jax.gradnorm.algebra import contract
from issgd_jax.gradnorm.lengths import promoted
from issgd_jax.gradnorm.mapping import varying_like
from issgd_jax.gradnorm.pairs import sum_over_pairs

SWITCH = "ISSGD_JAX_GRAM"
# Until a kernel has been run on its hardware, it is taken where it is asked for, and the default is plain JAX.
DEFAULT, FORMS = "plain", ("plain", "auto", "tpu", "hopper")
# Inner products of fewer uses are no memory to save, and fill no tile; of more, the list of pairs of tiles fills the
# scalar memory of a TPU.
LEAST_USES, MOST_USES = 128, 2**15


def gram_sums(
    left: jax.Array, right: jax.Array, *, precision: lax.PrecisionLike = None, least: float = 0.0
) -> jax.Array:
    """Returns Σ l·r and Σ |l|·|r| over all pairs of uses, with l = <left_s, left_t> and r = <right_s, right_t>.

    Args:
      left: [B, T, I].
      right: [B, T, J].
      precision: Of the products, as of `jax.lax.dot`.
      least: What |l| and |r| count as at least; its square underflows.

    Returns:
      f32[2, B], or wider.

    Raises:
      ValueError: The environment variable ISSGD_JAX_GRAM names no form, or, for factors of a type that the kernels
        know, one of another platform. Of other types, and of a precision that a kernel does not give, sums are plain.

    Guarantees:
      - No array of T × T is in the device's memory if T is larger than two blocks of `pairs.BLOCK`.
      - Sums are in float32, or wider. The first is not finite if a number of its example is not.
      - Derivatives are those of the plain form.

    Example:
      >>> gram_sums(jnp.array([[[1.0], [-2.0]]]), jnp.array([[[3.0], [1.0]]])).tolist()
      [[1.0], [25.0]]
    """
    form = _form()
    is_worth_it = form != "auto" or LEAST_USES <= left.shape[1] <= MOST_USES
    if form == "plain" or not is_worth_it or not _has_kernel(left, right):
        return plain(left, right, precision=precision, least=least)
    left, right = varying_like(left, right), varying_like(right, left)
    return _differentiable(left, right, _resolved(precision), float(least), form)


def plain(left: jax.Array, right: jax.Array, *, precision: lax.PrecisionLike, least: float) -> jax.Array:
    """Returns what `gram_sums` does, in plain JAX."""

    def products(*blocks):
        left, right = (contract("bsi,bti->bst", s, t, precision) for s, t in zip(*blocks))
        return signed_and_absolute(left, right, least)

    return sum_over_pairs(products, (left, right))


def signed_and_absolute(left: jax.Array, right: jax.Array, least: float) -> jax.Array:
    """Returns Σ l·r and Σ |l|·|r| over the last two axes, [2, B], of inner products [B, S, T], |.| at least `least`.

    Both by one reduction, which XLA fuses with the products; two would write them to memory.
    """
    dtype = promoted(left.dtype, right.dtype)
    signs, floors = (jnp.asarray(r, dtype).reshape(2, 1, 1, 1) for r in ([1, -1], [-jnp.inf, least]))
    left, right = (jnp.maximum(jnp.maximum(y, signs * y), floors) for y in (left.astype(dtype), right))
    return jnp.sum(left * right, axis=(2, 3))


def _form() -> str:
    form = os.environ.get(SWITCH) or DEFAULT
    if form not in FORMS:
        raise ValueError(f"{SWITCH} must be one of {', '.join(FORMS)}, or not be set, got {form!r}")
    return form


def _has_kernel(left: jax.Array, right: jax.Array) -> bool:
    return left.dtype == right.dtype and left.dtype in (jnp.float32, jnp.bfloat16) and 0 not in left.shape + right.shape


def _resolved(precision: lax.PrecisionLike) -> Any:
    """Returns the precision that a product would have here, in a form that can be hashed."""
    precision = jax.config.jax_default_matmul_precision if precision is None else precision
    try:
        return None if precision is None else lax.Precision(precision)
    except (TypeError, ValueError):  # of each operand, or an algorithm
        return precision


# A primitive of its own, as only its lowering knows the platform and how many devices share the program. Its abstract
# value varies over what left varies over, in a `shard_map`.
_gram_sums = Primitive("gram_sums")
_gram_sums.def_abstract_eval(lambda left, right, **_: left.update(shape=(2, left.shape[0]), dtype=jnp.dtype("float32")))
_gram_sums.def_impl(lambda *factors, **options: jax.jit(functools.partial(_gram_sums.bind, **options))(*factors))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _differentiable(left, right, precision, least, form):
    return _gram_sums.bind(left, right, precision=precision, least=least, form=form)


@_differentiable.defjvp
def _derivative(precision, least, form, factors, tangents):
    return jax.jvp(functools.partial(plain, precision=precision, least=least), factors, tangents)


def _batched(factors, axes, **options):
    """The examples of another batch are more examples."""
    size = next(x.shape[axis] for x, axis in zip(factors, axes) if axis is not None)
    factors = [batching.bdim_at_front(x, axis, size) for x, axis in zip(factors, axes)]
    sums = _gram_sums.bind(*(x.reshape(-1, *x.shape[2:]) for x in factors), **options)
    return sums.reshape(2, size, -1), 1


batching.primitive_batchers[_gram_sums] = _batched


def _lowering(kernel: str | None, is_there: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    """Returns the lowering rule of a platform: by its kernel if there is one, for this machine and these options."""

    def lower(context, *factors, precision, least, form):
        def by(function):
            # Types that vary over the axes of a `shard_map` are for its checks, which are done.
            types = [jax.core.ShapedArray(x.shape, x.dtype) for x in context.avals_in]
            function = functools.partial(function, precision=precision, least=least)
            return mlir.lower_fun(function, multiple_results=False)(context.replace(avals_in=types), *factors)

        exact = _gives(form if form != "auto" else kernel, context.avals_in[0].dtype, precision)
        if form != "auto":
            interpret = {"interpret": True} if kernel is None else {}
            if kernel != form and (form, kernel) != ("tpu", None):
                raise ValueError(
                    f"{SWITCH}={form} forces a kernel that this program's platform does not have (Hopper's runs on "
                    "CUDA, that of TPUs there, and interpreted on a CPU); unset it, or set it to plain"
                )
            return by(functools.partial(_load(form), **interpret) if exact else plain)
        if kernel is None or not exact or _is_partitioned(context) or not is_there():
            return by(plain)
        try:
            return by(_load(kernel))
        except Exception as error:  # Pallas is experimental: another version of JAX may lack a part
            logging.getLogger("issgd_jax").warning(
                "the %s kernel of gradient norms could not be lowered; plain JAX replaces it, see %s: %s: %s",
                kernel, SWITCH, type(error).__name__, error,
            )  # fmt: skip
            return by(plain)

    return lower


def _gives(kernel: str | None, dtype: jnp.dtype, precision: Any) -> bool:
    """Returns whether a kernel's products have the precision; those of bfloat16 are exact in float32."""
    precisions = {"tpu": (None, lax.Precision.DEFAULT, lax.Precision.HIGHEST), "hopper": (None, lax.Precision.DEFAULT)}
    return dtype == jnp.bfloat16 or precision in precisions.get(kernel, ())


def _load(kernel: str) -> Callable[..., jax.Array]:
    """Returns the function of a kernel; imports Pallas, which takes half a second."""
    return importlib.import_module(f"issgd_jax.kernels.gram_{kernel}").gram_sums


def _is_partitioned(context: mlir.LoweringRuleContext) -> bool:
    """Returns whether the compiler spreads the program over devices, which it cannot do with a kernel."""
    axes = context.module_context.axis_context
    if isinstance(axes, mlir.SPMDAxisContext):  # within pmap or shard_map
        return axes.manual_axes | set(axes.mesh.manual_axes) != set(axes.mesh.axis_names)
    return isinstance(axes, mlir.ShardingContext) and axes.num_devices != 1


def _all_are_hopper() -> bool:
    try:
        return all(device.compute_capability == "9.0" for device in jax.local_devices(backend="cuda"))
    except RuntimeError:  # there are none, as where a program is exported
        return False


mlir.register_lowering(_gram_sums, _lowering(None))
mlir.register_lowering(_gram_sums, _lowering("tpu"), platform="tpu")
mlir.register_lowering(_gram_sums, _lowering("hopper", _all_are_hopper), platform="cuda")
