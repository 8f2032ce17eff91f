"""A function of one example on all examples of a batch: together, or one after another where JAX cannot batch it."""

from collections.abc import Callable
from typing import Any

import jax
from jax import lax


def map_examples(function: Callable[..., Any], batch: Any, *, batch_size: int | None = None) -> Any:
    """Returns `function(example)` of all examples, stacked, with at most batch_size of them in memory together.

    Where a primitive has no batching rule, the examples are computed one after another.
    """
    num_examples = jax.tree.leaves(batch)[0].shape[0]
    try:
        if batch_size is None or batch_size >= num_examples:
            return _together(function)(batch)
        return lax.map(function, batch, batch_size=batch_size)
    except Exception:  # JAX has no one type of it; what is not about batching is raised below again
        pass
    return lax.map(function, batch)


def varying_axes(tree: Any) -> frozenset[str]:
    """Returns the axes of a `shard_map` over which an array of a pytree varies."""
    return frozenset().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(tree)))


def varying_like(tree: Any, like: Any) -> Any:
    """Returns arrays whose types say that they vary over the axes of a `shard_map` over which one of `like` does."""
    axes = varying_axes(like)

    def varying(x):
        missing = tuple(axes - varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(varying, tree) if axes else tree


def why_one_at_a_time(function: Callable[..., Any], batch: Any) -> str | None:
    """Returns why JAX cannot batch a function that it can trace, None if it can."""
    try:
        jax.eval_shape(_together(function), batch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _together(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function batched, in a trace of its own: one that fails leaves no effects, as of a callback."""
    return jax.jit(jax.vmap(function))
