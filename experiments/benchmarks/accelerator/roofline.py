"""Floors: the least time that a program can take, from what it computes and moves and from rates measured beside it."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.interpreters import partial_eval

from experiments.benchmarks.accelerator.sizes import Size
from experiments.benchmarks.measuring import paired_seconds

# Programs that are called back to back where one takes about as long as its dispatch.
DISPATCHES = 100
# Calls of which the fastest gives a rate, so many that one of them is not disturbed.
RATE_CALLS = 200


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device does at best.

    Attributes:
      matrix: {type: operations a second of a matrix product}, a multiplication and an addition being two.
      bandwidth: bytes a second that are read or written.
      dispatch: seconds of a program that adds one to a number.
    """

    matrix: Mapping[str, float]
    bandwidth: float
    dispatch: float


def measure_rates(size: Size) -> Rates:
    """Returns the rates of the default device, each that of the fastest call; compiled at the first call."""
    functions = {}
    for dtype in ("float32", "bfloat16"):
        matrix = jnp.ones((size.matrix, size.matrix), dtype)
        functions[dtype] = _waiting(_product, matrix, matrix)
    vector, number = jnp.ones(size.vector), jnp.int32(0)

    def pass_over():
        nonlocal vector
        vector = jax.block_until_ready(_increased(vector))

    def dispatch():
        jax.block_until_ready([_next(number) for _ in range(DISPATCHES)])

    functions |= {"vector": pass_over, "dispatch": dispatch}
    seconds = paired_seconds(functions, RATE_CALLS, size.seconds / 5)
    least = {name: min(times) for name, times in seconds.items()}
    return Rates(
        {dtype: 2 * size.matrix**3 / least[dtype] for dtype in ("float32", "bfloat16")},
        2 * vector.nbytes / least["vector"],
        least["dispatch"] / DISPATCHES,
    )


_product = jax.jit(jnp.matmul)
_next = jax.jit(lambda x: x + 1)
# In place: on CPUs most of the time of a new array is that of its first use.
_increased = jax.jit(lambda x: x + 1, donate_argnums=0)


def _waiting(function, *arguments):
    return lambda: jax.block_until_ready(function(*arguments))


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, with what it computes and moves.

    Attributes:
      run: calls it and waits.
      operations: of its matrix products and convolutions.
      num_bytes: of its arguments and results, each moved once.
      dtype: type in which it multiplies.
      details: seconds to compile it, bytes of temporaries, and XLA's own counts, which take a loop for one pass.
    """

    run: Callable[[], Any]
    operations: int
    num_bytes: int
    dtype: str
    details: Mapping[str, float]


def program(function: Callable, *arguments, dtype: str = "float32") -> Program:
    """Compiles a function for its arguments, arrays on the device."""
    jitted = jax.jit(function)
    operations = count_operations(jax.make_jaxpr(function)(*arguments))
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    details = {"compile_seconds": time.perf_counter() - start}
    with contextlib.suppress(NotImplementedError, jax.errors.JaxRuntimeError):  # not every device tells
        details["temporary_bytes"] = compiled.memory_analysis().temp_size_in_bytes
        cost = compiled.cost_analysis() or {}
        details |= {"xla_operations": cost.get("flops"), "xla_bytes": cost.get("bytes accessed")}
    outputs = jax.eval_shape(function, *arguments)
    num_bytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves((arguments, outputs)))
    return Program(_waiting(compiled, *arguments), operations, num_bytes, dtype, details)


def time_programs(programs: Mapping[str, Program], size: Size, rates: Rates) -> dict[str, dict]:
    """Returns a row of each program, timed in turn; to_first is its time over that of the first."""
    seconds = paired_seconds({name: one.run for name, one in programs.items()}, size.num_pairs, size.seconds)
    first = seconds[next(iter(programs))]
    return {
        name: row(statistics.median(times), rates, one.operations, one.num_bytes, one.dtype)
        | {"to_first": statistics.median(a / b for a, b in zip(times, first)), "calls": len(times), **one.details}
        for (name, one), times in zip(programs.items(), seconds.values())
    }


def row(seconds: float, rates: Rates, operations: int = 0, num_bytes: int = 0, dtype: str = "float32") -> dict:
    """Returns a row of the roofline table.

    Returns:
      ms, operations, bytes; floor_ms, the least time; bound, the rate that sets it; over_floor, ms in floors.

    Example:
      >>> rates = Rates({"float32": 1e12}, bandwidth=1e9, dispatch=1e-5)
      >>> found = row(4e-3, rates, operations=10**9, num_bytes=10**5)
      >>> found["bound"], found["floor_ms"], found["over_floor"]
      ('matrix products', 1.0, 4.0)
    """
    floors = {
        "matrix products": operations / rates.matrix[dtype],
        "bandwidth": num_bytes / rates.bandwidth,
        "dispatch": rates.dispatch,
    }
    bound = max(floors, key=floors.get)
    return {
        "ms": 1e3 * seconds,
        "operations": operations,
        "bytes": num_bytes,
        "floor_ms": 1e3 * floors[bound],
        "bound": bound,
        "over_floor": seconds / floors[bound],
    }


def count_operations(traced: ClosedJaxpr) -> int:
    """Returns the operations of all matrix products and convolutions that a call must compute.

    What no result needs does not count, a scan as often as it runs, a conditional as its cheapest branch, a while loop
    once.

    Example:
      >>> x = jnp.ones((3, 3))
      >>> ten = lambda x: jax.lax.scan(lambda y, _: (y @ x, None), x, None, length=10)[0]
      >>> count_operations(jax.make_jaxpr(ten)(x))
      540
    """
    needed, _ = partial_eval.dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    return _in_jaxpr(needed)


def _in_jaxpr(jaxpr: Jaxpr) -> int:
    return sum(map(_in_equation, jaxpr.eqns))


def _in_equation(eqn) -> int:
    name, shapes = eqn.primitive.name, [getattr(x.aval, "shape", ()) for x in eqn.invars]
    if name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[0][axis] for axis in contracted)
    if name == "conv_general_dilated":
        features = shapes[1][eqn.params["dimension_numbers"].rhs_spec[0]]
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shapes[1]) // features
    if name == "cond":
        return min(_in_jaxpr(branch.jaxpr) for branch in eqn.params["branches"])
    inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
    times = eqn.params.get("length", 1) if name == "scan" else 1
    return times * sum(_in_jaxpr(value) for value in inner if hasattr(value, "eqns"))
