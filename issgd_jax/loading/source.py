"""Sources: the rows of data on the host, whatever holds them. Of the libraries that it reads it imports none."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Examples on the host that are read by their indices; made by `as_source`.

    Attributes:
      num_examples: N.
      gather: `i64[m] -> batch`, a pytree of NumPy arrays [m, ...] that hold the rows in the order of the indices,
        which may repeat. Its memory is the caller's.
      arrays: pytree of the arrays [N, ...] that hold all rows; None where there are none.
    """

    num_examples: int
    gather: Callable[[np.ndarray], Any]
    arrays: Any = None

    def all_rows(self) -> Any:
        """Returns all N rows: JAX arrays and NumPy arrays themselves, everything else as NumPy arrays."""
        if self.arrays is None:
            return self.gather(np.arange(self.num_examples))
        return jax.tree.map(lambda x: x if isinstance(x, np.ndarray | jax.Array) else np.asarray(x[:]), self.arrays)


def as_source(data: Any, collate: Callable[[list], Any] | None = None) -> Source:
    """Returns the rows of data as a source.

    | data | batch |
    | --- | --- |
    | array or memmap of NumPy, JAX, PyTorch, h5py or Zarr | array |
    | tuple, dict or other pytree of such arrays | the same pytree |
    | `DataFrame`, `Series` | dict of columns, array |
    | `datasets.Dataset` of Hugging Face | dict of columns, in the format that is set, else in NumPy's |
    | `TensorDataset` of PyTorch | tuple |
    | list of examples | examples stacked leaf by leaf, or what `collate` returns |
    | whatever else has `__len__` and `__getitem__` or `__getitems__`: sources of Grain and TFDS, map-style data sets of
      PyTorch | the same |

    Args:
      data: N >= 1 examples, as above; or a source, which is returned as it is.
      collate: `list of examples -> batch`, for instance to pad them; None: leaves of equal shape are stacked.

    Guarantees:
      - dtypes are those of the data; of a `datasets.Dataset` those that its format gives.
      - Arrays, columns and what has `__getitems__` are read with one call a batch, not one an example; arrays that are
        not in memory in increasing order and each row once.

    Raises:
      TypeError: data cannot be read by index, or has values that are not numbers.
      ValueError: there are no examples, or arrays differ in their number.

    Example:
      >>> source = as_source({"x": np.arange(6).reshape(3, 2), "y": np.array([0, 1, 0], np.uint8)})
      >>> batch = source.gather(np.array([2, 0]))
      >>> batch["x"].tolist(), batch["y"].tolist(), batch["y"].dtype.name
      ([[4, 5], [0, 1]], [0, 0], 'uint8')
    """
    if isinstance(data, Source):
        return data
    arrays = None if isinstance(data, list | Iterator) else jax.tree.map(_as_arrays, data)
    if _is_array(arrays) or (arrays is not None and not jax.tree_util.all_leaves([arrays])):
        return _source_of_arrays(arrays, collate)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise TypeError(
            f"source must have __len__ and __getitem__, got {type(data).__name__}: draws need any example at any time; "
            "use the map-style or random access form of the data set, or load it into arrays"
        )
    if isinstance(data, dict) and hasattr(data, "column_names"):
        raise TypeError(f"source is a {type(data).__name__} of splits {', '.join(data)}: choose one of them")
    num_examples = _check_not_empty(len(data))
    is_columns = collate is None and hasattr(data, "column_names") and hasattr(data, "with_format")
    if is_columns and data.format["type"] is None:
        data = data.with_format("numpy")

    def gather(indices):
        if is_columns:
            batch = jax.tree.map(np.asarray, _as_arrays(data[indices.tolist()]))
        else:
            batch = _collated(_examples(data, indices), collate)
        return _check_batch(batch, len(indices))

    return Source(num_examples, gather)


def arguments(batch: Any) -> tuple:
    """Returns the arguments of a loss after its parameters: a tuple is several of them, anything else is one.

    Example:
      >>> arguments((1, 2)), arguments({"x": 1})
      ((1, 2), ({'x': 1},))
    """
    return tuple(batch) if isinstance(batch, tuple) else (batch,)


def _source_of_arrays(arrays: Any, collate: Callable | None) -> Source:
    """Returns the rows of a pytree of arrays [N, ...]."""
    leaves = jax.tree_util.tree_leaves_with_path(arrays)
    for path, leaf in leaves:
        if not _is_array(leaf):
            raise TypeError(
                f"{_name(path)} is of type {type(leaf).__name__}, but a tuple or dict must hold arrays: use np.asarray "
                "for each, or pass a list of examples"
            )
        if not leaf.shape:
            raise ValueError(f"{_name(path)} has shape (), but its first axis must be that of the examples")
        _check_numeric(path, leaf)
    sizes = {_name(path): leaf.shape[0] for path, leaf in leaves}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            "all arrays must have as many rows, got " + ", ".join(f"{size:,} of {name}" for name, size in sizes.items())
        )
    num_examples = _check_not_empty(max(sizes.values(), default=0))

    def gather(indices):
        batch = jax.tree.map(lambda x: _rows(x, indices), arrays)
        if collate is None:
            return batch
        examples = [jax.tree.map(lambda x: x[i], batch) for i in range(len(indices))]  # noqa: B023
        return _check_batch(_collated(examples, collate), len(indices))

    return Source(num_examples, gather, arrays if collate is None else None)


def _as_arrays(data: Any) -> Any:
    """Returns tables as dicts of columns, and columns and tensors as NumPy arrays; anything else as it is."""
    if type(data).__name__ == "TensorDataset":  # not a subclass, which may transform its examples
        return tuple(map(_as_arrays, data.tensors))
    if hasattr(data, "to_numpy"):
        if hasattr(data, "columns"):
            return {column: data[column].to_numpy() for column in data.columns}
        return data.to_numpy()
    if hasattr(data, "numpy"):
        return data.detach().numpy() if hasattr(data, "detach") else data.numpy()
    return data


def _is_array(data: Any) -> bool:
    return hasattr(data, "shape") and hasattr(data, "dtype") and hasattr(data, "__getitem__")


def _rows(array: Any, indices: np.ndarray) -> np.ndarray:
    """Returns rows of one array as a new NumPy array."""
    if isinstance(array, np.ndarray | jax.Array):
        return np.asarray(array)[indices]
    # Files want increasing indices, and read a slice at once.
    unique, places = np.unique(indices, return_inverse=True)
    steps = np.unique(np.diff(unique))
    is_slice = len(steps) == 1 or len(unique) == 1
    chosen = slice(int(unique[0]), int(unique[-1]) + 1, int(steps[0]) if len(steps) else 1) if is_slice else unique
    return np.asarray(array[chosen])[places]


def _examples(data: Any, indices: np.ndarray) -> list:
    """Returns examples of a data set that has no arrays."""
    if hasattr(data, "__getitems__"):
        return list(data.__getitems__(indices.tolist()))
    return [data[index] for index in indices.tolist()]


def _collated(examples: Sequence, collate: Callable | None) -> Any:
    """Returns examples as one batch in memory of its own."""
    if collate is None:
        return _stack(examples)
    # Copied, as collate may use the same memory for the next batch.
    return jax.tree.map(lambda x: np.array(_as_arrays(x)), collate(examples))


def _stack(examples: Sequence) -> Any:
    """Returns pytrees of equal structure and shapes, stacked leaf by leaf."""
    paths, structure = jax.tree_util.tree_flatten_with_path(examples[0])
    if not paths:
        raise ValueError(f"an example is {examples[0]!r}: remove those that are filtered out from the source")
    for example in examples:
        if jax.tree.structure(example) != structure:
            raise ValueError(
                f"examples differ in structure, {structure} and {jax.tree.structure(example)}: pass collate="
            )
    columns = zip(*map(jax.tree.leaves, examples))
    return structure.unflatten(_stack_leaves(path, column) for (path, _), column in zip(paths, columns))


def _stack_leaves(path, leaves: Sequence) -> np.ndarray:
    arrays = [np.asarray(_as_arrays(leaf)) for leaf in leaves]
    _check_shapes(path, arrays)
    return np.stack(arrays)


def _check_shapes(path, arrays: Sequence) -> None:
    shapes = sorted({np.shape(array) for array in arrays})
    if len(shapes) > 1:
        raise ValueError(
            f"{_name(path)} has examples of different shapes, {', '.join(map(str, shapes[:4]))}: pass collate=, a "
            "function from a list of examples to a batch, for instance one that pads them"
        )


def _check_batch(batch: Any, size: int) -> Any:
    """Returns a batch of `size` rows; raises where it is none."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(batch):
        _check_numeric(path, leaf)
        if leaf.shape[:1] != (size,):
            raise ValueError(
                f"{_name(path)} has shape {leaf.shape} in a batch of {size} examples: the first axis of what collate "
                f"or __getitems__ returns must have length {size}"
            )
    return batch


def _check_numeric(path, array: Any) -> None:
    dtype = array.dtype
    if isinstance(array, np.ndarray) and dtype.kind == "O":  # rows of arrays of their own, unless they are strings
        _check_shapes(path, [x for x in array.flat if isinstance(x, np.ndarray | list)])
    if not (jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)):
        raise TypeError(
            f"{_name(path)} has dtype {dtype}, but a batch must be of numbers: encode it, for instance as tokens or as "
            "codes of categories, or leave it out"
        )


def _check_not_empty(num_examples: int) -> int:
    if num_examples < 1:
        raise ValueError("source has no examples: need at least 1")
    return num_examples


def _name(path) -> str:
    """Returns the name of a leaf in messages."""
    return f"source{jax.tree_util.keystr(path)}"
