"""Link between the learner and the driver of Ray: starts it, restarts it, and carries rounds and scores."""

import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from issgd_jax.cluster import channel, machines
from issgd_jax.cluster.driver import END_SECONDS, Plan
from issgd_jax.cluster.rounds import Broadcast, LeasedRound
from issgd_jax.console import say
from issgd_jax.errors import ClusterLostError, InputError, brief

# Drivers lost in a row without a result of a worker, after which the cluster is given up.
MAX_LOST = 3
# Longest wait for a driver to join Ray.
JOIN_SECONDS = 300.0
# Then it sends its status twice a second; one that sends nothing for so long is ended.
SILENT_SECONDS = 120.0
# Seconds between two messages while Ray is being joined.
TELL_SECONDS = 15.0
# Seconds before a lost driver is restarted; doubled after each that has given no result.
BACKOFF_SECONDS = 1.0
# Finds the package where the learner has found it; not a module of the user's program, which would run once more.
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from issgd_jax.cluster.driver import main; main(int(sys.argv[2]))"
)


class Link:
    """Keeps a driver running and the rounds on their way, in two threads of its own, for which the learner never waits.

    One thread starts drivers and receives what they send; the other sends. When a driver is lost, the next one gets
    what its rounds lack.

    Args:
      plan: of the first driver.

    Attributes:
      newest: latest broadcast, for rounds that have none of their own.
      error: why the cluster is given up; None: it is not.
      width: workers at the start.
      layout: partition of the examples.
    """

    def __init__(self, plan: Plan):
        self._plan = plan
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()  # lists of rounds, and ends of new drivers
        self._rounds: dict[int, LeasedRound] = {}  # of each lease without scores
        self._started: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._is_joined, self._closing = threading.Event(), threading.Event()
        self._connection: Connection | None = None
        self._outlet: channel.Outlet | None = None
        self._status: dict[str, Any] = {}
        self._num_broadcasts = self._num_results = self._num_restarts = 0
        self._broadcasts: dict[int, Broadcast] = {}  # the latest that was sent, by its number
        self._log_folder: str | None = None
        self.newest: Broadcast | None = None
        self.error: Exception | None = None
        self._threads = [
            threading.Thread(target=target, name=f"cluster {name}", daemon=True)
            for name, target in (("receiver", self._run), ("sender", self._send_all))
        ]

    def start(self) -> None:
        """Waits until the workers have started.

        Raises:
          InputError: the cluster cannot be joined, a machine cannot be used, or no worker has started.
        """
        for thread in self._threads:
            thread.start()
        began = time.monotonic()
        while not self._is_joined.wait(TELL_SECONDS):
            say(f"waiting for Ray at {self._plan.address!r} ({time.monotonic() - began:.0f} s)")
        self._started.result()

    def submit(self, rounds: list[LeasedRound]) -> None:
        """Sends rounds to the driver; returns at once.

        Raises:
          ClusterLostError: the cluster is given up.
        """
        for round_ in rounds:
            self._rounds.update(dict.fromkeys(round_.leases, round_))
        if self.error:
            raise self.error
        self._outbox.put(rounds)

    def status(self) -> dict[str, Any]:
        """Returns the driver's status, of less than a second ago; see `status.describe`."""
        return self._status | {"drivers_lost": self._num_restarts}

    def close(self) -> None:
        """Ends the driver, and all workers."""
        self._closing.set()
        if self._connection:
            channel.end(self._connection)
        for thread in self._threads:
            if thread.is_alive():
                thread.join()
        self._give_up(ClusterLostError("the cluster pool has been closed"))

    # -- the receiving thread

    def _run(self) -> None:
        try:
            self._keep_driver_running()
        except BaseException as error:  # raised in the learner's thread
            self._give_up(error)
        finally:
            if not self._started.done():
                self._started.set_exception(self.error or InputError("the cluster has been closed"))
            self._is_joined.set()
            self._outbox.put(None)

    def _keep_driver_running(self) -> None:
        num_lost, delay = 0, BACKOFF_SECONDS
        while not self._closing.is_set():
            num_results = self._num_results
            try:
                reason = self._run_driver()
            except OSError as error:  # no memory, processes or files, as where Ray has just failed for lack of them
                reason = f"the process that speaks with Ray cannot be started: {brief(error)}"
            if self._closing.is_set() or self.error:
                return
            if not self._started.done():
                raise InputError(reason)
            self._mark_lost()
            is_useful = self._num_results > num_results
            num_lost, delay = (1, BACKOFF_SECONDS) if is_useful else (num_lost + 1, 2 * delay)
            if num_lost > MAX_LOST:
                raise ClusterLostError(f"{num_lost} drivers of Ray in a row are lost ({reason})")
            say(f"Ray is lost with all its workers, and restarts in {delay:.0f} s; training continues ({reason})")
            self._closing.wait(delay)

    def _run_driver(self) -> str:
        """Starts a driver, and receives what it sends until it ends; returns why it has ended."""
        refused, silent, self._patience = None, False, JOIN_SECONDS
        with tempfile.TemporaryFile() as log, self._driver(log) as process:
            while True:
                try:
                    message = self._connection.recv() if self._connection.poll(self._patience) else None
                except (EOFError, OSError):
                    break
                if message is None:
                    silent = True
                    process.kill()
                    break
                if message[0] == "refused":
                    refused = message[1]
                else:
                    self._receive(*message)
            self._outlet.is_free.set()
            _end(process)
            log.seek(0)
            lines = log.read()[-10_000:].decode(errors="replace").strip().splitlines()
        if refused:
            return refused
        folder = f"; Ray's logs are in {self._log_folder or machines.log_folder()}"
        last = f": {lines[-1][:400]}" if lines else ""
        end = f"sent nothing for {self._patience:g} s" if silent else f"ended with status {process.returncode}"
        return f"the process that speaks with Ray has {end}{last}{folder}"

    @contextlib.contextmanager
    def _driver(self, log):
        """Starts a driver, and hands its connection to the sending thread."""
        self._connection, there = channel.pair()
        with there, _closing_at_error(self._connection):
            arguments = [json.dumps([str(folder) for folder in sys.path]), str(there.fileno())]
            process = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, *arguments],
                pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is the learner's
            )
        if self._closing.is_set():
            channel.end(self._connection)
        self._outlet = channel.Outlet(self._connection)
        self._outbox.put(self._outlet)
        try:
            yield process
        finally:
            channel.end(self._connection)
            _end(process)

    def _receive(self, kind: str, *values) -> None:
        match kind, values:
            case "scores", (lease, step, scores):
                self._num_results += 1
                self._rounds.pop(lease).add_scores(lease, step, scores)
            case "taken", ():
                self._outlet.is_free.set()
            case "served", (number,):
                if broadcast := self._broadcasts.get(number):
                    broadcast.is_served = True
            case "status", (status,):
                self._status = status
            case "joined", (width, layout, log_folder):
                self._log_folder, self._patience = log_folder, SILENT_SECONDS
                self._is_joined.set()
                if not self._started.done():
                    self.width, self.layout = width, layout
                    self._plan = dataclasses.replace(self._plan, layout=layout)
            case "started", ():
                if not self._started.done():
                    self._started.set_result(None)
                elif not self._closing.is_set():
                    say("Ray runs again, and workers are starting")
            case "say", (message,):
                say(message)
            case "lost", (message,):
                self._give_up(ClusterLostError(message))

    def _mark_lost(self) -> None:
        self._num_restarts += 1
        workers = [worker | {"alive": False} for worker in self._status.get("workers", [])]
        self._status = self._status | {"workers": workers}

    def _give_up(self, error: BaseException) -> None:
        """Makes the learner raise this error where it waits for a round or submits one."""
        self.error = self.error or error
        for round_ in list(self._rounds.values()):
            round_.fail(self.error)

    # -- the sending thread

    def _send_all(self) -> None:
        outlet, unfinished = None, []
        sent: Broadcast | None = None
        while (item := self._outbox.get()) is not None:
            if isinstance(item, channel.Outlet):
                outlet, sent, rounds = item, None, unfinished
                self._broadcasts.clear()
                self._num_broadcasts = 0
            else:
                rounds = item
                unfinished = [*unfinished, *item]
            try:
                if isinstance(item, channel.Outlet):
                    outlet.connection.send(self._plan)
                sent = self._send(outlet, [round_ for round_ in rounds if not round_.is_ready()], sent)
            except OSError:  # the driver has ended; the next one gets all that is unfinished
                pass
            except Exception as error:  # of the devices: the parameters cannot be read
                self._give_up(ClusterLostError(f"the parameters cannot be sent to the workers: {brief(error)}"))
                return
            unfinished = [round_ for round_ in unfinished if not round_.is_ready()]

    def _send(self, outlet: channel.Outlet, rounds: list[LeasedRound], sent: Broadcast | None) -> Broadcast | None:
        """Sends the leases of rounds, each after its parameters; returns the parameters sent last."""
        for broadcast, group in itertools.groupby(rounds, lambda round_: round_.broadcast or self.newest):
            if broadcast is not sent:
                packed = broadcast.pack()
                outlet.connection.send(("parameters", broadcast.step))
                outlet.send(packed)
                sent = broadcast
                self._broadcasts.clear()
                self._broadcasts[self._num_broadcasts] = broadcast
                self._num_broadcasts += 1
            members = list(group)
            leases = [lease for round_ in members for lease in round_.missing]
            outlet.connection.send(("submit", leases, members[0].broadcast is not None))
        return sent


@contextlib.contextmanager
def _closing_at_error(connection: Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        channel.end(connection)
        raise


def _end(process: subprocess.Popen) -> None:
    """Waits for a driver whose connection is closed; ends it if that takes too long."""
    try:
        process.wait(END_SECONDS + 5.0)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def code_folders() -> tuple[str, ...]:
    """Returns the folder of the program that runs, from which it may have imported what workers need."""
    return (os.path.dirname(os.path.realpath(sys.argv[0])),) if sys.argv and sys.argv[0] not in ("", "-c") else ()
