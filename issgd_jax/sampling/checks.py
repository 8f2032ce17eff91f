"""Arguments of callers as arrays of the types that are computed with: no index wraps around, none is out of step."""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

NO_EXAMPLE = -1  # index that stands for no example
MAX_STEP = 2**30  # steps are below it
MAX_EXAMPLES = 2**30  # indices of examples, nodes and padding are i32


def as_indices(indices: Any, num_examples: int) -> jax.Array:
    """Returns indices as i32 of the same shape; those outside [0, N) stay outside, whatever their type.

    Raises:
      TypeError: they are not whole numbers, such as a mask.

    Example:
      >>> as_indices(np.array([3, 2**32]), num_examples=10).tolist()  # and not 0
      [3, -1]
    """
    indices = indices if isinstance(indices, jax.Array) else np.asarray(indices)
    check_whole(indices)
    if indices.dtype == jnp.int32:
        return jnp.asarray(indices)
    if indices.dtype.itemsize >= 4 and indices.size:
        xp = jnp if isinstance(indices, jax.Array) else np
        none = xp.asarray(0, indices.dtype)
        inside = (indices >= none) & (indices < xp.asarray(num_examples, indices.dtype))
        return jnp.asarray(xp.where(inside, xp.where(inside, indices, none).astype(np.int32), np.int32(NO_EXAMPLE)))
    return jnp.asarray(indices.astype(np.int32))


def as_whole(name: str, value: Any) -> int:
    """Returns a Python int.

    Raises:
      TypeError: it is no whole number, or is not known when the program is compiled.

    Example:
      >>> as_whole("batch_size", np.int64(4))
      4
    """
    try:
        return operator.index(value)
    except TypeError as error:  # JAX's, of a traced array, is one too
        raise TypeError(f"{name} must be a whole number that is known outside jit, got {value!r}") from error


def check_whole(indices: Any) -> None:
    """Raises TypeError unless indices are whole numbers, or there are none."""
    if not jnp.issubdtype(indices.dtype, jnp.integer) and indices.size:
        raise TypeError(f"indices must be whole numbers, got {indices.dtype}: use np.flatnonzero for a mask")


def as_numbers(name: str, values: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns one number for each index, f32 of this shape; a scalar stands for all.

    Finite numbers stay finite, and those that are not 0 stay so.

    Raises:
      TypeError: they are no real numbers.
      ValueError: they have another shape.

    Example:
      >>> as_numbers("a score", 2, shape=(3,)).tolist()
      [2.0, 2.0, 2.0]
    """
    values = values if isinstance(values, jax.Array) else np.asarray(values)
    if not (jnp.issubdtype(values.dtype, np.number) or values.dtype == bool) or jnp.iscomplexobj(values):
        raise TypeError(f"{name} must be a real number, got {values.dtype}")
    if values.shape not in ((), shape):
        raise ValueError(f"need {name} for each index, or one for all, got shapes {shape} and {values.shape}")
    if values.dtype.itemsize > 4:
        xp = jnp if isinstance(values, jax.Array) else np
        least, largest = (float(limit) for limit in (np.finfo(np.float32).tiny, np.finfo(np.float32).max))
        values = xp.where(xp.isfinite(values), xp.clip(values, -largest, largest), values)
        if jnp.issubdtype(values.dtype, np.floating):
            values = xp.where(xp.abs(values) < least, xp.sign(values) * least, values)
    return jnp.broadcast_to(jnp.asarray(values, jnp.float32), shape)


def as_step(name: str, step: Any) -> jax.Array:
    """Returns a learner step as i32[]; an array of JAX is not waited for: one outside [0, 2^30) becomes no step.

    Raises:
      TypeError: it is no whole number.
      ValueError: it is not one number, or no array of JAX and outside [0, 2^30).

    Example:
      >>> int(as_step("step", 7))
      7
    """
    is_array = isinstance(step, jax.Array)
    step = step if is_array else np.asarray(step)
    if not jnp.issubdtype(step.dtype, jnp.integer):
        raise TypeError(f"{name} must be a whole number, got {step.dtype}")
    if step.shape:
        raise ValueError(f"{name} must be one number, got shape {step.shape}: call once for each step")
    if not is_array and not 0 <= step < MAX_STEP:
        raise ValueError(f"{name} must be in [0, {MAX_STEP}), got {step}")
    return as_indices(step, MAX_STEP)


def check_number(name: str, value: Any, is_allowed: Callable[[Any], bool], allowed: str) -> None:
    """Raises TypeError if the value is no number, ValueError if it is not allowed; arrays may be traced, and pass."""
    if isinstance(value, str):
        raise TypeError(f"{name} must be {allowed}, got {value!r}: pass a number")
    if isinstance(value, int | float | np.number) and not is_allowed(value):
        raise ValueError(f"{name} must be {allowed}, got {value}")
