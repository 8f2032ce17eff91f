"""`WorkerPool` over many machines: the same calls, answered by a thread of its own that speaks with Ray.

Ray's calls may take as long as the network does, and the learner waits for nobody. So it only leaves copies of its
parameters and orders of rounds; all else happens in the event loop of that thread, where nothing needs a lock.
"""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from issgd_jax.cluster import machines
from issgd_jax.cluster.leases import Layout, Leases
from issgd_jax.cluster.worker import Hello, Work, versions
from issgd_jax.errors import InputError, brief
from issgd_jax.metrics import say

# Leases that a worker has at a time: while it does one, the next is on its way.
LEASES_A_WORKER = 2
# Of each worker, before training begins.
START_SECONDS = 120.0
# Before a worker that was lost is started again: doubled from one to the other while it does not do a single lease.
BACKOFF_SECONDS = (1.0, 30.0)
# Leases that fail one after the other, before the worker is started again.
MAX_FAILURES = 3
_LOOK_SECONDS = 0.05  # until an idle worker asks again
_WATCH_SECONDS = 1.0

_copied = jax.jit(lambda params: jax.tree.map(jnp.copy, params))


class _Broadcast:
    """Parameters of one step on their way out. reference: Ray's, once they are in its store."""

    def __init__(self, step: int, params):
        self.step, self.params, self.num_served = step, params, 0
        self.num_bytes = sum(x.nbytes for x in jax.tree.leaves(params))
        self.reference: asyncio.Future | None = None
        self.machines: set[str] = set()


class _Scored(NamedTuple):
    step: int
    indices: np.ndarray
    scores: np.ndarray


class LeasedRound:
    """A `schedule.Round` that comes from a cluster: some leases, scored with the parameters of one step.

    Reading what is not ready yet waits for it.
    """

    def __init__(self, leases: range, broadcast: _Broadcast | None, layout: Layout):
        """broadcast: whose scores are wanted; None = of the newest parameters when the lease begins."""
        self.leases, self.broadcast = leases, broadcast
        self.num_examples = len(leases) * layout.chunk_size
        self._layout, self._found = layout, {}
        self._scored: concurrent.futures.Future[_Scored] = concurrent.futures.Future()

    def is_ready(self) -> bool:
        return self._scored.done()

    @property
    def step(self) -> int:
        return self.broadcast.step if self.broadcast else self._scored.result().step

    @property
    def indices(self) -> np.ndarray:
        return self._scored.result().indices

    @property
    def scores(self) -> np.ndarray:
        return self._scored.result().scores

    def fill(self, lease: int, step: int, scores: np.ndarray) -> None:
        """The first, and only, result of one of its leases."""
        self._found[lease] = scores
        if len(self._found) == len(self.leases):
            indices = np.concatenate([self._layout.examples(number) for number in self.leases])
            all_scores = np.concatenate([self._found[number] for number in self.leases])
            self._scored.set_result(_Scored(step, indices, all_scores))

    def fail(self, error: BaseException) -> None:
        """Nobody will score it any more."""
        if not self._scored.done():
            self._scored.set_exception(error)


@dataclasses.dataclass
class _Slot:
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

        Raises: InputError if chunk_size does not fit.
        """
        if not 1 <= chunk_size <= num_examples:
            raise InputError(
                f"workers.chunk_size must be between 1 and {num_examples} (all examples), got {chunk_size}"
            )
        self._make_work, self._num_examples, self._chunk_size = make_work, num_examples, chunk_size
        self._address, self._num_workers, self._reproducible = address, num_workers, reproducible
        self._params_bytes = params_bytes
        self._slots: list[_Slot] = []
        self._rounds: dict[int, LeasedRound] = {}
        self._newest: _Broadcast | None = None
        self._next_lease = 0
        self._bytes_out = self._bytes_in = self._num_broadcasts = self._num_superfluous = 0
        self._has_started = False
        self._error: BaseException | None = None

    def __enter__(self) -> "ClusterPool":
        """Connects, and waits until the workers are there.

        Raises: InputError that names the machine which does not fit; or if no worker comes at all.
        """
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            stack.enter_context(machines.connected(self._address))
            self._one_a_machine = self._num_workers is None
            self._found = machines.machines()
            self._slots = self._first_slots(self._found)
            self.num_workers = len(self._slots)
            self._layout = Layout.of(self._num_examples, chunk_size=self._chunk_size, num_workers=self.num_workers)
            self._leases = Leases(self._layout)
            self._board = machines.make_board()
            self._began = time.monotonic()
            self._loop = asyncio.new_event_loop()
            self._news = asyncio.Event()
            self._task = self._loop.create_task(self._work())
            self._thread = threading.Thread(target=self._run, name="cluster", daemon=True)
            self._thread.start()
            stack.callback(self._end)
            self._wait_for_workers()
            self._has_started = True
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception):
        self._stack.close()

    # What a learner asks for: the calls of `WorkerPool`.

    @property
    def rounds_per_sweep(self) -> int:
        """Rounds after which every example has been scored at least once."""
        return -(-self._layout.leases_per_sweep // self.leases_per_round)

    @property
    def leases_per_round(self) -> int:
        return self.num_workers if self._reproducible else 1

    @property
    def rounds_ahead(self) -> int:
        """Rounds in flight that keep all workers busy, also those that came later."""
        return -(-(LEASES_A_WORKER + 1) * max(self.num_workers, len(self._slots)) // self.leases_per_round)

    @property
    def place(self) -> dict[str, int]:
        """Where the next round begins, as an example of a sweep."""
        return {"item": self._next_lease * self._chunk_size, "workers": 1}

    def go_to(self, place: dict[str, int]) -> None:
        """Goes on at a place, also of a pool with another number of workers: at the same part of a sweep."""
        self._next_lease = place["item"] * place["workers"] // self._chunk_size

    def score_next(self, params, step: int, num_rounds: int = 1) -> list[LeasedRound]:
        """Orders rounds with the parameters of `step`, and returns at once. The parameters are copied, so that the
        caller may donate them."""
        if self._error:
            raise RuntimeError("the thread of the cluster has ended") from self._error
        if num_rounds <= 0:
            return []
        # All machines are sent what the ones before them were, so that parameters go out once a round.
        if self._reproducible or self._newest is None or self._newest.num_served >= len(self._slots):
            self._newest = _Broadcast(step, _copied(params))
        broadcast = self._newest if self._reproducible else None
        rounds = []
        for _ in range(num_rounds):
            first, self._next_lease = self._next_lease, self._next_lease + self.leases_per_round
            rounds.append(LeasedRound(range(first, self._next_lease), broadcast, self._layout))
        self._loop.call_soon_threadsafe(self._order, rounds)
        return rounds

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
            for slot in self._slots
        ]
        return {
            "seconds": round(now - self._began, 1),
            "workers": workers,
            "broadcasts": self._num_broadcasts,
            "broadcast_step": self._newest.step if self._newest else None,
            "leases_done": self._leases.num_done,
            "leases_waiting": self._leases.num_waiting,
            "leases_out": self._leases.num_out,
            "leases_issued_again": self._leases.num_reissued,
            "results_dropped": self._num_superfluous,
            "usual_seconds_a_lease": self._leases.usual_seconds,
            "bytes_out": self._bytes_out,
            "bytes_in": self._bytes_in,
        }

    # The start, in the caller's thread.

    def _first_slots(self, found: list[machines.Machine]) -> list[_Slot]:
        _check_object_stores(found, self._params_bytes)
        if self._num_workers is not None:
            return [_Slot(f"worker {i}", None) for i in range(self._num_workers)]
        others = [machine for machine in found if not machine.is_here]
        return [_Slot(f"worker {i}", machine) for i, machine in enumerate(others or found)]

    def _wait_for_workers(self) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and any(not slot.alive and not slot.problem for slot in self._slots):
            if self._error:
                raise RuntimeError("the thread of the cluster has ended") from self._error
            time.sleep(0.02)
        if problems := [slot.problem for slot in self._slots if slot.problem]:
            raise InputError("; ".join(problems))
        missing = [_where(slot) for slot in self._slots if not slot.alive]
        if len(missing) == len(self._slots):
            raise InputError(
                f"none of the {len(missing)} worker(s) has started within {START_SECONDS:.0f} s: see `ray status`"
            )
        if missing:
            say(f"training begins without {', '.join(missing)}, not started within {START_SECONDS:.0f} s")

    # All that follows happens in the thread of the event loop.

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except BaseException as error:  # the learner is told at its next round
            self._error = error
        finally:
            for round_ in list(self._rounds.values()):
                round_.fail(self._error or RuntimeError("the cluster pool has been closed"))
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _end(self) -> None:
        with contextlib.suppress(RuntimeError):  # it has ended already
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()
        machines.stop(self._board)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            for slot in self._slots:
                group.create_task(self._keep(slot))
            group.create_task(self._watch(group))

    def _order(self, rounds: list[LeasedRound]) -> None:
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
                known = {slot.machine.node for slot in self._slots}
                for machine in await self._machines():
                    if machine.node not in known and not machine.is_here:
                        slot = _Slot(f"worker {len(self._slots)}", machine)
                        self._slots.append(slot)
                        group.create_task(self._keep(slot))
            self._board.write.remote(json.dumps(self.status()))
            await asyncio.sleep(_WATCH_SECONDS)

    async def _machines(self) -> list[machines.Machine]:
        """Those that are alive; those that were, while the cluster does not answer."""
        with contextlib.suppress(Exception):  # of many kinds, and it may answer again
            self._found = await asyncio.to_thread(machines.machines)
        return self._found

    async def _keep(self, slot: _Slot) -> None:
        """Starts a worker in this place, again and again, as long as there is the machine."""
        from ray.exceptions import RayError

        wait, (least, most) = 0.0, BACKOFF_SECONDS
        while True:
            done_before, lost = slot.num_leases, None
            try:
                await self._employ(slot)
            except _Unfit as error:
                if self._has_started and not slot.problem:
                    say(f"{slot.name} is left out: {error}")
                slot.problem = str(error)
            except RayError as error:
                lost = _reason(error)
                if slot.hello is None:  # nobody has ever come: what hinders one will hinder the next
                    slot.problem = f"{_where(slot)} cannot start: {lost}"
            slot.alive = False
            if slot.machine and slot.machine.node not in {machine.node for machine in await self._machines()}:
                say(f"{_where(slot)} is gone: its machine has left the cluster")
                self._slots.remove(slot)
                return
            wait = least if slot.num_leases > done_before else min(most, max(least, 2 * wait))
            if lost and (self._has_started or not slot.problem):
                slot.restarts += 1
                say(f"{_where(slot)} is lost and starts again in {wait:.0f} s ({lost})")
            await asyncio.sleep(wait)

    async def _employ(self, slot: _Slot) -> None:
        """Starts a worker and gives it leases until it is lost. Raises: RayError, _Unfit."""

        actor = machines.start_worker(slot.machine, self._make_work, self._layout)
        worker = object()
        try:
            slot.hello = await actor.hello.remote()
            await self._check(slot, actor)
            slot.alive, slot.problem = True, None
            self._leases.join(worker)
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(LEASES_A_WORKER):
                        group.create_task(self._serve(slot, actor, worker))
            except ExceptionGroup as errors:  # of the first, which has ended the others
                raise errors.exceptions[0] from None
        finally:
            self._leases.leave(worker)
            self._tell()
            machines.stop(actor)

    async def _check(self, slot: _Slot, actor) -> None:
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
        if count != self._num_examples:
            raise _Unfit(
                f"machine {machine} has {count:,} training examples where the learner has {self._num_examples:,}: give "
                "it the same data"
            )

    async def _serve(self, slot: _Slot, actor, worker) -> None:
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
                say(f"{_where(slot)} has failed to score, others try: {brief(error.cause)}")
                if failures == MAX_FAILURES:
                    raise
                await asyncio.sleep(BACKOFF_SECONDS[0])
                continue
            except ray.exceptions.ObjectStoreFullError as error:
                self._leases.give_back(lease, worker)
                say(f"the parameters do not fit the object store of {_here()}, training goes on: {brief(error)}")
                await asyncio.sleep(BACKOFF_SECONDS[0])
                continue
            failures = 0
            slot.num_leases += 1
            slot.last_seen = time.monotonic()
            self._bytes_in += scores.nbytes
            if self._leases.done(lease, worker, slot.last_seen):
                self._rounds.pop(lease).fill(lease, step, scores)
            else:
                self._num_superfluous += 1
            self._tell()

    async def _next(self, worker) -> int:
        while (lease := self._leases.offer(worker, time.monotonic())) is None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), _LOOK_SECONDS)
        return lease

    async def _score(self, slot: _Slot, actor, worker, lease: int) -> tuple[int, np.ndarray]:
        """(step of the parameters, scores) of a lease."""
        broadcast = self._rounds[lease].broadcast or self._newest
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
        if slot.name not in broadcast.machines:
            broadcast.machines.add(slot.name)
            self._bytes_out += broadcast.num_bytes
        scores = await actor.score.remote(reference, broadcast.step, lease, self._leases.held_by(worker))
        return broadcast.step, scores


def _put(params):
    import ray

    return ray.put(jax.device_get(params))


def _where(slot: _Slot) -> str:
    machine = slot.hello.machine if slot.hello else slot.machine.name if slot.machine else "no machine yet"
    return f"{slot.name} on {machine}"


def _reason(error: Exception) -> str:
    import ray

    died = isinstance(error, ray.exceptions.ActorDiedError) and not isinstance(error.__cause__, Exception)
    return "its process has died" if died else brief(error)


def _here() -> str:
    import socket

    return f"the learner's machine, {socket.gethostname()}"


def _check_object_stores(found: list[machines.Machine], params_bytes: int) -> None:
    """Two broadcasts must fit: the one that is being read, and the next."""
    for machine in found:
        room = machine.resources.get("object_store_memory", math.inf)
        if 2 * params_bytes > room:
            raise InputError(
                f"the object store of machine {machine.name} has {room:,.0f} bytes, but two copies of the parameters "
                f"need {2 * params_bytes:,}: start Ray there with a larger --object-store-memory"
            )
