"""Tracing of a loss: checks its arguments, then traces and analyses the backward pass of one example."""

import dataclasses
import functools
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from issgd_jax.gradnorm.arguments import add_note, check_batch, check_key, check_params, dtype_of
from issgd_jax.gradnorm.distinct import distinct
from issgd_jax.gradnorm.mapping import map_examples, varying_axes, why_one_at_a_time
from issgd_jax.gradnorm.per_example import positional_key
from issgd_jax.gradnorm.rules import ARRAY, FACTORED
from issgd_jax.gradnorm.walk import Analysis, evaluate


@dataclasses.dataclass(frozen=True)
class TracedLoss:
    """Backward pass of a loss with the arguments of one call.

    Attributes:
      analysis: Analysis of `(consts, params, example) -> (loss, gradient, aux)`.
      consts: Constants of the traced jaxpr.
      params: Leaves of the parameters.
      batch: Leaves of the batch arguments, each with leading axis B.
      params_tree: Structure of the parameters.
      aux_tree: Structure of the auxiliary output.
    """

    analysis: Analysis
    consts: list[jax.Array]
    params: list[jax.Array]
    batch: list[jax.Array]
    params_tree: Any
    aux_tree: Any

    @property
    def batch_size(self) -> int:
        """Number of examples, B."""
        return self.batch[0].shape[0]

    @functools.cached_property
    def dtypes(self) -> list:
        """Data type of each parameter leaf."""
        return [dtype_of(leaf) for leaf in self.params]

    @functools.cached_property
    def uncovered_bytes(self) -> int:
        """Size in bytes of one example's gradients that no rule covers."""
        gradients = self.analysis.jaxpr.outvars[1 : 1 + len(self.params)]
        return sum(g.aval.size * g.aval.dtype.itemsize for g in gradients if self.analysis.of(g) is None)

    @functools.cached_property
    def why_one_at_a_time(self) -> str | None:
        """Why JAX cannot batch the backward pass, None if it can."""
        return why_one_at_a_time(functools.partial(self._one_example, self.params), self.batch)

    def factored_gradients(self, params: list[jax.Array], batch: list[jax.Array]) -> tuple[jax.Array, Any, list]:
        """Returns losses f32[B], aux, and each leaf's batch of gradients, factored where a rule covers it.

        An array that is a factor of several leaves is the same object in all of them.
        """
        traced: list = []  # set while `one_example` is traced: how its outputs are put together

        def one_example(example):
            leaves, restore = distinct(self._one_example(params, example))
            traced[:] = [restore]
            return leaves

        leaves = map_examples(one_example, batch)
        (restore,) = traced
        loss, *outputs = restore(leaves)
        return loss, jax.tree.unflatten(self.aux_tree, outputs[len(params) :]), outputs[: len(params)]

    def _one_example(self, params: list[jax.Array], example: list[jax.Array]) -> list:
        num_aux = len(self.analysis.jaxpr.outvars) - 1 - len(params)
        wants = (ARRAY, *[FACTORED] * len(params), *[ARRAY] * num_aux)
        return evaluate(self.analysis, wants, [*self.consts, *params, *example])


def trace_loss(loss_fn: Callable, args: tuple, argnums: int | Sequence[int], has_aux: bool) -> TracedLoss:
    """Traces `jax.value_and_grad(loss_fn)` for one example of the batch.

    Args:
      loss_fn: The loss of one example, see `per_example_grad_norms`.
      args: Parameters and batch arguments, in the order of loss_fn's arguments.
      argnums: Positions of the parameters.
      has_aux: Whether loss_fn returns `(loss, aux)`.

    Raises:
      ValueError, TypeError: As listed in `per_example_grad_norms`.
    """
    positions = positions_of_params(argnums, len(args))
    argnums = positions[0] if isinstance(argnums, numbers.Integral) else positions
    params = [args[i] for i in positions]
    batch = {i: arg for i, arg in enumerate(args) if i not in positions}
    check_params(params, positions)
    check_batch(batch)
    example = jax.tree.map(_without_leading_axis, batch)

    structures = []  # not `return_shape`, which fails for shapes that vary over the axes of a shard_map

    def value_and_grad(params, example):
        arguments = dict(zip(positions, params)) | example
        (loss, aux), gradient = jax.value_and_grad(_with_aux(loss_fn, has_aux, positions), argnums, has_aux=True)(
            *(arguments[i] for i in range(len(args)))
        )
        structures[:] = jax.tree.structure(gradient), jax.tree.structure(aux)
        return loss, gradient, aux

    closed = jax.make_jaxpr(value_and_grad)(params, example)
    params_tree, aux_tree = structures
    jaxpr = closed.jaxpr.replace(constvars=[], invars=[*closed.jaxpr.constvars, *closed.jaxpr.invars])
    return TracedLoss(
        analysis=Analysis(jaxpr),
        consts=list(closed.consts),
        params=jax.tree.leaves(params),
        batch=[x if hasattr(x, "dtype") else jnp.asarray(x) for x in jax.tree.leaves(batch)],
        params_tree=params_tree,
        aux_tree=aux_tree,
    )


def _without_leading_axis(x) -> jax.ShapeDtypeStruct:
    shape, dtype = jnp.shape(x)[1:], dtype_of(x)
    if isinstance(x, jax.ShapeDtypeStruct) or not varying_axes(x):
        return jax.ShapeDtypeStruct(shape, dtype)
    kind = jax.typeof(x)
    layout = NamedSharding(kind.sharding.mesh, PartitionSpec())
    return jax.ShapeDtypeStruct(shape, dtype, sharding=layout, manual_axis_type=kind.manual_axis_type)


def with_keys(
    loss_fn: Callable, args: tuple, argnums: int | Sequence[int], key: jax.Array | None, keyed: bool
) -> tuple:
    """Returns (loss_fn, args, argnums); for a keyed loss, args end with a key for each example.

    Args:
      loss_fn, args, argnums: As in `trace_loss`; a keyed loss is `(params, *example, key=key)`.
      key: One random key; None if the loss is not keyed.
      keyed: Whether the loss is.

    Raises:
      TypeError: A key is missing, or not expected.
      ValueError: key is not one key.
    """
    if keyed != (key is not None):
        wrong = "key= is missing: pass one random key, as" if keyed else "key= is given: pass keyed=True if"
        raise TypeError(f"{wrong} loss_fn takes a key")
    if not keyed:
        return loss_fn, args, argnums
    check_key("key", key, ", which is split into one for each example")
    positions = positions_of_params(argnums, len(args))
    batch = [arg for i, arg in enumerate(args) if i not in positions]
    # Other shapes are refused by trace_loss.
    size = next((jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)), 1)
    argnums = positions[0] if isinstance(argnums, numbers.Integral) else positions
    return positional_key(loss_fn), (*args, jax.random.split(key, size)), argnums


def positions_of_params(argnums: int | Sequence[int], num_args: int) -> tuple[int, ...]:
    """Returns the positions of the parameters, >= 0."""
    positions = (argnums,) if isinstance(argnums, numbers.Integral) else tuple(argnums)
    in_range = all(-num_args <= i < num_args for i in positions)
    if not positions or not in_range or len({i % num_args for i in positions}) < len(positions):
        raise ValueError(f"argnums must name some of the {num_args} arguments of loss_fn, each once, got {argnums}")
    return tuple(int(i) % num_args for i in positions)


def _with_aux(loss_fn: Callable, has_aux: bool, positions: tuple[int, ...]) -> Callable:
    """Returns a loss that always has an aux, None if loss_fn has none, and checks that it is a scalar."""

    def checked(*args):
        try:
            result = loss_fn(*args)
        except Exception as error:
            add_note(error, _shapes(args, positions))
            raise
        if has_aux and not (isinstance(result, tuple) and len(result) == 2):
            raise ValueError(f"loss_fn must return (loss, aux) with has_aux, got {type(result).__name__}")
        loss, aux = result if has_aux else (result, None)
        leaf = jax.tree.structure(loss) == jax.tree.structure(0)
        if not leaf or jnp.shape(loss) != () or not jnp.issubdtype(dtype_of(loss), jnp.floating):
            got = f"shape {jnp.shape(loss)} and dtype {dtype_of(loss)}" if leaf else f"a {type(loss).__name__}"
            hint = "; set has_aux=True if it is (loss, aux)" if isinstance(loss, tuple) and not has_aux else ""
            hint = "; if it takes a batch, wrap it: issgd_jax.per_example(loss_fn)" if leaf and jnp.ndim(loss) else hint
            raise ValueError(f"loss_fn must return one floating-point scalar for one example, got {got}{hint}")
        return loss, aux

    return checked


def _shapes(args: tuple, positions: tuple[int, ...]) -> str:
    """Returns the shapes of the arguments that are not parameters."""
    return ", ".join(str(jax.tree.map(jnp.shape, arg)) for i, arg in enumerate(args) if i not in positions)
