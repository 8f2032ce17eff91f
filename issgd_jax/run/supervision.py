"""Supervision of a run: a heartbeat, a watchdog, and the signals that ask it to stop. Imports no jax."""

import contextlib
import faulthandler
import json
import os
import pathlib
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

import psutil

from issgd_jax.cluster.status import STATUS_FILE
from issgd_jax.console import say
from issgd_jax.errors import FolderLostError
from issgd_jax.files import write_text_atomically
from issgd_jax.run.workdir import HEARTBEAT_FILE, WATCHDOG_FILE

# Ctrl-C, the system's, the terminal's end, and what batch systems and spot instances are told to send.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
HEARTBEAT_SECONDS = 1.0


class Supervision:
    """Supervises one run while its context lasts, in a thread that never touches the run.

    heartbeat.json has the last finished step and its time, cluster.json the status of the workers on a cluster. Where
    no step finishes for `watchdog_seconds`, the stacks of all threads are written to watchdog.txt, even if one of them
    never lets Python run. The first signal of `SIGNALS` is kept in `signal`, so that the run can stop between two
    steps; a second SIGINT interrupts at once, and so does the first while nothing is done that could be saved.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        *,
        watchdog_seconds: float,
        first_step: int = 0,
        cluster_status: Callable[[], dict] | None = None,
        is_starting: bool = False,
        check_lock: Callable[[], None] = lambda: None,
    ):
        """Starts nothing.

        Args:
          workdir: folder of the run.
          watchdog_seconds: > 0.
          first_step: steps that were done before.
          cluster_status: see `cluster.pool.ClusterPool.status`; None: there is no cluster.
          is_starting: whether a SIGINT interrupts at once until a step is done, and does not wait for compilations.
          check_lock: called before anything is written; raises FolderLostError if the folder is no longer the run's.
        """
        self.signal: int | None = None
        self._cluster_status, self._check_lock = cluster_status, check_lock
        self._lost: FolderLostError | None = None
        self._workdir, self._watchdog_seconds = workdir, watchdog_seconds
        self._step, self._finished_at = first_step, time.monotonic()
        self._is_starting, self._first_step = is_starting, None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="supervision", daemon=True)
        self._handlers = {}
        self._heartbeat_failed = False
        self._stacks: TextIO = sys.stderr

    def finished(self, step: int) -> None:
        """Records that so many steps are done.

        Raises:
          FolderLostError: the folder is no longer that of this run.
        """
        if self._lost:
            raise self._lost
        self._step, self._finished_at = step, time.monotonic()
        if self._is_starting:
            self._first_step = step if self._first_step is None else self._first_step
            self._is_starting = step == self._first_step

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():  # signals can be handled only there
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                    self._handlers[number] = signal.signal(number, self._on_signal)
        with contextlib.suppress(OSError):  # a full disk: to the terminal
            self._check_lock()
            self._stacks = open(self._workdir / WATCHDOG_FILE, "w")
        self._thread.start()
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stacks is not sys.stderr:
            self._stacks.close()
            with contextlib.suppress(OSError, FolderLostError):
                self._check_lock()
                if not (self._workdir / WATCHDOG_FILE).stat().st_size:
                    (self._workdir / WATCHDOG_FILE).unlink()

    def _on_signal(self, number, frame):
        is_urgent = number == signal.SIGINT and (self._is_starting or self.signal == number)
        self.signal = number
        if is_urgent:
            before = self._handlers[number]
            (before if callable(before) else signal.default_int_handler)(number, frame)

    def _watch(self) -> None:
        """Writes the heartbeat and restarts the watchdog's timer as steps finish; logs a stall once."""
        last_finished_at, is_logged = None, False
        interval = min(HEARTBEAT_SECONDS, self._watchdog_seconds / 4)
        while True:
            ended = self._ended.wait(interval)
            step, finished_at = self._step, self._finished_at
            if finished_at != last_finished_at:
                # A timer of its own, not of Python: it also fires where a thread never lets Python run.
                faulthandler.dump_traceback_later(self._watchdog_seconds, file=self._stacks)
                self._write_heartbeat(step, finished_at)
                last_finished_at, is_logged = finished_at, False
            if self._cluster_status:
                self._write(STATUS_FILE, self._cluster_status())
            if ended:
                return
            if time.monotonic() - finished_at > self._watchdog_seconds and not is_logged:
                seconds, path = self._watchdog_seconds, self._workdir / WATCHDOG_FILE
                say(f"no step has finished for {seconds:g} s since step {step:,}; stacks of all threads: {path}")
                is_logged = True

    def _write_heartbeat(self, step: int, finished_at: float) -> None:
        at = time.time() - (time.monotonic() - finished_at)
        beat = {"step": step, "at": round(at, 3), "process": os.getpid(), "host": socket.gethostname()}
        self._write(HEARTBEAT_FILE, beat)

    def _write(self, name: str, values: dict) -> None:
        try:
            self._check_lock()
            write_text_atomically(self._workdir / name, json.dumps(values) + "\n", sync=False)  # soon written again
        except FolderLostError as error:
            self._lost = error
        except OSError as error:
            if not self._heartbeat_failed:
                say(f"the heartbeat cannot be written, training continues: {error}")
            self._heartbeat_failed = True


def resident_bytes() -> int:
    """Returns the memory that this process has in use."""
    return psutil.Process().memory_info().rss
