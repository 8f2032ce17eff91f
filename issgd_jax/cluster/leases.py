"""Who scores which chunk: leases, handed out again if a worker dies or is late. No Ray, no clock, no threads."""

import collections
import dataclasses
import math
from collections.abc import Hashable

import numpy as np

Worker = Hashable

# A lease is late after so many times what leases usually take, but never before the seconds.
LATE_FACTOR, LATE_SECONDS = 5.0, 2.0
# So many times what leases usually take, one waits for a worker that holds its shard.
PATIENCE_FACTOR = 2.0
# Shards a worker: fine enough that what a worker leaves behind can be shared by the others.
SHARDS_A_WORKER = 4
_FORGET = 0.1  # of the usual duration, by every lease that ends


@dataclasses.dataclass(frozen=True)
class Layout:
    """How N examples are cut: into shards, neighbours together, and these into chunks, the last one moved back to fit.

    The lease of number j is of shard `j % num_shards`, whose chunks take turns.
    """

    num_examples: int
    num_shards: int
    chunk_size: int

    @classmethod
    def of(cls, num_examples: int, *, chunk_size: int, num_workers: int) -> "Layout":
        """As many shards as SHARDS_A_WORKER asks for, none smaller than a chunk, and each worker's share the same.

        Raises: ValueError if chunk_size is not in [1, num_examples].
        """
        if not 1 <= chunk_size <= num_examples:
            raise ValueError(f"chunk_size must be between 1 and {num_examples} (all examples), got {chunk_size}")
        a_worker = min(SHARDS_A_WORKER, num_examples // chunk_size // num_workers)
        return cls(num_examples, a_worker * num_workers or num_examples // chunk_size, chunk_size)

    def shard(self, number: int) -> tuple[int, int]:
        """The first example of a shard, and the one after its last; sizes differ by at most one."""
        return (
            number * self.num_examples // self.num_shards,
            (number + 1) * self.num_examples // self.num_shards,
        )

    def place(self, lease: int) -> tuple[int, int]:
        """(shard, first item of the chunk in it) of a lease."""
        turn, shard = divmod(lease, self.num_shards)
        start, stop = self.shard(shard)
        return shard, min(turn % self._chunks_a_shard * self.chunk_size, stop - start - self.chunk_size)

    def examples(self, lease: int) -> np.ndarray:
        """i32[chunk_size]: the examples of a lease's chunk, in the order of its scores."""
        shard, item = self.place(lease)
        return np.arange(self.chunk_size, dtype=np.int32) + (self.shard(shard)[0] + item)

    @property
    def leases_per_sweep(self) -> int:
        """Leases after which every example has been scored at least once."""
        return self.num_shards * self._chunks_a_shard

    @property
    def _chunks_a_shard(self) -> int:
        largest = -(-self.num_examples // self.num_shards)
        return -(-largest // self.chunk_size)


@dataclasses.dataclass
class _Out:
    """A lease that is being worked on: since when, and by whom."""

    since: float
    by: set[Worker]


class Leases:
    """Leases from their issue to their first result; each is done once, whoever else is still at it.

    The oldest first; but what lies in a shard that another holds is left to that one for a while. So each worker comes
    to hold its share of the data, and the share of one that is slow or gone is taken over.
    """

    def __init__(self, layout: Layout):
        self._layout = layout
        self._waiting: collections.deque[int] = collections.deque()
        self._since: dict[int, float] = {}  # when each waiting lease began to wait
        self._out: dict[int, _Out] = {}
        self._holds: dict[Worker, collections.OrderedDict[int, None]] = {}
        self._num_holders: collections.Counter[int] = collections.Counter()  # of each shard
        self._looked = -math.inf  # when late leases were last looked for
        self.usual_seconds: float | None = None
        self.num_done = self.num_reissued = 0

    def issue(self, lease: int, now: float) -> None:
        """A lease begins to wait for a worker."""
        self._waiting.append(lease)
        self._since[lease] = now

    def join(self, worker: Worker) -> None:
        """A worker that holds nothing yet."""
        self._holds[worker] = collections.OrderedDict()

    def leave(self, worker: Worker) -> None:
        """What the worker had goes to the others, before all else."""
        self._num_holders.subtract(list(self._holds.pop(worker, ())))
        for lease in sorted(self._out, reverse=True):
            out = self._out[lease]
            out.by.discard(worker)
            if not out.by:
                self._again(lease)

    def give_back(self, lease: int, worker: Worker) -> None:
        """The worker could not do it: others may."""
        if (out := self._out.get(lease)) and worker in out.by:
            out.by.discard(worker)
            if not out.by:
                self._again(lease)

    def offer(self, worker: Worker, now: float) -> int | None:
        """The lease that an idle worker is to do now, taken out of those that wait; None if there is none for it."""
        self._take_back_late(now)
        lease = self._choose(worker, now)
        if lease is None:
            return None
        self._waiting.remove(lease)
        del self._since[lease]
        self._out.setdefault(lease, _Out(now, set())).by.add(worker)
        self._hold(worker, self._layout.place(lease)[0])
        return lease

    def done(self, lease: int, now: float) -> bool:
        """Whether this is the lease's first result; all later ones are to be dropped."""
        out = self._out.pop(lease, None)
        if out is None:
            return False
        if lease in self._since:  # late, and now superfluous
            self._waiting.remove(lease)
            del self._since[lease]
        took = now - out.since
        usual = took if self.usual_seconds is None else self.usual_seconds
        self.usual_seconds = usual + _FORGET * (took - usual)
        self.num_done += 1
        return True

    def held_by(self, worker: Worker) -> tuple[int, ...]:
        """The shards that a worker may keep, the latest last; what it has besides it should let go."""
        return tuple(self._holds.get(worker, ()))

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_out(self) -> int:
        return len(self._out)

    def _choose(self, worker: Worker, now: float) -> int | None:
        own = self._holds[worker]
        patience = PATIENCE_FACTOR * (self.usual_seconds or 0.0)
        for lease in self._waiting:
            if lease in self._out and worker in self._out[lease].by:
                continue  # late with it already
            shard = self._layout.place(lease)[0]
            if shard in own or not self._num_holders[shard] or now - self._since[lease] >= patience:
                return lease
        return None

    def _hold(self, worker: Worker, shard: int) -> None:
        """No more than twice its share, so that a worker's memory has a bound."""
        holds = self._holds[worker]
        self._num_holders[shard] += shard not in holds
        holds[shard] = None
        holds.move_to_end(shard)
        while len(holds) > max(2, -(-2 * self._layout.num_shards // len(self._holds))):
            self._num_holders[holds.popitem(last=False)[0]] -= 1

    def _take_back_late(self, now: float) -> None:
        if self.usual_seconds is None or now - self._looked < LATE_SECONDS / 10:
            return
        self._looked = now
        limit = max(LATE_SECONDS, LATE_FACTOR * self.usual_seconds)
        for lease, out in self._out.items():
            if now - out.since > limit and lease not in self._since:
                out.since = now
                self._waiting.appendleft(lease)
                self._since[lease] = -math.inf
                self.num_reissued += 1

    def _again(self, lease: int) -> None:
        del self._out[lease]
        if lease not in self._since:
            self._waiting.appendleft(lease)
            self.num_reissued += 1
        self._since[lease] = -math.inf
