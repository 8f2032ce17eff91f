"""Checks of the arguments of a loss, in words that name the remedy, also for modules of libraries that are not imported
here."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

DOCS = "see Frameworks in docs/gradient-norms.md"
NNX = (
    "pass params of `graph, params, rest = nnx.split(model, nnx.Param, ...)`, and begin loss_fn with "
    "`model = nnx.merge(graph, params, rest, copy=True)`; for dropout, `nnx.reseed(model, default=key, dropout=key)` "
    "with keyed=True"
)
EQUINOX = (
    "pass params of `params, static = eqx.partition(model, eqx.is_inexact_array)`, and begin loss_fn with "
    "`model = eqx.combine(params, static)`"
)
LINEN = "pass `model.init(...)['params']`, and call `model.apply({'params': params}, ...)` in loss_fn"
# Classes of other libraries that hold more than parameters, and what to pass instead.
LIBRARIES = (
    ("flax.training.train_state", "TrainState", "pass state.params"),
    ("flax.linen", "Module", LINEN),
    ("flax.nnx", "Module", NNX),
    ("flax.nnx", "Variable", NNX),
    ("equinox", "Module", EQUINOX),
)
KEYED = "pass one random key for the batch as key=, with keyed=True"


def check_arrays(args: Sequence[Any]) -> None:
    """Raises TypeError unless all leaves of the arguments are arrays or numbers."""
    for i, arg in enumerate(args):
        for path, leaf in jax.tree_util.tree_leaves_with_path(arg):
            if not _is_array(leaf):
                remedy = _remedy_of_library(arg) or "close over it, or encode it as numbers"
                where = f"has the leaf {jax.tree_util.keystr(path)}" if path else "is"
                raise TypeError(
                    f"argument {i} {where} of type {_type_of(leaf)}: only arrays and numbers are allowed; "
                    f"{remedy} ({DOCS})"
                )


def check_params(params: Sequence[Any], positions: Sequence[int]) -> None:
    """Raises TypeError unless the parameters, at these positions, are floating-point and without running averages."""
    for i, tree in zip(positions, params):
        name = "params" if i == 0 else f"argument {i}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not jnp.issubdtype(dtype_of(leaf), jnp.floating):
                raise TypeError(
                    f"{name}{jax.tree_util.keystr(path)} has dtype {dtype_of(leaf)} and shape {jnp.shape(leaf)}: "
                    f"gradients need floating point; {_remedy_of_library(tree) or _remedy(leaf)} ({DOCS})"
                )
        if _nodes(tree, "flax.nnx", "BatchStat"):
            raise TypeError(f"{name} has leaves of type nnx.BatchStat, which are no parameters: {NNX} ({DOCS})")
        if isinstance(tree, Mapping) and {"params", "batch_stats"} <= tree.keys():
            raise TypeError(
                f"{name} has the collections {sorted(tree)}, and running averages are no parameters: pass "
                f"{name}['params'], and close over the others ({DOCS})"
            )


def check_batch(batch: Mapping[int, Any]) -> None:
    """Raises ValueError unless all leaves of the batch arguments, by position, have the same leading axis."""
    shapes = {
        f"argument {i}{jax.tree_util.keystr(path)}": jnp.shape(leaf)
        for i, tree in batch.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    if not shapes:
        raise ValueError(
            "every batch argument needs a leading axis of at least one example, got no batch argument; where there are "
            "importance_weights, they come between params and batch"
        )
    hint = f"{KEYED}; " if _has_one_key(batch) else ""
    hint += f"close over what all examples share ({DOCS})"
    if any(shape[:1] in ((), (0,)) for shape in shapes.values()):
        raise ValueError(f"every batch argument needs a leading axis of at least one example, got {shapes}; {hint}")
    if len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"batch arguments differ in their leading axis: {shapes}; {hint}")


def check_weights(importance_weights: Any, batch: Sequence[Any]) -> None:
    """Raises TypeError or ValueError unless there is one importance weight for each example of the batch arguments.

    Those that have no one leading axis are left to `check_batch`.
    """
    if isinstance(importance_weights, list | tuple):
        raise TypeError("importance_weights, the second argument, must be one array f[B], got a list: use jnp.asarray")
    shape = None if importance_weights is None else jnp.shape(importance_weights)
    sizes = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if len(sizes) != 1 or sizes == {()}:
        return
    (size,) = sizes.pop()
    if shape != (size,):
        raise ValueError(
            f"importance_weights, the second argument, must have shape ({size},), one for each example of the batch, "
            f"got {shape}: pass jnp.ones({size}) for the plain mean"
        )


def check_key(name: str, key: jax.Array, purpose: str = "") -> None:
    """Raises ValueError unless key is one random key, typed or raw."""
    if jnp.ndim(key) != (0 if _is_typed_key(key) else 1):
        raise ValueError(f"{name} must be one random key{purpose}, such as jax.random.key(0), got {jnp.shape(key)}")


def dtype_of(leaf):
    """Returns the data type of an array or number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def add_note(error: Exception, shapes: str) -> None:
    """Adds what may be wrong to an error that loss_fn raised for one example of these shapes."""
    if type(error).__name__ == "TraceContextError":  # of flax
        error.add_note(f"loss_fn changes a module that it closes over, such as its random keys: {NNX} ({DOCS})")
    elif not any("issgd_jax.per_example" in note for note in getattr(error, "__notes__", [])):
        error.add_note(
            f"loss_fn was called with ONE example, {shapes}: if it takes a batch, wrap it, "
            "issgd_jax.per_example(loss_fn)"
        )


def _remedy_of_library(tree: Any) -> str | None:
    """Returns what to pass instead of a pytree with a library's own class in it, None where there is none."""
    return next((remedy for library, name, remedy in LIBRARIES if _nodes(tree, library, name)), None)


def _remedy(leaf: Any) -> str:
    """Returns what to do about a leaf of params that is not floating-point."""
    if _is_typed_key(leaf):
        return f"take it out of params, and {KEYED}"
    if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
        return "make its real and its imaginary part two leaves"
    return "take it out of params, and close over it, or pass one for each example as a batch argument"


def _nodes(tree: Any, library: str, name: str) -> list:
    """Returns the outermost nodes of a pytree that are of a library's class; none where it is not imported."""
    cls = getattr(sys.modules.get(library), name, None)
    if cls is None:
        return []
    is_node: Callable[[Any], bool] = lambda x: isinstance(x, cls)  # noqa: E731
    return [x for x in jax.tree.leaves(tree, is_leaf=is_node) if is_node(x)]


def _type_of(leaf: Any) -> str:
    name = type(leaf).__name__
    return f"{name} and dtype {leaf.dtype}" if hasattr(leaf, "dtype") else name


def _is_array(leaf: Any) -> bool:
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def _is_typed_key(leaf: Any) -> bool:
    return jnp.issubdtype(dtype_of(leaf), jax.dtypes.prng_key)


def _has_one_key(batch: Mapping[int, Any]) -> bool:
    """Returns whether one random key, typed or raw, is among the batch arguments."""
    return any(
        (jnp.ndim(leaf) == 0 and _is_typed_key(leaf)) or (jnp.shape(leaf) == (2,) and dtype_of(leaf) == jnp.uint32)
        for leaf in jax.tree.leaves(batch)
    )
