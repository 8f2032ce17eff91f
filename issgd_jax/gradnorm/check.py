"""Comparison of norms and gradient with a loop of `jax.grad`, one example at a time."""

import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.gradnorm.arguments import check_arrays
from issgd_jax.gradnorm.norms import per_example_grad_norms, value_grad_and_norms
from issgd_jax.gradnorm.tracing import positions_of_params, trace_loss, with_keys

# Errors are relative to a leaf's own length, or to this share of the whole gradient's, where that is more.
LEAST_SHARE = 0.01


class Comparison(NamedTuple):
    """Comparison of one number, or of one leaf.

    Attributes:
      quantity: "loss", "norm" or "gradient".
      name: Path of the leaf; "" for a loss, and for the norm over all leaves.
      example: Index of the example that differs most; None for the gradient, which is a mean over examples.
      got: Loss or norm of issgd_jax; length of its gradient.
      expected: The same by `jax.grad`.
      error: Difference, for a gradient the length of it, relative to `expected`, or to a hundredth of the norm over all
        leaves, where that is more.
    """

    quantity: str
    name: str
    example: int | None
    got: float
    expected: float
    error: float


class Report(NamedTuple):
    """Result of `check`; `str` gives aligned text, the largest errors first.

    Attributes:
      rows: One for the losses, one for the norms over all leaves, and two for each leaf.
      rtol: Largest error allowed.
    """

    rows: tuple[Comparison, ...]
    rtol: float

    @property
    def differing(self) -> tuple[Comparison, ...]:
        """Rows whose error exceeds rtol; one that is not finite does."""
        return tuple(row for row in self.rows if not row.error <= self.rtol)

    def __str__(self) -> str:
        head = ("", "leaf", "example", "got", "expected", "relative error")
        worst_first = sorted(self.rows, key=lambda row: row.error if row.error == row.error else np.inf, reverse=True)
        table = [head, *map(_cells, worst_first)]
        widths = [max(map(len, column)) for column in zip(*table)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths)).rstrip() for line in table)


def check(
    loss_fn: Callable[..., Any],
    *args,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    keyed: bool = False,
    key: jax.Array | None = None,
    num_examples: int = 4,
    rtol: float | None = None,
) -> Report:
    """Checks losses, norms and gradient of `value_grad_and_norms` against `jax.grad`, one example at a time.

    For a test of your own: `issgd_jax.check(loss_fn, params, *batch)`.

    Args:
      loss_fn, argnums, has_aux, keyed: See `per_example_grad_norms`.
      *args: `params, *batch`.
      key: One random key, for a keyed loss.
      num_examples: How many of the batch's examples are compared, evenly spaced; each costs one backward pass.
      rtol: Largest relative error allowed, see `Comparison`; by default the square root of the rounding error of the
        least exact floating-point type among params and batch (float32: 3e-4). A network that computes in another
        type than its parameters' needs one of its own.

    Returns:
      A report of all comparisons, to be printed.

    Raises:
      AssertionError: An error exceeds rtol, or a reference is not finite; the message holds each leaf that differs.
      ValueError: num_examples is not a whole number >= 1, rtol not >= 0, params without leaves, or a value is traced.
        Otherwise as `per_example_grad_norms`.
      TypeError: As `per_example_grad_norms`.

    The reference is `jax.grad` of loss_fn itself: a loss that is not what you mean, such as that of a batch whose
    examples depend on each other, made one of an example by `per_example`, is not noticed.

    Example:
      >>> def loss_fn(params, x):
      ...     return jnp.sum(jnp.tanh(x @ params["w"]))
      >>> report = check(loss_fn, {"w": jnp.ones((3, 2))}, jnp.ones((8, 3)))
      >>> len(report.rows), report.differing
      (4, ())
    """
    if not isinstance(num_examples, numbers.Integral) or num_examples < 1:
        raise ValueError(f"num_examples must be >= 1, and a whole number, got {num_examples!r}")
    if rtol is not None and not rtol >= 0:
        raise ValueError(f"rtol must be >= 0, got {rtol}: None chooses it by the types of params and batch")
    check_arrays(args)
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((args, key))):
        raise ValueError("params and batch must be arrays, got traced values: call check outside jit and vmap")
    positions = positions_of_params(argnums, len(args))
    argnums = argnums if isinstance(argnums, numbers.Integral) else positions
    loss = trace_loss(*with_keys(loss_fn, args, argnums, key, keyed), has_aux)
    if not loss.params:
        raise ValueError("params has no leaves: there is no gradient to compare")
    indices = np.linspace(0, loss.batch_size - 1, min(num_examples, loss.batch_size)).astype(int)
    chosen = [x if i in positions else _rows(x, indices) for i, x in enumerate(args)]
    importance_weights = np.linspace(0.5, 1.5, len(indices))
    options = {"argnums": argnums, "has_aux": has_aux, "keyed": keyed}
    got = _fast(loss_fn, chosen, importance_weights, options, {"key": key} if keyed else {})
    keys = [{"key": k} for k in jax.random.split(key, len(indices))] if keyed else [{}] * len(indices)
    expected = _slow(loss_fn, chosen, positions, argnums, has_aux, keys)
    rtol = _default_rtol(args) if rtol is None else rtol
    with np.errstate(all="ignore"):  # what is not finite has an error that is not
        report = Report(_compare(got, expected, importance_weights, indices), rtol)
    if report.differing:
        raise AssertionError(_message(report))
    return report


class _Results(NamedTuple):
    """Losses f64[B], gradient of each leaf (by the loop: of each example, [B, ...]), norms f64[B] of each leaf and of
    all together, and names of the leaves."""

    losses: np.ndarray
    gradients: list[np.ndarray]
    leaf_norms: list[np.ndarray]
    norms: np.ndarray
    names: list[str]


def _fast(loss_fn, chosen, importance_weights, options, key) -> _Results:
    first, *rest = chosen
    step = value_grad_and_norms(loss_fn, per_leaf=True, **options)
    losses, gradient, leaf_norms = step(first, jnp.asarray(importance_weights), *rest, **key)
    norms = per_example_grad_norms(loss_fn, **options)(*chosen, **key)
    if options["has_aux"]:
        losses, norms = losses[0], norms[0]
    names = [jax.tree_util.keystr(path) or "params" for path, _ in jax.tree_util.tree_leaves_with_path(gradient)]
    return _Results(*_on_host((losses, jax.tree.leaves(gradient), jax.tree.leaves(leaf_norms), norms)), names)


def _slow(loss_fn, chosen, positions, argnums, has_aux, keys) -> _Results:
    step = jax.jit(jax.value_and_grad(loss_fn, argnums, has_aux=has_aux))
    losses, gradients = [], []
    for i, key in enumerate(keys):
        example = [x if j in positions else jax.tree.map(lambda x, i=i: x[i], x) for j, x in enumerate(chosen)]
        loss, gradient = step(*example, **key)
        losses.append(loss[0] if has_aux else loss)
        gradients.append(_on_host(jax.tree.leaves(gradient)))
    stacked = [np.stack(leaf) for leaf in zip(*gradients)]
    leaf_norms = [_lengths(leaf.reshape(len(keys), -1)) for leaf in stacked]
    return _Results(np.stack(_on_host(losses)), stacked, leaf_norms, _lengths(np.stack(leaf_norms, axis=1)), [])


def _compare(got: _Results, expected: _Results, importance_weights, indices) -> tuple[Comparison, ...]:
    def of_examples(quantity, name, got, expected, floor):
        errors = _relative(np.abs(got - expected), np.maximum(np.abs(expected), floor))
        worst = int(np.argmax(errors))
        return Comparison(
            quantity, name, int(indices[worst]), float(got[worst]), float(expected[worst]), float(errors[worst])
        )

    def of_gradient(name, got, expected, floor):
        length, difference = np.linalg.norm(expected), np.linalg.norm(got - expected)
        error = _relative(difference, max(length, floor))
        return Comparison("gradient", name, None, float(np.linalg.norm(got)), float(length), float(error))

    weights = importance_weights / len(importance_weights)
    means = [np.tensordot(weights, gradient, 1) for gradient in expected.gradients]
    mean_length = np.linalg.norm([np.linalg.norm(mean) for mean in means])
    rows = [of_examples("loss", "", got.losses, expected.losses, LEAST_SHARE)]
    rows += [of_examples("norm", "", got.norms, expected.norms, 0)]
    for leaf in zip(got.names, got.leaf_norms, expected.leaf_norms):
        rows.append(of_examples("norm", *leaf, LEAST_SHARE * expected.norms))
    for leaf in zip(got.names, got.gradients, means):
        rows.append(of_gradient(*leaf, LEAST_SHARE * mean_length))
    return tuple(rows)


def _relative(difference, size):
    """Returns difference / size, 0 for no difference."""
    return np.where(difference == 0, 0, difference / np.maximum(size, np.finfo(np.float64).tiny))


def _lengths(rows: np.ndarray) -> np.ndarray:
    """Returns the lengths f64[B] of rows [B, n], also where squares overflow."""
    largest = np.max(np.abs(rows), axis=1, initial=0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1)
    return np.linalg.norm(rows / scale[:, None], axis=1) * scale


def _rows(batch: Any, indices: np.ndarray) -> Any:
    return jax.tree.map(lambda x: (x if hasattr(x, "dtype") else jnp.asarray(x))[indices], batch)


def _on_host(tree: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(x).astype(np.float64), tree)


def _default_rtol(args: tuple) -> float:
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(args)]
    return float(max(jnp.finfo(dtype).eps for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating))) ** 0.5


def _message(report: Report) -> str:
    differing = report.differing
    text = f"{len(differing)} of {len(report.rows)} comparisons with jax.grad differ by more than {report.rtol:.2g}"
    if not all(np.isfinite(row.expected) for row in differing):
        text += "; what jax.grad gives is not finite either: choose params and examples whose gradients are"
    return f"{text}\n{Report(differing, report.rtol)}"


def _cells(row: Comparison) -> tuple[str, ...]:
    example = "" if row.example is None else str(row.example)
    return row.quantity, row.name, example, f"{row.got:.8g}", f"{row.expected:.8g}", f"{row.error:.2g}"
