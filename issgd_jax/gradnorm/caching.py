"""One compiled transformation for each loss and its options, however often it is asked for."""

import functools
import inspect
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from issgd_jax.gradnorm.arguments import check_arrays

# Transformations that are remembered, those used last.
REMEMBERED = 128
# A loss that is compiled so often, from the same line and for the same shapes, is made anew in a loop.
REMADE = 8


def cached(transform: Callable[..., Callable]) -> Callable[..., Callable]:
    """Compiles what `transform(function, *options)` returns, once for each function and options that are equal.

    As with `jax.jit`, two functions are the same if they are equal, and what a function closes over is read when it is
    traced. A function that is made anew at every call, such as a lambda in a loop, is compiled at every call: a warning
    says so once. An argument that holds no arrays is named before JAX's own error, see `check_arrays`.

    Example:
      >>> @cached
      ... def scaled(function, factor):
      ...     return lambda x: factor * function(x)
      >>> def square(x):
      ...     return x**2
      >>> scaled(square, 2) is scaled(square, 2), float(scaled(square, 2)(3.0))
      (True, 18.0)
    """

    def compiled(function, *options):
        transformed, line = transform(function, *options), _line(function)

        def traced(*args, **kwargs):
            shapes = jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), (args, kwargs))
            _warn_if_remade((transform, line, options, str(shapes)), result)
            return transformed(*args, **kwargs)

        result = jax.jit(traced)

        @functools.wraps(transformed)
        def checked(*args, **kwargs):
            try:
                return result(*args, **kwargs)
            except TypeError:
                check_arrays(args)
                raise

        checked.lower = result.lower
        return checked

    return remember(compiled)


def remember(function: Callable) -> Callable:
    """Lets a function return what it returned for equal arguments; those that cannot be hashed are not remembered."""
    remembered = functools.lru_cache(REMEMBERED)(function)

    @functools.wraps(function)
    def once(*args):
        try:
            hash(args)
        except TypeError:  # such as a dataclass that is not frozen
            return function(*args)
        return remembered(*args)

    return once


def _line(function: Callable) -> Any:
    """Returns where a function is defined: its code, which functions that the same line makes share."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    return getattr(function, "__code__", type(function))


# Of each line, options and shapes: the function traced last, and how many before it were compiled.
_traced_last: dict[Any, tuple[weakref.ref, int]] = {}


def _warn_if_remade(key: Any, compiled: Any) -> None:
    """Counts the functions that the same line made and that ran by themselves, not inside a `jit` of the caller."""
    last, times = _traced_last.get(key, (lambda: None, 0))
    previous = last()
    times += previous not in (None, compiled) and previous._cache_size() > 0
    _traced_last[key] = weakref.ref(compiled), times
    if times == REMADE:
        line = key[1]
        where = f"{line.co_filename}:{line.co_firstlineno}" if inspect.iscode(line) else line.__name__
        warnings.warn(
            f"the function of {where} was made anew and compiled {times} times for the same shapes: define it once, "
            "outside the loop, and pass what changes as an argument",
            stacklevel=2,
        )
