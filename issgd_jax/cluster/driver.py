"""Driver: the process that speaks with Ray, a child of the learner's, so that Ray's death does not end the learner.

Ray ends the process that is connected to it when its daemon on this machine dies. Loads no JAX.
"""

import asyncio
import contextlib
import dataclasses
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import psutil

from issgd_jax.cluster import machines
from issgd_jax.cluster.channel import Inlet, Packed
from issgd_jax.cluster.dispatcher import Dispatcher, Parameters
from issgd_jax.cluster.leases import Layout
from issgd_jax.errors import InputError, brief

STATUS_SECONDS = 0.5
END_SECONDS = 10.0  # until a driver whose Ray does not answer ends without it
_RETRY_SECONDS = 1.0
_DAEMONS = ("gcs_server", "raylet")  # of a local cluster, children of the driver
# The learner decides when to stop, and ends the driver.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a driver is to do.

    Attributes:
      make_work: packed; called in every worker process.
      num_examples, chunk_size, num_workers, address, params_bytes: see `ClusterPool`.
      start_seconds: longest wait for workers.
      code_folders: see `machines.connected`.
      layout: of the driver before this one, which must not change; None: the first.
    """

    make_work: Packed
    num_examples: int
    chunk_size: int
    num_workers: int | None
    address: str
    params_bytes: int
    start_seconds: float
    code_folders: tuple[str, ...]
    layout: Layout | None = None


def main(descriptor: int) -> None:
    """Drives Ray until the learner closes the socket, or ends.

    Args:
      descriptor: of the socket, on which the learner sends a `Plan`, then `("parameters", step)` with the parameters
        behind it, and `("submit", leases, fixed)`. It receives `("joined", layout, log_folder)`, `("started",)`,
        `("taken",)` when parameters have been read, `("status", values)`, `("refused", message)` if Ray cannot be
        joined, `("lost", message)` if there is no use in another driver, and what `Dispatcher` sends.
    """
    os.set_inheritable(descriptor, False)
    connection, lock = Connection(descriptor), threading.Lock()

    def send(message: tuple) -> None:
        with lock, contextlib.suppress(OSError):  # the learner has ended, as the receiving thread sees too
            connection.send(message)

    plan = connection.recv()
    niceness = machines.niceness_of_workers(plan.address)
    _ignore_signals()
    try:
        with machines.connected(plan.address, plan.code_folders):
            _ignore_signals()  # Ray has set handlers of its own
            asyncio.run(_drive(connection, send, plan, niceness))
    except InputError as error:
        send(("refused", str(error)))


def _ignore_signals() -> None:
    for number in _SIGNALS:
        signal.signal(number, _ignore)  # not SIG_IGN, which Ray's processes would inherit


def _ignore(*_) -> None:
    pass


async def _drive(connection: Connection, send: Callable[[tuple], None], plan: Plan, niceness: int) -> None:
    """Runs a dispatcher until the learner closes the connection.

    Raises:
      InputError: no workers can be started.
    """
    cluster = machines.list_machines()
    machines.check_object_stores(cluster, plan.params_bytes)
    # Fixed at the start: rounds and shards must not change when machines join.
    width = len(machines.place_workers(cluster, plan.num_workers))
    layout = plan.layout or Layout.create(plan.num_examples, chunk_size=plan.chunk_size, num_workers=width)
    send(("joined", width, layout, machines.log_folder()))
    dispatcher = Dispatcher(
        plan.make_work,
        layout,
        cluster,
        plan.num_workers,
        send=send,
        start_seconds=plan.start_seconds,
        niceness=niceness,
    )
    tasks = [asyncio.create_task(dispatcher.run()), asyncio.create_task(_report(dispatcher, send))]
    loop = asyncio.get_running_loop()

    def end() -> None:
        for task in tasks:
            task.cancel()

    receiver = _Receiver(connection, send, dispatcher, loop, end)
    threading.Thread(target=receiver.run, name="receiver", daemon=True).start()
    try:
        if plan.layout is None:
            starting = asyncio.create_task(dispatcher.wait_for_workers())
            tasks.append(starting)
            done, _ = await asyncio.wait([starting, tasks[0]], return_when=asyncio.FIRST_COMPLETED)
            done.pop().result()
        dispatcher.has_started = True
        send(("status", dispatcher.status()))
        send(("started",))
        try:
            await tasks[0]
        except InputError as error:
            send(("lost", str(error)))
    except asyncio.CancelledError:
        pass
    finally:
        _end_within(END_SECONDS)
        end()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _report(dispatcher: Dispatcher, send: Callable[[tuple], None]) -> None:
    """Sends the status from time to time; ends this process with Ray, which itself would take a minute to do so."""
    daemons = {process.name(): process for process in psutil.Process().children() if process.name() in _DAEMONS}
    while True:
        await asyncio.sleep(STATUS_SECONDS)
        send(("status", dispatcher.status()))
        if ended := [name for name, process in daemons.items() if _has_ended(process)]:
            print(f"Ray's {ended[0]} has ended", file=sys.stderr, flush=True)
            os._exit(1)


def _has_ended(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return True


class _Receiver:
    """Receives what the learner sends, in a thread of its own, and puts parameters into Ray's object store."""

    def __init__(self, connection: Connection, send, dispatcher: Dispatcher, loop, end: Callable[[], None]):
        self._connection, self._inlet, self._send = connection, Inlet(connection), send
        self._dispatcher, self._loop, self._end = dispatcher, loop, end
        self._num_broadcasts = 0
        self._parameters: Parameters | None = None

    def run(self) -> None:
        """Returns when the learner has closed the connection, or has ended."""
        try:
            while True:
                match self._connection.recv():
                    case ("parameters", step):
                        self._parameters = self._store(step, self._inlet.receive())
                        self._send(("taken",))
                    case ("submit", leases, fixed):
                        self._in_loop(self._dispatcher.submit, self._parameters, leases, fixed)
        except (EOFError, OSError):
            _end_within(END_SECONDS)
            self._in_loop(self._end)

    def _in_loop(self, function: Callable, *arguments) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _store(self, step: int, packed: Packed) -> Parameters:
        import ray

        number, self._num_broadcasts = self._num_broadcasts, self._num_broadcasts + 1
        while True:
            try:
                return Parameters(number, step, ray.put(packed), packed.num_bytes)
            except ray.exceptions.ObjectStoreFullError as error:
                message = f"the parameters do not fit Ray's object store here, training continues: {brief(error)}"
                self._send(("say", message))
                time.sleep(_RETRY_SECONDS)


def _end_within(seconds: float) -> None:
    """Ends this process after so many seconds, also where Ray does not answer; Ray's processes here end with it."""
    timer = threading.Timer(seconds, os._exit, [1])
    timer.daemon = True
    timer.start()
