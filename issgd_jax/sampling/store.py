"""Score database: the last score of every example and its age, in flat arrays on one device."""

import dataclasses
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax import kernels
from issgd_jax.devices import memory_bytes
from issgd_jax.errors import InputError
from issgd_jax.files import replace_atomically
from issgd_jax.sampling.checks import (
    MAX_EXAMPLES,
    MAX_STEP,
    NO_EXAMPLE,
    as_indices,
    as_numbers,
    as_step,
    as_whole,
    check_whole,
)

NEVER = -1  # scored_at of an example without a score
BYTES_AN_EXAMPLE = 8


class Rejected(NamedTuple):
    """Scores that `ScoreStore.write` rejected because they were NaN, infinite or negative.

    Attributes:
      count: i32[], number of scores.
      index: i32[], the largest index of an example with a rejected score, of the last write that had any; -1: none.
    """

    count: jax.Array
    index: jax.Array

    @classmethod
    def none(cls) -> "Rejected":
        """Returns the value before any write."""
        return cls(jnp.int32(0), jnp.int32(NO_EXAMPLE))

    def merge(self, later: "Rejected") -> "Rejected":
        """Returns the sum of the counts, and the index of the later write if it has one."""
        return Rejected(self.count + later.count, jnp.where(later.count > 0, later.index, self.index))


class Histogram(NamedTuple):
    """Distribution of the known scores, on the host.

    Attributes:
      counts: i64[bins], number of positive scores in each bin.
      edges: f64[bins + 1], edges of the bins, equally spaced in the logarithm.
      zeros: number of scores that are exactly 0.
    """

    counts: np.ndarray
    edges: np.ndarray
    zeros: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoreStore:
    """Score database: the last known gradient norm of every example, 8 bytes an example. A pytree.

    Attributes:
      score: f32[N], the paper's probability weights; finite and >= 0, and 0 where never scored.
      scored_at: i32[N], learner step of the parameters that gave each score, below 2^30; -1 where never scored.

    Example:
      >>> store = ScoreStore.init(num_examples=4)
      >>> store, rejected = store.write(jnp.array([0, 2, 3]), jnp.array([5.0, 1.0, jnp.nan]), step=jnp.int32(7))
      >>> store.score.tolist(), store.scored_at.tolist(), int(rejected.count)
      ([5.0, 0.0, 1.0, 0.0], [7, -1, 7, -1], 1)
    """

    score: jax.Array
    scored_at: jax.Array

    @classmethod
    def init(cls, num_examples: int) -> "ScoreStore":
        """Returns a store without scores.

        Raises:
          TypeError: num_examples is no whole number.
          ValueError: num_examples < 1 or > 2^30.
          InputError: the device has too little memory; names the bytes needed.
        """
        num_examples = as_whole("num_examples", num_examples)
        if num_examples < 1:
            raise ValueError(f"num_examples must be >= 1, got {num_examples}")
        _check_memory(num_examples)
        if num_examples > MAX_EXAMPLES:
            raise ValueError(f"num_examples must be <= {MAX_EXAMPLES}, got {num_examples}: split the data")
        return cls(
            score=jnp.zeros(num_examples, jnp.float32),
            scored_at=jnp.full(num_examples, NEVER, jnp.int32),
        )

    def __len__(self) -> int:
        return self.score.shape[0]

    def write(self, indices: jax.Array, scores: jax.Array, step: jax.Array) -> tuple["ScoreStore", Rejected]:
        """Stores scores of some examples; O(m).

        Args:
          indices: i[...], of examples; those outside [0, N) are padding and ignored.
          scores: f[...] of the same shape, or one for all.
          step: i[], learner step of the parameters that gave the scores, below 2^30.

        Returns:
          The new store, and the scores that were rejected.

        Raises:
          TypeError: indices or step are not whole numbers, or scores not real numbers.
          ValueError: indices and scores differ in shape, or step is not one number, or no array of JAX and not below
            2^30.

        Guarantees:
          - A score that is NaN, infinite or negative leaves the store as it was; so do all of an impossible step in an
            array of JAX, for whose value no call waits, and all count as rejected.
          - A score of older parameters never replaces one of newer parameters, in whatever order they arrive.
          - Of an index that occurs twice, the last valid score is stored.
        """
        arrays = self._arrays()
        indices = as_indices(indices, len(self))
        scores = as_numbers("a score", scores, indices.shape)
        args = *arrays, indices.reshape(-1), scores.reshape(-1), as_step("step", step)
        number = jax.ShapeDtypeStruct((), jnp.int32)
        results = *jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays), number, number
        *arrays, count, index = kernels.on_cpu("write_scores", plain_write, results, *args, aliases={0: 0, 1: 1})
        return ScoreStore(*arrays), Rejected(count, index)

    def at(self, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns score f32[m] and scored_at i32[m] of the examples `indices` i[m]; O(m).

        Those outside [0, N) have no score: 0, of step -1.
        """
        indices = as_indices(indices, len(self))
        arrays = self._arrays()
        results = tuple(jax.ShapeDtypeStruct(indices.shape, x.dtype) for x in arrays)
        # XLA's CPU backend estimates the cost of a gather by the size of the array, and wakes all threads for it.
        return kernels.on_cpu("read_scores", plain_read, results, *arrays, indices)

    def check(self, indices, scores) -> None:
        """Validates the arguments of `write` on the host, for callers that want an error instead of a count.

        Raises:
          ValueError: scores are NaN, infinite or negative, or indices outside [0, N), naming the first of them; or
            the shapes differ.

        Example:
          >>> ScoreStore.init(5).check([0, 3], [1.0, -2.0])
          Traceback (most recent call last):
          ValueError: scores must be finite and >= 0, got -2.0 of example 3
        """
        indices, scores = np.asarray(indices), np.asarray(scores)
        check_whole(indices)
        if indices.shape != scores.shape or indices.ndim != 1:
            raise ValueError(f"need indices and scores of one shape [m], got {indices.shape} and {scores.shape}")
        self._check_range(indices)
        bad = ~(np.isfinite(scores) & (scores >= 0))
        if np.any(bad):
            pairs = _list_first([f"{value} of example {index}" for index, value in zip(indices[bad], scores[bad])])
            raise ValueError(f"scores must be finite and >= 0, got {pairs}")

    @property
    def scored(self) -> jax.Array:
        """bool[N], True where an example has a score."""
        return self.scored_at != NEVER

    def staleness(self, step: jax.Array) -> jax.Array:
        """Returns i32[N]: learner steps since the parameters that gave each score; `step + 1` where never scored."""
        return step - self.scored_at

    def append(self, num_examples: int) -> "ScoreStore":
        """Returns a store with more examples, never scored, after the present ones.

        Raises:
          ValueError: num_examples < 0.

        Example:
          >>> len(ScoreStore.init(3).append(2))
          5
        """
        num_examples = as_whole("num_examples", num_examples)
        if num_examples < 0:
            raise ValueError(f"num_examples must be >= 0, got {num_examples}")
        return self if num_examples == 0 else jax.tree.map(lambda *x: jnp.concatenate(x), self, self.init(num_examples))

    def remove(self, indices) -> tuple["ScoreStore", np.ndarray]:
        """Removes examples.

        Returns:
          The smaller store, and i64[N']: the old index of each example that is left, in the old order.

        Raises:
          ValueError: an index is outside [0, N), or no example would be left.

        Example:
          >>> store, old_indices = ScoreStore.init(4).remove([1, 2])
          >>> old_indices.tolist()
          [0, 3]
        """
        indices = np.asarray(indices)
        check_whole(indices)
        indices = np.unique(indices.astype(np.int64))
        self._check_range(indices)
        kept = np.setdiff1d(np.arange(len(self)), indices)
        if not len(kept):
            raise ValueError(f"all {len(self)} examples would be removed: leave at least one")
        return jax.tree.map(lambda x: x[kept], self), kept

    def merge(self, other: "ScoreStore") -> "ScoreStore":
        """Returns the newer score of each example of two stores; this store's where both are of the same step.

        Raises:
          ValueError: the stores differ in size.
        """
        if len(self) != len(other):
            raise ValueError(f"stores must have as many examples, got {len(self)} and {len(other)}: append or remove")
        return jax.tree.map(lambda x, y: jnp.where(other.scored_at > self.scored_at, y, x), self, other)

    def hardest(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the examples with the largest scores, on the host.

        Returns:
          Indices i64[k] and scores f32[k], largest first; fewer than k if fewer are scored.

        Raises:
          ValueError: k < 1.

        Example:
          >>> store, _ = ScoreStore.init(5).write(jnp.arange(3), jnp.array([2.0, 9.0, 4.0]), jnp.int32(0))
          >>> indices, scores = store.hardest(2)
          >>> indices.tolist(), scores.tolist()
          ([1, 2], [9.0, 4.0])
        """
        if k < 1:
            raise ValueError(f"k must be >= 1, got {k}")
        score = np.where(np.asarray(self.scored), np.asarray(self.score), -1)
        k = min(k, int(np.sum(score >= 0)))
        largest = np.argpartition(-score, min(k, len(score) - 1))[:k]
        largest = largest[np.argsort(-score[largest], kind="stable")]
        return largest, score[largest]

    def histogram(self, bins: int = 40) -> Histogram:
        """Returns the distribution of the known scores, on the host.

        Raises:
          ValueError: bins < 1, or nothing is scored.

        Example:
          >>> store, _ = ScoreStore.init(4).write(jnp.arange(4), jnp.array([0.0, 1.0, 2.0, 16.0]), jnp.int32(0))
          >>> store.histogram(bins=2).counts.tolist(), store.histogram(bins=2).zeros
          ([2, 1], 1)
        """
        score = np.asarray(self.score)[np.asarray(self.scored)]
        if bins < 1 or not len(score):
            raise ValueError(f"need bins >= 1 and at least one score, got {bins} bins and {len(score)} scores")
        positive = score[score > 0].astype(np.float64)
        low, high = (positive.min(), positive.max()) if len(positive) else (1.0, 1.0)
        edges = np.geomspace(low, high if high > low else 2 * low, bins + 1)
        edges[0], edges[-1] = min(edges[0], low), max(edges[-1], high)
        return Histogram(np.histogram(positive, edges)[0], edges, int(np.sum(score == 0)))

    def class_mass(self, labels, num_classes: int) -> np.ndarray:
        """Returns f64[num_classes]: the share of each class in the sum of the known scores; all 0 without scores.

        Args:
          labels: i32[N], in [0, num_classes).
          num_classes: number of classes.

        Raises:
          ValueError: labels have another shape or range.

        Example:
          >>> store, _ = ScoreStore.init(4).write(jnp.arange(3), jnp.array([1.0, 2.0, 1.0]), jnp.int32(0))
          >>> store.class_mass([0, 1, 0, 1], num_classes=2).tolist()
          [0.5, 0.5]
        """
        labels = np.asarray(labels)
        if labels.shape != self.score.shape or labels.min() < 0 or labels.max() >= num_classes:
            described = f"shape {labels.shape}, {labels.min()} to {labels.max()}"
            raise ValueError(f"need {len(self)} labels in [0, {num_classes}), got {described}")
        mass = np.bincount(labels, np.asarray(self.score, np.float64), minlength=num_classes)
        return mass / mass.sum() if mass.sum() > 0 else mass

    def save(self, path: str | pathlib.Path, **others: jax.Array) -> None:
        """Writes both arrays to a `.npz` file, which appears as a whole or not at all.

        Args:
          path: of the file.
          others: further arrays to write by these names, which `load` ignores.

        Example:
          >>> import tempfile
          >>> path = pathlib.Path(tempfile.mkdtemp()) / "scores.npz"
          >>> ScoreStore.init(3).save(path)
          >>> len(ScoreStore.load(path))
          3
        """
        with replace_atomically(path) as new, open(new, "wb") as file:
            np.savez(file, **{name: np.asarray(array) for name, array in (vars(self) | others).items()})

    @classmethod
    def load(cls, path: str | pathlib.Path) -> "ScoreStore":
        """Reads a file that `save` wrote.

        Raises:
          InputError: the file is missing or damaged, or holds anything but a store.
        """
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                score, scored_at = arrays["score"], arrays["scored_at"]
        except Exception as error:  # a damaged archive raises many types, from zlib's to those of the header's parser
            raise InputError(f"{path} is not a file of scores ({error!r}): use what ScoreStore.save wrote") from error
        is_store = score.dtype == np.float32 and scored_at.dtype == np.int32 and score.ndim == 1 and len(score)
        if not is_store or score.shape != scored_at.shape:
            raise InputError(
                f"{path} holds score {score.dtype}{score.shape} and scored_at {scored_at.dtype}{scored_at.shape}: "
                "expected f32[N] and i32[N]"
            )
        outside = (scored_at < NEVER) | (scored_at >= MAX_STEP)
        if np.any(outside):
            first = _list_first(scored_at[outside])
            raise InputError(f"{path}: scored_at must be -1 (never) or a step in [0, {MAX_STEP}), got {first}")
        store = cls(score=jnp.asarray(score), scored_at=jnp.asarray(scored_at))
        try:
            store.check(np.arange(len(score)), score)
        except ValueError as error:
            raise InputError(f"{path}: {error}") from error
        return store

    def _arrays(self) -> tuple[jax.Array, jax.Array]:
        return self.score.astype(jnp.float32), self.scored_at.astype(jnp.int32)

    def _check_range(self, indices: np.ndarray) -> None:
        outside = (indices < 0) | (indices >= len(self))
        if np.any(outside):
            raise ValueError(f"indices must lie in [0, {len(self)}), got {_list_first(indices[outside])}")


def plain_read(score, scored_at, indices):
    """`ScoreStore.at` in plain JAX."""
    inside = (indices >= 0) & (indices < score.size)
    place = jnp.where(inside, indices, 0)
    return jnp.where(inside, score[place], 0), jnp.where(inside, scored_at[place], NEVER)


def plain_write(score, scored_at, indices, new_scores, step):
    """`ScoreStore.write` in plain JAX: returns score, scored_at, and count and index of the rejected."""
    num_examples = score.size
    inside = (indices >= 0) & (indices < num_examples)
    valid = jnp.isfinite(new_scores) & (new_scores >= 0) & (step >= 0) & (step < MAX_STEP)
    newer = step >= scored_at[jnp.where(inside, indices, 0)]
    target = jnp.where(inside & valid & newer, indices, num_examples)
    # A scatter applies duplicates in any order. So each first writes its rank to scored_at, where the largest wins;
    # then only the winners write their scores.
    rank = MAX_STEP + jnp.arange(indices.size, dtype=jnp.int32)
    ranks = scored_at.at[target].max(rank, mode="drop")
    is_last = ranks[jnp.where(inside, indices, 0)] == rank
    target = jnp.where(is_last, target, num_examples)
    bad = inside & ~valid
    return (
        score.at[target].set(new_scores, mode="drop"),
        ranks.at[target].set(step, mode="drop"),
        jnp.sum(bad, dtype=jnp.int32),
        jnp.max(jnp.where(bad, indices, NO_EXAMPLE), initial=NO_EXAMPLE),
    )


def _list_first(values, limit: int = 5) -> str:
    """Formats the first values and the number of the others."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def _check_memory(num_examples: int) -> None:
    device = jax.config.jax_default_device or jax.devices()[0]
    device = jax.devices(device)[0] if isinstance(device, str) else device  # a platform
    limit = memory_bytes(device)
    needed = BYTES_AN_EXAMPLE * num_examples
    if needed > limit:
        raise InputError(
            f"a store of {num_examples:,} examples needs {needed:,} bytes, but {device} has {limit:,}: split the data"
        )
