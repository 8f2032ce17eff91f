"""Worker pool on the machines of a Ray cluster, with the interface of `scoring.workers.WorkerPool`.

Ray's calls may take as long as the network does, and the learner must never wait for them. It only copies parameters
and submits rounds; everything else happens in another process, the driver, whose loss costs the learner no step.
"""

from collections.abc import Callable
from typing import Any

from issgd_jax.cluster import channel, link, machines
from issgd_jax.cluster.dispatcher import LEASES_PER_WORKER
from issgd_jax.cluster.driver import Plan
from issgd_jax.cluster.leases import Layout
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.cluster.worker import Work

# Longest wait for workers while there is none.
START_SECONDS = 300.0


class ClusterPool:
    """Keeps the machines of a Ray cluster busy; a context manager, in which it is used like a `WorkerPool`.

    Each machine has one worker, which drives all its devices and loads only the shards that it scores. A round is one
    chunk for each of the workers of the start; or, if it need not be reproducible, one chunk.

    Args:
      make_work: called in every worker process; pickled by value.
      num_examples: N.
      chunk_size: examples in a chunk, in [1, N].
      address: of the cluster, see `machines.connected`.
      num_workers: None: one on each machine except the learner's, also on machines that join later.
      reproducible: whether a round must be scored with the parameters that it was submitted with, and not with the
        newest when it begins.
      params_bytes: size of the parameters, checked against the object stores of the machines.

    Guarantees:
      A worker that dies is restarted, and Ray too. A lease that its worker does not complete is scored by another, and
      counts once. Where no worker can be had any more, a round raises ClusterLostError.

    Raises:
      ValueError: chunk_size is out of range.

    Example:
      >>> pool = ClusterPool(make_work, num_examples=60_000, chunk_size=256, address="auto")  # doctest: +SKIP
      >>> with pool:  # doctest: +SKIP
      ...     (round_,) = pool.score_next(params, step=0)
      ...     print(round_.indices, round_.scores)
    """

    def __init__(
        self,
        make_work: Callable[[], Work],
        *,
        num_examples: int,
        chunk_size: int,
        address: str = machines.LOCAL,
        num_workers: int | None = None,
        reproducible: bool = True,
        params_bytes: int = 0,
    ):
        Layout.create(num_examples, chunk_size=chunk_size, num_workers=1)  # checks chunk_size
        self._make_work, self._num_examples, self._chunk_size = make_work, num_examples, chunk_size
        self._address, self._num_workers, self._reproducible = address, num_workers, reproducible
        self._params_bytes = params_bytes
        self._next_lease = 0

    def __enter__(self) -> "ClusterPool":
        """Connects, and waits until the workers have started.

        Raises:
          InputError: a machine cannot be used, naming it; or no worker has started.
        """
        address = machines.address_of_this_process(self._address)
        self._link = link.Link(
            Plan(
                channel.pack(self._make_work),
                self._num_examples,
                self._chunk_size,
                self._num_workers,
                address,
                self._params_bytes,
                START_SECONDS,
                link.code_folders(),
            )
        )
        try:
            self._link.start()
        except BaseException:
            self._link.close()
            raise
        self._width, self._layout = self._link.width, self._link.layout
        return self

    def __exit__(self, *exception):
        self._link.close()

    @property
    def device_kinds(self) -> list[str]:
        """Kinds of all worker devices."""
        return [kind for worker in self.status()["workers"] for kind in worker["devices"]]

    @property
    def rounds_per_sweep(self) -> int:
        """Rounds after which every example has been scored at least once."""
        return -(-self._layout.leases_per_sweep // self._leases_per_round)

    @property
    def rounds_ahead(self) -> int:
        """Rounds in flight that keep all present workers busy."""
        num_workers = max(self._width, len(self.status()["workers"]))
        return -(-(LEASES_PER_WORKER + 1) * num_workers // self._leases_per_round)

    @property
    def cursor(self) -> dict[str, int]:
        """Where the next round begins: its first example in the order of a sweep."""
        return {"item": self._next_lease * self._chunk_size, "workers": 1}

    def seek(self, cursor: dict[str, int]) -> None:
        """Moves to a cursor, also of a pool with another number of workers, at the same fraction of a sweep."""
        self._next_lease = cursor["item"] * cursor["workers"] // self._chunk_size

    def score_next(self, params, step: int, num_rounds: int = 1) -> list[LeasedRound]:
        """Submits rounds and returns at once.

        Args:
          params: pytree of arrays; copied, so that the caller may donate them.
          step: learner step of the parameters.
          num_rounds: how many.

        Raises:
          ClusterLostError: no worker can be had any more.
        """
        if num_rounds <= 0:
            return []
        # All workers get the same parameters before there are new ones: one broadcast a round.
        newest = self._link.newest
        if self._reproducible or newest is None or newest.is_served:
            newest = self._link.newest = Broadcast(step, params)
        rounds = []
        for _ in range(num_rounds):
            first, self._next_lease = self._next_lease, self._next_lease + self._leases_per_round
            leases = range(first, self._next_lease)
            rounds.append(LeasedRound(leases, newest if self._reproducible else None, self._layout))
        self._link.submit(rounds)
        return rounds

    def status(self) -> dict[str, Any]:
        """Returns workers, leases, bytes and ages of at most a second ago, as JSON values; see `status.describe`."""
        return self._link.status()

    @property
    def _leases_per_round(self) -> int:
        return self._width if self._reproducible else 1
