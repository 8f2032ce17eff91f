"""Worker process of one machine: scores chunks on all devices of the machine."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import socket
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from issgd_jax import provenance
from issgd_jax.cluster.channel import Packed, unpack
from issgd_jax.cluster.leases import Layout

_VERSIONS = ("python", "issgd-jax", "jax", "jaxlib")


@dataclasses.dataclass(frozen=True)
class Work:
    """Score function and data of a worker.

    Attributes:
      score_fn: `(params, *batch) -> f32[B]`.
      load: `(first, stop) -> examples`, arrays with a leading axis of `stop - first`.
      num_examples: training examples on this machine.
      devices: devices to score on.
    """

    score_fn: Callable
    load: Callable[[int, int], tuple]
    num_examples: int
    devices: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Handshake:
    """Identity of a worker and the versions of its software.

    Attributes:
      machine: host name.
      process: process id.
      versions: see `versions`.
    """

    machine: str
    process: int
    versions: dict[str, str | None]


def versions() -> dict[str, str | None]:
    """Returns what must be equal on all machines: versions, and a digest of this package's code.

    Example:
      >>> sorted(versions())
      ['issgd-jax', 'issgd_jax code', 'jax', 'jaxlib', 'python']
    """
    folder, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    installed = provenance.versions()
    return {name: installed[name] for name in _VERSIONS} | {"issgd_jax code": digest.hexdigest()[:12]}


class Worker:
    """Ray actor that scores leases. It keeps only the shards in memory that it is told to keep.

    Args:
      make_work: packed `() -> Work`, called in this process, at the first use.
      layout: partition of the examples.
      niceness: least of this process, once it has started; 0: as Ray has set it.
    """

    def __init__(self, make_work: Packed, layout: Layout, niceness: int = 0):
        self._make_work, self._layout, self._niceness = make_work, layout, niceness
        self._pools: dict[int, Any] = {}  # of each shard in memory
        self._version, self._params = None, None

    def handshake(self) -> Handshake:
        """Returns the worker's identity; loads no data and compiles nothing."""
        return Handshake(socket.gethostname(), os.getpid(), versions())

    def prepare(self) -> tuple[int, list[str]]:
        """Returns the number of examples on this machine and the kinds of its devices.

        Raises:
          InputError: the machine lacks the data or the devices.
        """
        prepared = self._work.num_examples, [device.device_kind for device in self._work.devices]
        os.nice(max(0, self._niceness - os.nice(0)))
        return prepared

    def score(self, params: Packed, version: int, lease: int, keep: Sequence[int]) -> np.ndarray:
        """Scores the chunk of a lease.

        Args:
          params: packed pytree of arrays.
          version: of params; they are copied to the devices when it changes.
          lease: its number.
          keep: shards that stay in memory.

        Returns:
          f32[chunk_size].
        """
        import jax

        if version != self._version:
            self._version, self._params = version, jax.device_put(unpack(params))
        shard, offset = self._layout.locate(lease)
        for other in [number for number in self._pools if number not in keep]:
            del self._pools[other]
        if shard not in self._pools:
            self._pools[shard] = self._make_pool(shard)
        return self._score(self._pools[shard], offset)

    def _score(self, pool, offset: int) -> np.ndarray:
        """Scores the chunk at this offset of the pool's shard; the pool may score examples before and after it."""
        pool.seek({"item": offset, "workers": 1})
        (round_,) = pool.score_next(self._params, step=0)
        positions = np.asarray(round_.indices).ravel() - offset
        in_chunk = (positions >= 0) & (positions < self._layout.chunk_size)
        scores = np.full(self._layout.chunk_size, np.nan, np.float32)
        scores[positions[in_chunk]] = np.asarray(round_.scores).ravel()[in_chunk]
        return scores

    def _make_pool(self, shard: int):
        from issgd_jax.scoring.workers import WorkerPool

        start, stop = self._layout.shard(shard)
        devices = self._work.devices[: stop - start]
        # A chunk may begin and end in the middle of an item.
        items = (self._layout.chunk_size + 2 * len(devices) - 2) // len(devices)
        items = min(items, -(-(stop - start) // len(devices)))
        return WorkerPool(self._work.score_fn, self._work.load(start, stop), devices=devices, chunk_size=items)

    @functools.cached_property
    def _work(self) -> Work:
        return unpack(self._make_work)()
