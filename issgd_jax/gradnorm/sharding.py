"""Arguments that are sharded over a mesh of Explicit axes, whose layouts are part of their types."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, auto_axes

from issgd_jax.gradnorm.mapping import varying_axes, varying_like
from issgd_jax.gradnorm.tracing import positions_of_params

NOTE = (
    "Explicit axes of the mesh are Auto inside loss_fn: it must neither set out_sharding= nor close over arrays "
    "that are sharded over them; where it has to, make the mesh with axis_types of jax.sharding.AxisType.Auto "
    "(see Sharded parameters in docs/gradient-norms.md)"
)


class Layouts(NamedTuple):
    """Shardings of results, as pytrees or their prefixes.

    Attributes:
      params: That of each parameter, for the gradient.
      examples: That of the batch's leading axis, for what each example has one of.
    """

    params: Any
    examples: NamedSharding


def like_arguments(layouts: Layouts) -> tuple:
    """Returns the layouts of `(losses, gradient, norms)`."""
    return layouts.examples, layouts.params, layouts.examples


def in_auto_axes(
    run: Callable, arguments: tuple, argnums: int | Sequence[int], results: Callable[[Layouts], Any]
) -> Any:
    """Returns `run(*arguments)`; where the arguments have Explicit axes, the compiler shards what lies between.

    Most losses of one example, and products of factors, would else need an `out_sharding` for each product.

    Args:
      run: `(args, ...) -> results`, args those of the loss.
      arguments: Of `run`.
      argnums: Positions of the parameters among args.
      results: The layout of each result, from those of the arguments.
    """
    args, *others = arguments
    positions = positions_of_params(argnums, len(args))
    batch = [arg for i, arg in enumerate(args) if i not in positions]
    _check_axes([args[i] for i in positions], batch)
    # Otherwise the gradient of each example would be added to those of the other shards of a shard_map.
    args = tuple(varying_like(arg, batch) if i in positions else arg for i, arg in enumerate(args))
    arguments = args, *others
    meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(arguments)]
    mesh = next((mesh for mesh in meshes if AxisType.Explicit in mesh.axis_types), None)
    if mesh is None:
        return run(*arguments)
    axes = tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types) if kind == AxisType.Explicit)
    specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)
    params = jax.tree.map(lambda spec: NamedSharding(mesh, spec), [specs[i] for i in positions])
    leading = [spec[0] for i, arg in enumerate(specs) if i not in positions for spec in jax.tree.leaves(arg) if spec]
    examples = next((axes for axes in leading if axes is not None), None)
    layouts = Layouts(
        params[0] if isinstance(argnums, numbers.Integral) else tuple(params),
        NamedSharding(mesh, PartitionSpec(examples)),
    )
    try:
        return auto_axes(run, axes=axes, out_sharding=results(layouts))(*arguments)
    except Exception as error:
        if "mesh" in str(error) or "sharding" in str(error):
            error.add_note(NOTE)
        raise


def _check_axes(params: Any, batch: Any) -> None:
    """Raises ValueError where the types within a `shard_map` do not tell over which axes the examples are spread."""
    params, batch = ([varying_axes(x) for x in jax.tree.leaves(tree)] for tree in (params, batch))
    for axis in frozenset().union(*batch):
        of_params, of_batch = ({axis in axes for axes in leaves} for leaves in (params, batch))
        if False in of_params and len(of_params) + len(of_batch) > 2:
            raise ValueError(
                f"within shard_map, the axis {axis!r} shards some leaves of params and batch and not others: all of "
                f"the batch must vary over the axes of its examples, see jax.lax.pcast(x, {axis!r}, to='varying'), and "
                "of params all or none; or pass check_vma=False to shard_map, which then adds up no gradients itself"
            )
