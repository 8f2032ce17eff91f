"""Dispatcher: starts, checks and restarts workers and gives them leases, all in one event loop."""

import asyncio
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from issgd_jax.cluster import machines
from issgd_jax.cluster.channel import Packed
from issgd_jax.cluster.leases import Layout, Leases
from issgd_jax.cluster.slot import Slot
from issgd_jax.cluster.worker import versions
from issgd_jax.errors import InputError, brief

# Two, so that the next lease is on its way while a worker scores one.
LEASES_PER_WORKER = 2
# Shortest and longest delay before a lost worker is restarted; doubled after each worker that completes no lease.
BACKOFF_SECONDS = (1.0, 30.0)
# Leases that fail in a row before the worker is restarted; processes that die in a row before they have started.
MAX_FAILURES = 3
# Shortest and longest time between two messages about workers that are missing; doubled after each.
TELL_SECONDS = (10.0, 60.0)
_NUM_NAMED = 3  # of the missing workers, in one message
_POLL_SECONDS = 0.05  # until an idle worker asks again
_WATCH_SECONDS = 1.0


@dataclasses.dataclass
class Parameters:
    """Parameters of one step in Ray's object store.

    Attributes:
      number: of the broadcast, from 0.
      step: learner step of the parameters.
      reference: Ray's.
      num_bytes: their size.
      num_served: leases that began with them.
      is_served: whether as many began as there are workers, of which the learner is told.
      workers: names of the workers that have fetched them.
    """

    number: int
    step: int
    reference: Any
    num_bytes: int
    num_served: int = 0
    is_served: bool = False
    workers: set[str] = dataclasses.field(default_factory=set)


class _RefusedError(Exception):
    """A worker must not score: its machine has other versions, or lacks the data."""


class Dispatcher:
    """Keeps the workers of a cluster supplied with leases.

    One worker runs on each machine, also on those that join later; or `num_workers` where Ray places them.
    Everything must be called in the event loop.

    Args:
      make_work: packed; called in every worker process.
      layout: partition of the examples.
      cluster: the machines at the start.
      num_workers: None: one on each machine except the learner's.
      send: called with what the learner is to know: `("say", message)`, `("scores", lease, step, scores)`, and
        `("served", number)` of parameters that every worker has been given.
      start_seconds: longest wait for workers while there is none.
      niceness: see `Worker`.

    Attributes:
      slots: one for each worker.
      newest: latest parameters, for leases that have none of their own.
      has_started: whether training has begun; from then on problems are logged, and no longer raised.
    """

    def __init__(
        self,
        make_work: Packed,
        layout: Layout,
        cluster: Sequence[machines.Machine],
        num_workers: int | None,
        *,
        send: Callable[[tuple], None],
        start_seconds: float,
        niceness: int = 0,
    ):
        self._work, self._layout, self._cluster = (make_work, layout, niceness), layout, cluster
        self._one_per_machine, self._numbers = num_workers is None, itertools.count()
        self._send, self._start_seconds = send, start_seconds
        self.slots = [self._make_slot(machine) for machine in machines.place_workers(cluster, num_workers)]
        self.newest: Parameters | None = None
        self.has_started = False
        self._leases = Leases(layout)
        self._parameters: dict[int, Parameters | None] = {}  # of each lease without a result; None: the newest
        self._bytes_out = self._bytes_in = self._num_broadcasts = self._num_discarded = 0
        self._began = time.monotonic()
        self._changed = asyncio.Event()  # replaced whenever a lease may have become available

    def _make_slot(self, machine: machines.Machine | None) -> Slot:
        return Slot(f"worker {next(self._numbers)}", machine)

    def _say(self, message: str) -> None:
        self._send(("say", message))

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
        """Runs all workers until it is cancelled.

        Raises:
          InputError: a lease that must be scored with its own parameters has waited for start_seconds, and no worker
            is alive.
        """
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch_missing())
                for slot in self.slots:
                    group.create_task(self._keep_running(slot))
                if self._one_per_machine:
                    group.create_task(self._watch_machines(group))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def wait_for_workers(self) -> None:
        """Waits until all workers score, or start_seconds are over.

        Raises:
          InputError: a machine cannot be used, naming it; or no worker has started.
        """
        end = time.monotonic() + self._start_seconds
        while time.monotonic() < end and any(not slot.alive and not slot.problem for slot in self.slots):
            await asyncio.sleep(_POLL_SECONDS)
        if problems := [slot.problem for slot in self.slots if slot.problem]:
            raise InputError("; ".join(problems))
        missing = [slot for slot in self.slots if not slot.alive]
        if missing and len(missing) == len(self.slots):
            raise InputError(await self._none_has_started())
        if missing:
            self._say(
                f"training begins without {await self._describe(missing)}; they join when they have started. Ray's "
                f"logs are in {machines.log_folder()}"
            )

    async def _none_has_started(self) -> str:
        return (
            f"none of the {len(self.slots)} worker(s) has started within {self._start_seconds:g} s: "
            f"{await self._describe(self.slots)}; see `ray status`, and Ray's logs in {machines.log_folder()}"
        )

    def submit(self, parameters: Parameters, leases: list[int], fixed: bool) -> None:
        """Issues leases.

        Args:
          parameters: the latest; a new broadcast, or the one before.
          leases: their numbers.
          fixed: whether they must be scored with these parameters, and not with the newest when each begins.
        """
        self._num_broadcasts += parameters is not self.newest
        self.newest = parameters
        for lease in leases:
            self._parameters[lease] = parameters if fixed else None
            self._leases.issue(lease, time.monotonic())
        self._notify()

    def _notify(self) -> None:
        """Wakes all workers that wait for a lease."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _watch_missing(self) -> None:
        """Logs who is missing, for how long, and why; ends a wait that has no end."""
        shortest, longest = TELL_SECONDS
        interval, told_at = shortest, time.monotonic()
        last_alive = told_at
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            now = time.monotonic()
            if any(slot.alive for slot in self.slots):
                last_alive = now
            missing = [slot for slot in self.slots if not slot.alive and not slot.problem]
            overdue = [slot for slot in missing if now - slot.missing_since >= shortest]
            if not overdue:
                interval, told_at = shortest, now - shortest
            elif now - told_at >= interval:
                interval, told_at = min(longest, 2 * interval), now
                self._say(f"waiting for {await self._describe(overdue)}")
            is_awaited = any(self._parameters.values())  # by a schedule that waits
            if is_awaited and now - last_alive > self._start_seconds:
                raise InputError(await self._none_has_started())

    async def _describe(self, missing: list[Slot]) -> str:
        """Returns who is missing, for how long, and why."""
        now, texts = time.monotonic(), []
        for slot in missing[:_NUM_NAMED]:
            why = slot.problem or "it restarts soon"
            if slot.actor is not None:
                why = await asyncio.to_thread(machines.explain_start, slot.actor, slot.machine)
            texts.append(f"{slot.label} ({now - slot.missing_since:.0f} s: {why})")
        more = [f"{len(missing) - _NUM_NAMED} more"] if len(missing) > _NUM_NAMED else []
        return ", ".join([*texts, *more])

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
        num_deaths = 0  # in a row, of processes that had not started
        while True:
            num_leases, reason = slot.num_leases, None
            try:
                await self._run_worker(slot)
            except _RefusedError as error:
                if self.has_started and not slot.problem:
                    self._say(f"{slot.name} is not used: {error}")
                slot.problem = str(error)
            except RayError as error:
                reason = _reason(error)
                num_deaths = 0 if slot.alive else num_deaths + 1
                if not slot.has_started and (reason != _DIED or num_deaths >= MAX_FAILURES):
                    slot.problem = (
                        f"{slot.label} cannot start: {reason}; see the newest worker-*.err and raylet.out there in "
                        f"{machines.log_folder()}"
                    )
            if slot.alive:
                slot.alive, slot.missing_since = False, time.monotonic()
            if slot.machine and slot.machine.node not in {machine.node for machine in await self._list_machines()}:
                self._say(f"{slot.label} is lost: its machine has left the cluster")
                self.slots.remove(slot)
                return
            delay = shortest if slot.num_leases > num_leases else min(longest, max(shortest, 2 * delay))
            if reason and (self.has_started or not slot.problem):
                slot.restarts += 1
                self._say(f"{slot.label} is lost and restarts in {delay:.0f} s ({reason})")
            await asyncio.sleep(delay)

    async def _run_worker(self, slot: Slot) -> None:
        """Starts a worker and gives it leases until it is lost; raises RayError or _RefusedError."""
        actor = slot.actor = machines.start_worker(slot.machine, *self._work)
        worker = object()
        try:
            slot.handshake = await actor.handshake.remote()
            await self._check(slot, actor)
            slot.alive, slot.has_started, slot.problem = True, True, None
            self._leases.add_worker(worker)
            raise await _first_error([self._serve(slot, actor, worker) for _ in range(LEASES_PER_WORKER)])
        finally:
            slot.actor = None
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
                self._say(f"{slot.label} has failed to score, others try: {brief(error.cause)}")
                if num_failures == MAX_FAILURES:
                    raise
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
            del self._parameters[lease]
            self._send(("scores", lease, step, scores))
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
        parameters = self._parameters[lease] or self.newest
        parameters.num_served += 1
        if parameters.num_served >= len(self.slots) and not parameters.is_served:
            parameters.is_served = True
            self._send(("served", parameters.number))
        if slot.name not in parameters.workers:
            parameters.workers.add(slot.name)
            self._bytes_out += parameters.num_bytes
        shards = self._leases.shards_held_by(worker)
        scores = await actor.score.remote(parameters.reference, parameters.number, lease, shards)
        return parameters.step, scores


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


_DIED = "its process has died"


def _reason(error: Exception) -> str:
    import ray

    died = isinstance(error, ray.exceptions.ActorDiedError) and not isinstance(error.__cause__, Exception)
    return _DIED if died else brief(error)
