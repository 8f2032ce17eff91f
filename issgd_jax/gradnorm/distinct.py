"""Outputs of a traced function that are one array are returned once, and known to be one afterwards."""

from collections.abc import Callable
from typing import Any

import jax


def distinct(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """Returns the distinct leaves of a pytree, and a function that makes the pytree of leaves in their places.

    Example:
      >>> x, y = jax.numpy.zeros(2), jax.numpy.ones(3)
      >>> leaves, restore = distinct({"a": x, "b": y, "c": x})
      >>> len(leaves), restore(["first", "second"])
      (2, {'a': 'first', 'b': 'second', 'c': 'first'})
    """
    leaves, structure = jax.tree.flatten(tree)
    ids = list(dict.fromkeys(map(id, leaves)))
    places = [ids.index(id(leaf)) for leaf in leaves]
    return [leaves[places.index(i)] for i in range(len(ids))], lambda new: structure.unflatten([new[i] for i in places])
