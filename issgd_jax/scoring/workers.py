"""The workers: they score the training examples chunk by chunk, each its own shard, on their own devices.

Where they belong to several processes, each of these gets the scores of all.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.devices import put
from issgd_jax.scoring.schedule import Round, chunk_items


class WorkerPool:
    """Keeps the worker devices busy from one Python thread: every call dispatches and returns at once.

    Example n belongs to worker `n % W` and is item `n // W` of its shard, so that, where W divides N, W workers with
    chunks of C score the same examples in a round as one worker with chunks of W * C.
    """

    def __init__(
        self,
        score_fn: Callable[..., jax.Array],
        examples: tuple[jax.Array, ...],
        *,
        devices: Sequence[jax.Device],
        chunk_size: int,
    ):
        """Places one shard on each device.

        Args:
          score_fn: `(params, *batch) -> f32[B]`.
          examples: arrays with leading axis N. On a single device that holds them already, they are shared, not copied.
          devices: one a worker, of all processes.
          chunk_size: examples a worker scores in a round.

        Raises: ValueError if chunk_size < 1, a chunk is larger than a shard, or there are fewer examples than workers.
        """
        self.device_kinds = [device.device_kind for device in devices]
        self._num_examples = jax.tree.leaves(examples)[0].shape[0]
        self._num_workers = len(devices)
        self._shard_size = -(-self._num_examples // self._num_workers)
        if self._num_examples < self._num_workers:
            raise ValueError(
                f"need an example for each worker, got {self._num_examples} for {self._num_workers} workers"
            )
        if not 1 <= chunk_size <= self._shard_size:
            raise ValueError(
                f"chunk_size must be between 1 and {self._shard_size} ({self._num_examples} examples over "
                f"{self._num_workers} workers), got {chunk_size}"
            )
        self._chunk_size = chunk_size
        self._next_start = 0

        mesh = Mesh(np.asarray(devices), ("worker",))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        sharded = NamedSharding(mesh, PartitionSpec("worker"))
        numbers = np.arange(self._num_workers, dtype=np.int32)
        self._worker = jax.make_array_from_callback(numbers.shape, sharded, lambda index: numbers[index])
        if self._num_workers == 1:
            self._shards, of_shards = jax.device_put(examples, self._replicated), PartitionSpec()
        else:
            self._shards = jax.tree.map(lambda x: self._shard(np.asarray(x), sharded), examples)
            of_shards = PartitionSpec("worker")
        gathers = not sharded.is_fully_addressable
        self._score = _compiled(score_fn, mesh, self._shard_size, chunk_size, of_shards, gathers)

    @property
    def cursor(self) -> dict[str, int]:
        """Where the next round begins: an item of every worker's shard."""
        return {"item": self._next_start, "workers": self._num_workers}

    def seek(self, cursor: dict[str, int]) -> None:
        """Goes on at a place, also of a pool with another number of workers: with the same example, or one near it."""
        self._next_start = cursor["item"] * cursor["workers"] // self._num_workers % self._shard_size

    @property
    def rounds_per_sweep(self) -> int:
        """Rounds after which every example has been scored at least once."""
        return -(-self._shard_size // self._chunk_size)

    @property
    def rounds_ahead(self) -> int:
        """Rounds in flight that keep all workers busy: the one that they score, and the next."""
        return 2

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception):
        """Nothing is left open."""

    def score_next(self, params, step: int, num_rounds: int = 1) -> list[Round]:
        """Dispatches rounds: broadcasts the parameters of `step` once and scores the next chunks of every shard.

        Never waits and never passes through the host. The parameters are copied, so that the caller may donate them to
        its next step. At the end of a shard the chunk goes on from its beginning.
        """
        if num_rounds == 0:
            return []
        # The learner's own device would get an alias, which the learner's donation then deletes: no alias.
        snapshot = put(params, self._replicated, may_alias=False)
        return [self._score_chunks(snapshot, step) for _ in range(num_rounds)]

    def _score_chunks(self, snapshot, step: int) -> Round:
        start = put(np.int32(self._next_start), self._replicated)
        indices, scores = self._score(snapshot, self._shards, self._worker, start)
        num_scored = self._num_real_items()
        self._next_start = (self._next_start + self._chunk_size) % self._shard_size
        return Round(step=step, indices=indices, scores=scores, num_examples=num_scored)

    def _num_real_items(self) -> int:
        """Examples in the next round; shards one item short are padded, and padding does not count."""
        items = chunk_items(self._next_start, self._chunk_size, self._shard_size)
        return int(np.sum(items[:, None] * self._num_workers + np.arange(self._num_workers) < self._num_examples))

    def _shard(self, array: np.ndarray, sharding: NamedSharding) -> jax.Array:
        """[N, ...] -> [W, ceil(N / W), ...], one row a worker, without a padded copy of the whole on the host."""
        shape = (self._num_workers, self._shard_size, *array.shape[1:])

        def rows(index):
            worker = index[0].start or 0
            items = array[worker :: self._num_workers]
            missing = self._shard_size - items.shape[0]
            return np.concatenate([items, items[:missing]])[None] if missing else items[None]

        return jax.make_array_from_callback(shape, sharding, rows)


@functools.lru_cache(maxsize=8)  # a machine with many shards has many pools
def _compiled(score_fn, mesh: Mesh, shard_size: int, chunk_size: int, of_shards: PartitionSpec, gathers: bool):
    """`(params, shards, worker, start) -> (indices, scores)`, over the devices; pools that are alike share it.

    gathers: whether each device gets the scores of all.
    """
    num_workers = mesh.size

    def score_chunk(params, shards, worker, start):
        shard = shards if num_workers == 1 else jax.tree.map(lambda x: x.reshape(x.shape[1:]), shards)
        items = chunk_items(start, chunk_size, shard_size)
        chunk = jax.tree.map(lambda x: x[items], shard)
        # The index of padding lies past the data, where the store ignores it.
        found = (items * num_workers + worker)[None], score_fn(params, *chunk)[None]
        return jax.lax.all_gather(found, "worker", tiled=True) if gathers else found

    # Not jit over a sharded batch, where per-example gradients of a convolution come out wrong; and check_vma would sum
    # them over the workers.
    return jax.jit(
        jax.shard_map(
            score_chunk,
            mesh=mesh,
            in_specs=(PartitionSpec(), of_shards, PartitionSpec("worker"), PartitionSpec()),
            out_specs=PartitionSpec() if gathers else PartitionSpec("worker"),
            check_vma=False,
        )
    )
