"""Worker pool on the machines of a Ray cluster, with the interface of `scoring.workers.WorkerPool`.

Ray's calls may take as long as the network does, and the learner must never wait for them. It only copies parameters
and submits rounds; everything else happens in the event loop of another thread, where nothing needs a lock.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from issgd_jax.cluster import machines
from issgd_jax.cluster.dispatcher import LEASES_PER_WORKER, Dispatcher
from issgd_jax.cluster.leases import Layout
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.cluster.worker import Work
from issgd_jax.console import say
from issgd_jax.errors import InputError

# Longest wait for the workers before training begins.
START_SECONDS = 120.0
_POLL_SECONDS = 0.02


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
      A worker that dies is restarted. A lease that its worker does not complete is scored by another, and counts once.

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
        self._error: BaseException | None = None

    def __enter__(self) -> "ClusterPool":
        """Connects, and waits until the workers have started.

        Raises:
          InputError: a machine cannot be used, naming it; or no worker has started.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(machines.connected(self._address))
            cluster = machines.list_machines()
            machines.check_object_stores(cluster, self._params_bytes)
            # Fixed: rounds and shards must not change when machines join.
            self._width = len(machines.place_workers(cluster, self._num_workers))
            self._layout = Layout.create(self._num_examples, chunk_size=self._chunk_size, num_workers=self._width)
            self._dispatcher = Dispatcher(self._make_work, self._layout, cluster, self._num_workers)
            self._loop = asyncio.new_event_loop()
            self._task = self._loop.create_task(self._dispatcher.run())
            self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._wait_for_workers()
            self._dispatcher.has_started = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    @property
    def device_kinds(self) -> list[str]:
        """Kinds of all worker devices."""
        return [kind for slot in self._dispatcher.slots for kind in slot.devices]

    @property
    def rounds_per_sweep(self) -> int:
        """Rounds after which every example has been scored at least once."""
        return -(-self._layout.leases_per_sweep // self._leases_per_round)

    @property
    def rounds_ahead(self) -> int:
        """Rounds in flight that keep all present workers busy."""
        return -(-(LEASES_PER_WORKER + 1) * max(self._width, len(self._dispatcher.slots)) // self._leases_per_round)

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
          RuntimeError: the thread of the pool has ended with an error.
        """
        self._check_thread()
        if num_rounds <= 0:
            return []
        # All workers get the same parameters before there are new ones: one broadcast a round.
        newest = self._dispatcher.newest
        if self._reproducible or newest is None or newest.num_served >= len(self._dispatcher.slots):
            newest = self._dispatcher.newest = Broadcast(step, params)
        rounds = []
        for _ in range(num_rounds):
            first, self._next_lease = self._next_lease, self._next_lease + self._leases_per_round
            leases = range(first, self._next_lease)
            rounds.append(LeasedRound(leases, newest if self._reproducible else None, self._layout))
        self._loop.call_soon_threadsafe(self._dispatcher.submit, rounds)
        return rounds

    def status(self) -> dict[str, Any]:
        """Returns workers, leases, bytes and ages, as JSON values; see `status.describe`."""
        return self._dispatcher.status()

    @property
    def _leases_per_round(self) -> int:
        return self._width if self._reproducible else 1

    def _check_thread(self) -> None:
        if self._error:
            raise RuntimeError("the thread of the cluster has ended") from self._error

    def _wait_for_workers(self) -> None:
        slots, end = self._dispatcher.slots, time.monotonic() + START_SECONDS
        while time.monotonic() < end and any(not slot.alive and not slot.problem for slot in slots):
            self._check_thread()
            time.sleep(_POLL_SECONDS)
        if problems := [slot.problem for slot in slots if slot.problem]:
            raise InputError("; ".join(problems))
        missing = [slot.label for slot in slots if not slot.alive]
        if len(missing) == len(slots):
            raise InputError(
                f"none of the {len(missing)} worker(s) has started within {START_SECONDS:.0f} s: see `ray status`"
            )
        if missing:
            say(f"training begins without {', '.join(missing)}, not started within {START_SECONDS:.0f} s")

    def _run(self) -> None:
        """Runs the event loop, in the pool's own thread."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # raised in the learner's thread, by its next round
            self._error = error
        finally:
            self._dispatcher.fail(self._error or RuntimeError("the cluster pool has been closed"))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
