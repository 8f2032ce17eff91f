"""The workers that there are: started, checked, given leases, started again. All of it happens in one event loop."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import jax
import numpy as np

from issgd_jax.cluster import machines
from issgd_jax.cluster.leases import Layout, Leases
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.cluster.worker import Hello, Work, versions
from issgd_jax.console import say
from issgd_jax.errors import brief

# Leases that a worker has at a time: while it does one, the next is on its way.
LEASES_A_WORKER = 2
# Before a worker that was lost is started again: doubled from one to the other while it does not do a single lease.
BACKOFF_SECONDS = (1.0, 30.0)
# Leases that fail one after the other, before the worker is started again.
MAX_FAILURES = 3
_LOOK_SECONDS = 0.05  # until an idle worker asks again
_WATCH_SECONDS = 1.0


@dataclasses.dataclass
class Slot:
    """A place for a worker, and what became of those that had it. machine: None = wherever there is room."""

    name: str
    machine: machines.Machine | None
    hello: Hello | None = None
    devices: list[str] = dataclasses.field(default_factory=list)
    alive: bool = False
    num_leases: int = 0
    restarts: int = 0
    last_seen: float | None = None
    problem: str | None = None


class _Unfit(Exception):
    """A worker that must not score: its machine has another version, or not the data."""


class Crew:
    """Keeps workers at their leases. `order` and `work` belong to the event loop; all else may be read from anywhere.

    Its workers are one on each of the machines, and of those that join later; or `num_workers`, wherever there is room.

    slots: a place for each worker. newest: the parameters that leases begin with whose round does not say which.
    has_started: whether training has begun, so that what goes wrong is told and not raised.
    """

    def __init__(
        self, make_work: Callable[[], Work], layout: Layout, found: list[machines.Machine], num_workers: int | None
    ):
        """found: the machines that there are."""
        self._make_work, self._layout, self._found = make_work, layout, found
        self._one_a_machine, self._numbers = num_workers is None, itertools.count()
        self.slots = [self._slot(machine) for machine in machines.of_workers(found, num_workers)]
        self.newest: Broadcast | None = None
        self.has_started = False
        self._leases = Leases(layout)
        self._rounds: dict[int, LeasedRound] = {}
        self._bytes_out = self._bytes_in = self._num_broadcasts = self._num_superfluous = 0
        self._began = time.monotonic()
        self._news = asyncio.Event()
        self._board = machines.make_board()

    def _slot(self, machine: machines.Machine | None) -> Slot:
        return Slot(f"worker {next(self._numbers)}", machine)

    def fail(self, error: BaseException) -> None:
        """Nobody will score what has been ordered."""
        for round_ in self._rounds.values():
            round_.fail(error)
        machines.stop(self._board)

    def status(self) -> dict[str, Any]:
        """Workers, rounds, bytes, ages, restarts: what `python -m issgd_jax.cluster status` shows."""
        now = time.monotonic()
        workers = [
            {
                "worker": slot.name,
                "machine": slot.hello.machine if slot.hello else None,
                "process": slot.hello.process if slot.hello else None,
                "devices": slot.devices,
                "alive": slot.alive,
                "leases": slot.num_leases,
                "restarts": slot.restarts,
                "seconds_since_last_result": None if slot.last_seen is None else round(now - slot.last_seen, 1),
                "problem": slot.problem,
            }
            for slot in self.slots
        ]
        return {
            "seconds": round(now - self._began, 1),
            "workers": workers,
            "broadcasts": self._num_broadcasts,
            "broadcast_step": self.newest.step if self.newest else None,
            "leases_done": self._leases.num_done,
            "leases_waiting": self._leases.num_waiting,
            "leases_out": self._leases.num_out,
            "leases_issued_again": self._leases.num_reissued,
            "results_dropped": self._num_superfluous,
            "usual_seconds_a_lease": self._leases.usual_seconds,
            "bytes_out": self._bytes_out,
            "bytes_in": self._bytes_in,
        }

    async def work(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for slot in self.slots:
                group.create_task(self._keep(slot))
            group.create_task(self._watch(group))

    def order(self, rounds: list[LeasedRound]) -> None:
        """Rounds that are to be scored."""
        for round_ in rounds:
            for lease in round_.leases:
                self._rounds[lease] = round_
                self._leases.issue(lease, time.monotonic())
        self._tell()

    def _tell(self) -> None:
        """Wakes whoever waits for a lease."""
        self._news.set()
        self._news = asyncio.Event()

    async def _watch(self, group: asyncio.TaskGroup) -> None:
        """Machines that join get a worker; the status is kept where others can see it."""
        while True:
            if self._one_a_machine:
                known = {slot.machine.node for slot in self.slots}
                for machine in await self._machines():
                    if machine.node not in known and not machine.is_here:
                        slot = self._slot(machine)
                        self.slots.append(slot)
                        group.create_task(self._keep(slot))
            self._board.write.remote(json.dumps(self.status()))
            await asyncio.sleep(_WATCH_SECONDS)

    async def _machines(self) -> list[machines.Machine]:
        """Those that are alive; those that were, while the cluster does not answer."""
        with contextlib.suppress(Exception):  # of many kinds, and it may answer again
            self._found = await asyncio.to_thread(machines.machines)
        return self._found

    async def _keep(self, slot: Slot) -> None:
        """Starts a worker in this place, again and again, as long as there is the machine."""
        from ray.exceptions import RayError

        wait, (least, most) = 0.0, BACKOFF_SECONDS
        while True:
            done_before, lost = slot.num_leases, None
            try:
                await self._employ(slot)
            except _Unfit as error:
                if self.has_started and not slot.problem:
                    say(f"{slot.name} is left out: {error}")
                slot.problem = str(error)
            except RayError as error:
                lost = _reason(error)
                if slot.hello is None:  # nobody has ever come: what hinders one will hinder the next
                    slot.problem = f"{where(slot)} cannot start: {lost}"
            slot.alive = False
            if slot.machine and slot.machine.node not in {machine.node for machine in await self._machines()}:
                say(f"{where(slot)} is gone: its machine has left the cluster")
                self.slots.remove(slot)
                return
            wait = least if slot.num_leases > done_before else min(most, max(least, 2 * wait))
            if lost and (self.has_started or not slot.problem):
                slot.restarts += 1
                say(f"{where(slot)} is lost and starts again in {wait:.0f} s ({lost})")
            await asyncio.sleep(wait)

    async def _employ(self, slot: Slot) -> None:
        """Starts a worker and gives it leases until it is lost. Raises: RayError, _Unfit."""
        actor = machines.start_worker(slot.machine, self._make_work, self._layout)
        worker = object()
        try:
            slot.hello = await actor.hello.remote()
            await self._check(slot, actor)
            slot.alive, slot.problem = True, None
            self._leases.join(worker)
            raise await _first_error([self._serve(slot, actor, worker) for _ in range(LEASES_A_WORKER)])
        finally:
            self._leases.leave(worker)
            self._tell()
            machines.stop(actor)

    async def _check(self, slot: Slot, actor) -> None:
        import ray

        machine, expected = slot.hello.machine, versions()
        differ = [
            f"{name} {slot.hello.versions[name]} where the learner has {expected[name]}"
            for name in expected
            if slot.hello.versions[name] != expected[name]
        ]
        if differ:
            raise _Unfit(f"machine {machine} has {', '.join(differ)}: install the same on all machines")
        try:
            count, slot.devices = await actor.begin.remote()
        except ray.exceptions.RayTaskError as error:
            raise _Unfit(f"machine {machine} cannot do the work: {brief(error.cause)}") from error
        if count != self._layout.num_examples:
            raise _Unfit(
                f"machine {machine} has {count:,} training examples where the learner has "
                f"{self._layout.num_examples:,}: give it the same data"
            )

    async def _serve(self, slot: Slot, actor, worker) -> None:
        """One lease after the other. Raises RayError if the worker is lost."""
        import ray

        failures = 0
        while True:
            lease = await self._next(worker)
            try:
                step, scores = await self._score(slot, actor, worker, lease)
            except ray.exceptions.RayTaskError as error:  # in the worker's own code; it is still there
                failures += 1
                self._leases.give_back(lease, worker)
                say(f"{where(slot)} has failed to score, others try: {brief(error.cause)}")
                if failures == MAX_FAILURES:
                    raise
                await asyncio.sleep(BACKOFF_SECONDS[0])
                continue
            except ray.exceptions.ObjectStoreFullError as error:
                self._leases.give_back(lease, worker)
                here = socket.gethostname()
                say(f"the parameters do not fit the object store of {here}, training goes on: {brief(error)}")
                await asyncio.sleep(BACKOFF_SECONDS[0])
                continue
            failures = 0
            slot.num_leases += 1
            slot.last_seen = time.monotonic()
            self._bytes_in += scores.nbytes
            if self._leases.done(lease, slot.last_seen):
                self._rounds.pop(lease).fill(lease, step, scores)
            else:
                self._num_superfluous += 1
            self._tell()

    async def _next(self, worker) -> int:
        while (lease := self._leases.offer(worker, time.monotonic())) is None:
            # Not wait_for: before Python 3.12 it forgets that it was cancelled if there is news at the same moment.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await self._news.wait()
        return lease

    async def _score(self, slot: Slot, actor, worker, lease: int) -> tuple[int, np.ndarray]:
        """(step of the parameters, scores) of a lease."""
        broadcast = self._rounds[lease].broadcast or self.newest
        broadcast.num_served += 1
        if broadcast.reference is None:
            broadcast.reference = asyncio.ensure_future(asyncio.to_thread(_put, broadcast.params))
            self._num_broadcasts += 1
        try:
            reference = await asyncio.shield(broadcast.reference)
            broadcast.params = None  # they are in Ray's store
        except Exception:
            broadcast.reference = None
            raise
        if slot.name not in broadcast.workers:
            broadcast.workers.add(slot.name)
            self._bytes_out += broadcast.num_bytes
        scores = await actor.score.remote(reference, broadcast.step, lease, self._leases.held_by(worker))
        return broadcast.step, scores


def _put(params):
    import ray

    return ray.put(jax.device_get(params))


async def _first_error(endless: list[Coroutine]) -> BaseException:
    """Of these, which only an error ends; the others end with it.

    Neither TaskGroup nor gather: before Python 3.13 they forget that they were cancelled, over an error then.
    """
    tasks = [asyncio.create_task(one) for one in endless]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return done.pop().exception()


def where(slot: Slot) -> str:
    """The worker and its machine, for a person."""
    machine = slot.hello.machine if slot.hello else slot.machine.name if slot.machine else "no machine yet"
    return f"{slot.name} on {machine}"


def _reason(error: Exception) -> str:
    import ray

    died = isinstance(error, ray.exceptions.ActorDiedError) and not isinstance(error.__cause__, Exception)
    return "its process has died" if died else brief(error)
