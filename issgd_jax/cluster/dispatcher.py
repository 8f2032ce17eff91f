"""Dispatcher: starts, checks and restarts workers and gives them leases, all in one event loop."""

import asyncio
import contextlib
import dataclasses
import itertools
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import jax
import numpy as np

from issgd_jax.cluster import machines
from issgd_jax.cluster.leases import Layout, Leases
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.cluster.worker import Handshake, Work, versions
from issgd_jax.console import say
from issgd_jax.errors import brief

# Two, so that the next lease is on its way while a worker scores one.
LEASES_PER_WORKER = 2
# Shortest and longest delay before a lost worker is restarted; doubled after each worker that completes no lease.
BACKOFF_SECONDS = (1.0, 30.0)
# Leases that fail in a row before the worker is restarted.
MAX_FAILURES = 3
_POLL_SECONDS = 0.05  # until an idle worker asks again
_WATCH_SECONDS = 1.0


@dataclasses.dataclass
class Slot:
    """Place of one worker, which keeps its name and its counts over restarts.

    Attributes:
      name: "worker 0" and so on.
      machine: where the worker runs; None: Ray chooses.
      handshake: of the latest worker process.
      devices: kinds of its devices.
      alive: whether it scores.
      num_leases: leases completed.
      restarts: worker processes that were lost.
      last_seen: time of the latest result, in seconds.
      problem: why no worker can run here.
    """

    name: str
    machine: machines.Machine | None
    handshake: Handshake | None = None
    devices: list[str] = dataclasses.field(default_factory=list)
    alive: bool = False
    num_leases: int = 0
    restarts: int = 0
    last_seen: float | None = None
    problem: str | None = None

    @property
    def label(self) -> str:
        """The worker and its machine, for messages."""
        place = self.handshake.machine if self.handshake else self.machine.name if self.machine else "no machine yet"
        return f"{self.name} on {place}"

    def status(self, now: float) -> dict[str, Any]:
        """Returns the row of this worker in `Dispatcher.status`."""
        return {
            "worker": self.name,
            "machine": self.handshake.machine if self.handshake else None,
            "process": self.handshake.process if self.handshake else None,
            "devices": self.devices,
            "alive": self.alive,
            "leases": self.num_leases,
            "restarts": self.restarts,
            "seconds_since_last_result": None if self.last_seen is None else round(now - self.last_seen, 1),
            "problem": self.problem,
        }


class _RefusedError(Exception):
    """A worker must not score: its machine has other versions, or lacks the data."""


class Dispatcher:
    """Keeps the workers of a cluster supplied with leases.

    One worker runs on each machine, also on those that join later; or `num_workers` where Ray places them.
    Only `run` and `submit` must be called in the event loop; everything else may be read from any thread.

    Args:
      make_work: called in every worker process; pickled by value.
      layout: partition of the examples.
      cluster: the machines at the start.
      num_workers: None: one on each machine except the learner's.

    Attributes:
      slots: one for each worker.
      newest: latest parameters, for rounds that have none of their own.
      has_started: whether training has begun; from then on problems are logged, and no longer raised by the pool.
    """

    def __init__(
        self,
        make_work: Callable[[], Work],
        layout: Layout,
        cluster: Sequence[machines.Machine],
        num_workers: int | None,
    ):
        self._make_work, self._layout, self._cluster = make_work, layout, cluster
        self._one_per_machine, self._numbers = num_workers is None, itertools.count()
        self.slots = [self._make_slot(machine) for machine in machines.place_workers(cluster, num_workers)]
        self.newest: Broadcast | None = None
        self.has_started = False
        self._leases = Leases(layout)
        self._rounds: dict[int, LeasedRound] = {}  # of each lease without a result
        self._bytes_out = self._bytes_in = self._num_broadcasts = self._num_discarded = 0
        self._began = time.monotonic()
        self._changed = asyncio.Event()  # replaced whenever a lease may have become available

    def _make_slot(self, machine: machines.Machine | None) -> Slot:
        return Slot(f"worker {next(self._numbers)}", machine)

    def fail(self, error: BaseException) -> None:
        """Makes every reader of an unfinished round raise this error."""
        for round_ in self._rounds.values():
            round_.fail(error)

    def status(self) -> dict[str, Any]:
        """Returns workers, leases, bytes and ages, as JSON values; see `status.describe`."""
        now = time.monotonic()
        return {
            "seconds": round(now - self._began, 1),
            "workers": [slot.status(now) for slot in self.slots],
            "broadcasts": self._num_broadcasts,
            "broadcast_step": self.newest.step if self.newest else None,
            "leases_done": self._leases.num_done,
            "leases_waiting": self._leases.num_waiting,
            "leases_running": self._leases.num_running,
            "leases_reissued": self._leases.num_reissued,
            "results_discarded": self._num_discarded,
            "typical_lease_seconds": self._leases.typical_seconds,
            "bytes_out": self._bytes_out,
            "bytes_in": self._bytes_in,
        }

    async def run(self) -> None:
        """Runs all workers until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for slot in self.slots:
                group.create_task(self._keep_running(slot))
            if self._one_per_machine:
                group.create_task(self._watch_machines(group))

    def submit(self, rounds: list[LeasedRound]) -> None:
        """Issues the leases of these rounds."""
        for round_ in rounds:
            for lease in round_.leases:
                self._rounds[lease] = round_
                self._leases.issue(lease, time.monotonic())
        self._notify()

    def _notify(self) -> None:
        """Wakes all workers that wait for a lease."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch_machines(self, group: asyncio.TaskGroup) -> None:
        """Starts a worker on every machine that joins."""
        while True:
            known = {slot.machine.node for slot in self.slots}
            for machine in await self._list_machines():
                if machine.node not in known and not machine.is_here:
                    slot = self._make_slot(machine)
                    self.slots.append(slot)
                    group.create_task(self._keep_running(slot))
            await asyncio.sleep(_WATCH_SECONDS)

    async def _list_machines(self) -> Sequence[machines.Machine]:
        """Returns the machines that are alive; the last ones known while the cluster does not answer."""
        with contextlib.suppress(Exception):  # of many kinds, and it may answer again
            self._cluster = await asyncio.to_thread(machines.list_machines)
        return self._cluster

    async def _keep_running(self, slot: Slot) -> None:
        """Runs one worker after the other in a slot, until its machine leaves the cluster."""
        from ray.exceptions import RayError

        delay, (shortest, longest) = 0.0, BACKOFF_SECONDS
        while True:
            num_leases, reason = slot.num_leases, None
            try:
                await self._run_worker(slot)
            except _RefusedError as error:
                if self.has_started and not slot.problem:
                    say(f"{slot.name} is not used: {error}")
                slot.problem = str(error)
            except RayError as error:
                reason = _reason(error)
                if slot.handshake is None:  # no worker has ever started here: the next one would fail too
                    slot.problem = f"{slot.label} cannot start: {reason}"
            slot.alive = False
            if slot.machine and slot.machine.node not in {machine.node for machine in await self._list_machines()}:
                say(f"{slot.label} is lost: its machine has left the cluster")
                self.slots.remove(slot)
                return
            delay = shortest if slot.num_leases > num_leases else min(longest, max(shortest, 2 * delay))
            if reason and (self.has_started or not slot.problem):
                slot.restarts += 1
                say(f"{slot.label} is lost and restarts in {delay:.0f} s ({reason})")
            await asyncio.sleep(delay)

    async def _run_worker(self, slot: Slot) -> None:
        """Starts a worker and gives it leases until it is lost; raises RayError or _RefusedError."""
        actor = machines.start_worker(slot.machine, self._make_work, self._layout)
        worker = object()
        try:
            slot.handshake = await actor.handshake.remote()
            await self._check(slot, actor)
            slot.alive, slot.problem = True, None
            self._leases.add_worker(worker)
            raise await _first_error([self._serve(slot, actor, worker) for _ in range(LEASES_PER_WORKER)])
        finally:
            self._leases.remove_worker(worker)
            self._notify()
            machines.stop_worker(actor)

    async def _check(self, slot: Slot, actor) -> None:
        """Raises _RefusedError unless a worker's versions and data equal the learner's."""
        import ray

        machine, installed, expected = slot.handshake.machine, slot.handshake.versions, versions()
        different = [
            f"{name} {installed[name]} where the learner has {expected[name]}"
            for name in expected
            if installed[name] != expected[name]
        ]
        if different:
            raise _RefusedError(f"machine {machine} has {', '.join(different)}: install the same on all machines")
        try:
            num_examples, slot.devices = await actor.prepare.remote()
        except ray.exceptions.RayTaskError as error:
            raise _RefusedError(f"machine {machine} cannot do the work: {brief(error.cause)}") from error
        if num_examples != self._layout.num_examples:
            raise _RefusedError(
                f"machine {machine} has {num_examples:,} training examples where the learner has "
                f"{self._layout.num_examples:,}: give it the same data"
            )

    async def _serve(self, slot: Slot, actor, worker) -> None:
        """Gives a worker one lease after the other; raises RayError if it is lost or keeps failing."""
        import ray

        num_failures = 0
        while True:
            lease = await self._acquire(worker)
            try:
                step, scores = await self._score(slot, actor, worker, lease)
            except ray.exceptions.RayTaskError as error:  # of the worker's code; its process still runs
                num_failures += 1
                self._leases.release(lease, worker)
                say(f"{slot.label} has failed to score, others try: {brief(error.cause)}")
                if num_failures == MAX_FAILURES:
                    raise
                await asyncio.sleep(BACKOFF_SECONDS[0])
            except ray.exceptions.ObjectStoreFullError as error:
                self._leases.release(lease, worker)
                here = socket.gethostname()
                say(f"the parameters do not fit the object store of {here}, training continues: {brief(error)}")
                await asyncio.sleep(BACKOFF_SECONDS[0])
            else:
                num_failures = 0
                self._complete(slot, lease, step, scores)

    def _complete(self, slot: Slot, lease: int, step: int, scores: np.ndarray) -> None:
        """Counts a result, and enters it into its round if it is the lease's first."""
        slot.num_leases += 1
        slot.last_seen = time.monotonic()
        self._bytes_in += scores.nbytes
        if self._leases.complete(lease, slot.last_seen):
            self._rounds.pop(lease).add_scores(lease, step, scores)
        else:
            self._num_discarded += 1
        self._notify()

    async def _acquire(self, worker) -> int:
        """Waits for a lease."""
        while (lease := self._leases.acquire(worker, time.monotonic())) is None:
            # Not wait_for: before Python 3.12 it ignores a cancellation that arrives together with the event.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_SECONDS):
                    await self._changed.wait()
        return lease

    async def _score(self, slot: Slot, actor, worker, lease: int) -> tuple[int, np.ndarray]:
        """Has a worker score a lease; returns the step of the parameters, and the scores."""
        broadcast = self._rounds[lease].broadcast or self.newest
        broadcast.num_served += 1
        if broadcast.reference is None:
            broadcast.reference = asyncio.ensure_future(asyncio.to_thread(_put, broadcast.params))
            self._num_broadcasts += 1
        try:
            reference = await asyncio.shield(broadcast.reference)
            broadcast.params = None  # they are in Ray's object store
        except Exception:
            broadcast.reference = None
            raise
        if slot.name not in broadcast.workers:
            broadcast.workers.add(slot.name)
            self._bytes_out += broadcast.num_bytes
        scores = await actor.score.remote(reference, broadcast.step, lease, self._leases.shards_held_by(worker))
        return broadcast.step, scores


def _put(params):
    """Copies parameters into Ray's object store."""
    import ray

    return ray.put(jax.device_get(params))


async def _first_error(endless: list[Coroutine]) -> BaseException:
    """Runs coroutines that end only by an error; returns the first error and cancels the others.

    Neither TaskGroup nor gather: before Python 3.13 they ignore a cancellation that arrives together with an error.
    """
    tasks = [asyncio.create_task(coroutine) for coroutine in endless]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done.pop().exception()


def _reason(error: Exception) -> str:
    import ray

    died = isinstance(error, ray.exceptions.ActorDiedError) and not isinstance(error.__cause__, Exception)
    return "its process has died" if died else brief(error)
