"""Worker pool on local devices: each worker scores its own shard of the examples, chunk by chunk."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from issgd_jax.loading.source import Source, arguments, as_source
from issgd_jax.scoring.schedule import Round, chunk_items


class WorkerPool:
    """Keeps the worker devices busy from one Python thread: every call dispatches and returns at once.

    Example n belongs to worker `n % W` and is item `n // W` of its shard, so that, where W divides N, W workers with
    chunks of C score the same examples in a round as one worker with chunks of W * C.

    The pool is one `jax.pmap` over the worker devices: parameters are broadcast as replicated arrays, shards are arrays
    [W, ceil(N / W), ...] sharded over the workers. Where the workers belong to several processes, every process creates
    the pool with the same arguments and calls it equally often; it passes to pmap the shards of its own devices and
    gets the scores of all workers.

    Example:
      >>> examples = (np.array([1.0, 2.0, 3.0], np.float32),)
      >>> pool = WorkerPool(lambda params, x: params * x, examples, devices=jax.devices()[:1], chunk_size=2)
      >>> first, second = pool.score_next(np.float32(10), step=0, num_rounds=2)
      >>> first.indices.tolist(), first.scores.tolist()
      ([[0, 1]], [[10.0, 20.0]])
      >>> second.indices.tolist(), second.scores.tolist()
      ([[2, 0]], [[30.0, 10.0]])
    """

    def __init__(
        self,
        score_fn: Callable[..., jax.Array],
        source: Any,
        *,
        devices: Sequence[jax.Device],
        chunk_size: int,
        collate: Callable[[list], Any] | None = None,
    ):
        """Places one shard on each device.

        Args:
          score_fn: `(params, *batch) -> f32[B]`.
          source: N examples, see `loading.source.as_source`. Arrays that a single device holds already are shared, not
            copied.
          devices: W devices, one for each worker. Of several processes each has as many, side by side.
          chunk_size: examples that each worker scores in a round.
          collate: `list of examples -> batch`, see `as_source`. It is called once a shard, with all its examples.

        Raises:
          TypeError: the source cannot be read by index, or has values that are not numbers.
          ValueError: chunk_size < 1, a chunk is larger than a shard, there are fewer examples than workers, the shards
            have different shapes, or the processes have different numbers of workers.
        """
        self.device_kinds = [device.device_kind for device in devices]
        source = as_source(source, collate)
        self._num_examples = source.num_examples
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

        local = _local_workers(devices)
        mesh = Mesh(np.asarray([devices[worker] for worker in local]), ("worker",))
        self._replicated = NamedSharding(mesh, PartitionSpec())
        sharded = NamedSharding(mesh, PartitionSpec("worker"))
        self._worker = jax.device_put(np.asarray(local, np.int32), sharded)
        if self._num_workers == 1:
            self._shards = jax.device_put(source.all_rows(), self._replicated)
        else:
            self._shards = self._sharded(source, [devices[worker] for worker in local], local, sharded)
        gathers = len(local) < self._num_workers
        self._score = _compiled(score_fn, tuple(devices), self._shard_size, chunk_size, gathers)

    @property
    def cursor(self) -> dict[str, int]:
        """Start of the next round: an item of every worker's shard, and the number of workers."""
        return {"item": self._next_start, "workers": self._num_workers}

    def seek(self, cursor: dict[str, int]) -> None:
        """Continues at a cursor, also of a pool with another number of workers: at the same example, or one near it."""
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
        """Does nothing: the pool holds no threads or files."""

    def score_next(self, params, step: int, num_rounds: int = 1) -> list[Round]:
        """Dispatches rounds: broadcasts the parameters once and scores the next chunks of every shard.

        Args:
          params: pytree of arrays; copied, so that the caller may donate it to its next step.
          step: learner step of the parameters.
          num_rounds: number of rounds to dispatch.

        Returns:
          The rounds, with arrays [W, chunk_size]. At the end of a shard a chunk wraps around to its beginning.

        Guarantees:
          Never waits, and copies nothing through the host.
        """
        if num_rounds == 0:
            return []
        # On the learner's own device device_put would return an alias, which the learner's donation deletes.
        snapshot = jax.device_put(params, self._replicated, may_alias=False)
        return [self._score_chunks(snapshot, step) for _ in range(num_rounds)]

    def _score_chunks(self, snapshot, step: int) -> Round:
        start = jax.device_put(np.int32(self._next_start), self._replicated)
        indices, scores = self._score(snapshot, self._shards, self._worker, start)
        num_scored = self._num_real_items()
        self._next_start = (self._next_start + self._chunk_size) % self._shard_size
        return Round(step=step, indices=indices, scores=scores, num_examples=num_scored)

    def _num_real_items(self) -> int:
        """Returns the examples in the next round, without the padding of shards that are one item short."""
        items = chunk_items(self._next_start, self._chunk_size, self._shard_size)
        return int(np.sum(items[:, None] * self._num_workers + np.arange(self._num_workers) < self._num_examples))

    def _sharded(self, source: Source, devices: Sequence[jax.Device], local: Sequence[int], sharding: NamedSharding):
        """Returns the local workers' shards, [local, ceil(N / W), ...]; one after the other is on the host."""
        shards = [jax.device_put(self._shard(source, worker), device) for worker, device in zip(local, devices)]

        def joined(*parts):
            shapes = {part.shape for part in parts}
            if len(shapes) > 1:
                raise ValueError(f"collate gave shards of different shapes, {shapes}: pad all examples to one length")
            shape = (len(local), *parts[0].shape[1:])
            return jax.make_array_from_single_device_arrays(shape, sharding, parts)

        return jax.tree.map(joined, *shards)

    def _shard(self, source: Source, worker: int) -> Any:
        """Returns a worker's examples, [1, ceil(N / W), ...]; where they are one short, the first is repeated."""
        indices = np.arange(worker, self._num_examples, self._num_workers)
        return jax.tree.map(lambda x: x[None], source.gather(np.resize(indices, self._shard_size)))


def _local_workers(devices: Sequence[jax.Device]) -> list[int]:
    """Returns the positions of this process's devices; raises ValueError where pmap would see other devices."""
    owners = [device.process_index for device in devices]
    local = [worker for worker, owner in enumerate(owners) if owner == jax.process_index()]
    # pmap takes the first `local * processes` devices: with unequal numbers each process would compile another program.
    if owners != [owner for owner in dict.fromkeys(owners) for _ in local]:
        raise ValueError(
            f"each process must have as many workers, side by side, got workers of the processes {owners}: give the "
            "same number of devices of every process, one process after the other"
        )
    return local


@functools.lru_cache(maxsize=8)  # a machine with many shards has many pools
def _compiled(score_fn, devices: tuple[jax.Device, ...], shard_size: int, chunk_size: int, gathers: bool):
    """Returns `(params, shards, worker, start) -> (indices, scores)` over the devices; equal pools share it.

    gathers: whether each device gets the scores of all, as it does where the workers belong to several processes.
    """
    num_workers = len(devices)

    def score_chunk(params, shard, worker, start):
        items = chunk_items(start, chunk_size, shard_size)
        chunk = jax.tree.map(lambda x: x[items], shard)
        # The index of padding lies past the data, where the store ignores it.
        scored = items * num_workers + worker, score_fn(params, *arguments(chunk))
        return jax.lax.all_gather(scored, "worker") if gathers else scored

    # Not jit over a sharded batch, where per-example gradients of a convolution come out wrong.
    return jax.pmap(
        score_chunk,
        "worker",
        in_axes=(None, None if num_workers == 1 else 0, 0, None),
        out_axes=None if gathers else 0,
        devices=devices,
    )
