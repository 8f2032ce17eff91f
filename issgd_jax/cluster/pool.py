"""`WorkerPool` over many machines: the same calls, answered by a thread of its own that speaks with Ray.

Ray's calls may take as long as the network does, and the learner waits for nobody. So it only leaves copies of its
parameters and orders of rounds; all else happens in the event loop of that thread, where nothing needs a lock.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

from issgd_jax.cluster import machines
from issgd_jax.cluster.crew import LEASES_A_WORKER, Crew, where
from issgd_jax.cluster.leases import Layout
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.cluster.worker import Work
from issgd_jax.console import say
from issgd_jax.errors import InputError

# Until every worker is there, before training begins.
START_SECONDS = 120.0


class ClusterPool:
    """Keeps the machines of a Ray cluster busy. A context manager: inside it, it is a `WorkerPool`.

    Each machine has one worker, which drives all its devices, and loads only the shards that it scores. A worker that
    dies is started again, a machine that joins gets one; what a worker does not bring is scored by another, and counts
    once. A round is `chunk_size` examples by each of the workers that there were at the start.
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
        """Starts nothing yet.

        Args:
          make_work: called in every worker's process; pickled by value.
          chunk_size: examples a worker scores in a round.
          address: see `machines.connected`.
          num_workers: None = one on every machine but the learner's, also on those that join later.
          reproducible: whether a round is what it is asked for: of one step's parameters, and all workers' chunks. If
            not, it is one lease, and of the newest parameters there are when it begins.
          params_bytes: of the parameters, checked against the machines' object stores.

        Raises: ValueError if chunk_size is not in [1, num_examples].
        """
        Layout.of(num_examples, chunk_size=chunk_size, num_workers=1)  # fits, or does not, whoever comes
        self._make_work, self._num_examples, self._chunk_size = make_work, num_examples, chunk_size
        self._address, self._num_workers, self._reproducible = address, num_workers, reproducible
        self._params_bytes = params_bytes
        self._next_lease = 0
        self._error: BaseException | None = None

    def __enter__(self) -> "ClusterPool":
        """Connects, and waits until the workers are there.

        Raises: InputError that names the machine which does not fit; or if no worker comes at all.
        """
        with contextlib.ExitStack() as stack:
            stack.enter_context(machines.connected(self._address))
            found = machines.machines()
            machines.check_room(found, self._params_bytes)
            # Of the start: a round, and the cut of the data, stay the same when others join.
            self._width = len(machines.of_workers(found, self._num_workers))
            self._layout = Layout.of(self._num_examples, chunk_size=self._chunk_size, num_workers=self._width)
            self._crew = Crew(self._make_work, self._layout, found, self._num_workers)
            self._loop = asyncio.new_event_loop()
            self._task = self._loop.create_task(self._crew.work())
            self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._wait_for_workers()
            self._crew.has_started = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    @property
    def device_kinds(self) -> list[str]:
        """Of all devices that score."""
        return [kind for slot in self._crew.slots for kind in slot.devices]

    @property
    def rounds_per_sweep(self) -> int:
        """Rounds after which every example has been scored at least once."""
        return -(-self._layout.leases_per_sweep // self._leases_per_round)

    @property
    def rounds_ahead(self) -> int:
        """Rounds in flight that keep all workers busy, also those that came later."""
        return -(-(LEASES_A_WORKER + 1) * max(self._width, len(self._crew.slots)) // self._leases_per_round)

    @property
    def cursor(self) -> dict[str, int]:
        """Where the next round begins, as an example of a sweep."""
        return {"item": self._next_lease * self._chunk_size, "workers": 1}

    def seek(self, cursor: dict[str, int]) -> None:
        """Goes on at a place, also of a pool with another number of workers: at the same part of a sweep."""
        self._next_lease = cursor["item"] * cursor["workers"] // self._chunk_size

    def score_next(self, params, step: int, num_rounds: int = 1) -> list[LeasedRound]:
        """Orders rounds with the parameters of `step`, and returns at once. The parameters are copied, so that the
        caller may donate them."""
        self._check_thread()
        if num_rounds <= 0:
            return []
        # All machines are sent what the ones before them were, so that parameters go out once a round.
        newest = self._crew.newest
        if self._reproducible or newest is None or newest.num_served >= len(self._crew.slots):
            newest = self._crew.newest = Broadcast(step, params)
        rounds = []
        for _ in range(num_rounds):
            first, self._next_lease = self._next_lease, self._next_lease + self._leases_per_round
            leases = range(first, self._next_lease)
            rounds.append(LeasedRound(leases, newest if self._reproducible else None, self._layout))
        self._loop.call_soon_threadsafe(self._crew.order, rounds)
        return rounds

    def status(self) -> dict[str, Any]:
        """See `Crew.status`."""
        return self._crew.status()

    @property
    def _leases_per_round(self) -> int:
        return self._width if self._reproducible else 1

    def _check_thread(self) -> None:
        if self._error:
            raise RuntimeError("the thread of the cluster has ended") from self._error

    def _wait_for_workers(self) -> None:
        slots, end = self._crew.slots, time.monotonic() + START_SECONDS
        while time.monotonic() < end and any(not slot.alive and not slot.problem for slot in slots):
            self._check_thread()
            time.sleep(0.02)
        if problems := [slot.problem for slot in slots if slot.problem]:
            raise InputError("; ".join(problems))
        missing = [where(slot) for slot in slots if not slot.alive]
        if len(missing) == len(slots):
            raise InputError(
                f"none of the {len(missing)} worker(s) has started within {START_SECONDS:.0f} s: see `ray status`"
            )
        if missing:
            say(f"training begins without {', '.join(missing)}, not started within {START_SECONDS:.0f} s")

    def _run(self) -> None:
        """The thread."""
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # the learner is told at its next round
            self._error = error
        finally:
            self._crew.fail(self._error or RuntimeError("the cluster pool has been closed"))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
