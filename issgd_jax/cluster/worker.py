"""A worker machine: a process that scores the chunks it is told to, on all devices it has."""

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
from issgd_jax.cluster.leases import Layout

_VERSIONS = ("python", "issgd-jax", "jax", "jaxlib")


@dataclasses.dataclass(frozen=True)
class Work:
    """What a worker is for. score_fn: `(params, *batch) -> f32[B]`. load: `(first, one after the last) -> examples`,
    arrays with a leading axis. num_examples: how many its machine has. devices: those that it scores on."""

    score_fn: Callable
    load: Callable[[int, int], tuple]
    num_examples: int
    devices: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Hello:
    """Who a worker is: its machine and process, and what must be the same everywhere."""

    machine: str
    process: int
    versions: dict[str, str | None]


def versions() -> dict[str, str | None]:
    """What must be the same on all machines: versions, and a digest of this package's own code."""
    folder, digest = pathlib.Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    found = provenance.versions()
    return {name: found[name] for name in _VERSIONS} | {"issgd_jax code": digest.hexdigest()[:12]}


class Worker:
    """Lives in a process of its own. It has the shards that it was last asked for, and no others."""

    def __init__(self, make_work: Callable[[], Work], layout: Layout):
        """make_work: called here."""
        self._make_work, self._layout = make_work, layout
        self._pools: dict[int, Any] = {}
        self._version, self._params = None, None

    def hello(self) -> Hello:
        """Costs no data and no compilation."""
        return Hello(socket.gethostname(), os.getpid(), versions())

    def begin(self) -> tuple[int, list[str]]:
        """How many examples this machine has, and its devices. Raises InputError if it has not what the work needs."""
        return self._work.num_examples, [device.device_kind for device in self._work.devices]

    def score(self, params, version: int, lease: int, keep: Sequence[int]) -> np.ndarray:
        """f32[chunk_size]: the scores of a lease's chunk. version: of params. keep: shards that stay loaded."""
        import jax

        if version != self._version:
            self._version, self._params = version, jax.device_put(params)
        shard, item = self._layout.place(lease)
        for other in [number for number in self._pools if number not in keep]:
            del self._pools[other]
        if shard not in self._pools:
            self._pools[shard] = self._make_pool(shard)
        return self._score(self._pools[shard], item)

    def _score(self, pool, item: int) -> np.ndarray:
        pool.seek({"item": item, "workers": 1})
        (round_,) = pool.score_next(self._params, step=0)
        place = np.asarray(round_.indices).ravel() - item  # in the chunk
        wanted = (place >= 0) & (place < self._layout.chunk_size)
        scores = np.full(self._layout.chunk_size, np.nan, np.float32)
        scores[place[wanted]] = np.asarray(round_.scores).ravel()[wanted]
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
        return self._make_work()
