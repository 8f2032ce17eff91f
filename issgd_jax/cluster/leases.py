"""Leases: which worker scores which chunk. Reissued if a worker dies or is late. No Ray, no clock, no threads."""

import collections
import dataclasses
import math
from collections.abc import Hashable

import numpy as np

Worker = Hashable

# A lease is late after this multiple of the typical lease time, and never before LATE_SECONDS.
LATE_FACTOR, LATE_SECONDS = 5.0, 2.0
# A lease waits for a worker that holds its shard for at most this multiple of the typical lease time.
PATIENCE_FACTOR = 2.0
# Small enough that several workers can share the shards of one that is lost.
SHARDS_PER_WORKER = 4
_FORGETTING = 0.1  # weight of the latest lease in the moving average of lease times


@dataclasses.dataclass(frozen=True)
class Layout:
    """Partition of N examples into contiguous shards, and of each shard into chunks.

    Lease j scores a chunk of shard `j % num_shards`; the chunks of a shard take turns. The last chunk of a shard starts
    early enough to be whole, so that some examples may be scored twice in a sweep.

    Attributes:
      num_examples: N.
      num_shards: shards; their sizes differ by at most one.
      chunk_size: examples in a chunk, at most the size of the smallest shard.
    """

    num_examples: int
    num_shards: int
    chunk_size: int

    @classmethod
    def create(cls, num_examples: int, *, chunk_size: int, num_workers: int) -> "Layout":
        """Returns a layout with the same number of shards, at most SHARDS_PER_WORKER, for every worker.

        Args:
          num_examples: N.
          chunk_size: examples in a chunk; no shard is smaller.
          num_workers: workers that share the data.

        Raises:
          ValueError: chunk_size is not in [1, num_examples].

        Example:
          >>> Layout.create(100, chunk_size=10, num_workers=2)
          Layout(num_examples=100, num_shards=8, chunk_size=10)
        """
        if not 1 <= chunk_size <= num_examples:
            raise ValueError(f"chunk_size must be between 1 and {num_examples} (all examples), got {chunk_size}")
        shards_per_worker = min(SHARDS_PER_WORKER, num_examples // chunk_size // num_workers)
        return cls(num_examples, shards_per_worker * num_workers or num_examples // chunk_size, chunk_size)

    def shard(self, number: int) -> tuple[int, int]:
        """Returns the first example of a shard and the one after its last.

        Example:
          >>> layout = Layout(num_examples=10, num_shards=3, chunk_size=2)
          >>> [layout.shard(number) for number in range(3)]
          [(0, 3), (3, 6), (6, 10)]
        """
        return (
            number * self.num_examples // self.num_shards,
            (number + 1) * self.num_examples // self.num_shards,
        )

    def locate(self, lease: int) -> tuple[int, int]:
        """Returns the shard of a lease, and the offset of its chunk in the shard.

        Example:
          >>> layout = Layout(num_examples=10, num_shards=3, chunk_size=2)
          >>> [layout.locate(lease) for lease in range(6)]
          [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 2)]
        """
        turn, shard = divmod(lease, self.num_shards)
        start, stop = self.shard(shard)
        return shard, min(turn % self._chunks_per_shard * self.chunk_size, stop - start - self.chunk_size)

    def examples(self, lease: int) -> np.ndarray:
        """Returns the examples of a lease's chunk, i32[chunk_size], in the order of its scores.

        Example:
          >>> Layout(num_examples=10, num_shards=3, chunk_size=2).examples(5).tolist()
          [8, 9]
        """
        shard, offset = self.locate(lease)
        return np.arange(self.chunk_size, dtype=np.int32) + (self.shard(shard)[0] + offset)

    @property
    def leases_per_sweep(self) -> int:
        """Consecutive leases that score every example at least once."""
        return self.num_shards * self._chunks_per_shard

    @property
    def _chunks_per_shard(self) -> int:
        largest = -(-self.num_examples // self.num_shards)
        return -(-largest // self.chunk_size)


@dataclasses.dataclass
class _Running:
    """A lease that workers are scoring.

    Attributes:
      since: when it was first acquired, or last found to be late, in seconds.
      workers: those that are scoring it.
    """

    since: float
    workers: set[Worker]


class Leases:
    """Queue of leases from their issue to their first result.

    The oldest lease goes first, but one whose shard another worker holds is reserved for that worker for a while. So
    each worker comes to hold its share of the data, and others take over the share of one that is slow or lost. A lease
    that takes too long is reissued.

    Args:
      layout: partition of the examples.

    Attributes:
      typical_seconds: moving average of the time of a lease; None before the first result.
      num_done: leases with a result.
      num_reissued: times that a lease was put back, because its worker was lost, failed or late.

    Guarantees:
      No lease is lost, and each is completed once, whatever workers do.

    Example:
      >>> leases = Leases(Layout.create(100, chunk_size=10, num_workers=2))
      >>> leases.add_worker("a"); leases.add_worker("b")
      >>> leases.issue(0, now=0.0); leases.issue(1, now=0.0)
      >>> leases.acquire("a", now=0.0), leases.acquire("b", now=0.0)
      (0, 1)
      >>> leases.remove_worker("a")
      >>> leases.acquire("b", now=1.0)
      0
      >>> leases.complete(0, now=2.0), leases.complete(0, now=3.0)
      (True, False)
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._waiting: collections.deque[int] = collections.deque()
        self._waiting_since: dict[int, float] = {}
        self._running: dict[int, _Running] = {}
        self._shards: dict[Worker, collections.OrderedDict[int, None]] = {}  # held by each worker, latest last
        self._num_holders: collections.Counter[int] = collections.Counter()  # of each shard
        self._checked_at = -math.inf  # when late leases were last searched for
        self.typical_seconds: float | None = None
        self.num_done = self.num_reissued = 0

    def issue(self, lease: int, now: float) -> None:
        """Adds a lease to the queue.

        Args:
          lease: its number.
          now: time in seconds; here and below of any clock that never runs back.
        """
        self._waiting.append(lease)
        self._waiting_since[lease] = now

    def add_worker(self, worker: Worker) -> None:
        """Adds a worker that holds no shards."""
        self._shards[worker] = collections.OrderedDict()

    def remove_worker(self, worker: Worker) -> None:
        """Removes a worker and moves its leases to the front of the queue."""
        self._num_holders.subtract(list(self._shards.pop(worker, ())))
        for lease in sorted(self._running, reverse=True):
            self._withdraw(lease, worker)

    def release(self, lease: int, worker: Worker) -> None:
        """Moves a lease that the worker failed to score to the front of the queue."""
        if lease in self._running and worker in self._running[lease].workers:
            self._withdraw(lease, worker)

    def acquire(self, worker: Worker, now: float) -> int | None:
        """Takes a lease for an idle worker out of the queue; returns None if there is none for it."""
        self._requeue_late(now)
        lease = self._choose(worker, now)
        if lease is None:
            return None
        self._unqueue(lease)
        self._running.setdefault(lease, _Running(now, set())).workers.add(worker)
        self._hold(worker, self._layout.locate(lease)[0])
        return lease

    def complete(self, lease: int, now: float) -> bool:
        """Records a result and returns whether it is the lease's first; all others are to be discarded."""
        running = self._running.pop(lease, None)
        if running is None:
            return False
        if lease in self._waiting_since:  # reissued as late, and no longer needed
            self._unqueue(lease)
        seconds = now - running.since
        typical = seconds if self.typical_seconds is None else self.typical_seconds
        self.typical_seconds = typical + _FORGETTING * (seconds - typical)
        self.num_done += 1
        return True

    def shards_held_by(self, worker: Worker) -> tuple[int, ...]:
        """Returns the shards that a worker may keep in memory, the latest last."""
        return tuple(self._shards.get(worker, ()))

    @property
    def num_waiting(self) -> int:
        """Leases in the queue."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Leases that workers are scoring."""
        return len(self._running)

    def _choose(self, worker: Worker, now: float) -> int | None:
        own = self._shards[worker]
        patience = PATIENCE_FACTOR * (self.typical_seconds or 0.0)
        for lease in self._waiting:
            if lease in self._running and worker in self._running[lease].workers:
                continue  # late with it already
            shard = self._layout.locate(lease)[0]
            if shard in own or not self._num_holders[shard] or now - self._waiting_since[lease] >= patience:
                return lease
        return None

    def _hold(self, worker: Worker, shard: int) -> None:
        """Records the worker's latest shard and drops its oldest, beyond twice its share: a bound on its memory."""
        shards = self._shards[worker]
        self._num_holders[shard] += shard not in shards
        shards[shard] = None
        shards.move_to_end(shard)
        while len(shards) > max(2, -(-2 * self._layout.num_shards // len(self._shards))):
            self._num_holders[shards.popitem(last=False)[0]] -= 1

    def _requeue_late(self, now: float) -> None:
        """Puts late leases back at the front of the queue, while their workers go on."""
        if self.typical_seconds is None or now - self._checked_at < LATE_SECONDS / 10:
            return
        self._checked_at = now
        limit = max(LATE_SECONDS, LATE_FACTOR * self.typical_seconds)
        for lease, running in self._running.items():
            if now - running.since > limit and lease not in self._waiting_since:
                running.since = now
                self._requeue(lease)

    def _withdraw(self, lease: int, worker: Worker) -> None:
        """Takes a running lease from a worker; reissues it if no other worker is scoring it."""
        running = self._running[lease]
        running.workers.discard(worker)
        if running.workers:
            return
        del self._running[lease]
        if lease in self._waiting_since:
            self._waiting_since[lease] = -math.inf
        else:
            self._requeue(lease)

    def _requeue(self, lease: int) -> None:
        self._waiting.appendleft(lease)
        self._waiting_since[lease] = -math.inf
        self.num_reissued += 1

    def _unqueue(self, lease: int) -> None:
        self._waiting.remove(lease)
        del self._waiting_since[lease]
